"""Cells that an earlier run has finished, found by content hash.

A cell's content hash covers technique, parameters, the guest's image and the code that counts
(:mod:`vmlab.experiment.store`), so a file found under it is that cell's result, whichever run made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmlab.errors import ExperimentError
from vmlab.experiment import store
from vmlab.experiment.worker import Record


class Kept:
    """Every cell below ``results``. The folders are looked through once, when the first cell is asked for.

    :param own: a folder of cells to be preferred.
    """

    def __init__(self, results: Path, own: Path | None = None) -> None:
        self._results, self._own = results, own
        self._index: dict[str, Path] | None = None

    def find(self, content: str) -> tuple[Path, Record] | None:
        """Where the finished cell of this content hash is, and the cell; None where there is none, or none that can be read.

        A cell that failed by its guest's doing fails again the same way; one that its worker took along may not.
        """
        path = self._paths().get(content)
        if path is None:
            return None
        try:
            record = store.read_json(path)
        except ExperimentError:
            return None     # it will be run, and written anew
        return (path, record) if finished(record) else None

    def _paths(self) -> dict[str, Path]:
        if self._index is None:
            places: Sequence[Path] = sorted([*self._results.glob("*/*/cells"), *self._results.glob("*/cells")])
            self._index = {path.stem: path for place in [*places, *([self._own] if self._own else [])] for path in sorted(place.glob("*.json"))}
        return self._index


def finished(record: Record) -> bool:
    """Whether running this cell again would tell nothing new."""
    return record.get("status") in ("ok", "unsupported") or bool(record.get("events"))
