"""Instructions that the machine carries out itself, at a hook on their exact address.

Unicorn never faults IN and OUT, its RDTSC reads the host's clock, SYSENTER and SYSCALL do nothing, every MSR
exists, and CR8 is nobody's. See also :attr:`Machine.trapping`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from capstone import x86_const as x86_capstone
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.machine import state as hidden
from vmlab.machine import task
from vmlab.machine.cpu import ARITHMETIC, CF, IOPL, Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import GENERAL_PROTECTION, INVALID_OPCODE, PAGE_FAULT, Fault
from vmlab.machine.engine import IN_CALLBACK, OUT_CALLBACK
from vmlab.machine.msr import Msrs
from vmlab.machine.operands import effective_address, far_selector, number_of
from vmlab.machine.paging import CR4_BITS, NestedFault, PageFault
from vmlab.machine.state import HF_SHADOW, RAX, RCX, RDX
from vmlab.machine.svm_tasks import switch_in_guest
from vmlab.machine.syscalls import syscall, sysenter

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

CR4_TSD = 1 << 2

#: Names of :data:`vmlab.ledger.SYSTEM_INSTRUCTIONS` that :class:`Instructions` knows.
_CARRIED_OUT = frozenset({"in", "out", "ins", "outs", "rdtsc", "rdtscp", "rdmsr", "wrmsr", "sysenter", "syscall", "jmp_far", "call_far", "smsw"})
_WORD = 0xFFFFFFFFFFFFFFFF
_CR4, _CR8 = x86_capstone.X86_REG_CR4, x86_capstone.X86_REG_CR8


def carried_out(instruction: Instruction) -> bool:
    """Whether the machine has something to do at this instruction."""
    op = instruction.op
    if op in ("mov_to_cr", "mov_from_cr"):
        return any(operand.reg == _CR8 or (operand.reg == _CR4 and op == "mov_to_cr") for operand in instruction.cs.operands)
    return op in _CARRIED_OUT or (op == "mov_to_seg" and instruction.cs.operands[0].reg == x86_capstone.X86_REG_SS)


_PAGING_REGISTERS = {x86_capstone.X86_REG_CR0: 0, x86_capstone.X86_REG_CR3: 3, x86_capstone.X86_REG_CR4: 4}


def flushes(instruction: Instruction) -> bool:
    """Whether this instruction flushes a TLB, or a page of it."""
    return instruction.op == "invlpg" or (instruction.op == "mov_to_cr" and instruction.cs.operands[0].reg in _PAGING_REGISTERS)


class Instructions:
    """Each method of the table carries out one instruction; the window is loaded and RIP is at it."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._cpu = machine, machine.cpu
        self._by_op: dict[str, Callable[[int, Instruction], None]] = {
            "in": self._port, "out": self._port, "ins": self._string_port, "outs": self._string_port,
            "rdtsc": self._rdtsc, "rdtscp": self._rdtsc, "rdmsr": self._rdmsr, "wrmsr": self._wrmsr,
            **dict.fromkeys(task.INSTRUCTIONS, self._may_switch_tasks),
            "sysenter": self._sysenter, "syscall": self._syscall,
            "mov_to_cr": self._mov_to_cr8, "mov_from_cr": self._mov_from_cr8, "mov_to_seg": self._mov_to_ss,
            "smsw": self._smsw,
        }
        self.msrs = Msrs(machine)
        #: How many random numbers were taken.
        self.drawn = 0
        machine.engine.hook(uc_const.UC_HOOK_INSN, IN_CALLBACK, self._string_in, instruction=x86.UC_X86_INS_IN)
        machine.engine.hook(uc_const.UC_HOOK_INSN, OUT_CALLBACK, self._string_out, instruction=x86.UC_X86_INS_OUT)

    def carry_out(self, address: int, instruction: Instruction) -> None:
        """The instruction at linear ``address`` is about to run: do it, or fault, or let Unicorn do it."""
        op, cpu = instruction.op, self._cpu
        assert op is not None
        cpu.load()
        cpu.rip = address - cpu.segment(hidden.CS).base
        if op in self._machine.trapping and cpu.cpl > 0:
            self._fault(address, GENERAL_PROTECTION, 0)
        elif flushes(instruction):
            if op == "mov_to_cr" and self._refuses_cr4(instruction):
                self._fault(address, GENERAL_PROTECTION, 0)
            else:
                self._note_flush(instruction)
        elif op in self._by_op:
            try:
                self._by_op[op](address, instruction)
            except Fault as fault:
                self._fault(address, fault.vector, fault.error_code)
            except (PageFault, NestedFault) as fault:
                self._memory_fault(address, fault)

    def _may_switch_tasks(self, address: int, instruction: Instruction) -> None:
        """A far transfer: Unicorn carries it out, unless it is a task switch that exits, or a far JMP or CALL to a task.

        Unicorn's own saves and loads stale flags and refuses a conforming code segment of an inner ring.
        """
        cpu, machine = self._cpu, self._machine
        if self._intercepted(address, str(instruction.op), instruction) or instruction.op == "iret":
            return
        try:
            found = task.wanted(cpu, instruction, far_selector(cpu, instruction))
        except (PageFault, NestedFault):
            return              # Unicorn comes upon it as well
        if found is not None:
            selector, reason = found
            change = switch_in_guest if machine.in_guest else task.switch
            change(cpu, selector, None, cpu.rip + instruction.size & 0xFFFFFFFF, reason)
            self._transferred(address)

    def _mov_to_ss(self, address: int, instruction: Instruction) -> None:
        """In 64-bit code above ring 3 a null SS may be loaded, with the ring as its RPL (SDM Vol. 2, MOV): Unicorn does not look at that."""
        cpu, source = self._cpu, instruction.cs.operands[1]
        if not cpu.hflags & hidden.HF_CS64:
            return
        if source.type == x86_capstone.X86_OP_REG:
            selector = cpu.gpr(number_of(source.reg)) & 0xFFFF
        else:
            try:
                pieces = cpu.pieces(effective_address(cpu, instruction, source), 2, write=False, user=cpu.cpl == 3)
            except (PageFault, NestedFault):
                return              # Unicorn comes upon it as well
            selector = int.from_bytes(b"".join(self._machine.engine.uc.mem_read(at, n) for at, n in pieces), "little")
        if not selector & 0xFFFC and selector != cpu.cpl:
            raise Fault(GENERAL_PROTECTION, 0)

    def _smsw(self, address: int, instruction: Instruction) -> None:
        """Into a 32-bit register SMSW stores the whole of CR0 (APM Vol. 3); Unicorn does so in 64-bit code only."""
        machine, target = self._machine, instruction.cs.operands[0]
        wide = target.type == x86_capstone.X86_OP_REG and target.size == 4 and not self._cpu.hflags & hidden.HF_CS64
        if wide and not (machine.in_guest and machine.guest_mode is not None and machine.guest_mode.watches_cr0()):
            self._cpu.set_gpr(number_of(target.reg), self._cpu.cr(0))
            self._complete(address, instruction)

    def undefined(self, address: int) -> None:
        """Unicorn would run it, and no CPU does."""
        self._cpu.load()
        self._cpu.rip = address - self._cpu.segment(hidden.CS).base
        self._fault(address, INVALID_OPCODE, None)

    def draw(self, address: int, instruction: Instruction) -> None:
        """RDRAND and RDSEED: the next number of a sequence that is the same in every run. Unicorn asks the host for one."""
        cpu = self._cpu
        cpu.load()
        cpu.rip = address - cpu.segment(hidden.CS).base
        self.drawn += 1
        size = instruction.cs.operands[0].size
        cpu.set_gpr(number_of(instruction.cs.operands[0].reg), _mixed(self.drawn), size)
        cpu.eflags = cpu.eflags & ~ARITHMETIC | CF      # a number is always there
        self._complete(address, instruction)

    def search_element(self, instruction: Instruction) -> None:
        """Before each element of REP SCAS or CMPS. Blocks do not tell their number: unless ECX is used up, the flags end them."""
        self._cpu.load()
        if self._cpu.gpr(RCX) & ((1 << (8 * instruction.cs.addr_size)) - 1):
            self._machine.events["machine.string"] += 1

    def _refuses_cr4(self, instruction: Instruction) -> bool:
        """A bit that this CPU does not have raises #GP (SDM Vol. 3A §2.5); Unicorn takes any. Not where an intercept or the ring comes first."""
        cpu, machine = self._cpu, self._machine
        if instruction.cs.operands[0].reg != _CR4 or cpu.cpl or not cpu.gpr(_general_register(instruction)) & ~CR4_BITS & _word(cpu):
            return False
        return not machine.in_guest or machine.guest_mode is None or machine.guest_mode.lets_flush("mov_to_cr", 4)

    def _note_flush(self, instruction: Instruction) -> None:
        """For the TLB model: Unicorn carries the instruction out, unless its ring or an intercept forbids it."""
        machine, operand = self._machine, instruction.cs.operands[0]
        if machine.accesses is None or self._cpu.cpl:
            return
        number = 0 if instruction.op == "invlpg" else _PAGING_REGISTERS[operand.reg]
        if not machine.in_guest or machine.guest_mode is None or machine.guest_mode.lets_flush(str(instruction.op), number):
            machine.accesses.about_to_flush(instruction)

    # ---- how an instruction ends
    def _memory_fault(self, address: int, fault: PageFault | NestedFault) -> None:
        """It needed memory (an I/O bitmap) that is not there."""
        machine = self._machine
        if machine.in_guest and machine.guest_mode is not None and machine.guest_mode.memory_fault(fault):
            machine.counter.leave(address)
            machine.make_rip_count()
            return
        assert isinstance(fault, PageFault)
        self._cpu.cr2 = fault.address
        self._fault(address, PAGE_FAULT, fault.error_code)

    def _complete(self, address: int, instruction: Instruction) -> None:
        """It retired, and the next one follows."""
        self._machine.counter.leave(address, retired=True)
        self._cpu.rip += instruction.size
        self._cpu.hflags &= ~HF_SHADOW
        self._machine.make_rip_count()

    def _fault(self, address: int, vector: int, error_code: int | None) -> None:
        exceptions = self._machine.exceptions
        exceptions.faulting = self._machine.counter.leave(address)
        exceptions.take(vector, error_code)
        self._machine.make_rip_count()

    def _intercepted(self, address: int, op: str, instruction: Instruction) -> bool:
        """In guest mode: True when this instruction made the CPU exit instead."""
        machine = self._machine
        if not machine.in_guest or machine.guest_mode is None or not machine.guest_mode.intercepts(op, instruction):
            return False
        machine.counter.leave(address)
        machine.guest_mode.exited()
        machine.make_rip_count()
        return True

    # ---- ports
    def _port(self, address: int, instruction: Instruction) -> None:
        op = instruction.op
        assert op is not None
        if not self._io_allowed(instruction):
            raise Fault(GENERAL_PROTECTION, 0)
        if not self._intercepted(address, op, instruction):
            port, size = port_operands(instruction, self._cpu)
            self._machine.counter.leave(address, retired=True)  # first, so that the device sees the time
            if op == "in":
                self._cpu.set_gpr(RAX, self._machine.port_read(port, size), size)
            else:
                self._machine.port_write(port, size, self._cpu.gpr(RAX))
            self._complete(address, instruction)

    def _string_port(self, address: int, instruction: Instruction) -> None:
        """INS and OUTS run on Unicorn, which asks for each element; only their rights are the machine's to check."""
        op = instruction.op
        assert op is not None
        if not self._io_allowed(instruction):
            raise Fault(GENERAL_PROTECTION, 0)
        self._intercepted(address, op, instruction)

    def _io_allowed(self, instruction: Instruction) -> bool:
        """IOPL, then the TSS's I/O permission bitmap (SDM Vol. 1 §19.5)."""
        cpu = self._cpu
        if not cpu.cr(0) & 1 or cpu.cpl <= (cpu.system_flags & IOPL) >> 12:
            return True
        task = cpu.table("tr")
        port, size = port_operands(instruction, cpu)
        if task.limit < 0x67 or not task.flags & 0x800:
            return False
        base = int.from_bytes(cpu.read_linear(task.base + 0x66, 2), "little")
        if base + port // 8 + 1 > task.limit:
            return False
        bits = int.from_bytes(cpu.read_linear(task.base + base + port // 8, 2), "little")
        return not (bits >> (port % 8)) & ((1 << size) - 1)

    def _string_in(self, _uc: int, port: int, size: int, _data: int) -> int:
        try:
            return self._machine.port_read(port, size)
        except BaseException as failure:  # noqa: BLE001
            self._machine.fail(failure)
            return 0

    def _string_out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            self._machine.port_write(port, size, value)
        except BaseException as failure:  # noqa: BLE001
            self._machine.fail(failure)

    # ---- time
    def _rdtsc(self, address: int, instruction: Instruction) -> None:
        op, cpu = instruction.op, self._cpu
        assert op is not None
        if cpu.cr(4) & CR4_TSD and cpu.cpl > 0:
            raise Fault(GENERAL_PROTECTION, 0)
        if not self._intercepted(address, op, instruction):
            tsc = self._machine.read_tsc(address)
            cpu.set_gpr(RAX, tsc)
            cpu.set_gpr(RDX, tsc >> 32)
            if op == "rdtscp":
                cpu.set_gpr(RCX, self.msrs.tsc_aux)
            self._complete(address, instruction)

    # ---- model-specific registers: above ring 0 Unicorn raises #GP by itself
    def _rdmsr(self, address: int, instruction: Instruction) -> None:
        cpu = self._cpu
        if cpu.cpl or self._intercepted(address, "rdmsr", instruction):
            return
        value = self.msrs.read(cpu.gpr(RCX) & 0xFFFFFFFF, address)
        if value is not None:
            cpu.set_gpr(RAX, value)
            cpu.set_gpr(RDX, value >> 32)
            self._complete(address, instruction)

    def _wrmsr(self, address: int, instruction: Instruction) -> None:
        cpu = self._cpu
        if cpu.cpl or self._intercepted(address, "wrmsr", instruction):
            return
        if self.msrs.write(cpu.gpr(RCX) & 0xFFFFFFFF, cpu.gpr(RAX) & 0xFFFFFFFF | (cpu.gpr(RDX) & 0xFFFFFFFF) << 32, address):
            self._complete(address, instruction)

    # ---- system calls
    def _sysenter(self, address: int, instruction: Instruction) -> None:
        sysenter(self._cpu)
        self._transferred(address)

    def _syscall(self, address: int, instruction: Instruction) -> None:
        machine = self._machine
        syscall(self._cpu, self._cpu.rip + instruction.size)
        if machine.monitor is not None and not machine.in_guest:
            machine.events["trap.syscall"] += 1
        self._transferred(address)

    def _transferred(self, address: int) -> None:
        """The instruction retired and set RIP itself; it was fetched, and counts, in the ring that it left."""
        self._machine.counter.leave(address, retired=True)
        self._machine.make_rip_count()

    # ---- CR8, the task priority register of 64-bit mode (SDM Vol. 3A §10.8.6)
    def _mov_to_cr8(self, address: int, instruction: Instruction) -> None:
        if self._cpu.cpl or self._intercepted(address, "mov_to_cr", instruction):
            return
        value = self._cpu.gpr(_general_register(instruction))
        if value > 15:
            raise Fault(GENERAL_PROTECTION, 0)
        machine = self._machine
        machine.counter.leave(address, retired=True)
        if machine.in_guest and machine.guest_mode is not None and machine.guest_mode.virtual_tpr is not None:
            machine.guest_mode.virtual_tpr = value
        else:
            machine.lapic.set_tpr(value << 4)
        self._complete(address, instruction)

    def _mov_from_cr8(self, address: int, instruction: Instruction) -> None:
        if self._cpu.cpl or self._intercepted(address, "mov_from_cr", instruction):
            return
        machine = self._machine
        value = machine.guest_mode.virtual_tpr if machine.in_guest and machine.guest_mode is not None else None
        self._cpu.set_gpr(_general_register(instruction), machine.lapic.tpr >> 4 if value is None else value, 8)
        self._complete(address, instruction)


def _mixed(number: int) -> int:
    """The ``number``-th of a sequence of 64-bit numbers without visible pattern: SplitMix64 (Steele, Lea, Flood 2014, figure 17) from 0."""
    z = number * 0x9E3779B97F4A7C15 & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31


def _word(cpu: Cpu) -> int:
    return _WORD if cpu.hflags & hidden.HF_CS64 else 0xFFFFFFFF


def _general_register(instruction: Instruction) -> int:
    """The general register of MOV to or from a control register: ModRM.rm and REX.B."""
    return int(instruction.cs.modrm & 7 | (instruction.cs.rex & 1) << 3)


def port_encoding(instruction: Instruction) -> tuple[int | None, int, int]:
    """Of IN, OUT, INS or OUTS (SDM Vol. 2): the port, None where it is in DX; the size in bytes in code of 32 or 64 bits, and in code of 16."""
    opcode = instruction.cs.opcode[0]
    wide = 2 if 0x66 in bytes(instruction.cs.prefix) else 4
    sizes = (wide, 6 - wide) if opcode & 1 else (1, 1)
    return instruction.raw[-1] if opcode in (0xE4, 0xE5, 0xE6, 0xE7) else None, *sizes


def port_operands(instruction: Instruction, cpu: Cpu) -> tuple[int, int]:
    """(port, size in bytes) of IN, OUT, INS or OUTS, with the CPU at it."""
    port, size, size16 = port_encoding(instruction)
    return cpu.gpr(RDX) & 0xFFFF if port is None else port, size16 if instruction.bits == 16 else size
