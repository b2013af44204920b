"""The ledger: the table of event kinds and what was counted of them.

Every kind has a unit and a provenance. *machine* events are counted below the VMM by the physical
machine and a strategy cannot write them; *vmm* events are reported by the strategy. An unknown
kind is an error, so that a misspelt event cannot vanish.

This module imports nothing of vmlab and nothing compiled: ledgers can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Provenance = Literal["machine", "vmm"]

#: Classes by which ordinary instructions are counted and priced.
CLASSES = {
    "alu": "register arithmetic, moves, branches not taken",
    "load": "instructions that read memory",
    "store": "instructions that write memory (and perhaps read it)",
    "branch": "taken direct jumps, calls",
    "indirect": "taken indirect jumps, calls and returns",
    "muldiv": "multiplications and divisions",
    "string": "elements moved by string instructions",
}

#: Instructions that are priced one by one: privileged, sensitive, or dear. The value is the
#: event in words. The names are the canonical mnemonics used everywhere in the lab.
SYSTEM_INSTRUCTIONS = {
    "cli": "CLI", "sti": "STI", "pushf": "PUSHF", "popf": "POPF", "iret": "IRET",
    "in": "IN", "out": "OUT", "ins": "INS", "outs": "OUTS", "hlt": "HLT",
    "cpuid": "CPUID", "rdtsc": "RDTSC", "rdtscp": "RDTSCP", "rdpmc": "RDPMC",
    "mov_from_cr": "MOV from CR", "mov_to_cr": "MOV to CR",
    "mov_from_dr": "MOV from DR", "mov_to_dr": "MOV to DR",
    "lgdt": "LGDT", "lidt": "LIDT", "lldt": "LLDT", "ltr": "LTR",
    "sgdt": "SGDT", "sidt": "SIDT", "sldt": "SLDT", "str": "STR",
    "smsw": "SMSW", "lmsw": "LMSW", "clts": "CLTS", "invlpg": "INVLPG",
    "invd": "INVD", "wbinvd": "WBINVD", "rdmsr": "RDMSR", "wrmsr": "WRMSR",
    "xgetbv": "XGETBV", "xsetbv": "XSETBV", "swapgs": "SWAPGS",
    "lar": "LAR", "lsl": "LSL", "verr": "VERR", "verw": "VERW", "arpl": "ARPL",
    "mov_from_seg": "MOV from segment register", "mov_to_seg": "MOV to segment register",
    "push_seg": "PUSH segment register", "pop_seg": "POP segment register",
    "load_far": "LDS/LES/LFS/LGS/LSS", "call_far": "far CALL", "jmp_far": "far JMP",
    "ret_far": "far RET", "int": "INT n", "int3": "INT3", "into": "INTO", "int1": "INT1",
    "syscall": "SYSCALL", "sysret": "SYSRET", "sysenter": "SYSENTER", "sysexit": "SYSEXIT",
    "vmrun": "VMRUN", "vmmcall": "VMMCALL", "monitor": "MONITOR", "mwait": "MWAIT",
}

#: Exception names by vector (SDM Vol. 3A table 6-1).
EXCEPTIONS = {
    0: "de", 1: "db", 2: "nmi", 3: "bp", 4: "of", 5: "br", 6: "ud", 7: "nm", 8: "df", 10: "ts",
    11: "np", 12: "ss", 13: "gp", 14: "pf", 16: "mf", 17: "ac", 18: "mc", 19: "xm",
}

#: VM exit reasons under hardware assistance, named as KVM names them where it has a name.
EXIT_REASONS = (
    "cpuid", "rdtsc", "rdpmc", "hlt", "io", "msr", "invlpg", "vmmcall", "interrupt",
    "interrupt_window", "exception", "page_fault", "cr_read", "cr_write", "dr_access",
    "descriptor_table", "pushf", "popf", "iret", "software_interrupt", "nested_page_fault",
    "task_switch", "shutdown", "other",
)

#: Xen hypercall names (xen/include/public/xen.h), and the lab's own ``ring_op`` and ``port_io`` (numbers 54 and 55).
HYPERCALLS = (
    "set_trap_table", "mmu_update", "set_gdt", "stack_switch", "set_callbacks", "fpu_taskswitch",
    "update_descriptor", "multicall", "update_va_mapping", "set_timer_op", "xen_version",
    "console_io", "grant_table_op", "vm_assist", "iret", "vcpu_op", "mmuext_op", "sched_op",
    "event_channel_op", "physdev_op", "set_segment_base", "ring_op", "port_io", "unknown",
)

#: What a paravirtual guest wanted, or what happened to it, each time the hypervisor was entered.
SERVICES = {
    "system_call": "system calls on their way to the guest's kernel", "return": "returns from the guest's kernel",
    "exception": "exceptions on their way to the guest's kernel", "event": "event channels", "interrupt": "device interrupts",
    "memory": "page tables and the TLB", "schedule": "scheduling and stacks", "time": "timers", "device": "ports and rings",
    "console": "the console", "batch": "several in one multicall", "setup": "traps, descriptors, version",
    "emulation": "instructions emulated on request",
}

#: Why translated code left the cache for the monitor.
CALLOUT_CAUSES = (
    "cli", "sti", "pushf", "popf", "iret", "in", "out", "cpuid", "rdtsc", "hlt", "system",
    "segment", "int", "interrupt", "chain", "indirect", "fault", "self_modifying", "adapted",
)


@dataclass(frozen=True)
class EventKind:
    """One kind of event: its name, unit, who counts it, and the event in plain words."""

    name: str
    unit: str
    provenance: Provenance
    words: str


def _kinds() -> Iterator[EventKind]:
    def machine(name: str, words: str, unit: str = "event") -> EventKind:
        return EventKind(name, unit, "machine", words)

    def vmm(name: str, words: str, unit: str = "event") -> EventKind:
        return EventKind(name, unit, "vmm", words)

    # What the physical CPU retired, whoever's code it was; this is what is priced.
    for name, words in CLASSES.items():
        yield machine(f"machine.{name}", f"machine: {words}", "element" if name == "string" else "instruction")
    for op, words in SYSTEM_INSTRUCTIONS.items():
        yield machine(f"machine.{op}", f"{words} retired by the CPU", "instruction")
    # The guest's instructions, by how they were executed.
    yield machine("retired.user", "guest user instructions run at their own address", "instruction")
    yield machine("retired.kernel", "guest kernel instructions run at their own address", "instruction")
    for op, words in SYSTEM_INSTRUCTIONS.items():
        yield machine(f"retired.{op}", f"guest's {words} run at its own address", "instruction")
    yield machine("translated.ident", "guest instructions run as identical copies in the cache", "instruction")
    yield machine("translated.incache", "guest instructions run as other code in the cache", "instruction")
    yield machine("translated.sensitive", "system instructions of the guest run as identical copies in the cache", "instruction")
    yield machine("translated.unit", "translation units executed", "unit")
    yield machine("translated.lookup", "targets looked up inside the cache")
    yield machine("translated.direct", "switches to direct execution of user code without the monitor")
    yield machine("translated.simulated", "stores to watched memory simulated inside the cache", "instruction")
    for op, words in SYSTEM_INSTRUCTIONS.items():
        yield vmm(f"emulate.{op}", f"{words} emulated by the VMM", "instruction")
    yield vmm("emulate.other", "another instruction emulated by the VMM", "instruction")
    yield vmm("emulate.string", "elements of string instructions moved by the VMM", "element")
    yield vmm("emulated.user", "guest user instructions that the VMM emulated", "instruction")
    yield vmm("emulated.kernel", "guest kernel instructions that the VMM emulated", "instruction")
    # Exceptions: into a VMM (trap.*), through an IDT in machine memory (fault.delivered.*).
    for vector, name in EXCEPTIONS.items():
        yield machine(f"trap.{name}", f"#{name.upper()} into the VMM")
        yield machine(f"fault.delivered.{vector}", f"#{name.upper()} delivered by the CPU through the IDT")
        yield vmm(f"reflect.{vector}", f"#{name.upper()} reflected to the guest by the VMM")
    yield machine("trap.int", "software interrupt into the VMM through a gate")
    yield machine("trap.syscall", "SYSCALL into the VMM")
    yield machine("interrupt.monitor", "device interrupts into the VMM (among interrupt.delivered)")
    yield machine("interrupt.software", "INT n delivered by the CPU through the IDT")
    yield machine("interrupt.delivered", "device interrupts taken by the CPU")
    yield vmm("interrupt.injected", "interrupts injected into the guest by the VMM")
    yield vmm("interrupt.window", "interrupt windows that the VMM asked for")
    yield machine("iret.same", "IRET within a ring", "instruction")
    yield machine("iret.outer", "IRET to an outer ring", "instruction")
    # The TLB model (machine/tlb.py), counted where a cell asks for it.
    yield machine("tlb.miss.instruction", "instruction fetches that missed the modelled TLB")
    yield machine("tlb.miss.data", "data accesses that missed the modelled TLB")
    yield machine("tlb.flush.full", "flushes of the modelled TLB")
    yield machine("tlb.flush.page", "flushes of one page of the modelled TLB")
    yield machine("tlb.unattributed", "data accesses whose page the TLB model could not tell")
    yield machine("walk.reference.guest", "page-table entries read by modelled walks", "reference")
    yield machine("walk.reference.nested", "nested page-table entries read by modelled walks", "reference")
    yield machine("io.device", "accesses to device registers")
    yield machine("idle", "times the guest waited in HLT")
    # Hardware assistance.
    yield machine("entry", "VM entries (VMRUN)")
    for reason in EXIT_REASONS:
        yield machine(f"exit.{reason}", f"VM exits: {reason.replace('_', ' ')}")
    yield vmm("vmcb.read", "VMCB fields read by the VMM", "field")
    yield vmm("vmcb.write", "VMCB fields written by the VMM", "field")
    # Paravirtualization.
    for name in HYPERCALLS:
        yield vmm(f"hypercall.{name}", f"hypercall {name}")
    for name, words in SERVICES.items():
        yield vmm(f"crossing.{name}", f"entries into the hypervisor for {words}")
    yield vmm("mmu.update", "page-table entries changed on the guest's request", "entry")
    yield vmm("mmu.validate", "page tables checked, or given up, entry by entry", "table")
    yield vmm("mmuext.pin", "page tables pinned on the guest's request", "table")
    yield vmm("mmuext.unpin", "page tables unpinned on the guest's request", "table")
    yield vmm("mmuext.new_baseptr", "page-table bases loaded on the guest's request")
    yield vmm("mmuext.new_user_baseptr", "page-table bases named for its users by a 64-bit guest")
    yield vmm("guest.side", "changes between the page tables of a 64-bit guest's kernel and those of its users")
    yield vmm("mmuext.tlb_flush", "TLB flushes on the guest's request")
    yield vmm("mmuext.invlpg", "single translations flushed on the guest's request")
    yield vmm("ring.request", "requests taken from the shared block ring", "request")
    yield vmm("event.upcall", "event-channel upcalls into the guest")
    yield vmm("emulate.prefix", "instructions emulated on the guest's explicit request (Xen's prefix)")
    # Binary translation.
    yield vmm("bt.translate.instruction", "guest instructions translated", "instruction")
    yield vmm("bt.translate.unit", "translation units made", "unit")
    yield vmm("bt.translate.bytes_in", "guest bytes translated", "byte")
    yield vmm("bt.translate.bytes_out", "bytes emitted into the cache", "byte")
    for cause in CALLOUT_CAUSES:
        yield vmm(f"bt.callout.{cause}", f"callouts from the cache: {cause.replace('_', ' ')}")
    yield vmm("bt.lookup.direct", "look-ups of a direct target by the monitor")
    yield vmm("bt.lookup.indirect", "look-ups of an indirect target by the monitor")
    yield vmm("bt.chain", "exits patched into direct jumps")
    yield vmm("bt.invalidate", "translations thrown away because the guest changed what they were made of")
    yield vmm("bt.evict", "translations thrown away because the cache was full", "unit")
    yield vmm("bt.undo", "faults and interrupts in the middle of a template, its effects undone")
    yield vmm("bt.code_write", "stores of the guest into pages with translated code")
    yield vmm("bt.adapt", "instructions retranslated because they kept faulting")
    yield vmm("bt.adapt.back", "adapted instructions copied again, because what they reach is watched no more")
    yield vmm("bt.window", "windows on watched memory given to simulated stores")
    yield vmm("bt.direct.enter", "switches to direct execution of user code")
    # Memory virtualization.
    yield vmm("shadow.fault.hidden", "hidden page faults: the shadow lacked what the guest's tables allow")
    yield vmm("shadow.fault.dirty", "hidden page faults: a page's first write, to set its dirty bit")
    yield vmm("shadow.fault.true", "true page faults, the guest's own, seen by the VMM")
    yield vmm("shadow.trace.write", "stores to traced page tables, carried out by the VMM")
    yield vmm("shadow.untrace", "traced frames given up because no table is in them any more")
    yield vmm("shadow.view", "changes between what a 64-bit guest's kernel and what its users see of an address space")
    yield vmm("shadow.page.made", "shadow pages made", "page")
    yield vmm("shadow.page.dropped", "shadow pages dropped", "page")
    yield vmm("nested.fault", "guest pages put into the nested tables on first touch")
    # Parts of a VMM's work; the path-length table of the costs room gives each its instructions.
    yield vmm("vmm.decode", "instructions decoded by the VMM")
    yield vmm("vmm.emulate", "instructions carried out by the VMM")
    yield vmm("vmm.guest_walk", "walks of the guest's page tables by the VMM")
    yield vmm("vmm.shadow_update", "shadow entries written by the VMM")
    yield vmm("vmm.inject", "exceptions and interrupts built for the guest by the VMM")
    yield vmm("vmm.system_call", "system calls of a 64-bit guest's users handed to its kernel by the VMM")
    yield vmm("vmm.device", "device models entered by the VMM")
    yield vmm("vmm.timer", "times the VMM programmed the physical timer")
    yield vmm("vmm.disk", "requests that the VMM gave the physical disk", "request")
    yield vmm("vmm.shadow_descriptor", "shadow descriptors made by the VMM")
    yield vmm("safety.refused", "attempts of the guest that the VMM refused")
    yield vmm("host.world_switch", "switches between monitor and host operating system")


#: Every event kind there is, by name.
EVENTS: Mapping[str, EventKind] = {kind.name: kind for kind in _kinds()}


class UnknownEvent(KeyError):
    """A name that is not in :data:`EVENTS`, or not of the provenance that may write it."""


class Counts(dict[str, int]):
    """Counts of one provenance: ``counts["trap.gp"] += 1`` is checked once per kind, then free."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __missing__(self, kind: str) -> int:
        known = EVENTS.get(kind)
        if known is None:
            raise UnknownEvent(f"no event kind {kind!r} in the ledger's table")
        if known.provenance != self.provenance:
            raise UnknownEvent(f"{kind!r} is a {known.provenance} event; {self.provenance} code cannot write it")
        return 0


@dataclass
class Snapshot:
    """Everything counted up to one moment.

    ``events`` holds non-zero counts by kind; ``user``/``kernel`` the guest's instructions by its
    own (virtual) privilege; ``machine`` every instruction that the CPU retired.
    """

    events: dict[str, int] = field(default_factory=dict)
    user: int = 0
    kernel: int = 0
    machine: int = 0

    def minus(self, earlier: Snapshot) -> Snapshot:
        """What was counted since ``earlier``."""
        events = {k: n - earlier.events.get(k, 0) for k, n in self.events.items()}
        return Snapshot(
            {k: n for k, n in sorted(events.items()) if n},
            self.user - earlier.user, self.kernel - earlier.kernel, self.machine - earlier.machine,
        )

    def plus(self, other: Snapshot) -> Snapshot:
        """Both counts together."""
        events = {k: self.events.get(k, 0) + other.events.get(k, 0) for k in {*self.events, *other.events}}
        return Snapshot(
            {k: n for k, n in sorted(events.items()) if n},
            self.user + other.user, self.kernel + other.kernel, self.machine + other.machine,
        )
