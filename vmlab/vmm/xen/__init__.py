"""A paravirtual hypervisor with Xen's interface. This file is the interface as numbers, named with the public header that has each
(xen/include/public/…); nothing here acts. What depends on the guest's width is in ``abi``.

Read in this order: ``domain`` and ``domain64`` (a guest's memory at its start), ``tables`` and ``frames`` (what its frames are used
for), ``hypervisor`` (what reaches it, and the way back), ``ring1`` and ``ring3`` (the same by width), ``calls``, ``mmu``,
``events``, ``time``, ``ring``, ``ports`` (hypercalls), ``descriptors`` and ``memory`` (what they stand on).
"""

from __future__ import annotations

# xen.h: __HYPERVISOR_*; 54 and 55 are __HYPERVISOR_arch_6 and _7, here the lab's own:
# ring_op(command, frame, answer) and port_io(op, port, size, value).
HYPERCALLS = {
    0: "set_trap_table", 1: "mmu_update", 2: "set_gdt", 3: "stack_switch", 4: "set_callbacks", 5: "fpu_taskswitch",
    10: "update_descriptor", 13: "multicall", 14: "update_va_mapping", 15: "set_timer_op", 17: "xen_version", 18: "console_io",
    20: "grant_table_op", 21: "vm_assist", 23: "iret", 24: "vcpu_op", 25: "set_segment_base", 26: "mmuext_op", 29: "sched_op", 32: "event_channel_op",
    33: "physdev_op", 54: "ring_op", 55: "port_io",
}
#: What a hypercall is for, where that is not its own name's business: the kinds of ``crossing.*``.
SERVICES = {
    "mmu_update": "memory", "update_va_mapping": "memory", "mmuext_op": "memory", "multicall": "batch", "iret": "return",
    "set_segment_base": "schedule", "stack_switch": "schedule", "fpu_taskswitch": "schedule", "sched_op": "schedule",
    "set_timer_op": "time", "vcpu_op": "time",
    "console_io": "console", "event_channel_op": "event", "physdev_op": "device", "ring_op": "device", "port_io": "device",
}                                   # all others: "setup"
HYPERCALL_VECTOR = 0x82
SYSCALL_VECTOR = 0x80               # the one vector that may go from ring 3 to ring 1 without the hypervisor

# errno.h, negated as hypercalls return them
ENOENT, ESRCH, EFAULT, EEXIST, ENODEV, EINVAL, ENOSPC, ENOSYS, ETIME = -2, -3, -14, -17, -19, -22, -28, -38, -62

# arch-x86/xen-x86_32.h: selectors in the hypervisor's part of every GDT, and where the hypervisor's hole begins
FLAT_RING1_CS, FLAT_RING1_DS = 0xE019, 0xE021
FLAT_RING3_CS, FLAT_RING3_DS = 0xE02B, 0xE033
HYPERVISOR_START = 0xF5800000
M2P_START = 0xF5800000

# arch-x86/xen-x86_64.h: the same for 64 bits, where kernel and users are both in ring 3; set_segment_base; struct iret_context
FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_SS64 = 0xE023, 0xE033, 0xE02B
WIDE_HYPERVISOR_START, WIDE_HYPERVISOR_END = 0xFFFF800000000000, 0xFFFF880000000000
SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL, SEGBASE_GS_USER_SEL = 0, 1, 2, 3
VGCF_IN_SYSCALL = 1 << 8

# arch-x86/xen.h: the guest's part of the GDT
FIRST_RESERVED_GDT_PAGE = 14
FIRST_RESERVED_GDT_ENTRY = FIRST_RESERVED_GDT_PAGE * 512

# xen.h: mmu_update, mmuext_op, update_va_mapping
DOMID_SELF = 0x7FF0
MMU_NORMAL_PT_UPDATE, MMU_MACHPHYS_UPDATE, MMU_PT_UPDATE_PRESERVE_AD = 0, 1, 2
MMU_UPDATE_PREEMPTED = 1 << 31
MMUEXT_PIN_LEVELS = {0: 1, 1: 2, 2: 3, 3: 4}        # MMUEXT_PIN_L1_TABLE … L4; the last with 64 bits only
MMUEXT_UNPIN_TABLE, MMUEXT_NEW_BASEPTR, MMUEXT_FLUSH_CACHE, MMUEXT_NEW_USER_BASEPTR = 4, 5, 12, 15
MMUEXT_FLUSHES = frozenset((6, 8, 10))      # TLB_FLUSH_LOCAL, _MULTI, _ALL: all the same with one vCPU
MMUEXT_INVLPGS = frozenset((7, 9, 11))      # INVLPG_LOCAL, _MULTI, _ALL
UVMF_TLB_FLUSH, UVMF_INVLPG, UVMF_FLUSHTYPE_MASK = 1, 2, 3

# event_channel.h, sched.h, version.h, physdev.h, xen.h
EVTCHNOP_BIND_VIRQ, EVTCHNOP_BIND_PIRQ, EVTCHNOP_CLOSE, EVTCHNOP_SEND, EVTCHNOP_STATUS, EVTCHNOP_BIND_IPI, EVTCHNOP_UNMASK = (
    1, 2, 3, 4, 5, 7, 9)
EVTCHNSTAT_CLOSED, EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_PIRQ, EVTCHNSTAT_VIRQ, EVTCHNSTAT_IPI = 0, 2, 3, 4, 5
VIRQ_TIMER, NR_VIRQS = 0, 24
SCHEDOP_YIELD, SCHEDOP_BLOCK, SCHEDOP_SHUTDOWN = 0, 1, 2
XENVER_VERSION, XENVER_GET_FEATURES = 0, 6
XENFEAT_MMU_PT_UPDATE_PRESERVE_AD = 5                                       # features.h
CONSOLEIO_WRITE = 0
VCPUOP_IS_UP, VCPUOP_GET_RUNSTATE_INFO = 3, 4                               # vcpu.h
VCPUOP_SET_PERIODIC_TIMER, VCPUOP_STOP_PERIODIC_TIMER, VCPUOP_SET_SINGLESHOT_TIMER, VCPUOP_STOP_SINGLESHOT_TIMER = 6, 7, 8, 9
VCPU_SSHOTTMR_FUTURE, RUNSTATE_RUNNING = 1, 0
SHORTEST_PERIOD = 10_000            # ns; the header allows a hypervisor to refuse what is below a millisecond
WALL_CLOCK = 1_066_694_400          # seconds since 1970 at the machine's start: 21 October 2003, the same in every run
VMASST_CMD_ENABLE, VMASST_CMD_DISABLE = 0, 1
VMASST_TYPE_4GB_SEGMENTS, VMASST_TYPE_4GB_SEGMENTS_NOTIFY, VMASST_TYPE_M2P_STRICT = 0, 1, 32
PHYSDEVOP_IRQ_STATUS_QUERY, PHYSDEVOP_EOI = 5, 12
RINGOP_CONNECT = 0                  # the lab's own
SIF_PRIVILEGED = 1
SIF_SERVICES = 1 << 31               # the lab's own: let every service go by hypercall
MAX_GUEST_CMDLINE = 1024

#: Xen's forced-emulation prefix: UD2 and the letters "xen" before the instruction to emulate.
EMULATE_PREFIX = b"\x0f\x0bxen"
CPUID_CODE = b"\x0f\xa2"
