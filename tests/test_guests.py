"""Guest images: what loads, what is refused and with which words, and the command line."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmlab import guests
from vmlab.errors import ConfigError, GuestImageError
from vmlab.guests.boot import multiboot

NANO = Path(guests.__file__).parent / "nano" / "nano.elf"


def test_nano_loads_with_both_entries() -> None:
    image = guests.load("nano")
    assert image.name == "nano"
    assert image.segments[0].address == 0x100000
    assert image.end < 4 << 20
    assert image.pv is not None
    assert (image.pv.virt_base, image.pv.pae_mode, image.pv.guest_os) == (0, "yes", "nano")
    assert image.pv.entry == image.symbol("pv_start") != image.entry == image.symbol("start")
    assert image.pv.hypercall_page is not None
    assert image.pv.hypercall_page % 4096 == 0


def test_the_symbols_that_the_lab_measures_by_are_there() -> None:
    image = guests.load("nano")
    for name in ("vmlab_roi_begin", "vmlab_roi_warm", "vmlab_roi_end", "vmlab_outcome_start", "vmlab_outcome_end", "vmlab_work"):
        assert image.symbol(name) >= 0x100000
    with pytest.raises(GuestImageError, match="no symbol 'absent'"):
        image.symbol("absent")


def test_a_path_loads_like_the_name() -> None:
    assert guests.load(NANO).sha256 == guests.load("nano").sha256


def test_a_digest_needs_no_parsing_of_what_the_lock_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [guests.digest(name) for name in guests.names()] == [guests.load(name).sha256 for name in guests.names()]
    assert guests.digest(str(NANO)) == guests.digest("nano")
    short = tmp_path / "nano.elf"
    short.write_bytes(NANO.read_bytes()[:0x1800])
    (tmp_path / "image.lock").write_bytes(NANO.with_name("image.lock").read_bytes())
    monkeypatch.setitem(guests._BUILT_IN, "nano", dataclasses.replace(guests._BUILT_IN["nano"], image=short))
    with pytest.raises(GuestImageError, match="truncated"):
        guests.digest("nano")


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(GuestImageError, match="did you mean 'nano'"):
        guests.load("nanno")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match=r"no guest image at .*absent\.elf"):
        guests.load(tmp_path / "absent.elf")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError):
        guests.load(tmp_path)


def _refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "image.elf"
    path.write_bytes(data)
    with pytest.raises(GuestImageError) as caught:
        guests.load(path)
    assert "image.elf" in str(caught.value)
    return str(caught.value)


def _patched(offset: int, value: bytes) -> bytes:
    data = bytearray(NANO.read_bytes())
    data[offset : offset + len(value)] = value
    return bytes(data)


def test_what_is_no_elf_is_refused(tmp_path: Path) -> None:
    assert "not an ELF" in _refused(tmp_path, b"MZ" + bytes(100))
    assert "not an ELF" in _refused(tmp_path, b"")


@pytest.mark.parametrize("length", [4, 20, 52, 100, 0x1800, 0x3200, 0x3F80])
def test_a_truncated_image_is_refused_at_any_length(tmp_path: Path, length: int) -> None:
    assert "truncated" in _refused(tmp_path, NANO.read_bytes()[:length])


def test_another_machine_is_refused(tmp_path: Path) -> None:
    assert "EM_ARM" in _refused(tmp_path, _patched(18, struct.pack("<H", 40)))


def test_a_shared_object_is_refused(tmp_path: Path) -> None:
    assert "ET_DYN" in _refused(tmp_path, _patched(16, struct.pack("<H", 3)))


def test_a_kernel_without_a_multiboot_header_is_refused(tmp_path: Path) -> None:
    assert "no Multiboot header" in _refused(tmp_path, _patched(0x1000, bytes(4)))


def test_required_multiboot_features_are_refused(tmp_path: Path) -> None:
    header = struct.pack("<III", 0x1BADB002, 0x6, -(0x1BADB002 + 0x6) & 0xFFFFFFFF)
    assert "features 0x4" in _refused(tmp_path, _patched(0x1000, header))


def test_an_entry_outside_the_image_is_refused(tmp_path: Path) -> None:
    assert "lies in no segment" in _refused(tmp_path, _patched(24, struct.pack("<I", 0x900000)))


def test_command_line_takes_what_the_workload_takes() -> None:
    values = {"workload": "cli_sti", "iterations": 7, "density": 500, "memory": "static"}
    assert guests.command_line(values) == "workload=cli_sti iterations=7 density=500"
    assert guests.command_line({"workload": "compute", "iterations": 7, "density": 500}) == "workload=compute iterations=7"
    assert guests.command_line({}).startswith("workload=cli_sti iterations=50000")
    assert guests.command_line({"guest": "minios"}) == "workload=forkwait iterations=100 batch=32 timer=0 phase=0"
    assert "pages=7" in guests.command_line({"guest": "minios64", "workload": "chase", "pages": 7})


def test_command_line_refuses_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cli_sti'"):
        guests.command_line({"workload": "cli_st"})
    with pytest.raises(ConfigError, match="density"):
        guests.command_line({"density": 0})
    with pytest.raises(ConfigError, match="iterations"):
        guests.command_line({"iterations": "many"})
    with pytest.raises(ConfigError, match="did you mean 'minios'"):
        guests.command_line({"guest": "minos"})
    with pytest.raises(ConfigError, match="in minios; did you mean 'ctxsw'"):
        guests.command_line({"guest": "minios", "workload": "ctxswitch"})


def test_interrupts_that_come_by_themselves_are_known() -> None:
    assert guests.asynchronous({"workload": "interrupt"})
    assert not guests.asynchronous({"workload": "cli_sti"})
    assert not guests.asynchronous({"guest": "minios", "workload": "forkwait"})
    assert guests.asynchronous({"guest": "minios", "workload": "forkwait", "timer": 50_000})
    assert guests.asynchronous({"guest": "minios", "workload": "io", "timer": 0})
    assert not guests.asynchronous({"guest": "minios64", "workload": "chase", "timer": 0})


def test_multiboot_information_points_at_its_parts() -> None:
    at, memory = 0x9000, 16 << 20
    blob = multiboot.information(at, memory, "workload=cpuid")
    flags, lower, upper = struct.unpack_from("<III", blob)
    assert flags & 1 and flags & 4 and flags & 0x40
    assert (lower, upper) == (640, 15 * 1024)
    (text,) = struct.unpack_from("<I", blob, 16)
    assert blob[text - at :].split(b"\0")[0] == b"workload=cpuid"
    length, entry = struct.unpack_from("<II", blob, 44)
    total, end = 0, entry + length
    while entry < end:
        size, base, extent, kind = struct.unpack_from("<IQQI", blob, entry - at)
        assert base + extent <= memory
        total += extent if kind == 1 else 0
        entry += size + 4
    assert total == memory - 0x60000
    with pytest.raises(ValueError, match="1 MiB"):
        multiboot.information(at, 0x1000, "")


def test_guests_need_no_engine() -> None:
    code = "import sys, vmlab.guests as g; g.load('nano'); assert not {'unicorn', 'capstone'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
