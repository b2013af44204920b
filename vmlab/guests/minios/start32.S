# start32.S: the native entry, 32 bits. A Multiboot 1 loader jumps to `start`; ends in main().
#include "multiboot.inc"
    movl $kernel_table + 1, boot_root           # a PDPTE has no other bits

    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $boot_root, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80010000, %eax        # PG, and WP: copy-on-write must stop the kernel too
    mov %eax, %cr0

    lgdt gdt_pointer
    ljmp $KERNEL_CODE, $3f
3:  mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov $USER_DATA, %eax        # flat and of DPL 3 for good: entering the kernel reloads nothing
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    shl $21, %edx               # bytes of memory
    mov %edx, memory_end
    testb $4, (%ebx)            # flags bit 2: a command line is there
    jz 4f
    mov 16(%ebx), %eax
    mov %eax, command_line
4:  call native_setup
    call main
