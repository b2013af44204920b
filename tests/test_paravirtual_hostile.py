"""Hostile guests: any hypercall with any arguments ends in an answer or with the guest, and touches nothing but the guest.

Before a guest starts, all memory that is neither its own nor changed by the hypervisor is poisoned, and compared after.
"""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pvlab import DATA, ENTRY, ESP, EXIT_WITH_EAX, INT82, LOOP, Asking, call, check_counts, guest, image, mov, run

from vmlab.errors import GuestError
from vmlab.machine.pc import Machine
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.strategies.techniques import GUEST_MEMORY
from vmlab.vmm import xen
from vmlab.vmm.xen.domain import GUEST_FRAMES

M2P = 4 << 20
#: What the hypervisor itself changes (hpa), by width: accessed bits of its page tables, the M2P on request, TSS, IDT, shared_info.
CHANGING = {32: ((0x3000, 0x5000), (0x30000, 0x33000), (M2P, M2P + 0x10000)), 64: ((0x3000, 0x9000), (0x30000, 0x33000), (M2P, M2P + 0x20000))}
POOL = 0x200


def poison(strategy: Paravirtualization) -> bytes:
    """Fill what nobody should write with a pattern; returns all that must stay as it is."""
    ram = strategy.machine.ram
    for start, end in ((0x40000, M2P), (M2P + 0x20000, GUEST_FRAMES), (GUEST_FRAMES + GUEST_MEMORY, ram.size)):
        ram.bytes[start:end] = b"\xa5\x5a" * ((end - start) // 2)
    return untouched(strategy)


def untouched(strategy: Paravirtualization) -> bytes:
    ram = strategy.machine.ram
    pieces, at = [], 0
    for start, end in (*CHANGING[strategy.domain.abi.bits], (GUEST_FRAMES, GUEST_FRAMES + GUEST_MEMORY)):
        pieces.append(bytes(ram.bytes[at:start]))
        at = end
    return b"".join((*pieces, bytes(ram.bytes[at:])))


def nearby(strategy: Paravirtualization) -> bytes:
    """As :func:`untouched`, of the memory in reach of small mistakes: for many guests, one after another."""
    ram, end = strategy.machine.ram, GUEST_FRAMES + GUEST_MEMORY
    changing = CHANGING[strategy.domain.abi.bits][:-1]
    low = b"".join(bytes(ram.bytes[a:b]) for a, b in zip((0, *(b for _, b in changing)), (*(a for a, _ in changing), 1 << 20), strict=True))
    return low + bytes(ram.bytes[GUEST_FRAMES - (1 << 16):GUEST_FRAMES]) + bytes(ram.bytes[end:end + (1 << 16)])


_POINTERS = st.sampled_from((0, DATA, DATA + 0xFFC, 0x5000, 0x1FF_FFF0, 0x2000000, 0xF57FFFFC, 0xF5800000, 0xFC400000, 0xFFFFFFFF))
_WORDS = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 40), _POINTERS, st.just(xen.DOMID_SELF),
                   st.integers(0x4000, 0x4000 + POOL + 8), st.sampled_from((0xE019, 0xE021, 0xE02B, 0x20, 0xF4, 0xC18, 0x3F8)))
_NUMBERS = st.sampled_from([n for n, name in xen.HYPERCALLS.items() if name != "iret"] + [6, 7, 255, 0x7FFFFFFF])
_CALLS = st.tuples(_NUMBERS, st.lists(_WORDS, min_size=5, max_size=5), st.lists(_WORDS, min_size=8, max_size=8))


@pytest.mark.parametrize("memory", ["direct", "static"])
def test_any_hypercall_with_any_arguments_is_answered(memory: str) -> None:
    """Many cases on one guest, each on what those before it left."""
    strategy = Paravirtualization(Machine(path="portable", disk=bytes(512 * 8)), {"memory": memory})
    strategy.load(image(LOOP), "")
    before = poison(strategy)
    ask = Asking(strategy)

    @given(_CALLS)
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def answered(case: tuple[int, list[int], list[int]]) -> None:
        number, arguments, words = case
        if xen.HYPERCALLS.get(number) == "port_io" and arguments[0] == 1 and arguments[1] == 0xF4:
            return                      # the guest's own end
        ask.put(DATA, struct.pack("<8I", *words))
        try:
            answer = ask.call(number, *arguments)
        except GuestError:
            return
        assert isinstance(answer, int)

    answered()
    check_counts(strategy)
    assert untouched(strategy) == before


@given(st.binary(max_size=64), st.integers(0, 7))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_code_ends_as_a_guest_does(code: bytes, setup: int) -> None:
    """Random bytes in ring 1, with handlers that go nowhere good for some exceptions."""
    traps = struct.pack("<BBHI", 14, 0, xen.FLAT_RING1_CS, ENTRY) + struct.pack("<BBHI", 13, 4, xen.FLAT_RING1_CS, ENTRY) + bytes(8)
    strategy = guest((call(0, DATA) if setup & 1 else b"") + code + LOOP, traps)
    before = nearby(strategy)
    with contextlib.suppress(GuestError):
        strategy.run(3000)
    assert nearby(strategy) == before


@given(st.lists(_WORDS, min_size=6, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_frame_for_iret_goes_to_ring_1_or_3_or_ends_the_guest(words: list[int]) -> None:
    """EAX, EIP, CS, EFLAGS, ESP, SS as the guest likes; wherever it arrives, it is no more privileged and cannot touch the flags of the machine."""
    strategy = guest(b"".join(b"\x68" + struct.pack("<I", word) for word in reversed(words)) + mov(0, 23) + INT82)
    before = nearby(strategy)
    with contextlib.suppress(GuestError):
        strategy.run(200)
    strategy.machine.cpu.load()
    assert strategy.machine.cpu.cpl in (1, 3)
    assert strategy.machine.cpu.system_flags & 0x23200 == 0x200      # IF on, IOPL 0, VM off
    assert nearby(strategy) == before


@pytest.mark.parametrize(("code", "reason"), [
    (call(1, DATA, 1, 0, xen.DOMID_SELF), "asked to write"),            # an entry of the hypervisor's page table
    (call(54, 0, 0x20, DATA), "offered a ring"),                        # a ring in the hypervisor's memory
    (call(2, DATA, 1), "descriptor table"),                             # a descriptor table in it
    (call(10, 0x20000, 0, 0xFFFF, 0xCF9B00), "descriptor"),             # a descriptor of the hypervisor's
    (call(55, 1, 0x20, 1, 0x11), "port 0x20"),
])
def test_what_is_refused_is_recorded_in_words(code: bytes, reason: str) -> None:
    strategy = Paravirtualization(Machine(path="portable", disk=bytes(512)), {"memory": "direct"})
    strategy.load(image(code + EXIT_WITH_EAX, struct.pack("<QQ", 0x3000, 0x1000003)), "")
    before = poison(strategy)
    stop = strategy.run(1000)
    assert stop.exit_code == xen.EINVAL & 0xFFFFFFFF
    assert strategy.counts["safety.refused"] == 1
    assert reason in strategy.refused[0]
    assert untouched(strategy) == before


def test_a_descriptor_of_ring_0_becomes_one_of_ring_1() -> None:
    ask = Asking()
    frame = ask.fresh_frame(POOL)
    ask.ram.write(frame << 12, struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
    ask.put(DATA, struct.pack("<I", frame))
    assert ask.call(2, DATA, 3) == 0
    code, data = struct.unpack("<QQ", ask.ram.read((frame << 12) + 8, 16))
    assert code >> 45 & 3 == data >> 45 & 3 == 1
    limit = code & 0xFFFF | code >> 32 & 0xF0000
    assert limit == (xen.HYPERVISOR_START >> 12) - 1
    assert ask.strategy.machine.cpu.read_linear(0xFC400008, 8) == struct.pack("<Q", code)    # where the CPU sees it
    assert ask.map(POOL << 12, frame << 12 | 3) == xen.EINVAL                                # and nobody writes it
    assert ask.call(10, (frame << 12) + 8, 0, 0, 0x8900) == xen.EINVAL                       # no task gate either
    assert ask.call(10, (frame << 12) + 8, 0, 0xFFFF, 0x00CFFA00) == 0


def test_a_guest_that_runs_its_stack_into_the_hypervisor_is_ended() -> None:
    trap = struct.pack("<BBHI", 6, 0, xen.FLAT_RING1_CS, ENTRY) + bytes(8)
    with pytest.raises(GuestError, match="0xf58000f4, which is not its own"):
        run(call(0, DATA) + mov(ESP, 0xF5800100) + b"\x0f\x0b", trap)
