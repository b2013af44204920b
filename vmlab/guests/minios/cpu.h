/* cpu.h: sensitive instructions, the only place in C where they are written. Each is a site (sites.h). */
#pragma once
#include "sites.h"
#include "types.h"

static inline void cli(void) { asm volatile(SITE(K_CLI, 6, "cli") ::: "memory"); }
static inline void sti(void) { asm volatile(SITE(K_STI, 4, "sti") ::: "memory"); }

/* Disable interrupts; gives the flags for irq_restore. */
static inline word irq_save(void)
{
    word flags;
    asm volatile(SITE(K_PUSHF, 4, "pushf") "pop %0" : "=r"(flags) :: "memory");
    cli();
    return flags;
}
static inline void irq_restore(word flags)
{
    asm volatile("push %0\n\t" SITE(K_POPF, 4, "popf") :: "r"(flags) : "memory", "cc");
}

/* Enable interrupts and wait for one: the shadow of STI lets none slip in between. */
static inline void halt(void) { asm volatile(SITE(K_HALT, 3, "sti\n\thlt") ::: "memory"); }

static inline u8 in_byte(u16 port)
{
    u8 value;
    asm volatile(SITE(K_IN_BYTE, 4, "in %%dx, %%al") : "=a"(value) : "d"(port) : "memory");
    return value;
}
static inline u32 in_word(u16 port)
{
    u32 value;
    asm volatile(SITE(K_IN_WORD, 4, "in %%dx, %%eax") : "=a"(value) : "d"(port) : "memory");
    return value;
}
static inline void out_byte(u16 port, u8 value)
{
    asm volatile(SITE(K_OUT_BYTE, 4, "out %%al, %%dx") :: "a"(value), "d"(port) : "memory");
}
static inline void out_word(u16 port, u32 value)
{
    asm volatile(SITE(K_OUT_WORD, 4, "out %%eax, %%dx") :: "a"(value), "d"(port) : "memory");
}

#ifdef __x86_64__
#define A "rax"
#else
#define A "eax"
#endif
static inline void load_cr3(word root) { asm volatile(SITE(K_LOAD_CR3, 2, "mov %%" A ", %%cr3") :: "a"(root) : "memory"); }
static inline void flush_tlb(word root) { asm volatile(SITE(K_FLUSH, 2, "mov %%" A ", %%cr3") :: "a"(root) : "memory"); }
static inline void invlpg(word address) { asm volatile(SITE(K_INVLPG, 2, "invlpg (%%" A ")") :: "a"(address) : "memory"); }
static inline word read_cr2(void)
{
    word address;
    asm volatile(SITE(K_READ_CR2, 2, "mov %%cr2, %%" A) : "=a"(address) :: "memory");
    return address;
}

/* Where the CPU puts its stack when it comes from user mode. */
static inline void set_stack(word top)
{
#ifdef __x86_64__
    extern word task_stack, syscall_stack;
    syscall_stack = top;
    task_stack = top;
#else
    asm volatile(SITE(K_SET_STACK, 0, "mov %%eax, task_stack") :: "a"(top) : "memory");
#endif
}

/* Task priority: CR8 in 64-bit mode, the local APIC's TPR by memory in 32-bit mode. */
static inline void set_task_priority(word priority)
{
#ifdef __x86_64__
    asm volatile("mov %0, %%cr8" :: "r"(priority) : "memory");
#else
    asm volatile(SITE(K_TPR, 0, "mov %%eax, 0x3fe00080") :: "a"(priority << 4) : "memory");
#endif
}
