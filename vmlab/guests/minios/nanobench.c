/* nanobench.c: the loops of Adams & Agesen's nanobenchmarks that run inside the kernel. Called by syscall.c.
 * With `empty` the loop has the same shape and nothing in it; the difference is the operation alone. */
#include "calls.h"
#include "kernel.h"
#include "pt.h"

#define LOOP(iterations, body) for (word i_ = (iterations); i_; i_--) { body; }
#define NOTHING asm volatile("" ::: "memory")
#define BOTH(body) do { if (empty) LOOP(iterations, NOTHING) else LOOP(iterations, body) } while (0)
#define NOWHERE 0x3f000000      /* kernel space that is never mapped */
#define TABLES_AT (USER + 0x200000)

asm(".text\nnano_return: ret");

/* A store as entry_write does it, but not counted one by one: the loop is to hold the store alone. */
static inline void modify(entry *at, word value)
{
    asm volatile(SITE(K_ENTRY_WRITE, ROOM_CALL, STORE) :: "a"(at), "d"(value) : "memory");
}

/* The fault goes to trap(), whose handler maps nothing and goes on at the fix-up, behind the faulting instruction. */
static void __attribute__((noinline)) page_faults(word iterations, word empty)
{
    extern u8 behind_page_fault[];
    kernel_fixup = (word)behind_page_fault;
    word address = NOWHERE;
    if (empty)
        LOOP(iterations, NOTHING)
    else
        LOOP(iterations, asm volatile("movb (%0), %%al\nbehind_page_fault:" :: "r"(address) : "eax", "memory"))
    kernel_fixup = 0;
}

static void __attribute__((noinline)) divisions(word iterations, word empty)
{
    extern u8 behind_division[];
    kernel_fixup = (word)behind_division;
    word zero = 0;
    if (empty)
        LOOP(iterations, NOTHING)
    else
        LOOP(iterations, asm volatile("divl %k0\nbehind_division:" :: "r"(zero) : "eax", "edx", "memory"))
    kernel_fixup = 0;
}

/* The program has mapped and touched pages from TABLES_AT on (NP->P: and unmapped them again); each is changed once, those of a
 * second call behind those of the first. Nothing is touched in the loop; the TLB is emptied behind it. */
static void entries(word which, word iterations, word empty)
{
    static word position = TABLES_AT;
    struct space *space = &current->space;
    word shared = FRAME(entry_read(space_entry(space, USER))) | PRESENT | FROM_USER;
    word address = position;
    for (word left = iterations; left;) {
        entry *at = space_entry(space, address);
        word part = 512 - (address / PAGE) % 512, value = entry_read(at);
        if (part > left)
            part = left;
        if (which == NANO_PTEMOD_P_NP)
            value = 0;
        else if (which == NANO_PTEMOD_NP_P)
            value = shared;
        if (empty)
            LOOP(part, asm volatile("" : "+r"(at) :: "memory"); at++)
        else
            LOOP(part, modify(at, value); at++)
        address += part * PAGE;
        left -= part;
    }
    flush_tlb(space->root);
    counts.flushes++;
    if (empty)
        return;
    counts.pt_writes += iterations;
    position = address;
}

word nanobench(word which, word iterations, word empty)
{
    switch ((enum nanobench)which) {
    case NANO_IN: BOTH(in_byte(0x80)); break;
    case NANO_CR8: BOTH(set_task_priority(0)); break;
    case NANO_CALLRET: BOTH(asm volatile("call nano_return" ::: "memory")); break;
    case NANO_PGFAULT: page_faults(iterations, empty); break;
    case NANO_DIVZERO: divisions(iterations, empty); break;
    case NANO_PTEMOD:
    case NANO_PTEMOD_P_NP:
    case NANO_PTEMOD_NP_P: entries(which, iterations, empty); break;
    }
    return 0;
}
