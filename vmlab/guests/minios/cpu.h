/* cpu.h: sensitive instructions, the only place in C where they are written. Each is a site (sites.h). */
#pragma once
#include "sites.h"
#include "types.h"

static inline void cli(void) { asm volatile(SITE(K_CLI, ROOM_CLI, "cli") ::: "memory"); }
static inline void sti(void) { asm volatile(SITE(K_STI, ROOM_CALL, "sti") ::: "memory"); }

/* Disable interrupts; gives the flags for irq_restore. */
static inline word irq_save(void)
{
    word flags;
    asm volatile(SITE(K_PUSHF, ROOM_CALL, "pushf") "pop %0" : "=r"(flags) :: "memory");
    cli();
    return flags;
}
static inline void irq_restore(word flags)
{
    asm volatile("push %0\n\t" SITE(K_POPF, ROOM_CALL, "popf") :: "r"(flags) : "memory", "cc");
}

/* Enable interrupts and wait for one: the shadow of STI lets none slip in between. */
static inline void halt(void) { asm volatile(SITE(K_HALT, ROOM_CALL, "sti\n\thlt") ::: "memory"); }

static inline u8 in_byte(u16 port)
{
    u8 value;
    asm volatile(SITE(K_IN_BYTE, ROOM_CALL, "in %%dx, %%al") : "=a"(value) : "d"(port) : "memory");
    return value;
}
static inline u32 in_word(u16 port)
{
    u32 value;
    asm volatile(SITE(K_IN_WORD, ROOM_CALL, "in %%dx, %%eax") : "=a"(value) : "d"(port) : "memory");
    return value;
}
static inline void out_byte(u16 port, u8 value)
{
    asm volatile(SITE(K_OUT_BYTE, ROOM_CALL, "out %%al, %%dx") :: "a"(value), "d"(port) : "memory");
}
static inline void out_word(u16 port, u32 value)
{
    asm volatile(SITE(K_OUT_WORD, ROOM_CALL, "out %%eax, %%dx") :: "a"(value), "d"(port) : "memory");
}

#ifdef __x86_64__
#define A "rax"
#else
#define A "eax"
#endif
static inline void load_cr3(word root) { asm volatile(SITE(K_LOAD_CR3, ROOM_CALL, "mov %%" A ", %%cr3") :: "a"(root) : "memory"); }
static inline void flush_tlb(word root) { asm volatile(SITE(K_FLUSH, ROOM_CALL, "mov %%" A ", %%cr3") :: "a"(root) : "memory"); }
static inline void invlpg(word address) { asm volatile(SITE(K_INVLPG, ROOM_CALL, "invlpg (%%" A ")") :: "a"(address) : "memory"); }
static inline word read_cr2(void)
{
    word address;
    asm volatile(SITE(K_READ_CR2, ROOM_CALL, "mov %%cr2, %%" A) : "=a"(address) :: "memory");
    return address;
}

/* Where the CPU puts its stack when it comes from user mode. */
static inline void set_stack(word top)
{
#ifdef __x86_64__
    extern word syscall_stack;
    syscall_stack = top;
    asm volatile(SITE(K_SET_STACK, ROOM_STACK, "mov %%rax, task_stack(%%rip)") :: "a"(top) : "memory");
#else
    asm volatile(SITE(K_SET_STACK, ROOM_STACK, "mov %%eax, task_stack") :: "a"(top) : "memory");
#endif
}

/* Task priority: CR8 in 64-bit mode, the local APIC's TPR by memory in 32-bit mode. */
static inline void set_task_priority(word priority)
{
#ifdef __x86_64__
    asm volatile(SITE(K_TPR, ROOM_TPR, "mov %%rax, %%cr8") :: "a"(priority) : "memory");
#else
    asm volatile(SITE(K_TPR, ROOM_TPR, "mov %%eax, 0x3fe00080") :: "a"(priority << 4) : "memory");
#endif
}
