/* Hidden page faults of a lazy shadow: ShadowPager.fault() of vmlab/vmm/shadow.py for the usual case.
 *
 * A window stands for the 2 MiB that one shadow page at level 1 maps. Python makes it when it has handled a fault there, and voids all
 * windows when anything but a leaf changes. As long as the guest's upper entries are what they were, a fault in a window is a matter of
 * one guest entry and one shadow entry. Whatever is not plain (a true fault, reserved bits, NX, a device, a translation to be
 * flushed) is left to Python, with nothing changed.
 */
#include "machine.h"

#define CR2 (424 + 16)
#define FIELD(type, s, offset) (*AT(type *, (s)->env + (offset)))

#define P 1ull
#define RW 2ull
#define US 4ull
#define A (1ull << 5)
#define D (1ull << 6)
#define G (1ull << 8)
#define CLEAN (1ull << 9) /* CLEAN of shadow_page.py */
#define GLOBAL_AT 2        /* GLOBAL of shadow_page.py is so many bits above G */
#define FRAME 0x000FFFFFFFFFF000ull
#define UPPER_HALF 0xFFF0000000000000ull

/* Error code of #PF: SDM Vol. 3A figure 4-12 */
#define WRITE 2u
#define USER 4u
#define NOT_PLAIN (~(1u | WRITE | USER))

static uint64_t entry_at(uint64_t address, uint64_t size)
{
    return size == 8 ? *AT(const uint64_t *, address) : *AT(const uint32_t *, address);
}

/* 1 where the fault at CR2 was a hidden one and the shadow has been filled. */
int vmlab_hidden_fault(const state *s, uint32_t error_code)
{
    faults *f = AT(faults *, s->faults);
    uint64_t address = FIELD(uint64_t, s, CR2), index, at, entry, marked, new, old;
    window *w;

    if (!f || error_code & NOT_PLAIN || address >> 32)
        return 0;
    w = &f->windows[address >> 21 & (WINDOWS - 1)];
    if (!w->used || w->first != (address & ~0x1FFFFFull))
        return 0;
    for (index = 0; index < w->uppers; index++)
        if (entry_at(w->upper_at[index], w->size) != w->upper[index])
            return 0;
    index = address >> 12 & 511;
    at = w->table + index * w->size;
    entry = entry_at(at, w->size);
    if (!(entry & P) || entry & UPPER_HALF || (entry & FRAME) >= f->memory_size)
        return 0;
    if ((error_code & WRITE && !(entry & w->access & RW)) || (error_code & USER && !(entry & w->access & US)))
        return 0;
    marked = entry | A | (error_code & WRITE ? D : 0);
    new = (f->memory_base + (entry & FRAME)) | P | A | D | (entry & w->access & US) | (entry & w->access & G) << GLOBAL_AT;
    if (entry & w->access & RW)
        new |= marked & D ? RW : CLEAN;
    old = *AT(const uint64_t *, w->leaves + 8 * index);
    if (old == new || (old & P && ((old ^ new) & FRAME || old & ~new & (RW | US))))
        return 0;
    if (marked != entry) {
        if (w->size == 8)
            *AT(uint64_t *, at) = marked;
        else
            *AT(uint32_t *, at) = (uint32_t)marked;
    }
    *AT(uint64_t *, w->leaves + 8 * index) = new;
    if (old & P && old & CLEAN && error_code & WRITE)
        f->dirty++;
    else
        f->hidden++;
    return 1;
}
