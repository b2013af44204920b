/* lmbench.c: what Barham et al. (SOSP 2003, tables 4 and 5) measured with lmbench: context switch, mmap, faults. */
#include "user.h"

/* 2p/0K: a token goes round two processes through two pipes: two switches an iteration. The empty loop does the same
 * transfers within one process, as lmbench subtracts them. */
void ctxsw(void)
{
    u32 iterations = option("iterations=", 100), sum = 0;
    word there = pipe(), back = pipe();
    u32 token = 0;
    vmlab_empty_begin();
    for (u32 i = iterations; i; i--) {
        write_all(there, &token, sizeof token);
        read_all(there, &token, sizeof token);
        write_all(back, &token, sizeof token);
        read_all(back, &token, sizeof token);
    }
    vmlab_empty_end();
    call(CALL_BEGIN, 0, 0, 0);          /* the kernel's counts hold the other process from its beginning to its end */
    if (!fork()) {
        for (u32 i = 0; i <= iterations; i++) {
            read_all(there, &token, sizeof token);
            token = token * 5 + 1;
            write_all(back, &token, sizeof token);
        }
        exit(0);
    }
    vmlab_roi_begin();
    for (u32 i = 0; i <= iterations; i++) {
        if (i == 1)
            vmlab_roi_warm();
        write_all(there, &token, sizeof token);
        read_all(back, &token, sizeof token);
        sum = mix(sum, token);
    }
    vmlab_roi_end();
    wait();
    call(CALL_END, 0, 0, 0);
    call(CALL_REPORT, 2 * (iterations + 1), iterations, sum);
}

/* Map `pages` pages, touch every fourth (16 KiB, lmbench's stride), unmap. */
static void map_once(word pages)
{
    word at = map(0, pages, READ_WRITE);
    if (!at)
        fail("no room to map so many pages");
    for (word page = 0; page < pages; page += 4)
        *(volatile u8 *)(at + page * PAGE) = 1;
    unmap(at, pages);
}

#define MEASURE(operation, checksum) do { \
        u32 iterations = option("iterations=", 100); \
        vmlab_empty_begin(); \
        for (u32 i = iterations; i; i--) asm volatile("" ::: "memory"); \
        vmlab_empty_end(); \
        begin(); \
        operation; \
        vmlab_roi_warm(); \
        for (u32 i = iterations; i; i--) { operation; } \
        end(iterations + 1, iterations, checksum); \
    } while (0)

void mmap_bench(void)
{
    word pages = option("pages=", 64);
    MEASURE(map_once(pages), 0);
}

/* A write to a page that may only be read: the kernel sends the program to its own handler. */
void protfault(void)
{
    u32 caught = 0;
    word at = pages_new(1);
    protect(at, 1, RIGHT_READ);
    call(CALL_ON_FAULT, (word)fault_return, 0, 0);
    MEASURE(caught += try_write((volatile u32 *)at, 1), caught);
}

/* The first touch of a page, one a page: the kernel maps a fresh one. */
void pagefault(void)
{
    word pages = option("iterations=", 100) + 1, at = map(0, pages, READ_WRITE);
    if (!at)
        fail("no room to map so many pages");
    MEASURE(*(volatile u32 *)at = 1; at += PAGE, 0);
}
