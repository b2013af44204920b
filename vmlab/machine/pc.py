"""The PC, wired explicitly: every part it has, one a line, and the run loop.

Read :meth:`Machine.__init__` as the table of contents; each part's module says what it does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.errors import ConfigError, GuestError, UnsupportedHost
from vmlab.ledger import Counts, Snapshot
from vmlab.machine import state as hidden
from vmlab.machine.accesses import Accesses
from vmlab.machine.blocks import Blocks
from vmlab.machine.board import CLOCK_IRQ, DISK_IRQ, IDE_IRQ, KEYBOARD_IRQ, MOUSE_IRQ, PIT_IRQ, UART_IRQ, line, populate
from vmlab.machine.counter import Counter, Tags, block_hook
from vmlab.machine.cpu import Cpu
from vmlab.machine.cpuid import cpuid
from vmlab.machine.decode import Instruction
from vmlab.machine.devices import lapic
from vmlab.machine.devices.bus import PortBus
from vmlab.machine.devices.cmos import Cmos
from vmlab.machine.devices.disk import SECTOR, Disk
from vmlab.machine.devices.ide import Ide
from vmlab.machine.devices.ioapic import IoApic
from vmlab.machine.devices.keyboard import KeyboardController
from vmlab.machine.devices.pic import PicPair
from vmlab.machine.devices.pit import Pit
from vmlab.machine.devices.testdev import TestDevice
from vmlab.machine.devices.uart import Uart
from vmlab.machine.devices.vga import Vga
from vmlab.machine.dma import Dma
from vmlab.machine.engine import CODE_CALLBACK, Engine
from vmlab.machine.exceptions import Exceptions, Interrupts
from vmlab.machine.instructions import CR4_TSD, Instructions, port_operands
from vmlab.machine.memory import Ram
from vmlab.machine.protocols import GuestMode, InterruptSource, Monitor, Stop, StopReason
from vmlab.machine.timeline import Timeline
from vmlab.machine.tlb import TlbConfig

if TYPE_CHECKING:
    from vmlab.machine.fast_events import FastEvents

#: Virtual time stamp counter: ticks per nanosecond of virtual time. One is as good as another; one is simple.
TSC_PER_NANOSECOND = 1
_VAIN_EVENTS = 100_000
_FOR_EVER = 1 << 62


class Machine:
    """One emulated PC.

    :param path: how its CPU is reached: "portable", "fast" or "auto".
    :param disk: the content of its DMA disk, in whole sectors of 512 bytes; None: it has none.
    :param drives: of its IDE disks, likewise.
    :param guest_ram: bytes of RAM that its firmware notes for a guest to read; None: all of it.
    :param tlb: what to model of translation lookaside buffers and page walks; None: nothing, at no cost.
    """

    def __init__(self, ram_size: int = 64 << 20, path: str | None = None, *, disk: bytes | None = None,
                 drives: tuple[bytes, ...] = (), guest_ram: int | None = None, tlb: TlbConfig | None = None) -> None:
        wanted = path or os.environ.get("VMLAB_MACHINE", "auto")
        if wanted not in ("portable", "fast", "auto"):
            raise ConfigError(f"VMLAB_MACHINE: {wanted!r} is not one of portable, fast, auto")
        # What was counted, what the world saw, who is in charge.
        self.events = Counts("machine")
        self.console = bytearray()
        #: Each is told of each character that leaves the serial port, at once.
        self.console_listeners: list[Callable[[int], None]] = []
        #: A CPU that waits in HLT through so many due events, none of which wakes it, waits for ever.
        self.patience = _VAIN_EVENTS
        #: Device writes in order, without times: part of the guest-visible state.
        self.device_log: list[tuple[int, int, int]] = []
        #: What C does about events, where it does; None: all of them are Python's.
        self.native_events: FastEvents | None = None
        self._monitor: Monitor | None = None
        #: What a guest-mode CPU (AMD-V) does about an instruction or interrupt before it happens; see svm.py.
        self.guest_mode: GuestMode | None = None
        #: Called with a new block's address; a translator answers with what its code stands for.
        self.tagger: Callable[[int, list[Instruction]], Tags | None] = lambda pc, instructions: None
        #: System instructions that raise #GP above CPL 0 on this CPU though x86 lets them pass.
        self.trapping: Collection[str] = frozenset()
        self._software_gates: Mapping[int, int] = {}
        self._direct_gates: frozenset[int] = frozenset()
        #: The time stamp counter's offset (a VMM may hide its own time; TSC_OFFSET of AMD-V).
        self.tsc_offset = self._tsc_adjustment = 0
        #: Physical page frames that code was run from: whoever else writes there (DMA) must have it decoded anew.
        self.code_frames: set[int] = set()
        self._failure: BaseException | None = None
        self._ended: Stop | None = None
        self._idle_time = 0
        self._budget = _FOR_EVER
        self._stale_code = False
        self._running = self._interrupted = False
        self._broken_off = (-1, -1)

        self.engine = Engine()                                     # Unicorn
        self.ram = Ram(self.engine, ram_size)                      # physical memory
        self._prime()
        self.cpu, live = self._power_on(wanted)                    # registers, hidden ones included
        self.exceptions = Exceptions(self)                         # faults and INT n: to a monitor or through the IDT
        self.instructions = Instructions(self)                     # IN, OUT, RDTSC … which Unicorn leaves out
        self.blocks = Blocks(self, self.instructions)              # decoding, hooks on exact addresses
        self.timeline = Timeline(lambda: self.time, self._set_limit)  # what is due when
        self.ports = PortBus()                                     # I/O ports
        self.pic = PicPair(lambda: self.interrupts.update())       # two 8259A
        self.lapic = lapic.Lapic(self.timeline, self.pic, lambda: self.interrupts.update())  # local APIC, in memory
        self.intr: InterruptSource = self.lapic                    # what drives the CPU's INTR pin
        self.interrupts = Interrupts(self, self.exceptions)        # when INTR is taken
        self.ioapic = IoApic(self.lapic.message)                   # I/O APIC, in memory
        self.uart = Uart(line(self, UART_IRQ), self._transmitted)  # serial port
        self.pit = Pit(self.timeline, line(self, PIT_IRQ))         # 8254
        self.clock = Cmos(self.timeline, line(self, CLOCK_IRQ), guest_ram or ram_size)     # real-time clock and its memory
        self.keyboard = KeyboardController(line(self, KEYBOARD_IRQ), line(self, MOUSE_IRQ), self.reset)  # 8042
        self.vga = Vga(self.timeline)                              # display registers
        self.ide = Ide(self.timeline, line(self, IDE_IRQ), drives)  # two disks by programmed I/O
        self.test_device = TestDevice(lambda gpa: None)            # what kvm-unit-tests expects
        self.disk = None if disk is None else self._disk(disk)     # DMA block device
        self.counter = self._wire_counter(wanted, live)            # retired instructions, exactly; and who hears of exceptions
        self.accesses = None if tlb is None else Accesses(self, tlb)  # the TLB model, fed by what the CPU does
        populate(self)
        self._set_limit()

    def _prime(self) -> None:
        """Run two jumps: Unicorn never reports the very first block that it translates."""
        self.ram.write(0, b"\xeb\x00\xeb\x00\xf4")
        self.engine.start(0)
        self.ram.write(0, bytes(5))
        self.engine.remove_blocks(0, 16)
        self.engine.uc.ctl_flush_tb()

    def _power_on(self, wanted: str) -> tuple[Cpu, int | None]:
        """The CPU after reset, and the address of its state in this process where that is known and wanted."""
        layout = hidden.calibrate()
        address = None if wanted == "portable" else hidden.live_address(self.engine, layout)
        window: hidden.Window = (hidden.ContextWindow(self.engine, layout) if address is None
                                 else hidden.LiveWindow(address, layout.size))
        cpu = Cpu(self.engine, self.ram, window, layout)
        cpu.reset()
        return cpu, address

    def _wire_counter(self, wanted: str, address: int | None) -> Counter:
        if wanted != "portable":
            from vmlab.machine import fast
            native = fast.connect(self, address)
            if native is not None:
                self.path = "fast"
                self.native_events = native.events
                if native.events is None:
                    self.exceptions.listen()
                return native
            if wanted == "fast":
                raise UnsupportedHost("VMLAB_MACHINE=fast, but the fast path is not available here: " + fast.why_not())
        self.path = "portable"
        self.exceptions.listen()
        counter = Counter(self.read_cpl)
        self.engine.hook(uc_const.UC_HOOK_BLOCK, CODE_CALLBACK, block_hook(counter, self.blocks.attend, self.fail))
        return counter

    def _disk(self, image: bytes) -> Disk:
        if len(image) % SECTOR:
            raise ConfigError(f"a disk image has whole sectors of {SECTOR} bytes; this one has {len(image)} bytes")
        return Disk(self.timeline, line(self, DISK_IRQ), Dma(self.ram, self.code_frames, self.drop_translations), image)

    # ---- what C has to know of, on the fast path
    @property
    def monitor(self) -> Monitor | None:
        """Who takes exceptions and interrupts; None: the guest, through the IDT."""
        return self._monitor

    @monitor.setter
    def monitor(self, monitor: Monitor | None) -> None:
        self._monitor = monitor
        if self.native_events is not None:
            self.native_events.note_monitor(monitor)

    @property
    def software_gates(self) -> Mapping[int, int]:
        """The monitor's IDT, as far as INT n is concerned: vector → DPL of its gate; all others have DPL 0."""
        return self._software_gates

    @software_gates.setter
    def software_gates(self, gates: Mapping[int, int]) -> None:
        self._software_gates = gates
        if self.native_events is not None:
            self.native_events.set_gates(gates, self._direct_gates)

    @property
    def direct_gates(self) -> frozenset[int]:
        """Vectors whose INT n goes through the IDT in machine memory though there is a monitor: its own choice of gate."""
        return self._direct_gates

    @direct_gates.setter
    def direct_gates(self, vectors: frozenset[int]) -> None:
        self._direct_gates = vectors
        if self.native_events is not None:
            self.native_events.set_gates(self._software_gates, vectors)

    @property
    def failure(self) -> BaseException | None:
        """The error that ends the run."""
        return self._failure

    @failure.setter
    def failure(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._note_end()

    @property
    def _stop(self) -> Stop | None:
        return self._ended

    @_stop.setter
    def _stop(self, stop: Stop | None) -> None:
        self._ended = stop
        self._note_end()

    def _note_end(self) -> None:
        if self.native_events is not None:
            self.native_events.note_end(self._failure is not None, self._ended is not None)

    # ---- running
    def run(self, budget: int | None = None) -> Stop:
        """Let the CPU go on from its RIP until something ends the run.

        :param budget: guest instructions, from the machine's start, that may not be exceeded.
        :raises GuestBudget: when the budget was spent.
        :raises TripleFault: when the CPU shut down.
        """
        if budget is not None:
            self.budget = budget
        self._stop = None
        stop = self._go_on()
        while stop is None:
            stop = self._go_on()
        self.counter.drop()
        return stop

    def _go_on(self) -> Stop | None:
        """Until the CPU stops once: why the run ends there, or None where it only waited in HLT."""
        if self._stale_code:  # flushed here, since translated code that runs may be chained to what goes
            self.engine.uc.ctl_flush_tb()
            self._stale_code = False
        self.cpu.load()
        if self.counter.current is None:  # else the next block's hook asks
            self.counter.set_cpl(self.cpu.cpl)
        self._running, self._interrupted = True, False
        error = self.engine.start(self.cpu.rip)
        self._running = False
        self.cpu.load()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self._stop is None and not self._stale_code and not self._interrupted:
            if error:
                raise GuestError(f"the CPU could not go on at {self.cpu.rip:#x}: {self.engine.error_text(error)}")
            if self._at_hlt():
                self._halted()
            elif self._broken_off == (self.cpu.rip, self.time):
                raise GuestError(f"the CPU could not go on at {self.cpu.rip:#x}: its code is taken away from it again and again")
            else:   # Unicorn ends a run without a word when the block that it just translated is thrown away (blocks.py: _check)
                self._broken_off = (self.cpu.rip, self.time)
        return self._stop

    def _at_hlt(self) -> bool:
        """Whether the CPU stopped because it executed HLT: the block that ran ends with one, right before RIP."""
        block = self.counter.current
        return (block is not None and bool(block.instructions) and block.instructions[-1].op == "hlt"
                and (self.cpu.rip + self.cpu.segment(hidden.CS).base - block.end) & 0xFFFFFFFF == 0)

    @contextlib.contextmanager
    def detour(self) -> Iterator[Cpu]:
        """Run code of a monitor's in the middle of whatever goes on, its own handler included; then all is as before.

        Within the ``with`` statement the CPU's state is set up; at its end the CPU runs from there, with no monitor over
        it (exceptions and interrupts go through the IDT), until somebody stops the engine. Then the state of before is
        restored, but for memory, devices and what was counted. A run that was ended meanwhile stays ended.
        """
        cpu, counter, inside = self.cpu, self.counter, self._running
        cpu.store()
        saved = self.engine.uc.context_save()
        before, self._stop = self._stop, None
        block, cpl = counter.current, counter.cpl                           # whoever asked has not done with them
        counter.current = None
        kept = self.monitor, self.guest_mode, self.on_attention, self.tagger
        self.monitor = self.guest_mode = None
        self.on_attention = lambda: False
        self.tagger = lambda pc, instructions: [None] * len(instructions)   # none of these is the guest's
        try:
            yield cpu
            cpu.store()
            counter.set_cpl(cpu.cpl)
            error = self.engine.start(cpu.rip)
            if error:
                cpu.load()
                raise GuestError(f"the monitor's code could not go on at {cpu.rip:#x}: {self.engine.error_text(error)}")
        finally:
            self.monitor, self.guest_mode, self.on_attention, self.tagger = kept
            self._stop = self._stop or before
            self.engine.uc.context_restore(saved)
            self.engine.flush_tlb()
            cpu.load()
            counter.drop(0)
            counter.current = block
            counter.set_cpl(cpl)
            if inside:      # Unicorn may or may not end the outer run with the inner one: let it end, and go on from there
                self._interrupted = True
                self.engine.stop()
        if self.failure is not None:
            raise self.failure

    def stop(self, stop: Stop) -> None:
        """End the run at the next instruction boundary the CPU reaches (for monitors and devices)."""
        self._stop = stop
        self.engine.stop()

    @property
    def ending(self) -> Stop | None:
        """What ended the last run, or has been asked for since (a device that a monitor wrote to)."""
        return self._stop

    def fail(self, failure: BaseException) -> None:
        """End the run with an error: nothing may leave a callback any other way."""
        if self.failure is None:
            self.failure = failure
        self.engine.stop()

    def guest_exit(self, code: int) -> None:
        """The guest wrote to the debug-exit port."""
        self.stop(Stop(StopReason.EXIT, code))

    def reset(self) -> None:
        """A device pulled the CPU's reset input: the run ends."""
        self.stop(Stop(StopReason.RESET))

    def _transmitted(self, character: int) -> None:
        """A character left the serial port."""
        self.console.append(character)
        for listener in self.console_listeners:
            listener(character)

    # ---- time
    @property
    def time(self) -> int:
        """Virtual time in nanoseconds: guest instructions executed, by whatever means, plus the time skipped in HLT."""
        return self.counter.time

    @property
    def stale_code(self) -> bool:
        """A device wrote to code: no block may run before it is decoded anew."""
        return self._stale_code

    @property
    def budget(self) -> int:
        """Guest instructions, from the machine's start, that may not be exceeded."""
        return self._budget

    @budget.setter
    def budget(self, instructions: int) -> None:
        self._budget = min(instructions, _FOR_EVER)
        self._set_limit()

    @property
    def last_moment(self) -> int:
        """The time at which the budget is spent."""
        return self._budget + self._idle_time

    def _set_limit(self) -> None:
        """Have the counter ask before the budget is spent or something is due, whichever comes first."""
        due = self.timeline.next_due
        self.counter.limit = self.last_moment if due is None else min(due, self.last_moment)

    def read_tsc(self, address: int | None = None) -> int:
        """The time stamp counter: virtual time (with the instruction at ``address`` about to run), and the offset."""
        time = self.counter.time
        block = self.counter.current
        if address is not None and block is not None:
            index = block.offsets.get(address - block.pc)
            if index is not None:
                time -= block.guest_weight_from(index)
        return (time * TSC_PER_NANOSECOND + self._tsc_adjustment + self.tsc_offset) & 0xFFFFFFFFFFFFFFFF

    def set_tsc(self, value: int, address: int) -> None:
        """The WRMSR at ``address`` sets the time stamp counter."""
        self._tsc_adjustment += value - self.read_tsc(address)

    def idle(self) -> None:
        """The guest waits in HLT (a monitor calls this when it halts on its guest's behalf)."""
        self.events["idle"] += 1

    def wait(self) -> bool:
        """The CPU waits for INTR: time skips from one due event to the next. False when INTR will never come."""
        for _ in range(self.patience):
            if self.intr.pending or self.interrupts.nmi_ready:
                return True
            due = self.timeline.next_due
            if due is None:
                return False
            skipped = max(due - self.counter.time, 0)
            self.counter.time += skipped
            self._idle_time += skipped
            self.timeline.run_due()
            if self._stop is not None:
                return False
        return False

    def _halted(self) -> None:
        """HLT was executed at CPL 0: wait for an interrupt, or for ever."""
        self.idle()
        if self.interrupts.nmi_ready or (self.interrupts.recognised and self.wait()):
            (self.interrupts.take_nmi if self.interrupts.nmi_ready else self.interrupts.take)()
            self.cpu.store()
        elif self._stop is None:
            self._stop = Stop(StopReason.HALTED)

    def drop_translations(self) -> None:
        """Code was written by a device, or is out of reach: the CPU must decode all anew, and can, once it has stopped."""
        self._stale_code = True
        self.engine.stop()

    # ---- what a monitor arranges
    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(address)`` whenever the instruction at this address is about to run; costs the guest nothing."""
        self.blocks.watch(address, callback)

    def gate(self, address: int, callback: Callable[[], None]) -> None:
        """A door from machine code into a monitor: reaching ``address`` calls ``callback``, which must move RIP."""
        self.blocks.gate(address, callback)

    def forget_code(self, start: int, end: int) -> None:
        """Code in ``start <= address < end`` was changed by the host or the guest: decode it anew."""
        self.blocks.forget(start, end)

    def request_attention(self, on: bool) -> None:
        """A monitor wants to be asked (``on_attention``) before the next block runs."""
        self.interrupts.request(on)

    def flush_guest(self) -> None:
        """A VMM asks for the guest's translations to be flushed at the next VMRUN (TLB_CONTROL; APM Vol. 2 §15.16.2)."""
        if self.accesses is not None:
            self.accesses.guest_changed = True

    @property
    def on_attention(self) -> Callable[[], bool]:
        """A monitor that asked by :meth:`request_attention` is called at block starts; True when it moved RIP."""
        return self.interrupts.on_attention

    @on_attention.setter
    def on_attention(self, callback: Callable[[], bool]) -> None:
        self.interrupts.on_attention = callback

    @property
    def faulting(self) -> Instruction | None:
        """The instruction that just faulted, as decoded before its block first ran (None: not known)."""
        return self.exceptions.faulting

    @property
    def in_guest(self) -> bool:
        """In guest mode the CPU delivers to the guest itself; a monitor hears only of exits."""
        return self.guest_mode is not None and bool(self.cpu.hflags & hidden.HF_GUEST)

    # ---- what the parts ask of the whole
    def read_cpl(self) -> int:
        """CPL, wherever the CPU is."""
        self.cpu.load()
        return self.cpu.cpl

    def make_rip_count(self) -> None:
        """Inside a block or code hook: leave the block and go on at RIP, with the whole state as the window has it."""
        self.cpu.store()
        self.counter.set_cpl(self.cpu.cpl)
        self.engine.write_register(x86.UC_X86_REG_RIP, self.cpu.rip)

    # ---- the bus
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

    # ---- what was counted
    def snapshot(self, upto: int | None = None) -> Snapshot:
        """All machine counts so far. ``upto``: the address about to run, when called from a watcher."""
        counted = self.counter.snapshot(upto)
        events = dict(counted.events)
        for kind, n in self.events.items():
            events[kind] = events.get(kind, 0) + n
        return Snapshot(events, counted.user, counted.kernel, counted.machine)


__all__ = ["CR4_TSD", "Machine", "Monitor", "Stop", "StopReason", "cpuid", "port_operands"]
