"""Where cells run, other than in this machine's own workers: any executor of :mod:`concurrent.futures`, or Dask's workers.

An executor runs :func:`remote_cell` for each cell. Its processes must have this very vmlab: a worker whose code counts
otherwise refuses the cell, since its result would be kept under the wrong name. Only so many cells are handed over at a time, that
a sweep of thousands costs no memory and Ctrl-C leaves little behind.
"""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from vmlab.errors import ConfigError, ExperimentError
from vmlab.experiment.matrix import Cell
from vmlab.experiment.worker import Record, run_one

#: Cells handed over and not yet finished, for each process that the executor says it has.
_AHEAD = 4
_UNKNOWN_SIZE = 16


class CellRunner(Protocol):
    """What runs cells: :class:`vmlab.experiment.workers.Pool`, or an :class:`Executed`."""

    def __enter__(self) -> CellRunner: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Record]]:
        """Each cell with its record, in the order in which they finish."""
        ...


def remote_cell(function: str, code: str, technique: str, parameters: dict[str, Any]) -> Record:
    """Run one cell where the executor put it.

    :param function: ``module:name`` of what runs a cell.
    :param code: hash of the code that counts, where the cell comes from; "" is not compared.
    """
    if code:
        from vmlab.experiment.lab import Lab

        here = Lab().code()
        if here != code:
            return {"status": "failed", "error": f"a worker has other code than this machine ({here}, not {code}): install the same vmlab there"}
    module, _, name = function.partition(":")
    return run_one(getattr(importlib.import_module(module), name), technique, parameters)


class Executed:
    """Cells on ``executor``. It is not closed here: who made it closes it.

    :param code: see :func:`remote_cell`.
    :param close: called at the end.
    """

    def __init__(self, executor: concurrent.futures.Executor, function: str, code: str = "", close: Callable[[], None] = lambda: None) -> None:
        self._executor, self._function, self._code, self._close = executor, function, code, close
        size = getattr(executor, "_max_workers", None)
        self._ahead = _AHEAD * size if isinstance(size, int) else _AHEAD * _UNKNOWN_SIZE
        self._waiting: dict[concurrent.futures.Future[Record], Cell] = {}

    def __enter__(self) -> Executed:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._waiting:
            future.cancel()
        self._close()

    def run(self, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Record]]:
        """Each cell with its record, in the order in which they finish; one whose process was lost is failed.

        :raises ExperimentError: the executor takes no more cells.
        """
        left = iter(cells)
        more = True
        while more or self._waiting:
            while more and len(self._waiting) < self._ahead:
                cell = next(left, None)
                more = cell is not None
                if cell is not None:
                    self._waiting[self._submit(cell)] = cell
            done, _ = concurrent.futures.wait(self._waiting, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield self._waiting.pop(future), self._record(future)

    def _submit(self, cell: Cell) -> concurrent.futures.Future[Record]:
        try:
            return self._executor.submit(remote_cell, self._function, self._code, cell.technique, dict(cell.parameters))
        except RuntimeError as error:       # shut down, or broken by a process that died
            raise ExperimentError(f"the executor takes no more cells: {error}; finished cells are kept") from error

    @staticmethod
    def _record(future: concurrent.futures.Future[Record]) -> Record:
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            return {"status": "failed", "error": "the executor cancelled the cell"}
        except Exception as error:  # noqa: BLE001 - whatever an executor says of a process that it lost
            return {"status": "failed", "error": f"the executor lost the cell: {type(error).__name__}: {error}"}


def dask(scheduler: str, function: str, code: str, seconds: float = 20.0) -> Executed:
    """Cells on the workers of a Dask scheduler; one whose worker dies runs again on another.

    :param scheduler: its address, as ``tcp://host:8786``.
    :raises ConfigError: Dask is not installed, or no scheduler answers there.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise ConfigError("--executor dask needs Dask: pip install 'vmlab[dask]'") from error
    try:
        client = distributed.Client(scheduler, timeout=seconds, set_as_default=False)
    except (OSError, ValueError) as error:      # TimeoutError is an OSError
        raise ConfigError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error
    # Pure functions would be answered from what the scheduler remembers; each cell is run.
    return Executed(client.get_executor(pure=False), function, code, client.close)
