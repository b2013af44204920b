"""Measuring this machine: the loops really run, what cannot be measured is said, the profile loads like any other."""

from __future__ import annotations

import ctypes
import datetime
import errno
import json
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vmlab
from vmlab import costs
from vmlab.cli.main import main
from vmlab.measure import kvm, native, report
from vmlab.measure.native import CannotMeasure, Host, Spread

x86_only = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32", reason="the loops are x86-64 System V code")


def usable_kvm() -> bool:
    try:
        kvm.Guest(b"\xf4").close()
    except CannotMeasure:
        return False
    return True


MADE_UP = report.Measured(
    Host("GenuineIntel", "A CPU", None), 3000.0,
    {"insn.cpuid": Spread(100, 95, 120), "insn.rdtsc": Spread(25, 25, 26), "insn.pushf": Spread(2, 2, 3),
     "pushf+popf": Spread(22, 21, 25), "system call": Spread(200, 190, 300), "signal round trip": Spread(4000, 3900, 5000),
     "kvm cpuid": Spread(1300, 1200, 1500), "kvm vmcall": Spread(1200, 1100, 1400), "kvm io, to the caller": Spread(6000, 5000, 9000)},
    {"kvm hlt, to the caller": "a reason"},
)
TODAY = datetime.date(2031, 1, 31)


@x86_only
def test_a_loop_runs_its_body_exactly_n_times() -> None:
    page = native.Page()
    counter = (ctypes.c_uint64 * 1)(0)
    run = page.function(native.loop(bytes.fromhex("48ff06") * 3))  # inc qword [rsi], three times
    assert run(7, ctypes.addressof(counter)) > 0
    assert counter[0] == 21


@x86_only
def test_instructions_cost_what_such_instructions_cost() -> None:
    page = native.Page()
    clock = native.Clock(page)
    assert 100 < clock.mhz() < 20_000
    add = native.measure(page, clock, bytes.fromhex("4883c101"), copies=100)  # dependent additions: one a cycle
    assert 0.5 < add.value < 2
    rdtsc = native.measure(page, clock, native.INSTRUCTIONS["insn.rdtsc"])
    assert add.value < rdtsc.value < 100_000 and rdtsc.low <= rdtsc.value <= rdtsc.high


@x86_only
def test_the_cpu_says_what_it_is() -> None:
    found = native.host(native.Page())
    assert len(found.vendor) == 12 and found.words


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="signals are left as Linux does it")
def test_a_signal_is_caught_and_the_old_handler_is_back() -> None:
    import signal

    before = signal.getsignal(signal.SIGTRAP)
    page = native.Page()
    clock = native.Clock(page)
    assert native.signal_round_trip(page, clock).value > native.system_call(page, clock).value > 10
    assert signal.getsignal(signal.SIGTRAP) == before


@pytest.mark.skipif(not os.path.exists("/dev/kvm") or not usable_kvm(), reason="no usable /dev/kvm")
def test_a_guest_exits_for_the_reason_that_is_measured() -> None:
    made = kvm.Guest(b"\xe6\x80\xf4")  # out 0x80,al; hlt
    try:
        assert [made.run(), made.run()] == [2, 5]
    finally:
        made.close()
    assert kvm.measured("io").value > 100


@pytest.mark.skipif(not os.path.exists("/dev/kvm") or not usable_kvm(), reason="no usable /dev/kvm")
def test_a_guest_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "SECONDS", 0.5)
    monkeypatch.setattr(kvm, "_CHILD", "import time; time.sleep(60)")
    with pytest.raises(CannotMeasure, match="had not ended"):
        kvm.measured("cpuid")


def refusal(opens: OSError | None) -> str:
    """What a guest says where opening the device ends so: an error, or another device's descriptor."""
    real = os.open

    def fake(path: str, flags: int) -> int:
        assert path == "/dev/kvm"
        if opens:
            raise opens
        return real(os.devnull, flags)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CannotMeasure) as caught:
        patch.setattr(os, "open", fake)
        kvm.Guest(b"\xf4")
    return str(caught.value)


def test_why_there_is_no_kvm_is_said_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    assert "module kvm_intel or kvm_amd is not loaded" in refusal(FileNotFoundError(errno.ENOENT, "no"))
    assert "group 'kvm'" in refusal(PermissionError(errno.EACCES, "no"))
    assert "is no KVM device" in refusal(None)  # the null device answers ENOTTY
    assert "too many files" in refusal(OSError(errno.EMFILE, "too many files"))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(CannotMeasure, match="is another system"):
        kvm.Guest(b"\xf4")


class FakeKvm:
    """KVM as far as the guest's few ioctls need it: KVM_RUN leaves exit reasons and, for HLT, ticks where the guest would."""

    def __init__(self, file: Path, version: int = 12, reasons: Sequence[int] = (), ticks: Sequence[tuple[int, int]] = ()) -> None:
        self.file, self.version, self.reasons, self.ticks = file, version, list(reasons), list(ticks)
        self.memory = 0
        self.entry = 0
        file.write_bytes(bytes(4096))

    def ioctl(self, descriptor: int, request: int, argument: object = 0) -> int:
        if request == 0xAE00:
            return self.version
        if request == 0xAE01:
            return os.open(os.devnull, os.O_RDWR)
        if request == 0xAE41:
            return os.open(self.file, os.O_RDWR)
        if request == 0xAE04:
            return 4096
        if request == 0x4020AE46:
            assert isinstance(argument, bytes)
            slot, _flags, start, size, self.memory = struct.unpack("<IIQQQ", argument)
            assert (slot, start, size) == (0, 0, 1 << 16)
        if request == 0x4090AE82:
            assert isinstance(argument, bytes)
            self.entry = struct.unpack("<18Q", argument)[16]
        if request == 0xAE80:
            os.pwrite(descriptor, struct.pack("<I", self.reasons.pop(0)), 8)
            if self.ticks:
                ctypes.memmove(self.memory + 0x4000, struct.pack("<II", *self.ticks.pop(0)), 8)
        return 0


class FakeClock:
    def ratio(self) -> float:
        return 2.0


def faked(monkeypatch: pytest.MonkeyPatch, fake: FakeKvm) -> FakeKvm:
    fcntl = pytest.importorskip("fcntl")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real(os.devnull if path == "/dev/kvm" else path, flags))
    monkeypatch.setattr(fcntl, "ioctl", fake.ioctl)
    return fake


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="KVM is Linux's")
def test_round_trips_by_hand_on_a_kvm_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """400 rounds take 400 x 1000 ticks more than the empty loop's 800, at two cycles a tick."""
    fake = faked(monkeypatch, FakeKvm(tmp_path / "vcpu", reasons=[5] * kvm.SAMPLES, ticks=[(400_800, 800)] * kvm.SAMPLES))
    assert kvm.inside("cpuid", FakeClock()) == Spread(2000, 2000, 2000)  # type: ignore[arg-type]
    assert fake.entry == 0x1000 and not fake.reasons


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="KVM is Linux's")
@pytest.mark.parametrize(("fake", "says"), [
    ({"version": 11}, "speaks version 11"), ({"reasons": [2]}, "took an exception"), ({"reasons": [9]}, "exit reason 9 instead of HLT")])
def test_a_guest_that_ends_otherwise_is_told(fake: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faked(monkeypatch, FakeKvm(tmp_path / "vcpu", **fake))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CannotMeasure, match=says):
        kvm.inside("cpuid", FakeClock())  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "descriptors are given back (the mapping of the vCPU keeps one of its own)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="KVM is Linux's")
def test_a_run_that_ends_for_another_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faked(monkeypatch, FakeKvm(tmp_path / "vcpu", reasons=[17]))
    with pytest.raises(CannotMeasure, match="exit reason 17 instead of 2"):
        kvm.outside("io", None, FakeClock())  # type: ignore[arg-type]


def test_what_is_no_x86_is_said_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:
    monkeypatch.setenv("VMLAB_PROFILES", str(tmp_path / "own"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert main(["measure", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "aarch64" in json.loads(out)["not_measured"][0]["reason"] and "aarch64" in err
    assert not (tmp_path / "own").exists()


def test_without_kvm_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(report, "measure", lambda with_kvm: MADE_UP)
    monkeypatch.setattr("vmlab.measure.measure", lambda with_kvm: MADE_UP)
    assert main(["measure", "--no-kvm", "--out", str(tmp_path / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    assert "signal round trip" in out and "kvm hlt, to the caller: a reason" in out
    assert costs.load(tmp_path / "mine.yaml").name == "this-machine"
    assert main(["measure", "--out", "mine.txt"]) == 2
    with pytest.raises(CannotMeasure, match="no-kvm"):
        report._kvm(False, "cpuid")


def test_the_profile_loads_like_any_other_and_says_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(report.profile_text(MADE_UP, TODAY), encoding="utf-8")
    profile = costs.load(tmp_path / "m.yaml")
    rdtsc = profile.costs["insn.rdtsc"]
    assert (rdtsc.value, rdtsc.provenance, rdtsc.measured_on) == (25, "measured", ("A CPU", "vmlab measure", "2031-01-31"))
    assert profile.costs["insn.popf"].value == 20 and profile.costs["insn.popf"].low == 18
    assert profile.costs["entry"].value == 600 and profile.costs["exit.cpuid"].value == 700
    assert "bounds the hardware's cost from above" in profile.costs["exit.vmmcall"].note
    assert {f.provenance for f in profile.costs.values()} == {"measured", "assumed"}
    assert costs.supports(profile, "svm-npt")
    text = (tmp_path / "m.yaml").read_text(encoding="utf-8")
    assert "a reason" in text and "4000 cycles" in text


def test_inside_a_virtual_machine_it_says_so(tmp_path: Path) -> None:
    inside = report.Measured(Host("AuthenticAMD", "A CPU", "KVMKVMKVM"), 3000.0, dict(MADE_UP.rows), {})
    text = report.profile_text(inside, TODAY)
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    profile = costs.load(tmp_path / "m.yaml")
    assert "inside a virtual machine (KVMKVMKVM)" in profile.words and "intercepts" in profile.costs["insn.cpuid"].note


def test_a_cpu_of_another_maker_has_no_profile() -> None:
    with pytest.raises(CannotMeasure, match="OtherMaker12"):
        report.profile_text(report.Measured(Host("OtherMaker12", "", None), 1000.0, {}, {}), TODAY)


def test_this_machine_is_found_by_name_and_priced_only_where_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_PROFILES", str(tmp_path))
    (tmp_path / "this-machine.yaml").write_text(report.profile_text(MADE_UP, TODAY), encoding="utf-8")
    assert "this-machine" in costs.own_names() and "this-machine" not in costs.names()
    assert costs.load("this-machine") is costs.load("this-machine")
    cell = vmlab.run("native", "rdtsc", iterations=8, profiles=["this-machine", str(tmp_path / "this-machine.yaml")])
    totals = [price["total"] for price in cell["cycles"].values()]
    assert len(totals) == 2 and totals[0] == totals[1] > 0
