"""A run's directory: where it is, what is in it, and that nothing in it is ever half a file.

    results/<experiment>/<UTC time>-<hash8>/
        manifest.json  config.yaml  cells/<hash>.json  results.json  results.csv  plots/  report.html

A cell's file is written as soon as the cell is done. Its name is the cell's *content hash*, over
technique, parameters, the image's hash and versions, so a file that is found under that name is that cell's
result, whichever run made it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

from vmlab.errors import ConfigError, ExperimentError
from vmlab.experiment import clock
from vmlab.experiment.matrix import Cell

SCHEMA_VERSION = 1


def write(path: Path, text: str | Iterable[str], *, lasting: bool = True) -> None:
    """Write ``text`` (in pieces, if it comes so) so that ``path`` has all of it or is as it was before.

    :param lasting: wait until it would outlive a power failure; a cell lost in one is run again.
    :raises ExperimentError: disk full, no permission, no such place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for piece in (text,) if isinstance(text, str) else text:
                file.write(piece)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the place itself is the trouble, and that is reported below
            temporary.unlink(missing_ok=True)
        raise ExperimentError(f"{path} cannot be written: {error.strerror or error}; finished cells are kept") from error


def write_json(path: Path, value: Any, *, lasting: bool = True) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write(path, json.dumps(value, indent=1, sort_keys=False) + "\n", lasting=lasting)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, one cell at a time and each on one line: Python writes JSON ten times faster without indentation."""
    def pieces() -> Iterator[str]:
        for number, (key, value) in enumerate(results.items()):
            yield f"{',' if number else '{'}\n {json.dumps(key)}: "
            if key == "cells":
                for n, cell in enumerate(value):
                    yield f"{',' if n else '['}\n  {json.dumps(cell)}"
                yield "\n ]" if len(value) else "[]"
            else:
                yield json.dumps(value, indent=1).replace("\n", "\n ")
        yield "\n}\n"

    write(path, pieces())


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote.

    :raises ExperimentError: it cannot be read, or is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}; remove it and try again") from error
    if not isinstance(value, dict):
        raise ExperimentError(f"{path} cannot be read: it is not a mapping; remove it and try again")
    return value


def files_beside(cell: Cell) -> dict[str, str]:
    """The files that a cell's guest needs beside its image: path → what it is."""
    found = {path: "disk image" for path in str(cell.parameters.get("drives", "")).split(",") if path}
    initrd = str(cell.parameters.get("initrd", ""))
    return {**found, **({initrd: "initrd"} if initrd else {})}


def content_hash(cell: Cell, image: str, versions: Mapping[str, str], files: Mapping[str, str] = MappingProxyType({})) -> str:
    """The cell's identity for reuse. The guest and what is beside it count by their content, not by name or path.

    :param files: SHA-256 of each of :func:`files_beside`.
    """
    parameters = {k: v for k, v in cell.parameters.items() if k != "guest"}
    if parameters.get("initrd"):
        parameters["initrd"] = files[str(parameters["initrd"])]
    if parameters.get("drives"):
        parameters["drives"] = ",".join(files[path] for path in str(parameters["drives"]).split(",") if path)
    identity: dict[str, Any] = {"technique": cell.technique, "parameters": parameters, "image": image, "versions": dict(versions)}
    if (prices := clock.fingerprint(parameters)) is not None:
        identity["clock"] = prices
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Use ``path``, which must be absent or empty.

        :raises ConfigError: it is a file, holds something, or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ConfigError(f"{path} is not empty; give another --out, or --resume to continue the run in it")
            (path / "cells").mkdir()  # also shows that the place can be written to
        except OSError as error:
            raise ConfigError(f"{path} cannot be used for results: {error.strerror or error}") from error
        return cls(path)

    @classmethod
    def fresh(cls, results: Path, experiment: str, config_hash: str) -> RunDirectory:
        """A new directory below ``results``, named by time (UTC) and configuration."""
        name = f"{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}-{config_hash[:8]}"
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):
            path = results / experiment / f"{name}{suffix}"
            if not path.exists():
                return cls.create(path)
        raise ExperimentError(f"{results / experiment} holds a hundred runs of this second")

    @classmethod
    def unfinished(cls, results: Path, experiment: str, config_hash: str) -> RunDirectory | None:
        """The newest run of this configuration that did not come to its end."""
        for path in sorted((results / experiment).glob(f"*-{config_hash[:8]}*"), reverse=True):
            run = cls(path)
            manifest = run.manifest()
            if manifest.get("config_hash") == config_hash and manifest.get("state") != "finished":
                return run
        return None

    def remove(self) -> None:
        """Take back a directory in which nothing was run."""
        for name in ("manifest.json", "config.yaml"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is not empty is not ours to remove
            (self.path / "cells").rmdir()
            self.path.rmdir()

    def manifest(self) -> dict[str, Any]:
        """The manifest, or nothing where there is none that can be read."""
        try:
            value = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def cell(self, content: str) -> dict[str, Any] | None:
        """A finished cell by its content hash; one that failed counts as not finished."""
        path = self.path / "cells" / f"{content}.json"
        if not path.exists():
            return None
        value = read_json(path)
        return value if value.get("status") in ("ok", "unsupported") else None

    def path_of(self, content: str) -> Path:
        """Where a cell is, or will be."""
        return self.path / "cells" / f"{content}.json"

    def write_cell(self, content: str, record: Mapping[str, Any]) -> None:
        """Keep a cell."""
        write(self.path_of(content), json.dumps(record) + "\n", lasting=False)


    def share_cell(self, content: str, path: Path) -> bool:
        """Have the file of an earlier run, which is never written again but as a whole, under this run's own name too. False where that cannot be."""
        try:
            os.link(path, self.path_of(content))
        except OSError:     # another disk, a file system without links, or the file is there: it will be written
            return False
        return True


def read_results(run: Path) -> dict[str, Any]:
    """The results of a finished run.

    :param run: the run's directory, or its ``results.json``.
    :raises ConfigError: there is no such run, or the file is not results of this schema.
    """
    path = run / "results.json" if run.is_dir() else run
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give the directory of a finished run") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION or not isinstance(value.get("cells"), list):
        raise ConfigError(f"{path}: not the results of a run (schema_version {SCHEMA_VERSION} with cells)")
    return value


def tidy_csv(results: Mapping[str, Any]) -> Iterator[str]:
    """``results`` as one table of single values: a row for each cell, quantity and profile. In pieces."""
    cells = results["cells"]
    names = sorted({name for cell in cells for name in cell["parameters"]})
    yield _csv([["id", "technique", *names, "status", "quantity", "name", "profile", "value", "low", "high"]])
    for cell in cells:
        head = [cell["id"], cell["technique"], *(cell["parameters"].get(name, "") for name in names), cell["status"]]
        yield _csv(head + row for row in _quantities(cell))


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


class StoredCells(Sequence[dict[str, Any]]):
    """The cells of a sweep too large for memory, each read from its file when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> StoredCells: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | StoredCells:
        return StoredCells(self._paths[index]) if isinstance(index, slice) else read_json(self._paths[index])


def _quantities(cell: Mapping[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, value in cell["work"].items():
        rows.append(["work", name, "", value, "", ""])
    guest = cell["instructions"].get("guest", {})
    for name, value in [*guest.items(), ("machine", cell["instructions"].get("machine"))]:
        if value is not None:
            rows.append(["instructions", name, "", value, "", ""])
    for name, value in cell["events"].items():
        rows.append(["events", name, "", value, "", ""])
    for name, value in cell["efficiency"].items():
        rows.append(["efficiency", name, "", value, "", ""])
    for profile, price in cell["cycles"].items():
        if "total" in price:
            rows.append(["cycles", "total", profile, price["total"], price["low"], price["high"]])
            rows += [["cycles", cause, profile, value, "", ""] for cause, value in price["breakdown"].items()]
    for profile, ratio in cell["slowdown"].items():
        if "value" in ratio:
            rows.append(["slowdown", "native", profile, ratio["value"], ratio["low"], ratio["high"]])
    return rows
