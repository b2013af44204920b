"""The test bench: one instruction, one ring, one owner of the machine; run it and see what it did.

Every run has a machine of its own, so that an LGDT or a WRMSR cannot colour the next. The code segment is
*conforming* with DPL 0: it may run in every ring under the same descriptor, so that the ring is the one thing that
differs between two runs (and the stack segment, whose DPL must equal it: SDM Vol. 3A §5.7).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

from vmlab.errors import GuestBudget, GuestError
from vmlab.machine.cpu import Cpu, Segment
from vmlab.machine.delivery import HAS_ERROR_CODE
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import CS, DS, ES, FS, GS, SS
from vmlab.probe import layout
from vmlab.probe.cases import Case
from vmlab.probe.layout import Owner

REGISTERS = ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")
_START = {"EAX": 0xA0A0A0A0, "ECX": 0xC0C0C0C0, "EDX": 0xD0D0D0D0, "EBX": 0xB0B0B0B0, "EBP": 0xBABABABA, "ESI": layout.DATA,
          "EDI": layout.DATA + 32}
SEGMENTS = {"ES": ES, "CS": CS, "SS": SS, "DS": DS, "FS": FS, "GS": GS}
#: Width in bits, by the name's last word where it is not 32.
FLAGS = {"CF": (0, 1), "PF": (2, 1), "AF": (4, 1), "ZF": (6, 1), "SF": (7, 1), "TF": (8, 1), "IF": (9, 1), "DF": (10, 1),
         "OF": (11, 1), "IOPL": (12, 2), "NT": (14, 1), "AC": (18, 1)}
_BUDGET = 100


@dataclass(frozen=True)
class Trap:
    """An exception that the instruction raised."""

    vector: int
    error_code: int | None
    precise: bool
    """RIP on the instruction and no register changed, so that a monitor can emulate it."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run: a trap, or a state afterwards of which ``changed`` is the instruction's doing."""

    trap: Trap | None
    state: dict[str, int]
    changed: frozenset[str]


def run(
    case: Case, cpl: int, owner: Owner, trapping: Collection[str] = (), path: str | None = None,
    arrange: Callable[[Machine], None] | None = None,
) -> Outcome:
    """Execute the case's instruction once.

    :param cpl: ring, 0, 1 or 3.
    :param trapping: instructions (names of the ledger) that this CPU makes trap outside ring 0.
    :param path: way into the machine, as VMLAB_MACHINE.
    :param arrange: what else to do to the machine before it runs.
    :raises GuestError: the CPU went somewhere that nobody expected.
    """
    machine = Machine(layout.RAM, path)
    machine.trapping = trapping
    _prepare(machine, case, cpl, owner)
    if arrange is not None:
        arrange(machine)
    arrived: list[int] = []

    def arrive(address: int) -> None:
        arrived.append(address)
        machine.stop(Stop(StopReason.REQUESTED))

    end = layout.CODE + len(case.code)
    handlers = range(owner.handlers, owner.handlers + 256 * layout.HANDLER_STEP, layout.HANDLER_STEP)
    for address in (end, layout.TARGET, *handlers):
        machine.watch(address, arrive)
    before = _state(machine)
    memory = machine.ram.read(0, layout.RAM)
    try:
        stop = machine.run(_BUDGET)
    except GuestBudget as error:
        raise GuestError(f"{case.name} at CPL {cpl} went on without end") from error
    cpu = machine.cpu
    halted = stop.reason is StopReason.HALTED
    at = cpu.rip if halted else arrived[0]
    if at in handlers and (at - owner.handlers) // layout.HANDLER_STEP != case.gate:
        vector = (at - owner.handlers) // layout.HANDLER_STEP
        return Outcome(_trap(machine, vector, before, cpu.long_mode), {}, frozenset())
    after = _state(machine) | {"EIP": end if halted else at, "halted": int(halted)}
    # Falling through to the next instruction, or into its own gate, is what every instruction does.
    before |= {"EIP": at if at in handlers else end, "halted": 0}
    changed = {name for name, value in after.items() if before[name] != value}
    for name, value in _written(machine, memory, case).items():
        after[name] = value
        changed.add(name)
    return Outcome(None, after, frozenset(changed) - case.ignore)


def _prepare(machine: Machine, case: Case, cpl: int, owner: Owner) -> None:
    cpu, ram = machine.cpu, machine.ram
    long_mode = case.bits == 64
    low, high = layout.STACK_AREA
    ram.write(low, bytes([layout.FILL]) * (high - low))
    ram.write(layout.DATA, case.data(cpl).ljust(layout.DATA_SIZE, bytes([layout.FILL])))
    ram.write(layout.STACK, case.stack(cpl))
    for address, data in layout.tables(owner, long_mode).items():
        ram.write(address, data)
    ram.write(layout.CODE, case.code + b"\xeb\xfe")
    ram.write(layout.TARGET, b"\xeb\xfe")

    flat = 0xFFFFFFFF
    cpu.enter_protected(layout.CODE, Segment(layout.CODE_CONFORMING, 0, flat, layout.CODE_FLAGS[layout.CODE_CONFORMING]),
                        Segment(layout.DATA_3 | 3, 0, flat, layout.DATA_FLAGS[layout.DATA_3]))
    cpu.load()
    if long_mode:
        for address, data in layout.page_tables().items():
            ram.write(address, data)
        cpu.set_efer(0x100)  # LME; the CPU sets LMA when paging comes on
        cpu.set_crs(0x80000000 | owner.cr0, layout.PAGE_TABLES, 0x20)
        selector, flags = layout.CODE64_CONFORMING, layout.CODE64_FLAGS[layout.CODE64_CONFORMING]
    else:
        cpu.set_crs(owner.cr0, 0, case.cr4)
        selector, flags = layout.CODE_CONFORMING, layout.CODE_FLAGS[layout.CODE_CONFORMING]
    cpu.set_segment(CS, Segment(selector | cpl, 0, flat, flags))
    stack = layout.STACK_SEGMENT[cpl]
    cpu.set_segment(SS, Segment(stack, 0, flat, layout.DATA_FLAGS[stack & ~7]))
    cpu.set_cpl(cpl)
    cpu.set_table("gdt", Segment(0, owner.gdt, owner.gdt_limit, 0))
    cpu.set_table("idt", Segment(0, owner.idt, owner.idt_limit, 0))
    cpu.set_table("tr", Segment(owner.task, owner.task_base, 0x67, layout.TASK_FLAGS))
    cpu.set_table("ldt", Segment(owner.local, 0x3500 if owner.local == layout.OTHER_LOCAL else 0x3400, 0x3F, layout.LOCAL_FLAGS))
    for number, name in enumerate(REGISTERS):
        value = layout.STACK if name == "ESP" else case.registers.get(name, _START.get(name, 0))
        cpu.set_gpr(number, value, 8 if long_mode else 4)
    cpu.eflags = owner.flags | case.flags
    cpu.rip = layout.CODE
    cpu.store()


def _state(machine: Machine) -> dict[str, int]:
    cpu = machine.cpu
    cpu.load()
    state = {name: cpu.gpr(number) for number, name in enumerate(REGISTERS)}
    flags = cpu.eflags
    state |= {name: flags >> bit & (1 << width) - 1 for name, (bit, width) in FLAGS.items()}
    for name, number in SEGMENTS.items():
        segment = cpu.segment(number)
        state |= {name: segment.selector, f"{name} base": segment.base, f"{name} limit": segment.limit,
                  f"{name} rights": segment.flags & 0xF0FF00}
    for name, table in (("GDTR", "gdt"), ("IDTR", "idt")):
        state |= {f"{name} base": cpu.table(table).base, f"{name} limit": cpu.table(table).limit}
    state |= {"LDTR": cpu.table("ldt").selector, "TR": cpu.table("tr").selector}
    state |= {f"CR{number}": cpu.cr(number) for number in (0, 3, 4)} | {"EFER": cpu.efer}
    state |= {f"DR{number}": cpu.debug_register(number) for number in (0, 1, 2, 3, 7)}
    return state | {"interrupt shadow": int(cpu.shadow)}


def _written(machine: Machine, memory: bytes, case: Case) -> dict[str, int]:
    """Memory that changed: on the stack by distance from its new top, in the operand by the case's names."""
    cpu: Cpu = machine.cpu
    now = machine.ram.read(0, layout.RAM)
    top, step = cpu.gpr(4), 8 if case.bits == 64 else 4
    found: dict[str, int] = {}
    low, high = layout.STACK_AREA
    differing = [at for at in range(0, layout.RAM, 4) if now[at:at + 4] != memory[at:at + 4]] if now != memory else []
    operand = {at: (name, start, size) for name, start, size in case.operand for at in range(start, start + size)}
    for at in differing:
        if low <= at < high:
            index = (at - top) // step
            known = 0 <= index < len(case.pushed) and (at - top) % step == 0
            name = case.pushed[index] if known else f"stack {at - top:+d}"
            found[name] = struct.unpack_from("<I", now, at)[0]
        elif layout.DATA <= at < layout.DATA + layout.DATA_SIZE:
            for byte in range(at - layout.DATA, at - layout.DATA + 4):
                if now[layout.DATA + byte] == memory[layout.DATA + byte] and byte not in operand:
                    continue
                name, start, size = operand.get(byte, (f"operand byte {byte}", byte, 1))
                found[name] = int.from_bytes(now[layout.DATA + start:layout.DATA + start + size], "little")
        else:
            found[f"memory {at:#x}"] = struct.unpack_from("<I", now, at)[0]
    return found


def _trap(machine: Machine, vector: int, before: dict[str, int], long_mode: bool) -> Trap:
    """Read the exception's frame from the handler's stack (SDM Vol. 3A figure 6-4)."""
    cpu = machine.cpu
    top, step = cpu.gpr(4), 8 if long_mode else 4
    has_code = vector in HAS_ERROR_CODE
    code = machine.ram.read32(top) if has_code else None
    saved = machine.ram.read32(top + step * has_code)
    unchanged = all(cpu.gpr(number) == before[name] for number, name in enumerate(REGISTERS) if name != "ESP")
    return Trap(vector, code, saved == layout.CODE and unchanged)
