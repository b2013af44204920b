"""Which figures each event kind is priced by, and under which cause it is shown.

Every kind of :data:`vmlab.ledger.EVENTS` is either in :data:`RULES` or in :data:`NOT_PRICED` with the
reason (a test holds this), so that nothing is free by oversight.

A term is ``(factor, key)``. A ``path.*`` key is a length in instructions, multiplied by what an
instruction of VMM code costs on the profile; a ``shared.*`` key is a time in nanoseconds, multiplied
by the profile's clock; every other key is in cycles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmlab.ledger import CALLOUT_CAUSES, CLASSES, EXCEPTIONS, EXIT_REASONS, HYPERCALLS, SERVICES, SYSTEM_INSTRUCTIONS

#: Causes in the order of a legend.
CAUSES = (
    "guest instructions", "sensitive instructions", "interrupts and faults", "traps", "VM exits", "hypercalls",
    "callouts", "translation", "VMM emulation", "devices",
)


@dataclass(frozen=True)
class Rule:
    """How one event of a kind is priced: the sum of its terms, shown under ``cause``."""

    cause: str
    terms: tuple[tuple[float, str], ...]


def _rule(cause: str, *keys: str) -> Rule:
    return Rule(cause, tuple((1.0, key) for key in keys))


#: Instructions whose cost is counted elsewhere, because they end in a delivery, an exit or an entry.
_ELSEWHERE = {
    "int": "priced at its delivery: interrupt.software or trap.int",
    "int3": "priced at its delivery: fault.delivered.3 or trap.bp",
    "into": "priced at its delivery: fault.delivered.4 or trap.of",
    "int1": "priced at its delivery: fault.delivered.1 or trap.db",
    "vmrun": "priced as a VM entry: entry",
    "vmmcall": "priced as a VM exit: exit.vmmcall",
}

#: What a VMM must itself execute on the hardware to emulate an instruction, beyond its own code.
_REAL_WORK = {
    "rdtsc": "insn.rdtsc", "rdtscp": "insn.rdtscp", "rdpmc": "insn.rdpmc", "invlpg": "insn.invlpg",
    "mov_to_cr": "insn.mov_to_cr", "wbinvd": "insn.wbinvd",
}

#: Emulations that are longer than most: a whole frame, or a descriptor, is read and checked.
_LONG_EMULATIONS = {
    "iret": "path.emulate.iret", "sysret": "path.emulate.iret", "sysexit": "path.emulate.iret",
    "ret_far": "path.emulate.iret", "call_far": "path.emulate.iret", "jmp_far": "path.emulate.segment",
    "mov_to_seg": "path.emulate.segment", "pop_seg": "path.emulate.segment", "load_far": "path.emulate.segment",
    "ltr": "path.emulate.segment", "lldt": "path.emulate.segment", "lgdt": "path.emulate.segment",
    "lidt": "path.emulate.segment",
}

#: Callouts that only look for the next piece of translated code: no guest state is saved.
_LIGHT_CALLOUTS = ("chain", "indirect")


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name in CLASSES:
        rules[f"machine.{name}"] = _rule("guest instructions", f"class.{name}")
    for op in SYSTEM_INSTRUCTIONS:
        if op not in _ELSEWHERE:
            rules[f"machine.{op}"] = _rule("sensitive instructions", f"insn.{op}")
        emulation = [_LONG_EMULATIONS.get(op, "path.emulate")]
        if op in _REAL_WORK:
            emulation.append(_REAL_WORK[op])
        rules[f"emulate.{op}"] = _rule("VMM emulation", *emulation)
    # A port's latency is the bus's and the device's, in time, and waited for by the IN or OUT that reaches it.
    # A VMM's own model of a device has no bus: it is priced as vmm.device.
    for op in ("in", "out", "ins", "outs"):
        rules[f"machine.{op}"] = _rule("devices", f"insn.{op}", "shared.port_latency_ns")
    rules["machine.iret"] = _rule("interrupts and faults", "insn.iret")
    rules["emulate.other"] = _rule("VMM emulation", "path.emulate")
    # A trap is a round trip: delivery to ring 0, the VMM's entry and exit code, IRET back.
    for vector, name in EXCEPTIONS.items():
        rules[f"trap.{name}"] = _rule("traps", "exception.delivery", "insn.iret", "path.trap")
        rules[f"fault.delivered.{vector}"] = _rule("interrupts and faults", "exception.delivery")
    rules["trap.int"] = _rule("traps", "int.delivery", "insn.iret", "path.trap")
    # The way in is the instruction itself, which retired and is priced as machine.syscall.
    rules["trap.syscall"] = _rule("traps", "insn.sysret", "path.trap")
    rules["interrupt.software"] = _rule("interrupts and faults", "int.delivery")
    # A device interrupt costs its delivery whoever takes it, and the IRET of a guest's handler retires and is counted as
    # machine.iret. A VMM's handler is Python: its entry and exit code and its IRET are priced here, beside the delivery.
    rules["interrupt.monitor"] = _rule("interrupts and faults", "insn.iret", "path.trap")
    rules["interrupt.delivered"] = _rule("interrupts and faults", "interrupt.delivery")
    rules["interrupt.window"] = _rule("interrupts and faults", "path.window")
    rules["vmm.inject"] = _rule("interrupts and faults", "path.inject")
    rules["event.upcall"] = _rule("interrupts and faults", "path.upcall")
    rules["vmm.device"] = _rule("devices", "path.device")
    rules["entry"] = _rule("VM exits", "entry")
    for reason in EXIT_REASONS:
        rules[f"exit.{reason}"] = _rule("VM exits", f"exit.{reason}", "path.exit")
    rules["vmcb.read"] = _rule("VM exits", "vmread")
    rules["vmcb.write"] = _rule("VM exits", "vmwrite")
    for name in HYPERCALLS:
        rules[f"hypercall.{name}"] = _rule("hypercalls", "path.hypercall")
    rules["mmu.update"] = _rule("hypercalls", "path.mmu_update")
    rules["mmu.validate"] = _rule("hypercalls", "path.mmu_validate")
    for name in ("pin", "unpin", "new_user_baseptr"):
        rules[f"mmuext.{name}"] = _rule("hypercalls", "path.mmuext")
    # A TLB is flushed, and a base loaded, by MOV to CR3.
    for name in ("new_baseptr", "tlb_flush"):
        rules[f"mmuext.{name}"] = _rule("hypercalls", "path.mmuext", "insn.mov_to_cr")
    # A 64-bit guest's kernel and its users have page tables of their own.
    rules["guest.side"] = _rule("hypercalls", "insn.mov_to_cr")
    rules["ring.request"] = _rule("devices", "path.ring_request")
    # Three OUTs program the timer; a disk request takes six, and one IN when it is done.
    rules["vmm.timer"] = Rule("devices", ((1, "path.device"), (3, "insn.out"), (3, "shared.port_latency_ns")))
    rules["vmm.disk"] = Rule("devices", ((1, "path.device"), (6, "insn.out"), (1, "insn.in"), (7, "shared.port_latency_ns")))
    rules["mmuext.invlpg"] = _rule("hypercalls", "path.mmuext", "insn.invlpg")
    rules["emulate.prefix"] = _rule("VMM emulation", "path.emulate")
    for callout in CALLOUT_CAUSES:
        light = callout in _LIGHT_CALLOUTS
        rules[f"bt.callout.{callout}"] = _rule("callouts", "path.callout.light" if light else "path.callout")
    rules["bt.translate.instruction"] = _rule("translation", "path.translate")
    rules["bt.lookup.direct"] = _rule("translation", "path.lookup")
    rules["bt.lookup.indirect"] = _rule("translation", "path.lookup")
    rules["bt.chain"] = _rule("translation", "path.chain")
    rules["bt.invalidate"] = _rule("translation", "path.invalidate")
    rules["bt.evict"] = _rule("translation", "path.invalidate")
    rules["bt.undo"] = _rule("interrupts and faults", "path.window")
    rules["bt.code_write"] = _rule("translation", "path.lookup")
    # A patch each, as a chained exit is; the new unit is priced as any other.
    for patch in ("bt.adapt", "bt.adapt.back", "bt.window"):
        rules[patch] = _rule("translation", "path.chain")
    # Translated code runs deprivileged; user code is entered through an IRET of the monitor's.
    rules["vmm.system_call"] = _rule("VMM emulation", "path.emulate")
    rules["bt.direct.enter"] = _rule("traps", "path.direct", "insn.iret")
    rules["vmm.decode"] = _rule("VMM emulation", "path.decode")
    # A TLB miss costs the entries that its walk reads; a flush costs the misses that follow it, and its instruction.
    for name in ("guest", "nested"):
        rules[f"walk.reference.{name}"] = _rule("guest instructions", "walk.reference")
    rules["vmm.guest_walk"] = _rule("VMM emulation", "path.guest_walk")
    rules["vmm.shadow_update"] = _rule("VMM emulation", "path.shadow_update")
    rules["emulate.string"] = _rule("VMM emulation", "class.string")
    rules["shadow.view"] = _rule("VMM emulation", "insn.mov_to_cr")     # CR3
    rules["shadow.page.made"] = _rule("VMM emulation", "path.shadow_page")
    rules["shadow.page.dropped"] = _rule("VMM emulation", "path.shadow_drop")
    rules["nested.fault"] = _rule("VMM emulation", "path.nested_fault")
    rules["vmm.shadow_descriptor"] = _rule("VMM emulation", "path.shadow_descriptor")
    rules["safety.refused"] = _rule("VMM emulation", "path.refused")
    return rules


def _not_priced() -> dict[str, str]:
    share = "says how an instruction was executed; what the CPU retired is priced as machine.*"
    reasons = {f"machine.{op}": why for op, why in _ELSEWHERE.items()}
    reasons |= {f"retired.{name}": share for name in ("user", "kernel", *SYSTEM_INSTRUCTIONS)}
    reasons |= {f"translated.{name}": share for name in ("ident", "incache", "sensitive", "unit", "lookup", "simulated", "direct")}
    reasons |= {f"emulated.{name}": "the same instructions by ring; priced as emulate.*" for name in ("user", "kernel")}
    reasons |= {f"reflect.{vector}": "the VMM's work is priced as vmm.inject" for vector in EXCEPTIONS}
    reasons |= {f"iret.{name}": "which ring an IRET went to; priced as machine.iret" for name in ("same", "outer")}
    parts = "priced by the trap or exit that it came by, vmm.guest_walk, vmm.shadow_update and what was emulated"
    reasons |= {f"shadow.{kind}": parts for kind in ("fault.hidden", "fault.dirty", "fault.true", "trace.write", "untrace")}
    reasons |= {f"crossing.{name}": "says what an entry was for; priced as trap.* or interrupt.delivered" for name in SERVICES}
    reasons |= {f"tlb.{name}": "costs the walks that follow, priced as walk.reference.*" for name in (
        "miss.instruction", "miss.data", "flush.full", "flush.page")}
    return reasons | {
        "tlb.unattributed": "says how complete the TLB model's input was",
        "interrupt.injected": "the VMM's work is priced as vmm.inject or event.upcall",
        "vmm.emulate": "the sum of emulate.*, which is priced by instruction",
        "io.device": "priced with the IN or OUT that reached the port, or as vmm.device where a VMM models the device",
        "host.world_switch": "its code runs on the CPU, and is priced by its instructions as machine.*",
        "idle": "waiting costs no work: the clock of the lab skips to the next event",
        "bt.translate.unit": "the published cost is per instruction and includes the unit's",
        "bt.translate.bytes_in": "a size, not work", "bt.translate.bytes_out": "a size, not work",
    }


#: Price rule by event kind.
RULES: Mapping[str, Rule] = MappingProxyType(_rules())
#: Event kinds without a price, and why.
NOT_PRICED: Mapping[str, str] = MappingProxyType(_not_priced())
