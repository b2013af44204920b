# start32.S: the native entry, 32 bits. A Multiboot 1 loader jumps to `start`; ends in main().
#include "multiboot.inc"

start:                          # EAX = 0x2badb002, EBX = Multiboot information; flat, unpaged, IF = 0
    cld
    mov $boot_stack_top, %esp
    mov 8(%ebx), %ecx           # mem_upper: KiB of memory above 1 MiB
    add $1024, %ecx
    shr $11, %ecx               # large pages of 2 MiB
    cmp $MAX_MEMORY >> 21, %ecx
    jbe 1f
    mov $MAX_MEMORY >> 21, %ecx
1:  mov %ecx, %edx
    mov $kernel_table, %edi
    mov $0x83, %eax             # present, writable, large; one to one
2:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    loop 2b
    movl $0xfee0009b, kernel_table + 511 * 8    # the local APIC at 0x3fe00000: PCD, PWT
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
