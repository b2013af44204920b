"""The walker of vmlab.machine.paging against the CPU's own: random tables, one real access, the same answer.

The CPU runs an instruction that reads, writes or fetches at the address; the walker is asked first, on a copy of
the tables. Fault or not, error code, CR2, the accessed and dirty bits, and the byte that was reached must agree.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machinelab import CODE, HANDLERS, IDT, STACK0, asm, gate

from vmlab.machine import memory
from vmlab.machine.cpu import Segment
from vmlab.machine.delivery import PAGE_FAULT
from vmlab.machine.paging import CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, EFER_LMA, EFER_NXE, NX, PS, RW, US, A, D, P, PageFault, Tables, translate
from vmlab.machine.pc import Machine, StopReason
from vmlab.machine.state import CS, DS, ES, FS, GS, RAX, RBX, RSP, SS

TABLES, TARGET = 0x80000, 0x100000       # the levels, a page each from TABLES; the page that is reached
LARGE = 0x400000                          # where a large page leads: the second 4 MiB of RAM
PROBE4, PROBE64 = 0x40C05000, 0x40C05000  # slots 1 / 1·3·… are private to the probe: code and stack are mapped elsewhere
EFER_LME = 1 << 8


@dataclass(frozen=True)
class Case:
    mode: str
    rights: tuple[int, ...]     # of each level's entry for the probed address, root first
    large: bool
    access: str                 # read, write, fetch
    user: bool
    wp: bool
    pse: bool
    nxe: bool


_RIGHTS = st.sampled_from([P | RW | US] * 3 + [P, P | RW, P | US, RW | US, P | RW | US | A, P | RW | US | A | D])
_CASES = st.builds(Case, st.sampled_from(["32", "pae", "64"]), st.tuples(*[_RIGHTS] * 4), st.booleans(), st.sampled_from(["read", "write", "fetch"]),
                   st.booleans(), st.booleans(), st.booleans(), st.booleans())
_NX_AT = st.integers(-3, 3)


@functools.cache
def machine() -> Machine:
    return Machine(8 << 20, "portable")


def build(ram_write: object, case: Case, nx_at: int) -> tuple[Tables, list[int], int]:
    """Tables that map the low 2 MiB for everybody, and the probed page by ``case``; (registers, entries, where it leads)."""
    ram = machine().ram
    for page in range(8):
        ram.write(TABLES + 0x1000 * page, bytes(0x1000))
    everything = P | RW | US
    entries: list[int] = []
    if case.mode == "32":
        ram.write32(TABLES, TABLES + 0x4000 | everything)
        for i in range(1024):
            ram.write32(TABLES + 0x4000 + 4 * i, i << 12 | everything)
        large = case.large
        first = LARGE | PS | case.rights[0] if large else TABLES + 0x1000 | case.rights[0]
        ram.write32(TABLES + 4 * (PROBE4 >> 22), first)
        entries.append(TABLES + 4 * (PROBE4 >> 22))
        if not large or not case.pse:
            # Without CR4.PSE the PS bit means nothing: the same entry leads to a table at LARGE.
            table = LARGE if large else TABLES + 0x1000
            ram.write(table, bytes(0x1000))
            entries.append(table + 4 * (PROBE4 >> 12 & 1023))
            ram.write32(entries[-1], TARGET | case.rights[1])
        leads = LARGE + (PROBE4 & 0x3FFFFF) if large and case.pse else TARGET
        tables = Tables(0x11 | CR0_PG | (CR0_WP if case.wp else 0), TABLES, CR4_PSE if case.pse else 0, 0)
        return tables, entries, leads
    shifts = [39, 30, 21, 12] if case.mode == "64" else [30, 21, 12]
    nx = NX if case.nxe else 0
    at = TABLES
    for depth, shift in enumerate(shifts):
        slot = at + 8 * (PROBE64 >> shift & 511)
        rights = case.rights[depth] | (nx if depth == nx_at else 0)
        pdpte = case.mode == "pae" and depth == 0
        if pdpte:
            rights &= P         # the other bits of a PAE PDPTE are reserved
            ram.write64(at, TABLES + 0x4000 | P)        # the low gigabyte
        elif depth == 0:
            ram.write64(at, TABLES + 0x3000 | everything)
            rights |= 0
        if depth == 0 and case.mode == "64":
            # One PML4 entry serves both: its rights are the probe's, so the probe's slot is another one.
            slot = at + 8 * 1
        following = TABLES + 0x1000 * (depth + 5)
        last = shift == 12 or (case.large and shift == 21)
        if shift == 21 and case.large:
            ram.write64(slot, LARGE | PS | rights)
        elif shift == 12:
            ram.write64(slot, TARGET | rights)
        else:
            ram.write64(slot, following | rights)
        if not pdpte:
            entries.append(slot)
        if last:
            break
        at = following
    if case.mode == "64":
        ram.write64(TABLES + 0x3000, TABLES + 0x4000 | everything)
    for i in range(4):
        ram.write64(TABLES + 0x4000 + 8 * i, i << 21 | PS | everything)
    leads = LARGE + (PROBE64 & 0x1FFFFF) if case.large else TARGET
    efer = (EFER_NXE if case.nxe else 0) | (EFER_LMA | EFER_LME if case.mode == "64" else 0)
    return Tables(0x11 | CR0_PG | (CR0_WP if case.wp else 0), TABLES, CR4_PAE, efer), entries, leads


def probe_address(case: Case) -> int:
    return PROBE4 if case.mode == "32" else PROBE64 | (1 << 39 if case.mode == "64" else 0)


def access_by_cpu(case: Case, tables: Tables) -> tuple[int, int] | None:
    """Let guest code make the access; (error code, CR2) of the page fault, or None."""
    m = machine()
    bits = 64 if case.mode == "64" else 32
    text = {"read": "mov al, [rbx]", "write": "mov [rbx], al", "fetch": "jmp rbx"}[case.access]
    m.ram.write(CODE, asm((text if bits == 64 else text.replace("rbx", "ebx")) + "; nop; nop", CODE, bits) + b"\xcd\x30")
    m.ram.write(0x1000, struct.pack("<6Q", 0, 0x00CF9B000000FFFF if bits == 32 else 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0))
    for vector, dpl in ((0x30, 3), (PAGE_FAULT, 0)):
        raw = gate(HANDLERS, dpl=dpl)
        m.ram.write(IDT + (16 if bits == 64 else 8) * vector, raw + bytes(8) if bits == 64 else raw)
    m.ram.write(HANDLERS, b"\xf4")
    m.ram.write(0x3000, bytes(0x68))
    m.ram.write(0x3004, struct.pack("<Q", STACK0) if bits == 64 else struct.pack("<II", STACK0, 0x10))
    cpu, dpl = m.cpu, 3 << 13 if case.user else 0
    cpu.load()
    cpu.set_crs(0x11, 0, 0)
    cpu.set_efer(tables.efer & ~EFER_LMA)
    cpu.store()
    cpu.set_crs(tables.cr0, tables.cr3, tables.cr4)
    cpu.load()
    cpu.set_table("gdt", Segment(0, 0x1000, 0x2F, 0))
    cpu.set_table("idt", Segment(0, IDT, 0xFFF, 0))
    cpu.set_table("tr", Segment(0x28, 0x3000, 0x67, 0x8900))
    for number in (SS, DS, ES, FS, GS):
        cpu.set_segment(number, Segment(0x10 | (3 if case.user else 0), 0, 0xFFFFFFFF, 0x00CF9300 | dpl))
    flags = (0x00AF9B00 if bits == 64 else 0x00CF9B00) | dpl
    cpu.set_segment(CS, Segment(8 | (3 if case.user else 0), 0, 0xFFFFFFFF, flags))
    cpu.set_cpl(3 if case.user else 0)
    cpu.eflags = 2
    cpu.set_gpr(RBX, probe_address(case), 8)
    cpu.set_gpr(RAX, 0)
    cpu.set_gpr(RSP, STACK0 - 0x800)
    cpu.rip = CODE
    cpu.store()
    for block in list(m.counter.blocks.values()):
        m.counter.close(block)
    m.engine.uc.ctl_flush_tb()
    m.engine.flush_tlb()
    assert m.run(1 << 60).reason is StopReason.HALTED
    cpu.load()
    top = cpu.gpr(RSP)
    code = m.ram.read64(top) if bits == 64 else m.ram.read32(top)
    # A page fault's frame is one item longer than INT's: tell them apart by the count.
    items = (STACK0 - top if case.user else STACK0 - 0x800 - top) // (8 if bits == 64 else 4)
    plain = 5 if bits == 64 or case.user else 3
    return (code, cpu.cr2) if items == plain + 1 else None


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_CASES, _NX_AT)
def test_the_walker_agrees_with_the_cpu(case: Case, nx_at: int) -> None:
    ram = machine().ram
    tables, entries, leads = build(None, case, nx_at)
    ram.write(leads, b"\xcd\x30")
    before = [ram.read64(at) for at in entries]
    address = probe_address(case)
    said: object
    try:
        reached = translate(ram, tables, address, write=case.access == "write", user=case.user, fetch=case.access == "fetch")
        said = None
        assert reached == leads
    except PageFault as fault:
        said = (fault.error_code, fault.address)
    walked = [ram.read64(at) & (A | D) for at in entries]
    for at, value in zip(entries, before, strict=True):
        ram.write64(at, value)
    assert access_by_cpu(case, tables) == said
    if said is None:
        # A faulting walk may or may not have set accessed bits on the way (SDM Vol. 3A §4.8); a good one has.
        assert [ram.read64(at) & (A | D) for at in entries] == walked
        if case.access == "write":
            assert ram.read(leads, 1) == b"\0"


@pytest.mark.parametrize("mode", ["32", "pae", "64"])
def test_a_probe_without_marks_leaves_the_tables_alone(mode: str) -> None:
    case = Case(mode, (P | RW | US,) * 4, False, "write", True, True, True, True)
    tables, entries, leads = build(None, case, -1)
    before = [machine().ram.read64(at) for at in entries]
    assert translate(machine().ram, tables, probe_address(case), write=True, user=True, mark=False) == leads
    assert [machine().ram.read64(at) for at in entries] == before


def test_unpaged_addresses_are_physical() -> None:
    assert translate(machine().ram, Tables(0x11, 0, 0, 0), 0xFFFF1234) == 0xFFFF1234


def test_pages_in_use_are_those_that_are_not_all_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the host tells what was never touched or not."""
    ram = Machine(1 << 20, "portable").ram
    for at, data in ((0x5000, b"x"), (0x5FFF, b"y"), (0x40000, b"\0"), (0xFFFFF, b"z")):
        ram.write(at, data)
    first = list(ram.pages_in_use(0, ram.size))
    assert {0x5000, 0xFF000} <= {at for at, _ in first} and 0x40000 not in {at for at, _ in first}
    assert all(page == ram.read(at, 0x1000) for at, page in first)
    assert [at for at, _ in ram.pages_in_use(0x5000, 0x2000)] == [0]
    monkeypatch.setattr(memory, "_touched", lambda address, size: None)
    assert list(ram.pages_in_use(0, ram.size)) == first
