/* nanobench.c: Adams & Agesen's nanobenchmarks (ASPLOS 2006, FrobOS). Most loops run inside the kernel, by one system
 * call each; the empty loop goes by the same call, so that the call cancels. One cold iteration, then the warm ones. */
#include "user.h"

static void in_kernel(enum nanobench which)
{
    u32 iterations = option("iterations=", 100);
    call(CALL_NANOBENCH, which, iterations, 1);     /* whatever tables it needs come into being */
    vmlab_empty_begin();
    call(CALL_NANOBENCH, which, iterations, 1);
    vmlab_empty_end();
    begin();
    call(CALL_NANOBENCH, which, 1, 0);
    vmlab_roi_warm();
    call(CALL_NANOBENCH, which, iterations, 0);
    end(iterations + 1, iterations, 0);
}

void in_bench(void) { in_kernel(NANO_IN); }
void cr8_bench(void) { in_kernel(NANO_CR8); }
void callret_bench(void) { in_kernel(NANO_CALLRET); }
void pgfault_bench(void) { in_kernel(NANO_PGFAULT); }
void divzero_bench(void) { in_kernel(NANO_DIVZERO); }

/* One page-table entry an iteration, in tables that are in use. Afterwards the pages are looked at: has every change been seen? */
static void entries(enum nanobench which, int present)
{
    u32 iterations = option("iterations=", 100), sum = 0;
    word at = USER + 0x200000;
    if (!map(at, iterations + 1, READ_WRITE))
        fail("no room to map so many pages");
    for (word page = 0; page <= iterations; page++)
        *(volatile u32 *)(at + page * PAGE) = page + 1;
    if (!present && (!unmap(at, iterations + 1) || !map(at, iterations + 1, RIGHT_READ)))
        fail("the pages could not be taken away");
    in_kernel(which);
    for (word page = 0; page <= iterations; page++)
        sum = mix(sum, *(volatile u32 *)(at + page * PAGE));
    call(CALL_REPORT, iterations + 1, iterations, sum);
}

void ptemod_bench(void) { entries(NANO_PTEMOD, 1); }
void ptemod_p_np_bench(void) { entries(NANO_PTEMOD_P_NP, 1); }
void ptemod_np_p_bench(void) { entries(NANO_PTEMOD_NP_P, 0); }

/* A loop in user mode around one operation, and the same loop around nothing. */
#define MEASURE(operation) do { \
        u32 iterations = option("iterations=", 100); \
        vmlab_empty_begin(); \
        for (u32 i = iterations; i; i--) asm volatile("" ::: "memory"); \
        vmlab_empty_end(); \
        begin(); \
        operation; \
        vmlab_roi_warm(); \
        for (u32 i = iterations; i; i--) { operation; } \
        end(iterations + 1, iterations, 0); \
    } while (0)

void syscall_bench(void) { MEASURE(fast_call(CALL_NULL)); }
void null_call(void) { MEASURE(call(CALL_NULL, 0, 0, 0)); }

/* Parent and child both write to their stack, which they share until then: a copy for one, a right for the other. */
static void __attribute__((noinline)) fork_once(void)
{
    volatile u32 mine = 1;
    if (!fork()) {
        mine = 7;
        exit(mine);
    }
    if (wait() != 7 || mine != 1)
        fail("a child's result was lost, or its memory was not its own");
    mine = 2;
}

/* A process with little memory that forks, and waits for the child to go (A & A, section 6.2). */
void forkwait(void) { MEASURE(fork_once()); }

/* The same with `pages` pages in use, as lmbench's "fork" has its benchmark's own (Barham et al., table 3). */
void fork_bench(void)
{
    pages_new(option("pages=", 200));
    MEASURE(fork_once());
}
