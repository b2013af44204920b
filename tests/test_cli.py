"""The command line: exit status, one clear message, plain output, lazy imports. No guest is run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import made_up_run
import pytest
from fake_lab import FakeLab

import vmlab
from vmlab.cli import main as cli
from vmlab.cli import output
from vmlab.errors import GuestImageError

# All that keeps the name Lab is imported before it is replaced below, or it would keep the fake for later tests.
from vmlab.experiment import lab as lab_module
from vmlab.experiment import matrix, pricing, runner, schema, single

assert all(module.Lab is lab_module.Lab for module in (matrix, pricing, runner, schema, single))

FILE = """\
name: small
title: A small experiment
matrix:
  - {technique: [native, trap-and-emulate], workload: [cli_sti], iterations: 5}
profiles: [old-cpu]
claims: [sky-is-blue]
expect: {sky-is-blue: holds}
quick: {divide: {iterations: 5}}
"""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab_module, "Lab", FakeLab)
    (tmp_path / "small.yaml").write_text(FILE, encoding="utf-8")
    yield


def vm(*arguments: str) -> int:
    return cli.main(list(arguments))


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# --- experiment ------------------------------------------------------------------------------------------


def test_an_experiment_ends_with_three_sentences_verdicts_and_one_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("experiment", "small.yaml", "--out", "out") == 0
    out, err = capsys.readouterr()
    assert "TABLE\n\nOne.\nTwo.\nThree.\n" in out
    assert "sky-is-blue" in out and "holds" in out
    assert out.splitlines()[-1] == f"Open {Path('out') / 'report.html'}"
    assert "[2/2]" in err and "\x1b" not in out + err and "\r" not in err


def test_json_is_the_whole_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("experiment", "small.yaml", "--json") == 0
    assert [cell["status"] for cell in json.loads(capsys.readouterr().out)["cells"]] == ["ok", "ok"]


def test_dry_run_runs_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert vm("experiment", "small.yaml", "--dry-run", "--set", "technique=trap-and-emulate") == 0
    out = capsys.readouterr().out
    assert "2 cells" in out and "added as a baseline" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]
    assert vm("experiment", "small.yaml", "--dry-run", "--json", "--quick") == 0
    assert [c["parameters"]["iterations"] for c in json.loads(capsys.readouterr().out)["cells"]] == [1, 1]


def test_a_failed_cell_is_status_1_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("experiment", "small.yaml", "--set", "workload=cli_sti,abort") == 1
    err = capsys.readouterr().err
    assert "vmlab: cell failed: trap-and-emulate/" in err and "the worker died" in err


def test_a_verdict_is_an_answer_unless_strict(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text(FILE.replace("blue: holds", "blue: fails"), encoding="utf-8")
    assert vm("experiment", "small.yaml") == 0
    assert vm("experiment", "small.yaml", "--strict") == 1
    assert "verdict not as expected: sky-is-blue: expected fails, found holds" in capsys.readouterr().err
    Path("small.yaml").write_text(FILE.replace("expect: {sky-is-blue: holds}\n", ""), encoding="utf-8")
    assert vm("experiment", "small.yaml", "--strict") == 2


def test_a_claim_that_cannot_be_evaluated_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text(FILE.replace("[sky-is-blue]", "[sky-is-blue, breaks]"), encoding="utf-8")
    assert vm("experiment", "small.yaml") == 1
    assert "claim not evaluated: breaks" in capsys.readouterr().err


def test_interrupt_is_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: output.Progress, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Progress, "finished", interrupted)
    assert vm("experiment", "small.yaml", "--out", "out", "--jobs", "1") == 130
    assert "1 of 2 cells are kept in out; go on with the same command and --resume" in capsys.readouterr().err
    assert len(list(Path("out/cells").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_real_ctrl_c_ends_the_workers_and_keeps_what_is_done(tmp_path: Path) -> None:
    text = FILE.replace("workload: [cli_sti]", "workload: [cli_sti, hang]")
    (tmp_path / "small.yaml").write_text(text, encoding="utf-8")
    code = (
        "import fake_lab, sys\nfrom vmlab.experiment import lab\nfrom vmlab.cli.main import main\n"
        "lab.Lab = fake_lab.FakeLab\nsys.exit(main(['experiment', 'small.yaml', '--out', 'out', '--jobs', '2']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert child.stderr is not None
    said = ""
    while "[3/4]" not in said:
        line = child.stderr.readline()
        assert line, said
        said += line
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    said += child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=30) == 130
    assert "interrupted; 3 of 4 cells are kept" in said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["state"] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # nobody of the group is left


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
def test_a_disk_that_takes_no_more_is_status_1_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The operating system itself refuses the write: results.json is larger than any cell and than the limit."""
    code = (
        "import fake_lab, resource, signal, sys\nfrom vmlab.experiment import lab\nfrom vmlab.cli.main import main\n"
        "lab.Lab = fake_lab.FakeLab\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(main(['experiment', 'small.yaml', '--out', 'out', '--set', 'iterations=1,2,3,4']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"vmlab: {Path('out') / 'results.json'} cannot be written: ")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cells", "config.yaml", "manifest.json"]
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "cells").iterdir()]
    assert [cell["status"] for cell in kept] == ["ok"] * 8
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["state"] == "stopped"
    assert vm("experiment", "small.yaml", "--out", "out", "--set", "iterations=1,2,3,4", "--resume") == 0


@pytest.mark.parametrize(("arguments", "says"), [
    (["experiment", "absent"], "neither a file nor an experiment that comes with vmlab"),
    (["experiment", "absent.yaml"], "no such file"),
    (["experiment", "small.yaml", "--set", "densty=3"], "did you mean 'density'?"),
    (["experiment", "small.yaml", "--set", "technique=nativ"], "did you mean 'native'?"),
    (["experiment", "small.yaml", "--out", "small.yaml"], "cannot be used for results"),
    (["experiment", "small.yaml", "--out", str(Path("small.yaml") / "below")], "cannot be used for results"),
    (["experiment", "small.yaml", "--out", "."], "is not empty"),
    (["experiment", "small.yaml", "--set", "workload=cli"], "'cli' is not a workload of nano; did you mean 'cli_sti'?"),
    (["run", "cli_sti", "--technique", "natve"], "did you mean 'native'?"),
    (["run", "cli_st", "--technique", "native"], "did you mean 'cli_sti'?"),
    (["run", "cli_sti", "--technique", "native", "--density", "x"], "a whole number is needed, not 'x'"),
    (["run", "cli_sti", "--technique", "native", "--profile", "olde-cpu"], "did you mean 'old-cpu'?"),
    (["run", "cli_sti", "--technique", "native", "--guest", "absent.elf"], "absent.elf: no such image"),
    (["run", "cli_sti", "--technique", "native", "--set", "density=1,2"], "one value for one parameter"),
    (["exeriment"], "'exeriment' is not a verb of vmlab; did you mean 'experiment'?"),
])
def test_wrong_usage_is_status_2_and_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(*arguments) == 2
    line = one_message(capsys)
    assert line.startswith("vmlab: ") and says in line


@pytest.mark.parametrize("arguments", [
    [], ["experiment"], ["experiment", "small.yaml", "--jobs", "0"], ["experiment", "small.yaml", "--nonsense"],
    ["run", "cli_sti"], ["list", "nothing"], ["--nonsense"],
])
def test_argparse_errors_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(*arguments) == 2


def test_a_mistake_of_ours_is_status_3_and_says_how_to_see_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: FakeLab) -> list[str]:
        raise RuntimeError("broken")

    monkeypatch.setattr(FakeLab, "techniques", broken)
    assert vm("list") == 3
    assert "internal error: RuntimeError: broken" in capsys.readouterr().err


# --- run, vmlab.run --------------------------------------------------------------------------------------


def test_run_prints_the_ledger_and_the_prices(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("run", "cli_sti", "--technique", "trap-and-emulate", "--iterations", "50", "--set", "sensitive=trap") == 0
    out = capsys.readouterr().out
    assert "trap.gp" in out and "100" in out and "#GP into the VMM" in out
    assert "old-cpu" in out and "1.50" in out
    assert "The outcome is the native run's." in out


def test_run_json_is_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("run", "popf", "--technique", "trap-and-emulate", "--profile", "new-cpu", "--json") == 0
    cell = json.loads(capsys.readouterr().out)
    assert list(cell["cycles"]) == ["new-cpu"] and cell["fidelity"]["matches_native"] is False


def test_run_says_where_the_outcome_differs(capsys: pytest.CaptureFixture[str]) -> None:
    from vmlab.cli.run import difference

    assert vm("run", "popf", "--technique", "trap-and-emulate") == 0
    out = capsys.readouterr().out
    assert "differs from the native run's, first in console line 2: 'if=1' natively, 'if=0' here." in out
    assert "The technique says so itself: POPF drops IF." in out
    found = {"address": 0x1000, "symbol": "loop+0x4", "instruction": "popfd", "step": 7, "registers": {"eax": [3, 515]}}
    assert difference(found) == ", first by 'popfd' at 0x1000 (loop+0x4): eax 0x3 natively, 0x203 here."
    found["suspect"] = {"address": 0xFFF, "symbol": "", "instruction": "cli"}
    assert difference(found).endswith(": eax 0x3 natively, 0x203 here, which shows what 'cli' at 0xfff did.")
    assert difference({"error": "they differ at once"}).endswith("not found: they differ at once.")
    assert difference(None) == "."


def test_run_of_a_crashing_cell_is_status_1_and_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("run", "abort", "--technique", "trap-and-emulate") == 1
    assert "the worker died" in one_message(capsys)


def test_run_for_notebooks() -> None:
    cell = vmlab.run("trap-and-emulate", "cli_sti", iterations=3, sensitive="trap", lab=FakeLab())
    assert cell["events"]["trap.gp"] == 6
    assert cell["slowdown"]["old-cpu"]["value"] == 1.5
    assert set(vmlab.__all__) == {"__version__", "run"}
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = vmlab.rum


# --- list, validate, doctor ------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("list") == 0
    out = capsys.readouterr().out
    for word in ("TECHNIQUES", "binary-translation", "in-cache|callout", "old-cpu", "sky-is-blue", "cli_sti", "slowdown"):
        assert word in out
    assert vm("list", "events", "--json") == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert {"name": "trap.gp", "unit": "event", "provenance": "machine", "words": "#GP into the VMM"} in events


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert vm("validate", "small.yaml") == 0
    assert "small.yaml: valid, 2 cells" in capsys.readouterr().out
    Path("bad.yaml").write_text(FILE.replace("iterations: 5}", "iterations: 0}", 1), encoding="utf-8")
    assert vm("validate", "small.yaml", "bad.yaml") == 2
    assert "vmlab: bad.yaml:4: matrix[0].iterations: iterations: 0 is outside" in one_message(capsys)
    assert vm("validate", "bad.yaml", "--json") == 2
    assert json.loads(capsys.readouterr().out)["experiments"][0]["valid"] is False


def test_doctor_turns_a_crash_into_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vmlab.cli import doctor

    assert vm("doctor") == 0
    assert "This machine can run the lab." in capsys.readouterr().out
    monkeypatch.setitem(doctor.WORKLOAD, "workload", "abort")
    assert vm("doctor", "--json") == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["native"]["status"] == "ok"
    assert checks["trap-and-emulate"]["status"] == "failed" and "the worker died" in checks["trap-and-emulate"]["detail"]


def test_a_missing_image_is_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: FakeLab, guest: str) -> str:
        raise GuestImageError("nano.elf: truncated at byte 12; build it again")

    monkeypatch.setattr(FakeLab, "image", damaged)
    assert vm("experiment", "small.yaml") == 2
    assert one_message(capsys) == "vmlab: nano.elf: truncated at byte 12; build it again"
    assert not Path("results").exists()


# --- how it behaves as a program -------------------------------------------------------------------------


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "vmlab", *arguments], capture_output=True, cwd=ROOT, check=False, timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS if (ROOT / "vmlab" / "cli" / f"{verb}.py").exists())])
def test_every_help_has_an_example(verb: list[str]) -> None:
    done = program(*verb, "--help")
    assert done.returncode == 0
    assert b"example" in done.stdout and b"vmlab " in done.stdout


@pytest.mark.parametrize("arguments", [
    ["--help"], ["--version"], ["experiment", "--help"], ["list", "events"], ["list", "profiles"], ["list", "claims"],
    ["list", "workloads"], ["list", "charts"], ["list", "experiments"],
    ["list"], ["list", "techniques", "--json"], ["validate", "cli_heavy"], ["experiment", "cli_heavy", "--dry-run"],
])
def test_commands_without_a_guest_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom vmlab.cli.main import main\n"
        f"status = main({arguments!r})\n"
        "heavy = sorted({'unicorn', 'numpy', 'matplotlib', 'capstone'} & set(sys.modules))\n"
        "assert not heavy, heavy\nassert status == 0, status\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("arguments", [
    ["explain", "hidden fault"], ["cite", "RUN"], ["exits", "RUN"], ["compare", "RUN", "RUN"],
    *([verb, "--help"] for verb in cli.VERBS),
])
def test_commands_that_only_look_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(made_up_run.results()), encoding="utf-8")
    arguments = [str(tmp_path) if word == "RUN" else word for word in arguments]
    code = (
        "import sys\nfrom vmlab.cli.main import main\n"
        f"status = main({arguments!r})\n"
        "heavy = sorted({'unicorn', 'numpy', 'matplotlib', 'capstone'} & set(sys.modules))\n"
        "assert not heavy, heavy\nassert status == 0, status\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_a_console_without_our_signs_gets_others() -> None:
    done = program("list", "experiments", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode()
    assert all(byte < 128 for byte in done.stdout)


def test_signs_are_replaced_in_words() -> None:
    assert "3× – 4".encode("ascii", "vmlab.plain") == b"3x - 4"
    assert "日".encode("ascii", "vmlab.plain") == b"?"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "vmlab.plain")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "vmlab", "list", "events"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(timeout=60) == 0


#: What the build itself makes and adds (setup.py); tests of the fast path see to those.
LIBRARIES = (".so", ".dylib", ".dll")


def test_everything_that_is_not_code_is_shipped_too() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["vmlab"]
    package = ROOT / "vmlab"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    present = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".tmp", *LIBRARIES)}
    assert sorted(str(path.relative_to(package)) for path in present - shipped) == []


def test_tables_align_numbers_to_the_right() -> None:
    assert output.table(["what", "n"], [["a", 5], ["bcd", 12345]]) == (
        "what       n\n----  ------\na          5\nbcd   12,345")
    assert output.table(["what", "x"], [["a", None], ["b", "-"]]).splitlines()[2:] == ["a", "b     -"]
