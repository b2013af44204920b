"""The small interface behind which every technique lives.

A strategy owns one machine and runs one guest on it. To write one, subclass :class:`Strategy` (or an
existing technique, to change how it handles one instruction) and name it in the entry-point group
``vmlab.strategies``, or pass ``--strategy FILE:CLASS``. ``docs/writing-a-strategy.md`` walks through it.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from vmlab.errors import UnsupportedByStrategy
from vmlab.guests import GuestImage, boot
from vmlab.ledger import Counts, Snapshot
from vmlab.machine.cpu import Cpu
from vmlab.machine.pc import Machine, Stop
from vmlab.machine.state import CS, DS, ES, FS, GS, SS
from vmlab.parameters import Value
from vmlab.strategies.techniques import BESIDE_GUEST, Technique, machine_memory


@dataclass(frozen=True)
class GuestState:
    """The guest's CPU as the guest believes it to be: virtual flags, virtual privilege, its own selectors."""

    gpr: tuple[int, ...]
    rip: int
    eflags: int
    selectors: tuple[int, ...]
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    gdt: tuple[int, int]
    idt: tuple[int, int]

    def digest(self) -> bytes:
        """A canonical byte string of the whole state."""
        flat: list[int] = []
        for value in astuple(self):
            flat.extend(value) if isinstance(value, tuple) else flat.append(value)
        return struct.pack(f"<{len(flat)}Q", *flat)


class Strategy(Technique, ABC):
    """One way to run a guest. What it inherits from :class:`Technique` says what it is; the methods run it."""

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        self.machine = machine
        self.chosen: dict[str, Value] = {key: p.default for key, p in self.parameters.items()}
        for key, value in (parameters or {}).items():
            if key in self.parameters:
                self.chosen[key] = self.parameters[key].check(key, value)
        #: Bytes of RAM that the guest has, from guest-physical address 0.
        self.guest_memory = machine_memory(parameters or {}) - BESIDE_GUEST
        #: What the VMM reports of its own work; the machine counts everything else.
        self.counts = Counts("vmm")
        #: What the guest tried and was refused, in words.
        self.refused: list[str] = []

    # ---- the four things a strategy does
    @abstractmethod
    def load(self, image: GuestImage, command_line: str) -> None:
        """Put the guest into memory and the CPU at its entry point."""

    def run(self, budget: int | None = None) -> Stop:
        """Run until the guest ends; the stop says why. ``budget`` is in guest instructions."""
        return self.machine.run(budget)

    @abstractmethod
    def deliver_interrupt(self, vector: int) -> None:
        """Make an interrupt pending for the guest's CPU; it arrives when the guest allows it."""

    def warm_up(self) -> list[dict[str, int]]:
        """What a technique that learns its guest had learned by when (virtual time as ``instructions``); empty for the others."""
        return []

    @abstractmethod
    def guest_state(self) -> GuestState:
        """The guest's state, precise at every stop."""

    @property
    def long_mode(self) -> bool:
        """Whether the guest is in long mode now: where the VMM's code is not a CPU mode apart, whether the physical CPU is."""
        self.machine.cpu.load()
        return self.machine.cpu.long_mode

    def tell(self, image: GuestImage, before: str, command_line: str) -> None:
        """Put another command line where :meth:`load` put ``before``, in a guest that has not looked at it yet."""
        for (gpa, old), (same, new) in zip(boot.start(image, before, self.guest_memory).pieces,
                                           boot.start(image, command_line, self.guest_memory).pieces, strict=True):
            assert gpa == same
            if old != new:
                self.machine.ram.write(self.frame_address(gpa), new + bytes(max(len(old) - len(new), 0)))

    # ---- to be saved and go on elsewhere
    def state(self) -> dict[str, Any]:
        """What this VMM knows beside machine memory, as plain values.

        :raises UnsupportedByStrategy: it cannot be saved, or not at this moment, and why.
        """
        raise UnsupportedByStrategy(f"a run under {self.name} cannot be saved; one that is native or hardware-assisted can")

    def from_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state` in place of :meth:`load`; the machine has its own state already."""
        raise UnsupportedByStrategy(f"a run under {self.name} cannot be saved")

    def _counted(self) -> dict[str, Any]:
        """The part of the state that every technique has."""
        return {"counts": dict(self.counts), "refused": list(self.refused)}

    def _count_on(self, state: dict[str, Any]) -> None:
        self.counts.clear()
        self.counts.update(state["counts"])
        self.refused[:] = state["refused"]

    # ---- what the lab asks of it
    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Have the machine call ``callback`` when the guest is about to run the instruction at this guest address.

        The callback gets the machine address, to be handed to :meth:`snapshot`. Costs the guest nothing.
        """
        self.machine.watch(address, callback)

    def frame_address(self, gpa: int) -> int:
        """Where guest-physical ``gpa`` lies in machine memory (hpa)."""
        return gpa

    def read_guest(self, gpa: int, size: int) -> bytes:
        """Guest-physical memory."""
        return self.machine.ram.read(self.frame_address(gpa), size)

    def snapshot(self, upto: int | None = None) -> Snapshot:
        """Everything counted so far, machine's and VMM's together."""
        machine = self.machine.snapshot(upto)
        machine.events.update(self.counts)
        machine.user += self.counts.get("emulated.user", 0)
        machine.kernel += self.counts.get("emulated.kernel", 0)
        return machine

    def state_digest(self) -> str:
        """SHA-256 over registers, all guest memory (pages that are not all zero, each with its address), and device writes in their order."""
        digest = hashlib.sha256(self.guest_state().digest())
        for gpa, page in self.machine.ram.pages_in_use(self.frame_address(0), self.guest_memory):
            digest.update(struct.pack("<Q", gpa) + page)
        digest.update(repr(self.machine.device_log).encode())
        return digest.hexdigest()


def visible_registers(gpr: Callable[[int], int], long_mode: bool) -> tuple[int, ...]:
    """All sixteen general registers in long mode, else the low halves of the first eight."""
    return tuple(gpr(i) for i in range(16)) if long_mode else tuple(gpr(i) & 0xFFFFFFFF for i in range(8))


def physical_state(cpu: Cpu) -> GuestState:
    """The physical CPU's state, for techniques under which it is the guest's own."""
    cpu.load()
    gdt, idt = cpu.table("gdt"), cpu.table("idt")
    return GuestState(
        gpr=visible_registers(cpu.gpr, cpu.long_mode),
        rip=cpu.rip, eflags=cpu.eflags,
        selectors=tuple(cpu.selector(i) for i in (ES, CS, SS, DS, FS, GS)),
        cr0=cpu.cr(0), cr2=cpu.cr2, cr3=cpu.cr(3), cr4=cpu.cr(4),
        gdt=(gdt.base, gdt.limit), idt=(idt.base, idt.limit),
    )
