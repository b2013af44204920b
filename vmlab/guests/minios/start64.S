# start64.S: the native entry, 64 bits: the loader enters in 32-bit protected mode; ends in main() in long mode.
#include "multiboot.inc"
    movl $kernel_table + 3, boot_pdpt
    movl $boot_pdpt + 3, boot_root
    shl $21, %edx               # bytes of memory
    mov %edx, memory_end
    testb $4, (%ebx)            # flags bit 2: a command line is there
    jz 3f
    mov 16(%ebx), %eax
    mov %eax, command_line

3:  mov %cr4, %eax              # SDM Vol. 3A section 9.8.5: PAE, CR3, LME, PG
    or $0x20, %eax
    mov %eax, %cr4
    mov $boot_root, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx       # EFER: LME, and SCE for SYSCALL
    rdmsr
    or $0x101, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80010000, %eax        # PG, and WP: copy-on-write must stop the kernel too
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $KERNEL_CODE, $4f
    .code64
4:  mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov $USER_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $boot_stack_top, %esp
    call native_setup
    call main

    .bss
    .balign 4096
boot_pdpt:
    .skip 4096
