/* frame.h: what entry32.S and entry64.S leave on the kernel stack for trap(): all registers, and what the CPU pushed. */
#pragma once
#include "types.h"

#ifdef __x86_64__
struct frame {
    word r15, r14, r13, r12, r11, r10, r9, r8, di, si, bp, bx, dx, cx, ax;
    word vector, error, ip, cs, flags, sp, ss;
};
#define ARGUMENT_1 di           /* of a system call: as SYSCALL leaves them (RCX and R11 are lost) */
#define ARGUMENT_2 si
#define ARGUMENT_3 dx
#else
struct frame {
    word di, si, bp, unused, bx, dx, cx, ax;
    word vector, error, ip, cs, flags, sp, ss;  /* sp and ss only when it comes from user mode */
};
#define ARGUMENT_1 bx           /* as SYSENTER leaves them (ECX and EDX are lost) */
#define ARGUMENT_2 si
#define ARGUMENT_3 di
#endif

/* Asked this way, the answer is also right for a kernel that was moved to ring 1. */
static inline int from_user(const struct frame *frame) { return (frame->cs & 3) == 3; }
