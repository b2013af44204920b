# entry32.S: from user mode and interrupts to trap() and back, and from one kernel stack to another; 32 bits.
#include "types.h"
#include "sites.h"
.macro PV_FRAME
.endm
.macro TRAP_ADDRESS name
    .long \name
.endm
    .text
    .globl trap_common, fork_return, sysenter_entry, switch_stack
#include "traps.inc"

trap_common:
    pusha
    cld
    mov %esp, %eax
    call trap                   # trap.c; interrupts are off when it comes back
fork_return:                    # a new process begins here
    popa
    add $8, %esp
    SITE K_IRET, ROOM_CALL, iret

# SYSENTER (SDM Vol. 3A section 5.8.7): IF = 0, ESP = the word of the TSS that holds the kernel stack. The caller left
# its stack in ECX and where to go on in EDX.
sysenter_entry:
    mov (%esp), %esp
    push $USER_DATA             # the frame of an INT 0x80
    push %ecx
    push $0x202
    push $USER_CODE
    push %edx
    push $0
    push $0x80
    pusha
    cld
    sti                         # native only, as SYSENTER is
    mov %esp, %eax
    call trap
    popa
    mov 8(%esp), %edx
    mov 20(%esp), %ecx
    sti                         # its shadow reaches to user mode
    sysexit

# switch_stack(EAX = where to keep this stack pointer, EDX = the next)
switch_stack:
    push %ebp
    push %ebx
    push %esi
    push %edi
    mov %esp, (%eax)
    mov %edx, %esp
    pop %edi
    pop %esi
    pop %ebx
    pop %ebp
    ret
