"""Event channels, timers and devices of a paravirtual guest: virtual time, ring and ports, and guests that ask for nonsense."""

from __future__ import annotations

import struct

import pytest
from pvlab import DATA, ENTRY, EXIT_WITH_EAX, LOOP, Asking, call, check_counts, image, run

from vmlab.machine.devices import disk as d
from vmlab.machine.pc import Machine
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.vmm import xen
from vmlab.vmm.xen.ring import RING_SIZE

ARGUMENT, RING, BUFFER = DATA + 0x800, 0x300, 0x310     # an address, and two frames (pfn)
SECTORS = 64


def with_disk() -> Asking:
    content = b"".join(bytes((n,)) * d.SECTOR for n in range(SECTORS))
    strategy = Paravirtualization(Machine(path="portable", disk=content), {"memory": "direct"})
    strategy.load(image(LOOP), "")
    return Asking(strategy)


def events(ask: Asking, command: int, *words: int) -> tuple[int, list[int]]:
    """event_channel_op: its answer and the structure afterwards."""
    ask.put(ARGUMENT, struct.pack("<6I", *(*words, 0, 0, 0, 0, 0, 0)[:6]))
    result = ask.call(32, command, ARGUMENT)
    return result, list(struct.unpack("<6I", ask.hypervisor.memory.read(ARGUMENT, 24)))


# --- ports ---------------------------------------------------------------------------------------------


def test_each_source_gets_a_port_of_its_own_once() -> None:
    ask = Asking()
    assert events(ask, xen.EVTCHNOP_BIND_VIRQ, xen.VIRQ_TIMER, 0) == (0, [0, 0, 1, 0, 0, 0])
    assert events(ask, xen.EVTCHNOP_BIND_PIRQ, 4)[1][2] == 2
    assert events(ask, xen.EVTCHNOP_BIND_IPI)[1][1] == 3
    assert events(ask, xen.EVTCHNOP_BIND_VIRQ, xen.VIRQ_TIMER, 0)[0] == xen.EEXIST
    assert events(ask, xen.EVTCHNOP_STATUS, xen.DOMID_SELF, 1)[1][2:5] == [xen.EVTCHNSTAT_VIRQ, 0, xen.VIRQ_TIMER]
    assert events(ask, xen.EVTCHNOP_CLOSE, 1)[0] == 0
    assert events(ask, xen.EVTCHNOP_STATUS, xen.DOMID_SELF, 1)[1][2] == xen.EVTCHNSTAT_CLOSED
    assert events(ask, xen.EVTCHNOP_BIND_VIRQ, xen.VIRQ_TIMER, 0)[1][2] == 1


@pytest.mark.parametrize(("command", "words", "answer"), [
    (xen.EVTCHNOP_BIND_VIRQ, (24, 0), xen.EINVAL),
    (xen.EVTCHNOP_BIND_VIRQ, (0, 1), xen.ENOENT),
    (xen.EVTCHNOP_BIND_PIRQ, (16,), xen.EINVAL),
    (xen.EVTCHNOP_BIND_IPI, (1,), xen.ENOENT),
    (xen.EVTCHNOP_SEND, (7,), xen.EINVAL),
    (xen.EVTCHNOP_UNMASK, (1 << 31,), xen.EINVAL),
    (xen.EVTCHNOP_STATUS, (0, 1), xen.ESRCH),
    (xen.EVTCHNOP_STATUS, (xen.DOMID_SELF, 4096), xen.EINVAL),
    (99, (), xen.ENOSYS),
])
def test_events_that_are_not_there(command: int, words: tuple[int, ...], answer: int) -> None:
    assert events(Asking(), command, *words)[0] == answer


def test_there_are_1023_ports() -> None:
    ask = Asking()
    for _ in range(1023):
        assert events(ask, xen.EVTCHNOP_BIND_IPI)[0] == 0
    assert events(ask, xen.EVTCHNOP_BIND_IPI)[0] == xen.ENOSPC


def test_a_send_to_oneself_is_an_event() -> None:
    ask = Asking()
    port = events(ask, xen.EVTCHNOP_BIND_IPI)[1][1]
    assert events(ask, xen.EVTCHNOP_SEND, port)[0] == 0
    assert ask.domain.shared.pending


# --- time ----------------------------------------------------------------------------------------------

#: Bind VIRQ_TIMER, and a handler that ends the run with the low half of the time stamp counter.
_HANDLER = ENTRY + 0x100


def _timed(arm: bytes, wait: bytes = call(29, xen.SCHEDOP_BLOCK, 0) + LOOP) -> tuple[int, Paravirtualization]:
    setup = (call(4, xen.FLAT_RING1_CS, _HANDLER, xen.FLAT_RING1_CS, _HANDLER) + call(32, xen.EVTCHNOP_BIND_VIRQ, DATA) + arm + wait)
    code = setup.ljust(0x100, b"\x90") + b"\x0f\x31" + EXIT_WITH_EAX
    stop, strategy = run(code, struct.pack("<III", xen.VIRQ_TIMER, 0, 0).ljust(0x40, b"\0") + struct.pack("<QI", 50_000, 0))
    assert stop.exit_code is not None
    return stop.exit_code, strategy


#: One tick of the 8254: the physical timer is no finer.
TICK = 839


@pytest.mark.parametrize("arm", [call(15, 50_000, 0), call(24, xen.VCPUOP_SET_SINGLESHOT_TIMER, 0, DATA + 0x40),
                                 call(24, xen.VCPUOP_SET_PERIODIC_TIMER, 0, DATA + 0x40)])
def test_a_timer_comes_when_it_is_due_and_the_wait_costs_no_instructions(arm: bytes) -> None:
    time, strategy = _timed(arm)
    assert 50_000 <= time <= 50_000 + 2 * TICK + 200
    assert strategy.snapshot().kernel < 100
    assert strategy.machine.events["interrupt.delivered"] == strategy.counts["event.upcall"] == 1
    assert strategy.machine.events["idle"] == 1
    assert strategy.domain.shared.masked    # during the upcall


def test_a_timer_interrupts_a_kernel_that_runs_with_events_let_in() -> None:
    unmask = b"\xc6\x05" + struct.pack("<IB", 0x103001, 0)      # movb $0, evtchn_upcall_mask
    share = call(14, 0x103000, 0x32003, 0, 2)                   # map shared_info
    time, strategy = _timed(share + call(15, 50_000, 0), unmask + LOOP)
    assert 50_000 <= time <= 50_000 + 2 * TICK + 10
    assert strategy.snapshot().kernel > 40_000


def test_a_time_that_has_passed_is_due_at_once_and_zero_is_never() -> None:
    assert _timed(call(15, 1, 0))[0] < 3 * TICK
    stop, strategy = run(call(15, 50_000, 0) + call(15, 0, 0) + call(29, xen.SCHEDOP_BLOCK, 0))
    assert stop.exit_code is None
    assert "interrupt.delivered" not in strategy.machine.events


def test_a_guest_that_blocks_with_no_event_of_its_own_ends() -> None:
    """A periodic timer whose event it never bound wakes the hypervisor, and nobody else."""
    stop, strategy = run(call(24, xen.VCPUOP_SET_PERIODIC_TIMER, 0, DATA + 0x40) + call(29, xen.SCHEDOP_BLOCK, 0),
                         bytes(0x40) + struct.pack("<Q", 50_000))
    assert "halted" in stop.reason.value
    assert strategy.machine.events["interrupt.delivered"] > 1000


def test_the_clock_in_shared_memory_is_the_time_stamp_counter() -> None:
    ask = Asking()
    version, _, stamp, system, factor, shift = struct.unpack("<IIQQIb", ask.ram.read(ask.domain.shared.frame + 32, 29))
    assert version % 2 == 0
    assert system + (((123_456_789 - stamp) << shift) * factor >> 32) == 123_456_789
    assert struct.unpack("<III", ask.ram.read(ask.domain.shared.frame + 2304, 12)) == (2, xen.WALL_CLOCK, 0)


@pytest.mark.parametrize(("arguments", "answer"), [
    ((xen.VCPUOP_IS_UP, 0, 0), 1), ((xen.VCPUOP_IS_UP, 1, 0), xen.ENOENT), ((0, 0, 0), xen.ENOSYS),
    ((xen.VCPUOP_SET_PERIODIC_TIMER, 0, 0xF5800000), xen.EFAULT),
    ((xen.VCPUOP_SET_PERIODIC_TIMER, 0, ARGUMENT), xen.EINVAL),        # a period of 0
    ((xen.VCPUOP_GET_RUNSTATE_INFO, 0, ARGUMENT), 0),
])
def test_vcpu_op(arguments: tuple[int, int, int], answer: int) -> None:
    ask = Asking()
    ask.put(ARGUMENT, bytes(16))
    assert ask.call(24, *arguments) == answer


# --- the disk --------------------------------------------------------------------------------------------


def connect(ask: Asking) -> int:
    """A ring in a frame of the guest's: the port."""
    ask.ram.write(ask.domain.machine(RING << 12), struct.pack("<4I", 0, 1, 0, 1) + bytes(4080))
    assert ask.call(54, xen.RINGOP_CONNECT, ask.domain.mfn(RING), ARGUMENT) == 0
    port, sectors = struct.unpack("<II", ask.hypervisor.memory.read(ARGUMENT, 8))
    assert sectors == SECTORS
    return port


def request(ask: Asking, index: int, operation: int, sector: int, *segments: tuple[int, int, int], identity: int = 0) -> None:
    raw = struct.pack("<BBHQQ", operation, len(segments), 0, identity or index + 1, sector)
    raw += b"".join(struct.pack("<IBBxx", *segment) for segment in segments)
    ask.ram.write(ask.domain.machine(RING << 12) + 64 + 108 * (index % RING_SIZE), raw)
    ask.ram.write32(ask.domain.machine(RING << 12), index + 1)


def settle(ask: Asking) -> None:
    """Let the physical disk finish all that it was given."""
    machine = ask.strategy.machine
    while machine.wait():
        ask.hypervisor.interrupt()


def responses(ask: Asking) -> list[tuple[int, int]]:
    """(id, status) of each response so far."""
    base = ask.domain.machine(RING << 12)
    return [struct.unpack("<QBxh", ask.ram.read(base + 64 + 108 * i, 12))[::2] for i in range(ask.ram.read32(base + 8))]


def test_the_ring_moves_sectors_both_ways_for_one_event_each() -> None:
    ask = with_disk()
    port = connect(ask)
    frame = ask.domain.mfn(BUFFER)
    request(ask, 0, 0, 7, (frame, 0, 1), (frame + 1, 4, 4))
    ask.ram.write(frame + 2 << 12, b"\xaa" * 4096)
    request(ask, 1, 1, 60, (frame + 2, 2, 3))
    assert events(ask, xen.EVTCHNOP_SEND, port)[0] == 0
    assert responses(ask) == []
    settle(ask)
    assert responses(ask) == [(1, 0), (2, 0)]
    assert ask.ram.read(frame << 12, 1024) == b"\x07" * 512 + b"\x08" * 512
    assert ask.ram.read((frame + 1 << 12) + 2048, 512) == b"\x09" * 512
    disk = ask.strategy.machine.disk
    assert disk is not None and disk.content[60 * 512 : 62 * 512] == b"\xaa" * 1024
    assert (ask.strategy.counts["ring.request"], ask.strategy.counts["vmm.disk"]) == (2, 3)
    assert ask.domain.shared.pending
    check_counts(ask.strategy)


@pytest.mark.parametrize(("operation", "sector", "segments", "status"), [
    (9, 0, ((0, 0, 0),), -2),
    (0, 0, (), -1),
    (0, SECTORS - 1, ((BUFFER, 0, 1),), -1),            # beyond the end
    (0, 1 << 60, ((BUFFER, 0, 0),), -1),
    (0, 0, ((BUFFER, 3, 2),), -1),
    (0, 0, ((BUFFER, 0, 8),), -1),
    (0, 0, ((-0x3000, 0, 0),), -1),                     # the hypervisor's memory
    (1, 0, ((1 << 20, 0, 0),), -1),                     # no memory at all
    (0, 0, ((BUFFER, 0, 0), ("table", 0, 0)), -1),      # the second segment is a page table
])
def test_the_ring_refuses_what_is_not_the_guests(operation: int, sector: int, segments: tuple, status: int) -> None:  # type: ignore[type-arg]
    ask = with_disk()
    port = connect(ask)
    first = ask.domain.mfn(0)
    request(ask, 0, operation, sector, *(
        (ask.domain.root >> 12 if pfn == "table" else (first + pfn) & 0xFFFFFFFF, a, b) for pfn, a, b in segments))
    before = bytes(ask.ram.bytes[: 16 << 20])
    events(ask, xen.EVTCHNOP_SEND, port)
    settle(ask)
    assert responses(ask) == [(1, status)]
    assert ask.ram.bytes[: 0x32000] == before[: 0x32000]
    assert "vmm.disk" not in ask.strategy.counts
    check_counts(ask.strategy)


def test_a_ring_that_claims_more_than_fits_is_not_read() -> None:
    ask = with_disk()
    port = connect(ask)
    ask.ram.write32(ask.domain.machine(RING << 12), 0x80000000)
    assert events(ask, xen.EVTCHNOP_SEND, port)[0] == 0
    assert responses(ask) == []
    assert ask.strategy.counts["safety.refused"] == 1


def test_a_page_under_transfer_becomes_no_page_table() -> None:
    ask = with_disk()
    port = connect(ask)
    frame = ask.fresh_frame(BUFFER)
    request(ask, 0, 0, 0, (frame, 0, 0))
    events(ask, xen.EVTCHNOP_SEND, port)
    assert ask.extended((0, frame)) == xen.EINVAL
    assert ask.extended((0, ask.domain.mfn(RING))) == xen.EINVAL
    settle(ask)
    assert ask.extended((0, frame)) == 0
    assert not ask.ram.read64(frame << 12)      # sector 0 holds zeros: a table without entries


def test_the_disk_by_ports_translates_addresses() -> None:
    ask = with_disk()
    events(ask, xen.EVTCHNOP_BIND_PIRQ, 11)
    for offset, value in ((d.AT_SECTOR, 5), (d.AT_COUNT, 2), (d.AT_ADDRESS, BUFFER << 12), (d.AT_ADDRESS_HIGH, 0), (d.AT_COMMAND, d.READ)):
        assert ask.call(55, 1, d.FIRST_PORT + offset, 4, value) == 0
    assert ask.call(55, 0, d.FIRST_PORT + d.AT_COMMAND, 4) == d.BUSY
    settle(ask)
    assert ask.call(55, 0, d.FIRST_PORT + d.AT_COMMAND, 4) == d.DONE
    assert ask.domain.shared.pending
    assert ask.ram.read(ask.domain.machine(BUFFER << 12), 1024) == b"\x05" * 512 + b"\x06" * 512


@pytest.mark.parametrize("address", [32 << 20, 0xFFFFFF00, 2])
def test_the_disk_by_ports_stays_in_the_guest(address: int) -> None:
    ask = with_disk()
    for offset, value in ((d.AT_COUNT, 1), (d.AT_ADDRESS, address), (d.AT_COMMAND, d.READ)):
        ask.call(55, 1, d.FIRST_PORT + offset, 4, value)
    assert ask.call(55, 0, d.FIRST_PORT + d.AT_COMMAND, 4) == d.DONE | d.ERROR | d.BAD_ADDRESS << 8


def test_the_disk_by_ports_writes_no_page_table() -> None:
    ask = with_disk()
    table = ask.domain.root - ask.domain.machine(0)
    for offset, value in ((d.AT_COUNT, 1), (d.AT_ADDRESS, table), (d.AT_COMMAND, d.READ)):
        ask.call(55, 1, d.FIRST_PORT + offset, 4, value)
    assert ask.call(55, 0, d.FIRST_PORT + d.AT_COMMAND, 4) == d.DONE | d.ERROR | d.BAD_ADDRESS << 8
    assert ask.strategy.counts["safety.refused"] == 1


def test_a_guest_without_a_disk_finds_none() -> None:
    ask = Asking()
    assert ask.call(55, 0, d.FIRST_PORT, 4) == 0xFFFFFFFF
    assert ask.call(54, xen.RINGOP_CONNECT, ask.domain.mfn(RING), ARGUMENT) == xen.ENODEV


@pytest.mark.parametrize("port", [0x20, 0xA1, 0x40, 0x43, 0x61])
def test_the_hypervisors_devices_are_not_the_guests(port: int) -> None:
    ask = Asking()
    assert ask.call(55, 0, port, 1) == 0xFF
    assert ask.call(55, 1, port, 1, 0) == xen.EINVAL
    assert ask.strategy.counts["safety.refused"] == 2
