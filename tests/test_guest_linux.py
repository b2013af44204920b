"""Debian's cloud kernel and memtest86+, unmodified: need their images (tests/foreign.py), slow. And what is said of files that are wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from foreign import LINUX, LINUX_LINE, MEMTEST, exits, guest, run

from vmlab import guests
from vmlab.cli.main import main

SHELL = r'expect "vmlab# " send "uname -s; echo $((6*7))\n" expect "42" expect "vmlab# "'
#: Without the pauses for somebody at the keyboard, whose loops would be hundreds of millions of instructions.
MEMTEST_LINE = "console=ttyS0,115200 nopause nobench nosmp keyboard=legacy"
#: Exits that are the memory's.
MEMORY = ("page_fault", "cr_write", "cr_read", "invlpg")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["native", "nested", "shadow", "tracing"])
def test_the_shell_runs_commands(how: str) -> None:
    image, initrd = guest(LINUX, "vmlinuz"), guest(LINUX, "initrd.gz")
    cell = run(how, image, initrd=initrd, append=LINUX_LINE, ram=256, protocol="pvh", script=SHELL, budget=4_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)
    assert "\nLinux\r\n42" in cell["console"]
    found = exits(cell)
    memory = sum(found.get(kind, 0) for kind in MEMORY)
    if how in ("shadow", "tracing"):
        # But for ports, of which nearly all are the loop that learns the TSC's frequency, and those by which the console is written.
        assert memory > 0.9 * (sum(found.values()) - found["io"])
    elif how == "nested":
        assert memory == 0 and found["nested_page_fault"] < 256
    if how == "tracing":
        assert cell["events"]["shadow.trace.write"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["linux32", "linux64"])
def test_a_bzimage_unpacks_itself(protocol: str) -> None:
    cell = run("native", guest(LINUX, "vmlinuz"), initrd=guest(LINUX, "initrd.gz"), append=LINUX_LINE, ram=256, protocol=protocol,
               script='expect "Linux version"', budget=4_000_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "protocol"), [("memtest86+ia32.bin", "linux32"), ("memtest86+x64.bin", "linux64")])
def test_memtest_shows_its_banner(name: str, protocol: str) -> None:
    cell = run("native", guest(MEMTEST, name), append=MEMTEST_LINE, ram=64, protocol=protocol, script='expect "Memtest86+"',
               budget=500_000_000)
    assert (cell["status"], cell["error"]) == ("ok", None)


# ---- with files that are made up
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **content: bytes) -> None:
    monkeypatch.setenv(LINUX, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, data in content.items():
        (tmp_path / name.replace("_", ".")).write_bytes(data)


KERNEL = (Path(guests.__file__).parent / "nano" / "nano.elf").read_bytes()


@pytest.mark.parametrize(("content", "said"), [
    ({}, "no guest image at '$VMLAB_GUEST_LINUX/vmlinuz'"),
    ({"vmlinuz": KERNEL}, "no initrd at '$VMLAB_GUEST_LINUX/initrd.gz'"),
    ({"vmlinuz": KERNEL[:200], "initrd_gz": gzip.compress(b"x")}, "guest image 'vmlinuz' is truncated"),
    ({"vmlinuz": bytes(56) + b"ARM\x64" + bytes(1000), "initrd_gz": gzip.compress(b"x")}, "guest image 'vmlinuz' is a Linux kernel for arm64"),
])
def test_the_experiment_says_what_is_wrong_with_its_files_before_it_runs(content: dict[str, bytes], said: str, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path, monkeypatch, **content)
    assert main(["experiment", "linux_boot"]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_the_experiment_names_the_variable_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    _folder(tmp_path, monkeypatch)
    monkeypatch.delenv(LINUX)
    assert main(["experiment", "linux_boot"]) == 2
    assert f"set {LINUX} to the folder that it is in" in capsys.readouterr().err
