"""nano: the image belongs to its sources, its sites are what they say, and its counts are right."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vmlab import guests
from vmlab.guests.nano import build
from vmlab.guests.nano.counts import SHAPES, expected
from vmlab.guests.nano.workloads import WORKLOADS
from vmlab.ledger import Snapshot
from vmlab.machine.pc import Machine
from vmlab.strategies.native import Native

SITE_LENGTHS = {0: 7, 1: 5, 2: 5, 3: 5, 4: 5, 5: 5, 6: 5, 7: 7, 8: 5, 9: 5, 10: 5}  # by kind: room for the replacement
OPCODES = {0: b"\xfa", 1: b"\xfb", 2: b"\x9c", 3: b"\x9d", 4: b"\xec", 5: b"\xee", 6: b"\xef", 7: b"\x0f\xa2", 9: b"\xcf"}


def _memory() -> tuple[int, bytes]:
    image = guests.load("nano")
    base = image.segments[0].address
    memory = bytearray(image.end - base)
    for segment in image.segments:
        memory[segment.address - base : segment.address - base + len(segment.data)] = segment.data
    return base, bytes(memory)


def _sites() -> list[tuple[int, int, int, bytes]]:
    image = guests.load("nano")
    base, memory = _memory()
    sites = []
    for row in range(image.symbol("sites"), image.symbol("sites_end"), 8):
        address, room, kind, _ = struct.unpack_from("<IBBH", memory, row - base)
        sites.append((address, room, kind, memory[address - base : address - base + room]))
    return sites


def test_the_lock_ties_the_image_to_its_sources() -> None:
    lock = build.read_lock()
    assert lock["source_sha256"] == build.source_hash(), "run python -m vmlab.guests.nano.build"
    assert lock["image_sha256"] == hashlib.sha256((build.HERE / build.IMAGE).read_bytes()).hexdigest()


def test_a_rebuild_is_the_same_bit_for_bit() -> None:
    tools = build.tools()
    if tools is None:
        pytest.skip("no GNU as and ld here")
    if tools != build.read_lock()["tools"]:
        pytest.skip("other versions of as and ld than the image was built with")
    assert build.build() == (build.HERE / build.IMAGE).read_bytes()


def test_a_site_is_one_native_instruction_in_the_room_of_its_replacement() -> None:
    sites = _sites()
    assert len(sites) > 10
    assert len({address for address, *_ in sites}) == len(sites)
    for address, room, kind, code in sites:
        assert room == SITE_LENGTHS[kind], hex(address)
        if kind in OPCODES:
            assert code == b"\x3e" * (room - len(OPCODES[kind])) + OPCODES[kind], hex(address)
        elif kind == 8:
            assert code == b"\x3e\x3e\x3e\xfb\xf4"  # STI;HLT
        else:
            assert code[0] == 0xBE  # puts: MOV ESI, imm32


def test_the_paravirtual_kernel_is_left_no_sensitive_instruction_but_native_setup() -> None:
    """Every CLI, STI, HLT, IRET, IN and OUT by DX in the text lies in a site."""
    capstone = pytest.importorskip("capstone")
    image = guests.load("nano")
    base, memory = _memory()
    covered = {byte for address, room, *_ in _sites() for byte in range(address, address + room)}
    text = memory[image.entry - base : image.symbol("hypercall_page") - base]
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    engine.skipdata = True
    sensitive = {"cli", "sti", "hlt", "iretd", "in", "out", "pushfd", "popfd", "cpuid", "lgdt", "lidt", "ltr"}
    stray = []
    for instruction in engine.disasm(text, image.entry):
        word = instruction.mnemonic.split()[-1]  # without the prefix
        if word in sensitive and instruction.address not in covered:
            stray.append((word, instruction.address))
    # The native entry's tables and PIC, and the native interrupt handler's end of interrupt.
    assert sorted(name for name, _ in stray) == ["lgdt", "lidt", "ltr", "out", "out"]


def test_expected_hits_the_density_where_it_can() -> None:
    for name in ("cli_sti", "pushf_popf", "port_io", "cpuid", "rdtsc"):
        for density in (10, 50, 100, 500):
            counts = expected(name, 40_000, density)
            assert counts.named / counts.other == pytest.approx(density / 1000, rel=0.01), (name, density)
            assert counts.instructions == counts.named + counts.other


def test_every_workload_has_counts() -> None:
    assert set(SHAPES) == set(WORKLOADS)


def test_dense_cli_reaches_a_hundred_thousand_operations() -> None:
    assert expected("cli_sti", 50_000, 500).named == 100_000


@pytest.mark.parametrize("workload", sorted(WORKLOADS))
def test_nano_runs_in_another_emulator(workload: str, tmp_path: Path) -> None:
    """An oracle that is not ours: QEMU's console and exit code ((code << 1) | 1 by its debug-exit device)."""
    qemu = shutil.which("qemu-system-i386")
    if qemu is None:
        pytest.skip("no qemu-system-i386 here")
    line = guests.command_line({"workload": workload, "iterations": 21, "density": 100})
    run = subprocess.run(
        [qemu, "-kernel", str(build.HERE / build.IMAGE), "-append", line, "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
         "-display", "none", "-serial", "stdio", "-monitor", "none", "-nodefaults", "-m", "16"],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 1, run.stderr
    counts = expected(workload, 21, 100)
    assert f"workload={workload} iterations=21" in run.stdout
    assert f"operations={counts.named} iterations=21" in run.stdout
    assert run.stdout.rstrip().endswith("ok")


@pytest.mark.parametrize("path", ["portable", "auto"])
@pytest.mark.parametrize("workload", sorted(WORKLOADS))
@pytest.mark.parametrize(("iterations", "density"), [(1, 1000), (4, 50), (11, 200)])
def test_the_machine_counts_what_the_hand_counts(workload: str, iterations: int, density: int, path: str) -> None:
    image = guests.load("nano")
    machine = Machine(path=path)
    native = Native(machine)
    native.load(image, guests.command_line({"workload": workload, "iterations": iterations, "density": density}))
    marks: dict[str, Snapshot] = {}
    for symbol in ("vmlab_roi_begin", "vmlab_roi_warm", "vmlab_roi_end"):
        native.watch(image.symbol(symbol), lambda address, symbol=symbol: marks.update({symbol: native.snapshot(address)}))
    assert native.run(10_000_000).exit_code == 0
    assert list(marks) == ["vmlab_roi_begin", "vmlab_roi_warm", "vmlab_roi_end"]
    region = marks["vmlab_roi_end"].minus(marks["vmlab_roi_begin"])
    counts = expected(workload, iterations, density)
    assert region.user + region.kernel == region.machine == counts.instructions
    system = {kind.removeprefix("retired."): n for kind, n in region.events.items() if kind.startswith("retired.")}
    assert {kind: n for kind, n in system.items() if kind not in ("user", "kernel")} == counts.mnemonics
    operations, done = struct.unpack("<II", native.read_guest(image.symbol("vmlab_work"), 8))
    assert (operations, done) == (counts.named, iterations)
