/* pt.h: page-table entries. Nobody else reads or writes one. Used by space.c, stacks.c, nanobench.c.
 *
 * An entry is 8 bytes in both builds. Frames lie below 4 GiB and NX is not used, so the high half is always 0: it is
 * cleared with the page, and a change of an entry is ONE store of a register's width. */
#pragma once
#include "counts.h"
#include "cpu.h"

typedef u64 entry;

#define PRESENT 1
#define WRITABLE 2
#define FROM_USER 4
#define FRAME(value) ((value) & 0xfffff000)

static inline word entry_read(entry *at)
{
    word value = (word)at;
    asm volatile(SITE(K_ENTRY_READ, ROOM_CALL, "mov (%%" A "), %%" A) : "+a"(value) :: "memory");
    return value;
}

#ifdef __x86_64__
#define STORE "mov %%rdx, (%%rax)"
#else
#define STORE "mov %%edx, (%%eax)"
#endif

/* One change in a series: the series ends with entry_write_now, invlpg, flush_tlb or load_cr3. */
static inline void entry_write(entry *at, word value)
{
    asm volatile(SITE(K_ENTRY_WRITE, ROOM_CALL, STORE) :: "a"(at), "d"(value) : "memory");
    counts.pt_writes++;
}

/* A change that must be seen by the next instruction. */
static inline void entry_write_now(entry *at, word value)
{
    asm volatile(SITE(K_ENTRY_WRITE_NOW, ROOM_CALL, STORE) :: "a"(at), "d"(value) : "memory");
    counts.pt_writes++;
}

/* This page becomes a page table, and is cleared. */
static inline void table_new(void *page)
{
    word count = 1024;
    asm volatile(SITE(K_TABLE_NEW, ROOM_CALL, "rep stosl") : "+D"(page), "+c"(count) : "a"(0) : "memory");
}

/* This page is no page table any more; `link` is stored in its first word. */
static inline void table_free(void *page, word link)
{
    asm volatile(SITE(K_TABLE_FREE, ROOM_CALL, STORE) :: "a"(page), "d"(link) : "memory");
}

#ifdef __x86_64__
/* A root gets its one entry; with it this table becomes a root (a PML4). */
static inline void root_new(entry *root, word middle)
{
    asm volatile(SITE(K_ROOT_NEW, ROOM_CALL, STORE) :: "a"(root), "d"(middle) : "memory");
    counts.pt_writes++;
}
#else
/* A root gets its two entries, the user's last; with it this page becomes a root (32 bits: a PDPT). */
static inline void root_new(entry *root, word kernel, word user)
{
    *(word *)root = kernel;
    asm volatile(SITE(K_ROOT_NEW, ROOM_CALL, STORE) :: "a"(root + 1), "d"(user) : "memory");
    counts.pt_writes += 2;
}
#endif

/* Nothing uses this root any more; `link` is stored in its first word. */
static inline void root_free(void *root, word link)
{
    asm volatile(SITE(K_ROOT_FREE, ROOM_CALL, STORE) :: "a"(root), "d"(link) : "memory");
}
