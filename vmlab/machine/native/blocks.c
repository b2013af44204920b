/* Counting blocks: Counter.enter() of vmlab/machine/counter.py, as Unicorn's UC_HOOK_BLOCK callback.
 *
 * This file only looks up and adds. What is rare (a block never seen, an interrupt line that is up, a spent budget) is
 * decided in Python by attend().
 */
#include "machine.h"

#define EFLAGS 136 /* QEMU target/i386/cpu.h; vmlab/machine/state.py finds and checks it */
#define RF (1u << 16)

#define EFLAGS 136 /* in CPUX86State */
#define IF 0x200

static uint64_t find(const state *s, uint64_t pc, uint32_t size)
{
    const place *places = AT(const place *, s->places);
    uint64_t at = ((pc + ((uint64_t)size << 40)) * 0x9E3779B97F4A7C15ull) >> 32;

    for (;; at++) {
        const place *here = &places[at & s->mask];
        if (here->pc == pc && (uint32_t)here->what == size)
            return here->what >> 32;
        if (!here->what)
            return 0;
    }
}

/* An interrupt that EFLAGS.IF masks waits for many blocks, and for each element of a string instruction: no need to ask about each. */
static inline int asks(const state *s)
{
    return s->attention && (s->attention != WHEN_ENABLED || *AT(const volatile uint64_t *, s->env + EFLAGS) & IF);
}

static inline int needs_python(const state *s, uint64_t number)
{
    return !number || asks(s) || s->time + (uint32_t)AT(record *, s->records)[number].traits > s->limit;
}

/* The block is known and runs now. Record 0 stands for "no block before": what it collects is never read. */
static inline void count(state *s, uint64_t number, uint64_t pc)
{
    record *block = &AT(record *, s->records)[number], *previous = &AT(record *, s->records)[s->current];
    uint64_t weight = (uint32_t)block->traits;

    if (previous->end != pc) {
        if (previous->traits & REP && previous->end == block->end) {
            block->again[s->user]++; /* another iteration of the same instruction */
            weight = 0;
        } else {
            previous->taken[s->user]++;
        }
    }
    block->runs[s->user]++;
    s->time += weight;
    s->current = number;
}

/* Apart, so that the usual way needs no register saved. */
static NEVER_INLINE void rare(state *s, uint64_t number, uint64_t pc, uint32_t size)
{
    if (needs_python(s, number)) {
        if (!AT(int (*)(uint64_t, uint32_t), s->attend)(pc, size))
            return;
        number = find(s, pc, size); /* the tables may have moved */
        if (!number)
            return;
    }
    if (AT(record *, s->records)[s->current].traits & RING) {
        uint64_t cpl = s->hflags ? (*AT(const volatile uint32_t *, s->hflags) & 3) : (uint64_t)AT(int (*)(void), s->read_cpl)();

        if (AT(record *, s->records)[s->current].traits & IRET) {
            s->irets[cpl != s->cpl]++;
            if (s->env) /* RF lasts for one instruction, whose block has begun: as Machine.read_cpl() */
                *AT(uint64_t *, s->env + EFLAGS) &= ~(uint64_t)RF;
        }
        s->cpl = cpl;
        s->user = cpl >= s->user_from;
    }
    count(s, number, pc);
}

/* uc_cb_hookcode_t of unicorn.h; Unicorn gives the linear address. */
EXPORT void vmlab_block(void *uc, uint64_t pc, uint32_t size, void *data)
{
    state *s = data;
    uint64_t number = find(s, pc, size);

    (void)uc;
    if (needs_python(s, number) || AT(record *, s->records)[s->current].traits & RING)
        rare(s, number, pc, size);
    else
        count(s, number, pc);
}

/* The measuring switch (uncounted.py): nothing is counted, and time goes on by a guess, a tick for four bytes of code. */
EXPORT void vmlab_clock(void *uc, uint64_t pc, uint32_t size, void *data)
{
    state *s = data;

    (void)uc;
    s->time += size < 4 ? 1 : size / 4;
    if (asks(s) || s->time > s->limit)
        AT(int (*)(uint64_t, uint32_t), s->attend)(pc, size);
}
