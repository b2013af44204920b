"""Direct paging: what a guest may do to its own page tables, what each request costs, and that no table is ever its to write."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pvlab import DATA, EAX, ENTRY, ESP, EXIT_WITH_EAX, Asking, call, check_counts, guest, mov, run

from vmlab.errors import GuestError
from vmlab.vmm import xen
from vmlab.vmm.xen.frames import Kind

P, RW, US = 1, 2, 4
PIN_L1, PIN_L2, PIN_L3, UNPIN, NEW_BASE, FLUSH = 0, 1, 2, 4, 5, 6
POOL = 0x200                        # pfns from here are free to play with


def new_space(ask: Asking, first: int = POOL) -> tuple[int, int, int]:
    """An L3 with the kernel's own part and a hole, not yet pinned: (l3, user L2, hole L2) as mfns."""
    l3, user, hole = (ask.fresh_frame(first + i) for i in range(3))
    kernel = ask.ram.read64(ask.domain.root)
    assert ask.update((l3 << 12, kernel), ((l3 << 12) + 8, user << 12 | P), ((l3 << 12) + 24, hole << 12 | P)) == 0
    return l3, user, hole


def test_the_tables_of_start_of_day_are_counted() -> None:
    ask = Asking()
    assert ask.frames.kind(ask.domain.root >> 12) is Kind.L3
    assert ask.frames.uses(ask.domain.root >> 12) == 2    # pinned, and in CR3
    check_counts(ask.strategy)


def test_an_address_space_is_built_pinned_and_loaded() -> None:
    ask = Asking()
    l3, user, hole = new_space(ask)
    l1 = ask.fresh_frame(POOL + 3)
    page = ask.domain.mfn(POOL + 4)
    assert ask.update((l1 << 12, page << 12 | P | RW | US), (user << 12, l1 << 12 | P | RW | US)) == 0
    counts = ask.strategy.counts
    before = counts["mmu.validate"]
    assert ask.extended((PIN_L3, l3)) == 0
    assert counts["mmu.validate"] - before == 4         # L3, both L2, one L1; the kernel's were tables already
    assert (ask.frames.kind(l3), ask.frames.kind(user), ask.frames.kind(hole), ask.frames.kind(l1)) == (
        Kind.L3, Kind.L2, Kind.L2_HOLE, Kind.L1)
    assert ask.ram.read64((hole << 12) + 8 * (xen.HYPERVISOR_START >> 21 & 511)) == 0x3001  # the hypervisor filled it
    assert ask.extended((NEW_BASE, l3)) == 0
    assert ask.domain.root == l3 << 12 == ask.strategy.machine.cpu.cr(3)
    assert ask.hypervisor.memory.read(1 << 30, 16) == ask.ram.read(page << 12, 16)
    check_counts(ask.strategy)


def test_what_is_unpinned_and_unused_becomes_plain_memory_again() -> None:
    ask = Asking()
    l3, user, _ = new_space(ask)
    assert ask.extended((PIN_L3, l3), (UNPIN, l3)) == 0
    assert ask.frames.kind(user) is Kind.NONE
    assert ask.map(POOL << 12, l3 << 12 | P | RW) == 0
    check_counts(ask.strategy)


def test_a_page_that_is_mapped_writable_becomes_no_table() -> None:
    ask = Asking()
    l3, user, _ = new_space(ask)
    assert ask.map((POOL + 1) << 12, user << 12 | P | RW) == 0
    assert ask.extended((PIN_L3, l3)) == xen.EINVAL
    assert "writable page" in ask.strategy.refused[-1]
    assert ask.frames.kind(l3) is Kind.NONE     # all or nothing
    check_counts(ask.strategy)


def test_a_stale_writable_translation_is_flushed_before_the_page_becomes_a_table() -> None:
    ask = Asking()
    flushes: list[int] = []
    ask.frames._flush = lambda: flushes.append(1)
    l1 = ask.domain.mfn(POOL)
    assert ask.map(POOL << 12, l1 << 12 | P, flags=0) == 0      # no longer writable, but the guest does not flush
    ask.ram.write(l1 << 12, bytes(4096))
    assert ask.extended((PIN_L1, l1)) == 0
    assert flushes == [1]
    assert ask.extended((UNPIN, l1), (PIN_L1, l1)) == 0
    assert flushes == [1]


REFUSALS = {
    "a frame of the hypervisor": lambda ask, l1: ((l1 << 12), 0x20000 | P),
    "a frame beyond the guest": lambda ask, l1: ((l1 << 12), ask.domain.mfn(ask.domain.pages) << 12 | P),
    "its own table writable": lambda ask, l1: ((l1 << 12), l1 << 12 | P | RW),
    "the L3 writable": lambda ask, l1: ((l1 << 12), ask.domain.root | P | RW),
    "a large page": lambda ask, l1: (ask.ram.read64(ask.domain.root) & ~0xFFF | 0x7F0, ask.domain.mfn(512) << 12 | 0x83),
    "a global page": lambda ask, l1: ((l1 << 12), ask.domain.mfn(5) << 12 | 0x103),
    "an address of 41 bits": lambda ask, l1: ((l1 << 12), 1 << 40 | P),
    "NX, which is off": lambda ask, l1: ((l1 << 12), 1 << 63 | ask.domain.mfn(5) << 12 | P),
    "the hypervisor's part of an L2": lambda ask, l1: ((ask.ram.read64(ask.domain.root + 24) & ~0xFFF) + 8 * 450, 0),
    "no hole": lambda ask, l1: (ask.domain.root + 24, 0),
    "rights in an L3 entry": lambda ask, l1: (ask.domain.root + 8, ask.domain.mfn(POOL + 1) << 12 | P | RW),
    "an L2 in place of an L1": lambda ask, l1: (ask.ram.read64(ask.domain.root) & ~0xFFF | 0x7F8, ask.ram.read64(ask.domain.root) | RW),
    "the hole's L2 a second time": lambda ask, l1: (ask.domain.root + 8, ask.ram.read64(ask.domain.root + 24)),
    "the hypervisor's memory": lambda ask, l1: (0x3000, 0),
    "an address between two entries": lambda ask, l1: ((l1 << 12) + 4, 0),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_an_update_that_is_not_allowed_changes_nothing(what: str) -> None:
    ask = Asking()
    l1 = ask.fresh_frame(POOL)
    assert ask.extended((PIN_L1, l1)) == 0
    address, entry = REFUSALS[what](ask, l1)
    ask.put(DATA, struct.pack("<QQ", address, entry))
    before = bytes(ask.ram.bytes)
    assert ask.call(1, DATA, 1, 0, xen.DOMID_SELF) == xen.EINVAL
    assert ask.strategy.counts["safety.refused"] == 1
    assert ask.ram.bytes == before
    check_counts(ask.strategy)


def test_a_list_stops_at_the_first_that_fails_and_says_how_many_were_done() -> None:
    ask = Asking()
    frame = ask.domain.mfn(POOL) << 12
    ask.put(DATA, struct.pack("<6Q", frame, 1, frame + 8, 2, 0x3000, 3))
    assert ask.call(1, DATA, 3, DATA + 0x100, xen.DOMID_SELF) == xen.EINVAL
    assert struct.unpack("<I", ask.hypervisor.memory.read(DATA + 0x100, 4)) == (2,)
    assert (ask.ram.read64(frame), ask.ram.read64(frame + 8)) == (1, 2)     # a plain page: plain stores


def test_accessed_and_dirty_bits_are_kept_when_asked_for() -> None:
    ask = Asking()
    at = ask.entry_at(POOL << 12)
    ask.ram.write64(at, ask.ram.read64(at) | 0x60)
    entry = ask.domain.mfn(POOL) << 12 | P
    assert ask.update((at | xen.MMU_PT_UPDATE_PRESERVE_AD, entry)) == 0
    assert ask.ram.read64(at) == entry | 0x60


def test_the_machine_to_physical_table_is_read_by_the_guest_and_written_on_request_only() -> None:
    ask = Asking()
    mfn = ask.domain.mfn(POOL)
    at = xen.M2P_START + 4 * mfn
    assert struct.unpack("<I", ask.strategy.machine.cpu.read_linear(at, 4)) == (POOL,)
    assert ask.update((mfn << 12 | xen.MMU_MACHPHYS_UPDATE, 77)) == 0
    assert struct.unpack("<I", ask.strategy.machine.cpu.read_linear(at, 4)) == (77,)
    assert ask.update((0x3000 | xen.MMU_MACHPHYS_UPDATE, 77)) == xen.EINVAL
    with pytest.raises(GuestError, match="exception 14"):
        run(b"\xa3" + struct.pack("<I", at))


@pytest.mark.parametrize(("number", "arguments", "answer"), [
    (1, (DATA, 1, 0, 0), xen.ESRCH),                        # another domain
    (1, (DATA, 2049, 0, xen.DOMID_SELF), xen.EINVAL),
    (1, (0xF5800000, 1, 0, xen.DOMID_SELF), xen.EFAULT),
    (1, (0x7FFFFFF0, 1, 0, xen.DOMID_SELF), xen.EFAULT),
    (1, (DATA, 0, 0xF5800000, xen.DOMID_SELF), xen.EFAULT),
    (26, (DATA, 1, 0, 0), xen.ESRCH),
    (14, (0xF5800000, 0, 0, 0), xen.EINVAL),
    (14, (0x40000000, 0, 0, 0), xen.EINVAL),                # no table there
    (13, (DATA, 129), xen.EINVAL),
    (13, (0xFFFFFFF0, 1), xen.EFAULT),
])
def test_hostile_arguments(number: int, arguments: tuple[int, ...], answer: int) -> None:
    ask = Asking()
    assert ask.call(number, *arguments) == answer
    check_counts(ask.strategy)


def test_static_memory_offers_no_more_than_single_mappings() -> None:
    ask = Asking(guest(memory="static"))
    assert ask.update((0, 0)) == ask.extended((FLUSH, 0)) == xen.ENOSYS
    assert ask.map(0x5000, ask.domain.mfn(6) << 12 | P) == 0
    for memory, features in (("static", 0), ("direct", 1 << 5)):    # features.h: XENFEAT_mmu_pt_update_preserve_ad
        ask = Asking(guest(memory=memory))
        ask.put(DATA, bytes(4) + b"\xff" * 4)
        assert ask.call(17, xen.XENVER_GET_FEATURES, DATA) == 0
        assert struct.unpack("<I", ask.hypervisor.memory.read(DATA + 4, 4)) == (features,)


@pytest.mark.parametrize("batch", [1, 2, 8, 64])
def test_batching_divides_hypercalls(batch: int) -> None:
    """64 updates of a kernel's own, in lists of ``batch``: hand-counted."""
    total, frame = 64, Asking().domain.mfn(POOL) << 12
    updates = b"".join(struct.pack("<QQ", frame + 8 * i, i) for i in range(total))
    code = b"".join(call(1, DATA + 16 * first, batch, 0, xen.DOMID_SELF) for first in range(0, total, batch))
    stop, strategy = run(code + EXIT_WITH_EAX, updates)
    assert stop.exit_code == 0
    assert strategy.counts["hypercall.mmu_update"] == total // batch
    assert strategy.counts["mmu.update"] == total
    assert strategy.machine.events["trap.int"] == total // batch + 1
    assert [strategy.machine.ram.read64(frame + 8 * i) for i in range(total)] == list(range(total))


def test_a_multicall_is_one_transition() -> None:
    entries = b"".join(struct.pack("<8I", number, 99, *arguments) for number, arguments in (
        (17, (0, 0, 0, 0, 0, 0)), (44, (0,) * 6), (13, (0,) * 6), (14, (0x5000, 0, 0, 0, 0, 0))))
    stop, strategy = run(call(13, DATA, 4) + b"\xa1" + struct.pack("<I", DATA + 4) + EXIT_WITH_EAX, entries)
    assert stop.exit_code == 3 << 16
    results = [struct.unpack_from("<i", strategy.read_guest(DATA + 32 * i + 4, 4))[0] for i in range(4)]
    assert results == [3 << 16, xen.ENOSYS, xen.EINVAL, 0]
    assert strategy.machine.events["trap.int"] == 2     # the multicall, and the exit
    assert strategy.counts["hypercall.update_va_mapping"] == 1


def test_a_guest_that_gave_up_its_own_stack_ends_with_a_reason() -> None:
    """Its next push faults, and the fault has no stack to be built on either."""
    trap = struct.pack("<BBHI", 14, 0, xen.FLAT_RING1_CS, ENTRY) + bytes(8)
    with pytest.raises(GuestError, match="the guest's stack at 0x103ff0 is not there"):
        run(call(0, DATA) + call(14, 0x103000, 0, 0, 1) + mov(ESP, 0x104000) + b"\x50", trap)


def test_the_first_use_of_the_fpu_after_a_task_switch_is_an_exception_and_the_next_is_not() -> None:
    setup, use = call(0, DATA) + call(5, 1), b"\xd9\xe8"       # FLD1
    handler = ENTRY + len(setup) + len(use)
    stop, strategy = run(setup + use + use + mov(EAX, 9) + EXIT_WITH_EAX, struct.pack("<BBHI", 7, 0, xen.FLAT_RING1_CS, handler) + bytes(8))
    assert stop.exit_code == 9
    assert strategy.counts["reflect.7"] == strategy.machine.events["trap.nm"] == 1


# --- any sequence of requests -----------------------------------------------------------------------------

_FRAMES = st.integers(POOL, POOL + 7)
_ENTRIES = st.tuples(_FRAMES, st.sampled_from((0, P, P | RW, P | RW | US, P | 0x20, 0x83, P | 1 << 45)))
_OPERATIONS = st.one_of(
    st.tuples(st.just("update"), _FRAMES, st.sampled_from((0, 1, 2, 3, 4, 428, 511)), _ENTRIES),
    st.tuples(st.just("extended"), st.sampled_from((0, 1, 2, 4, 4, 5, 6, 7, 12, 3)), _FRAMES),
    st.tuples(st.just("map"), _FRAMES, _ENTRIES),
    st.tuples(st.just("gdt"), st.lists(_FRAMES, max_size=3)),
    st.tuples(st.just("descriptor"), _FRAMES, st.integers(0, 2**64 - 1)),
    st.tuples(st.just("space"), _FRAMES, _FRAMES, _FRAMES),
)


@given(st.lists(_OPERATIONS, min_size=1, max_size=25))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_counts_agree_with_the_tables_whatever_is_asked(operations: list[tuple]) -> None:  # type: ignore[type-arg]
    ask = Asking()
    domain = ask.domain
    for pfn in range(POOL, POOL + 8):
        ask.fresh_frame(pfn)
    for operation in operations:
        kind, *rest = operation
        if kind == "update":
            pfn, slot, (target, flags) = rest
            ask.update(((domain.mfn(pfn) << 12) + 8 * slot, domain.mfn(target) << 12 | flags))
        elif kind == "extended":
            ask.extended((rest[0], domain.mfn(rest[1])))
        elif kind == "map":
            ask.map(rest[0] << 12, domain.mfn(rest[1][0]) << 12 | rest[1][1])
        elif kind == "gdt":
            ask.put(DATA, struct.pack(f"<{len(rest[0])}I", *(domain.mfn(pfn) for pfn in rest[0])))
            ask.call(2, DATA, 512 * len(rest[0]))
        elif kind == "descriptor":
            ask.call(10, domain.mfn(rest[0]) << 12, 0, rest[1] & 0xFFFFFFFF, rest[1] >> 32)
        else:
            l3, user, hole = (domain.mfn(pfn) for pfn in rest)
            ask.update((l3 << 12, ask.ram.read64(domain.root)), ((l3 << 12) + 8, user << 12 | P), ((l3 << 12) + 24, hole << 12 | P))
    check_counts(ask.strategy)
    assert ask.ram.read(0x20000, 0xE000) == bytes(0xE000)   # the hypervisor's part was not the guest's to write
