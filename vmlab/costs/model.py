"""Cost of one event of each kind on one profile: nominal, and as 1000 samples."""

from __future__ import annotations

from operator import add, mul

from vmlab.costs.figures import Figure
from vmlab.costs.paths import path_table
from vmlab.costs.profile import Profile
from vmlab.costs.rules import RULES
from vmlab.costs.sampling import SAMPLES, samples


class NoFigure(Exception):
    """The profile has no figure for ``key``, which an event of ``kind`` (None: a question about the cost itself) needs."""

    def __init__(self, kind: str | None, key: str) -> None:
        self.kind, self.key = kind, key
        super().__init__(f"no figure for {key!r}" + (f", which {kind!r} events need" if kind else ""))


class CostModel:
    """Unit costs of event kinds on a profile, worked out when first asked for and kept.

    Use :meth:`of`, which keeps one model with each profile.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._units: dict[str, float] = {}
        self._vectors: dict[str, list[float]] = {}
        self._factors: dict[str, list[float]] = {}

    @classmethod
    def of(cls, profile: Profile) -> CostModel:
        """The profile's model."""
        if "model" not in profile.memo:
            profile.memo["model"] = cls(profile)
        model: CostModel = profile.memo["model"]
        return model

    def figures(self, kind: str) -> list[tuple[float, Figure]]:
        """The factors and figures that price one event of ``kind``, without classes of the mix and the clock.

        :raises NoFigure: the profile lacks one.
        """
        found = []
        for factor, key in RULES[kind].terms:
            figure = self.profile.figure(key)
            if figure is None:
                raise NoFigure(kind, key)
            found.append((factor, figure))
        return found

    def all_figures(self, kind: str) -> list[Figure]:
        """Every figure that has a part in the price of one event of ``kind``."""
        needed = [figure for _, figure in self.figures(kind)]
        families = {figure.key.split(".")[0] for figure in needed}
        keys = [f"class.{name}" for name in path_table().mix] if "path" in families else []
        keys += ["mhz"] if "shared" in families else []
        return needed + [figure for key in keys if (figure := self.profile.figure(key)) is not None]

    def unit(self, kind: str) -> float:
        """Nominal cycles of one event of ``kind``."""
        if kind not in self._units:
            self._units[kind] = sum(
                factor * figure.value * self._nominal_factor(figure.key) for factor, figure in self.figures(kind)
            )
        return self._units[kind]

    def vector(self, kind: str) -> list[float]:
        """Cycles of one event of ``kind`` under each sample of the costs."""
        if kind not in self._vectors:
            total = [0.0] * SAMPLES
            for factor, figure in self.figures(kind):
                values = self._samples(figure)
                if scale := self._sampled_factor(figure.key):
                    values = list(map(mul, values, scale))
                if factor != 1:
                    values = [factor * value for value in values]
                total = list(map(add, total, values))
            self._vectors[kind] = total
        return self._vectors[kind]

    def cost_figure(self, key: str) -> Figure:
        """The figure of one cost key. :raises NoFigure: the profile has none."""
        return self._need(key)

    def cost(self, key: str) -> float:
        """Nominal cycles of one cost key (a path's length times what an instruction of VMM code costs)."""
        figure = self._need(key)
        return figure.value * self._nominal_factor(figure.key)

    def cost_vector(self, key: str) -> list[float]:
        """The same under each sample of the costs."""
        values, scale = self._samples(self._need(key)), self._sampled_factor(self._need(key).key)
        return list(map(mul, values, scale)) if scale else values

    def instruction(self) -> float:
        """Nominal cycles of one instruction of VMM code: the path table's mix of class costs."""
        return sum(share * self._need(f"class.{name}").value for name, share in path_table().mix.items())

    def _nominal_factor(self, key: str) -> float:
        if key.startswith("path."):
            return self.instruction()
        return self._need("mhz").value / 1000 if key.startswith("shared.") else 1.0

    def _sampled_factor(self, key: str) -> list[float] | None:
        family = key.split(".")[0]
        if family not in ("path", "shared"):
            return None
        if family not in self._factors:
            if family == "shared":
                self._factors[family] = [mhz / 1000 for mhz in self._samples(self._need("mhz"))]
            else:
                mixed = [0.0] * SAMPLES
                for name, share in path_table().mix.items():
                    values = self._samples(self._need(f"class.{name}"))
                    mixed = [m + share * v for m, v in zip(mixed, values, strict=True)]
                self._factors[family] = mixed
        return self._factors[family]

    def _need(self, key: str) -> Figure:
        figure = self.profile.figure(key)
        if figure is None:
            raise NoFigure(None, key)
        return figure

    def _samples(self, figure: Figure) -> list[float]:
        common = figure.key.startswith(("path.", "shared."))
        return samples(figure, "" if common else self.profile.name)
