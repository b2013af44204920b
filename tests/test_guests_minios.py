"""minios: its images and their lock, its runs on the bare machine and in QEMU, and the counts worked out by hand."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from vmlab import guests
from vmlab.errors import TripleFault
from vmlab.guests.minios import build
from vmlab.guests.minios.workloads import WORKLOADS
from vmlab.ledger import Snapshot
from vmlab.machine.pc import Machine
from vmlab.strategies.native import Native

GUESTS = ("minios", "minios64")
#: Sizes that make each workload quick; whatever is not named has its default.
SMALL: Mapping[str, Mapping[str, int]] = {
    "fork": {"iterations": 4, "pages": 40}, "forkwait": {"iterations": 10}, "mmap": {"iterations": 5}, "pagefault": {"iterations": 40},
    "build": {"iterations": 4, "pages": 20}, "server": {"iterations": 30}, "chase": {"iterations": 200, "pages": 40}, "compute": {"iterations": 5},
    "mixed": {"iterations": 4}, "random": {"iterations": 30, "seeds": 3}, "ctxsw": {"iterations": 40}, "io": {"iterations": 6},
    "idle": {"iterations": 3, "timer": 100_000},
}
RUNNING = sorted(set(WORKLOADS) - {"bad"})
MARKS = ("vmlab_empty_begin", "vmlab_empty_end", "vmlab_roi_begin", "vmlab_roi_warm", "vmlab_roi_end")


@dataclass
class Ran:
    """What is left of a run on the bare machine."""

    console: str
    exit_code: int | None
    outcome: bytes
    work: tuple[int, int]
    counts: dict[str, int]
    disk: bytes | None
    marks: dict[str, Snapshot] = field(default_factory=dict)

    def between(self, first: str, last: str) -> Snapshot:
        return self.marks[f"vmlab_{last}"].minus(self.marks[f"vmlab_{first}"])


def values_of(guest: str, workload: str, **more: object) -> dict[str, object]:
    return {"guest": guest, "workload": workload, "iterations": 50, "timer": 0, **SMALL.get(workload, {}), **more}


def run(guest: str, workload: str, path: str | None = None, disk: bool = True, **more: object) -> Ran:
    image = guests.load(guest)
    values = values_of(guest, workload, **more)
    machine = Machine(path=path, disk=guests.disk(values) if disk else None)
    native = Native(machine)
    marks: dict[str, Snapshot] = {}
    for symbol in MARKS:
        native.watch(image.symbol(symbol), lambda address, symbol=symbol: marks.setdefault(symbol, native.snapshot(address)))
    native.load(image, guests.command_line(values))
    stop = native.run(5_000_000_000)
    at, end = image.symbol("vmlab_outcome_start"), image.symbol("vmlab_outcome_end")
    operations, iterations = struct.unpack("<II", native.read_guest(image.symbol("vmlab_work"), 8))
    counts = {
        name.removeprefix("vmlab_count_"): int.from_bytes(native.read_guest(address, 4), "little")
        for name, address in image.symbols.items() if name.startswith("vmlab_count_")
    }
    content = None if machine.disk is None else machine.disk.content
    return Ran(machine.console.decode(), stop.exit_code, native.read_guest(at, end - at), (operations, iterations), counts, content, marks)


def test_the_lock_ties_images_sources_and_tools_together() -> None:
    lock = build.read_lock()
    assert lock["sources"] == build.sources()
    assert lock["source_sha256"] == build.source_hash(), "sources changed: python -m vmlab.guests.minios.build"
    for name, expected in dict(lock["images"]).items():  # type: ignore[call-overload]
        assert hashlib.sha256((build.HERE / name).read_bytes()).hexdigest() == expected


@pytest.mark.parametrize("image", sorted(build.IMAGES))
def test_the_same_tools_build_the_same_image(image: str) -> None:
    if build.tools() != build.read_lock()["tools"]:
        pytest.skip("other versions of gcc, as, ld or objcopy")
    assert build.build(image) == (build.HERE / image).read_bytes()


def test_the_kernel_is_read_in_an_evening() -> None:
    lines = {name: len((build.HERE / name).read_text(encoding="utf-8").splitlines()) for name in build.sources()}
    paravirtual = sum(n for name, n in lines.items() if name.startswith("pv"))
    assert sum(lines.values()) - paravirtual <= 3000
    assert paravirtual - min(lines["pv32.inc"], lines["pv64.inc"]) <= 1050      # one width's assembly is as good as the other's


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("workload", RUNNING)
def test_every_workload_runs_and_gives_the_same_twice(guest: str, workload: str) -> None:
    first, second = run(guest, workload), run(guest, workload)
    assert first.exit_code == 0, first.console
    assert f"workload={workload} bits={64 if guest.endswith('64') else 32}" in first.console
    assert first == second
    assert first.work[0] > 0 and first.work[1] > 0


def test_fork_writes_the_entries_that_a_hand_counts() -> None:
    """A fork of a process with P pages: what `fork` adds to `forkwait` is three stores for each page (the parent's right
    to write is taken, the child's entry made, and cleared when it ends) the first time, and two after it, for they stay shared."""
    few, many = run("minios", "fork", pages=10), run("minios", "fork", pages=110)
    forks = few.counts["forks"]
    assert forks == many.counts["forks"] == few.work[0] == 5
    assert many.counts["pt_writes"] - few.counts["pt_writes"] == 100 * 3 + 100 * 2 * (forks - 1)
    assert many.counts["faults"] == few.counts["faults"] == 2 * forks  # the stack, in parent and child


ENTRY_WRITE, ENTRY_WRITE_NOW, ROOT_NEW = 16, 17, 20   # kinds of sites.h


@pytest.mark.parametrize("workload", ["forkwait", "fork", "mmap", "pagefault", "build", "random"])
def test_every_store_to_a_page_table_is_one_that_the_kernel_counts(workload: str) -> None:
    """The sites of pt.h, watched by the machine: as many stores were carried out as the kernel says it made."""
    image = guests.load("minios")
    at, end = image.symbol("sites"), image.symbol("sites_end")
    holder = next(s for s in image.segments if s.address <= at < s.address + len(s.data))
    table = holder.data[at - holder.address : end - holder.address]
    rows = [struct.unpack_from("<IBBH", table, offset) for offset in range(0, len(table), 8)]
    stores = {ENTRY_WRITE: 1, ENTRY_WRITE_NOW: 1, ROOT_NEW: 2}  # a root's first entry is written beside its site
    values = values_of("minios", workload)
    machine = Machine(disk=guests.disk(values))
    native = Native(machine)
    seen = [0]
    marks: dict[str, int] = {}

    def store(by: int) -> None:
        seen[0] += by

    for address, _, kind, _ in rows:
        if kind in stores:
            native.watch(address, lambda _address, by=stores[kind]: store(by))
    for symbol in ("vmlab_roi_begin", "vmlab_roi_end"):
        native.watch(image.symbol(symbol), lambda _address, symbol=symbol: marks.setdefault(symbol, seen[0]))
    native.load(image, guests.command_line(values))
    assert native.run(100_000_000).exit_code == 0
    counted = int.from_bytes(native.read_guest(image.symbol("vmlab_count_pt_writes"), 4), "little")
    assert marks["vmlab_roi_end"] - marks["vmlab_roi_begin"] == counted > 0


def test_counts_of_the_nanobenchmarks() -> None:
    for workload, counts in {
        "null_call": {"system_calls": 51, "pt_writes": 0, "faults": 0}, "syscall": {"system_calls": 51, "pt_writes": 0, "faults": 0},
        "pgfault": {"faults": 51, "pt_writes": 0},
        "ptemod": {"pt_writes": 51, "faults": 0}, "ptemod_p_np": {"pt_writes": 51, "faults": 0}, "ptemod_np_p": {"pt_writes": 51, "faults": 0},
        "protfault": {"faults": 51, "pt_writes": 0, "system_calls": 0},
        "pagefault": {"faults": 41, "pt_writes": 41, "pages_zeroed": 41},
        "forkwait": {"forks": 11, "system_calls": 33, "faults": 22, "cr3_loads": 22, "flushes": 11},
        "mmap": {"system_calls": 12, "faults": 6 * 16, "pt_writes": 6 * 32},
    }.items():
        ran = run("minios", workload)
        assert {name: ran.counts[name] for name in counts} == counts, workload


def test_a_nanobenchmark_is_its_loop_less_the_empty_loop() -> None:
    """Per iteration, by hand: IN is one instruction; CALL and RET two; an entry's store one; a fault none of its own."""
    for workload, own in {"in": 1, "callret": 2, "ptemod": 1, "ptemod_p_np": 1, "ptemod_np_p": 1}.items():
        ran = run("minios", workload, iterations=100)
        full, empty = ran.between("roi_warm", "roi_end"), ran.between("empty_begin", "empty_end")
        assert 0 <= full.kernel - empty.kernel - 100 * own < 20, workload  # the call into the kernel goes another way round


def test_context_switches_load_cr3_twice_a_round() -> None:
    ran = run("minios", "ctxsw")
    assert ran.work[0] == 2 * 41
    assert ran.between("roi_warm", "roi_end").events["retired.mov_to_cr"] == 2 * 40


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("workload", ["forkwait", "random", "server", "mixed", "io"])
def test_the_portable_path_counts_the_same(guest: str, workload: str) -> None:
    assert run(guest, workload, path="portable", timer=30_000) == run(guest, workload, timer=30_000)


def in_qemu(guest: str, workload: str, **more: object) -> str:
    """The console of a run in QEMU that ended well; skips the test where there is no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 here")
    line = guests.command_line(values_of(guest, workload, timer=1_000_000, **more))
    there = subprocess.run(
        [qemu, "-kernel", str(build.HERE / f"{guest}.elf"), "-append", line, "-m", "32", "-icount", "shift=0,sleep=off",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
         "-display", "none", "-serial", "stdio", "-monitor", "none", "-nodefaults", "-no-reboot"],
        capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )
    assert there.returncode == 1, there.stdout + there.stderr
    return there.stdout.replace("\r", "")


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("workload", sorted(set(WORKLOADS) - {"bad", "io"}))
def test_the_same_in_another_emulator(guest: str, workload: str) -> None:
    """An oracle that is not ours: QEMU, where ticks fall elsewhere, by an instruction count (-icount). All of the console must be the same."""
    assert in_qemu(guest, workload) == run(guest, workload, disk=False).console


@pytest.mark.slow
@pytest.mark.parametrize("guest", GUESTS)
def test_a_thousand_random_programs_agree_with_qemu(guest: str) -> None:
    sizes = {"seeds": 1000, "iterations": 24, "seed": 1}
    assert in_qemu(guest, "random", **sizes) == run(guest, "random", **sizes, timer=100_000).console


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("workload", ["build", "server", "random", "forkwait", "ctxsw", "io"])
def test_moving_the_timer_changes_no_outcome(guest: str, workload: str) -> None:
    still = run(guest, workload)
    switches = set()
    for timer, phase in ((20_000, 0), (20_000, 7_000), (20_000, 13_001), (9_000, 500), (3_000, 0)):
        ticking = run(guest, workload, timer=timer, phase=phase)
        assert ticking.counts["interrupts"] > still.counts["interrupts"]
        assert (ticking.console, ticking.exit_code, ticking.outcome, ticking.disk) == (still.console, 0, still.outcome, still.disk)
        switches.add(ticking.counts["cr3_loads"])
    assert len(switches) > 1 or workload in ("io", "forkwait"), "the ticks changed nothing: is anybody preempted?"


def test_both_widths_see_the_same_random_programs() -> None:
    narrow, wide = run("minios", "random", seeds=5), run("minios64", "random", seeds=5)
    assert narrow.console.splitlines()[1:-2] == wide.console.splitlines()[1:-2]
    assert narrow.counts["faults"] == wide.counts["faults"]
    assert len({line.split()[-1] for line in narrow.console.splitlines() if "seed " in line}) == 5


def test_idle_skips_from_tick_to_tick() -> None:
    """838 ns an 8254 step: 119 of them are the nearest to 100 µs; the third tick ends the third sleep."""
    ran = run("minios", "idle")
    assert ran.counts["interrupts"] == 3
    assert ran.between("roi_begin", "roi_end").events["idle"] == 3


def test_the_disk_holds_what_was_written() -> None:
    ran = run("minios", "io")
    assert ran.disk is not None
    for i in range(6):
        sector = i * 7 % 32
        assert struct.unpack_from("<128I", ran.disk, 512 * sector) == tuple(i * j + sector for j in range(128))
    untouched = struct.unpack_from("<128I", ran.disk, 512 * 31)
    assert untouched == tuple(31 << 16 | word for word in range(128))


def test_a_disk_that_is_too_short_is_said_to_be() -> None:
    ran = run("minios", "io", sectors=10)
    assert ran.exit_code == 1
    assert "FAILED: the disk refused a sector" in ran.console
    assert "FAILED: no disk" in run("minios", "io", disk=False).console


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize(("bad", "words"), [
    ("stray-pointer", "exception 14 error code 00000000"), ("stack-overflow", "double fault"), ("recursive-fault", "double fault"),
])
def test_a_broken_kernel_says_so_and_ends(guest: str, bad: str, words: str) -> None:
    """The double fault's handler has a stack of its own: a task in 32 bits, the interrupt stack table in 64."""
    ran = run(guest, "bad", bad=bad)
    assert ran.exit_code == 2
    assert ran.console.splitlines()[1].startswith(f"minios: {words}")


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("bad", ["no-idt", "foreign-table"])
def test_a_kernel_without_a_way_to_say_so_ends_in_a_triple_fault(guest: str, bad: str) -> None:
    with pytest.raises(TripleFault, match="while delivering a double fault"):
        run(guest, "bad", bad=bad)


@pytest.mark.parametrize("guest", GUESTS)
def test_on_the_bare_machine_foreign_memory_is_there(guest: str) -> None:
    """What a VMM must refuse is real: behind the guest's memory there is more, and the bare machine lets it be reached."""
    assert "foreign-frame gave badbadba" in run(guest, "bad", bad="foreign-frame").console
    assert "foreign-dma gave 00000000" in run(guest, "bad", bad="foreign-dma").console
