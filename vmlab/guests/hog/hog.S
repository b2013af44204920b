# hog.S: a kernel of one page that says CLI, makes the UART raise its interrupt, and computes for `spin` turns without a look at it.
# Between vmlab_roi_begin and vmlab_roi_end the guest's interrupt flag is 0: whoever takes the interrupt there is not the guest.
# Then STI: now it must arrive. Multiboot 1; AT&T syntax for GNU as. Built by build.py.

    .equ SPIN, 200000           # turns of two instructions
    .equ UART_IER, 0x3f9        # PC16550D data sheet, table of registers
    .equ UART_MCR, 0x3fc
    .equ DEBUG_EXIT, 0xf4

    .section .multiboot, "a"    # Multiboot 1 specification, section 3.1
    .align 4
    .long 0x1badb002, 0, -0x1badb002

    .text
    .globl start, vmlab_roi_begin, vmlab_roi_end, vmlab_outcome_start, vmlab_outcome_end, vmlab_work
start:                          # flat, unpaged, IF = 0
    cld
    lgdt gdt_pointer
    ljmp $0x08, $1f
1:  mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $stack_top, %esp
    mov $uart_interrupt, %eax   # one gate, for IRQ 4 at vector 0x24 (SDM Vol. 3A section 6.11)
    mov %ax, idt + 0x24 * 8
    movw $0x08, idt + 0x24 * 8 + 2
    movw $0x8e00, idt + 0x24 * 8 + 4
    shr $16, %eax
    mov %ax, idt + 0x24 * 8 + 6
    lidt idt_pointer
    mov $ports, %esi            # both 8259s to vectors 0x20..0x2f, only IRQ 4 let through (8259A data sheet); the UART's line enabled
2:  lodsw
    test %ax, %ax
    jz 3f
    mov %eax, %edx
    lodsb
    out %al, %dx
    jmp 2b
3:  sti
    call vmlab_roi_begin
    cli
    mov $UART_IER, %edx
    mov $2, %al                 # the transmitter is empty: enabling its interrupt raises it
    out %al, %dx
    mov $SPIN, %ecx
4:  dec %ecx
    jnz 4b
    call vmlab_roi_end
    mov seen, %eax
    mov %eax, seen_before
    sti
    mov $SPIN, %ecx             # when exactly it comes is not the guest's to say
8:  mov seen, %eax
    test %eax, %eax
    jnz 9f
    dec %ecx
    jnz 8b
9:  cli
    mov %eax, seen_after
    xor %eax, %eax
    cmpl $0, seen_before
    jne 5f
    cmpl $1, seen_after
    je 6f
5:  inc %eax
6:  mov $DEBUG_EXIT, %edx
    out %eax, %dx
7:  hlt
    jmp 7b

vmlab_roi_begin:
    ret
vmlab_roi_end:
    ret

uart_interrupt:
    push %eax
    push %edx
    incl seen
    mov $UART_IER, %edx
    xor %eax, %eax
    out %al, %dx
    mov $0x20, %al
    out %al, $0x20              # end of interrupt
    pop %edx
    pop %eax
    iret

    .data
    .align 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
idt_pointer:
    .word 0x30 * 8 - 1
    .long idt
ports:                          # port (word), value (byte)
    .macro PORT port, value
    .word \port
    .byte \value
    .endm
    PORT 0x20, 0x11
    PORT 0x21, 0x20
    PORT 0x21, 0x04
    PORT 0x21, 0x01
    PORT 0xa0, 0x11
    PORT 0xa1, 0x28
    PORT 0xa1, 0x02
    PORT 0xa1, 0x01
    PORT 0x21, 0xef
    PORT 0xa1, 0xff
    PORT UART_MCR, 0x08
    .word 0
    .align 4
vmlab_outcome_start:
seen_before:                    # interrupts taken before STI: 0
    .long 0
seen_after:                     # and after it: 1
    .long 0
vmlab_outcome_end:
vmlab_work:                     # operations, iterations
    .long 1, 1
seen:
    .long 0

    .bss
    .align 16
idt:
    .skip 0x30 * 8
    .skip 1024
stack_top:
