# library64.S: where a program begins, and what C cannot say; 64 bits.
    .text
    .globl user_entry, fast_call, try_read, try_write, fault_return
user_entry:                     # RDI = program, RSI = argument
    call user_main

fast_call:                      # RDI = number. SYSCALL: RCX and R11 are lost, the kernel keeps the rest
    mov %rdi, %rax
    syscall
    ret

try_read:                       # RDI = address, RSI = where to put the value
    mov (%rdi), %eax
    mov %eax, (%rsi)
    xor %eax, %eax
    ret
try_write:                      # RDI = address, ESI = value
    mov %esi, (%rdi)
    xor %eax, %eax
    ret
fault_return:                   # the kernel goes on here instead of at the access that faulted
    mov $1, %eax
    ret
#include "marks.inc"
