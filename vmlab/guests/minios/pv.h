/* pv.h: the interface of a Xen-like hypervisor, as far as this kernel uses it. Only the files pv*.c and pv.S
 * know of it. Facts: xen/include/public/{xen,arch-x86/xen-x86_32,arch-x86/xen-x86_64,event_channel,sched}.h. */
#pragma once

#define HYPERCALL_SET_TRAP_TABLE 0
#define HYPERCALL_MMU_UPDATE 1
#define HYPERCALL_STACK_SWITCH 3
#define HYPERCALL_SET_CALLBACKS 4
#define HYPERCALL_MULTICALL 13
#define HYPERCALL_UPDATE_VA_MAPPING 14
#define HYPERCALL_SET_TIMER_OP 15
#define HYPERCALL_CONSOLE_IO 18
#define HYPERCALL_SCHED_OP 29
#define HYPERCALL_MMUEXT_OP 26
#define HYPERCALL_EVENT_CHANNEL_OP 32
#define HYPERCALL_RING_OP 54            /* the lab's own (docs/paravirtualization.md): command, frame, answer */
#define HYPERCALL_PORT_IO 55            /* the lab's own: write, port, size, value */

#ifdef __x86_64__               /* kernel and programs are both in ring 3: frames tell them apart by the RPL of CS, 0 or 3 */
#define KERNEL_CS 0xe033
#define KERNEL_SS 0xe02b
#define PROGRAM_CS 0xe033
#define PROGRAM_DS 0xe02b
#define MACHINE_TO_PHYS 0xffff800000000000
#define ROOT_LEVEL 3            /* MMUEXT_PIN_L4_TABLE */
#define CR2_AT 16
#define FRAME_POPS 3            /* bytes before a stub of traps.inc: POP RCX, POP R11 */
#else
#define KERNEL_CS 0xe019
#define KERNEL_SS 0xe021
#define PROGRAM_CS 0xe02b
#define PROGRAM_DS 0xe033
#define MACHINE_TO_PHYS 0xf5800000
#define ROOT_LEVEL 2            /* MMUEXT_PIN_L3_TABLE */
#define CR2_AT 8
#define FRAME_POPS 0
#endif
#define DOMID_SELF 0x7ff0
#define UVMF_INVLPG 2
#define MMUEXT_UNPIN_TABLE 4
#define MMUEXT_NEW_BASEPTR 5
#define MMUEXT_TLB_FLUSH_LOCAL 6
#define MMUEXT_INVLPG_LOCAL 7
#define MMUEXT_NEW_USER_BASEPTR 15
#define HYPERCALL_IRET 23
#define SIF_SERVICES (1u << 31)         /* the lab's own: every service by hypercall, as a microkernel's */
#define SCHEDOP_BLOCK 1
#define EVTCHNOP_BIND_VIRQ 1
#define EVTCHNOP_BIND_PIRQ 2
#define EVTCHNOP_SEND 4
#define VIRQ_TIMER 0

/* struct shared_info, in the page that the hypervisor shares with us */
#define UPCALL_PENDING shared_info + 0
#define UPCALL_MASK shared_info + 1
#define EVENT 0x20                      /* what pv.S pushes as the vector of an upcall */

#ifndef __ASSEMBLER__
#include "types.h"

struct start_info {
    char magic[32];
    word pages, shared_info;
    u32 flags;
    word store_mfn;
    u32 store_port;
    struct { word mfn; u32 port; } console;
    word pt_base, pt_frames, mfn_list, mod_start, mod_len;
    char command_line[1024];
};

extern struct {
    u8 pending, mask;
    u16 unused;
    word selector, cr2, unused2[sizeof(word) == 8 ? 1 : 5];
    struct { u32 version, unused; u64 tsc, system; u32 factor; signed char shift, unused3[3]; } time;
    u8 others[31 * 64];
    word events[8 * sizeof(word)], masks[8 * sizeof(word)];
} volatile shared_info;

extern u8 hypercall_page[];

static inline int hypercall(u32 number, word a, word b, word c, word d, word e)
{
    u8 *entry = hypercall_page + 32 * number;
#ifdef __x86_64__
    long result;
    register word fourth asm("r10") = d, fifth asm("r8") = e;
    asm volatile("call *%6" : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(fourth), "+r"(fifth) : "0"(entry) : "memory", "cc");
#else
    int result;
    asm volatile("call *%6" : "=a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d), "+D"(e) : "0"(entry) : "memory", "cc");
#endif
    return result;
}

/* A list of arguments in which one has 64 bits: two words in 32 bits. */
#ifdef __x86_64__
#define WIDE(value) (value),
#define AND_ONE_MORE , 0
#else
#define WIDE(value) (u32)(value), (u32)((u64)(value) >> 32),
#define AND_ONE_MORE
#endif

/* Machine frame numbers by our own, in the list that we were started with; and the way back, the hypervisor's table. */
extern const word *phys_to_machine;
#define machine_to_phys ((const word *)MACHINE_TO_PHYS)
static inline word machine(word address) { return phys_to_machine[address / PAGE] * PAGE | address % PAGE; }

/* pv.c */
extern int by_hypercall;                /* SIF_SERVICES */
void pv_must(int result);               /* ends the run where the hypervisor refused */
u64 pv_system_time(void);

/* pv_pages.c: the page tables, which the hypervisor checks */
void pv_pages_init(const struct start_info *start);

/* pv_disk.c: the block device by a shared ring */
void pv_disk_event(u32 port);
#endif
