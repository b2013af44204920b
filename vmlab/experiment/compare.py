"""Two runs side by side: the same cells, and what of them changed.

A *metric* is a number of a cell that is the worse the larger it is:

``cycles``, ``slowdown``   on every profile that both runs were priced on
``machine``                instructions that the CPU retired in the region of interest
``host_seconds``           time on the host, the one value that differs between runs of the same code
an event kind              by its name in the ledger, or a pattern such as ``exit.*``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vmlab.errors import ConfigError
from vmlab.ledger import EVENTS
from vmlab.parameters import nearest

PLAIN = ("cycles", "slowdown", "machine", "host_seconds")
#: What is compared where nothing is said: all that does not depend on the host.
USUAL = ("cycles", "slowdown", "machine", "*")
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A metric of a cell in both runs. ``relative`` is the change over the old value, None where that was 0."""

    cell: str
    metric: str
    old: float
    new: float

    @property
    def relative(self) -> float | None:
        return (self.new - self.old) / self.old if self.old else None

    def worse_than(self, share: float) -> bool:
        """Whether it grew by more than ``share`` of its old value (anything more than nothing is)."""
        return self.new > self.old * (1 + share)

    def as_dict(self) -> dict[str, Any]:
        """For a program."""
        return {"cell": self.cell, "metric": self.metric, "old": self.old, "new": self.new, "relative": self.relative}


@dataclass(frozen=True)
class Limit:
    """``--fail-over METRIC:5%``: no value of the metric may grow by more."""

    metric: str
    share: float


def parse_limit(text: str) -> Limit:
    """``METRIC:5%``. :raises ConfigError: not of that form, or no such metric."""
    metric, colon, share = text.rpartition(":")
    try:
        percent = float(share.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not colon or not share.endswith("%") or not 0 <= percent < 1e6:
        raise ConfigError(f"--fail-over {text}: write METRIC:PERCENT%, as slowdown:5%")
    known(metric)
    return Limit(metric, percent / 100)


def known(metric: str) -> None:
    """:raises ConfigError: neither a metric's name nor a kind or pattern of the ledger."""
    if metric in PLAIN or any(fnmatchcase(kind, metric) for kind in EVENTS):
        return
    raise ConfigError(f"{metric!r} is no metric{nearest(metric, [*PLAIN, *EVENTS])}")


def changes(old: Results, new: Results, metrics: Sequence[str] = USUAL) -> list[Change]:
    """Every value of the metrics that differs, in the order of the old run's cells."""
    newer = {cell["id"]: cell for cell in new["cells"]}
    found = []
    for cell in old["cells"]:
        other = newer.get(cell["id"])
        if other is None or cell["status"] != "ok" or other["status"] != "ok":
            continue
        before, after = dict(_values(cell, metrics)), dict(_values(other, metrics))
        for name in [*before, *(name for name in after if name not in before)]:
            # A count that one run does not have is 0; a price that one run does not have was not asked for.
            if name.startswith(("cycles", "slowdown")) and (name not in before or name not in after):
                continue
            values = before.get(name, 0.0), after.get(name, 0.0)
            if values[0] != values[1]:
                found.append(Change(cell["id"], name, *values))
    return found


def _values(cell: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[tuple[str, float]]:
    for metric in metrics:
        if metric in ("cycles", "slowdown"):
            part = "total" if metric == "cycles" else "value"
            yield from ((f"{metric} {profile}", price[part]) for profile, price in cell[metric].items() if part in price)
        elif metric == "machine":
            yield metric, cell["instructions"].get("machine", 0)
        elif metric == "host_seconds":
            yield metric, cell["host_seconds"]
        else:
            yield from ((kind, n) for kind, n in cell["events"].items() if fnmatchcase(kind, metric))


def structure(old: Results, new: Results) -> dict[str, Any]:
    """What there is in one run only, cells that ended otherwise, outcomes and verdicts that changed."""
    before, after = ({cell["id"]: cell for cell in run["cells"]} for run in (old, new))
    common = [name for name in before if name in after]
    verdicts = [{claim["id"]: claim["verdict"] for claim in run.get("claims", [])} for run in (old, new)]
    return {
        "common": len(common), "only_old": [name for name in before if name not in after], "only_new": [name for name in after if name not in before],
        "status": [{"cell": name, "old": before[name]["status"], "new": after[name]["status"]} for name in common
                   if before[name]["status"] != after[name]["status"]],
        "outcome": [name for name in common if _outcome(before[name]) != _outcome(after[name])],
        "verdicts": [{"claim": name, "old": verdict, "new": verdicts[1][name]} for name, verdict in verdicts[0].items()
                     if name in verdicts[1] and verdicts[1][name] != verdict],
    }


def lost(old: Results, new: Results) -> list[str]:
    """Cells that the old run finished and the new one does not have, or has unfinished: no limit can be checked on them."""
    finished = {cell["id"] for cell in new["cells"] if cell["status"] == "ok"}
    return [cell["id"] for cell in old["cells"] if cell["status"] == "ok" and cell["id"] not in finished]


def example(run: Results) -> str:
    """A cell of a run, by name."""
    return str(run["cells"][0]["id"]) if run["cells"] else "no cell at all"


def _outcome(cell: Mapping[str, Any]) -> Any:
    return cell["fidelity"].get("outcome")


def over(old: Results, new: Results, limits: Sequence[Limit]) -> list[Change]:
    """The changes that a limit does not allow."""
    return [change for limit in limits for change in changes(old, new, [limit.metric]) if change.worse_than(limit.share)]
