"""The other rooms as the experiment sees them, each imported when it is first asked.

Everything that the runner needs of strategies, guests, costs, claims and report goes through one
:class:`Lab`, so that reading and checking a file costs no heavy import, and a test can bring its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.errors import ConfigError
from vmlab.parameters import Parameter

if TYPE_CHECKING:
    from vmlab.strategies.techniques import Technique

#: Rooms whose code decides what is counted: a change there makes earlier cells stale.
COUNTING_CODE = ("machine", "guests", "vmm", "strategies", "ledger.py", "experiment/cell.py")
PACKAGE = Path(__file__).resolve().parent.parent


class Lab:
    """The real rooms."""

    #: What a worker calls for a cell, as ``module:function``.
    cell_function = "vmlab.experiment.cell:run_cell"
    #: Whether that runs a guest that :mod:`vmlab.experiment.boots` can boot in its place.
    shares_boots = True

    def __init__(self, extra: Sequence[str] = ()) -> None:
        """:param extra: techniques beside the installed ones, as ``FILE.py:CLASS`` (``--strategy``, never from YAML)."""
        self.extra = tuple(extra)

    def techniques(self) -> list[str]:
        """Names of the installed techniques, and the extra ones."""
        from vmlab import strategies

        return [*strategies.names(), *self.extra]

    def parameters(self, technique: str) -> Mapping[str, Parameter]:
        """What ``technique`` declares. :raises ConfigError: no such technique, or it cannot be loaded."""
        return self._describe(technique).parameters

    def loadable(self) -> dict[str, Mapping[str, Parameter]]:
        """What each technique declares, those left out that cannot be loaded.

        One broken technique from elsewhere must not stop the others; naming it is still an error.
        """
        found = {}
        for name in self.techniques():
            with contextlib.suppress(ConfigError):
                found[name] = self.parameters(name)
        return found

    def _describe(self, technique: str) -> type[Technique]:
        from vmlab import strategies

        try:
            return strategies.describe(technique)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"technique {technique!r} cannot be loaded: {type(error).__name__}: {error}") from error

    def summary_of(self, technique: str) -> str:
        """The technique in one line."""
        return self._describe(technique).summary

    def unfaithful(self, technique: str, workload: str, parameters: Mapping[str, Any]) -> str | None:
        """Why ``technique`` declares that it is not faithful here, or None where it claims to be."""
        return self._describe(technique).unfaithful(workload, dict(parameters))

    def guests(self) -> list[str]:
        """Names of the built-in guests."""
        from vmlab import guests

        return guests.names()

    def from_file(self, guest: str) -> bool:
        """Whether this guest is an image from a file."""
        from vmlab import guests

        return guests.from_file(guest)

    def workloads(self, guest: str) -> Mapping[str, Mapping[str, Parameter]]:
        """Workloads of ``guest``, each with its parameters."""
        from vmlab import guests

        return {name: workload.parameters for name, workload in guests.workloads(guest).items()}

    def guest_parameters(self) -> set[str]:
        """Every parameter that some workload of some built-in guest takes."""
        return {key for guest in self.guests() for workload in self.workloads(guest).values() for key in workload}

    def workload_summary(self, guest: str, workload: str) -> str:
        """The workload in one line."""
        from vmlab import guests

        return guests.workloads(guest)[workload].summary

    def image(self, guest: str) -> str:
        """SHA-256 of the guest's image. :raises GuestImageError: missing, truncated."""
        from vmlab import guests

        return guests.digest(guest)

    def file(self, path: str, what: str) -> str:
        """SHA-256 of a file that a guest needs beside its image. :raises GuestImageError: missing."""
        from vmlab.guests import files

        return hashlib.sha256(files.read(path, what)).hexdigest()

    def profiles(self) -> list[str]:
        """Names of the cost profiles."""
        from vmlab import costs

        return costs.names()

    def known_profiles(self) -> list[str]:
        """Those and the user's own, which are priced on only where they are named."""
        from vmlab import costs

        return [*costs.names(), *costs.own_names()]

    def profile_row(self, name: str) -> list[Any]:
        """Name, CPU, year, what it provides, and how many of its figures are cited, assumed and measured."""
        from vmlab import costs

        profile = costs.load(name)
        kinds = [figure.provenance for figure in profile.costs.values()]
        counts = [kinds.count(kind) for kind in costs.PROVENANCES]
        return [name, profile.words, profile.year, " ".join(sorted(profile.provides)), *counts]

    def figure_rows(self, name: str) -> list[list[Any]]:
        """Every figure of a profile: cost, value, low, high, unit, provenance, sources, where, note."""
        from vmlab import costs

        return [
            [name, f.key, f.value, f.low, f.high, costs.unit_of(f.key), f.provenance, " ".join(f.sources), f.where, f.note]
            for f in costs.load(name).costs.values()
        ]

    def price(self, events: Mapping[str, int], profile: str, platform: str) -> dict[str, Any]:
        """Cycles of ``events`` as the results hold them: total, low, high, breakdown; or unsupported."""
        from vmlab import costs

        return dict(costs.price(events, costs.load(profile), platform).as_dict())

    def slowdown(
        self, events: Mapping[str, int], native: Mapping[str, int], profile: str, platform: str,
    ) -> dict[str, Any]:
        """Ratio to native under common samples of the costs: value, low, high; or unsupported."""
        from vmlab import costs

        return dict(costs.slowdown(events, native, costs.load(profile), platform).as_dict())

    def seeds(self) -> dict[str, int]:
        """Every seed that a result depends on."""
        from vmlab import costs

        return {"pricing": costs.SEED}

    def claims(self) -> list[str]:
        """Ids of the claims."""
        from vmlab import claims

        return claims.names()

    def claim_row(self, name: str) -> list[Any]:
        """Id, kind and statement."""
        from vmlab import claims

        claim = claims.load(name)
        return [name, claim.kind, claim.statement]

    def evaluate(self, ids: Sequence[str], cells: Sequence[dict[str, Any]], profiles: Sequence[str]) -> list[dict[str, Any]]:
        """Verdicts of the claims ``ids`` over ``cells``."""
        from vmlab import claims

        return claims.evaluate(list(ids), list(cells), list(profiles))

    def charts(self) -> list[str]:
        """Names of the charts that the report can draw."""
        from vmlab import report

        return report.chart_names()

    def write_report(self, directory: Path, results: dict[str, Any], config: dict[str, Any]) -> list[Path]:
        """Draw charts and page into ``directory``; the files written."""
        from vmlab import report

        return report.write(directory, results, config)

    def summary(self, results: dict[str, Any]) -> list[str]:
        """Three plain sentences, computed from ``results``."""
        from vmlab import report

        return report.summary(results)

    def terminal_table(self, results: dict[str, Any]) -> str:
        """The results' story as a table for a terminal."""
        from vmlab import report

        return report.terminal_table(results)

    def versions(self) -> dict[str, str]:
        """What a result depends on beside its configuration. No user name and no path is in it."""
        import vmlab

        return {
            "vmlab": vmlab.__version__,
            "code": self.code(),
            "unicorn": _version("unicorn"),
            "capstone": _version("capstone"),
        }

    def code(self, more: Sequence[str] = ()) -> str:
        """A hash of the code that counts: of vmlab's lower rooms (and ``more`` rooms) and of techniques from elsewhere."""
        digest = hashlib.sha256()
        files: set[Path] = set()
        for room in (*COUNTING_CODE, *more):
            path = PACKAGE / room
            files |= {path} if path.is_file() else {*path.rglob("*.py"), *path.rglob("*.c")}
        for path in sorted(files):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
        for name in self.loadable():
            source = self._source(name)
            if not source.is_relative_to(PACKAGE):
                digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return digest.hexdigest()[:12]

    def _source(self, technique: str) -> Path:
        """The file that describes a technique: for one from elsewhere, the file that its class is in."""
        if technique in self.extra:
            return Path(technique.rpartition(":")[0]).resolve()
        module = sys.modules[self._describe(technique).__module__]
        return Path(str(module.__file__)).resolve()


def _version(distribution: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def host() -> dict[str, str]:
    """What the manifest says of the host: kind of system and of interpreter, nothing that names it or its user."""
    import platform

    return {
        "system": platform.system(), "machine": platform.machine(),
        "python": platform.python_version(), "implementation": sys.implementation.name,
    }
