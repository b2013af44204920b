"""Hardware task switches: through a task gate, by far JMP and CALL, and back by IRET, as the bare machine does them.

On the bare machine Unicorn carries out all but the gate; a VMM carries out all of them, since a task brings a CR3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from machinelab import CODE0, DATA, DATA0, GDT, IDT, PAGES, PATHS, SPARE, STACK0, TASK, TSS, asm, descriptors, kernel, task_descriptor
from paginglab import ALL, END, SCHEMES, boot, layout

from vmlab.errors import GuestBudget, GuestError, TripleFault
from vmlab.guests import GuestImage
from vmlab.machine.paging import PS, P
from vmlab.machine.pc import Stop, StopReason
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate
from vmlab.vmm.space import GUEST_FRAMES, POOL

OTHER_TSS, OTHER_CODE, OTHER_STACK = 0x3400, 0x14000, 0x1D800      # the stack is in a page that nobody has touched
STATIC: Mapping[str, tuple[type[Strategy], dict[str, str]]] = {
    "trap": (TrapAndEmulate, {"sensitive": "trap"}), "silent": (TrapAndEmulate, {"sensitive": "silent"}),
    "translation": (BinaryTranslation, {}), "hardware": (HardwareAssisted, {}),
}


def tss(ip: int, *, cr3: int = 0, flags: int = 2, stack: int = OTHER_STACK, code: int = CODE0, data: int = DATA0) -> bytes:
    """A 32-bit task state segment (SDM Vol. 3A figure 7-2) with recognisable registers."""
    registers = (0x11, 0x22, 0x33, 0x44, stack, 0x55, 0x66, 0x77)
    raw = bytearray(0x68)
    struct.pack_into("<III", raw, 0x1C, cr3, ip, flags)
    struct.pack_into("<8I", raw, 0x28, *registers)
    for i, selector in enumerate((data, code, data, data, 0, 0)):
        struct.pack_into("<I", raw, 0x48 + 4 * i, selector)
    struct.pack_into("<I", raw, 4, 0x9400)
    struct.pack_into("<I", raw, 8, DATA0)
    struct.pack_into("<H", raw, 0x66, 0x68)
    return bytes(raw)


def guest(source: str, other: str, *, gate: int | None = None, mode: str | None = None, cr3: int | None = None,
          data: Mapping[int, bytes] | None = None) -> GuestImage:
    """A kernel with a second task in the spare descriptor, and perhaps a task gate to it in its IDT; unpaged or not."""
    where = None if mode is None else layout(mode)
    root = 0 if where is None else PAGES
    table = bytearray(8 * 256)
    if gate is not None:
        table[8 * gate:8 * gate + 8] = struct.pack("<HHBBH", 0, SPARE, 0, 0x85, 0)
    first = struct.pack("<III", 0, STACK0, DATA0) + bytes(0x1C - 12) + struct.pack("<I", root) + bytes(0x66 - 0x20) + struct.pack("<H", 0x68)
    return kernel(("" if where is None else where.load) + source, data={
        TSS: first, OTHER_TSS: tss(OTHER_CODE, cr3=root if cr3 is None else cr3), OTHER_CODE: asm(other, OTHER_CODE), IDT: bytes(table),
        GDT: descriptors(task_descriptor(OTHER_TSS)), DATA: bytes(0x60), DATA + 64: struct.pack("<IH", 0, SPARE),
        **({} if where is None else where.tables), **(data or {})})


JUMP, CALL = f".byte 0xea; .long 0; .word {SPARE:#x};", f".byte 0x9a; .long 0; .word {SPARE:#x};"
CALL_MEMORY, BACK = f".byte 0xff, 0x1d; .long {DATA + 64:#x};", f".byte 0xea; .long 0; .word {TASK:#x};"
MARK = f"mov [{DATA:#x}], eax; mov [{DATA + 4:#x}], esp; pushfd; pop ebx; mov [{DATA + 8:#x}], ebx; smsw bx; mov [{DATA + 12:#x}], ebx;"
ERROR = f"pop ecx; mov [{DATA + 16:#x}], ecx;"
SKIP = f"add dword ptr [{TSS + 0x20:#x}], 2;"          # the old task goes on behind its two-byte instruction
REGISTERS = "mov eax, 0xa1; mov ecx, 0xa2; mov edx, 0xa3; mov esi, 0xa4; xor edi, edi;"
AFTER = f"mov [{DATA + 32:#x}], esp; clts; nop; pushfd; pop eax; mov [{DATA + 36:#x}], eax; str ax; mov [{DATA + 40:#x}], eax;" + END

#: Source, the other task's code, and the vector of the task gate.
CASES: Mapping[str, tuple[str, str, int | None]] = {
    "gate": (REGISTERS + "int 0x40;" + AFTER, MARK + "iretd;", 0x40),
    "gate-twice": (REGISTERS + "int 0x40; int 0x40;" + AFTER, "l: " + MARK + "iretd; jmp l;", 0x40),
    "call": (REGISTERS + CALL + AFTER, MARK + "iretd;", None),
    "call-memory": (REGISTERS + CALL_MEMORY + AFTER, MARK + "iretd;", None),
    "jump": (REGISTERS + JUMP + AFTER, MARK + BACK, None),
    "exception": (REGISTERS + "ud2;" + AFTER, MARK + SKIP + "iretd;", 6),
    "error-code": (REGISTERS + "mov ebx, 0x63; .byte 0x8e, 0xeb;" + AFTER, MARK + ERROR + SKIP + "iretd;", 13),
    "double-fault": ("ud2", MARK + ERROR + END, 8),
    "page-fault": ("mov eax, [0x700000]; nop;" + END, MARK + ERROR + END, 14),
    "busy": (REGISTERS + f".byte 0xea; .long 0; .word {TASK:#x};", MARK + ERROR + END, 13),       # to itself
    "not-a-task": (f"pushfd; or dword ptr [esp], 0x4000; popfd; mov dword ptr [{TSS:#x}], {CODE0}; iretd;", MARK + ERROR + END, 10),
}
_ARITHMETIC = 0x8D5


def seen(strategy: Strategy) -> tuple[object, ...]:
    """How it ended, both task state segments, the descriptors, and what the tasks wrote down.

    Without arithmetic flags: where Unicorn itself switches tasks, it saves and loads stale ones.
    """
    stop = strategy.run(100_000)
    pieces = []
    for at, size, flags in ((TSS, 0x68, (0x24,)), (OTHER_TSS, 0x68, (0x24,)), (GDT, 56, ()), (DATA, 0x40, (8, 36))):
        raw = bytearray(strategy.read_guest(at, size))
        for offset in flags:
            struct.pack_into("<I", raw, offset, struct.unpack_from("<I", raw, offset)[0] & ~_ARITHMETIC)
        pieces.append(bytes(raw))
    return stop, *pieces


@pytest.mark.parametrize("way", STATIC)
@pytest.mark.parametrize("case", sorted(set(CASES) - {"page-fault"}))
def test_a_task_switch_ends_as_on_the_bare_machine(case: str, way: str) -> None:
    kind, parameters = STATIC[way]
    source, other, gate = CASES[case]
    image = guest(source, other, gate=gate)
    native, here = seen(boot(Native, image)), seen(boot(kind, image, parameters))
    assert native[0] == Stop(StopReason.EXIT, 0)
    if way == "silent":     # frames hold ring 1's selectors, and flags the CPU's IF; the way is the same
        assert here[0] == native[0]
        assert [raw[0x20:0x24] + raw[0x28:0x48] for raw in here[1:3]] == [raw[0x20:0x24] + raw[0x28:0x48] for raw in native[1:3]]  # type: ignore[index]
    else:
        assert here == native


@pytest.mark.parametrize("mode", ["32", "pae"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", PATHS)
def test_tasks_of_a_paging_guest_bring_their_page_tables(path: str, scheme: str, mode: str) -> None:
    kind, parameters = SCHEMES[scheme]
    for source, other, gate in CASES.values():
        image = guest(source, other, gate=gate, mode=mode)
        assert seen(boot(kind, image, parameters, path)) == seen(boot(Native, image))


def test_a_hardware_assisted_vmm_switches_tasks_only_on_shadow_tables() -> None:
    """INT, the fault on the way and the return are an exit each; with nested tables the CPU does all by itself."""
    source, other, gate = CASES["gate"]
    for memory, exits in (("tracing", 2), ("lazy", 2), ("nested", 0)):
        guest_run = boot(HardwareAssisted, guest(source, other, gate=gate, mode="pae"), {"memory": memory})
        guest_run.run(100_000)
        assert guest_run.snapshot().events.get("exit.task_switch", 0) == exits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", [JUMP, CALL, CALL_MEMORY, "int 0x40;", "pushfd; or dword ptr [esp], 0x4000; popfd;"
                                 f"mov dword ptr [{TSS:#x}], {SPARE:#x}; or byte ptr [{GDT + SPARE + 5:#x}], 2; iretd;"])
def test_a_task_cannot_bring_the_monitors_page_tables(how: str, scheme: str) -> None:
    """CR3 of the other task is a machine address: there the guest has put tables that map itself at 0, and the machine above.

    A CPU that loaded it would give the guest the monitor's memory. It is the guest's own address, where nothing is mapped.
    """
    kind, parameters = SCHEMES[scheme]
    evil = 0x50000
    tables = {evil: struct.pack("<4Q", *((GUEST_FRAMES + evil + 0x1000) | P for _ in range(4))),
              evil + 0x1000: struct.pack("<512Q", GUEST_FRAMES | ALL | PS, *(i << 21 | ALL | PS for i in range(1, 512)))}
    image = guest(how, f"mov dword ptr [{POOL.stop - 0x1000:#x}], 0x666; l: jmp l", gate=0x40, mode="pae", cr3=GUEST_FRAMES + evil, data=tables)
    strategy = boot(kind, image, parameters)
    with pytest.raises((TripleFault, GuestBudget)):
        strategy.run(100_000)
    assert strategy.machine.ram.read32(POOL.stop - 0x1000) != 0x666


@pytest.mark.parametrize("way", STATIC)
def test_a_fault_in_the_double_faults_task_is_the_end(way: str) -> None:
    kind, parameters = STATIC[way]
    image = guest("ud2", "nop", gate=8, data={OTHER_TSS: tss(OTHER_CODE, data=0x60)})
    for strategy in (boot(Native, image), boot(kind, image, parameters)):
        with pytest.raises(TripleFault, match="triple fault"):
            strategy.run(100_000)


@pytest.mark.parametrize("way", STATIC)
def test_a_16_bit_task_is_refused_in_words(way: str) -> None:
    kind, parameters = STATIC[way]
    image = guest("int 0x40", "nop", gate=0x40, data={GDT: descriptors(task_descriptor(OTHER_TSS) & ~(8 << 40))})
    for strategy in (boot(Native, image), boot(kind, image, parameters)):
        with pytest.raises(GuestError, match="16-bit task 0x30"):
            strategy.run(100_000)
