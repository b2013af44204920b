"""One cell with its baseline, priced: what ``vmlab run`` prints and ``vmlab.run()`` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmlab.errors import ConfigError
from vmlab.experiment import schema
from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import Cell
from vmlab.experiment.pricing import complete
from vmlab.experiment.worker import Record
from vmlab.experiment.workers import Pool
from vmlab.experiment.yamlfile import Document
from vmlab.parameters import Value, nearest


def run(
    technique: str, workload: str | None = None, *, guest: str = "nano", profiles: Sequence[str] | None = None,
    lab: Lab | None = None, parameters: Mapping[str, Value] | None = None, **more: Value,
) -> dict[str, Any]:
    """Run ``workload`` under ``technique`` in a process of its own and return the priced cell.

    The native run of the same work is made along with it, so that ``slowdown`` and ``fidelity`` are there.

        cell = vmlab.run("binary-translation", "rdtsc", iterations=1000, density=100, emulation="callout")
        cell["events"]["bt.callout.rdtsc"], cell["slowdown"]["prescott-2005"]["value"]

    :param workload: what the guest does; a kernel from a file has none.
    :param profiles: names of the profiles to price on, or files of one's own; all built-in ones when not given.
    :param parameters: of the workload (iterations, density, budget) and of the technique; ``more`` is the same
        as keyword arguments.
    :returns: a cell as in ``results.json`` (see docs/experiments.md). A guest that crashed or a worker that
        died gives a cell of status ``failed`` whose ``error`` says why.
    :raises ConfigError: unknown technique, workload, parameter, profile, or a value that is not allowed.
    :raises GuestImageError: the guest is a file that is missing or damaged.
    """
    lab = lab or Lab()
    known = lab.profiles()
    for profile in profiles or ():
        if profile not in lab.known_profiles() and not profile.endswith((".yaml", ".yml")):
            raise ConfigError(f"{profile!r} is not a profile{nearest(profile, known)}")
    cells = expand(technique, workload, guest, {**(parameters or {}), **more}, lab)
    records: dict[str, Record] = {}
    with Pool(lab.cell_function, jobs=len(cells)) as pool:
        for cell, record in pool.run(cells):
            records[cell.id] = record
    return complete(cells, records, known if profiles is None else list(profiles), lab)[0]


def expand(technique: str, workload: str | None, guest: str, parameters: Mapping[str, Value], lab: Lab) -> list[Cell]:
    """The cell and, unless it is native itself, its baseline. Raises as :func:`run` does."""
    block: dict[str, Value] = {"technique": technique, "guest": guest, **parameters}
    if workload is not None:
        block["workload"] = workload
    experiment = schema.load(Document("run", {"name": "run", "matrix": block}), lab)
    return experiment.cells
