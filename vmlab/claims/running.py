"""Claims judged on their own experiments: cells that no earlier run has are run and kept below ``results/claims``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmlab import claims, costs
from vmlab.claims.model import Claim
from vmlab.errors import ConfigError, GuestImageError
from vmlab.experiment.gather import Gatherer, Observer
from vmlab.experiment.lab import Lab
from vmlab.experiment.matrix import Cell


@dataclass(frozen=True)
class Judged:
    """Verdicts in the order asked; claim -> block -> why the lab cannot run that, or which image is not on this host; cells that failed."""

    verdicts: list[dict[str, Any]]
    absent: dict[str, dict[str, str]]
    skipped: dict[str, dict[str, str]]
    failed: list[dict[str, Any]]


def judge(
    chosen: Sequence[Claim], lab: Lab, profiles: Sequence[str], *, jobs: int, starting: Callable[[int, int], Observer],
    costbook: Mapping[str, costs.Profile] | None = None, probe: Callable[[], Mapping[str, Any]] | None = None,
) -> Judged:
    """Gather the cells of the claims' experiments and judge each claim on its own cells only, so that its verdict does not depend on which
    others were asked.

    :param starting: see :meth:`Gatherer.gather`.
    :param probe: makes the result of ``vmlab probe``; called only where a claim needs it.
    """
    gatherer = Gatherer(lab, "claims")
    cells, absent, skipped = experiments(chosen, gatherer)
    gathered = gatherer.gather((cell for several in cells.values() for cell in several), jobs, starting)
    probed = probe() if probe and any(claim.predicate in claims.NEED_PROBE for claim in chosen) else None
    verdicts = []
    for claim in chosen:
        own = {cell.id for cell in cells[claim.id]}
        verdicts += claims.evaluate(
            [claim.id], [cell for cell in gathered.cells if cell["id"] in own], profiles, probe=probed, costbook=costbook,
            absent={claim.id: absent[claim.id] | skipped[claim.id]},
        )
    return Judged(verdicts, absent, skipped, gathered.failed)


def experiments(
    chosen: Sequence[Claim], gatherer: Gatherer,
) -> tuple[dict[str, list[Cell]], dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Claim -> the cells of its experiment; claim -> block -> why the lab cannot run that; and the same for guests whose image is not here."""
    cells: dict[str, list[Cell]] = {}
    absent: dict[str, dict[str, str]] = {}
    skipped: dict[str, dict[str, str]] = {}
    for claim in chosen:
        cells[claim.id], absent[claim.id], skipped[claim.id] = [], {}, {}
        for name, block in claim.experiment.items():
            try:
                found = gatherer.expand(block)
                gatherer.check_files(found)
                cells[claim.id] += found
            except ConfigError as error:
                absent[claim.id][name] = f"its experiment cannot be run here: {error}"
            except GuestImageError as error:
                skipped[claim.id][name] = str(error)
    return cells, absent, skipped
