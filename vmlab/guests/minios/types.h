/* types.h: sizes, and where things are. Included by everybody, assembly too. */
#pragma once

/* Memory map, the same for 32 and 64 bits (docs/minios.md). Physical memory is mapped one to one from 0. */
#define PAGE 4096
#define MAX_MEMORY (64 << 20)
#define STACKS 0x3fc00000       /* kernel stacks: two pages a process, the lower one never mapped */
#define LOCAL_APIC 0x3fe00000   /* the local APIC's page, uncached */
#define USER 0x40000000         /* user programs: 16 MiB */
#define USER_PAGES 4096
#define USER_END (USER + USER_PAGES * PAGE)
#define USER_STACK_PAGES 16
#define USER_MAPS 256           /* first page that `map` gives by itself */

/* Selectors. SYSENTER wants user code and data behind the kernel's two, SYSRET wants data before code. */
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#ifdef __x86_64__
#define USER_CODE 0x2b
#define TASK 0x30
#else
#define USER_CODE 0x1b
#define TASK 0x28
#define TASK_DOUBLE_FAULT 0x30
#endif
#define USER_DATA 0x23

#define FLAG_IF 0x200
#define PROCESSES 32

#ifndef __ASSEMBLER__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word;     /* as wide as a register and a pointer */
#endif
