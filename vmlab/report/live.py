"""What the page's script prices with: the costs of the profiles, the counts of the cells, the claims as data.

Python prices a run once; a reader who moves a cost wants the whole page to follow, and a price is a dot product. So the
page carries the factors, and :file:`assets/pricing.js` multiplies. Nothing here is computed that :mod:`vmlab.costs` computes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vmlab import claims, costs
from vmlab.claims.evidence import Finding
from vmlab.claims.model import Claim
from vmlab.costs.figures import Figure
from vmlab.costs.sampling import _quantiles
from vmlab.ledger import EVENTS

ASSETS = Path(__file__).with_name("assets")
#: Families whose figures are the same for all profiles, and are sampled once for all.
_SHARED = ("path.", "shared.")


def model(kinds: Iterable[str], profiles: Sequence[str], more: Iterable[str] = ()) -> dict[str, Any]:
    """The price rules of ``kinds`` and the figures that they need on each profile.

    :param more: further cost keys that must be there (claims name some).
    :raises ConfigError: no such profile.
    """
    priced = [kind for kind in sorted(set(kinds)) if kind in costs.RULES]
    rules = {kind: [costs.RULES[kind].cause, [[factor, key] for factor, key in costs.RULES[kind].terms]] for kind in priced}
    keys = {key for kind in priced for _, key in costs.RULES[kind].terms} | {*more, "mhz"}
    mix = costs.path_table().mix
    keys |= {f"class.{name}" for name in mix}
    shared: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name in profiles:
        profile = costs.load(name)
        figures: dict[str, Any] = {}
        for key in sorted(keys):
            figure = profile.figure(key)
            if figure is not None:
                table = shared if figure.key.startswith(_SHARED) else figures
                table[figure.key] = _row(figure, "" if table is shared else name)
        rows[name] = {"words": profile.words, "vendor": profile.vendor, "year": profile.year, "provides": sorted(profile.provides),
                      "figures": figures}
    return {"causes": list(costs.CAUSES), "rules": rules, "mix": [[name, share] for name, share in mix.items()], "quantiles": list(_quantiles()),
            "platforms": {name: [list(one_of) for one_of in needs] for name, needs in costs.PLATFORMS.items()}, "shared": shared, "profiles": rows}


def _row(figure: Figure, owner: str) -> list[Any]:
    """[value, low, high, provenance, source in words, seed of its samples]."""
    source = "; ".join(dict.fromkeys(figure.sources))
    said = ", ".join(part for part in (source, figure.where) if part)
    return [figure.value, figure.low, figure.high, figure.provenance, said or figure.note, _seed(owner, figure.key)]


def _seed(owner: str, key: str) -> str:
    """The bytes that ``random.Random(f"{SEED}/{owner}/{key}")`` makes its number of: the text and its SHA-512."""
    text = f"{costs.SEED}/{owner}/{key}".encode()
    return base64.b64encode(text + hashlib.sha512(text).digest()).decode("ascii")


def cells(results: Mapping[str, Any], kinds: Mapping[str, int]) -> list[dict[str, Any]]:
    """The cells as the script needs them, in the run's order: counts as ``[number of kind, count, ...]``."""
    def flat(events: Mapping[str, int]) -> list[int]:
        return [part for kind, count in events.items() if kind in kinds for part in (kinds[kind], int(count))]

    made = []
    everything = list(results.get("cells") or [])
    native_of = _natives(everything)
    for cell in everything:
        priced = {name: [price["total"], price["low"], price["high"], price["breakdown"]]
                  for name, price in (cell.get("cycles") or {}).items() if "total" in price}
        slower = {name: [r["value"], r["low"], r["high"]] for name, r in (cell.get("slowdown") or {}).items() if "value" in r}
        made.append({
            "id": str(cell.get("id")), "technique": str(cell.get("technique")), "status": str(cell.get("status")),
            "parameters": cell.get("parameters") or {}, "platform": str(cell.get("platform") or "x86"),
            "events": flat(cell.get("events") or {}), "native": native_of(cell),
            "operations": int((cell.get("work") or {}).get("operations") or 0), "cycles": priced, "slowdown": slower,
        })
    return made


def _natives(everything: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], int | None]:
    """What gives for a cell the number of the bare machine's run of the same work: the first all of whose parameters the cell shares."""
    by_names: dict[tuple[str, ...], dict[tuple[Any, ...], int]] = {}
    for i, other in enumerate(everything):
        if other.get("technique") == "native" and other.get("status") == "ok":
            parameters = other.get("parameters") or {}
            names = tuple(sorted(parameters))
            by_names.setdefault(names, {}).setdefault(tuple(parameters[name] for name in names), i)

    def native_of(cell: Mapping[str, Any]) -> int | None:
        parameters = cell.get("parameters") or {}
        found = [numbers.get(tuple(parameters[name] for name in names))
                 for names, numbers in by_names.items() if all(name in parameters for name in names)]
        return min((i for i in found if i is not None), default=None)

    return native_of


def kinds_of(results: Mapping[str, Any]) -> list[str]:
    """Every known kind of event that the run counted, sorted."""
    return sorted({kind for cell in results.get("cells") or [] for kind in cell.get("events") or {}} & set(EVENTS))


def judged(results: Mapping[str, Any], profiles: Sequence[str]) -> list[dict[str, Any]]:
    """The run's claims with what their verdicts hang on: margins, forms in counts and costs that must not be negative.

    A claim that no price enters, or that this lab does not know, has none and keeps its verdict.
    """
    rows = [{key: claim.get(key) for key in ("id", "verdict", "by_profile", "reason", "kind")} for claim in results.get("claims") or []]
    known = [str(row["id"]) for row in rows if str(row["id"]) in claims.names()]
    found = {claim.id: (claim, finding) for claim, _, finding in claims.findings(known, results.get("cells") or [], profiles)}
    for row in rows:
        if row["id"] in found:
            claim, finding = found[row["id"]]
            row |= _margins(claim, finding)
    return rows


def _margins(claim: Claim, finding: Finding) -> dict[str, Any]:
    """``margins``: distinct sets; ``on``: profile -> number of its set; ``scope``: the profiles that decide."""
    sets: list[Any] = []
    on: dict[str, int] = {}
    for profile, margins in finding.margins.items():
        forms = [_form(quantity) for quantity in margins.of]
        made = {"enough": margins.enough, "certainty": margins.certainty, "of": forms}
        if claim.predicate == "round_trip_fell":  # its constant is another profile's round trip: let that follow too
            first = [claim.arguments["first"], dict.fromkeys(claim.arguments["costs"], 1.0)]
            for form, factor in zip(forms, (1.0, -1.0), strict=True):
                form |= {"constant": 0.0, "other": [*first, factor]}
        if made not in sets:
            sets.append(made)
        on[profile] = sets.index(made)
    scope = [name for name in claim.arguments.get("scope", finding.margins) if name]
    return {"margins": sets, "on": on, "scope": scope} if sets else {}


def _form(quantity: costs.Quantity) -> dict[str, Any]:
    return {"events": dict(quantity.events), "costs": dict(quantity.costs), "constant": quantity.constant}


def needed_by(rows: Iterable[Mapping[str, Any]]) -> tuple[set[str], set[str], set[str]]:
    """Event kinds, cost keys and profiles that the claims' margins need beside those of the run."""
    kinds: set[str] = set()
    keys: set[str] = set()
    profiles: set[str] = set()
    for row in rows:
        profiles |= set(row.get("on") or {})
        for form in (form for made in row.get("margins") or [] for form in made["of"]):
            kinds |= set(form["events"])
            keys |= set(form["costs"])
            if "other" in form:
                profiles.add(form["other"][0])
                keys |= set(form["other"][1])
    return kinds, keys, profiles


def embed(data: Any) -> str:
    """JSON that can stand in an HTML script element whatever strings are in it."""
    text = json.dumps(data, separators=(",", ":"), default=str)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def asset(name: str) -> str:
    """A file of :data:`ASSETS` as text."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def script(*names: str) -> str:
    """These files of :data:`ASSETS` as one script in a scope of its own."""
    return "(function () {\n" + "\n".join(map(asset, names)) + "\n})();\n"
