/* bad.c: kernels that go wrong, each of which must end cleanly and with a reason. Called by syscall.c. */
#include "calls.h"
#include "kernel.h"

static word deeper(word depth)
{
    volatile word space[16];
    space[depth % 16] = depth;
    return depth ? deeper(depth + 1) + space[depth % 16] : 0;
}

word bad(word which)
{
    volatile word *nowhere = (word *)0x3f000000;
    switch ((enum bad)which) {
    case BAD_STACK_OVERFLOW:            /* into the hole below the stack: #PF, whose frame finds no stack: #DF */
        return deeper(1);
    case BAD_NO_IDT:                    /* a fault with no gate for it, nor for #GP or #DF: the CPU shuts down */
        forget_idt();
        return *nowhere;
    case BAD_RECURSIVE_FAULT:           /* each fault goes on at an instruction that faults, until somebody gives up */
        asm volatile("1: mov $1b, %k0\n\tmov %k0, kernel_fixup\n\tpush %0\n\tmov 0x3f000000, %k0" : "=r"(which) :: "memory");
        return 0;
    case BAD_KERNEL_FAULT:              /* an ordinary mistake: the kernel says so and stops */
        return *nowhere;
    }
    return 0;
}
