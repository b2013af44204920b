/* Counting blocks: Counter.enter() of vmlab/machine/counter.py, as Unicorn's UC_HOOK_BLOCK callback.
 *
 * Everything here belongs to fast.py, which allocates it, fills it and makes it grow; this file only looks up
 * and adds. It calls no library, keeps nothing of its own, and needs neither Python's nor Unicorn's headers.
 * What is rare (a block never seen, an interrupt line that is up, a spent budget) is decided in Python by
 * attend(). The order of the fields is repeated in fast.py, which checks it by counting before first use.
 */
#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#ifdef _MSC_VER
#define NEVER_INLINE __declspec(noinline)
#else
#define NEVER_INLINE __attribute__((noinline))
#endif

#define REP (1ull << 32)  /* the block's last instruction is a string instruction under REP */
#define RING (1ull << 33) /* the block's last instruction may have changed CPL */
#define IRET (1ull << 34) /* the block's last instruction is IRET */

/* One block. The three counts are indexed by "is CPL 3". */
typedef struct {
    uint64_t runs[2], taken[2], again[2];
    uint64_t end;
    uint64_t traits; /* guest instructions in the low half; REP, RING and IRET */
} record;

/* One place of the hash table. what: size in the low half, the record's number in the high one; 0: free. */
typedef struct {
    uint64_t pc, what;
} place;

typedef struct {
    uint64_t time, limit;    /* guest instructions */
    uint64_t user;           /* 1 at CPL user_from and above */
    uint64_t attention;      /* ask Python at the next block */
    uint64_t current;        /* number of the block that runs; 0: none */
    uint64_t places, mask;   /* the hash table: address, number of places - 1 */
    uint64_t records;        /* address; number 0 stays unused */
    uint64_t hflags;         /* address of the CPU's own flags, CPL in bits 0-1; 0: ask Python */
    uint64_t attend;         /* int (*)(uint64_t pc, uint32_t size): may the block run, and is it known now? */
    uint64_t read_cpl;       /* int (*)(void) */
    uint64_t cpl;            /* as of the block that runs */
    uint64_t irets[2];       /* IRETs that retired, indexed by "changed CPL" */
    uint64_t user_from;      /* 3, or 4 while ring 3 is a guest kernel's */
} state;

#define AT(type, address) ((type)(uintptr_t)(address))

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

static int needs_python(const state *s, uint64_t number)
{
    return !number || s->attention || s->time + (uint32_t)AT(record *, s->records)[number].traits > s->limit;
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

        if (AT(record *, s->records)[s->current].traits & IRET)
            s->irets[cpl != s->cpl]++;
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
