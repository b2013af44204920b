"""One guest instruction carried out by the VMM, whatever it is.

Some stores must not run on the physical CPU: those to a page table that is traced, and accesses to a device's registers
in memory. How an instruction writes memory is its own affair (PUSH, CALL, REP MOVS, LOCK CMPXCHG8B, a store across two
pages, a register pushed by ENTER …), so the VMM does not decode it: a second CPU executes exactly that one instruction in
the guest's own world. Its memory is guest-physical memory, its CR3 the guest's CR3, its rights the guest's, so that faults,
accessed and dirty bits come out as on the bare machine; every store is seen with its guest-physical address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

from unicorn import unicorn_const as uc_const

from vmlab.errors import GuestError
from vmlab.machine import state as hidden
from vmlab.machine.cpu import ARITHMETIC, DF, IOPL, Cpu, Segment
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import GENERAL_PROTECTION, HAS_ERROR_CODE, Fault
from vmlab.machine.engine import CODE_CALLBACK, INTR_CALLBACK, INVALID_CALLBACK, MEMORY_CALLBACK, Engine
from vmlab.machine.long_checks import canonical
from vmlab.machine.memory import FOUR_GIB, PAGE
from vmlab.machine.paging import EFER_LMA, PageFault
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, HF_CPL, HF_CS64, HF_LMA, HF_PE, RCX, SS
from vmlab.vmm.guest_tables import CR0_PE, GuestMmu

#: Instructions that load a segment register or a table, and may find in memory what they load.
LOADS = frozenset({"mov_to_seg", "pop_seg", "load_far", "jmp_far", "call_far", "ret_far", "iret", "ltr", "lldt", "lgdt", "lidt"})
#: Instructions that load or store one, besides.
_OF_TABLES = LOADS | {"sgdt", "sidt", "sldt", "str"}
_TABLES = ("gdt", "idt", "ldt", "tr")
_HF_TASK, _HF_FXSR = 7 << 9, 1 << 22        # MP, EM, TS of CR0; OSFXSR of CR4 (QEMU target/i386/cpu.h)
_CR4_OSFXSR = 1 << 9
_SVM_WORDS = 6                              # from vm_vmcb to nested_cr3
_UNITS = slice(hidden.AT_EFER + 8, None)    # x87, SSE and what lies behind EFER, up to the exception being taken


class SteppingCpu(Protocol):
    """The guest's CPU as :class:`SingleStep` reads and writes it: virtual or in a VMCB."""

    rip: int
    eflags: int
    cr2: int

    @property
    def cpl(self) -> int: ...

    def gpr(self, number: int) -> int: ...

    def set_gpr(self, number: int, value: int, size: int = 4) -> None: ...

    def segment(self, number: int) -> Segment: ...

    def set_segment(self, number: int, value: Segment) -> None: ...

    def table(self, name: str) -> Segment: ...

    def set_table(self, name: str, value: Segment) -> None: ...

    def set_cpl(self, cpl: int) -> None: ...


class SingleStep:
    """The second CPU. One per guest; made when it is first needed."""

    def __init__(self, machine: Machine, mmu: GuestMmu, *, on_foreign_write: Callable[[], None]) -> None:
        self._machine, self._mmu = machine, mmu
        #: A store whose second page could not be told: everything derived from tables must be doubted.
        self._on_foreign_write = on_foreign_write
        engine = self._engine = Engine()
        memory, ram = mmu.memory, machine.ram
        engine.uc.mem_map_ptr(0, memory.size, uc_const.UC_PROT_ALL, ram.address + memory.base)
        engine.uc.mmio_map(memory.size, FOUR_GIB - memory.size, self._device_read, None, self._device_write, None)
        self._layout = machine.cpu.layout
        self._window = hidden.ContextWindow(engine, self._layout)
        self._cpu = Cpu(engine, ram, self._window, self._layout)
        for kind, prototype, function in (
                (uc_const.UC_HOOK_CODE, CODE_CALLBACK, self._on_instruction), (uc_const.UC_HOOK_INTR, INTR_CALLBACK, self._on_exception),
                (uc_const.UC_HOOK_INSN_INVALID, INVALID_CALLBACK, self._on_invalid), (uc_const.UC_HOOK_MEM_WRITE, MEMORY_CALLBACK, self._on_write)):
            engine.hook(kind, prototype, function)
        self._known: dict[int, bytes] = {}
        self._at, self._begun = 0, False
        self._fault: Fault | None = None
        self._failure: BaseException | None = None
        self._stores: list[tuple[int, int]] = []
        self.elements = 0

    # ---- what the second CPU calls
    def _on_instruction(self, _uc: int, address: int, _size: int, _data: int) -> None:
        # The same instruction again: REP, or a store into its own page, which Unicorn breaks off and begins anew.
        if self._begun and address != self._at:
            self._engine.stop()
        self._begun = True

    def _on_write(self, _uc: int, _kind: int, gpa: int, size: int, _value: int, _data: int) -> bool:
        self._stores.append((gpa, size))
        return True

    def _on_exception(self, _uc: int, vector: int, _data: int) -> None:
        self._window.load()
        self._fault = Fault(vector, self._cpu.error_code if vector in HAS_ERROR_CODE else None, self._cpu.cr2 if vector == 14 else None)
        self._engine.stop()

    def _on_invalid(self, _uc: int, _data: int) -> bool:
        self._fault = Fault(6)
        self._engine.stop()
        return True

    def _device_read(self, _uc: object, offset: int, size: int, _data: object) -> int:
        try:
            return self._mmu.memory.read_device(self._mmu.memory.size + offset, size)
        except BaseException as failure:  # noqa: BLE001 - nothing may cross Unicorn's frames; step() raises it again
            self._failure = failure
            return 0

    def _device_write(self, _uc: object, offset: int, size: int, value: int, _data: object) -> None:
        try:
            self._mmu.memory.write_device(self._mmu.memory.size + offset, size, value)
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure

    # ---- one instruction
    def step(self, cpu: SteppingCpu, instruction: Instruction, near: int, *, own_tables: bool = False) -> None:
        """Execute ``instruction``, which is at ``cpu``'s RIP; :attr:`elements` says how many string elements it moved.

        Stores have been told to the guest's memory (:attr:`GuestMemory.on_write`) when this returns or raises.

        :param near: the linear address at which the physical CPU faulted.
        :param own_tables: the guest runs with segment registers and descriptor tables of its own, so that the instruction may load and store them.
        :raises Fault: what the guest's own machine would have raised; elements moved before it stay moved.
        """
        before = cpu.gpr(RCX)
        self._enter(cpu)
        tables = own_tables and instruction.op in _OF_TABLES
        if tables:
            self._enter_tables(cpu)
        self._at, self._begun = cpu.segment(CS).base + cpu.rip, False
        self._fault = self._failure = None
        self._stores.clear()
        self._forget_old_code(self._at, instruction)
        error = self._engine.start(cpu.rip)
        self._window.load()
        if self._failure is not None:
            raise self._failure
        if error and self._fault is None:
            raise GuestError(f"the instruction at {cpu.rip:#x} ({instruction.text}) reaches where no memory is: {self._engine.error_text(error)}")
        if self._refused(instruction):
            self._fault = Fault(GENERAL_PROTECTION, 0)
            raise self._fault
        self._leave(cpu)
        if tables and self._fault is None:
            self._leave_tables(cpu)
        for gpa, size in self._stores:
            self._tell(gpa, size, near)
        mask = (1 << (8 * instruction.cs.addr_size)) - 1
        self.elements = (before - cpu.gpr(RCX)) & mask if instruction.rep else int(instruction.string and self._fault is None)
        if self._fault is not None:
            raise self._fault

    def _enter(self, cpu: SteppingCpu) -> None:
        """The guest's registers into the second CPU."""
        main, own, window, mmu = self._machine.cpu, self._cpu, self._window, self._mmu
        ctypes.memmove(window.address, main.window.address, window.size)
        long_mode = bool(mmu.efer & EFER_LMA)
        own.forget_exception()
        own.hflags2 = 1     # GIF; nothing of guest mode
        own.hflags = ((HF_PE if mmu.cr0 & CR0_PE else 0) | (HF_LMA if long_mode else 0)
                      | (mmu.cr0 << 8) & _HF_TASK | (_HF_FXSR if mmu.cr4 & _CR4_OSFXSR else 0))
        u64 = window.u64
        for word in range(_SVM_WORDS):      # with #PF intercepted Unicorn leaves CR2 alone and stores the address at vm_vmcb, guest mode or not
            u64[self._layout.vm_vmcb // 8 + word] = 0
        u64[hidden.AT_EFER // 8] = mmu.efer
        at = hidden.AT_CR // 8
        u64[at], u64[at + 2], u64[at + 3], u64[at + 4] = mmu.cr0, cpu.cr2, mmu.cr3, mmu.cr4
        for number in range(6):
            own.set_segment(number, cpu.segment(number))
        for number in range(16 if long_mode else 8):
            own.set_gpr(number, cpu.gpr(number), 8)
        own.eflags = flags = cpu.eflags
        u64[hidden.AT_EFLAGS // 8] |= flags & (ARITHMETIC | DF)     # where Unicorn takes them from when it starts
        own.rip = cpu.rip
        own.hflags = own.hflags & ~(HF_CPL | IOPL) | cpu.cpl | own.system_flags & IOPL
        window.store()
        self._engine.flush_tlb()

    def _leave(self, cpu: SteppingCpu) -> None:
        """What an unprivileged instruction may change, back into the guest's CPU."""
        own, main = self._cpu, self._machine.cpu
        first, end = _UNITS.start, self._layout.error_code
        ctypes.memmove(main.window.address + first, self._window.address + first, end - first)
        for number in range(16 if self._mmu.efer & EFER_LMA else 8):
            cpu.set_gpr(number, own.gpr(number), 8)
        cpu.eflags = own.eflags
        cpu.rip = own.rip

    def _refused(self, instruction: Instruction) -> bool:
        """What a CPU refuses in 64-bit mode and Unicorn does not (vmlab.machine.long_checks, vmlab.machine.instructions): nothing has changed yet."""
        own = self._cpu
        if not own.hflags & HF_CS64:
            return False
        null_stack = instruction.op == "mov_to_seg" and not own.selector(SS) & 0xFFFC and own.selector(SS) != own.cpl
        return not canonical(own.rip) or null_stack     # a transfer to where nothing can be: its own #GP, or that of the fetch there

    def _enter_tables(self, cpu: SteppingCpu) -> None:
        """The descriptor tables that the instruction reads, loads or stores."""
        for name in _TABLES:
            self._cpu.set_table(name, cpu.table(name))
        self._window.store()

    def _leave_tables(self, cpu: SteppingCpu) -> None:
        """Segment registers, tables and ring as the instruction loaded them."""
        own = self._cpu
        for number in range(6):
            if own.segment(number) != cpu.segment(number):
                cpu.set_segment(number, own.segment(number))
        for name in _TABLES:
            loaded, before = own.table(name), cpu.table(name)
            if name == "tr":        # the cache keeps the type of an available TSS (vmlab.machine.task)
                loaded = loaded._replace(flags=loaded.flags & ~0x200)
            if loaded != before:
                cpu.set_table(name, loaded)
        if own.cpl != cpu.cpl:
            cpu.set_cpl(own.cpl)

    def _forget_old_code(self, address: int, instruction: Instruction) -> None:
        """The second CPU does not see what the first one writes: translate anew where the code has changed."""
        if self._known.get(address) != instruction.raw:
            self._engine.uc.ctl_flush_tb()
            self._known = {address: instruction.raw}

    def _tell(self, gpa: int, size: int, near: int) -> None:
        """Pass a store on. One across two pages is reported with the first one's address only."""
        first = min(size, PAGE - gpa % PAGE)
        memory = self._mmu.memory
        if memory.inside(gpa):
            memory.on_write(gpa, first)
        if first == size:
            return
        for page in (near & ~(PAGE - 1), (near & ~(PAGE - 1)) - PAGE):
            try:
                if self._mmu.translate(page, write=True) == gpa & ~(PAGE - 1):
                    second = self._mmu.translate(page + PAGE, write=True)
                    if memory.inside(second):
                        memory.on_write(second, size - first)
                    return
            except PageFault:
                continue
        self._on_foreign_write()
