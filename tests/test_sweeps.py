"""Sweeps: what an earlier run has is not run again, cells run on any executor, and thousands of them cost no memory."""

from __future__ import annotations

import concurrent.futures
import errno
import faulthandler
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_lab import FakeLab

from vmlab.errors import ConfigError
from vmlab.experiment import executors, runner, schema, yamlfile
from vmlab.experiment.executors import Executed
from vmlab.experiment.runner import Options, Outcome, Run

TESTS = Path(__file__).resolve().parent
TEXT = """\
name: small
matrix:
  - {technique: [native, trap-and-emulate], workload: [cli_sti, popf], sensitive: [silent, trap], iterations: [5, 6, 7]}
profiles: [old-cpu]
"""


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(text: str = TEXT, lab: FakeLab | None = None, **options: Any) -> tuple[Outcome, list[str]]:
    """The outcome, and the cells that were really run."""
    ran: list[str] = []
    lab = lab or FakeLab()
    run = Run(schema.load(yamlfile.parse(text, "f.yaml"), lab), lab, Options(**options))
    return run.execute(lambda cell, _status, _seconds: ran.append(cell)), ran


def manifest(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((outcome.directory / "manifest.json").read_text(encoding="utf-8"))
    return found


def without_times(outcome: Outcome) -> list[dict[str, Any]]:
    return [{k: v for k, v in cell.items() if k != "host_seconds"} for cell in outcome.results["cells"]]


# ---- reuse
def test_the_same_sweep_again_runs_nothing_and_says_so() -> None:
    first, ran = sweep()
    again, nothing = sweep()
    assert len(ran) == len(first.results["cells"]) and nothing == []
    assert without_times(again) == without_times(first)
    assert manifest(first)["reused"] == [] and sorted(manifest(again)["reused"]) == sorted(ran)
    assert again.reused == len(ran) and again.directory != first.directory
    assert {path.name for path in (again.directory / "cells").iterdir()} == {path.name for path in (first.directory / "cells").iterdir()}


def test_a_wider_sweep_runs_what_is_new() -> None:
    _, before = sweep()
    _, ran = sweep(TEXT.replace("[5, 6, 7]", "[5, 6, 7, 8]"))
    assert len(ran) == len(before) // 3 and all("iterations=8" in cell for cell in ran)


def test_no_reuse_runs_everything() -> None:
    _, ran = sweep()
    outcome, again = sweep(reuse=False)
    assert sorted(again) == sorted(ran) and manifest(outcome)["reused"] == []


def test_other_code_and_other_images_reuse_nothing() -> None:
    _, ran = sweep()
    for attribute, value in (("code_hash", "other"), ("image_hash", "1" * 64)):
        lab = FakeLab()
        setattr(lab, attribute, value)
        assert len(sweep(lab=lab)[1]) == len(ran), attribute


def test_failed_and_damaged_cells_are_run_again() -> None:
    text = TEXT.replace("[cli_sti, popf]", "[cli_sti, triple]")
    first, _ = sweep(text)
    spoilt = next(path for path in sorted((first.directory / "cells").iterdir()) if json.loads(path.read_text())["status"] == "ok")
    spoilt.write_text("{", encoding="utf-8")
    _, ran = sweep(text)
    assert len(ran) == len(first.failed) + 1


def test_results_are_valid_json_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = sweep(reuse=False)
    monkeypatch.setattr(runner, "IN_MEMORY", 3)
    large, _ = sweep(reuse=False)
    assert not isinstance(large.results["cells"], list)
    for outcome in (small, large):
        on_disk = json.loads((outcome.directory / "results.json").read_text(encoding="utf-8"))
        assert on_disk["cells"] == list(outcome.results["cells"])
    assert without_times(large) == without_times(small)
    assert (small.directory / "results.csv").read_bytes() == (large.directory / "results.csv").read_bytes()


def test_a_large_sweep_s_report_is_of_cells_from_all_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IN_MEMORY", 12)
    outcome, _ = sweep(TEXT.replace("[5, 6, 7]", str(list(range(5, 45)))))
    shown, ids = outcome.shown["cells"], [cell["id"] for cell in outcome.results["cells"]]
    assert outcome.shown["of"] == len(ids) > 12 >= len(shown) > 4
    places = [ids.index(cell["id"]) for cell in shown]
    assert places == sorted(places) and places[-1] > len(ids) / 2
    for cell in shown:      # a ratio needs both
        assert cell["technique"] == "native" or any(
            other["technique"] == "native" and other["parameters"].items() <= cell["parameters"].items() for other in shown)


def test_a_run_that_shares_files_with_an_earlier_one_outlives_it() -> None:
    first, ran = sweep()
    again, _ = sweep()
    shutil.rmtree(first.directory)
    assert len(list((again.directory / "cells").iterdir())) == len(ran)
    assert json.loads((again.directory / "results.json").read_text())["cells"] == list(again.results["cells"])


def test_where_files_cannot_be_shared_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    first, _ = sweep()
    monkeypatch.setattr(os, "link", refuse)
    again, _ = sweep()
    assert without_times(again) == without_times(first)
    assert {path.name for path in (again.directory / "cells").iterdir()} == {path.name for path in (first.directory / "cells").iterdir()}


# ---- executors
def test_any_executor_gives_the_same_results() -> None:
    here, _ = sweep(reuse=False)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        there, ran = sweep(reuse=False, executor=lambda function, code: Executed(threads, function))
    assert without_times(there) == without_times(here) and len(ran) == len(here.results["cells"])


def test_a_process_that_an_executor_loses_fails_its_cell_and_no_more_are_taken() -> None:
    text = TEXT.replace("[cli_sti, popf]", "abort").replace("[5, 6, 7]", "5").replace("[silent, trap]", "silent")
    with concurrent.futures.ProcessPoolExecutor(1, initializer=faulthandler.disable) as processes:
        outcome, _ = sweep(text, executor=lambda function, code: Executed(processes, function))
    assert outcome.failed and all("the executor lost the cell: BrokenProcessPool" in cell["error"] for cell in outcome.failed)


def test_only_so_many_cells_are_handed_over_at_a_time() -> None:
    class Counting(concurrent.futures.ThreadPoolExecutor):
        waiting = most = 0

        def submit(self, *arguments: Any, **more: Any) -> Any:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            future = super().submit(*arguments, **more)
            future.add_done_callback(lambda _: setattr(self, "waiting", self.waiting - 1))
            return future

    with Counting(1) as threads:
        sweep(TEXT.replace("[5, 6, 7]", str(list(range(5, 40)))), reuse=False, executor=lambda function, code: Executed(threads, function))
        assert 1 <= threads.most <= 4


def test_a_worker_with_other_code_refuses() -> None:
    record = executors.remote_cell("fake_lab:run_cell", "0123456789ab", "native", {"workload": "popf"})
    assert record["status"] == "failed" and "other code" in record["error"]


def test_dask_without_a_scheduler_is_one_sentence() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:1'"):
        executors.dask("tcp://127.0.0.1:1", "fake_lab:run_cell", "", seconds=1)


@pytest.fixture
def _scheduler() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A real scheduler and two workers on loopback."""
    pytest.importorskip("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "0"}

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]], env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    children = [start("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show")]
    children += [start("worker", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny", "--host", "127.0.0.1")
                 for _ in range(2)]
    yield address, children
    for child in reversed(children):
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_dask_worker_killed_in_the_middle_costs_no_cell(_scheduler: tuple[str, list[subprocess.Popen[bytes]]]) -> None:
    address, children = _scheduler
    here, _ = sweep(reuse=False)
    finished: list[str] = []
    lab = FakeLab()
    text = TEXT.replace("[5, 6, 7]", str(list(range(5, 60))))
    run = Run(schema.load(yamlfile.parse(text, "f.yaml"), lab), lab, Options(
        reuse=False, executor=lambda function, code: executors.dask(address, function, "", 60)))

    def observe(cell: str, status: str, _seconds: float) -> None:
        finished.append(status)
        if len(finished) == 20:
            children[1].send_signal(signal.SIGKILL)

    outcome = run.execute(observe)
    assert children[1].wait(10) == -signal.SIGKILL
    assert outcome.failed == [] and len(finished) == len(outcome.results["cells"]) and set(finished) == {"ok"}
    same = {cell["id"]: cell for cell in without_times(outcome)}
    assert [same[cell["id"]] for cell in without_times(here)] == without_times(here)


@pytest.mark.slow
def test_ten_thousand_cells_keep_memory_flat_and_progress_true(tmp_path: Path) -> None:
    """The parent's peak with 10 000 cells is not far from that with 1000."""
    program = textwrap.dedent("""
        import resource, sys
        import test_sweeps
        from fake_lab import FakeLab
        from vmlab.experiment.lab import Lab
        FakeLab.write_report, FakeLab.summary = Lab.write_report, Lab.summary       # the page is real
        cells = int(sys.argv[1])
        text = "name: many\\nmatrix: {technique: native, workload: compute, iterations: [" + ",".join(map(str, range(1, cells + 1))) + "]}"
        outcome, ran = test_sweeps.sweep(text, jobs=2, reuse=False)
        assert len(ran) == len(set(ran)) == len(outcome.results["cells"]) == cells
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """)
    peaks = []
    for cells in (1000, 10_000):
        done = subprocess.run([sys.executable, "-c", program, str(cells)], cwd=tmp_path, capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    # The cells themselves (parameters, hashes, identities) are a few kilobytes each; their results are not kept.
    assert peaks[1] - peaks[0] < 9000 * 8, peaks
