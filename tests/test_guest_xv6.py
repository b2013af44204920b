"""xv6, unmodified, under every technique that can carry it. Needs its images (tests/foreign.py); slow."""

from __future__ import annotations

import pytest
from foreign import XV6, exits, guest, run

LS = r'expect "init: starting sh" expect "$ " send "ls\n" expect "console" expect "$ "'
STRESS = r'expect "$ " send "stressfs\n" expect "read" expect "$ "'
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["native", "nested", "shadow", "translation", "trapping"])
def test_the_shell_lists_its_files(how: str) -> None:
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=200_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    for name in ("README", "usertests", "zombie"):
        assert f"\n{name} " in cell["console"]


def test_the_disk_image_boots_from_its_sector() -> None:
    image, disk = guest(XV6, "xv6.img"), guest(XV6, "fs.img")
    for how in ("native", "nested"):
        cell = run(how, image, ram=240, drives=disk, script=LS, budget=400_000_000)
        assert (cell["status"], cell["error"]) == ("ok", None)


@pytest.mark.parametrize("how", ["native", "nested"])
def test_stressfs(how: str) -> None:
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=STRESS, budget=2_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)


def test_classical_x86_breaks_it_where_it_saves_the_interrupt_flag() -> None:
    """xv6 asks PUSHF whether interrupts are on: deprivileged, it shows the CPU's flag, not the guest's. Its last words are on its screen."""
    cell = run("silent", guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=200_000_000)
    assert cell["status"] == "failed"
    assert "panic: mycpu called with interrupts enabled" in str(cell["error"])


def test_nested_paging_leaves_the_devices_exits() -> None:
    """After the first touch of memory what exits is the local APIC, which the kernel reads at every look at its own CPU."""
    found = exits(run("nested", guest(XV6, "kernelmemfs"), ram=240, script=LS, budget=200_000_000))
    assert found["nested_page_fault"] > 0.9 * sum(found.values())
    assert not {"cr_write", "page_fault", "exception"} & set(found)


@pytest.mark.parametrize("how", ["native", "nested"])
def test_usertests(how: str) -> None:
    script = r'expect "$ " send "usertests\n" expect "ALL TESTS PASSED" expect "$ "'
    cell = run(how, guest(XV6, "kernelmemfs"), ram=240, script=script, budget=20_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert "FAILED" not in cell["console"]
