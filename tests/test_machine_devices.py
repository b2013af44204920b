"""The timer and the disk, driven by small programs and by their registers; hand-computed times."""

from __future__ import annotations

import pytest
from machinelab import DATA, DEBUG_EXIT, PATHS, Bench, Bits, Clock, asm

from vmlab.errors import ConfigError
from vmlab.machine.devices import disk as d
from vmlab.machine.devices.pit import Pit, SystemControl, time_of
from vmlab.machine.pc import Machine


def pit() -> tuple[Clock, Bits, Pit]:
    clock = Clock()
    line = Bits(clock)
    return clock, line, Pit(clock.timeline, line)


def program(chip: Pit, channel: int, mode: int, count: int, bcd: int = 0) -> None:
    chip.write(3, 1, channel << 6 | 3 << 4 | mode << 1 | bcd)
    chip.write(channel, 1, count & 0xFF)
    chip.write(channel, 1, count >> 8)


def count_of(chip: Pit, channel: int) -> int:
    return chip.read(channel, 1) | chip.read(channel, 1) << 8


# ---- 8254
def test_mode_0_interrupts_once_after_n_plus_1_clocks() -> None:
    clock, line, chip = pit()
    program(chip, 0, 0, 100)
    assert not line.level
    clock.to_tick(100)
    assert not line.edges
    clock.to_tick(101)
    assert line.edges == [time_of(101)]
    clock.to_tick(100_000)
    assert len(line.edges) == 1


def test_mode_0_counts_on_below_zero() -> None:
    clock, _, chip = pit()
    program(chip, 0, 0, 5)
    seen = []
    for tick in (1, 2, 6, 7, 8):
        clock.to_tick(tick)
        seen.append(count_of(chip, 0))
    assert seen == [5, 4, 0, 0xFFFF, 0xFFFE]


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_periodic_modes_interrupt_every_n_clocks(mode: int) -> None:
    clock, line, chip = pit()
    program(chip, 0, mode, 1000)
    clock.to_tick(3500)
    assert line.edges == [time_of(1001), time_of(2001), time_of(3001)]


def test_a_count_of_0_is_the_largest() -> None:
    clock, line, chip = pit()
    program(chip, 0, 2, 0)
    clock.to_tick(0x10000 * 2 + 1)
    assert line.edges == [time_of(0x10001), time_of(0x20001)]


def test_mode_2_count_and_output() -> None:
    clock, _, chip = pit()
    program(chip, 0, 2, 4)
    seen = []
    for tick in range(1, 10):
        clock.to_tick(tick)
        seen.append((count_of(chip, 0), chip.channels[0].out))
    assert seen == [(4, True), (3, True), (2, True), (1, False)] * 2 + [(4, True)]


@pytest.mark.parametrize(("n", "counts", "high"), [(4, [4, 2, 4, 2], 2), (5, [4, 2, 0, 4, 2], 3)])
def test_mode_3_square_wave(n: int, counts: list[int], high: int) -> None:
    clock, _, chip = pit()
    program(chip, 0, 3, n)
    seen = []
    for tick in range(1, 1 + 2 * n):
        clock.to_tick(tick)
        seen.append((count_of(chip, 0), chip.channels[0].out))
    assert seen == [(count, i < high) for i, count in enumerate(counts)] * 2


def test_a_new_count_waits_for_the_period_to_end() -> None:
    clock, line, chip = pit()
    program(chip, 0, 2, 100)
    clock.to_tick(50)
    chip.write(0, 1, 10)
    chip.write(0, 1, 0)
    clock.to_tick(125)
    assert line.edges == [time_of(tick) for tick in (101, 111, 121)]


def test_bcd() -> None:
    clock, line, chip = pit()
    program(chip, 0, 0, 0x0100, bcd=1)
    clock.to_tick(1 + 1)
    assert count_of(chip, 0) == 0x0099
    clock.to_tick(200)
    assert line.edges == [time_of(101)]


def test_latched_count_stands_until_read() -> None:
    clock, _, chip = pit()
    program(chip, 0, 2, 1000)
    clock.to_tick(11)
    chip.write(3, 1, 0x00)  # latch channel 0
    clock.to_tick(500)
    chip.write(3, 1, 0x00)  # ignored: one is held
    assert count_of(chip, 0) == 990
    assert count_of(chip, 0) == 1000 - 499


def test_read_back_gives_status_then_count() -> None:
    clock, _, chip = pit()
    program(chip, 0, 3, 1000)
    program(chip, 2, 0, 7)
    clock.to_tick(601)
    chip.write(3, 1, 0xC2)  # count and status of channel 0
    assert chip.read(0, 1) == 0b0011_0110  # OUT low (601 of 1000), loaded, both bytes, mode 3, binary
    assert count_of(chip, 0) == 1000 - 2 * 100
    chip.write(3, 1, 0xE8)  # status of channel 2 alone: gate low, never counted
    assert chip.read(2, 1) & 0x80 == 0


def test_null_count_until_the_count_is_loaded() -> None:
    clock, _, chip = pit()
    chip.write(3, 1, 0x34)
    chip.write(3, 1, 0xE2)
    assert chip.read(0, 1) & 0x40
    chip.write(0, 1, 10)
    chip.write(0, 1, 0)
    clock.to_tick(1)
    chip.write(3, 1, 0xE2)
    assert not chip.read(0, 1) & 0x40


def test_channel_2_waits_for_its_gate() -> None:
    """How a kernel measures its clock: mode 0 on channel 2, then poll bit 5 of port 0x61."""
    clock, _, chip = pit()
    port = SystemControl(clock.timeline, chip.channels[2])
    program(chip, 2, 0, 100)
    clock.to_tick(500)
    assert not port.read(0, 1) & 0x20
    port.write(0, 1, 1)
    clock.to_tick(550)
    port.write(0, 1, 0)       # suspended at 50
    clock.to_tick(5000)
    assert not port.read(0, 1) & 0x20
    port.write(0, 1, 1)
    clock.to_tick(5048)
    assert not port.read(0, 1) & 0x20
    clock.to_tick(5051)
    assert port.read(0, 1) & 0x20


def test_one_byte_access() -> None:
    clock, line, chip = pit()
    chip.write(3, 1, 0x14)  # channel 0, low byte only, mode 2
    chip.write(0, 1, 200)
    clock.to_tick(201)
    assert line.edges == [time_of(201)]
    assert chip.read(0, 1) == 200


def test_pit_state_goes_round() -> None:
    clock, line, chip = pit()
    program(chip, 0, 2, 1000)
    chip.write(0, 1, 77)  # half a new count
    clock.to_tick(300)
    other_line = Bits(clock)
    other = Pit(clock.timeline, other_line)
    other.from_state(chip.state())
    assert other.state() == chip.state()
    clock.to_tick(2500)
    assert other_line.edges == line.edges == [time_of(1001), time_of(2001)]


def test_every_control_word_is_defined() -> None:
    for word in range(256):
        clock, _, chip = pit()
        chip.write(3, 1, word)
        for offset in (0, 1, 2):
            chip.write(offset, 1, 3)
            chip.write(offset, 1, 0)
        clock.to_tick(20)
        assert all(0 <= chip.read(offset, 1) <= 0xFF for offset in range(4) for _ in range(4))


PIC = "".join(f"mov al, {value}; out {port}, al;" for port, value in (
    (0x20, 0x11), (0xA0, 0x11), (0x21, 0x20), (0xA1, 0x28), (0x21, 4), (0xA1, 2), (0x21, 1), (0xA1, 1), (0x21, 0xFA), (0xA1, 0xF7)))
TICK = f"inc dword ptr [{DATA}]; push eax; mov al, 0x20; out 0x20, al; pop eax; iretd"


@pytest.mark.parametrize("path", PATHS)
def test_ticks_wake_and_preempt(path: str) -> None:
    """Ten ticks of 119 clocks each: the first five in HLT, the others in a loop."""
    source = PIC + ("mov al, 0x34; out 0x43, al; mov al, 119; out 0x40, al; mov al, 0; out 0x40, al; sti;"
                    f"idle: hlt; cmp dword ptr [{DATA}], 5; jb idle; busy: cmp dword ptr [{DATA}], 10; jb busy; mov eax, 3;") + DEBUG_EXIT
    bench = Bench(source, {0x20: TICK}, path=path)
    assert bench.run(1_000_000).exit_code == 3
    assert bench.read32(DATA) == 10
    events = bench.counts().events
    assert (events["interrupt.delivered"], events["idle"]) == (10, 5)
    assert bench.machine.time - time_of(1 + 119 * 10) in range(60), "the run ends a handler after the tenth tick"


def test_ticks_are_the_same_on_both_paths() -> None:
    outcomes = []
    for path in PATHS:
        bench = Bench(PIC + "mov al, 0x36; out 0x43, al; mov al, 2; out 0x40, al; mov al, 0; out 0x40, al; sti; busy: jmp busy",
                      {0x20: TICK}, path=path)
        bench.machine.timeline.at(300_000, lambda m=bench.machine: m.ports.write(0xF4, 4, 9))
        assert bench.run(1_000_000).exit_code == 9
        outcomes.append((bench.counts(), bench.machine.time, bench.read32(DATA)))
    assert outcomes[0] == outcomes[-1]
    assert outcomes[0][2] in (178, 179), "300 µs at 1.193182 MHz / 2"


# ---- disk
IMAGE = b"".join(bytes([i]) * 512 for i in range(8))


class Ram:
    def __init__(self) -> None:
        self.bytes = bytearray(0x10000)

    def contains(self, address: int, size: int) -> bool:
        return address + size <= len(self.bytes)

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.bytes[address:address + size])

    def write(self, address: int, data: bytes) -> None:
        self.bytes[address:address + len(data)] = data


def disk() -> tuple[Clock, Bits, Ram, d.Disk]:
    clock = Clock()
    line, ram = Bits(clock), Ram()
    return clock, line, ram, d.Disk(clock.timeline, line, ram, IMAGE)


def ask(device: d.Disk, command: int, sector: int = 0, count: int = 1, address: int = 0x1000) -> None:
    for offset, value in ((d.AT_SECTOR, sector), (d.AT_COUNT, count), (d.AT_ADDRESS, address & 0xFFFFFFFF),
                          (d.AT_ADDRESS_HIGH, address >> 32), (d.AT_COMMAND, command)):
        device.write(offset, 4, value)


def status(device: d.Disk) -> int:
    return device.read(d.AT_COMMAND, 4)


def test_disk_says_what_it_is() -> None:
    device = disk()[3]
    assert device.read(d.AT_ID, 4).to_bytes(4, "little") == b"VBLK"
    assert device.read(d.AT_CAPACITY, 4) == 8
    assert device.read(d.AT_CAPACITY, 2) == 0xFFFFFFFF


def test_disk_read_takes_its_time_and_interrupts() -> None:
    clock, line, ram, device = disk()
    ask(device, d.READ, 3, 2)
    assert status(device) == d.BUSY
    clock.to(53_999)
    assert (status(device), ram.read(0x1000, 1)) == (d.BUSY, b"\0")
    clock.to(54_000)
    assert (status(device), line.edges) == (d.DONE, [54_000])
    assert ram.read(0x1000, 1025) == b"\3" * 512 + b"\4" * 512 + b"\0"
    device.write(d.AT_ACKNOWLEDGE, 4, 0)
    assert (status(device), line.level) == (0, False)


def test_disk_write_moves_at_completion() -> None:
    clock, _, ram, device = disk()
    ask(device, d.WRITE, 7, 1)
    ram.write(0x1000, b"late" * 128)
    clock.to(60_000)
    assert device.content == IMAGE[:7 * 512] + b"late" * 128
    device.write(d.AT_ACKNOWLEDGE, 4, 0)
    ask(device, d.FLUSH, count=0)
    clock.to(110_000)
    assert status(device) == d.DONE


@pytest.mark.parametrize(("ask_for", "error"), [
    ({"command": 1, "sector": 7, "count": 2}, d.BAD_SECTOR), ({"command": 1, "sector": 0xFFFFFFFF}, d.BAD_SECTOR),
    ({"command": 2, "address": 0x10000 - 508}, d.BAD_ADDRESS), ({"command": 1, "address": 1 << 32}, d.BAD_ADDRESS),
    ({"command": 1, "address": 0x1002}, d.BAD_ADDRESS), ({"command": 4}, d.BAD_COMMAND), ({"command": 0}, d.BAD_COMMAND),
    ({"command": 1, "count": 0}, d.BAD_COUNT), ({"command": 1, "count": 129}, d.BAD_COUNT)])
def test_disk_refuses(ask_for: dict[str, int], error: int) -> None:
    clock, line, ram, device = disk()
    ask(device, **ask_for)
    clock.to(50_000)
    assert status(device) == d.DONE | d.ERROR | error << 8
    assert line.edges == [50_000]
    assert (device.content, not any(ram.bytes)) == (IMAGE, True)


def test_disk_drops_a_command_while_busy_or_unacknowledged() -> None:
    clock, line, _, device = disk()
    ask(device, d.READ)
    ask(device, d.READ)
    assert status(device) == d.BUSY | d.OVERRUN
    clock.to(200_000)
    ask(device, d.READ)
    assert status(device) == d.DONE | d.OVERRUN
    clock.to(400_000)
    assert line.edges == [52_000]
    device.write(d.AT_ACKNOWLEDGE, 4, 1)
    assert status(device) == 0


def test_disk_state_goes_round() -> None:
    clock, _, ram, device = disk()
    ask(device, d.READ, 5)
    clock.to(1000)
    line = Bits(clock)
    other = d.Disk(clock.timeline, line, ram, bytes(512))
    other.from_state(device.state())
    assert other.state() == device.state()
    clock.to(100_000)
    assert line.edges == [52_000]
    assert other.content == IMAGE


def out32(offset: int, value: int | str) -> str:
    return f"mov dx, {0xC00 + offset}; mov eax, {value}; out dx, eax;"


ACKNOWLEDGE = out32(d.AT_ACKNOWLEDGE, 0) + "mov al, 0x20; out 0xa0, al; out 0x20, al;"


@pytest.mark.parametrize("path", PATHS)
def test_a_driver_reads_a_sector(path: str) -> None:
    source = (PIC + out32(d.AT_SECTOR, 6) + out32(d.AT_COUNT, 1) + out32(d.AT_ADDRESS, DATA) + out32(d.AT_COMMAND, 1)
              + f"sti; hlt; mov eax, [{DATA + 508}];" + DEBUG_EXIT)
    bench = Bench(source, {0x2B: ACKNOWLEDGE + "iretd"}, path=path, disk=IMAGE)
    assert bench.run().exit_code == 0x06060606
    assert bench.counts().events["idle"] == 1
    assert bench.machine.time in range(52_000, 52_200)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wait", ["sti; hlt; cli;", "sti; busy: test esi, esi; jz busy; cli;"])
def test_code_read_from_disk_is_run(path: str, wait: str) -> None:
    """A routine that has run is overwritten by DMA; what runs next is what the disk held."""
    at = 0x40000
    first, second = asm("mov ebx, 1; ret"), asm("mov ebx, 2; ret")
    image = second.ljust(512, b"\xcc")
    source = (PIC + f"call {at}; mov edi, ebx; xor esi, esi;" + out32(d.AT_COUNT, 1) + out32(d.AT_ADDRESS, at) + out32(d.AT_COMMAND, 1)
              + wait + f"call {at}; mov eax, ebx; shl edi, 8; or eax, edi;" + DEBUG_EXIT)
    bench = Bench(source, {0x2B: "inc esi;" + ACKNOWLEDGE + "iretd"}, path=path, disk=image)
    bench.machine.ram.write(at, first)
    assert bench.run(200_000).exit_code == 0x102


def test_without_a_disk_its_ports_are_empty() -> None:
    bus = Machine(1 << 20, "portable").ports
    assert bus.read(d.FIRST_PORT, 4) == 0xFFFFFFFF


def test_a_disk_has_whole_sectors() -> None:
    with pytest.raises(ConfigError, match="whole sectors"):
        Machine(1 << 20, "portable", disk=b"short")


def test_dma_beyond_memory_is_refused() -> None:
    machine = Machine(1 << 20, "portable", disk=IMAGE)
    assert machine.disk is not None
    ask(machine.disk, d.READ, address=(1 << 20) - 508)
    assert not machine.wait()
    assert status(machine.disk) == d.DONE | d.ERROR | d.BAD_ADDRESS << 8
