"""AMD-V in the machine: VMRUN, #VMEXIT and what the machine adds to Unicorn's, against APM Vol. 2 chapter 15."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from machinelab import CODE, CODE0, DATA0, GDT, IDT, PATHS, STACK0, TASK, TSS, Bench, asm, descriptors, gate

from vmlab.errors import GuestBudget, TripleFault
from vmlab.machine import vmcb as v
from vmlab.machine.cpu import IF, Segment
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import RBX, RCX
from vmlab.machine.svm import Svm
from vmlab.machine.svm_host import FREE_FRAMES, HIGH
from vmlab.machine.tlb import TlbConfig
from vmlab.machine.vmcb import Vmcb

GUEST = 16 << 20
DIRECTORY, VMCB, IOPM, MSRPM = (FREE_FRAMES + page * 0x1000 for page in (0, 1, 2, 5))
ALWAYS = (v.EXIT_VMRUN, v.EXIT_HLT)
REQUESTED = Stop(StopReason.REQUESTED)

pytestmark = pytest.mark.parametrize("path", PATHS)


class Box:
    """A guest in guest mode, linear = guest-physical, with GDT, IDT and TSS loaded; HLT exits, and what ``exits`` names."""

    def __init__(self, path: str, source: str, *exits: int, handlers: dict[int, str] | None = None, flags: int = 2,
                 tlb: TlbConfig | None = None) -> None:
        self.machine = machine = Machine(40 << 20, path, tlb=tlb)
        self.svm = Svm(machine)
        for slot in range(1024):
            machine.ram.write32(DIRECTORY + 4 * slot, (GUEST + (slot << 22) if slot < 4 else 0xFFC00000) | 0x87)
        self.write(GDT, descriptors())
        self.write(TSS + 4, STACK0.to_bytes(4, "little") + DATA0.to_bytes(4, "little"))
        self.write(CODE, asm(source, CODE))
        for vector, text in (handlers or {}).items():
            self.gate(vector, gate(Bench.handler(vector)))
            self.write(Bench.handler(vector), asm(text, Bench.handler(vector)))
        self.vmcb = b = Vmcb(machine.ram, VMCB)
        b.clear()
        b["intercepts"] = sum(v.intercept_bit(code) for code in (*ALWAYS, *exits))
        b["iopm_base"], b["msrpm_base"], b["asid"] = IOPM, MSRPM, 1
        b.set_segment("cs", Segment(CODE0, 0, 0xFFFFFFFF, 0xCF9B00))
        for name in ("ss", "ds", "es", "fs", "gs"):
            b.set_segment(name, Segment(DATA0, 0, 0xFFFFFFFF, 0xCF9300))
        b.set_segment("tr", Segment(TASK, TSS, 0x67, 0x8900))
        b["gdtr.base"], b["gdtr.limit"], b["idtr.base"], b["idtr.limit"] = GDT, 0x37, IDT, 0x7FF
        b["efer"], b["cr0"], b["cr3"], b["cr4"] = 1 << 12, 0x80000011, DIRECTORY, 0x10
        b["dr6"], b["dr7"], b["rflags"], b["rip"], b["rsp"] = 0xFFFF0FF0, 0x400, flags, CODE, STACK0
        self.svm.vmload(VMCB)

    def write(self, gpa: int, data: bytes) -> None:
        self.machine.ram.write(GUEST + gpa, data)

    def read32(self, gpa: int) -> int:
        return self.machine.ram.read32(GUEST + gpa)

    def gate(self, vector: int, raw: bytes) -> None:
        self.write(IDT + 8 * vector, raw)

    def run(self) -> int:
        """Enter the guest; the exit code."""
        assert self.svm.run(VMCB) == REQUESTED
        return self.vmcb["exit_code"]

    def events(self) -> dict[str, int]:
        """What happened, without the instructions retired."""
        return {k: n for k, n in self.machine.snapshot().events.items() if not k.startswith(("machine.", "retired.", "iret."))}

    def guest_kernel(self) -> int:
        return self.machine.snapshot().kernel


# ---- the world switch
def test_an_exit_saves_the_guest_and_brings_the_host_back(path: str) -> None:
    box = Box(path, "mov eax, 0x11; mov ebx, 0x22; mov ax, 0x20; mov es, ax; lea esp, [esp - 12]; stc; mov [0x5000], ebx; hlt")
    assert box.run() == v.EXIT_HLT
    b, cpu = box.vmcb, box.machine.cpu
    assert (b["rax"], b["rsp"], b["rflags"] & 0xD5) == (0x20, STACK0 - 12, 1)
    assert (b["es.selector"], b["cs.selector"], b["cpl"], b["exit_info_1"]) == (0x20, CODE0, 0, 0)
    assert box.read32(0x5000) == 0x22 and box.machine.ram.read32(0x5000) != 0x22
    assert (cpu.gpr(RBX), cpu.rip >= HIGH, cpu.cpl, cpu.long_mode) == (0x22, True, 0, True)
    assert cpu.cr(3) != DIRECTORY and cpu.table("gdt").base != GDT
    assert box.guest_kernel() == 7, "HLT did not retire"
    assert box.events() == {"entry": 1, "exit.hlt": 1}


def test_general_registers_changed_between_runs_reach_the_guest(path: str) -> None:
    box = Box(path, "hlt; mov [0x5000], ecx; mov [0x5004], eax; hlt")
    box.run()
    box.machine.cpu.set_gpr(RCX, 0x1234)
    box.vmcb["rax"], box.vmcb["rip"] = 0x5678, CODE + 1
    assert box.run() == v.EXIT_HLT
    assert (box.read32(0x5000), box.read32(0x5004)) == (0x1234, 0x5678)


def test_x87_and_sse_registers_are_not_switched(path: str) -> None:
    box = Box(path, "mov eax, 7; movd xmm0, eax; hlt; movd [0x5000], xmm0; hlt")
    box.vmcb["cr4"] |= 1 << 9
    box.run()
    box.vmcb["rip"] += 1
    box.run()
    assert box.read32(0x5000) == 7


@pytest.mark.parametrize(("spoil", "value"), [("asid", 0), ("intercepts", 0), ("efer", 0), ("cr0", 0x1_80000011), ("cr0", 0xA0000011),
                                              ("dr7", 1 << 32)])
def test_an_inconsistent_vmcb_is_refused(path: str, spoil: str, value: int) -> None:
    box = Box(path, "hlt")
    box.vmcb[spoil] = value
    assert box.run() == v.EXIT_INVALID
    assert box.vmcb["rip"] == CODE
    assert box.guest_kernel() == 0


def test_vmload_and_vmsave_move_what_vmrun_leaves(path: str) -> None:
    box = Box(path, "mov ax, 0x20; mov fs, ax; hlt")
    assert box.run() == v.EXIT_HLT
    assert box.vmcb["fs.selector"] == DATA0, "FS stays in the CPU until VMSAVE"
    box.svm.vmsave(VMCB)
    assert (box.vmcb["fs.selector"], box.vmcb["tr.base"]) == (0x20, TSS)


# ---- intercepts
@pytest.mark.parametrize(("source", "code", "reason"), [
    ("cpuid", v.EXIT_CPUID, "cpuid"), ("rdtsc", v.EXIT_RDTSC, "rdtsc"), ("rdtscp", v.EXIT_RDTSCP, "rdtsc"),
    ("pushfd", 0x70, "pushf"), ("popfd", 0x71, "popf"), ("iretd", 0x74, "iret"), ("int 0x80", 0x75, "software_interrupt"),
    ("invlpg [eax]", 0x79, "invlpg"), ("vmmcall", v.EXIT_VMMCALL, "vmmcall"), ("lgdt [eax]", 0x6B, "descriptor_table"),
])
def test_an_intercepted_instruction_exits_before_it_happens(path: str, source: str, code: int, reason: str) -> None:
    box = Box(path, f"nop; nop; {source}; hlt", code)
    assert box.run() == code
    assert box.vmcb["rip"] == CODE + 2
    assert box.guest_kernel() == 2
    assert box.events() == {"entry": 1, f"exit.{reason}": 1}


@pytest.mark.parametrize(("field", "bit", "source", "code"), [
    ("intercept_cr_read", 0, "mov eax, cr0", 0x00), ("intercept_cr_read", 3, "mov eax, cr3", 0x03),
    ("intercept_cr_write", 0, "mov cr0, eax", 0x10), ("intercept_cr_write", 0, "clts", 0x10), ("intercept_cr_write", 4, "mov cr4, eax", 0x14),
    ("intercept_dr_read", 7, "mov eax, dr7", 0x27),
])
def test_register_accesses_exit_one_by_one(path: str, field: str, bit: int, source: str, code: int) -> None:
    box = Box(path, f"nop; {source}; hlt")
    box.vmcb[field] = 1 << bit
    assert box.run() == code
    assert box.vmcb["rip"] == CODE + 1


def test_the_msr_map_says_which_registers_exit(path: str) -> None:
    box = Box(path, "mov ecx, 0x174; rdmsr; mov ecx, 0xc0000080; rdmsr; wrmsr; hlt", v.EXIT_MSR)
    box.machine.ram.write(MSRPM + 0x800 + 0x80 // 4, b"\x01")  # EFER, reads only (APM Vol. 2 §15.11)
    assert (box.run(), box.vmcb["exit_info_1"]) == (v.EXIT_MSR, 0)
    assert box.vmcb["rip"] == CODE + 12


@pytest.mark.parametrize(("source", "info"), [
    ("in al, dx", 0x03F8_0111), ("out dx, al", 0x03F8_0110), ("in ax, dx", 0x03F8_0121), ("out dx, eax", 0x03F8_0140),
    ("rep outsb", 0x03F8_011C), ("insb", 0x03F8_0115),
])
def test_port_exits_describe_the_access(path: str, source: str, info: int) -> None:
    box = Box(path, f"mov dx, 0x3f8; {source}; hlt", v.EXIT_IOIO)
    box.machine.ram.write(IOPM + 0x3F8 // 8, b"\x01")
    assert box.run() == v.EXIT_IOIO
    size = len(asm(source))
    assert (box.vmcb["rip"], box.vmcb["exit_info_1"], box.vmcb["exit_info_2"]) == (CODE + 4, info, CODE + 4 + size)
    assert box.machine.device_log == []


def test_port_exits_of_a_loop_until_the_map_lets_the_port_through(path: str) -> None:
    # Five rounds; the VMM skips the first three's OUT. C knows the block from the second on.
    box = Box(path, "mov edx, 0x3ff; mov ecx, 5; again: mov eax, ecx; out dx, al; mov ebx, eax; dec ecx; jnz again; hlt", v.EXIT_IOIO)
    box.machine.ram.write(IOPM + 0x3FF // 8, b"\x80")
    out = CODE + 12
    for left in (5, 4, 3):
        assert box.run() == v.EXIT_IOIO
        assert (box.vmcb["rip"], box.vmcb["exit_info_1"], box.vmcb["exit_info_2"], box.vmcb["rax"]) == (out, 0x03FF_0110, out + 1, left)
        box.vmcb["rip"] = out + 1
    assert box.machine.device_log == []
    box.machine.ram.write(IOPM + 0x3FF // 8, b"\0")
    assert box.run() == v.EXIT_HLT
    assert box.machine.device_log == [(0x3FF, 1, 2), (0x3FF, 1, 1)]
    assert (box.machine.snapshot().events["machine.out"], box.guest_kernel()) == (2, 2 + 5 * 4 + 2)


def test_ports_that_the_map_lets_through_are_the_guests_own(path: str) -> None:
    box = Box(path, "mov dx, 0x3f8; mov al, 65; out dx, al; mov dx, 0x3f9; out dx, ax; hlt", v.EXIT_IOIO)
    box.machine.ram.write(IOPM + 0x3F8 // 8, b"\x04")  # 0x3FA only: the second byte of a word at 0x3F9
    assert box.run() == v.EXIT_IOIO
    assert bytes(box.machine.console) == b"A"
    assert box.vmcb["exit_info_1"] >> 16 == 0x3F9


def test_time_is_offset_in_the_guest_alone(path: str) -> None:
    box = Box(path, "nop; rdtsc; hlt")
    box.vmcb["tsc_offset"] = 1 << 20
    box.run()
    assert box.vmcb["rax"] == (1 << 20) + 1
    assert box.machine.read_tsc() == 2


# ---- exceptions inside the guest
def test_a_fault_goes_through_the_guests_own_idt_without_an_exit(path: str) -> None:
    box = Box(path, "nop; ud2; hlt", handlers={6: "add dword ptr [esp], 2; iretd"})
    assert box.run() == v.EXIT_HLT
    assert box.events() == {"entry": 1, "exit.hlt": 1, "fault.delivered.6": 1}
    assert box.guest_kernel() == 3, "nop, add, iret"


def test_an_error_code_is_pushed(path: str) -> None:
    box = Box(path, "mov eax, 0x1230; mov ds, ax; hlt", handlers={13: "pop ebx; hlt"})
    assert box.run() == v.EXIT_HLT
    assert box.machine.cpu.gpr(RBX) == 0x1230


@pytest.mark.parametrize(("source", "vector", "info"), [("ud2", 6, 0), ("mov ds, ax", 13, 0x1230), ("div bl", 0, 0)])
def test_an_intercepted_exception_exits_with_its_error_code(path: str, source: str, vector: int, info: int) -> None:
    box = Box(path, f"mov eax, 0x1230; {source}; hlt", handlers={vector: "hlt"})
    box.vmcb["intercept_exceptions"] = 1 << vector
    assert (box.run(), box.vmcb["exit_info_1"], box.vmcb["rip"]) == (v.EXIT_EXCEPTION + vector, info, CODE + 5)
    assert box.vmcb["exit_interrupt_info"] == 0


def test_an_intercepted_page_fault_names_its_address(path: str) -> None:
    box = Box(path, "mov dword ptr [0x00800123], eax; hlt")
    box.machine.ram.write32(DIRECTORY + 4 * 2, 0)
    box.vmcb["intercept_exceptions"], box.vmcb["cr2"] = 1 << 14, 0x77
    assert (box.run(), box.vmcb["exit_info_1"], box.vmcb["exit_info_2"]) == (v.EXIT_EXCEPTION + 14, 2, 0x800123)
    assert box.vmcb["cr2"] == 0x77, "an intercepted #PF leaves CR2 alone (APM Vol. 2 §15.12.15)"
    assert box.events()["exit.page_fault"] == 1


def test_a_fault_during_delivery_reports_what_was_being_delivered(path: str) -> None:
    box = Box(path, "nop; ud2; hlt")
    box.gate(6, gate(0x20000, present=False))
    box.vmcb["intercept_exceptions"] = 1 << 11
    assert (box.run(), box.vmcb["exit_info_1"]) == (v.EXIT_EXCEPTION + 11, 6 * 8 + 3), "IDT and EXT bits"
    assert box.vmcb["exit_interrupt_info"] == v.event(v.EVENT_EXCEPTION, 6)
    assert box.vmcb["rip"] == CODE + 1


def test_a_triple_fault_is_a_shutdown_exit(path: str) -> None:
    box = Box(path, "lidt [0x5000]; ud2", v.EXIT_SHUTDOWN)
    assert box.run() == v.EXIT_SHUTDOWN
    assert "exit.shutdown" in box.events()


def test_a_triple_fault_that_nobody_intercepts_ends_the_machine(path: str) -> None:
    box = Box(path, "lidt [0x5000]; ud2")
    with pytest.raises(TripleFault):
        box.svm.run(VMCB)


# ---- events for the guest
def test_an_injected_interrupt_enters_the_guest_even_with_if_clear(path: str) -> None:
    box = Box(path, "nop; hlt", handlers={0x41: "mov ebx, [esp]; mov ecx, [esp + 8]; iretd"})
    box.vmcb["event_injection"] = v.event(v.EVENT_INTERRUPT, 0x41)
    assert box.run() == v.EXIT_HLT
    assert (box.machine.cpu.gpr(RBX), box.machine.cpu.gpr(RCX) & IF) == (CODE, 0)
    assert (box.vmcb["event_injection"], box.vmcb["exit_interrupt_info"]) == (0, 0)
    assert box.events() == {"entry": 1, "exit.hlt": 1, "interrupt.delivered": 1}
    assert box.guest_kernel() == 4, "two moves, iret, nop"


@pytest.mark.parametrize(("event", "vector", "error", "kind"), [
    (v.event(v.EVENT_EXCEPTION, 13, 0x18), 13, 0x18, "fault.delivered.13"), (v.event(v.EVENT_EXCEPTION, 6), 6, CODE, "fault.delivered.6"),
    (v.event(v.EVENT_SOFTWARE, 0x80), 0x80, CODE, "interrupt.software"), (v.event(v.EVENT_NMI, 2), 2, CODE, "interrupt.delivered"),
])
def test_other_events_are_injected(path: str, event: int, vector: int, error: int, kind: str) -> None:
    box = Box(path, "nop; hlt", handlers={vector: "pop ebx; hlt"})
    box.vmcb["event_injection"] = event
    assert box.run() == v.EXIT_HLT
    assert box.machine.cpu.gpr(RBX) == error
    assert box.events() == {"entry": 1, "exit.hlt": 1, kind: 1}


def test_an_injection_that_faults_is_reported_and_not_repeated(path: str) -> None:
    box = Box(path, "nop; hlt")
    box.gate(0x41, gate(0x20000, present=False))
    box.vmcb["event_injection"], box.vmcb["intercept_exceptions"] = v.event(v.EVENT_INTERRUPT, 0x41), 1 << 11
    assert box.run() == v.EXIT_EXCEPTION + 11
    assert box.vmcb["exit_interrupt_info"] == v.event(v.EVENT_INTERRUPT, 0x41)
    assert box.vmcb["event_injection"] == 0
    assert box.run() == v.EXIT_HLT


def test_a_virtual_interrupt_waits_for_if_and_for_the_shadow_of_sti(path: str) -> None:
    box = Box(path, "nop; sti; nop; hlt", handlers={0x33: "mov ebx, [esp]; iretd"})
    box.vmcb["interrupt_control"], box.vmcb["interrupt_vector"] = v.V_IRQ | 1 << 16, 0x33
    assert box.run() == v.EXIT_HLT
    assert box.machine.cpu.gpr(RBX) == CODE + 3, "behind the instruction after STI"
    assert not box.vmcb["interrupt_control"] & v.V_IRQ
    assert box.events()["interrupt.delivered"] == 1


def test_a_virtual_interrupt_below_the_tpr_stays_pending(path: str) -> None:
    box = Box(path, "nop; hlt", handlers={0x33: "iretd"}, flags=2 | IF)
    box.vmcb["interrupt_control"], box.vmcb["interrupt_vector"] = v.V_IRQ | 2 << 16 | 2, 0x33
    assert box.run() == v.EXIT_HLT
    assert box.vmcb["interrupt_control"] & v.V_IRQ
    assert "interrupt.delivered" not in box.events()


@pytest.mark.parametrize(("opens", "at"), [("sti; nop", 3), ("push 0x202; popfd", 7), ("push 0x202; push 8; push 0x1000e; iretd", 14)])
def test_the_interrupt_window_exits_as_soon_as_the_guest_is_ready(path: str, opens: str, at: int) -> None:
    box = Box(path, f"nop; {opens}; nop; nop; nop; hlt", v.EXIT_VINTR)
    box.vmcb["interrupt_control"] = v.V_IRQ | v.V_IGNORE_TPR
    assert box.run() == v.EXIT_VINTR
    assert box.events() == {"entry": 1, "exit.interrupt_window": 1}
    assert box.vmcb["interrupt_control"] & v.V_IRQ, "still pending: the VMM takes it back"
    assert box.vmcb["rip"] == CODE + at
    box.vmcb["interrupt_control"] = 0
    assert box.run() == v.EXIT_HLT, "the request did not outlive the exit"


# ---- physical interrupts
def raise_line(box: Box) -> Callable[[int], None]:
    """Unmask IRQ 4 of the physical controller at vector 0x24 and return what raises it."""
    ports = box.machine.ports
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)):
        ports.write(port, 1, value)
    return lambda _: box.machine.pic.set_line(4, True)


LOOP = "nop; cli; l: inc ebx; jmp l"


def test_a_physical_interrupt_ends_the_run_of_a_guest_that_disabled_its_own(path: str) -> None:
    box = Box(path, LOOP, v.EXIT_INTR)
    box.vmcb["interrupt_control"] = v.V_INTR_MASKING
    box.machine.watch(CODE, raise_line(box))
    box.machine.budget = 1000
    assert (box.run(), box.vmcb["exit_info_1"]) == (v.EXIT_INTR, 0)
    assert box.events() == {"entry": 1, "exit.interrupt": 1}
    assert box.machine.pic.pending, "the VMM acknowledges it, not the exit"
    assert not box.vmcb["rflags"] & IF


def test_an_injected_event_comes_before_a_physical_interrupt(path: str) -> None:
    box = Box(path, LOOP, v.EXIT_INTR, handlers={0x41: "nop; iretd"})
    box.vmcb["interrupt_control"], box.vmcb["event_injection"] = v.V_INTR_MASKING, v.event(v.EVENT_INTERRUPT, 0x41)
    raise_line(box)(0)
    assert (box.run(), box.vmcb["rip"], box.vmcb["exit_interrupt_info"]) == (v.EXIT_INTR, Bench.handler(0x41), 0)
    assert box.guest_kernel() == 0


def test_without_masking_the_guests_if_decides(path: str) -> None:
    box = Box(path, LOOP, v.EXIT_INTR)
    box.machine.watch(CODE, raise_line(box))
    box.machine.budget = 1000
    with pytest.raises(GuestBudget):
        box.svm.run(VMCB)
    assert box.svm.in_guest


def test_an_interrupt_that_is_not_intercepted_is_the_guests(path: str) -> None:
    box = Box(path, "sti; nop; l: inc ebx; jmp l", handlers={0x24: "hlt"})
    box.machine.watch(CODE, raise_line(box))
    assert box.run() == v.EXIT_HLT
    assert box.events() == {"entry": 1, "exit.hlt": 1, "interrupt.delivered": 1}


def test_a_run_stopped_inside_the_guest_goes_on_there(path: str) -> None:
    box = Box(path, "mov ecx, 100; l: loop l; hlt")
    box.machine.budget = 20
    with pytest.raises(GuestBudget):
        box.svm.run(VMCB)
    box.machine.budget = 1000
    assert box.run() == v.EXIT_HLT
    assert box.guest_kernel() == 101
    assert box.events()["entry"] == 1


def test_rep_interrupted_by_an_exit_counts_once(path: str) -> None:
    box = Box(path, "mov esi, 0x5000; mov edi, 0x6000; mov ecx, 7; rep movsb; hlt", v.EXIT_INTR)
    box.vmcb["interrupt_control"] = v.V_INTR_MASKING
    up = raise_line(box)
    seen = [0]

    def at_each_element(address: int) -> None:
        seen[0] += 1
        if seen[0] == 3:
            up(address)

    box.machine.watch(CODE + 15, at_each_element)
    assert (box.run(), box.machine.cpu.gpr(RCX)) == (v.EXIT_INTR, 4)
    box.machine.pic.acknowledge()
    assert box.run() == v.EXIT_HLT
    counts = box.machine.snapshot()
    assert (counts.kernel, counts.events["machine.string"]) == (4, 7)


# ---- the layout
def test_fields_lie_where_the_manual_has_them(path: str) -> None:
    # APM Vol. 2 appendix B: a few from each part, so that a shifted table shows.
    places = {"intercepts": 0x0C, "exit_code": 0x70, "event_injection": 0xA8, "nested_cr3": 0xB0, "es.selector": 0x400, "cs.base": 0x418,
              "tr.limit": 0x494, "cpl": 0x4CB, "efer": 0x4D0, "rflags": 0x570, "rsp": 0x5D8, "cr2": 0x640, "pat": 0x668}
    assert {name: v.FIELDS[name][0] for name in places} == places
    spans = sorted((offset, offset + code.size) for offset, code in v.FIELDS.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "fields overlap"
    assert v.intercept_bit(v.EXIT_INTR) == 1 and v.intercept_bit(v.EXIT_VMRUN) == 1 << 32


# ---- what the machine adds to guest mode
def test_sysenter_stays_inside_the_guest(path: str) -> None:
    box = Box(path, f"mov ecx, {0x9000}; mov edx, 0x30000; sysexit")
    box.vmcb["sysenter_cs"], box.vmcb["sysenter_esp"], box.vmcb["sysenter_eip"] = CODE0, 0x8000, 0x31000
    box.svm.vmload(VMCB)
    box.write(0x30000, asm("mov ebx, cs; sysenter", 0x30000))
    box.write(0x31000, asm("mov ecx, cs; hlt", 0x31000))
    assert box.run() == v.EXIT_HLT
    cpu = box.machine.cpu
    assert (cpu.gpr(RBX), cpu.gpr(RCX), box.vmcb["rsp"], box.vmcb["cpl"]) == (CODE0 + 16 | 3, CODE0, 0x8000, 0)
    assert (box.machine.snapshot().user, box.events()) == (2, {"entry": 1, "exit.hlt": 1})


@pytest.mark.parametrize(("access", "info"), [("rdmsr", 0), ("wrmsr", 1)])
def test_an_unknown_msr_exits_where_msrs_are_intercepted_and_faults_where_not(path: str, access: str, info: int) -> None:
    box = Box(path, f"mov ecx, 0x12345; {access}", v.EXIT_MSR)
    assert (box.run(), box.vmcb["exit_info_1"], box.vmcb["rip"]) == (v.EXIT_MSR, info, CODE + 5)
    box = Box(path, f"mov ecx, 0x12345; {access}", handlers={13: "hlt"})
    assert box.run() == v.EXIT_HLT
    assert box.vmcb["rip"] == Bench.handler(13)


def long_box(path: str, source: str, *exits: int, tlb: TlbConfig | None = None) -> Box:
    """A 64-bit guest: four-level tables with 2 MiB pages."""
    box = Box(path, "nop", *exits, tlb=tlb)
    ram, tables = box.machine.ram, FREE_FRAMES + 0x10000
    ram.write64(tables, tables + 0x1007)
    ram.write64(tables + 0x1000, tables + 0x2007)
    ram.write64(tables + 0x2000, GUEST | 0x87)
    box.write(CODE, asm(source, CODE, 64))
    box.vmcb.set_segment("cs", Segment(CODE0, 0, 0xFFFFFFFF, 0xAF9B00))
    box.vmcb["efer"], box.vmcb["cr3"], box.vmcb["cr4"] = 1 << 12 | 1 << 10 | 1 << 8, tables, 0x20
    return box


def test_cr8_of_a_masked_guest_is_its_own(path: str) -> None:
    box = long_box(path, "mov eax, 9; mov cr8, rax; xor eax, eax; mov rbx, cr8; hlt")
    box.vmcb["interrupt_control"] = v.V_INTR_MASKING
    assert box.run() == v.EXIT_HLT
    assert (box.machine.cpu.gpr(RBX), box.vmcb["interrupt_control"] & v.V_TPR, box.machine.lapic.tpr) == (9, 9, 0)


def test_cr8_of_an_unmasked_guest_is_the_physical_one(path: str) -> None:
    box = long_box(path, "mov eax, 9; mov cr8, rax; xor eax, eax; mov rbx, cr8; hlt")
    assert box.run() == v.EXIT_HLT
    assert (box.machine.cpu.gpr(RBX), box.machine.lapic.tpr) == (9, 0x90)


@pytest.mark.parametrize(("field", "source", "code"), [("intercept_cr_write", "mov cr8, rax", 0x18), ("intercept_cr_read", "mov rax, cr8", 0x08)])
def test_cr8_exits_where_it_is_intercepted(path: str, field: str, source: str, code: int) -> None:
    box = long_box(path, source)
    box.vmcb[field] = 1 << 8
    assert (box.run(), box.vmcb["rip"]) == (code, CODE)
