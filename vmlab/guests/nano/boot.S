# boot.S: the native entry (Multiboot 1), descriptor tables, interrupts, and main.
# Enters: a Multiboot loader at `start`. The paravirtual entry is in paravirt.S; both end in `main`.
    .include "nano.inc"

    .section .multiboot, "a"    # Multiboot 1 specification, section 3.1
    .align 4
    .long 0x1badb002, 0x00000002, -(0x1badb002 + 0x00000002)

    .text
    .globl start, main, user_cs, user_ss, exit
start:                          # EAX = 0x2badb002, EBX = Multiboot information; flat, unpaged, IF = 0
    cld
    lgdt gdt_pointer
    ljmp $0x08, $1f
1:  mov $0x10, %eax
    mov %eax, %ss
    mov $stack_top, %esp
    mov $0x23, %eax             # flat and DPL 3, so that going to and from user mode reloads nothing
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov %ebx, %esi              # kept for the command line
    call make_tss
    call make_idt
    lidt idt_pointer
    mov $0x28, %eax
    ltr %ax
    call pic_setup
    call uart_setup
    mov $nothing, %ebx
    testb $4, (%esi)            # flags bit 2: a command line is there
    jz 2f
    mov 16(%esi), %ebx
2:  jmp main

make_tss:                       # the descriptor's base is split in three: patch it in, and the inner stack
    mov $tss, %eax
    mov %ax, gdt + 0x2a
    shr $16, %eax
    mov %al, gdt + 0x2c
    mov %ah, gdt + 0x2f
    movl $trap_stack_top, tss + 4
    movl $0x10, tss + 8
    movw $104, tss + 102        # no I/O bitmap
    ret

make_idt:                       # gates for vectors 0..31, 0x20..0x2f and 0x80
    xor %ecx, %ecx
1:  mov fault_stubs(, %ecx, 4), %eax
    mov $0x8e00, %edx
    call set_gate
    inc %ecx
    cmp $32, %ecx
    jne 1b
2:  mov $irq_spurious, %eax
    mov $0x8e00, %edx
    call set_gate
    inc %ecx
    cmp $48, %ecx
    jne 2b
    mov $0x24, %ecx
    mov $irq_uart, %eax
    mov $0x8e00, %edx
    call set_gate
    mov $0x80, %ecx
    mov $trap_syscall, %eax
    mov $0xef00, %edx           # trap gate, DPL 3: leaves IF alone, as a Xen trap does
set_gate:                       # ECX = vector, EAX = handler, EDX = type and DPL
    mov %ax, idt(, %ecx, 8)
    movw $0x08, idt + 2(, %ecx, 8)
    mov %dx, idt + 4(, %ecx, 8)
    shr $16, %eax
    mov %ax, idt + 6(, %ecx, 8)
    ret

pic_setup:                      # both 8259s to vectors 0x20..0x2f, only IRQ 4 let through (8259A data sheet)
    mov $pic_script, %ebx
1:  movzbl (%ebx), %edx
    test %edx, %edx
    jz 2f
    mov 1(%ebx), %al
    out %al, %dx
    add $2, %ebx
    jmp 1b
2:  ret

# main: EBX = command line. Never returns.
main:
    cld
    mov %ebx, %esi
    call parse_command_line
    call say_hello
    call prepare_workload
    call run_workload
    call say_result
    xor %eax, %eax
    cmpl $0, outcome_failed
    setne %al
    jmp exit

exit:                           # EAX = the machine's exit code
    mov $DEBUG_EXIT, %edx
    OUTL_
1:  SAFE_HALT_                  # only where no debug-exit device listens
    jmp 1b

# --- interrupts and traps --------------------------------------------------------------------------
irq_uart:
    pusha
    call uart_interrupt
    mov $0x20, %al
    out %al, $0x20              # end of interrupt: a paravirtual kernel has no PIC, so this is no site
    popa
    IRET_

irq_spurious:
    IRET_

    .globl trap_syscall
trap_syscall:                   # INT 0x80: the batch is done; drop the frame, go on behind enter_user
    mov kernel_esp, %esp
    ret

# One stub a vector, with a made-up error code where the CPU pushes none (SDM Vol. 3A table 6-1).
    .altmacro
.macro FAULT_STUB vector
    .pushsection .rodata
    .long fault_stub_\vector
    .popsection
    .globl fault_stub_\vector
fault_stub_\vector:
    .if (\vector != 8) && (\vector != 17) && ((\vector < 10) || (\vector > 14))
    push $0
    .endif
    push $\vector
    jmp fault
.endm
    .pushsection .rodata
    .align 4
    .globl fault_stubs
fault_stubs:
    .popsection
    .set n, 0
    .rept 32
    FAULT_STUB %n
    .set n, n + 1
    .endr
    .noaltmacro

fault:                          # vector, error code, EIP, …: say so, and end with code 2
    pop %ebp
    pop %esi
    pop %edi
    call say_fault
    mov $2, %eax
    jmp exit

# --- tables ----------------------------------------------------------------------------------------
    .section .rodata
    .align 4
pic_script:                     # port, value pairs: ICW1..ICW4 of each 8259, then the masks
    .byte 0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01
    .byte 0xa0, 0x11, 0xa1, 0x28, 0xa1, 0x02, 0xa1, 0x01
    .byte 0x21, 0xef, 0xa1, 0xff, 0
nothing:
    .byte 0
    .align 4
gdt_pointer:
    .word 6 * 8 - 1
    .long gdt
idt_pointer:
    .word 256 * 8 - 1
    .long idt

    .data
    .align 8
gdt:                            # null, code 0, data 0, code 3, data 3, TSS
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cffb000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x0000890000000067
user_cs:
    .long 0x1b                  # the paravirtual entry puts FLAT_RING3_CS and _DS here
user_ss:
    .long 0x23

    .bss
    .align 16
    .globl stack_top, trap_stack_top
stack:
    .skip 8192
stack_top:
trap_stack:
    .skip 4096
trap_stack_top:
tss:
    .skip 104
    .align 8
idt:
    .skip 256 * 8
