"""The devices that VMMs give their guests: what a guest sees equals the bare machine's, driven by physical interrupts."""

from __future__ import annotations

import pytest
from longlab import long_kernel
from machinelab import DATA, DEBUG_EXIT, PATHS, kernel

from vmlab.guests import GuestImage
from vmlab.machine.devices import disk as d
from vmlab.machine.devices import lapic as a
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.techniques import GUEST_MEMORY
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

IMAGE = b"".join(bytes([i + 1]) * 512 for i in range(16))
KINDS: dict[str, tuple[type[Strategy], dict[str, str]]] = {
    "trap-and-emulate": (TrapAndEmulate, {"sensitive": "trap"}),
    "binary-translation": (BinaryTranslation, {}),
    "hardware-assisted": (HardwareAssisted, {}),
    "nested": (HardwareAssisted, {"memory": "nested"}),
    "hosted": (TrapAndEmulate, {"sensitive": "trap", "hypervisor": "type2"}),
}
every_vmm = pytest.mark.parametrize("technique", KINDS)
every_path = pytest.mark.parametrize("path", PATHS)

END = DEBUG_EXIT
PIC = "".join(f"mov al, {value}; out {port}, al;" for port, value in (
    (0x20, 0x11), (0xA0, 0x11), (0x21, 0x20), (0xA1, 0x28), (0x21, 4), (0xA1, 2), (0x21, 1), (0xA1, 1), (0x21, 0xFA), (0xA1, 0xF7)))
TICK = f"inc dword ptr [{DATA}]; push eax; mov al, 0x20; out 0x20, al; pop eax; iretd"


def pit(mode: int, count: int) -> str:
    return f"mov al, {0x30 | mode << 1:#x}; out 0x43, al; mov al, {count & 0xFF}; out 0x40, al; mov al, {count >> 8}; out 0x40, al;"


def out32(offset: int, value: int | str) -> str:
    return f"mov dx, {d.FIRST_PORT + offset}; mov eax, {value}; out dx, eax;"


def disk_request(command: int, sector: int, address: int, count: int = 1) -> str:
    return (out32(d.AT_SECTOR, sector) + out32(d.AT_COUNT, count) + out32(d.AT_ADDRESS, address) + out32(d.AT_ADDRESS_HIGH, 0)
            + out32(d.AT_COMMAND, command))


ACKNOWLEDGE = "push eax; push edx;" + out32(d.AT_ACKNOWLEDGE, 0) + "mov al, 0x20; out 0xa0, al; out 0x20, al; inc esi; pop edx; pop eax; iretd"
APIC_TICK = f"inc dword ptr [{DATA}]; mov dword ptr [{a.BASE + a.EOI:#x}], 0; iretd"
APIC = f"mov ebx, {a.BASE:#x}; mov dword ptr [ebx + {a.DIVIDE:#x}], 0xb; mov dword ptr [ebx + {a.LVT_TIMER:#x}], {{lvt:#x}};" + (
    f"mov dword ptr [ebx + {a.INITIAL_COUNT:#x}], {{count}};")

#: Programs whose outcome depends on no timing: exit code and memory are compared with the bare machine's.
PROGRAMS: dict[str, GuestImage] = {
    "ticks in halt": kernel(PIC + pit(2, 119) + f"sti; idle: hlt; cmp dword ptr [{DATA}], 5; jb idle; mov eax, 3;" + END, {0x20: TICK}),
    "ticks in a loop": kernel(PIC + pit(3, 119) + f"sti; busy: cmp dword ptr [{DATA}], 5; jb busy; mov eax, 3;" + END, {0x20: TICK}),
    "one tick": kernel(PIC + pit(0, 500) + f"sti; hlt; mov eax, [{DATA}];" + END, {0x20: TICK}),
    "polled channel 2": kernel("mov al, 1; out 0x61, al; mov al, 0xb0; out 0x43, al; mov al, 20; out 0x42, al; mov al, 0; out 0x42, al;"
                               "again: in al, 0x61; test al, 0x20; jz again; mov eax, 9;" + END),
    "disk read in halt": kernel(PIC + disk_request(d.READ, 3, DATA, 2) + f"sti; hlt; mov eax, [{DATA + 1020}]; add eax, esi;" + END,
                                {0x2B: ACKNOWLEDGE}),
    "disk write and read back": kernel(
        PIC + f"sti; mov dword ptr [{DATA}], 0x1234;" + disk_request(d.WRITE, 5, DATA) + "w: hlt; cmp esi, 1; jb w;"
        + disk_request(d.READ, 5, DATA + 512) + f"r: hlt; cmp esi, 2; jb r; mov eax, [{DATA + 512}];" + END, {0x2B: ACKNOWLEDGE}),
    "disk refuses": kernel(PIC + "sti;" + disk_request(d.READ, 16, DATA) + f"r: hlt; cmp esi, 1; jb r; in eax, dx; mov [{DATA}], eax; mov eax, 1;"
                           + END, {0x2B: "push eax; mov dx, 0xc18; in eax, dx; mov ebp, eax; pop eax;" + ACKNOWLEDGE}),
    "apic one-shot": kernel(APIC.format(lvt=0x40, count=3000) + f"sti; hlt; mov eax, [{DATA}];" + END, {0x40: APIC_TICK}),
    "apic periodic": kernel(APIC.format(lvt=0x20040, count=20_000) + f"sti; idle: hlt; cmp dword ptr [{DATA}], 4; jb idle; mov eax, [ebx + 0x30];"
                            + END, {0x40: APIC_TICK}),
    "apic priorities": kernel(
        f"mov ebx, {a.BASE:#x}; mov dword ptr [ebx + {a.TPR:#x}], 0x50; mov dword ptr [ebx + {a.ICR_LOW:#x}], 0x40041; sti; nop; jmp a; a:"
        f"mov eax, [{DATA}]; mov [{DATA + 4}], eax; and dword ptr [ebx + {a.TPR:#x}], 0; nop; jmp b; b: mov eax, [{DATA}];" + END, {0x41: APIC_TICK}),
    "apic shuts the pair out": kernel(
        PIC + f"mov ebx, {a.BASE:#x}; mov dword ptr [ebx + {a.LVT_LINT0:#x}], 0x10700;" + pit(0, 10)
        + f"sti; mov ecx, 8000; l: dec ecx; jnz l; mov eax, [{DATA}]; mov dword ptr [ebx + {a.LVT_LINT0:#x}], 0x700; nop; jmp b; b:"
        f"mov edx, [{DATA}];"
        f"mov [{DATA + 8}], edx; shl edx, 8; or eax, edx;" + END, {0x20: TICK}),
}


def boot(kind: type[Strategy], image: GuestImage, path: str = "portable", **chosen: str) -> Strategy:
    strategy = kind(Machine(64 << 20, path, disk=IMAGE), chosen)
    strategy.load(image, "")
    return strategy


def run(technique: str, image: GuestImage, path: str = "portable", budget: int = 2_000_000) -> Strategy:
    kind, chosen = KINDS.get(technique, (Native, {}))
    strategy = boot(kind, image, path, **chosen)
    stop = strategy.run(budget)
    assert stop.reason is StopReason.EXIT, stop
    return strategy


def seen(strategy: Strategy) -> tuple[int | None, bytes, bytes]:
    """What the guest and the world saw: exit code, the guest's results, the disk."""
    machine = strategy.machine
    assert machine.ending is not None and machine.disk is not None
    return machine.ending.exit_code, strategy.read_guest(DATA, 16), machine.disk.content


@every_path
@pytest.mark.parametrize("program", PROGRAMS)
@every_vmm
def test_the_guest_sees_the_bare_machines_devices(technique: str, program: str, path: str) -> None:
    native, mine = run("native", PROGRAMS[program]), run(technique, PROGRAMS[program], path)
    assert seen(mine) == seen(native)
    if program != "polled channel 2":
        events = mine.snapshot().events
        assert events["interrupt.injected"] >= 1


@every_vmm
def test_both_paths_have_the_same_ledger(technique: str) -> None:
    for program in ("ticks in a loop", "disk write and read back", "apic periodic"):
        ledgers = [run(technique, PROGRAMS[program], path).snapshot() for path in PATHS]
        assert ledgers[0] == ledgers[-1], program


@every_vmm
def test_a_virtual_tick_is_a_physical_interrupt_that_the_vmm_took(technique: str) -> None:
    """Five virtual ticks: five physical interrupts into the VMM, each armed once, each handed on once."""
    events = run(technique, PROGRAMS["ticks in halt"]).snapshot().events
    assert (events["interrupt.monitor"], events["interrupt.injected"]) == (5, 5)
    assert events["vmm.timer"] in (6, 7), "set, and again after each; perhaps once more while the count was written"


@every_vmm
def test_virtual_ticks_keep_their_time(technique: str) -> None:
    """Ten periods after the first tick the guest has had ten more, each at most three physical clocks late."""
    count = 1193
    image = kernel(PIC + pit(2, count) + f"sti; idle: hlt; cmp dword ptr [{DATA}], 11; jb idle;" + END, {0x20: TICK})
    native, mine = (run(t, image).machine.time for t in ("native", technique))
    assert 0 <= mine - native < 5_000


@every_vmm
def test_the_guests_disk_reaches_nothing_beyond_its_memory(technique: str) -> None:
    """The VMM's own memory and the last byte beyond the guest's: refused as a bad address; nothing is written."""
    for address in (GUEST_MEMORY - 508, GUEST_MEMORY, 0xFFFFFE00):
        image = kernel(PIC + "sti;" + disk_request(d.READ, 0, address) + "r: hlt; cmp esi, 1; jb r; mov eax, ebp;" + END,
                       {0x2B: "push eax; mov dx, 0xc18; in eax, dx; mov ebp, eax; pop eax;" + ACKNOWLEDGE})
        kind, chosen = KINDS[technique]
        strategy = boot(kind, image, **chosen)
        ram = strategy.machine.ram
        ram.write(48 << 20, b"\xa5" * 4096)
        assert strategy.run(100_000).exit_code == d.DONE | d.ERROR | d.BAD_ADDRESS << d.ERROR_SHIFT
        assert ram.read(48 << 20, 4096) == b"\xa5" * 4096
        assert strategy.snapshot().events.get("vmm.disk", 0) == 0


@every_vmm
def test_halting_with_nothing_to_come_ends_the_run(technique: str) -> None:
    kind, chosen = KINDS[technique]
    for source in ("cli; hlt", PIC + pit(2, 1000) + "cli; hlt", "sti; hlt", PIC + "mov al, 0xff; out 0x21, al;" + pit(0, 100) + "sti; hlt"):
        assert boot(kind, kernel(source), **chosen).run(100_000).reason is StopReason.HALTED


# ---- CR8 of 64-bit guests is the local APIC's task priority, wherever a VMM keeps it
_IPI = f"mov dword ptr [rsi + {a.ICR_LOW}], {{vector:#x}};"
_LOWER = "xor r8d, r8d; mov cr8, r8;"
_FINISH = "cli; xor eax, eax; mov edx, 0xf4; out dx, eax; hlt"
#: R15 collects the handlers that ran; each handler ends its interrupt.
PRIORITIES = {
    "one register": f"mov r8d, 9; mov cr8, r8; mov r9d, [rsi + {a.TPR}];"
                    f"mov dword ptr [rsi + {a.TPR}], 0x73; mov r11, cr8; mov r12d, [rsi + {a.PPR}];",
    "held back": "mov r8d, 15; mov cr8, r8;" + _IPI.format(vector=0x40041) + "sti; nop; nop; mov r9, r15;" + _LOWER + "nop; nop; mov r11, r15;",
    "lowered in steps": "mov r8d, 8; mov cr8, r8;" + _IPI.format(vector=0x40041) + _IPI.format(vector=0x40061) + _IPI.format(vector=0x40091)
                        + "sti; nop; nop; mov r9, r15; mov r8d, 5; mov cr8, r8; nop; nop; mov r11, r15;" + _LOWER + "nop; nop; mov r12, r15;",
    "lowered with interrupts off":
        "mov r8d, 15; mov cr8, r8;" + _IPI.format(vector=0x40041) + _LOWER + "nop; mov r9, r15; sti; nop; nop; mov r11, r15;",
    "raised before it comes":
        _IPI.format(vector=0x40041) + "mov r8d, 4; mov cr8, r8; sti; nop; nop; mov r9, r15;" + _LOWER + "nop; nop; mov r11, r15;",
    "a halt sleeps through it": f"mov dword ptr [rsi + {a.LVT_TIMER}], 0x41; mov dword ptr [rsi + {a.DIVIDE}], 0xb; mov r8d, 4; mov cr8, r8;"
                                f"mov dword ptr [rsi + {a.INITIAL_COUNT}], 500; mov dword ptr [rsi + {a.LVT_LINT0}], 0x10000;"
                                "mov ecx, 1000; spin: dec ecx; jnz spin; mov r9, r15; sti;" + _LOWER + "nop; nop; mov r11, r15;",
}


@pytest.mark.parametrize("memory", ["tracing", "lazy", "nested"])
@pytest.mark.parametrize("path", PATHS)
def test_cr8_and_the_task_priority_are_one_register_under_hardware_assistance(path: str, memory: str) -> None:
    """V_TPR is the CPU's, TPR the VMM's: an interrupt waits for CR8, and comes when it falls, with no exit for the write."""
    for name, source in PRIORITIES.items():
        handlers = {vector: f"shl r15, 8; or r15, {vector}; mov dword ptr [rsi + {a.EOI}], 0; iretq" for vector in (0x41, 0x61)}
        handlers[0x91] = f"shl r15, 8; mov r14d, 0x91; or r15, r14; mov dword ptr [rsi + {a.EOI}], 0; iretq"
        image = long_kernel(f"mov esi, {a.BASE:#x}; xor r15, r15;" + source + _FINISH, handlers)
        ends = []
        for kind, parameters in ((Native, {}), (HardwareAssisted, {"memory": memory})):
            guest = kind(Machine(64 << 20, path), parameters)
            guest.load(image, "")
            assert guest.run(1_000_000) == Stop(StopReason.EXIT, 0), name
            ends.append(guest.guest_state().gpr)
        assert ends[0] == ends[1], name
        assert ends[0][15] or name == "one register"
        assert "exit.cr_write" not in guest.snapshot().events or memory != "nested"


@pytest.mark.parametrize("technique", ["trap-and-emulate", "binary-translation", "hardware-assisted"])
@every_path
def test_an_interrupt_that_waits_for_sti_comes_behind_the_next_instruction(technique: str, path: str) -> None:
    """The shadow of STI is one instruction long, whatever that is; no more of its block runs (SDM Vol. 2, STI)."""
    handler = f"mov [{DATA}], ecx; mov [{DATA + 4}], edx; mov eax, [esp]; mov [{DATA + 8}], eax; mov dword ptr [{a.BASE + a.EOI:#x}], 0; iretd"
    for behind in ("mov ecx, 1; mov edx, 1; nop;", "push 2; pop ecx; mov edx, 1;", "cpuid; mov ecx, 5;",
                   "cli; mov ecx, 6; sti; mov edx, 7; nop;", "int 0x31; nop;"):
        image = kernel(f"mov dword ptr [{a.BASE + a.ICR_LOW:#x}], 0x40040; mov ecx, 9; mov edx, 9; xor eax, eax;"
                       f"sti; {behind} cli; xor eax, eax;" + END, {0x40: handler, 0x31: "mov ecx, 3; iretd"})
        seen = []
        for kind, parameters in ((Native, {}), KINDS[technique]):
            guest = kind(Machine(64 << 20, path), parameters)
            guest.load(image, "")
            assert guest.run(100_000).reason is StopReason.EXIT
            seen.append((guest.read_guest(DATA, 12), guest.machine.time))
        assert seen[0] == seen[1], behind
        assert seen[0][0][8:] != bytes(4)
