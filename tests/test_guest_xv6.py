"""xv6, unmodified, under every technique that can carry it. Needs its images (tests/foreign.py); slow."""

from __future__ import annotations

import re

import pytest
from foreign import XV6, exits, guest, run

LS = r'expect "init: starting sh" expect "$ " send "ls\n" expect "console" expect "$ "'
STRESS = r'expect "$ " send "stressfs\n" expect "read" expect "$ " send "ls\n" expect "stressfs4" expect "$ "'
USER = r'expect "$ " send "usertests\n" expect "ALL TESTS PASSED" expect "$ "'
TECHNIQUES = ["native", "nested", "shadow", "translation", "trapping"]
pytestmark = pytest.mark.slow


def listed(console: str) -> dict[str, int]:
    """What ``ls`` printed: name → bytes."""
    return {name: int(size) for name, size in re.findall(r"^(\S+) +\d+ \d+ (\d+)$", console, re.MULTILINE)}


@pytest.mark.parametrize("how", TECHNIQUES)
def test_the_shell_lists_its_files(how: str) -> None:
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=200_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert {"README", "usertests", "zombie"} <= set(listed(cell["console"]))


@pytest.mark.parametrize("how", TECHNIQUES)
def test_the_disk_image_boots_from_its_sector(how: str) -> None:
    """Real mode, the loader's polled reads of the kernel, then the driver's interrupts; the files are those of the file system's image."""
    image, disk = guest(XV6, "xv6.img"), guest(XV6, "fs.img")
    cell = run(how, image, ram=240, drives=disk, script=LS, budget=400_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert {"README", "usertests", "zombie"} <= set(listed(cell["console"]))


@pytest.mark.parametrize("how", TECHNIQUES)
def test_stressfs_writes_and_reads_in_five_processes(how: str) -> None:
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=STRESS, budget=2_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert cell["console"].count("read") >= 5
    assert {name: size for name, size in listed(cell["console"]).items() if name[:-1] == "stressfs"} == {f"stressfs{i}": 10240 for i in range(5)}


@pytest.mark.parametrize("how", ["native", "nested"])
def test_stressfs_on_the_disk(how: str) -> None:
    """The same, each block by REP OUTS and REP INS, and on the disk when the run ends."""
    image, disk = guest(XV6, "xv6.img"), guest(XV6, "fs.img")
    cell = run(how, image, ram=240, drives=disk, script=STRESS, budget=2_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert listed(cell["console"])["stressfs3"] == 10240
    assert cell["events"].get("machine.outs", 0) + cell["events"].get("emulate.outs", 0) > 100


def test_classical_x86_breaks_it_where_it_saves_the_interrupt_flag() -> None:
    """xv6 asks PUSHF whether interrupts are on: deprivileged, it shows the CPU's flag, not the guest's. Its last words are on its screen."""
    cell = run("silent", guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=20_000_000)
    assert cell["status"] == "failed"
    assert "panic: mycpu called with interrupts enabled" in str(cell["error"])
    assert "'pushfd' at 0x80" in str(cell["error"]) and "(mycpu+" in str(cell["error"]) and "shows IF 1, not 0" in str(cell["error"])
    found = cell["fidelity"]["first_difference"]
    assert (found["instruction"], found["symbol"].partition("+")[0]) == ("pushfd", "mycpu")


def test_nested_paging_leaves_the_devices_exits() -> None:
    """After the first touch of memory what exits is the local APIC, which the kernel reads at every look at its own CPU."""
    found = exits(run("nested", guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=200_000_000))
    assert found["nested_page_fault"] > 0.9 * sum(found.values())
    assert not {"cr_write", "page_fault", "exception"} & set(found)


@pytest.mark.parametrize("how", ["native", "nested"])
def test_usertests(how: str) -> None:
    """All of them, the refusal of a port to a user's process (``uio``) among them. The longest test of the project: see docs/foreign-guests.md."""
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=USER, budget=20_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert "FAILED" not in cell["console"]
    assert re.search(r"uio test\n(?:pid \d+ usertests: trap 13 .*\n)?uio test done", cell["console"])
