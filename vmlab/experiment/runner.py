"""Runs an experiment: the order of events, from a checked configuration to a report on disk."""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vmlab.errors import ConfigError, ExperimentError, VmlabError
from vmlab.experiment import store
from vmlab.experiment.executors import CellRunner
from vmlab.experiment.lab import Lab, host
from vmlab.experiment.matrix import Cell
from vmlab.experiment.pricing import complete_one
from vmlab.experiment.reuse import Kept
from vmlab.experiment.schema import Experiment
from vmlab.experiment.store import RunDirectory
from vmlab.experiment.worker import Record
from vmlab.experiment.workers import Pool

#: Cells that the whole of a run's results holds in memory at most; larger sweeps are read from their files as they are needed.
IN_MEMORY = 2000
#: Called with each finished cell's id, status and seconds.
Observer = Callable[[str, str, float], None]


@dataclass
class Options:
    """How to run, as against what: nothing here changes a count."""

    jobs: int = 2
    out: Path | None = None
    results: Path = field(default_factory=lambda: Path("results"))
    resume: bool = False
    quick: bool = False
    #: Take identical cells from earlier runs below ``results``.
    reuse: bool = True
    #: Whether cells of the same technique and guest begin where its boot ended: "auto" for guests from files, "always" where they can, "never".
    boots: str = "auto"
    #: Where cells run: None for ``jobs`` workers on this machine, else what makes a runner from a cell function and the code's hash.
    executor: Callable[[str, str], CellRunner] | None = None


@dataclass
class Outcome:
    """A finished run: where it is, what ``results.json`` holds, and what went wrong."""

    directory: Path
    results: dict[str, Any]
    #: What a report is made of: the results, or of a large sweep a part that memory can hold.
    shown: dict[str, Any]
    failed: list[dict[str, Any]]
    not_evaluated: list[dict[str, Any]]
    unexpected: list[str]
    reused: int
    report: Path | None


class Run:
    """One run of one experiment."""

    def __init__(self, experiment: Experiment, lab: Lab, options: Options) -> None:
        self.experiment, self.lab, self.options = experiment, lab, options
        self.versions = lab.versions()
        # An image that is missing or broken is found here, before anything is written.
        guests = sorted({str(cell.parameters["guest"]) for cell in experiment.cells})
        self.images = {guest: lab.image(guest) for guest in guests}
        beside = {path: what for cell in experiment.cells for path, what in store.files_beside(cell).items()}
        self.files = {path: lab.file(path, what) for path, what in sorted(beside.items())}
        self.config_hash = experiment.hash()
        #: Finished cells: id → status and machine path. Their records are in the directory.
        self.done: dict[str, tuple[str, str | None]] = {}
        #: Those of them that an earlier run finished: id → its file there.
        self.taken: dict[str, Path] = {}
        #: Records of finished cells, of a run that memory can hold.
        self._records: dict[str, Record] = {}
        self.directory = self._directory()
        self.contents = {cell.id: store.content_hash(cell, self.images[str(cell.parameters["guest"])], self.versions, self.files)
                         for cell in experiment.cells}
        self.reused = self._resume()
        if options.reuse:
            self._take_from_earlier_runs()

    # --- before ------------------------------------------------------------------------------------

    def _directory(self) -> RunDirectory:
        out, results = self.options.out, self.options.results
        if not self.options.resume:
            if out is not None:
                return RunDirectory.create(out)
            return RunDirectory.fresh(results, self.experiment.name, self.config_hash)
        if out is None:
            old = RunDirectory.unfinished(results, self.experiment.name, self.config_hash)
            return old or RunDirectory.fresh(results, self.experiment.name, self.config_hash)
        if not out.exists():
            return RunDirectory.create(out)
        old = RunDirectory(out)
        if old.manifest().get("config_hash") != self.config_hash:
            raise ConfigError(f"{out} holds no run of this configuration: resume it with the same file and options")
        return old

    def _resume(self) -> int:
        if self.options.resume:
            for cell in self.experiment.cells:
                found = self.directory.cell(self.content(cell))
                if found is not None:
                    self._note(cell.id, found)
        return len(self.done)

    def _take_from_earlier_runs(self) -> None:
        """Note what is there already. Completed, it is written into this run too, which then is whole by itself."""
        kept = Kept(self.options.results)
        for cell in self.todo:
            found = kept.find(self.content(cell))
            if found is not None and found[1].get("status") in ("ok", "unsupported"):
                self.taken[cell.id] = found[0]
                self._note(cell.id, found[1])

    def _note(self, cell_id: str, record: Record) -> None:
        self.done[cell_id] = str(record.get("status")), record.get("machine_path")
        if not self._large:
            self._records[cell_id] = record

    @property
    def _large(self) -> bool:
        return len(self.experiment.cells) > IN_MEMORY

    def _keep(self, cell: Cell, record: Record) -> None:
        whole = {"id": cell.id, "technique": cell.technique, "parameters": dict(cell.parameters)} | {
            k: v for k, v in record.items() if k not in ("id", "technique", "parameters")
        }
        self.directory.write_cell(self.content(cell), whole)
        self._note(cell.id, whole)

    def content(self, cell: Cell) -> str:
        """The cell's content hash."""
        return self.contents[cell.id]

    @property
    def todo(self) -> list[Cell]:
        """Cells that have no result yet, in the order of the matrix."""
        return [cell for cell in self.experiment.cells if cell.id not in self.done]

    # --- the run -----------------------------------------------------------------------------------

    def execute(self, observer: Observer) -> Outcome:
        """Run what is left to run, complete it, judge it, draw it.

        :raises KeyboardInterrupt: finished cells are on disk; ``--resume`` goes on from there.
        :raises ExperimentError: something cannot be written; the same holds.
        """
        try:
            store.write(self.directory.path / "config.yaml", self._config())
            self._manifest("running")
        except ExperimentError as error:
            # Nothing has run yet: the place is wrong, not the run. Leave it as it was found.
            if not self.options.resume:
                self.directory.remove()
            raise ConfigError(str(error)) from error
        try:
            self._cells(observer)
            return self._finish()
        except BaseException as error:
            # Whatever it was, it goes on to the caller; only the note on disk is made here.
            self._manifest_if_possible("interrupted" if isinstance(error, KeyboardInterrupt) else "stopped")
            raise

    def _cells(self, observer: Observer) -> None:
        todo = self.todo
        with self._runner(len(todo)) as runner:
            for cell, record in runner.run(todo):
                self._keep(cell, record)
                observer(cell.id, str(record.get("status")), float(record.get("host_seconds", 0.0)))

    def _runner(self, cells: int) -> CellRunner:
        if self.options.executor is not None:
            return self.options.executor(self.lab.cell_function, str(self.versions.get("code", "")))
        return Pool(self.lab.cell_function, min(self.options.jobs, cells), boots=self.options.boots if self.lab.shares_boots else "never")

    def _record(self, cell_id: str) -> Record | None:
        if cell_id not in self.done or cell_id not in self.contents:
            return None
        if cell_id in self._records:
            return self._records[cell_id]
        return store.read_json(self.taken.get(cell_id) or self.directory.path_of(self.contents[cell_id]))

    def _complete(self) -> Sequence[dict[str, Any]]:
        """Every cell priced and compared, in its file; in memory only as many as it can hold."""
        large = self._large
        cells: list[dict[str, Any]] = []
        native: tuple[str, Record | None] = ("", None)
        for cell in self.experiment.cells:
            record = self._record(cell.id)
            if record is None:
                continue
            if native[0] != cell.baseline:      # cells of the same work often follow one another
                native = cell.baseline, self._record(cell.baseline)
            completed = complete_one(cell, record, native[1], self.experiment.profiles, self.lab)
            taken = self.taken.get(cell.id)
            if taken is None or completed != record or not self.directory.share_cell(self.content(cell), taken):
                self.directory.write_cell(self.content(cell), completed)
            if not large:
                cells.append(completed)
        if not large:
            return cells
        return store.StoredCells([self.directory.path_of(self.content(cell)) for cell in self.experiment.cells if cell.id in self.done])

    def _finish(self) -> Outcome:
        experiment, path = self.experiment, self.directory.path
        cells = self._complete()
        claims = [self._judge(claim, cells) for claim in experiment.claims]
        results = {
            "schema_version": store.SCHEMA_VERSION, "experiment": experiment.name, "cells": cells, "claims": claims,
        }
        store.write_results(path / "results.json", results)
        store.write(path / "results.csv", store.tidy_csv(results))
        # The page quotes the manifest, so it has to be right by now; a report that fails sets it back to "stopped".
        failed = [cell for cell in cells if cell["status"] == "failed"]
        self._manifest("failed" if failed else "finished")
        shown = results | self._sample(cells) if self._large else results
        written = self.lab.write_report(path, shown, self._resolved())
        report = next((file for file in written if file.name == "report.html"), None)
        return Outcome(
            path, results, shown,
            failed=failed,
            not_evaluated=[claim for claim in claims if "error" in claim],
            unexpected=unexpected(claims, experiment.expect),
            reused=self.reused + len(self.taken), report=report,
        )

    def _sample(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Cells from all over a large sweep, at even distances, each with the one that it is compared with: as many as memory can hold."""
        finished = [cell for cell in self.experiment.cells if cell.id in self.done]
        number = {cell.id: at for at, cell in enumerate(finished)}
        distance = -(-2 * len(finished) // IN_MEMORY)
        chosen = sorted({number[name] for cell in finished[::distance] for name in (cell.id, cell.baseline) if name in number})
        return {"cells": [cells[at] for at in chosen], "of": len(finished)}

    def _judge(self, claim: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One verdict. A claim whose check breaks must not take the run's other results along."""
        try:
            return self.lab.evaluate([claim], cells, self.experiment.profiles)[0]
        except VmlabError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"internal error: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        return {
            "id": claim, "statement": "", "source": "", "kind": "counted", "verdict": "undecided", "by_profile": {},
            "figures": {}, "calibrated": False, "reason": f"could not be evaluated: {reason}", "error": reason,
        }

    # --- what is written beside the cells ------------------------------------------------------------

    def _resolved(self) -> dict[str, Any]:
        return self.experiment.resolved()

    def _config(self) -> str:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)      # a sweep's thousand cells take seconds in Python
        text = yaml.dump(self._resolved(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        return f"# {self.experiment.name}, resolved: 'vmlab experiment config.yaml' runs exactly these cells.\n{text}"

    def _manifest(self, state: str) -> None:
        statuses = collections.Counter(status for status, _ in self.done.values())
        paths = {path for _, path in self.done.values() if path}
        manifest = {
            "schema_version": store.SCHEMA_VERSION, "experiment": self.experiment.name, "state": state,
            "config_hash": self.config_hash, "quick": self.options.quick,
            "versions": self.versions, "images": {Path(name).name: sha for name, sha in {**self.images, **self.files}.items()},
            "seeds": self.lab.seeds(), "machine_path": sorted(paths), "host": host(), "jobs": self.options.jobs,
            "cells": {"total": len(self.experiment.cells), **dict(sorted(statuses.items()))},
            "reused": list(self.taken),
            "files": {cell.id: self.content(cell) for cell in self.experiment.cells if cell.id in self.done},
        }
        store.write_json(self.directory.path / "manifest.json", manifest)

    def _manifest_if_possible(self, state: str) -> None:
        # When the disk is what failed, the error that is under way says so.
        with contextlib.suppress(ExperimentError):
            self._manifest(state)


def unexpected(claims: list[dict[str, Any]], expect: Mapping[str, str]) -> list[str]:
    """Verdicts other than the configuration expects, one sentence each; ``--strict`` makes them failures."""
    verdicts = {claim["id"]: claim["verdict"] for claim in claims}
    return [
        f"{claim}: expected {wanted}, found {verdicts[claim]}"
        for claim, wanted in expect.items() if verdicts[claim] != wanted
    ]
