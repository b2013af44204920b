# entry64.S: from user mode and interrupts to trap() and back, and from one kernel stack to another; 64 bits.
#include "types.h"
#include "sites.h"
.macro TRAP_ADDRESS name
    .long 0
    .quad \name
.endm
# A 64-bit hypervisor's frame has RCX and R11 on top: its traps come in here, a few bytes before the stub (pv.h: FRAME_POPS).
.macro PV_FRAME
    pop %rcx
    pop %r11
.endm
#include "save64.inc"
    .text
    .globl trap_common, fork_return, syscall_entry, switch_stack
#include "traps.inc"

trap_common:
    PUSH_ALL
    cld
    mov %rsp, %rdi
    call trap                   # trap.c; interrupts are off when it comes back
fork_return:                    # a new process begins here
    POP_ALL
    add $16, %rsp
    SITE K_IRET, ROOM_CALL, iretq

# SYSCALL (SDM Vol. 3A section 5.8.8): RCX = where to go on, R11 = flags; IF = 0 by the mask; the stack is the user's.
syscall_entry:
    mov %rsp, user_stack
    mov syscall_stack, %rsp
    push $USER_DATA             # the frame of an INT 0x80
    push user_stack
    push %r11
    push $USER_CODE
    push %rcx
    push $0
    push $0x80
    PUSH_ALL
    cld
    sti
    mov %rsp, %rdi
    call trap
    POP_ALL
    mov 16(%rsp), %rcx
    mov 32(%rsp), %r11
    mov 40(%rsp), %rsp
    sysretq

# switch_stack(RDI = where to keep this stack pointer, RSI = the next)
switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret

    .bss
    .balign 8
    .globl syscall_stack
syscall_stack:
    .skip 8
user_stack:                     # one CPU, and interrupts are off while this is in use
    .skip 8
