# SPDX-License-Identifier: GPL-2.0-or-later
#
# From the PVH entry point, and from the start-up IPI, to Rust in 64-bit mode.

    .section .note.pvh, "a", @note
    .balign 4
    .long 4                     # size of the name
    .long 8                     # size of the value
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

# Start of the program: 32-bit protected mode, paging off, %ebx = start info.

    .section .text.boot, "ax"
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    lgdt boot_gdt_pointer
    ljmp $0x08, $1f
1:
    movl %ebx, %ebp
    xorl %edi, %edi             # CPU number
    jmp enter_long_mode

# Application processors come here from the trampoline.
ap_start32:
    movw $0x10, %ax
    movw %ax, %ds
    movl $1, %edi
    lock xaddl %edi, cpus_started
    cmpl ${max_cpus}, %edi
    jb enter_long_mode
1:
    hlt                         # no stack for this one; the boot CPU says so
    jmp 1b

enter_long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs

    movl $0x620, %eax           # CR4: PAE; OSFXSR and OSXMMEXCPT for SSE
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER
    rdmsr
    orl $0x100, %eax            # long mode
    wrmsr
    movl $0x80010033, %eax      # CR0: PG, WP, NE, ET, MP, PE; not EM, CD, NW
    movl %eax, %cr0
    ljmp $0x18, $1f

    .code64
1:
    movl %edi, %eax             # a stack for each CPU
    incl %eax
    imull ${stack_size}, %eax, %eax
    leaq {stacks}(%rax), %rsp
    movl %edi, %edi
    movl %ebp, %esi
    xorl %ebp, %ebp
    testl %edi, %edi
    jnz 2f
    call {boot_cpu}
2:
    call {other_cpu}
    ud2

# Copied to a page below 1 MiB; a start-up IPI enters it in real mode.

    .globl trampoline, trampoline_end
trampoline:
    .code16
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl boot_gdt_pointer_low - trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $ap_start32
    .balign 4
boot_gdt_pointer_low:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
trampoline_end:
    .code64

    .section .rodata.boot, "a"
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00cf9a000000ffff    # 0x08: 32-bit code
    .quad 0x00cf92000000ffff    # 0x10: data
    .quad 0x00af9a000000ffff    # 0x18: 64-bit code
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt

# The first GiB, identity-mapped with 2 MiB pages, which every CPU has.

    .section .data.boot, "aw"
    .balign 4096
    .globl boot_pml4, boot_pdpt
boot_pml4:
    .quad boot_pdpt + 3         # present, writable
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 3
    .fill 511, 8, 0
boot_pd:
    .set address, 0
    .rept 512
    .quad address + 0x83        # present, writable, large
    .set address, address + 0x200000
    .endr
    .globl cpus_started
cpus_started:
    .long 1                     # the boot CPU
