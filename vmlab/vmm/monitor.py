"""A VMM over a deprivileged guest: what trap-and-emulate and binary translation have in common.

The guest's kernel at CPL 1, its users at CPL 3, on shadow tables that the VMM owns; exceptions decoded,
emulated or reflected; a virtual interrupt controller; interrupts injected when the virtual IF allows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import NoReturn

from vmlab.errors import GuestRefused
from vmlab.guests import GuestImage, boot
from vmlab.machine import task
from vmlab.machine.cpu import IF, Segment
from vmlab.machine.decode import Instruction, decode
from vmlab.machine.delivery import HAS_ERROR_CODE, Fault, deliver
from vmlab.machine.paging import CR4_PAE, EFER_NXE, PF_FETCH, PF_WRITE, PageFault
from vmlab.machine.pc import CR4_TSD, Machine, Stop, StopReason
from vmlab.machine.state import CS, DS, ES, FS, GS, SS
from vmlab.parameters import Value
from vmlab.strategies.base import GuestState, Strategy, visible_registers
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_tables import GuestMemory, GuestMmu
from vmlab.vmm.host import physical_bus
from vmlab.vmm.operands import fetch, reads_what_it_writes
from vmlab.vmm.platform import VirtualPlatform
from vmlab.vmm.shadow import Outcome, ShadowPager
from vmlab.vmm.space import GUEST_FRAMES, StaticSpace
from vmlab.vmm.stores import Stores
from vmlab.vmm.vcpu import KERNEL_RING, VirtualCpu

#: Flat ring-1 descriptors: what the VMM gives a guest that has not loaded its own GDT yet.
_FLAT_CODE = Segment(0x08 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9B00 | KERNEL_RING << 13)
_FLAT_DATA = Segment(0x10, 0, 0xFFFFFFFF, 0x00CF9300 | KERNEL_RING << 13)
_FLAT_STACK = Segment(0x10 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9300 | KERNEL_RING << 13)
_CR0 = 0x80010011                   # PG, WP, ET, PE
_CR0_UNITS = 0x2E                   # MP, EM, TS, NE
_CR4_UNITS = 0x10600                # OSFXSR, OSXMMEXCPT; FSGSBASE, whose instructions are nobody's secret


class DeprivilegingMonitor(Strategy):
    """Base of the techniques that run the guest's kernel at CPL 1. Subclasses say how instructions are handled."""

    #: CR4.TSD makes RDTSC trap outside ring 0, so that the guest's time can be virtual.
    trap_tsc = True
    true_selectors = False

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        super().__init__(machine, parameters)
        machine.monitor = self
        self.space = StaticSpace(machine.ram)
        self.mmu = GuestMmu(GuestMemory(machine.ram, GUEST_FRAMES, self.guest_memory), self.counts)
        self.platform_devices = VirtualPlatform(machine, physical_bus(machine, self.counts, self.chosen.get("hypervisor")), self.counts,
                                                self.mmu.memory)
        self.pager = ShadowPager(self.mmu, self.counts, scheme=str(self.chosen.get("memory", "static")), space=self.space,
                                 is_device=self.platform_devices.is_device)
        self.pager.on_foreign = self.mmu.memory.on_foreign = self.note_foreign
        self.vcpu = self.make_vcpu()
        self.platform_devices.on_interrupt_line = self.vcpu.note_interrupt_line
        self.emulator = self.make_emulator()
        self.emulator.registers.guards_user_pages = False       # its kernel runs above ring 0
        self.emulator.on_halt = self._halt
        self.emulator.registers.on_paging = self._registers_written
        self.emulator.registers.on_invlpg = self.pager.invlpg
        self.stores = Stores(machine, self.mmu, self.emulator, self.pager.drop_all)
        machine.on_attention = self.attend
        self._shadow_seen = 0           # when an interrupt was held back by the shadow of STI

    def make_vcpu(self) -> VirtualCpu:
        """The virtual CPU; techniques that keep more of it virtual make their own."""
        return VirtualCpu(self.machine.cpu, self.space, self.mmu, true_selectors=self.true_selectors)

    def make_emulator(self) -> Emulator:
        """What carries sensitive instructions out."""
        return Emulator(self.machine, self.vcpu, self.platform_devices, self.counts)

    # ---- loading
    def load(self, image: GuestImage, command_line: str) -> None:
        machine = self.machine
        begin = boot.start(image, command_line, self.guest_memory)
        for gpa, data in begin.pieces:
            self.mmu.memory.write(gpa, data)
        cpu = machine.cpu
        cpu.enter_protected(begin.rip, _FLAT_CODE, _FLAT_DATA)
        cpu.load()
        cpu.set_segment(SS, _FLAT_STACK)
        cpu.set_efer(EFER_NXE)
        self._cr4 = CR4_PAE | (CR4_TSD if self.trap_tsc else 0)
        cpu.set_cr(4, self._cr4)
        cpu.set_cr(3, self.pager.root)
        cpu.set_cr(0, _CR0)
        cpu.set_cpl(KERNEL_RING)
        cpu.eflags = 2 | IF
        for number, value in begin.registers.items():
            cpu.set_gpr(number, value)
        if begin.real_mode:
            self.start_in_real_mode(begin.rip)
        cpu.store()

    @abstractmethod
    def start_in_real_mode(self, rip: int) -> None:
        """The guest begins in real mode, at offset ``rip`` of a code segment whose base is 0 (see real_monitor.py)."""

    def frame_address(self, gpa: int) -> int:
        return GUEST_FRAMES + gpa

    # ---- exceptions
    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap out of the guest: the page and protection faults are the VMM's to look at first, the rest is the guest's."""
        if vector == 13:
            self.general_protection(error_code or 0)
        elif vector == 14:
            self.page_fault(error_code or 0)
        elif vector in (10, 11, 12):
            self.segment_fault(vector, error_code or 0)
        else:
            self.reflect(Fault(vector, error_code))
        self.follow_tables()

    def _registers_written(self, flush: bool) -> None:
        """The guest wrote CR0, CR3, CR4 or EFER: its x87 and SSE bits are the physical CPU's too, paging is the pager's."""
        self.pager.reload(flush)
        cpu, mmu = self.machine.cpu, self.mmu
        for number, value in ((0, _CR0 | mmu.cr0 & _CR0_UNITS), (4, self._cr4 | mmu.cr4 & _CR4_UNITS)):
            if cpu.cr(number) != value:
                cpu.set_cr(number, value)

    def follow_tables(self) -> None:
        """Let the physical CPU see what changed in its tables since it last ran."""
        if not self.pager.stale:
            return
        self.pager.stale = False
        self.machine.blocks.space_changed()
        if self.machine.cpu.cr(3) != self.pager.root:
            self.machine.cpu.set_cr(3, self.pager.root)     # which flushes the TLB
        else:
            self.machine.engine.flush_tlb()

    def general_protection(self, error_code: int) -> None:
        """#GP: a sensitive instruction to emulate, INT n through a closed gate, a stale shadow descriptor, or the guest's own."""
        instruction = self.decode_at(self.vcpu.rip)
        if instruction is None:
            self.reflect(Fault(13, error_code))
        elif instruction.op in ("int", "int3", "into", "int1"):
            self.software_interrupt(instruction)
        elif instruction.op is not None and self.emulator.knows(instruction.op):
            self.emulate(instruction)
        elif error_code & 0xFFFC and not error_code & 2 and self._refresh_descriptor(error_code):
            return
        else:
            self.reflect(Fault(13, error_code))

    def segment_fault(self, vector: int, error_code: int) -> None:
        """#TS, #NP, #SS: no descriptor of a task is present in the shadow; others may be stale. Else the guest's own."""
        instruction = self.decode_at(self.vcpu.rip)
        if instruction is not None and instruction.op in task.INSTRUCTIONS:
            self.emulate(instruction)
        elif not error_code & 0xFFFC or error_code & 2 or not self._refresh_descriptor(error_code):
            self.reflect(Fault(vector, error_code))

    def _switch_task(self, _vector: int, selector: int, error_code: int | None, return_rip: int) -> None:
        task.switch(self.vcpu, selector, error_code, return_rip)

    def decode_at(self, rip: int) -> Instruction | None:
        """Fetch and decode the instruction at a linear address of the guest."""
        self.counts["vmm.decode"] += 1
        known = self.machine.faulting
        if known is not None:  # the machine already decoded this block; same bytes, no second fetch
            return known
        bits = self.vcpu.bits
        return decode(fetch(self.vcpu, rip if bits == 64 else (self.vcpu.segment(CS).base + rip) & 0xFFFFFFFF), bits)

    def emulate(self, instruction: Instruction) -> None:
        """Carry one instruction out on the virtual CPU, or reflect what it would have raised."""
        try:
            self.emulator.emulate(instruction)
        except Fault as fault:
            self.reflect(fault)
        else:
            self.inject_pending()

    def software_interrupt(self, instruction: Instruction) -> None:
        """INT n at the virtual CPU's RIP."""
        vcpu = self.vcpu
        vector = {"int3": 3, "into": 4, "int1": 1}.get(instruction.op or "", instruction.raw[-1])
        at, user = vcpu.rip, vcpu.cpl == 3
        self.counts["vmm.inject"] += 1
        delivered = deliver(vcpu, vector, software=instruction.op != "int1", return_rip=at + instruction.size, fault_rip=at,
                            on_task=self._switch_task)
        if delivered == vector:
            self.emulator.count("int" if instruction.op == "int" else instruction.op or "int", user)
        else:
            self.counts[f"reflect.{delivered}"] += 1

    def _refresh_descriptor(self, error_code: int) -> bool:
        """The guest may have written its GDT since the shadow was made: copy the entry and let it retry."""
        index = error_code >> 3
        if error_code & 4 or 8 * index + 7 > self.vcpu.gdt.limit:
            return False
        if not self.vcpu.shadow_descriptor(index):
            return False
        self.counts["vmm.shadow_descriptor"] += 1
        return True

    def page_fault(self, error_code: int) -> None:
        """#PF: hidden (the shadow lacked it), a store to a traced table, a reach for the VMM's pages, or the guest's own."""
        address = self.machine.cpu.cr2
        if error_code & PF_WRITE and self.space.in_hole(address) and self._mark_accessed(address):
            return
        if not self.mmu.paging and self.space.in_hole(address):
            self.refuse(f"{'store to' if error_code & PF_WRITE else 'fetch from' if error_code & PF_FETCH else 'access to'} "
                        f"the VMM's memory at {address:#x}")
        write = bool(error_code & PF_WRITE)
        if write and self.space.in_hole(address):
            # Only the VMM has a page there, which may be read: on the bare machine what reads before it writes faults reading.
            instruction = self.decode_at(self.vcpu.rip)
            write = instruction is None or not reads_what_it_writes(instruction)
        try:
            outcome = self.pager.fault(address, write=write, user=self.vcpu.cpl == 3,
                                       fetch=bool(error_code & PF_FETCH))
        except PageFault as fault:
            self.counts["shadow.fault.true"] += 1
            self.reflect(Fault(14, fault.error_code, fault.address))
            return
        if outcome is not Outcome.HIDDEN:
            self.carry_out(address)

    def _mark_accessed(self, address: int) -> bool:
        """Whether the CPU was about to note in a shadow descriptor that it is used; then that is done, and the load runs again."""
        try:
            noted = self.vcpu.mark_accessed(address)
        except PageFault as fault:
            self.reflect(Fault(14, fault.error_code, fault.address))
            return True
        self.counts["vmm.shadow_descriptor"] += noted
        return noted

    def carry_out(self, address: int) -> None:
        """The instruction at RIP accesses ``address``, where the CPU must not: the VMM does all of it."""
        instruction = self.decode_at(self.vcpu.rip)
        if instruction is None:
            raise AssertionError(f"the instruction at {self.vcpu.rip:#x} accessed {address:#x}, and cannot be decoded")
        at = self.vcpu.rip
        try:
            self.stores.carry_out(self.vcpu, instruction, address)
        except Fault as fault:
            self.reflect(fault)
            return
        if self.vcpu.shadow_at == at:
            self.vcpu.shadow_at = None
        self.inject_pending()

    def note_foreign(self, gpa: int, verb: str = "mapped") -> None:
        """The guest reached for a frame that is not its own: it sees an empty bus."""
        self.refused.append(f"the guest at {self.vcpu.rip:#x} {verb} guest-physical {gpa:#x}, "
                            f"beyond its {self.guest_memory >> 20} MiB; nothing answers there")
        self.counts["safety.refused"] += 1

    def refuse(self, what: str) -> NoReturn:
        """End a guest that reached for what is not its own."""
        message = f"the guest at {self.vcpu.rip:#x} was refused: {what}"
        self.refused.append(message)
        self.counts["safety.refused"] += 1
        raise GuestRefused(message)

    def reflect(self, fault: Fault) -> None:
        """Give the guest the exception that is its own, through its own IDT."""
        if fault.vector == 14 and fault.address is not None:
            self.vcpu.cr2 = fault.address
        error_code = fault.error_code
        if error_code is None and fault.vector in HAS_ERROR_CODE:
            error_code = 0
        self.counts["vmm.inject"] += 1
        delivered = deliver(self.vcpu, fault.vector, error_code, on_task=self._switch_task)
        self.counts[f"reflect.{delivered}"] += 1

    # ---- interrupts
    def interrupt(self) -> None:
        """A physical interrupt: pass it to the virtual controller, and to the guest if it may be."""
        self.platform_devices.physical_interrupt()
        self.inject_pending()
        self.follow_tables()

    def deliver_interrupt(self, vector: int) -> None:
        self.platform_devices.pic.set_line((vector - self.platform_devices.pic.master.base) & 7, True)
        self.machine.request_attention(True)

    def inject_pending(self) -> bool:
        """Inject a pending virtual interrupt if the guest accepts one now; else see to it that we are asked again."""
        vcpu = self.vcpu
        if not self.platform_devices.pending:
            self.machine.request_attention(False)
            return False
        if not vcpu.interrupts_enabled:
            self.machine.request_attention(False)
            return False
        if vcpu.shadow_at is not None:
            self._shadow_seen = self.machine.time
            self.counts["interrupt.window"] += 1
            self.machine.request_attention(True)
            return False
        self.machine.request_attention(False)
        self.inject(self.platform_devices.acknowledge())
        return True

    def inject(self, vector: int) -> None:
        """Enter the guest's handler for an external interrupt."""
        self.counts["interrupt.injected"] += 1
        self.counts["vmm.inject"] += 1
        deliver(self.vcpu, vector, external=True, on_task=self._switch_task)

    def attend(self) -> bool:
        """The machine asks at a block's start, because :meth:`inject_pending` wanted it; True when RIP moved."""
        vcpu = self.vcpu
        if vcpu.shadow_at is not None:
            # Still there, and not there again: the instruction behind STI may be a jump to itself.
            if vcpu.shadow_at == vcpu.rip and self.machine.time == self._shadow_seen:
                return False
            vcpu.shadow_at = None
        injected = self.inject_pending()
        self.follow_tables()
        return injected

    def _halt(self) -> None:
        """HLT: the VMM halts until something is pending for the guest; the run is over when nothing can wake it."""
        self.vcpu.shadow_at = None
        self.machine.idle()
        if not (self.vcpu.interrupts_enabled and self.platform_devices.wait()) and self.machine.ending is None:
            self.machine.stop(Stop(StopReason.HALTED))

    # ---- state
    def guest_state(self) -> GuestState:
        cpu, vcpu = self.machine.cpu, self.vcpu
        cpu.load()
        return GuestState(
            gpr=visible_registers(cpu.gpr, vcpu.long_mode), rip=vcpu.rip, eflags=vcpu.eflags,
            selectors=tuple(vcpu.selector(i) for i in (ES, CS, SS, DS, FS, GS)),
            cr0=vcpu.cr(0), cr2=vcpu.cr2, cr3=vcpu.cr(3), cr4=vcpu.cr(4),
            gdt=(vcpu.gdt.base, vcpu.gdt.limit), idt=(vcpu.idt.base, vcpu.idt.limit),
        )
