/* stacks.c: a kernel stack of one page for every process there can be, mapped once, with a hole below each, so that an
 * overflow faults instead of overwriting something. Called by main.c. */
#include "kernel.h"
#include "pt.h"

void stacks_init(void)
{
    entry *table = page_new();
    table_new(table);
    for (word i = 0; i < PROCESSES; i++) {
        processes[i].stack_top = STACKS + (2 * i + 2) * PAGE;
        entry_write(table + 2 * i + 1, (word)page_new() | PRESENT | WRITABLE);
    }
    entry_write_now((entry *)kernel_table + (STACKS >> 21), (word)table | PRESENT | WRITABLE);
}
