/* outcome.c: what is left for the lab to read: the outcome, operations and iterations, and the kernel's own counts.
 * Called by syscall.c and, at the end, process.c. The symbols are a contract (docs/writing-a-guest.md). */
#include "kernel.h"

struct counts counts;

/* One word a count, each with a symbol: vmlab_count_NAME. */
#define ROW(name) ".globl vmlab_count_" #name "\nvmlab_count_" #name ": .long 0\n"
asm(".data\n.balign 4\n.globl vmlab_counts_start, vmlab_counts_end\nvmlab_counts_start:\n" COUNTS(ROW) "vmlab_counts_end:\n.text");
extern struct counts kept asm("vmlab_counts_start");

/* Depends on nothing that timing or a technique may change. */
asm(".data\n.balign 4\n.globl vmlab_outcome_start, vmlab_outcome_end, vmlab_work\n"
    "vmlab_outcome_start:\nchecksum: .long 0\nvmlab_work: .long 0, 0\nsteady: .long 0, 0, 0, 0\nvmlab_outcome_end:\n.text");
extern u32 checksum, vmlab_work[2], steady[4];

void outcome_begin(void)
{
    for (u32 *at = (u32 *)&counts; at < (u32 *)(&counts + 1); at++)
        *at = 0;
}

void outcome_end(void)
{
    counts.system_calls--;              /* this one */
    copy(&kept, &counts, sizeof kept);
    steady[0] = kept.pt_writes;
    steady[1] = kept.faults;
    steady[2] = kept.system_calls;
    steady[3] = kept.forks;
}

void outcome_report(u32 operations, u32 iterations, u32 sum)
{
    vmlab_work[0] = operations;
    vmlab_work[1] = iterations;
    checksum = sum;
}

/* Tenths of a count per operation. */
static u32 tenths(u32 count) { return vmlab_work[0] ? count / vmlab_work[0] * 10 + count % vmlab_work[0] * 10 / vmlab_work[0] : 0; }

void outcome_print(void)
{
    print("minios: operations=%u iterations=%u checksum=%x\n", vmlab_work[0], vmlab_work[1], checksum);
    print("minios: pt_writes=%u faults=%u system_calls=%u forks=%u\n", steady[0], steady[1], steady[2], steady[3]);
    u32 writes = tenths(steady[0]), faults = tenths(steady[1]), calls = tenths(steady[2]);
    print("minios: per operation pt_writes=%u.%u faults=%u.%u system_calls=%u.%u\n",
          writes / 10, writes % 10, faults / 10, faults % 10, calls / 10, calls % 10);
}
