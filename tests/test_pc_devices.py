"""The PC's devices, one by one: what their manuals say a driver sees. Each is tested alone, on a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.machine.devices import absent, cmos, ide, ioapic, keyboard, pci, testdev, vga
from vmlab.machine.devices.debug_exit import DebugExit
from vmlab.machine.devices.lapic import Lapic
from vmlab.machine.devices.pic import EdgeLevel, Pic, PicPair
from vmlab.machine.devices.pit import Pit, SystemControl
from vmlab.machine.devices.uart import DEPTH, Uart
from vmlab.machine.timeline import Timeline


class Clock:
    """A timeline whose time the test moves."""

    def __init__(self) -> None:
        self.now = 0
        self.timeline = Timeline(lambda: self.now, lambda: None)

    def go(self, until: int) -> None:
        while (due := self.timeline.next_due) is not None and due <= until:
            self.now = max(self.now, due)
            self.timeline.run_due()
        self.now = until


class Wire:
    """An interrupt line: its level, and how often it rose."""

    def __init__(self) -> None:
        self.level, self.rises = False, 0

    def __call__(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level


# ---- 16550
def uart() -> tuple[Uart, Wire, bytearray]:
    wire, out = Wire(), bytearray()
    return Uart(wire, out.append), wire, out


def test_the_fifo_takes_sixteen_and_the_line_keeps_the_rest() -> None:
    device, _, _ = uart()
    device.write(2, 1, 1)
    device.receive(bytes(range(40)))
    assert len(device.state()["received"]) == DEPTH
    assert bytes(device.read(0, 1) for _ in range(40)) == bytes(range(40))
    assert device.idle
    assert not device.read(5, 1) & 1


def test_without_fifos_there_is_one_buffer() -> None:
    device, _, _ = uart()
    device.receive(b"abc")
    assert len(device.state()["received"]) == 1
    assert [device.read(0, 1) for _ in range(3)] == list(b"abc")


@pytest.mark.parametrize(("trigger", "bytes_there", "cause"), [(0, 1, 0x4), (0xC0, 13, 0xC), (0xC0, 14, 0x4), (0x80, 7, 0xC), (0x80, 8, 0x4)])
def test_below_the_trigger_level_the_character_timeout_interrupts(trigger: int, bytes_there: int, cause: int) -> None:
    device, wire, _ = uart()
    device.write(2, 1, trigger | 1)
    device.write(1, 1, 1)
    device.receive(bytes(bytes_there))
    assert wire.level
    assert device.read(2, 1) == 0xC0 | cause


def test_loopback_returns_characters_and_modem_lines() -> None:
    device, _, out = uart()
    device.write(4, 1, 0x10 | 0x0A)                  # loop, RTS, OUT2
    assert device.read(6, 1) & 0xF0 == 0x90         # CTS, DCD
    device.write(0, 1, 0x55)
    assert (device.read(0, 1), bytes(out)) == (0x55, b"")
    device.write(4, 1, 0)
    assert device.read(6, 1) & 0xF0 == 0xB0
    assert not device.read(6, 1) & 0xF              # the changes were read


def test_reading_iir_takes_the_transmitters_interrupt_back() -> None:
    device, wire, _ = uart()
    device.write(1, 1, 2)
    assert wire.level
    assert device.read(2, 1) == 2
    assert not wire.level
    device.write(0, 1, 65)
    assert wire.level


# ---- 8259 ELCR
def test_a_level_triggered_input_asks_as_long_as_it_is_up() -> None:
    pic = Pic()
    pic.imr = 0
    register = EdgeLevel(pic, always_edge=0b111)
    register.write(0, 1, 0xFF)
    assert register.read(0, 1) == 0b1111_1000
    pic.set_line(4, True)
    assert pic.acknowledge() == 4
    pic.write(0, 1, 0x20)                           # end of interrupt
    assert pic.pending() == 4
    pic.set_line(4, False)
    assert pic.pending() is None


def test_icw1_starts_the_controller_anew() -> None:
    """Intel 8259A data sheet, "ICW1 and ICW2": edges forgotten, mask cleared, IRR read; no ICW4: no automatic EOI."""
    pic = Pic()
    for offset, value in ((0, 0x11), (1, 0x20), (1, 4), (1, 3), (0, 0x0B)):     # automatic EOI, and ISR to be read
        pic.write(offset, 1, value)
    pic.set_line(3, True)
    assert pic.acknowledge() == 0x23
    assert pic.read(0, 1) == 0                      # nothing is in service
    for offset, value in ((0, 0x10), (1, 0x40), (1, 4)):                          # without ICW4
        pic.write(offset, 1, value)
    pic.set_line(5, True)
    assert pic.read(0, 1) == 1 << 5                 # IRR; the edge of input 3 is forgotten
    assert pic.acknowledge() == 0x45
    pic.set_line(6, True)
    assert pic.pending() is None                    # 5 is in service until its EOI
    pic.write(0, 1, 0x20)
    assert pic.pending() == 6


# ---- I/O APIC
def io_apic() -> tuple[ioapic.IoApic, Lapic]:
    lapic = Lapic(Clock().timeline, PicPair(lambda: None), lambda: None)
    device = ioapic.IoApic(lapic.message)
    lapic.on_eoi = device.end_of_interrupt
    return device, lapic


def redirect(device: ioapic.IoApic, number: int, entry: int) -> None:
    for half, value in ((1, entry >> 32), (0, entry & 0xFFFFFFFF)):
        device.write(0, 4, 0x10 + 2 * number + half)
        device.write(0x10, 4, value)


def test_the_version_says_24_inputs_and_reset_masks_all() -> None:
    device, _ = io_apic()
    device.write(0, 4, 1)
    assert device.read(0x10, 4) == 0x00170011
    assert all(entry == 1 << 16 for entry in device.entries)


def test_an_edge_is_delivered_once() -> None:
    device, lapic = io_apic()
    redirect(device, 4, 0x31)
    device.set_line(4, True)
    device.set_line(4, True)
    assert lapic.acknowledge() == 0x31
    assert not lapic.pending


def test_an_edge_while_masked_is_lost() -> None:
    device, lapic = io_apic()
    device.set_line(4, True)
    redirect(device, 4, 0x31)
    assert not lapic.pending


def test_a_level_comes_again_after_eoi_until_it_is_down() -> None:
    device, lapic = io_apic()
    redirect(device, 9, 0x41 | 1 << 15)
    device.set_line(9, True)
    for _ in range(3):
        assert lapic.acknowledge() == 0x41
        assert device.entries[9] >> 14 & 1          # remote IRR
        assert not lapic.pending
        lapic.write(0xB0, 4, 0)
    lapic.acknowledge()
    device.set_line(9, False)
    lapic.write(0xB0, 4, 0)
    assert not lapic.pending
    assert not device.entries[9] >> 14 & 1


def test_another_cpus_interrupt_reaches_nobody() -> None:
    device, lapic = io_apic()
    redirect(device, 5, 0x51 | 3 << 56)
    device.set_line(5, True)
    assert not lapic.pending


@pytest.mark.parametrize(("ldr", "dfr", "destination", "mine"), [
    (0x02, 0xFFFFFFFF, 0x06, True), (0x02, 0xFFFFFFFF, 0x05, False),
    (0x12, 0x0FFFFFFF, 0x12, True), (0x12, 0x0FFFFFFF, 0x22, False), (0x12, 0x0FFFFFFF, 0xF2, True), (0x12, 0x0FFFFFFF, 0xF1, False)])
def test_logical_destinations_follow_the_format_register(ldr: int, dfr: int, destination: int, mine: bool) -> None:
    device, lapic = io_apic()
    lapic.write(0xD0, 4, ldr << 24)
    lapic.write(0xE0, 4, dfr)
    redirect(device, 5, 0x51 | 1 << 11 | destination << 56)
    device.set_line(5, True)
    assert lapic.pending == mine


def test_an_nmi_by_message_and_by_ipi() -> None:
    device, lapic = io_apic()
    taken = []
    lapic.on_nmi = lambda: taken.append(1)
    redirect(device, 5, 4 << 8)
    device.set_line(5, True)
    lapic.write(0x310, 4, 0)
    lapic.write(0x300, 4, 4 << 8 | 1 << 14)
    assert len(taken) == 2
    assert not lapic.pending


# ---- real-time clock
def rtc(memory: int = 64 << 20) -> tuple[cmos.Cmos, Clock, Wire]:
    clock, wire = Clock(), Wire()
    return cmos.Cmos(clock.timeline, wire, memory), clock, wire


def at(device: cmos.Cmos, register: int) -> int:
    device.write(0, 1, register)
    return device.read(1, 1)


def put(device: cmos.Cmos, register: int, value: int) -> None:
    device.write(0, 1, register)
    device.write(1, 1, value)


def test_the_clock_starts_at_the_epoch_and_follows_virtual_time() -> None:
    device, clock, _ = rtc()
    assert [at(device, r) for r in (0, 2, 4, 7, 8, 9, 0x32, 6)] == [0, 0, 0, 1, 1, 0, 0x20, 7]      # a Saturday
    clock.go(59_000_000_000 + 86_400_000_000_000)
    assert [at(device, r) for r in (0, 2, 7, 6)] == [0x59, 0, 2, 1]
    put(device, 0xB, 0x06)                          # binary, 24 hours
    assert at(device, 0) == 59


def test_twelve_hours_and_a_time_that_is_set() -> None:
    device, clock, _ = rtc()
    put(device, 4, 0x15)
    put(device, 0xB, 0)
    assert at(device, 4) == 0x83                    # 3 p.m.
    put(device, 4, 0x12)                            # 12 a.m.
    put(device, 0xB, 2)
    assert at(device, 4) == 0
    put(device, 8, 0x99)                            # no such month
    assert at(device, 8) == 1
    clock.go(3_600_000_000_000)
    assert at(device, 4) == 1


def test_uip_is_up_before_each_second() -> None:
    device, clock, _ = rtc()
    clock.now = 1_000_000_000 - 2_228_000
    assert at(device, 0xA) & 0x80
    clock.now -= 1
    assert not at(device, 0xA) & 0x80


def test_periodic_update_and_alarm_interrupts() -> None:
    device, clock, wire = rtc()
    put(device, 0xB, 0x42)                          # periodic, at 1024 Hz
    clock.go(976_563 + 1)
    assert wire.level
    assert at(device, 0xC) == 0xC0
    assert not wire.level
    put(device, 0xB, 0x32)                          # alarm and update ended
    for register in (1, 3, 5):
        put(device, register, 0xFF)                 # any time
    clock.go(1_000_000_001)
    assert at(device, 0xC) & 0xB0 == 0xB0
    put(device, 1, 0x05)
    clock.go(2_000_000_001)
    assert at(device, 0xC) & 0x30 == 0x10


def test_firmware_noted_the_size_of_memory() -> None:
    device, _, _ = rtc(64 << 20)
    assert at(device, 0x15) | at(device, 0x16) << 8 == 640
    assert at(device, 0x17) | at(device, 0x18) << 8 == 63 << 10
    assert at(device, 0x34) | at(device, 0x35) << 8 == (48 << 20) >> 16
    put(device, 0x0F, 0x0A)
    assert at(device, 0x0F) == 0x0A


# ---- keyboard controller
def controller() -> tuple[keyboard.KeyboardController, Wire, list[int]]:
    wire, resets = Wire(), list[int]()
    return keyboard.KeyboardController(wire, Wire(), lambda: resets.append(1)), wire, resets


def test_self_tests_command_byte_and_output_port() -> None:
    device, _, _ = controller()
    for command, answer in ((0xAA, 0x55), (0xAB, 0), (0xA9, 0), (0xD0, 3)):
        device.write(4, 1, command)
        assert device.read(4, 1) & 1
        assert device.read(0, 1) == answer
    device.write(4, 1, 0x60)
    device.write(0, 1, 0x45)
    device.write(4, 1, 0x20)
    assert device.read(0, 1) == 0x45


def test_keys_interrupt_and_the_keyboard_answers() -> None:
    device, wire, _ = controller()
    device.press(b"\x1e\x9e")
    assert wire.level
    assert (device.read(0, 1), device.read(0, 1)) == (0x1E, 0x9E)
    assert not wire.level
    device.write(0, 1, 0xFF)
    assert [device.read(0, 1), device.read(0, 1)] == [0xFA, 0xAA]
    device.write(0, 1, 0xED)
    device.write(0, 1, 7)
    assert [device.read(0, 1), device.read(0, 1)] == [0xFA, 0xFA]
    device.write(4, 1, 0xAD)                        # keyboard off
    device.press(b"\x01")
    assert not device.read(4, 1) & 1


def test_the_auxiliary_port_loops_back_with_its_mark() -> None:
    device, _, _ = controller()
    device.write(4, 1, 0xD3)
    device.write(0, 1, 0x5A)
    assert device.read(4, 1) & 0x21 == 0x21
    assert device.read(0, 1) == 0x5A


@pytest.mark.parametrize("writes", [[(4, 0xFE)], [(4, 0xD1), (0, 0xFE)]])
def test_the_reset_output(writes: list[tuple[int, int]]) -> None:
    device, _, resets = controller()
    for offset, value in writes:
        device.write(offset, 1, value)
    assert resets == [1]


def test_port_92_resets_once_asked() -> None:
    resets: list[int] = []
    port = keyboard.SystemPort(lambda: resets.append(1))
    port.write(0, 1, 2)
    assert (port.read(0, 1), resets) == (2, [])
    port.write(0, 1, 3)
    assert resets == [1]


# ---- IDE
SECTORS = 40


def channel(drives: int = 1) -> tuple[ide.Ide, Clock, Wire]:
    clock, wire = Clock(), Wire()
    content = b"".join(bytes((i,)) * 512 for i in range(SECTORS))
    return ide.Ide(clock.timeline, wire, (content,) * drives), clock, wire


def command(device: ide.Ide, number: int, *, sector: int = 0, count: int = 1, slave: bool = False) -> None:
    for offset, value in ((6, 0xE0 | slave << 4 | sector >> 24), (2, count), (3, sector & 0xFF), (4, sector >> 8 & 0xFF), (5, sector >> 16 & 0xFF),
                          (7, number)):
        device.write(offset, 1, value)


def wait(device: ide.Ide, clock: Clock) -> int:
    clock.go(clock.now + 1_000_000)
    return device.read(7, 1)


def test_read_sectors_one_interrupt_each() -> None:
    device, clock, wire = channel()
    command(device, 0x20, sector=7, count=3)
    assert device.read(7, 1) & 0x80                 # busy
    for number in (7, 8, 9):
        assert wait(device, clock) & 0x89 == 0x08
        assert b"".join(device.read(0, 4).to_bytes(4, "little") for _ in range(128)) == bytes((number,)) * 512
    assert (wire.rises, device.read(7, 1) & 0x88, device.read(3, 1), device.read(2, 1)) == (3, 0, 10, 0)


def test_write_sectors_and_flush() -> None:
    device, clock, wire = channel()
    command(device, 0x30, sector=3, count=2)
    for value in (0xAA, 0xBB):
        assert device.read(7, 1) & 0x88 == 0x08
        for _ in range(256):
            device.write(0, 2, value << 8 | value)
        assert device.read(7, 1) & 0x80
        wait(device, clock)
    content = device.drives[0].content
    assert content[3 * 512:5 * 512] == b"\xaa" * 512 + b"\xbb" * 512
    assert content[5 * 512] == 5
    assert wire.rises == 2
    command(device, 0xE7)
    assert device.read(7, 1) & 0x81 == 0


def test_multiple_moves_a_block_an_interrupt() -> None:
    device, clock, wire = channel()
    command(device, 0xC4, sector=0, count=8)
    assert device.read(7, 1) & 1                    # not set yet: aborted
    command(device, 0xC6, count=4)
    device.read(7, 1)
    before = wire.rises
    command(device, 0xC4, sector=0, count=8)
    for _ in range(2):
        assert wait(device, clock) & 8
        for _ in range(4 * 128):
            device.read(0, 4)
    assert wire.rises - before == 2
    assert not device.read(7, 1) & 8


def test_cylinder_head_and_sector() -> None:
    device, clock, _ = channel()
    for offset, value in ((6, 0xA0), (2, 1), (3, 5), (4, 0), (5, 0), (7, 0x20)):
        device.write(offset, 1, value)
    assert wait(device, clock) & 8
    assert device.read(0, 1) == 4                   # sectors count from 1 there


def test_identify_says_size_and_lba() -> None:
    device, clock, _ = channel()
    command(device, 0xEC)
    assert wait(device, clock) & 8
    words = [device.read(0, 2) for _ in range(256)]
    assert words[60] | words[61] << 16 == SECTORS
    assert words[49] & 0x200


def test_beyond_the_end_and_unknown_commands_are_errors() -> None:
    device, clock, _ = channel()
    command(device, 0x20, sector=SECTORS - 1, count=2)
    assert wait(device, clock) & 1
    assert device.read(1, 1) == 0x10                # ID not found
    command(device, 0xB0)
    assert wait(device, clock) & 1
    assert device.read(1, 1) == 0x04                # aborted


def test_no_disk_no_slave_and_no_interrupts() -> None:
    empty, _, _ = channel(0)
    assert (empty.read(7, 1), empty.read_control()) == (0xFF, 0xFF)
    device, clock, wire = channel(1)
    command(device, 0x20, slave=True)
    assert wait(device, clock) == 0
    device.write_control(2)
    command(device, 0x20)
    clock.go(clock.now + 1_000_000)
    assert not wire.level
    device.write_control(4)                         # reset
    assert device.read(7, 1) & 0x80 == 0


# ---- display, PCI, test device, what is absent
def test_crt_registers_and_retrace() -> None:
    clock = Clock()
    device = vga.Vga(clock.timeline)
    for register, value in ((14, 0x12), (15, 0x34)):
        device.write(0x14, 1, register)
        device.write(0x15, 1, value)
    device.write(0x14, 1, 14)
    assert device.read(0x15, 1) == 0x12
    device.write(0x14, 2, 0x0A0C)                   # index and data at once
    assert device.start == 0x0A00
    assert device.read(0x1A, 1) & 8 == 0
    clock.now = 405 * 31_777
    assert device.read(0x1A, 1) & 9 == 9


def test_text_reads_as_lines() -> None:
    memory = b"".join(bytes((character, 7)) for character in b"hello".ljust(80) + b"\0" * 80 + b"world".ljust(80 * 23))
    assert vga.text(memory)[:3] == ["hello", "", "world"]
    assert vga.text(bytes(4000)) == []


def test_an_empty_pci_bus_is_all_ones() -> None:
    resets: list[int] = []
    device = pci.Pci(lambda: resets.append(1))
    device.write(0, 4, 0x80000800)
    assert device.read(0, 4) == 0x80000800
    assert (device.read(4, 4), device.read(6, 2)) == (0xFFFFFFFF, 0xFFFF)
    device.write(1, 1, 2)
    assert not resets
    device.write(1, 1, 6)
    assert resets == [1]


def test_the_test_devices_register_lines_and_memory() -> None:
    flushed: list[int] = []
    levels: list[tuple[int, bool]] = []
    device = testdev.TestDevice(flushed.append)
    device.write(0, 4, 0x12345678)
    assert (device.read(0, 1), device.read(0, 2), device.read(2, 2)) == (0x78, 0x5678, 0x1234)
    device.write(4, 4, 0xABC000)
    assert flushed == [0xABC000]
    device.memory.write(0xFFFE, 4, 0x11223344)
    assert device.memory.read(0xFFFE, 2) == 0x3344
    testdev.TestLines(lambda number, level: levels.append((number, level))).write(5, 1, 1)
    assert levels == [(5, True)]


def test_absent_ports_have_reasons_and_no_device() -> None:
    from vmlab.machine.pc import Machine

    machine = Machine(16 << 20)
    for first, last, what, why in absent.ABSENT:
        assert what
        assert why
        for port in range(first, last + 1):
            assert not machine.ports.answers(port), hex(port)
            assert absent.reason(port) == f"{what}: {why}"
    assert absent.reason(0x1234) is None
    assert machine.ports.read(0x1234, 2) == 0xFFFF
    machine.ports.write(0x1234, 1, 0)
    assert machine.ports.unanswered == {0x1234: 2}


# ---- state, and a guest that is not trusted
def _devices() -> dict[str, Callable[[], object]]:
    return {
        "uart": lambda: uart()[0], "ioapic": lambda: io_apic()[0], "cmos": lambda: rtc()[0], "keyboard": lambda: controller()[0],
        "ide": lambda: channel(2)[0], "vga": lambda: vga.Vga(Clock().timeline), "pci": lambda: pci.Pci(lambda: None),
        "test": lambda: testdev.TestDevice(lambda gpa: None), "port92": lambda: keyboard.SystemPort(lambda: None),
        "pic": Pic, "pit": lambda: Pit(Clock().timeline, Wire()), "lapic": lambda: io_apic()[1], "debug exit": lambda: DebugExit(lambda code: None),
        "port61": lambda: SystemControl(Clock().timeline, Pit(Clock().timeline, Wire()).channels[2]),
    }


@pytest.mark.parametrize("name", sorted(_devices()))
@settings(deadline=None, max_examples=50)     # a state of 64 KiB takes its time on a busy host
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.integers(0, 2**32 - 1)), max_size=30))
def test_any_access_is_defined_and_the_state_is_whole(name: str, accesses: list[tuple[bool, int, int, int]]) -> None:
    """After any accesses, a second device with the first one's state shows the same state, and answers the same."""
    make = _devices()[name]
    device, other = make(), make()
    few = {"ioapic": (0, 0x10), "cmos": (0, 1), "keyboard": (0, 4), "port92": (0,), "test": (0, 1, 2, 3, 4), "vga": tuple(range(32)),
           "pic": (0, 1), "pit": (0, 1, 2, 3), "port61": (0,), "debug exit": (0,),
           "lapic": (0x20, 0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x320, 0x350, 0x380, 0x390, 0x3E0, 0x40)}
    offsets = few.get(name, tuple(range(8)))
    for write, where, size, value in accesses:
        offset, size = offsets[where * 5 % len(offsets)], 4 if name == "lapic" else size
        if write:
            device.write(offset, size, value & (1 << 8 * size) - 1)  # type: ignore[attr-defined]
        else:
            assert device.read(offset, size) >= 0  # type: ignore[attr-defined]
    state = device.state()  # type: ignore[attr-defined]
    json.dumps(state, default=list)
    other.from_state(state)  # type: ignore[attr-defined]
    assert other.state() == state  # type: ignore[attr-defined]
    width = 4 if name == "lapic" else 1
    assert [device.read(o, width) for o in offsets] == [other.read(o, width) for o in offsets]  # type: ignore[attr-defined]
