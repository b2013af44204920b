"""Where each technique keeps what a trace shows: both interrupt flags, waiting interrupts, and whose code an address is in.

Looking changes nothing and counts nothing: the VMCB is read past its counted accessor.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmlab.machine.cpu import IF
from vmlab.machine.state import HF2_HIF
from vmlab.machine.svm_host import HIGH
from vmlab.machine.vmcb import Vmcb
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.strategies.translation import BinaryTranslation
from vmlab.vmm.monitor import DeprivilegingMonitor


@dataclass(frozen=True)
class Flags:
    """``real_if``: whether the machine's interrupts reach the CPU; ``virtual_if``: whether the guest believes that they do.

    ``pending`` says for whom an interrupt waits: "machine", "guest".
    """

    real_if: bool
    virtual_if: bool
    pending: tuple[str, ...]


class Lane:
    """The bare machine, and any technique that is not known here: one flag, one controller, the guest's own addresses."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.machine = strategy, strategy.machine

    def flags(self) -> Flags:
        """The CPU's state must be loaded."""
        real = bool(self.machine.cpu.system_flags & IF)
        return Flags(real, self.virtual_if(real), self.waiting())

    def virtual_if(self, real: bool) -> bool:
        """The guest's own view of its flag."""
        return real

    def guest_pending(self) -> bool:
        """Whether the guest's virtual controller has an interrupt for it."""
        return False

    def waiting(self) -> tuple[str, ...]:
        """For whom interrupts wait."""
        return tuple(name for name, waits in (("machine", self.machine.intr.pending), ("guest", self.guest_pending())) if waits)

    def place(self, address: int) -> tuple[str, int | None]:
        """("guest", "cache" or "monitor", the guest instruction that the code at ``address`` stands for)."""
        return "guest", address


class _Deprivileged(Lane):
    """Trap-and-emulate: flags in the virtual CPU, a virtual controller."""

    strategy: DeprivilegingMonitor

    def virtual_if(self, real: bool) -> bool:
        return bool(self.strategy.vcpu.flags & IF)

    def guest_pending(self) -> bool:
        return self.strategy.platform_devices.pending


class _Translated(_Deprivileged):
    """Binary translation: the guest's kernel runs from the cache, whose translator knows what stands for what."""

    strategy: BinaryTranslation

    def place(self, address: int) -> tuple[str, int | None]:
        translator = self.strategy.translator
        if not translator.space.in_hole(address):
            return "guest", address
        return ("cache", translator.guest_address(address)) if address in translator.states else ("monitor", None)


class _Paravirtual(Lane):
    """Paravirtualization: the flag is a mask in shared memory, interrupts are events."""

    strategy: Paravirtualization

    def virtual_if(self, real: bool) -> bool:
        return not self.strategy.domain.shared.masked

    def guest_pending(self) -> bool:
        return bool(self.strategy.domain.shared.pending)


class _GuestMode(Lane):
    """Hardware assistance: in guest mode EFLAGS.IF is the guest's, and the host's flag at VMRUN is what counts for the machine."""

    strategy: HardwareAssisted

    def flags(self) -> Flags:
        cpu = self.machine.cpu
        if self.machine.in_guest:
            return Flags(bool(cpu.hflags2 & HF2_HIF), bool(cpu.system_flags & IF), self.waiting())
        rflags = Vmcb(self.machine.ram, self.strategy.vmcb.address)["rflags"]
        return Flags(bool(cpu.system_flags & IF), bool(rflags & IF), self.waiting())

    def guest_pending(self) -> bool:
        return self.strategy.platform_devices.pending

    def place(self, address: int) -> tuple[str, int | None]:
        return ("monitor", None) if address >= HIGH else ("guest", address)


def lane_of(strategy: Strategy) -> Lane:
    """How to look at this technique; one that derives from a built-in one is looked at as that."""
    for kind, lane in ((BinaryTranslation, _Translated), (DeprivilegingMonitor, _Deprivileged), (Paravirtualization, _Paravirtual),
                       (HardwareAssisted, _GuestMode)):
        if isinstance(strategy, kind):
            return lane(strategy)
    return Lane(strategy)
