/* user.h: what every program can use: system calls, and marks around what is measured. */
#pragma once
#include "../calls.h"
#include "../types.h"

/* By INT 0x80. */
static inline word call(word number, word a, word b, word c)
{
#ifdef __x86_64__
    asm volatile("int $0x80" : "+a"(number) : "D"(a), "S"(b), "d"(c) : "memory");
#else
    asm volatile("int $0x80" : "+a"(number) : "b"(a), "S"(b), "D"(c) : "memory");
#endif
    return number;
}
word fast_call(word number);                    /* by SYSENTER or SYSCALL; no arguments */

static inline __attribute__((noreturn)) void exit(word result) { call(CALL_EXIT, result, 0, 0); __builtin_unreachable(); }
static inline word fork(void) { return call(CALL_FORK, 0, 0, 0); }
static inline word wait(void) { return call(CALL_WAIT, 0, 0, 0); }
static inline void yield(void) { call(CALL_YIELD, 0, 0, 0); }
static inline word pipe(void) { return call(CALL_PIPE, 0, 0, 0); }
static inline word map(word address, word pages, word rights) { return call(CALL_MAP, address, pages, rights); }
static inline word unmap(word address, word pages) { return call(CALL_UNMAP, address, pages, 0); }
static inline word protect(word address, word pages, word rights) { return call(CALL_PROTECT, address, pages, rights); }
#define READ_WRITE (RIGHT_READ | RIGHT_WRITE)

/* library32.S, library64.S: one access that may fault; 0, or 1 when it did and on_fault is fault_return. */
word try_read(const volatile u32 *address, u32 *value);
word try_write(volatile u32 *address, u32 value);
extern u8 fault_return[];

/* Marks: the lab recognises them by address. */
void vmlab_roi_begin(void);
void vmlab_roi_warm(void);
void vmlab_roi_end(void);
void vmlab_empty_begin(void);
void vmlab_empty_end(void);

/* library.c */
u32 option(const char *key, u32 otherwise);     /* "iterations=" and the like, from the kernel's command line */
void say(const char *format, ...);              /* %s %u %x */
void begin(void);                               /* the region of interest and the kernel's counts */
void end(u32 operations, u32 iterations, u32 checksum);
word pages_new(word pages);                     /* mapped and touched */
u32 mix(u32 sum, u32 value);                    /* a checksum goes on */
u32 next_random(u32 *state);
int read_all(word pipe, void *to, word count);
void write_all(word pipe, const void *from, word count);
void fail(const char *why) __attribute__((noreturn));

/* Programs: number 0 is where the first process begins; others are for exec. */
enum program { PROGRAM_INIT, PROGRAM_COMPILER };
void compiler(word argument);

/* Workloads, by name in init.c. */
void syscall_bench(void), in_bench(void), cr8_bench(void), callret_bench(void), pgfault_bench(void), divzero_bench(void);
void ptemod_bench(void), ptemod_p_np_bench(void), ptemod_np_p_bench(void);
void null_call(void), forkwait(void), fork_bench(void), ctxsw(void), mmap_bench(void), protfault(void), pagefault(void);
void build(void), server(void), chase(void), compute(void), mixed(void), io(void), random_programs(void), idle(void);
void bad_kernel(void);
