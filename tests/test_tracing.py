"""Tracing: trace faults are the store instructions to traced pages, no more and no fewer; counted beside the guest's own stores.

The sites at which minios stores to page tables (sites.h) are watched by the machine. Where one is about to run, its target is known,
and the VMM is asked whether it traces that page.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from vmlab import guests, strategies
from vmlab.guests import GuestImage
from vmlab.machine.pc import Machine
from vmlab.machine.state import RAX, RCX, RDI
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.vmm.assisted_memory import Shadowed
from vmlab.vmm.monitor import DeprivilegingMonitor
from vmlab.vmm.shadow import ShadowPager

#: Kinds of sites.h that store into what is, was or becomes a page table: the register that points at it.
ENTRY_WRITE, ENTRY_WRITE_NOW, TABLE_NEW, TABLE_FREE, ROOT_NEW, ROOT_FREE = range(16, 22)
POINTER = {ENTRY_WRITE: RAX, ENTRY_WRITE_NOW: RAX, TABLE_NEW: RDI, TABLE_FREE: RAX, ROOT_NEW: RAX, ROOT_FREE: RAX}
WAYS = {"trap-and-emulate": {"memory": "tracing", "sensitive": "trap"}, "hardware-assisted": {"memory": "tracing"}}
SIZES = {"fork": {"pages": 20}, "build": {"pages": 12, "iterations": 1}, "random": {"seeds": 1, "iterations": 30}, "mmap": {"pages": 24}}


def sites(image: GuestImage) -> Iterator[tuple[int, int, int]]:
    """(first address, behind, kind) of every site in the image's table."""
    at, end = image.symbol("sites"), image.symbol("sites_end")
    holder = next(s for s in image.segments if s.address <= at < s.address + len(s.data))
    for offset in range(at - holder.address, end - holder.address, 8):
        where, room, kind, _ = struct.unpack_from("<IBBH", holder.data, offset)
        yield where, where + room, kind


CASES = [("minios", workload) for workload in ("ptemod", "ptemod_p_np", "ptemod_np_p", "forkwait", "fork", "mmap", "build", "random")] + [
    ("minios64", workload) for workload in ("ptemod_np_p", "fork", "mmap", "build")]


@pytest.mark.parametrize("technique", WAYS)
@pytest.mark.parametrize(("guest", "workload"), CASES)
def test_trace_faults_are_the_store_instructions_to_traced_pages(guest: str, workload: str, technique: str) -> None:
    values = {"guest": guest, "workload": workload, "iterations": 5, "timer": 0, **SIZES.get(workload, {})}
    image = guests.load(guest)
    strategy = strategies.load(technique)(Machine(disk=guests.disk(values)), WAYS[technique])
    if isinstance(strategy, HardwareAssisted):
        assert isinstance(strategy.memory, Shadowed)
        pager: ShadowPager = strategy.memory.pager
    else:
        assert isinstance(strategy, DeprivilegingMonitor)
        pager = strategy.pager
    stores, cpu = [0], strategy.machine.cpu

    def about_to_store(kind: int) -> None:
        cpu.load()
        if kind == TABLE_NEW and cpu.gpr(RCX) != 1024:
            return                                              # the same REP STOS goes on
        stores[0] += pager.traces(cpu.gpr(POINTER[kind]) >> 12)  # the kernel's memory is mapped one to one

    for address, _, kind in sites(image):
        if kind in POINTER:
            strategy.watch(address, lambda _at, kind=kind: about_to_store(kind))
    strategy.load(image, guests.command_line(values))
    assert strategy.run(200_000_000).exit_code == 0
    events = strategy.snapshot().events
    assert events["shadow.trace.write"] == stores[0] > 0
    faults = sum(events.get(f"shadow.{kind}", 0) for kind in ("trace.write", "fault.hidden", "fault.dirty", "fault.true"))
    assert faults == events["exit.page_fault" if technique == "hardware-assisted" else "trap.pf"]


@pytest.mark.parametrize("technique", WAYS)
def test_an_entry_changed_in_a_table_in_use_is_one_trace_fault_whatever_it_was_and_becomes(technique: str) -> None:
    """Adams and Agesen's three: present stays, present goes, absent comes. Published, each cost an exit."""
    for workload in ("ptemod", "ptemod_p_np", "ptemod_np_p"):
        values = {"guest": "minios", "workload": workload, "iterations": 60, "timer": 0}
        image = guests.load("minios")
        strategy = strategies.load(technique)(Machine(disk=guests.disk(values)), WAYS[technique])
        marks: dict[str, int] = {}
        for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
            strategy.watch(image.symbol(symbol),
                           lambda _at, symbol=symbol, strategy=strategy, marks=marks: marks.setdefault(
                               symbol, strategy.snapshot().events.get("shadow.trace.write", 0)))
        strategy.load(image, guests.command_line(values))
        assert strategy.run(200_000_000).exit_code == 0
        assert marks["vmlab_roi_end"] - marks["vmlab_roi_begin"] == 61, workload
