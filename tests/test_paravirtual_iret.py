"""The way out of a paravirtual kernel: events between letting events in and IRET, at every instruction, over and over.

An event there must be handled before the kernel has gone, and however many come, the stack must not grow.
"""

from __future__ import annotations

import pytest
from test_paravirtual_minios import DISK

from vmlab import guests
from vmlab.machine.board import DISK_IRQ
from vmlab.machine.decode import decode_block
from vmlab.machine.pc import Machine
from vmlab.machine.state import RSP
from vmlab.strategies.paravirtual import Paravirtualization

STORM = 40                          # events in a row at the same instruction
IMAGE = guests.load("minios")


def _addresses() -> list[int]:
    """Every instruction from pv_iret to the end of the critical region."""
    start, end = IMAGE.symbol("pv_iret"), IMAGE.symbol("pv_critical_end")
    segment = next(s for s in IMAGE.segments if s.address <= start < s.address + s.memory_size)
    found, at = [], start
    for instruction in decode_block(segment.data[start - segment.address : end - segment.address], 32):
        found.append(at)
        at += instruction.size
    assert at == end
    return found


ADDRESSES = _addresses()


class Storm:
    """minios making system calls, and an event whenever the instruction at one of ``addresses`` is about to run."""

    def __init__(self, addresses: tuple[int, ...], path: str) -> None:
        self.machine = Machine(path=path, disk=DISK)
        self.strategy = Paravirtualization(self.machine, {"memory": "direct"})
        self.strategy.load(IMAGE, guests.command_line({"guest": "minios", "workload": "null_call", "iterations": 20, "timer": 0}))
        self.vmm = self.strategy.hypervisor
        self.addresses, self.left = addresses, STORM
        self.injected = self.handled = 0
        self.stacks: set[int] = set()
        for address in addresses:       # hooked before their blocks are known; gates come and go
            self.strategy.watch(address, lambda _at: None)
        self.strategy.watch(IMAGE.symbol("pv_events"), self._handler)
        self.strategy.watch(IMAGE.symbol("vmlab_roi_begin"), lambda _at: self._arm())

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


def test_the_region_is_what_it_was_when_this_was_written() -> None:
    names = [i.op or i.kind for i in decode_block(IMAGE.segments[0].data[ADDRESSES[0] - IMAGE.segments[0].address:][:40], 32)]
    assert names.index("iret") == 5 and len(ADDRESSES) == 7
