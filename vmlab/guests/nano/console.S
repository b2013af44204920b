# console.S: the UART, text, and the command line. Called by boot.S and workloads.S.
# A line is built in a buffer and goes out whole, so that a paravirtual kernel needs one hypercall for it.
    .include "nano.inc"

    .text
    .globl uart_setup, uart_drain, puts, parse_command_line, say_hello, say_result, say_fault
    .globl workload, iterations, density, line, line_end

uart_setup:                     # 8n1, no FIFO, interrupts off, OUT2 on (it gates the interrupt on a PC)
    mov $uart_script, %ebx
1:  movzwl (%ebx), %edx
    test %edx, %edx
    jz 2f
    mov 2(%ebx), %al
    OUTB_
    add $3, %ebx
    jmp 1b
2:  ret

uart_drain:                     # wait until the transmitter is empty (LSR bit 6)
    mov $UART_LSR, %edx
1:  INB_
    test $0x40, %al
    jz 1b
    ret

# puts: sends the line buffer. Changes EAX, EDX, ESI. Paravirtual: becomes a jump to pv_puts.
puts:
7710:
    mov $line, %esi             # five bytes, the room of a jump
7720:
    SITE K_PUTS
1:  cmp line_end, %esi
    jae uart_drain
    mov $UART_LSR, %edx
2:  INB_
    test $0x20, %al             # THR empty
    jz 2b
    mov (%esi), %al
    mov $UART_THR, %edx
    OUTB_
    inc %esi
    jmp 1b

line_start:
    movl $line, line_end
    ret
line_text:                      # append the string at ESI
    push %edi
    mov line_end, %edi
1:  lodsb
    test %al, %al
    jz 2f
    stosb
    jmp 1b
2:  mov %edi, line_end
    pop %edi
    ret
line_number:                    # append EAX in decimal
    push %edi
    mov $digits_end, %edi
    mov $10, %ecx
1:  xor %edx, %edx
    div %ecx
    add $'0', %dl
    dec %edi
    mov %dl, (%edi)
    test %eax, %eax
    jnz 1b
    mov %edi, %esi
    pop %edi
    jmp line_text
line_hex:                       # append EAX in eight hexadecimal digits
    push %edi
    mov %eax, %edx
    mov line_end, %edi
    mov $8, %ecx
1:  rol $4, %edx
    mov %edx, %eax
    and $15, %eax
    mov hex_digits(%eax), %al
    stosb
    loop 1b
    mov %edi, line_end
    pop %edi
    ret

.macro TEXT string
    .pushsection .rodata
7740: .asciz "\string"
    .popsection
    mov $7740b, %esi
    call line_text
.endm

say_hello:
    call line_start
    TEXT "nano: workload="
    mov workload, %eax
    mov workload_names(, %eax, 4), %esi
    call line_text
    TEXT " iterations="
    mov iterations, %eax
    call line_number
    TEXT " density="
    mov density, %eax
    call line_number
    TEXT "\n"
    jmp puts

say_result:
    call line_start
    TEXT "nano: operations="
    mov vmlab_work, %eax
    call line_number
    TEXT " iterations="
    mov vmlab_work + 4, %eax
    call line_number
    TEXT " checksum="
    call outcome_checksum
    call line_hex
    cmpl $0, outcome_failed
    je 1f
    TEXT " FAILED: an interrupt never arrived\n"
    jmp puts
1:  TEXT " ok\n"
    jmp puts

say_fault:                      # EBP = vector, ESI = error code, EDI = EIP
    push %esi
    call line_start
    TEXT "nano: exception "
    mov %ebp, %eax
    call line_number
    TEXT " error code "
    pop %eax
    call line_hex
    TEXT " at "
    mov %edi, %eax
    call line_hex
    TEXT "\n"
    jmp puts

# --- command line: ESI = text; words that are not known are left alone (loaders put a path first) ----
parse_command_line:
    mov %esi, %ebx
    mov $key_iterations, %edi
    call find_key
    jc 1f
    call number
    test %eax, %eax
    jz 1f
    mov %eax, iterations
1:  mov $key_density, %edi
    call find_key
    jc 2f
    call number
    test %eax, %eax
    jz 2f
    mov %eax, density
2:  mov $key_workload, %edi
    call find_key
    jc 5f
    xor %ecx, %ecx
3:  mov workload_names(, %ecx, 4), %edi
    test %edi, %edi
    jz bad_workload
    call is_word
    je 4f
    inc %ecx
    jmp 3b
4:  mov %ecx, workload
5:  ret

find_key:                       # EBX = text, EDI = key; ESI = behind the key, or carry
    mov %ebx, %esi
1:  call starts_with
    je 4f
2:  lodsb
    test %al, %al
    jz 3f
    cmp $' ', %al
    jne 2b
    jmp 1b
3:  stc
    ret
4:  clc
    ret

starts_with:                    # does ESI start with the string at EDI? if so ESI moves behind it
    push %esi
    push %edi
1:  mov (%edi), %al
    test %al, %al
    jz 3f
    cmp %al, (%esi)
    jne 2f
    inc %esi
    inc %edi
    jmp 1b
2:  pop %edi
    pop %esi
    ret                         # ZF = 0 from the comparison
3:  pop %edi
    add $4, %esp
    xor %eax, %eax              # ZF = 1
    ret

is_word:                        # is the word at ESI the string at EDI? ZF; ESI is kept
    push %esi
    call starts_with
    jne 1f
    mov (%esi), %al
    test $0xdf, %al             # ends in NUL or a blank
1:  pop %esi
    ret

number:                         # ESI = decimal digits; EAX = value
    xor %edx, %edx
1:  movzbl (%esi), %eax
    sub $'0', %eax
    cmp $9, %eax
    ja 2f
    imul $10, %edx
    add %eax, %edx
    inc %esi
    jmp 1b
2:  mov %edx, %eax
    ret

bad_workload:
    call line_start
    TEXT "nano: unknown workload\n"
    call puts
    mov $3, %eax
    jmp exit

    .section .rodata
uart_script:                    # port (2 bytes), value
    .macro UART port, value
    .word \port
    .byte \value
    .endm
    UART UART_IER, 0
    UART UART_LCR, 0x03
    UART 0x3fa, 0x00
    UART UART_MCR, 0x0b
    .word 0
hex_digits:
    .ascii "0123456789abcdef"
key_workload:
    .asciz "workload="
key_iterations:
    .asciz "iterations="
key_density:
    .asciz "density="

    .data
    .align 4
workload:
    .long 0
iterations:
    .long 1000
density:
    .long 100
line_end:
    .long line

    .bss
line:
    .skip 256
digits:
    .skip 16
digits_end:
    .byte 0
