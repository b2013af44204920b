"""The PC, wired explicitly: CPU, RAM, interrupt controller, serial port, debug exit, counter.

Who takes exceptions and interrupts? With no monitor, the guest: through the IDT in machine memory. With
a :class:`Monitor` (a VMM), the monitor: its Python methods are the handlers that a real VMM keeps
behind its own IDT. Either way the CPU got there by a real exception at a real privilege level.
"""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.errors import ConfigError, GuestBudget, GuestError, TripleFault, UnsupportedHost
from vmlab.ledger import EXCEPTIONS, Counts, Snapshot
from vmlab.machine import state as hidden
from vmlab.machine.counter import Block, Counter, Tags, block_hook
from vmlab.machine.cpu import CF, IF, IOPL, OF, Cpu
from vmlab.machine.decode import Instruction, decode_block
from vmlab.machine.delivery import Fault, deliver
from vmlab.machine.devices import DebugExit, PicPair, PortBus, Uart
from vmlab.machine.engine import CODE_CALLBACK, EDGE_CALLBACK, IN_CALLBACK, INTR_CALLBACK, INVALID_CALLBACK, OUT_CALLBACK, Engine
from vmlab.machine.memory import Ram
from vmlab.machine.state import HF_CS32, HF_CS64, HF_SHADOW, RAX, RCX, RDX

UART_PORT, UART_IRQ, DEBUG_EXIT_PORT = 0x3F8, 4, 0xF4
#: Virtual time stamp counter: ticks per guest instruction. One is as good as another; one is simple.
TSC_PER_INSTRUCTION = 1
CR4_TSD = 1 << 2

#: Instructions that the machine carries out itself, at a hook on their exact address: Unicorn never
#: faults IN/OUT, and its RDTSC reads the host's clock.
_MACHINE_OPS = frozenset({"in", "out", "ins", "outs", "rdtsc", "rdtscp"})


class StopReason(enum.Enum):
    """Why :meth:`Machine.run` returned."""

    EXIT = "the guest ended its run"
    HALTED = "the CPU halted with nothing left to wake it"
    REQUESTED = "the monitor asked for it"


@dataclass(frozen=True)
class Stop:
    """The end of a run: why, and the guest's exit code where it gave one."""

    reason: StopReason
    exit_code: int | None = None


class Monitor(Protocol):
    """What the machine asks of a VMM. State is loaded before and stored after every call."""

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """A trap: RIP at the faulting instruction, or for INT n (``software``) past it."""

    def interrupt(self) -> None:
        """The INTR line is up and the CPU took it; RIP is where the guest would have gone on."""


class GuestMode(Protocol):
    """What the machine asks of its AMD-V (svm.py) while the CPU is in guest mode. State is loaded before every call."""

    def exit(self, code: int, info_1: int = 0, info_2: int | None = None) -> None:
        """#VMEXIT: the guest into the VMCB, the host into the CPU, and the end of the run."""

    def intercepts(self, op: str, instruction: Instruction) -> bool:
        """Whether this instruction exits instead of being carried out; if so, it just did."""

    def lets_interrupts_in(self) -> bool:
        """Whether the CPU recognises a physical interrupt now, in guest mode or out of it."""

    def takes_interrupt(self) -> bool:
        """A physical interrupt in guest mode: True when it made an exit, False when it is the guest's own."""

    def deliver_injected(self) -> bool:
        """Deliver what VMRUN was told to inject, if that is still to do; it comes before anything else."""

    def deliver(self, vector: int, error_code: int | None, *, software: bool = False, external: bool = False,
                fault_rip: int | None = None) -> int | None:
        """Through the guest's IDT: the vector delivered, or None when the attempt ended in an exit."""


#: Above this, the number that Unicorn's exception hook gets is an exit code (QEMU: EXCP_VMEXIT).
_VMEXIT = 0x100


class Machine:
    """One emulated PC. ``path`` says how its CPU is reached: "portable" or "fast"."""

    def __init__(self, ram_size: int = 64 << 20, path: str | None = None) -> None:
        wanted = path or os.environ.get("VMLAB_MACHINE", "auto")
        if wanted not in ("portable", "fast", "auto"):
            raise ConfigError(f"VMLAB_MACHINE: {wanted!r} is not one of portable, fast, auto")
        self.engine = Engine()
        self.ram = Ram(self.engine, ram_size)
        self._prime()
        layout = hidden.calibrate()
        address = None if wanted == "portable" else hidden.live_address(self.engine, layout)
        window: hidden.Window = (hidden.ContextWindow(self.engine, layout) if address is None
                                 else hidden.LiveWindow(address, layout.size))
        self.cpu = Cpu(self.engine, self.ram, window, layout)
        self.cpu.reset()
        self.events = Counts("machine")
        self.monitor: Monitor | None = None
        self.console = bytearray()
        #: Device writes in order, without times: part of the guest-visible outcome.
        self.device_log: list[tuple[int, int, int]] = []

        self._attention = self._requested = False
        self.ports = PortBus()
        self.pic = PicPair(self._interrupt_line)
        self.pic.attach(self.ports)
        self.uart = Uart(lambda level: self.pic.set_line(UART_IRQ, level), self.console.append)
        self.ports.attach(self.uart, UART_PORT, 8)
        self.ports.attach(DebugExit(self._guest_exit), DEBUG_EXIT_PORT, 1)

        #: Called with the page-in-question block's address; a translator answers with what its code stands for.
        self.tagger: Callable[[int, list[Instruction]], Tags | None] = lambda pc, instructions: None
        #: System instructions that raise #GP above CPL 0 on this CPU though x86 lets them pass.
        self.trapping: Collection[str] = frozenset()
        #: What a guest-mode CPU (AMD-V) does about an instruction or interrupt before it happens; see svm.py.
        self.guest_mode: GuestMode | None = None
        #: The time stamp counter's offset (a VMM may hide its own time; TSC_OFFSET of AMD-V).
        self.tsc_offset = 0
        #: The instruction that just faulted, as decoded before its block first ran (None: not known).
        self.faulting: Instruction | None = None
        #: A monitor that asked by :meth:`request_attention` is called at block starts; True when it moved RIP.
        self.on_attention: Callable[[], bool] = lambda: False
        self._watched: dict[int, Callable[[int], None]] = {}
        self._gates: dict[int, Callable[[], None]] = {}
        self._hooked: dict[int, tuple[int, Instruction | None]] = {}
        self._stop: Stop | None = None
        self._failure: BaseException | None = None

        self.counter = self._wire_counter(wanted, address)
        engine = self.engine
        engine.hook(uc_const.UC_HOOK_INTR, INTR_CALLBACK, self._on_exception)
        engine.hook(uc_const.UC_HOOK_INSN_INVALID, INVALID_CALLBACK, self._on_invalid)
        engine.hook(uc_const.UC_HOOK_EDGE_GENERATED, EDGE_CALLBACK, self._on_new_code)
        engine.hook(uc_const.UC_HOOK_INSN, IN_CALLBACK, self._string_in, instruction=x86.UC_X86_INS_IN)
        engine.hook(uc_const.UC_HOOK_INSN, OUT_CALLBACK, self._string_out, instruction=x86.UC_X86_INS_OUT)

    def _prime(self) -> None:
        """Run two jumps: Unicorn never reports the very first block that it translates."""
        self.ram.write(0, b"\xeb\x00\xeb\x00\xf4")
        self.engine.start(0)
        self.ram.write(0, bytes(5))
        self.engine.remove_blocks(0, 16)
        self.engine.uc.ctl_flush_tb()

    def _wire_counter(self, wanted: str, address: int | None) -> Counter:
        if wanted != "portable":
            from vmlab.machine import fast
            native = fast.connect(self, address)
            if native is not None:
                self.path = "fast"
                return native
            if wanted == "fast":
                raise UnsupportedHost("VMLAB_MACHINE=fast, but the fast path is not available here: " + fast.why_not())
        self.path = "portable"
        counter = Counter(lambda: self._load_cpl())
        self.engine.hook(uc_const.UC_HOOK_BLOCK, CODE_CALLBACK, block_hook(counter, self._attend, self._fail))
        return counter

    def _load_cpl(self) -> int:
        self.cpu.load()
        return self.cpu.cpl

    # ---- running
    @property
    def time(self) -> int:
        """Virtual time: guest instructions executed so far, by whatever means."""
        return self.counter.time

    def run(self, budget: int | None = None) -> Stop:
        """Let the CPU go on from its RIP until something ends the run.

        :param budget: guest instructions, from the machine's start, that may not be exceeded.
        :raises GuestBudget: when the budget was spent.
        :raises TripleFault: when the CPU shut down.
        """
        if budget is not None:
            self.counter.limit = budget
        self._stop = None
        stop = self._go_on()
        while stop is None:
            stop = self._go_on()
        self.counter.current = None
        return stop

    def _go_on(self) -> Stop | None:
        """Until the CPU stops once: why the run ends there, or None where it only waited in HLT."""
        self.cpu.load()
        self.counter.set_cpl(self.cpu.cpl)
        error = self.engine.start(self.cpu.rip)
        self.cpu.load()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._stop is None:
            if error:
                raise GuestError(f"the CPU could not go on at {self.cpu.rip:#x}: {self.engine.error_text(error)}")
            self._halted()
        return self._stop

    def stop(self, stop: Stop) -> None:
        """End the run at the next instruction boundary the CPU reaches (for monitors and devices)."""
        self._stop = stop
        self.engine.stop()

    @property
    def ending(self) -> Stop | None:
        """What ended the last run, or has been asked for since (a device that a monitor wrote to)."""
        return self._stop

    def _fail(self, failure: BaseException) -> None:
        """End the run with an error: nothing may leave a callback any other way."""
        if self._failure is None:
            self._failure = failure
        self.engine.stop()

    def _guest_exit(self, code: int) -> None:
        self.stop(Stop(StopReason.EXIT, code))

    def idle(self) -> None:
        """The CPU waits in HLT (a monitor calls this when it halts on its guest's behalf)."""
        self.events["idle"] += 1

    def _halted(self) -> None:
        """HLT was executed at CPL 0: wait for an interrupt, or for ever."""
        self.idle()
        if self._interrupt_enters():
            self._take_interrupt()
            self.cpu.store()
            return
        self._stop = Stop(StopReason.HALTED)

    # ---- watched addresses and gates
    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(address)`` whenever the instruction at this address is about to run; costs the guest nothing."""
        self._watched[address] = callback

    def gate(self, address: int, callback: Callable[[], None]) -> None:
        """A door from machine code into a monitor: reaching ``address`` calls ``callback``, which must move RIP."""
        self._gates[address] = callback

    # ---- blocks
    def _attend(self, pc: int, size: int) -> bool:
        """The rare cases of a block's start; True when the block may run and be counted now."""
        counter = self.counter
        if self._failure is not None or self._stop is not None:
            self.engine.stop()
            return False
        if self._attention and self._interruptible(pc, size):
            return False
        block = counter.blocks.get(pc << 16 | size)
        if block is None:
            running = counter.current
            if running is not None and running.pc < pc < running.end and pc - running.pc in running.offsets and not running.leads_to(pc):
                # The block overwrote itself: Unicorn broke it off at the storing instruction, which runs again, alone.
                counter.leave(pc)
            block = self._new_block(pc, size)
            if block is None:
                return False
        if counter.time + block.weight > counter.limit:
            self._fail(GuestBudget(f"the budget of {counter.limit} guest instructions was spent; the guest was at {pc:#x}"))
            return False
        return True

    def _new_block(self, pc: int, size: int) -> Block | None:
        """Decode a block before its first run; None when it must be translated again because of new hooks."""
        cpu = self.cpu
        cpu.load()
        bits = 64 if cpu.hflags & HF_CS64 else 32 if cpu.hflags & HF_CS32 else 16
        instructions = decode_block(cpu.read_linear(pc, size), bits)
        tags = self.tagger(pc, instructions)
        block = Block(pc << 16 | size, pc, size, instructions, tags)
        hooked = False
        for offset, i in block.offsets.items():
            if i < len(instructions) and self._drop_stale_hook(pc + offset, instructions[i]):
                hooked = True
            if i < len(instructions) and pc + offset not in self._hooked and self._wants_hook(pc + offset, instructions[i]):
                self._hook(pc + offset, instructions[i])
                hooked = True
        if hooked:
            base = cpu.segment(hidden.CS).base
            self.engine.remove_blocks(pc, pc + size)
            self.engine.write_register(x86.UC_X86_REG_RIP, pc - base)
            return None
        self.counter.add(block)
        return block

    def _drop_stale_hook(self, address: int, instruction: Instruction) -> bool:
        """The guest may have rewritten code in another length, which no check of known blocks sees; True if so."""
        hooked = self._hooked.get(address)
        if hooked is None or hooked[1] is None or hooked[1].raw == instruction.raw:
            return False
        self.engine.unhook(self._hooked.pop(address)[0])
        return True

    def _wants_hook(self, address: int, instruction: Instruction) -> bool:
        return (instruction.op in _MACHINE_OPS or instruction.op in self.trapping or instruction.search
                or address in self._watched or address in self._gates)

    def _hook(self, address: int, instruction: Instruction | None) -> None:
        handle = self.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, self._on_instruction, address, address)
        self._hooked[address] = (handle, instruction)

    def _on_new_code(self, _uc: int, block_at: object, _previous: int, _data: int) -> None:
        """Unicorn translated a block: if it replaces one that we know, the code may have changed."""
        try:
            pc, rest = block_at[0], block_at[1]  # type: ignore[index]
            size = (rest >> 16) & 0xFFFF
            old = self.counter.blocks.get(pc << 16 | size)
            if old is not None:
                self._check_code(old)
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)

    def _check_code(self, block: Block) -> None:
        raw = b"".join(instruction.raw for instruction in block.instructions)
        self.cpu.load()
        if self.cpu.read_linear(block.pc, len(raw)) != raw:
            self.forget_code(block.pc, block.end)

    def forget_code(self, start: int, end: int) -> None:
        """Code in ``start <= address < end`` was changed by the host or the guest: decode it anew."""
        for block in [b for b in self.counter.blocks.values() if b.pc < end and start < b.end]:
            self.counter.close(block)
        for address in [a for a in self._hooked if start <= a < end]:
            self.engine.unhook(self._hooked.pop(address)[0])
        self.engine.remove_blocks(start, end)

    # ---- instructions that the machine carries out itself
    def _on_instruction(self, _uc: int, address: int, _size: int, _data: int) -> None:
        try:
            if self._stop is not None or self._failure is not None:
                self.engine.stop()
                return
            watcher = self._watched.get(address)
            if watcher is not None:
                watcher(address)
            gate = self._gates.get(address)
            instruction = self._hooked[address][1]
            if gate is not None:
                self._begin(address)
                self.counter.leave(address)
                gate()
                self._end()
            elif instruction is not None and instruction.op is not None:
                self._system_instruction(address, instruction)
            elif instruction is not None and instruction.search:
                self._search_element(instruction)
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)

    def _search_element(self, instruction: Instruction) -> None:
        """Before each element of REP SCAS or CMPS. Blocks do not tell their number: unless ECX is used up, the flags end them."""
        self.cpu.load()
        if self.cpu.gpr(RCX) & ((1 << (8 * instruction.cs.addr_size)) - 1):
            self.events["machine.string"] += 1

    def _begin(self, address: int) -> None:
        self.cpu.load()
        self.cpu.rip = address - self.cpu.segment(hidden.CS).base

    def _end(self) -> None:
        """Inside a block or code hook: make RIP count, and with it the whole state."""
        self.cpu.store()
        self.counter.set_cpl(self.cpu.cpl)
        self.engine.write_register(x86.UC_X86_REG_RIP, self.cpu.rip)

    def _system_instruction(self, address: int, instruction: Instruction) -> None:
        op = instruction.op
        assert op is not None
        self._begin(address)
        cpu = self.cpu
        if op in self.trapping and cpu.cpl > 0:
            self._fault(address, 13, 0)
        elif op in ("in", "out", "ins", "outs"):
            if not self._io_allowed(instruction):
                self._fault(address, 13, 0)
            elif self._intercepted(address, op, instruction):
                return
            elif op in ("in", "out"):
                self._port_instruction(instruction)
                self._complete(address, instruction)
        elif op in ("rdtsc", "rdtscp"):
            if cpu.cr(4) & CR4_TSD and cpu.cpl > 0:
                self._fault(address, 13, 0)
            elif self._intercepted(address, op, instruction):
                return
            else:
                tsc = self.read_tsc(address)
                cpu.set_gpr(RAX, tsc)
                cpu.set_gpr(RDX, tsc >> 32)
                if op == "rdtscp":
                    cpu.set_gpr(RCX, 0)
                self._complete(address, instruction)

    @property
    def _in_guest(self) -> bool:
        """In guest mode the CPU delivers to the guest itself; a monitor hears only of exits."""
        return self.guest_mode is not None and bool(self.cpu.hflags & hidden.HF_GUEST)

    def _intercepted(self, address: int, op: str, instruction: Instruction) -> bool:
        """In guest mode: True when this instruction made the CPU exit instead."""
        if not self._in_guest or self.guest_mode is None or not self.guest_mode.intercepts(op, instruction):
            return False
        self.counter.leave(address)
        self._end()
        return True

    def _complete(self, address: int, instruction: Instruction) -> None:
        """The machine has carried out this instruction: it retired, and the next one follows."""
        self.counter.leave(address, retired=True)
        self.cpu.rip += instruction.size
        self.cpu.hflags &= ~HF_SHADOW
        self._end()

    def _fault(self, address: int, vector: int, error_code: int | None) -> None:
        self.faulting = self.counter.leave(address)
        self._take(vector, error_code, software=False)
        self._end()

    def read_tsc(self, address: int | None = None) -> int:
        """The time stamp counter: guest instructions completed, times :data:`TSC_PER_INSTRUCTION`."""
        time = self.counter.time
        block = self.counter.current
        if address is not None and block is not None:
            index = block.offsets.get(address - block.pc)
            if index is not None:
                time -= block.guest_weight_from(index)
        return (time * TSC_PER_INSTRUCTION + self.tsc_offset) & 0xFFFFFFFFFFFFFFFF

    def _io_allowed(self, instruction: Instruction) -> bool:
        """IOPL, then the TSS's I/O permission bitmap (SDM Vol. 1 §19.5)."""
        cpu = self.cpu
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

    def _port_instruction(self, instruction: Instruction) -> None:
        cpu = self.cpu
        port, size = port_operands(instruction, cpu)
        if instruction.op == "in":
            cpu.set_gpr(RAX, self.port_read(port, size), size)
        else:
            self.port_write(port, size, cpu.gpr(RAX))

    def port_read(self, port: int, size: int) -> int:
        """A read on the port bus."""
        self.events["io.device"] += 1
        return self.ports.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """A write on the port bus; also goes into the ordered log of device writes."""
        self.events["io.device"] += 1
        value &= (1 << (8 * size)) - 1
        self.device_log.append((port, size, value))
        self.ports.write(port, size, value)

    def _string_in(self, _uc: int, port: int, size: int, _data: int) -> int:
        try:
            return self.port_read(port, size)
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)
            return 0

    def _string_out(self, _uc: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            self.port_write(port, size, value)
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)

    # ---- exceptions and interrupts
    def _on_exception(self, _uc: int, vector: int, _data: int) -> None:
        try:
            if self._failure is not None:
                self.engine.stop()
                return
            cpu = self.cpu
            cpu.load()
            if vector >= _VMEXIT:
                self._exit_guest(vector - _VMEXIT)
                return
            software = cpu.is_software_interrupt and vector != 1
            counter = self.counter
            error_code = cpu.error_code if vector in (8, 10, 11, 12, 13, 14, 17) and not software else None
            cpu.forget_exception()
            if self._in_guest and self.guest_mode is not None and self.guest_mode.deliver_injected():
                counter.current = None
            elif software:
                last = counter.instruction_before(cpu.rip + cpu.segment(hidden.CS).base)
                self._software_interrupt(vector, last)
            else:
                self.faulting = self._leave()
                self._take(vector, error_code, software=False)
            cpu.store()
            counter.set_cpl(cpu.cpl)
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)

    def _leave(self) -> Instruction | None:
        """The instruction at RIP did not complete; returns it."""
        instruction = self.counter.leave(self.cpu.rip + self.cpu.segment(hidden.CS).base)
        if instruction is not None and instruction.search:
            self.events["machine.string"] -= 1  # this element was not looked at after all
        return instruction

    def _exit_guest(self, code: int) -> None:
        """The CPU itself found an intercept."""
        if self.guest_mode is None:
            raise UnsupportedHost(f"the CPU left a guest mode that the machine did not enter (exit code {code:#x})")
        self._leave()
        self.guest_mode.exit(code, self.cpu.error_code)
        self.cpu.store()
        self.counter.set_cpl(self.cpu.cpl)

    def _software_interrupt(self, vector: int, last: tuple[int, Instruction] | None) -> None:
        cpu = self.cpu
        start = cpu.rip - (last[1].size if last else 2)
        at = start + cpu.segment(hidden.CS).base
        if self.monitor is not None and vector not in self.direct_gates and not self._in_guest:
            if cpu.cpl <= self.software_gates.get(vector, 0):
                self.counter.leave(at, retired=True)
                self._take(vector, None, software=True)
            else:  # the monitor's gate is more privileged: #GP, the instruction did not retire
                cpu.rip = start
                self.faulting = self.counter.leave(at)
                self._take(13, vector * 8 + 2, software=False)
            return
        delivered = self._deliver(vector, None, software=True, fault_rip=start)
        self.counter.leave(at, retired=delivered == vector)
        if delivered == vector:
            self.events["interrupt.software"] += 1
        elif delivered is not None:
            self.events[f"fault.delivered.{delivered}"] += 1

    #: The monitor's IDT, as far as INT n is concerned: vector → DPL of its gate; all others have DPL 0.
    software_gates: dict[int, int] = {}  # noqa: RUF012 - replaced, never changed
    #: Vectors whose INT n goes through the IDT in machine memory though there is a monitor: its own choice of gate.
    direct_gates: frozenset[int] = frozenset()

    def _on_invalid(self, _uc: int, _data: int) -> bool:
        try:
            if self._failure is not None:
                return False
            cpu = self.cpu
            cpu.load()
            cpu.forget_exception()
            self.faulting = self.counter.leave(cpu.rip + cpu.segment(hidden.CS).base)
            self._take(6, None, software=False)
            cpu.store()
            self.counter.set_cpl(cpu.cpl)
            return True
        except BaseException as failure:  # noqa: BLE001
            self._fail(failure)
            return False

    def _deliver(self, vector: int, error_code: int | None, *, software: bool = False, external: bool = False,
                 fault_rip: int | None = None) -> int | None:
        """Through the IDT in machine memory; None when that made the CPU leave guest mode."""
        if self._in_guest and self.guest_mode is not None:
            return self.guest_mode.deliver(vector, error_code, software=software, external=external, fault_rip=fault_rip)
        return deliver(self.cpu, vector, error_code, software=software, external=external, fault_rip=fault_rip)

    def _take(self, vector: int, error_code: int | None, *, software: bool) -> None:
        """An exception goes to the monitor, or through the IDT."""
        if self.monitor is not None and not self._in_guest:
            name = "int" if software else EXCEPTIONS.get(vector, "mc")
            self.events[f"trap.{name}"] += 1
            self.monitor.exception(vector, error_code, software=software)
            return
        delivered = self._deliver(vector, error_code)
        if delivered is not None:
            self.events[f"fault.delivered.{delivered}"] += 1

    def _interrupt_line(self) -> None:
        self._update_attention()

    def request_attention(self, on: bool) -> None:
        """A monitor wants to be asked (``on_attention``) before the next block runs."""
        self._requested = on
        self._update_attention()

    def _update_attention(self) -> None:
        self._attention = self._requested or self.pic.pending
        self.counter_attention(self._attention)

    def counter_attention(self, on: bool) -> None:
        """Tell a counter kept outside Python that the next block start needs attention."""
        self.counter.attention = on

    def _interruptible(self, pc: int, size: int) -> bool:
        """At a block's start with INTR up, or a monitor that asked; True when RIP was moved."""
        cpu = self.cpu
        cpu.load()
        cpu.rip = pc - cpu.segment(hidden.CS).base
        in_string = self.counter.continues(pc + size)
        if self._interrupt_enters():
            self._take_interrupt()
        elif not (self._requested and self.on_attention()):
            return False
        if in_string:
            self.counter.interrupted_string()
        self.counter.current = None
        self._end()
        return True

    def _interrupt_enters(self) -> bool:
        """Whether INTR is up and the CPU takes it now."""
        if not self.pic.pending:
            return False
        if self.guest_mode is not None:
            return self.guest_mode.lets_interrupts_in()
        return bool(self.cpu.system_flags & IF) and not self.cpu.shadow

    def _take_interrupt(self) -> None:
        in_guest = self._in_guest
        if in_guest and self.guest_mode is not None and self.guest_mode.takes_interrupt():
            return
        self.events["interrupt.delivered"] += 1
        if self.monitor is not None and not in_guest:
            self.monitor.interrupt()
        else:
            self._deliver(self.pic.acknowledge(), None, external=True)

    # ---- what was counted
    def snapshot(self, upto: int | None = None) -> Snapshot:
        """All machine counts so far. ``upto``: the address about to run, when called from a watcher."""
        counted = self.counter.snapshot(upto)
        events = dict(counted.events)
        for kind, n in self.events.items():
            events[kind] = events.get(kind, 0) + n
        return Snapshot(events, counted.user, counted.kernel, counted.machine)


@functools.cache
def _scratch() -> Engine:
    engine = Engine()
    engine.uc.mem_map(0, 0x1000)
    engine.uc.mem_write(0, b"\x0f\xa2\xf4")
    return engine


@functools.cache
def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """(EAX, EBX, ECX, EDX) as the physical CPU answers CPUID: a VMM that emulates it executes it."""
    engine = _scratch()
    engine.write_register(x86.UC_X86_REG_RAX, leaf)
    engine.write_register(x86.UC_X86_REG_RCX, subleaf)
    engine.start(0)
    a, b, c, d = (engine.read_register(r) & 0xFFFFFFFF for r in (
        x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX))
    return a, b, c, d


def port_operands(instruction: Instruction, cpu: Cpu) -> tuple[int, int]:
    """(port, size in bytes) of IN, OUT, INS or OUTS (SDM Vol. 2)."""
    opcode = instruction.cs.opcode[0]
    wide = 2 if 0x66 in bytes(instruction.cs.prefix) else 4
    if not cpu.hflags & (HF_CS32 | HF_CS64):
        wide = 6 - wide
    size = wide if opcode & 1 else 1
    if opcode in (0xE4, 0xE5, 0xE6, 0xE7):
        return instruction.raw[-1], size
    return cpu.gpr(RDX) & 0xFFFF, size


__all__ = ["CF", "OF", "Fault", "Machine", "Monitor", "Stop", "StopReason", "TripleFault", "port_operands"]
