# SPDX-License-Identifier: GPL-2.0-or-later
#
# Entry points of exceptions and of the watchdog's timer. They run on stacks of
# their own, because compiled code keeps data below its stack pointer (red zone).

    .section .text.interrupts, "ax"

# One entry every 16 bytes.
    .balign 16
    .globl exception_entries
exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    # The CPU pushes an error code for these; for the others a zero takes its place.
    .if (0x60227d00 >> vector) & 1
    .else
    pushq $0
    .endif
    pushq $vector
    jmp exception_entry
    .set vector, vector + 1
    .endr

exception_entry:
    cld
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %rdi
    andq $-16, %rsp
    call {exception}
    ud2

    .globl timer_entry
timer_entry:
    cld
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %rbp
    movq 80(%rsp), %rdi         # where the timer interrupted
    movq %rsp, %rbp
    subq $512, %rsp
    andq $-16, %rsp
    fxsave64 (%rsp)
    call {timer}
    fxrstor64 (%rsp)
    movq %rbp, %rsp
    popq %rbp
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    iretq

# The legacy controller's interrupts, which are counted: one entry every 32 bytes.
    .balign 32
    .globl counted_entries
counted_entries:
    .set number, 0
    .rept 2
    .balign 32
    lock incq {counts} + 8 * number(%rip)
    pushq %rax
    movb $0x20, %al             # the end of an interrupt
    outb %al, $0x20
    popq %rax
    iretq
    .set number, number + 1
    .endr

# A late interrupt of the legacy controllers, or a spurious one of the local APIC.
    .globl ignore_entry
ignore_entry:
    iretq
