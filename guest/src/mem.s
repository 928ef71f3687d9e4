# SPDX-License-Identifier: GPL-2.0-or-later
#
# The C functions that compiled Rust calls.

    .section .text.mem, "ax"
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    movq %rdi, %rax
    subq %rsi, %rax
    cmpq %rdx, %rax
    jae memcpy                  # the destination is not inside the source
    movq %rdi, %rax
    movq %rdx, %rcx
    leaq -1(%rdi,%rdx), %rdi
    leaq -1(%rsi,%rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret

memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret

memcmp:
bcmp:
    xorl %eax, %eax
    xorl %ecx, %ecx
1:
    cmpq %rdx, %rcx
    je 2f
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r8d
    incq %rcx
    subl %r8d, %eax
    jz 1b
2:
    ret
