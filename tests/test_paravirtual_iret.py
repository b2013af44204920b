"""The way out of a paravirtual kernel: events between letting events in and IRET, at every instruction, over and over.

An event there must be handled before the kernel has gone, and however many come, the stack must not grow. In 64 bits only the way
back into the kernel itself has such a moment, so the events begin in a system call.
"""

from __future__ import annotations

import pytest
from test_paravirtual_minios import DISK

from vmlab import guests
from vmlab.guests import GuestImage
from vmlab.machine.board import DISK_IRQ
from vmlab.machine.decode import decode_block
from vmlab.machine.pc import Machine
from vmlab.machine.state import RSP
from vmlab.strategies.paravirtual import Paravirtualization

STORM = 40                          # events in a row at the same instruction
IMAGES = {guest: guests.load(guest) for guest in ("minios", "minios64")}
IMAGE = IMAGES["minios"]


def _addresses(image: GuestImage, bits: int) -> list[int]:
    """Every instruction from pv_iret to the end of the critical region."""
    start, end = image.symbol("pv_iret"), image.symbol("pv_critical_end")
    segment = next(s for s in image.segments if s.address <= start < s.address + s.memory_size)
    found, at = [], start
    for instruction in decode_block(segment.data[start - segment.address : end - segment.address], bits):
        found.append(at)
        at += instruction.size
    assert at == end
    return found


ADDRESSES, WIDE_ADDRESSES = _addresses(IMAGE, 32), _addresses(IMAGES["minios64"], 64)


class Storm:
    """minios making system calls, and an event whenever the instruction at one of ``addresses`` is about to run."""

    def __init__(self, addresses: tuple[int, ...], path: str, guest: str = "minios") -> None:
        self.machine = Machine(path=path, disk=DISK)
        self.strategy = Paravirtualization(self.machine, {"memory": "direct"})
        image = IMAGES[guest]
        self.strategy.load(image, guests.command_line({"guest": guest, "workload": "null_call", "iterations": 20, "timer": 0}))
        self.vmm = self.strategy.hypervisor
        self.addresses, self.left = addresses, STORM
        self.injected = self.handled = 0
        self.stacks: set[int] = set()
        for address in addresses:       # hooked before their blocks are known; gates come and go
            self.strategy.watch(address, lambda _at: None)
        self.strategy.watch(image.symbol("pv_events"), self._handler)
        self.strategy.watch(image.symbol("vmlab_roi_begin"), lambda _at: self._arm())

    def _arm(self) -> None:
        for address in self.addresses:
            self.machine.gate(address, lambda address=address: self._inject(address))

    def _inject(self, address: int) -> None:
        """As if the machine had interrupted here: the hypervisor raises the event and goes back in, by the upcall if it may."""
        del self.machine.blocks._gates[address]
        if self.left:
            self.left -= 1
            self.injected += 1
            self.vmm.events.raise_irq(DISK_IRQ)
            self.vmm.deliver_events()

    def _handler(self, _at: int) -> None:
        cpu = self.machine.cpu
        cpu.load()
        self.handled += 1
        self.stacks.add(cpu.gpr(RSP))
        if self.left:
            self._arm()

    def run(self) -> None:
        assert self.strategy.run(5_000_000).exit_code == 0


@pytest.mark.parametrize("path", ["portable", "auto"])
@pytest.mark.parametrize("also_before", [False, True])
@pytest.mark.parametrize("address", ADDRESSES, ids=hex)
def test_no_event_is_lost_and_the_stack_does_not_grow(address: int, also_before: bool, path: str) -> None:
    """``also_before``: another event while events are still held off, so that the pending flag is found set."""
    storm = Storm((ADDRESSES[0], address) if also_before else (address,), path)
    storm.run()
    if address == ADDRESSES[-1] and not also_before:    # reached only when the flag was found set
        assert storm.injected == 0
        return
    assert storm.injected == STORM
    assert not storm.vmm.domain.shared.pending
    # Two events before one look are one upcall; every single one is handled by itself.
    assert storm.handled == STORM or (also_before and STORM / 2 <= storm.handled <= STORM)
    assert len(storm.stacks) == 1
    assert storm.strategy.refused == []


@pytest.mark.parametrize("path", ["portable", "auto"])
@pytest.mark.parametrize("also_before", [False, True])
@pytest.mark.parametrize("address", WIDE_ADDRESSES, ids=hex)
def test_in_64_bits_no_event_is_lost_on_the_way_back_into_the_kernel(address: int, also_before: bool, path: str) -> None:
    in_a_call = IMAGES["minios64"].symbol("system_call")        # events are let in there
    storm = Storm((in_a_call, WIDE_ADDRESSES[0], address) if also_before else (in_a_call, address), path, "minios64")
    seen: set[int] = set()
    inject = storm._inject
    storm._inject = lambda at: (seen.add(at), inject(at))[1]    # type: ignore[method-assign]
    storm.run()
    last_without_reason = address == WIDE_ADDRESSES[-1] and not also_before     # reached only when the flag was found set
    assert (address in seen) != last_without_reason
    assert storm.injected == STORM
    assert not storm.vmm.domain.shared.pending
    assert STORM / 3 <= storm.handled <= STORM                  # several events before one look are one upcall
    assert len(storm.stacks) == 1
    assert storm.strategy.refused == []


def test_the_region_is_what_it_was_when_this_was_written() -> None:
    names = [i.op or i.kind for i in decode_block(IMAGE.segments[0].data[ADDRESSES[0] - IMAGE.segments[0].address:][:40], 32)]
    assert names.index("iret") == 5 and len(ADDRESSES) == 7
    assert len(WIDE_ADDRESSES) == 10
