"""Debian's cloud kernel and memtest86+, unmodified. Need their images (tests/foreign.py); slow."""

from __future__ import annotations

import pytest
from foreign import LINUX, LINUX_LINE, MEMTEST, exits, guest, run

SHELL = r'expect "vmlab# " send "uname -s; echo $((6*7))\n" expect "42" expect "vmlab# "'
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["native", "nested", "shadow"])
def test_the_shell_runs_commands(how: str) -> None:
    image, initrd = guest(LINUX, "vmlinuz"), guest(LINUX, "initrd.gz")
    cell = run(how, image, initrd=initrd, append=LINUX_LINE, ram=256, protocol="pvh", script=SHELL, budget=4_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert "\nLinux\r\n42" in cell["console"]
    if how == "shadow":
        found = exits(cell)
        assert found["page_fault"] + found.get("cr_write", 0) > 0.5 * sum(found.values())


@pytest.mark.parametrize("protocol", ["linux32", "linux64"])
def test_a_bzimage_unpacks_itself(protocol: str) -> None:
    cell = run("native", guest(LINUX, "vmlinuz"), initrd=guest(LINUX, "initrd.gz"), append=LINUX_LINE, ram=256, protocol=protocol,
               script='expect "Linux version"', budget=4_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)


@pytest.mark.parametrize(("name", "protocol"), [("memtest86+ia32.bin", "linux32"), ("memtest86+x64.bin", "linux64")])
def test_memtest_shows_its_banner(name: str, protocol: str) -> None:
    cell = run("native", guest(MEMTEST, name), append="console=ttyS0,115200", ram=64, protocol=protocol, script='expect "Memtest86+"',
               budget=500_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
