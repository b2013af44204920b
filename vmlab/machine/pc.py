"""The PC, wired explicitly: every part it has, one a line.

Read :meth:`Machine.__init__` as the table of contents; each part's module says what it does. The run loop is in running.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.errors import ConfigError, UnsupportedHost
from vmlab.ledger import Counts, Snapshot
from vmlab.machine import state as hidden
from vmlab.machine.accesses import Accesses
from vmlab.machine.blocks import Blocks
from vmlab.machine.board import CLOCK_IRQ, DISK_IRQ, IDE_IRQ, KEYBOARD_IRQ, MOUSE_IRQ, PIT_IRQ, UART_IRQ, line, populate
from vmlab.machine.counter import Counter, block_hook
from vmlab.machine.cpu import RF, Cpu
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
from vmlab.machine.protocols import InterruptSource, Monitor, Stop, StopReason
from vmlab.machine.running import Running
from vmlab.machine.timeline import Timeline
from vmlab.machine.tlb import TlbConfig
from vmlab.machine.uncounted import UncountedBlocks


class Machine(Running):
    """One emulated PC.

    :param path: how its CPU is reached: "portable", "fast" or "auto"; "uncounted" counts nothing, to measure what counting costs.
    :param disk: the content of its DMA disk, in whole sectors of 512 bytes; None: it has none.
    :param drives: of its IDE disks, likewise.
    :param guest_ram: bytes of RAM that its firmware notes for a guest to read; None: all of it.
    :param tlb: what to model of translation lookaside buffers and page walks; None: nothing, at no cost.
    """

    def __init__(self, ram_size: int = 64 << 20, path: str | None = None, *, disk: bytes | None = None,
                 drives: tuple[bytes, ...] = (), guest_ram: int | None = None, tlb: TlbConfig | None = None) -> None:
        wanted = path or os.environ.get("VMLAB_MACHINE", "auto")
        if wanted not in ("portable", "fast", "auto") and path != "uncounted":
            raise ConfigError(f"VMLAB_MACHINE: {wanted!r} is not one of portable, fast, auto")
        super().__init__()
        # What was counted, what the world saw, who is in charge.
        self.events = Counts("machine")
        #: What an earlier machine counted whose state this one was given (saved.py).
        self.earlier = Snapshot()
        self.console = bytearray()
        #: Each is told of each character that leaves the serial port, at once.
        self.console_listeners: list[Callable[[int], None]] = []
        #: Device writes in order, without times: part of the guest-visible state.
        self.device_log: list[tuple[int, int, int]] = []
        self._monitor: Monitor | None = None
        #: System instructions that raise #GP above CPL 0 on this CPU though x86 lets them pass.
        self.trapping: Collection[str] = frozenset()
        self._software_gates: Mapping[int, int] = {}
        self._direct_gates: frozenset[int] = frozenset()
        #: Physical page frames that code was run from: whoever else writes there (DMA) must have it decoded anew.
        self.code_frames: set[int] = set()

        self.engine = Engine()                                     # Unicorn
        self.ram = Ram(self.engine, ram_size)                      # physical memory
        self._prime()
        self.cpu, live = self._power_on(wanted)                    # registers, hidden ones included
        self.exceptions = Exceptions(self)                         # faults and INT n: to a monitor or through the IDT
        self.instructions = Instructions(self)                     # IN, OUT, RDTSC … which Unicorn leaves out
        self.blocks = (UncountedBlocks if wanted == "uncounted" else Blocks)(self, self.instructions)  # decoding, hooks on exact addresses
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
            native = fast.connect(self, address, counting=wanted != "uncounted")
            if native is not None:
                self.path = wanted if wanted == "uncounted" else "fast"
                self.native_events = native.events
                if native.events is None:
                    self.exceptions.listen()
                return native
            if wanted != "auto":
                raise UnsupportedHost(f"VMLAB_MACHINE={wanted}, but the fast path is not available here: " + fast.why_not())
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

    def request_attention(self, on: bool, *, masked: bool = False) -> None:
        """A monitor wants to be asked (``on_attention``) before the next block runs; ``masked``: it has nothing to do while EFLAGS.IF is off."""
        self.interrupts.request(on, masked=masked)

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
        """CPL, wherever the CPU is. An IRET that brought it may have set RF, for one instruction, whose block has begun (SDM Vol. 3A §17.3.1)."""
        self.cpu.load()
        if self.cpu.system_flags & RF:      # Unicorn would keep it, and PUSHF show it
            self.cpu.clear_flags(RF)
            self.cpu.store()
        return self.cpu.cpl

    def make_rip_count(self) -> None:
        """Inside a block or code hook: leave the block and go on at RIP, with the whole state as the window has it."""
        self.cpu.store()
        self.counter.set_cpl(self.cpu.cpl)
        self.engine.write_register(x86.UC_X86_REG_RIP, self.cpu.rip)

    # ---- the bus
    def _transmitted(self, character: int) -> None:
        """A character left the serial port."""
        self.console.append(character)
        for listener in self.console_listeners:
            listener(character)

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
        found = Snapshot(events, counted.user, counted.kernel, counted.machine)
        return found.plus(self.earlier) if self.earlier.events else found


__all__ = ["CR4_TSD", "Machine", "Monitor", "Stop", "StopReason", "cpuid", "port_operands"]
