"""Hardware task switches: through a task gate, by far JMP and CALL, and back by IRET, as the bare machine does them.

On the bare machine Unicorn carries out all but the gate; a VMM carries out all of them, since a task brings a CR3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from machinelab import (
    CODE0,
    CODE3,
    DATA,
    DATA0,
    GDT,
    IDT,
    PAGES,
    PATHS,
    SPARE,
    STACK0,
    TASK,
    TSS,
    USER_CODE,
    USER_DATA,
    asm,
    descriptors,
    kernel,
    task_descriptor,
)
from paginglab import ALL, END, SCHEMES, boot, layout

from vmlab.errors import GuestBudget, GuestError, TripleFault, UnsupportedByStrategy
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


ASSISTED = {f"assisted/{memory}": (HardwareAssisted, {"memory": memory}) for memory in ("static", "tracing", "lazy", "nested")}
_VM, _CONFORMING = 1 << 17, 0x00CF9F000000FFFF


@pytest.mark.parametrize("path", PATHS)
def test_a_task_of_an_outer_ring_in_a_conforming_segment(path: str) -> None:
    """CS with RPL 3 and DPL 0 is right where it is conforming (SDM Vol. 3A table 7-1): the task runs at CPL 3; flags are saved."""
    table = bytearray(descriptors(task_descriptor(OTHER_TSS)))
    table[CODE3:CODE3 + 8] = struct.pack("<Q", _CONFORMING)
    source = REGISTERS + "mov ebp, 0x99; stc;" + CALL + "pushfd; pop eax; mov [" + hex(DATA + 36) + "], eax;" + END
    other = f"mov ecx, cs; mov [{DATA:#x}], ecx; mov ecx, ss; mov [{DATA + 4:#x}], ecx; pushfd; pop ecx; mov [{DATA + 8:#x}], ecx; iretd;"
    raw = tss(OTHER_CODE, flags=0x3002, code=USER_CODE, data=USER_DATA)
    image = guest(source, other, data={GDT: bytes(table), OTHER_TSS: raw})
    for kind, parameters in ((Native, {}), *ASSISTED.values(), STATIC["trap"], STATIC["translation"]):
        strategy = boot(kind, image, parameters, path)
        assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
        seen_cs, seen_ss, seen_flags = struct.unpack("<III", strategy.read_guest(DATA, 12))
        assert (seen_cs & 0xFFFF, seen_ss & 0xFFFF) == (USER_CODE, USER_DATA)
        if parameters.get("sensitive") != "trap" and kind is not BinaryTranslation:     # else a user's PUSHF shows the CPU's IOPL and NT
            assert seen_flags & 0x7000 == 0x7000
        saved_flags, = struct.unpack("<I", strategy.read_guest(TSS + 0x24, 4))
        assert saved_flags & 1, "the far CALL saves the carry flag of that moment"
        assert struct.unpack("<8I", strategy.read_guest(TSS + 0x28, 32)) == (0xA1, 0xA2, 0xA3, 0, STACK0, 0x99, 0xA4, 0)
        assert struct.unpack("<2H", strategy.read_guest(TSS + 0x4C, 2) + strategy.read_guest(TSS + 0x50, 2)) == (CODE0, DATA0)


#: What makes the other task's CS, SS or data wrong, and the exception with its error code, which is the new task's.
WRONG: Mapping[str, tuple[dict[str, int], int, int]] = {
    "code is null": ({"code": 0}, 10, 0), "code is data": ({"code": DATA0}, 10, DATA0), "code of an outer ring": ({"code": CODE3 | 1}, 10, CODE3),
    "stack of another ring": ({"code": USER_CODE, "data": DATA0}, 10, DATA0), "stack is null": ({"data": 0}, 10, 0),
    "stack is code": ({"data": CODE0}, 10, CODE0),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_task_may_not_load_faults_in_that_task(case: str) -> None:
    how, vector, code = WRONG[case]
    image = guest(JUMP, "nop", gate=vector, data={
        OTHER_TSS: tss(OTHER_CODE, **how), OTHER_CODE + 0x100: asm("nop", OTHER_CODE),
        GDT: descriptors(task_descriptor(OTHER_TSS))[:-16] + struct.pack("<QQ", task_descriptor(TSS), task_descriptor(OTHER_TSS)),
        IDT: bytes(8 * vector) + struct.pack("<HHBBH", OTHER_CODE & 0xFFFF, CODE0, 0, 0x8E, OTHER_CODE >> 16) + bytes(8 * (255 - vector)),
        OTHER_CODE: asm(f"mov eax, {DATA0}; mov ds, eax; pop eax; mov [{DATA:#x}], eax;" + END, OTHER_CODE)})
    for kind, parameters in ((Native, {}), *ASSISTED.values()):
        strategy = boot(kind, image, parameters)
        assert strategy.run(100_000) == Stop(StopReason.EXIT, 0) and strategy.read_guest(DATA, 4) == struct.pack("<I", code)


def virtual_8086(source: str) -> GuestImage:
    """A kernel that jumps to a task of virtual-8086 mode; #UD comes back there behind itself, #GP ends the run."""
    task = tss(0, flags=_VM | 2, code=OTHER_CODE >> 4, data=OTHER_STACK >> 4, stack=0x300)
    handlers = {6: f"mov eax, {DATA0}; mov ds, eax; mov es, eax; mov esi, esp; mov edi, {DATA:#x}; mov ecx, 9; cld; .byte 0x36, 0xf3, 0xa5;"
                   "add dword ptr [esp], 2; iretd", 13: f"mov eax, {DATA0}; mov ds, eax;" + END}
    return kernel(JUMP, handlers, data={OTHER_TSS: task, GDT: descriptors(task_descriptor(OTHER_TSS)), OTHER_CODE: asm(source, 0, 16),
                                        DATA: bytes(0x60), OTHER_STACK: bytes(0x40)})


@pytest.mark.parametrize("path", PATHS)
def test_virtual_8086_mode_and_what_leaves_it(path: str) -> None:
    """SDM Vol. 3A §20.3.1: nine doublewords on ring 0's stack, data segments null, and IRET with VM goes back."""
    image = virtual_8086("mov ax, 0x77; mov [0x20], ax; ud2; mov bx, ds; mov [0x22], bx; hlt")
    ways = ((Native, {}), *ASSISTED.values())
    for kind, parameters in ways:
        strategy = boot(kind, image, parameters, path)
        assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
        data, code = OTHER_STACK >> 4, OTHER_CODE >> 4
        frame = struct.unpack("<9I", strategy.read_guest(DATA, 36))
        assert frame == (6, code, frame[2], 0x300, data, data, data, 0, 0) and frame[2] & _VM
        assert strategy.read_guest(OTHER_STACK + 0x20, 4) == struct.pack("<HH", 0x77, data)


@pytest.mark.parametrize("way", ["trap", "translation"])
def test_a_deprivileging_vmm_says_that_it_cannot_run_virtual_8086_mode(way: str) -> None:
    kind, parameters = STATIC[way]
    with pytest.raises(UnsupportedByStrategy, match="task of virtual-8086 mode"):
        boot(kind, virtual_8086("hlt"), parameters).run(100_000)
