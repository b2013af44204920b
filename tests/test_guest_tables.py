"""The guest's own page tables as a VMM walks them: what it remembers of a walk is never more than the tables say."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.ledger import Counts
from vmlab.machine.memory import Ram
from vmlab.machine.paging import CR4_PAE, PS, RW, US, A, D, P, PageFault
from vmlab.machine.pc import Machine
from vmlab.vmm.guest_tables import GuestMemory, GuestMmu

BASE, SIZE, ROOT, TABLE = 1 << 20, 1 << 20, 0x10000, 0x12000
CR0_PG, CR0_WP, CR0_PE, CR4_PSE = 1 << 31, 1 << 16, 1, 1 << 4


@functools.cache
def ram() -> Ram:
    return Machine(4 << 20, "portable").ram


def mmu(pae: bool, write_protect: bool) -> GuestMmu:
    """A guest on tables at ROOT, of 32 bits or PAE."""
    found = GuestMmu(GuestMemory(ram(), BASE, SIZE), Counts("vmm"))
    found.write_cr4(CR4_PAE if pae else CR4_PSE)
    found.write_cr3(ROOT)
    found.write_cr0(CR0_PG | CR0_PE | (CR0_WP if write_protect else 0))
    return found


def outcome(of: GuestMmu, address: int, write: bool, user: bool) -> tuple[object, ...]:
    """Where an access ends, or how it fails; what it does to the tables, and what it counts."""
    before = of._counts.get("vmm.guest_walk", 0)
    try:
        end: tuple[object, ...] = (of.translate(address, write=write, user=user),)
    except PageFault as fault:
        end = (fault.error_code, fault.address, fault.level)
    return (*end, ram().read(BASE + ROOT, 0x4000), of._counts["vmm.guest_walk"] - before)


ENTRIES = st.builds(lambda frame, bits: frame << 12 | bits, st.integers(0, 0xFF), st.integers(0, 0xFF))
ACCESS = st.tuples(st.integers(0, 3), st.integers(0, 0xFFF), st.booleans(), st.booleans())
CHANGE = st.tuples(st.sampled_from(["table", "page"]), st.integers(0, 3), ENTRIES)


@settings(max_examples=150, deadline=None)
@given(pae=st.booleans(), write_protect=st.booleans(), steps=st.lists(st.one_of(ACCESS, CHANGE, st.just("cr3")), min_size=2, max_size=14))
def test_a_remembered_walk_ends_as_a_new_one_would(pae: bool, write_protect: bool, steps: list[tuple[object, ...] | str]) -> None:
    memory, size = ram(), 8 if pae else 4
    write = memory.write64 if pae else memory.write32
    memory.write(BASE + ROOT, bytes(0x4000))
    directory = ROOT + 0x1000 if pae else ROOT
    if pae:
        memory.write64(BASE + ROOT, directory | P)
    write(BASE + directory, TABLE | P | RW | US)
    for i in range(4):
        write(BASE + TABLE + size * i, (0x40 + i) << 12 | P | RW | US)
    used = mmu(pae, write_protect)
    for step in steps:
        if step == "cr3":
            used.write_cr3(ROOT)
        elif step[0] in ("table", "page"):
            where, i, entry = step
            write(BASE + (directory if where == "table" else TABLE + size * int(str(i))),
                  TABLE | int(str(entry)) & 0x7F if where == "table" else int(str(entry)))
        else:
            page, offset, writes, user = step
            address = int(str(page)) << 12 | int(str(offset))
            tables = memory.read(BASE + ROOT, 0x4000)
            found = outcome(used, address, bool(writes), bool(user))
            memory.write(BASE + ROOT, tables)
            fresh = outcome(mmu(pae, write_protect), address, bool(writes), bool(user))
            assert found == fresh


def test_accessed_and_dirty_bits_that_the_guest_cleared_are_set_again() -> None:
    memory = ram()
    memory.write(BASE + ROOT, bytes(0x4000))
    memory.write32(BASE + ROOT, TABLE | P | RW)
    memory.write32(BASE + TABLE, 0x40000 | P | RW)
    used = mmu(False, True)
    for _ in range(3):
        assert used.translate(0x123, write=True) == 0x40123
        assert (memory.read32(BASE + ROOT), memory.read32(BASE + TABLE)) == (TABLE | P | RW | A, 0x40000 | P | RW | A | D)
        memory.write32(BASE + TABLE, 0x40000 | P | RW)
    assert used._counts["vmm.guest_walk"] == 3


def test_a_large_page_is_remembered_by_its_small_ones() -> None:
    memory = ram()
    memory.write(BASE + ROOT, bytes(0x4000))
    memory.write32(BASE + ROOT, P | RW | PS)
    used = mmu(False, True)
    assert [used.translate(address) for address in (0x1234, 0x1238, 0x5000, 0x1234)] == [0x1234, 0x1238, 0x5000, 0x1234]
    memory.write32(BASE + ROOT, 0)
    with pytest.raises(PageFault):
        used.translate(0x1234)
