/* counts.h: what the kernel counts of its own work, between a workload's begin and end (outcome.c). */
#pragma once
#include "types.h"

#define COUNTS(X) \
    X(pt_writes)        /* stores to page-table entries; the clearing of whole tables is not among them */ \
    X(faults)           /* page faults that arrived at the kernel */ \
    X(system_calls) \
    X(forks) \
    X(tables)           /* page-table pages cleared */ \
    X(pages_zeroed)     /* on demand */ \
    X(pages_copied)     /* by copy-on-write; from here on timing may play a part */ \
    X(cr3_loads)        /* to another address space */ \
    X(flushes)          /* CR3 loads to empty the TLB */ \
    X(invlpgs) \
    X(interrupts) \
    X(disk_requests)

struct counts {
#define FIELD(name) u32 name;
    COUNTS(FIELD)
};

extern struct counts counts;
