/* bad.c: kernels that go wrong or do wrong. The first four must end cleanly and with a reason; the others reach for memory
 * behind the end of theirs, and a VMM must not let them have it. Called by syscall.c. */
#include "calls.h"
#include "disk.h"
#include "kernel.h"
#include "pt.h"

#define NOWHERE 0x3f000000          /* kernel space that is never mapped */
#define FOREIGN (memory_end + (4 << 20))

static word deeper(word depth)
{
    volatile word space[16];
    space[depth % 16] = depth;
    return depth ? deeper(depth + 1) + space[depth % 16] : 0;
}

word bad(word which)
{
    volatile u32 *nowhere = (u32 *)NOWHERE, *window = (u32 *)(USER + USER_MAPS * PAGE);
    switch ((enum bad)which) {
    case BAD_STACK_OVERFLOW:            /* into the hole below the stack: #PF, whose frame finds no stack: #DF */
        return deeper(1);
    case BAD_NO_IDT:                    /* a fault with no gate for it, nor for #GP or #DF: the CPU shuts down */
        forget_idt();
        return *nowhere;
    case BAD_RECURSIVE_FAULT:           /* each fault goes on at code that takes a little stack and faults again */
        asm volatile("1: mov $1b, %k0\n\tmov %k0, kernel_fixup\n\tpush %0\n\tmov 0x3f000000, %k0" : "=r"(which) :: "memory");
        return 0;
    case BAD_STRAY_POINTER:             /* an ordinary mistake: the kernel says so and stops */
        return *nowhere;
    case BAD_FOREIGN_FRAME:             /* a frame that is not ours, mapped and written */
        entry_write_now(space_entry(&current->space, (word)window), FOREIGN | PRESENT | WRITABLE | FROM_USER);
        invlpg((word)window);
        *window = 0xbadbadba;
        return *window;
    case BAD_FOREIGN_TABLE:             /* page tables in memory that is not ours */
        load_cr3(FOREIGN);
        return *nowhere;
    case BAD_FOREIGN_DMA:               /* a device told to write there */
        disk_request.command = 1;
        disk_request.sector = 0;
        disk_request.address = FOREIGN;
        return disk_run();
    }
    return 0;
}
