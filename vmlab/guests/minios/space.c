/* space.c: address spaces: fork with copy-on-write, demand-zero memory, map, unmap, protect. Called by process.c,
 * syscall.c and, at page faults, trap.c.
 *
 * The first GiB is the kernel's, by one level-2 table that all spaces share. The second holds a user window of 16 MiB:
 * a level-2 table, and level-1 tables as they are needed. What a process may do with a page is kept apart, a byte a
 * page; the page table follows at the first fault. */
#include "kernel.h"
#include "pt.h"

#define USER_ENTRY (PRESENT | WRITABLE | FROM_USER)
#define ACCESSED_DIRTY 0x60
#define WINDOW_TABLES (USER_PAGES / 512)
#define INDEX(address) (((address) - USER) / PAGE)
#define FEW 16              /* above this many pages, emptying the TLB is cheaper than INVLPG for each */

extern u8 user_text[], user_data_start[], user_end[], user_load[];

static entry *table(void)
{
    void *page = page_new();
    table_new(page);
    counts.tables++;
    return page;
}

void space_new(struct space *space)
{
    entry *root;
    space->rights = page_new();
    space->table = table();
#ifdef __x86_64__
    entry *middle = table();
    entry_write(middle, (word)kernel_table | PRESENT | WRITABLE);
    entry_write(middle + 1, (word)space->table | USER_ENTRY);
    root = table();
    root_new(root, (word)middle | USER_ENTRY);
#else
    root = page_new();
    clear(root, 4 * sizeof *root);
    root_new(root, (word)kernel_table | PRESENT, (word)space->table | PRESENT);
#endif
    space->root = (word)root;
}

/* The address of the entry for `address`, or 0 where its level-1 table is not there. */
static entry *find(struct space *space, word address)
{
    word value = entry_read(space->table + INDEX(address) / 512);
    return value & PRESENT ? (entry *)FRAME(value) + INDEX(address) % 512 : 0;
}

entry *space_entry(struct space *space, word address)
{
    entry *found = find(space, address);
    if (!found) {
        entry *fresh = table();
        entry_write(space->table + INDEX(address) / 512, (word)fresh | USER_ENTRY);
        found = fresh + INDEX(address) % 512;
    }
    return found;
}

/* Text in place from the image, which all share; a copy of the data; a stack to come on demand. */
void space_program(struct space *space)
{
    word address = USER;
    clear(space->rights, USER_PAGES);
    for (; address < (word)user_data_start; address += PAGE) {
        word frame = address - USER + (word)user_load;
        page_hold(frame);
        space->rights[INDEX(address)] = MAY_READ;
        entry_write(space_entry(space, address), frame | PRESENT | FROM_USER);
    }
    for (; address < (word)user_end; address += PAGE) {
        void *frame = page_new();
        page_copy(frame, (void *)(address - USER + (word)user_load));
        space->rights[INDEX(address)] = MAY_READ | MAY_WRITE;
        entry_write(space_entry(space, address), (word)frame | USER_ENTRY);
    }
    for (word page = USER_PAGES - USER_STACK_PAGES; page < USER_PAGES; page++)
        space->rights[page] = MAY_READ | MAY_WRITE;
}

/* Both sides lose the right to write at once, and get it back page by page by a fault. */
void space_fork(struct space *child, struct space *parent)
{
    space_new(child);
    page_copy(child->rights, parent->rights);
    for (word i = 0; i < WINDOW_TABLES; i++) {
        word value = entry_read(parent->table + i);
        if (!(value & PRESENT))
            continue;
        entry *from = (entry *)FRAME(value), *to = table();
        entry_write(child->table + i, (word)to | USER_ENTRY);
        for (word j = 0; j < 512; j++) {
            value = entry_read(from + j);
            if (!(value & PRESENT))
                continue;
            if (value & WRITABLE)
                entry_write(from + j, value &= ~(word)WRITABLE);
            page_hold(FRAME(value));
            entry_write(to + j, value & ~(word)ACCESSED_DIRTY);
        }
    }
    flush_tlb(parent->root);
    counts.flushes++;
}

/* No page is mapped any more: a store for each that was, as a usual kernel's exit makes (Linux: zap_pte_range). */
void space_clear(struct space *space)
{
    for (word i = 0; i < WINDOW_TABLES; i++) {
        word value = entry_read(space->table + i);
        if (!(value & PRESENT))
            continue;
        entry *last = (entry *)FRAME(value);
        for (word j = 0; j < 512; j++) {
            value = entry_read(last + j);
            if (!(value & PRESENT))
                continue;
            entry_write(last + j, 0);
            page_drop(FRAME(value));
        }
    }
}

/* The tables of a space that is cleared die whole. The root goes first; nothing may point at a table that is freed. */
void space_free(struct space *space)
{
#ifdef __x86_64__
    entry *middle = (entry *)FRAME(entry_read((entry *)space->root));
    root_free((void *)space->root, page_free((void *)space->root));
    table_free(middle, page_free(middle));
#else
    root_free((void *)space->root, page_free((void *)space->root));
#endif
    for (word i = 0; i < WINDOW_TABLES; i++) {
        word value = entry_read(space->table + i);
        if (!(value & PRESENT))
            continue;
        entry *last = (entry *)FRAME(value);
        table_free(last, page_free(last));
    }
    table_free(space->table, page_free(space->table));
    page_drop((word)space->rights);
}

static void forget(word address)
{
    invlpg(address);
    counts.invlpgs++;
}

/* A page fault in the user window: 1 when the access may be tried again. Error code: bit 1, a write. */
int space_fault(struct space *space, word address, word error)
{
    word rights = space->rights[INDEX(address)], wanted = error & 2 ? MAY_WRITE : MAY_READ;
    if (!(rights & wanted))
        return 0;
    word extra = rights & MAY_WRITE ? USER_ENTRY : PRESENT | FROM_USER;
    entry *at = space_entry(space, address);
    word value = entry_read(at);
    if (!(value & PRESENT)) {           /* the first touch */
        void *frame = page_new();
        clear(frame, PAGE);
        counts.pages_zeroed++;
        entry_write_now(at, (word)frame | extra);
    } else if (wanted == MAY_WRITE && !(value & WRITABLE)) {
        word old = FRAME(value);
        if (page_holders(old) == 1) {   /* the other side has gone, or copied already */
            entry_write_now(at, value | WRITABLE);
        } else {
            void *frame = page_new();
            page_copy(frame, (void *)old);
            counts.pages_copied++;
            entry_write_now(at, (word)frame | extra);
            page_drop(old);
        }
        forget(address);
    }
    return 1;
}

static int inside(word address, word pages)
{
    return address >= USER && address % PAGE == 0 && pages && pages <= USER_PAGES && INDEX(address) + pages <= USER_PAGES;
}

/* Whether all of these bytes may be accessed so: asked before the kernel touches what a program points at. */
int space_allows(struct space *space, const void *pointer, word count, word rights)
{
    word address = (word)pointer;
    if (address < USER || address >= USER_END || count > USER_END - address)
        return 0;
    for (word i = INDEX(address); count && i <= INDEX(address + count - 1); i++)
        if ((space->rights[i] & rights) != rights)
            return 0;
    return 1;
}

/* Give `pages` pages, at `address` or, if that is 0, at the first gap; gives the address, or 0. */
word space_map(struct space *space, word address, word pages, word rights)
{
    word first = USER_MAPS, free = 0;
    if (address) {
        if (!inside(address, pages))
            return 0;
        first = INDEX(address);
    }
    for (word i = first; free < pages; i++) {
        if (i == USER_PAGES - USER_STACK_PAGES || (address && space->rights[i]))
            return 0;
        if (space->rights[i])
            free = 0, first = i + 1;
        else
            free++;
    }
    for (word i = first; i < first + pages; i++)
        space->rights[i] = rights;
    return USER + first * PAGE;
}

/* Other rights for what is mapped; a page that may be written now becomes writable at its next fault. */
int space_protect(struct space *space, word address, word pages, word rights)
{
    if (!inside(address, pages))
        return 0;
    word changed = 0;
    for (word at = address; at < address + pages * PAGE; at += PAGE) {
        if (!space->rights[INDEX(at)])
            return 0;
        space->rights[INDEX(at)] = rights;
        entry *entry = find(space, at);
        word value = entry ? entry_read(entry) : 0;
        if (!(value & PRESENT) || !(value & WRITABLE) || (rights & MAY_WRITE))
            continue;
        entry_write(entry, value & ~(word)WRITABLE);
        if (changed++ < FEW)
            forget(at);
    }
    if (changed > FEW) {
        flush_tlb(space->root);
        counts.flushes++;
    }
    return 1;
}

int space_unmap(struct space *space, word address, word pages)
{
    if (!inside(address, pages))
        return 0;
    word changed = 0;
    for (word at = address; at < address + pages * PAGE; at += PAGE) {
        space->rights[INDEX(at)] = 0;
        entry *entry = find(space, at);
        word value = entry ? entry_read(entry) : 0;
        if (!(value & PRESENT))
            continue;
        entry_write(entry, 0);
        page_drop(FRAME(value));
        if (changed++ < FEW)
            forget(at);
    }
    if (changed > FEW) {
        flush_tlb(space->root);
        counts.flushes++;
    }
    return 1;
}
