"""``timer: bios``: timer and interrupt controllers as a PC's firmware leaves them, programmed by code that the guest's CPU runs."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from machinelab import DEBUG_EXIT, PATHS, kernel
from paginglab import SCHEMES, boot

from vmlab.errors import ConfigError, GuestImageError
from vmlab.experiment.cell import run_cell
from vmlab.guests import boot as loaders
from vmlab.guests import files
from vmlab.guests.image import Segment
from vmlab.machine.devices.pit import HZ
from vmlab.machine.pc import Stop, StopReason
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native

END = "xor eax, eax;" + DEBUG_EXIT
TICK = "push eax; mov al, 0x20; out 0x20, al; inc esi; pop eax; iretd"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["native", "hardware-assisted/static", *SCHEMES])
def test_the_tick_wakes_a_kernel_that_programmed_nothing(scheme: str, path: str) -> None:
    """Two ticks at vector 8; without a BIOS's timer nothing would come."""
    kind, parameters = {"native": (Native, {}), "hardware-assisted/static": (HardwareAssisted, {})}.get(scheme) or SCHEMES[scheme]
    image = dataclasses.replace(kernel(f"mov edi, eax; sti; hlt; hlt; cli; {END}", {8: TICK}), timer="bios")
    strategy = boot(kind, image, parameters, path)
    assert strategy.run(1_000_000) == Stop(StopReason.EXIT, 0)
    assert strategy.guest_state().gpr[6] == 2
    period = 65536 * 10**9 / HZ
    assert strategy.machine.time == pytest.approx(2 * period, rel=0.01)


def test_registers_are_what_the_loader_says() -> None:
    image = dataclasses.replace(kernel("mov edi, eax; mov esi, ebx;" + END), timer="bios")
    begin = loaders.start(image, "", 32 << 20)
    code = dict(begin.pieces)[begin.rip]
    assert begin.rip == 0x500 and code.endswith(b"\xe9" + struct.pack("<i", image.entry - 0x500 - len(code)))
    assert b"\xb8" + struct.pack("<I", 0x2BADB002) in code


def test_a_boot_disk_in_real_mode(tmp_path: pytest.TempPathFactory) -> None:
    """It prints a character at a tick of the firmware's own handler, which counts at 0040:006C."""
    # l: sti ; hlt ; cmp word [0x46C], 2 ; jb l ; mov dx, 0x3F8 ; mov al, '!' ; out dx, al ; mov eax, 0 ; mov dx, 0xF4 ; out dx, eax
    code = bytes.fromhex("fb f4 833e6c0402 72f7 baf803 b021 ee 66b800000000 baf400 66ef")
    image = files.parse("disk", code.ljust(510, b"\0") + b"\x55\xaa")
    for timer, ended in (("bios", True), ("reset", False)):
        strategy = boot(Native, files.equip(image, {"timer": timer}), {})
        stop = strategy.run(1_000_000)
        assert (stop == Stop(StopReason.EXIT, 0)) is ended and (stop.reason is StopReason.HALTED) is not ended
        assert strategy.machine.console == (b"!" if ended else b"")


def test_an_image_in_the_way_is_refused() -> None:
    image = kernel(END)
    image = dataclasses.replace(image, timer="bios", segments=(*image.segments, Segment(0x5FF, b"\1", 1)))
    with pytest.raises(GuestImageError, match="timer=bios: guest image 'test' lies at 0x500"):
        loaders.start(image, "", 32 << 20)


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bios'"):
        files.PARAMETERS["timer"].check("timer", "boos")
    assert run_cell("native", {"workload": "cli_sti", "iterations": 1})["status"] == "ok"
