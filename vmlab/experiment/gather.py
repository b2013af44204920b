"""Cells wherever they are: finished ones are taken from earlier runs (:mod:`vmlab.experiment.reuse`), the others are run and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmlab.experiment import schema, store
from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import Cell
from vmlab.experiment.pricing import complete
from vmlab.experiment.reuse import Kept
from vmlab.experiment.worker import Record
from vmlab.experiment.workers import Pool
from vmlab.experiment.yamlfile import Document

#: Called with each finished cell's id, status and seconds.
Observer = Callable[[str, str, float], None]
RESULTS = Path("results")


@dataclass
class Gathered:
    """Completed, unpriced cells in the order asked, how many of them were found, and which failed."""

    cells: list[dict[str, Any]]
    reused: int

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Cells that ended badly."""
        return [cell for cell in self.cells if cell["status"] == "failed"]


class Gatherer:
    """Finds or runs cells; ``folder`` below ``results`` keeps those that it ran."""

    def __init__(self, lab: Lab, folder: str, results: Path = RESULTS) -> None:
        self.lab, self.own = lab, results / folder / "cells"
        self._kept = Kept(results, self.own)

    def expand(self, block: Mapping[str, Any]) -> list[Cell]:
        """The cells of one block of an experiment, with the baselines that they need.

        :raises ConfigError: the block names what the lab does not have.
        """
        return schema.load(Document("experiment", {"name": "gathered", "matrix": dict(block)}), self.lab).cells

    def check_files(self, cells: Iterable[Cell]) -> None:
        """:raises GuestImageError: an image from a file, or a file beside it, is not on this host; names the variable or the file."""
        for cell in cells:
            guest = str(cell.parameters["guest"])
            if guest not in self.lab.guests():
                self.lab.image(guest)
            for path, what in store.files_beside(cell).items():
                self.lab.file(path, what)

    def gather(self, cells: Iterable[Cell], jobs: int, starting: Callable[[int, int], Observer]) -> Gathered:
        """Every cell, run where no finished one is found.

        :param starting: called with how many are to run and how many were found, before anything runs; gives the observer.
        :raises ExperimentError: a result cannot be read or written.
        """
        wanted = {cell.id: cell for cell in cells}
        content = self._content(list(wanted.values()))
        records: dict[str, Record] = {}
        for cell in wanted.values():
            found = self._kept.find(content[cell.id])
            if found is not None:
                records[cell.id] = found[1]
        reused, todo = len(records), [cell for cell in wanted.values() if cell.id not in records]
        observer = starting(len(todo), reused)
        if todo:
            with Pool(self.lab.cell_function, min(jobs, len(todo))) as pool:
                for cell, answer in pool.run(todo):
                    record = {"id": cell.id, "technique": cell.technique, "parameters": dict(cell.parameters)} | dict(answer)
                    store.write_json(self.own / f"{content[cell.id]}.json", record)
                    records[cell.id] = record
                    observer(cell.id, str(record.get("status")), float(record.get("host_seconds", 0.0)))
        return Gathered(complete(list(wanted.values()), records, (), self.lab), reused)

    def _content(self, cells: Sequence[Cell]) -> dict[str, str]:
        versions = self.lab.versions()
        images = {guest: self.lab.image(guest) for guest in sorted({str(cell.parameters["guest"]) for cell in cells})}
        beside = {path: what for cell in cells for path, what in store.files_beside(cell).items()}
        files = {path: self.lab.file(path, what) for path, what in beside.items()}
        return {cell.id: store.content_hash(cell, images[str(cell.parameters["guest"])], versions, files) for cell in cells}


def kept(results: Path, folder: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that is made once and kept as ``results/<folder>/<name>.json``.

    :raises ExperimentError: it cannot be read or written.
    """
    path = results / folder / f"{name}.json"
    if path.exists():
        return store.read_json(path)
    value = make()
    store.write_json(path, value)
    return value
