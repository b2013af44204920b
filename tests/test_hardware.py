"""Hardware assistance as a whole: small kernels under the VMM against the bare machine, and exits counted by hand."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping

import pytest
from machinelab import CODE, DATA, DEBUG_EXIT, PATHS, STACK3, USER, USER_CODE, USER_DATA, asm, kernel

from vmlab import guests
from vmlab.errors import GuestBudget, TripleFault, UnsupportedByStrategy
from vmlab.experiment.cell import run_cell
from vmlab.guests import GuestImage
from vmlab.machine.cpu import IF
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import RAX
from vmlab.machine.svm_host import CODE as HOST_CODE
from vmlab.machine.svm_host import GDT as HOST_GDT
from vmlab.machine.svm_host import PML4
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native

END = "xor eax, eax; " + DEBUG_EXIT
TO_USER = f"push {USER_DATA}; push {STACK3}; push 0x202; push {USER_CODE}; push {USER}; iretd"
RETRY_BEHIND = "add dword ptr [esp], 2; iretd"                 # handler of a two-byte instruction that faulted
PIC = "".join(f"mov al, {value}; out {port}, al;"
              for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)))
RAISE = "mov dx, 0x3f9; mov al, 2; out dx, al;"                # the UART's transmitter is empty: IRQ 4
QUIET = ("push eax; push edx; mov dx, 0x3f9; xor eax, eax; out dx, al; mov al, 0x20; out 0x20, al; inc esi;"
         "pop edx; pop eax; iretd")


def boot(kind: type[Strategy], image: GuestImage, path: str = "portable") -> Strategy:
    strategy = kind(Machine(48 << 20, path))
    strategy.load(image, "")
    return strategy


def exits(strategy: Strategy) -> dict[str, int]:
    """Exits by reason."""
    return {k[5:]: n for k, n in strategy.snapshot().events.items() if k.startswith("exit.")}


#: Programs, and the exits that each makes by hand count; the OUT to the debug exit is one exit.io in each.
PROGRAMS: dict[str, tuple[GuestImage, dict[str, int]]] = {
    "interrupt flag": (kernel("cli; sti; pushfd; popfd; pushfd; pop ebx; cli;" + END), {"io": 1}),
    "cpuid": (kernel("mov ecx, 5; l: push ecx; mov eax, 0x80000001; cpuid; add esi, edx; pop ecx; loop l;"
                     "xor eax, eax; .byte 0x3e; cpuid; mov edi, ebx;" + END), {"cpuid": 6, "io": 1}),
    "faults": (kernel("xor ecx, ecx; div ecx; ud2; mov eax, 0x1230; mov ds, eax;" + END,
                      {0: RETRY_BEHIND, 6: RETRY_BEHIND, 13: "pop ebx; " + RETRY_BEHIND}), {"io": 1}),
    "system call": (kernel(TO_USER, {0x80: ("pushfd; pop esi; mov edi, [esp + 4]; cpuid;" + END, 3)},
                           user="xor eax, eax; cpuid; mov ebp, cs; int 0x80"), {"cpuid": 2, "io": 1}),
    "user privilege": (kernel(TO_USER, {13: "pop ebx; inc dword ptr [esp]; inc esi; cmp esi, 3; je l; iretd; l:" + END},
                              user="cli; hlt; in al, dx; nop"), {"io": 1}),
    "strings": (kernel(f"mov esi, {CODE}; mov edi, {DATA}; mov ecx, 7; rep movsb; rep movsb; mov esi, {DATA}; mov dx, 0x3f8;"
                       f"mov ecx, 4; rep outsb; mov dx, 0x3ff; mov ecx, 3; rep insb; outsb;" + END), {"io": 4}),
    # The PIC takes five OUTs; two a handler; raising one, and the UART's interrupt is taken with no exit of its own.
    "halt": (kernel(PIC + RAISE + "sti; hlt; nop;" + END, {0x24: QUIET}), {"io": 5 + 1 + 2 + 1, "hlt": 1}),
    "interrupt while off": (kernel(PIC + "cli;" + RAISE + "mov ebx, esi; sti; nop; nop; mov ebp, esi;" + END, {0x24: QUIET}),
                            {"io": 9, "interrupt_window": 1}),
    "control registers": (kernel("mov eax, cr0; mov ebx, eax; or eax, 8; mov cr0, eax; smsw ecx; clts; mov eax, cr0;"
                                 "mov esi, eax; mov eax, cr4; or eax, 0x200; mov cr4, eax; mov ebp, cr4; mov eax, 0x1000;"
                                 "mov cr3, eax; mov edi, cr3;" + END),
                          {"cr_read": 6, "cr_write": 4, "io": 1}),
    "vmmcall": (kernel("nop; vmmcall;" + END, {6: "add dword ptr [esp], 3; iretd"}), {"vmmcall": 1, "io": 1}),
    "time": (kernel("rdtsc; mov esi, eax; nop; cpuid; rdtsc; sub eax, esi; mov ebx, eax;" + END), {"cpuid": 1, "io": 1}),
    "open bus": (kernel("mov eax, [0x1000000]; mov dword ptr [0xfffff000], 5; mov ebx, [0xfffff000];" + END), {"io": 1}),
    "system registers": (kernel("mov ecx, 0xc0000080; rdmsr; mov ebx, eax;" + END), {"msr": 1, "io": 1}),
    "own tables": (kernel("sgdt [0x5000]; sidt [0x5008]; str ax; mov [0x5010], ax; mov ax, cs; mov [0x5014], ax;"
                          "lsl ebx, eax; invlpg [eax];" + END), {"io": 1}),
}


@functools.cache
def native(name: str) -> Strategy:
    strategy = boot(Native, PROGRAMS[name][0])
    assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
    return strategy


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_behaves_as_on_the_bare_machine(name: str, path: str) -> None:
    image, expected = PROGRAMS[name]
    bare, guest = native(name), boot(HardwareAssisted, image, path)
    assert guest.run(100_000) == Stop(StopReason.EXIT, 0)
    assert guest.guest_state() == bare.guest_state()
    assert guest.state_digest() == bare.state_digest(), "memory"
    assert guest.machine.console == bare.machine.console
    assert guest.machine.device_log == bare.machine.device_log
    mine, theirs = guest.snapshot(), bare.snapshot()
    assert (mine.user, mine.kernel) == (theirs.user, theirs.kernel)
    assert exits(guest) == expected
    assert mine.events["entry"] == sum(expected.values())
    assert mine.events.get("idle", 0) == theirs.events.get("idle", 0)
    # What the guest did is the same; only who did it differs.
    for op in ("cpuid", "in", "out", "hlt", "cli", "sti", "pushf", "popf", "iret", "int", "rdtsc", "ins", "outs", "mov_to_cr"):
        done = mine.events.get(f"retired.{op}", 0) + mine.events.get(f"emulate.{op}", 0)
        assert done == theirs.events.get(f"retired.{op}", 0), op
    for kind in ("fault.delivered.0", "fault.delivered.13", "interrupt.software"):
        assert mine.events.get(kind, 0) == theirs.events.get(kind, 0), kind


@pytest.mark.parametrize("name", PROGRAMS)
def test_ledgers_are_the_same_on_every_path_and_every_time(name: str) -> None:
    seen = []
    for path in (*PATHS, PATHS[0]):
        guest = boot(HardwareAssisted, PROGRAMS[name][0], path)
        guest.run(100_000)
        seen.append((guest.snapshot(), guest.state_digest()))
    assert all(one == seen[0] for one in seen)


def test_a_port_exit_costs_the_vmm_six_reads_and_a_write() -> None:
    image = kernel("mov dx, 0x3ff; mov al, 1; out dx, al; mark: out dx, al; nop; hlt")
    guest = boot(HardwareAssisted, image)
    marks = []
    for address in (CODE + 6, CODE + 7):
        guest.watch(address, lambda at: marks.append(guest.snapshot(at)))
    assert guest.run(1000).reason is StopReason.HALTED
    between = marks[1].minus(marks[0])
    assert between.events == {"entry": 1, "exit.io": 1, "vmcb.read": 6, "vmcb.write": 1, "vmm.device": 1, "vmm.emulate": 1,
                              "emulate.out": 1, "emulated.kernel": 1, "io.device": 1, "machine.vmrun": 1}
    assert (between.user, between.kernel) == (0, 1)


# ---- control of the machine stays with the VMM
def test_an_endless_loop_with_interrupts_off_spends_the_budget_and_nothing_else() -> None:
    guest = boot(HardwareAssisted, kernel("cli; l: jmp l"))
    with pytest.raises(GuestBudget):
        guest.run(5000)
    state = guest.guest_state()
    assert (state.rip, state.eflags & IF, state.cr0 >> 31) == (CODE + 1, 0, 0)
    assert exits(guest) == {}
    with pytest.raises(GuestBudget):
        guest.run(6000)
    assert guest.snapshot().kernel == 6000
    assert guest.snapshot().events["entry"] == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_physical_interrupt_reaches_the_vmm_whatever_the_guests_if(path: str) -> None:
    guest = boot(HardwareAssisted, kernel(PIC + "cli; l: inc ebx; jmp l"), path)
    seen = []

    def tick(address: int) -> None:
        seen.append(address)
        if len(seen) in (10, 20):
            guest.machine.pic.set_line(4, False)
            guest.machine.pic.set_line(4, True)

    guest.watch(CODE + len(asm(PIC)) + 1, tick)
    with pytest.raises(GuestBudget):
        guest.run(500)
    events = guest.snapshot().events
    assert events["exit.interrupt"] == 2
    assert events["interrupt.delivered"] == 2, "both to the host, none to the guest"
    assert (events["interrupt.window"], events.get("interrupt.injected", 0)) == (1, 0)


@pytest.mark.parametrize("path", PATHS)
def test_a_virtual_interrupt_made_pending_inside_the_guest_arrives(path: str) -> None:
    source = PIC + "sti; l: cmp esi, 0; je l;" + END
    guest = boot(HardwareAssisted, kernel(source, {0x24: QUIET}), path)
    seen: list[int] = []

    def tick(address: int) -> None:
        seen.append(address)
        if len(seen) == 5:
            guest.deliver_interrupt(0x24)

    guest.watch(CODE + len(asm(PIC)) + 1, tick)
    assert guest.run(1000) == Stop(StopReason.EXIT, 0)
    assert exits(guest)["interrupt"] == 1
    assert guest.guest_state().gpr[6] == 1
    assert guest.snapshot().events["interrupt.injected"] == 1


def test_a_triple_fault_is_an_exit_and_the_end() -> None:
    guest = boot(HardwareAssisted, kernel("ud2", idt_limit=0))
    with pytest.raises(TripleFault, match=f"{CODE:#x}"):
        guest.run(1000)
    assert exits(guest) == {"shutdown": 1}


def test_a_guest_that_halts_for_ever_ends_its_run() -> None:
    guest = boot(HardwareAssisted, kernel("sti; hlt"))
    assert guest.run(1000) == Stop(StopReason.HALTED)
    assert guest.guest_state().rip == CODE + 2
    assert guest.snapshot().events["idle"] == 1


def test_paging_is_refused_in_words_for_static_memory() -> None:
    guest = boot(HardwareAssisted, kernel("mov eax, 0x80000011; mov cr0, eax; nop"))
    with pytest.raises(UnsupportedByStrategy, match="paging"):
        guest.run(1000)


def test_stores_all_over_the_address_space_leave_the_vmm_alone() -> None:
    # The first and last doubleword of each 4 MiB above the guest's RAM.
    source = "mov ebx, 0x1000000; l: mov [ebx], ebx; mov [ebx + 0x3ffffc], ebx; add ebx, 0x400000; jnz l;" + END
    guest = boot(HardwareAssisted, kernel(source))
    ram = guest.machine.ram
    fixed = [(HOST_GDT, 0x100), (HOST_CODE, 0x1000), (PML4, 0x10), (0x21000, 0x5000), (0x30000, 0xFD0000)]
    before = [ram.read(at, size) for at, size in fixed]
    guest_pages = ram.read((16 << 20) + 0x200000, 0xE00000)
    assert guest.run(10_000) == Stop(StopReason.EXIT, 0)
    assert [ram.read(at, size) for at, size in fixed] == before
    assert ram.read((16 << 20) + 0x200000, 0xE00000) == guest_pages
    assert ram.open_bus == 2 * 1016 - 3, "three stores fell near a device: the I/O APIC, the local APIC, the test device"


# ---- the built-in guest
WORKLOADS = ("cli_sti", "pushf_popf", "port_io", "cpuid", "rdtsc", "interrupt", "compute", "mixed")
#: Workloads whose every instruction runs on the CPU.
NO_EXIT = {"cli_sti", "pushf_popf", "rdtsc", "compute"}


@functools.cache
def cell(technique: str, workload: str) -> Mapping[str, object]:
    return run_cell(technique, {"guest": "nano", "workload": workload, "iterations": 24, "density": 100})


def test_the_list_of_workloads_is_complete() -> None:
    assert set(WORKLOADS) == set(guests.workloads("nano"))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_nano_has_the_same_outcome_and_state_as_on_the_bare_machine(workload: str) -> None:
    bare, mine = cell("native", workload), cell("hardware-assisted", workload)
    assert (mine["status"], mine["error"], mine["platform"]) == ("ok", None, "svm")
    for key in ("work", "console", "exit_code"):
        assert mine[key] == bare[key], key
    assert mine["fidelity"] == bare["fidelity"]
    assert mine["instructions"]["guest"] == bare["instructions"]["guest"]  # type: ignore[index]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_nano_exits_exactly_where_it_must(workload: str) -> None:
    mine = cell("hardware-assisted", workload)
    events: Mapping[str, int] = mine["events"]  # type: ignore[assignment]
    native_events: Mapping[str, int] = cell("native", workload)["events"]  # type: ignore[assignment]
    total = sum(n for kind, n in events.items() if kind.startswith("exit."))
    assert events.get("entry", 0) == total
    assert events.get("exit.cpuid", 0) == native_events.get("retired.cpuid", 0)
    assert events.get("exit.io", 0) == native_events.get("retired.in", 0) + native_events.get("retired.out", 0)
    assert events.get("exit.hlt", 0) == native_events.get("retired.hlt", 0)
    assert (total == 0) == (workload in NO_EXIT)
    for op in ("cli", "sti", "pushf", "popf", "iret"):
        assert events.get(f"retired.{op}", 0) == native_events.get(f"retired.{op}", 0), op
    assert not any(kind.startswith(("trap.", "exit.exception", "exit.page_fault")) for kind in events)


def test_state_is_precise_at_a_watch() -> None:
    guest = boot(HardwareAssisted, kernel("mov eax, 7; cpuid; mov eax, 9; nop;" + END))
    seen: list[tuple[int, int]] = []

    def look(_: int) -> None:
        state = guest.guest_state()
        seen.append((state.gpr[RAX], state.rip))

    guest.watch(CODE + 12, look)
    assert guest.run(1000) == Stop(StopReason.EXIT, 0)
    assert seen == [(9, CODE + 12)]


ICR, SEND_NMI = 0xFEE00300, 0x4400


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("memory", ["static", "tracing", "lazy", "nested"])
def test_an_nmi_that_waits_enters_behind_the_handlers_iret(memory: str, path: str) -> None:
    """The handler sends itself another one: both frames hold the address of the interrupted code, none that of the IRET (SDM Vol. 3A §6.7.1)."""
    handler = (f"mov eax, [esp]; mov ecx, [{DATA:#x}]; mov [4 * ecx + {DATA + 4:#x}], eax; mov [4 * ecx + {DATA + 32:#x}], esp;"
               f"inc dword ptr [{DATA:#x}]; cmp dword ptr [{DATA:#x}], 1; jne done;"
               f"mov dword ptr [{ICR:#x}], {SEND_NMI:#x}; jmp l2; l2: nop; done: iretd")
    main = f"mov dword ptr [{ICR:#x}], {SEND_NMI:#x}; jmp l1; l1: nop; nop;"
    image = kernel(main + END, {2: handler}, data={DATA: bytes(0x40)})
    after = CODE + len(asm(main.partition(";")[0], CODE))
    for strategy in (boot(Native, image, path), HardwareAssisted(Machine(48 << 20, path), {"memory": memory})):
        if isinstance(strategy, HardwareAssisted):
            strategy.load(image, "")
        assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
        count, first, second = struct.unpack("<3I", strategy.read_guest(DATA, 12))
        assert count == 2 and first == second and first in (after, after + 2)     # the store, or the JMP behind it: the bare machine looks at blocks
        stacks = struct.unpack("<2I", strategy.read_guest(DATA + 0x20, 8))
        assert stacks[0] == stacks[1]
    assert exits(strategy)["iret"] == 2 and strategy.counts["emulate.iret"] == 1   # the second handler's own runs on the CPU
