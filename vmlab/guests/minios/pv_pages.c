/* pv_pages.c: page tables that are the machine's own, read-only to us, and changed by asking. Called by pv.S in place of the
 * stores of pt.h.
 *
 * Entries hold machine addresses; a change is queued, and the queue is sent as one hypercall when it is full (option
 * `batch`) or when the change must be in force. What else the hypervisor is to do at that moment (load a root, empty the
 * TLB, pin) goes along in the same transition, as a multicall. A new table is plain memory, filled by plain stores, until
 * something must be in force: then it becomes read-only, and the entry that names it is changed. */
#include "kernel.h"
#include "pt.h"
#include "pv.h"
#include "text.h"

#define LONGEST 512
static struct { u64 entry, value; } queue[LONGEST];
static u32 queued, longest = LONGEST;
u32 entries_touched[16];                /* one bit for a few entries each: perhaps a change of one of these waits. Read by pv.S */

#define NEW_TABLES 16
static word new_tables[NEW_TABLES];     /* not read-only yet */
static struct { word address, value; } links[NEW_TABLES];       /* entries that are to name them */
static u32 new_count, link_count;
static u32 is_new[MAX_MEMORY / PAGE / 32];

static struct { word number; long result; word arguments[6]; } calls[8];
static struct { u32 command; word argument, unused; } extended[2];
static u32 call_count, extended_count;

static word kernel_stack;               /* for the next entry from user mode; 0: the hypervisor knows */

static void touch(word address)
{
    u32 bit = (address >> 3 ^ address >> 12) & 511;
    entries_touched[bit / 32] |= 1u << bit % 32;
}

/* --- transitions */
static void call_later(u32 number, word a, word b, word c, word d)
{
    calls[call_count].number = number;
    calls[call_count].arguments[0] = a;
    calls[call_count].arguments[1] = b;
    calls[call_count].arguments[2] = c;
    calls[call_count++].arguments[3] = d;
}

static void extended_later(u32 command, word argument)
{
    extended[extended_count].command = command;
    extended[extended_count].argument = argument;
    call_later(HYPERCALL_MMUEXT_OP, (word)&extended[extended_count++], 1, 0, DOMID_SELF);
}

/* All that was asked for since the last time, in its order, in one transition. */
static void send(void)
{
    if (call_count == 1) {
        word *a = calls[0].arguments;
        pv_must(hypercall(calls[0].number, a[0], a[1], a[2], a[3], 0));
    } else if (call_count) {
        pv_must(hypercall(HYPERCALL_MULTICALL, (word)calls, call_count, 0, 0, 0));
        for (u32 i = 0; i < call_count; i++)
            pv_must(calls[i].result);
    }
    call_count = extended_count = 0;
    if (queued) {
        queued = 0;
        for (u32 i = 0; i < 16; i++)
            entries_touched[i] = 0;
        for (u32 i = 0; i < link_count; i++)
            touch(links[i].address);
    }
}

/* --- the queue */

/* An entry in terms of our own frames becomes one of the machine's. */
static word translated(word value) { return value & PRESENT ? machine(FRAME(value)) | (value & 0xfff) : value; }

static void queue_only(void)
{
    if (queued)
        call_later(HYPERCALL_MMU_UPDATE, (word)queue, queued, 0, DOMID_SELF);
}

static void enqueue(word address, word value)
{
    if (queued >= longest) {
        queue_only();
        send();
    }
    queue[queued].entry = machine(address);
    queue[queued++].value = translated(value);
    touch(address);
}

/* The kernel's own mapping of a page, which must not be writable while the page is a table. */
static word own_entry(word page)
{
    word table = machine_to_phys[(word)kernel_table[page >> 21] / PAGE] * PAGE;
    return table + (page / PAGE % 512) * 8;
}

/* Everything is to be in force: new tables become read-only, then they are named. */
static void queue_later(void)
{
    for (u32 i = 0; i < new_count; i++) {
        enqueue(own_entry(new_tables[i]), new_tables[i] | PRESENT);
        is_new[new_tables[i] / PAGE / 32] = 0;
    }
    for (u32 i = 0; i < link_count; i++)
        enqueue(links[i].address, links[i].value);
    new_count = link_count = 0;
    queue_only();
}

static void queue_send(void)
{
    queue_later();
    send();
}

/* --- entries */
static int fresh(word page) { return is_new[page / PAGE / 32] >> page / PAGE % 32 & 1; }

static void change(word address, word value)
{
    for (u32 i = 0; i < link_count; i++)
        if (links[i].address == address) {      /* a second thought about it */
            queue_send();
            break;
        }
    if (fresh(FRAME(address))) {
        *(word *)address = translated(value);
    } else if (value & PRESENT && fresh(FRAME(value)) && link_count < NEW_TABLES) {
        touch(address);
        links[link_count].address = address;
        links[link_count++].value = value;
    } else {
        if (value & PRESENT && fresh(FRAME(value)))
            queue_send();               /* no room to remember it: at once */
        enqueue(address, value);
        if (queued >= longest) {
            queue_only();
            send();
        }
    }
}

/* Where a change may be waiting: pv.S reads all other entries itself. */
word entry_value(word address)
{
    for (u32 i = 0; i < link_count; i++)
        if (links[i].address == address)
            return links[i].value;
    queue_send();
    word value = *(word *)address;
    return value & PRESENT ? machine_to_phys[value / PAGE] * PAGE | (value & 0xfff) : value;
}

void entry_write_queued(word address, word value) { change(address, value); }

void entry_write_sent(word address, word value)
{
    change(address, value);
    queue_send();
}

void table_made(word page)
{
    if (new_count == NEW_TABLES)
        queue_send();
    new_tables[new_count++] = page;
    is_new[page / PAGE / 32] |= 1u << page / PAGE % 32;
}

/* Writable again, and nothing stale in the TLB. */
static void plain_later(word page)
{
    call_later(HYPERCALL_UPDATE_VA_MAPPING, page, WIDE(machine(page) | PRESENT | WRITABLE) UVMF_INVLPG AND_ONE_MORE);
}

void table_no_more(word page, word link)
{
    queue_later();
    plain_later(page);
    send();
    *(word *)page = link;
}

#ifdef __x86_64__
/* --- roots come in pairs: what runs in ring 3 may reach whatever its tables map, so programs have a root of their own, which
 * leads to their part of the linear space alone. Both lead to the same level-2 table for it. */
static u32 program_roots[MAX_MEMORY / PAGE];    /* by the kernel's root */

static void extended_pair(u32 command, word first, u32 command_too, word second)
{
    extended[0].command = command;
    extended[0].argument = first;
    extended[1].command = command_too;
    extended[1].argument = second;
    call_later(HYPERCALL_MMUEXT_OP, (word)extended, 2, 0, DOMID_SELF);
}

void root_made(word root, word kernels)
{
    u64 *middle = (u64 *)FRAME(kernels), *programs = page_new(), *lower = page_new();
    change(root, kernels);
    if (!fresh((word)middle))           /* then a change of it may still wait */
        queue_send();
    clear(lower, PAGE);
    lower[USER >> 30] = middle[USER >> 30];
    clear(programs, PAGE);
    programs[0] = machine((word)lower) | PRESENT | WRITABLE | FROM_USER;
    table_made((word)lower);
    table_made((word)programs);
    program_roots[root / PAGE] = (word)programs;
    queue_later();
    extended_pair(ROOT_LEVEL, machine(root) / PAGE, ROOT_LEVEL, machine((word)programs) / PAGE);
    send();
}

void root_no_more(word root, word link)
{
    word programs = program_roots[root / PAGE], lower = machine_to_phys[*(u64 *)programs / PAGE] * PAGE;
    queue_later();
    extended_pair(MMUEXT_UNPIN_TABLE, machine(root) / PAGE, MMUEXT_UNPIN_TABLE, machine(programs) / PAGE);
    plain_later(root);
    plain_later(programs);
    plain_later(lower);
    send();
    *(word *)root = link;
    *(word *)programs = page_free((void *)programs);
    *(word *)lower = page_free((void *)lower);
}
#else
/* --- roots: a table of four entries; the last names a level-2 table that the hypervisor fills, one for every root */
void root_made(word second, word user)
{
    u64 *root = (u64 *)(second - 8);
    word hole = (word)page_new();
    clear((void *)hole, PAGE);
    root[0] = translated(root[0]);
    root[1] = translated(user);
    root[2] = 0;
    root[3] = machine(hole) | PRESENT;
    table_made((word)root);
    table_made(hole);
    queue_later();
    extended_later(ROOT_LEVEL, machine((word)root) / PAGE);
    send();
}

void root_no_more(word root, word link)
{
    word hole = machine_to_phys[((u64 *)root)[3] / PAGE] * PAGE;
    queue_later();
    extended_later(MMUEXT_UNPIN_TABLE, machine(root) / PAGE);
    plain_later(root);
    plain_later(hole);
    send();
    *(word *)root = link;
    *(word *)hole = page_free((void *)hole);
}
#endif

void root_load(word root)
{
    queue_later();
    if (kernel_stack)
        call_later(HYPERCALL_STACK_SWITCH, KERNEL_SS, kernel_stack, 0, 0);
    kernel_stack = 0;
#ifdef __x86_64__
    extended_pair(MMUEXT_NEW_BASEPTR, machine(root) / PAGE, MMUEXT_NEW_USER_BASEPTR, machine(program_roots[root / PAGE]) / PAGE);
#else
    extended_later(MMUEXT_NEW_BASEPTR, machine(root) / PAGE);
#endif
    send();
}

/* Known at the latest with the root of the process that the stack belongs to (schedule.c loads both). */
void stack_set(word top) { kernel_stack = top; }

void tlb_flush(void)
{
    queue_later();
    extended_later(MMUEXT_TLB_FLUSH_LOCAL, 0);
    send();
}

void page_flush(word address)
{
    queue_later();
    extended_later(MMUEXT_INVLPG_LOCAL, address);
    send();
}

/* The tables we were started with let users in everywhere. Ours are the same but for the level 2, where they do not. (In
 * 64 bits the kernel is a user to the page tables, and there are no users of its own before they have a root.) */
void pv_pages_init(const struct start_info *start)
{
#ifdef __x86_64__
    const u64 *root = (const u64 *)start->pt_base, *first_root = (const u64 *)(machine_to_phys[root[0] / PAGE] * PAGE);
    const word flags = PRESENT | WRITABLE;
#else
    const u64 *first_root = (const u64 *)start->pt_base;
    const word flags = PRESENT;
#endif
    const u64 *old = (const u64 *)(machine_to_phys[first_root[0] / PAGE] * PAGE);
    for (u32 i = 0; i < 512; i++)
        kernel_table[i] = old[i] & ~(u64)FROM_USER;
    table_made((word)kernel_table);
    change((word)first_root, (word)kernel_table | flags);
    tlb_flush();
    longest = find_number(command_line, "batch=", 32);
    if (longest < 1 || longest > LONGEST)
        longest = LONGEST;
}
