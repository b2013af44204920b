/* pv.h: the interface of a Xen-like hypervisor, as far as this kernel uses it (32 bits). Only the files pv*.c and pv.S
 * know of it. Facts: xen/include/public/{xen,arch-x86/xen-x86_32,event_channel,sched}.h. */
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

#define FLAT_RING1_CS 0xe019
#define FLAT_RING1_SS 0xe021
#define FLAT_RING3_CS 0xe02b
#define FLAT_RING3_DS 0xe033
#define MACHINE_TO_PHYS 0xf5800000
#define DOMID_SELF 0x7ff0
#define UVMF_INVLPG 2
#define MMUEXT_PIN_L3_TABLE 2
#define MMUEXT_UNPIN_TABLE 4
#define MMUEXT_NEW_BASEPTR 5
#define MMUEXT_TLB_FLUSH_LOCAL 6
#define MMUEXT_INVLPG_LOCAL 7
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
    u32 pages, shared_info, flags, store_mfn, store_port, console[2], pt_base, pt_frames, mfn_list, mod_start, mod_len;
    char command_line[1024];
};

extern struct {
    u8 pending, mask;
    u16 unused;
    u32 selector, cr2, unused2[5];
    struct { u32 version, unused; u64 tsc, system; u32 factor; signed char shift, unused3[3]; } time;
    u8 others[31 * 64];
    u32 events[32], masks[32];
} volatile shared_info;

extern u8 hypercall_page[];

static inline int hypercall(u32 number, word a, word b, word c, word d, word e)
{
    u8 *entry = hypercall_page + 32 * number;
    int result;
    asm volatile("call *%6" : "=a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d), "+D"(e) : "0"(entry) : "memory", "cc");
    return result;
}

/* Machine frame numbers by our own, in the list that we were started with; and the way back, the hypervisor's table. */
extern const u32 *phys_to_machine;
#define machine_to_phys ((const u32 *)MACHINE_TO_PHYS)
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
