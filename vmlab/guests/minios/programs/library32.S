# library32.S: where a program begins, and what C cannot say; 32 bits.
#include "../sites.h"
    .text
    .globl user_entry, fast_call, try_read, try_write, fault_return
user_entry:                     # EAX = program, EDX = argument
    call user_main

fast_call:                      # EAX = number. SYSENTER: ECX = stack, EDX = where to go on; the kernel keeps the rest
    mov %esp, %ecx
    mov $1f, %edx
    SITE K_SYSENTER, ROOM_INT, sysenter
1:  ret

try_read:                       # EAX = address, EDX = where to put the value
    mov (%eax), %eax
    mov %eax, (%edx)
    xor %eax, %eax
    ret
try_write:                      # EAX = address, EDX = value
    mov %edx, (%eax)
    xor %eax, %eax
    ret
fault_return:                   # the kernel goes on here instead of at the access that faulted
    mov $1, %eax
    ret
#include "marks.inc"
