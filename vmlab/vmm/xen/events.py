"""Event channels: the interrupts of a paravirtual guest (xen/include/public/event_channel.h).

A port has two bits in shared memory, pending and masked. A port that becomes pending while it is not masked asks for
an upcall, which the hypervisor makes on its way back into the guest unless the guest holds upcalls off.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmlab.vmm import xen
from vmlab.vmm.xen.abi import SharedInfo
from vmlab.vmm.xen.memory import GuestMemory

_IRQS = 16


@dataclass(frozen=True)
class Channel:
    """What a port is bound to: a status of event_channel.h and its number, or a peer that is told of each send."""

    status: int
    number: int = 0
    notify: Callable[[], None] | None = None


class EventChannels:
    """The ports of the one domain and its one vCPU."""

    def __init__(self, shared: SharedInfo, memory: GuestMemory) -> None:
        self._shared, self._memory = shared, memory
        self._channels: dict[int, Channel] = {}
        self._commands: dict[int, Callable[[int], int]] = {
            xen.EVTCHNOP_BIND_VIRQ: self._bind_virq, xen.EVTCHNOP_BIND_PIRQ: self._bind_pirq, xen.EVTCHNOP_BIND_IPI: self._bind_ipi,
            xen.EVTCHNOP_CLOSE: self._close, xen.EVTCHNOP_SEND: self._send, xen.EVTCHNOP_STATUS: self._status,
            xen.EVTCHNOP_UNMASK: self._unmask,
        }

    # ---- the hypervisor's side
    def raise_irq(self, irq: int) -> None:
        """A physical interrupt becomes an event, if the guest has bound it."""
        self._raise(xen.EVTCHNSTAT_PIRQ, irq)

    def raise_virq(self, virq: int) -> None:
        """A virtual interrupt of the hypervisor's."""
        self._raise(xen.EVTCHNSTAT_VIRQ, virq)

    def _raise(self, status: int, number: int) -> None:
        port = self._find(status, number)
        if port is not None:
            self._shared.raise_event(port)

    def connect(self, notify: Callable[[], None]) -> int | None:
        """A new port whose sends call ``notify`` (a backend); its number, or None when there is none left."""
        return self._allocate(Channel(xen.EVTCHNSTAT_INTERDOMAIN, 0, notify))

    def notify_guest(self, port: int) -> None:
        """The backend behind this port has news."""
        if port in self._channels:
            self._shared.raise_event(port)

    def _find(self, status: int, number: int) -> int | None:
        return next((p for p, c in self._channels.items() if c.status == status and c.number == number), None)

    def _allocate(self, channel: Channel) -> int | None:
        port = next((p for p in range(1, self._shared.ports) if p not in self._channels), None)
        if port is not None:
            self._channels[port] = channel
        return port

    # ---- event_channel_op
    def event_channel_op(self, command: int, argument: int, *_: int) -> int:
        """One method a command; ``argument`` points at its structure."""
        action = self._commands.get(command)
        return xen.ENOSYS if action is None else action(argument)

    def _bind(self, channel: Channel, answer_at: int) -> int:
        self._memory.write(answer_at, bytes(4))     # may fault: before anything is bound
        port = self._allocate(channel)
        if port is None:
            return xen.ENOSPC
        self._memory.write(answer_at, struct.pack("<I", port))
        return 0

    def _bind_virq(self, argument: int) -> int:
        virq, vcpu = struct.unpack("<II", self._memory.read(argument, 8))
        if virq >= xen.NR_VIRQS:
            return xen.EINVAL
        if vcpu:
            return xen.ENOENT
        if self._find(xen.EVTCHNSTAT_VIRQ, virq) is not None:
            return xen.EEXIST
        return self._bind(Channel(xen.EVTCHNSTAT_VIRQ, virq), argument + 8)

    def _bind_pirq(self, argument: int) -> int:
        irq = self._memory.read32(argument)
        if irq >= _IRQS:
            return xen.EINVAL
        if self._find(xen.EVTCHNSTAT_PIRQ, irq) is not None:
            return xen.EEXIST
        return self._bind(Channel(xen.EVTCHNSTAT_PIRQ, irq), argument + 8)

    def _bind_ipi(self, argument: int) -> int:
        if self._memory.read32(argument):
            return xen.ENOENT
        return self._bind(Channel(xen.EVTCHNSTAT_IPI), argument + 4)

    def _close(self, argument: int) -> int:
        port = self._memory.read32(argument)
        if self._channels.pop(port, None) is None:
            return xen.EINVAL
        self._shared.clear_event(port)
        return 0

    def _send(self, argument: int) -> int:
        port = self._memory.read32(argument)
        channel = self._channels.get(port)
        if channel is None or channel.status not in (xen.EVTCHNSTAT_IPI, xen.EVTCHNSTAT_INTERDOMAIN):
            return xen.EINVAL
        if channel.notify is not None:
            channel.notify()
        else:
            self._shared.raise_event(port)
        return 0

    def _status(self, argument: int) -> int:
        domain, port = struct.unpack("<HxxI", self._memory.read(argument, 8))
        if domain != xen.DOMID_SELF:
            return xen.ESRCH
        if not 0 < port < self._shared.ports:
            return xen.EINVAL
        channel = self._channels.get(port, Channel(xen.EVTCHNSTAT_CLOSED))
        self._memory.write(argument + 8, struct.pack("<III", channel.status, 0, channel.number))
        return 0

    def _unmask(self, argument: int) -> int:
        port = self._memory.read32(argument)
        if port not in self._channels:
            return xen.EINVAL
        self._shared.unmask(port)
        return 0
