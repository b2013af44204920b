"""The parts of report.html that do not move: verdicts, the three properties, cells, costs used, threats, words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from vmlab import costs
from vmlab.report import glossary
from vmlab.report.exits import exit_rows
from vmlab.report.findings import name, short
from vmlab.report.glossary import link, mark
from vmlab.report.view import Cell, View, cycles, ratio, times

#: What a reader must know before believing a number; printed in every report.
THREATS = (
    "The guest's clock stops while the monitor runs: the guest does not see the time that the monitor takes, and "
    "interrupts arrive by guest instructions, not by wall-clock time.",
    "The TLB model is the lab's own: counts of misses and flushes are those of a model, not of a CPU.",
    "There is one CPU: nothing is said about locks, shoot-downs and interrupts between CPUs.",
    "There is no cache model: an exit's after-effects on caches and predictors are not in these numbers.",
    "The monitor's handlers are priced by an assumed table of path lengths, the same for all generations; costs marked "
    "assumed are uncertain by a factor of two or more each way. The ranges carry this.",
    "Cycles are counts times published costs. No virtual machine was timed.",
)
_SIGNS = {"holds": "✓", "fails": "✗", "undecided": "?"}


def claims(rows: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts, each with what it says, why, and per CPU generation. The page's script judges them again."""
    if not rows:
        return "<p>This run judged no claim.</p>"
    made = []
    for number, claim in enumerate(rows):
        verdict = str(claim.get("verdict"))
        shade = verdict if verdict in _SIGNS else "undecided"
        per = "; ".join(f"{profile}: {said}" for profile, said in (claim.get("by_profile") or {}).items())
        calibrated = f" <small>{link('calibrated')}</small>" if claim.get("calibrated") else ""
        kind = str(claim.get("kind"))
        made.append(
            f'<tr data-claim="{number}"><td class="verdict {shade}"><span class="said">{_SIGNS[shade]} {escape(verdict)}</span>'
            f'<small class="was"></small>{calibrated}</td>'
            f'<td class="claim">{mark(str(claim.get("statement")))} <small>{escape(str(claim.get("id")))}, {link(kind)}. '
            f'{escape(str(claim.get("source")))}</small></td>'
            f'<td><span class="reason">{escape(str(claim.get("reason") or ""))}</span> <small class="by">{escape(per)}</small>'
            f'{_deciders(claim)}</td></tr>'
        )
    head = '<thead><tr><th scope="col">Verdict</th><th scope="col">Claim</th><th scope="col">Because</th></tr></thead>'
    note = mark("A verdict is an answer, not a failure. Calibrated: a figure of the claim's own source set a cost, so the verdict is a "
                "check of consistency and no prediction.")
    return f'<div class="wide-table"><table class="claims">{head}<tbody>{"".join(made)}</tbody></table></div><p><small>{note}</small></p>'


def _deciders(claim: Mapping[str, Any]) -> str:
    """The one cost that decides a verdict, and a link that moves it to where the verdict flips."""
    parts = []
    for profile, found in (claim.get("decided_by") or {}).items():
        if not found:
            continue
        at, key = float(found["flips_at"]), str(found["cost"])
        beyond = at * (1.02 if at > float(found["value"]) else 0.98)
        move = key if key.startswith(("path.", "shared.")) else f"{profile}/{key}"
        link_to = f"#cpu={quote(str(profile))}&{quote(move, safe='')}={beyond:.4g}"
        reach = "within" if found.get("within_range") else "beyond"
        parts.append(f'<small>What decides on {escape(str(profile))}: {escape(key)}, {float(found["value"]):.4g}; the verdict flips at {at:.4g}, '
                     f'{reach} its range. <a class="flip" href="{escape(link_to, quote=True)}">Flip it</a></small>')
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 99) -> str:
    """A table of fields that are HTML already; the first of a row is its head."""
    top = "".join(f'<th scope="col">{field}</th>' for field in head)
    body = "".join(
        "<tr>" + "".join(f'<th scope="row">{field}</th>' if i == 0 else f'<td{" class=number" if i >= numbers_from else ""}>{field}</td>'
                         for i, field in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide-table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def exits(view: View) -> str:
    """Why the guest was left and how often, at the headline workload: for readers without scripts."""
    rows = [[escape(row.technique), escape(row.words), f"{row.count:,}", f"{100 * row.share:.1f} %"]
            for row in exit_rows(view, view.headline, view.generations[0].name)]
    return _table(["technique", "reason", "times", "of its exits"], rows, 2) if rows else "<p>No technique left the guest.</p>"


def properties(view: View) -> str:
    """Fidelity, safety and efficiency of every cell, which Popek and Goldberg ask for."""
    rows = []
    for cell in view.cells:
        if cell["technique"] == "native":
            continue
        fidelity, shares, refused = cell.get("fidelity") or {}, cell.get("efficiency") or {}, (cell.get("safety") or {}).get("refused") or []
        match = fidelity.get("matches_native")
        same = "not compared" if match is None else "as native" if match else f"differs{_first(fidelity)}"
        guest = (cell.get("instructions") or {}).get("guest") or {}
        total = int(guest.get("user") or 0) + int(guest.get("kernel") or 0)
        fields = [f"{100 * float(shares.get(key) or 0):.3f} %" for key in ("retired", "translated", "emulated")]
        rows.append([escape(f"{name(view.variant(cell))}: {_work(view, cell)}"), escape(same), str(len(refused)), *fields, f"{total:,}"])
    if not rows:
        return ""
    head = ["cell", link("fidelity"), f"{link('safety')}: refused", "at its own address", link("translation cache", "in the translation cache"),
            "emulated", link("guest instruction", "guest instructions")]
    note = mark("Efficiency is shown as shares of the guest's instructions by how they were executed.")
    return f'<details><summary>Fidelity, safety, efficiency</summary><p>{note}</p>{_table(head, rows, 2)}{_translated(view)}</details>'


def _work(view: View, cell: Cell) -> str:
    density = cell["parameters"].get("density")
    return f"{cell['parameters'].get('workload')}" + (f", density {density}" if density is not None else "")


def _first(fidelity: Mapping[str, Any]) -> str:
    """Where a run first parts from native, in a few words."""
    found = fidelity.get("first_difference") or {}
    suspect = found.get("suspect") or found
    if suspect.get("instruction"):
        return f", first by {suspect['instruction']} in {suspect.get('symbol') or hex(int(suspect.get('address') or 0))}"
    if found.get("in"):
        return f", first in {found['in']}"
    return ""


def _translated(view: View) -> str:
    """What the translator did, in cells that translated."""
    rows = []
    for cell in view.cells:
        events = cell.get("events") or {}
        phases = [(phase.get("events") or {}) for phase in (cell.get("phases") or {}).values()] or [events]
        whole = {kind: sum(int(phase.get(kind, 0)) for phase in phases) for kind in
                 ("bt.translate.unit", "bt.translate.instruction", "bt.translate.bytes_in", "bt.translate.bytes_out", "bt.chain", "bt.invalidate")}
        if not whole["bt.translate.instruction"]:
            continue
        ran = int(events.get("translated.ident", 0)) + int(events.get("translated.incache", 0))
        ident = f"{100 * int(events.get('translated.ident', 0)) / ran:.1f} %" if ran else "–"
        callouts = sum(int(count) for kind, count in events.items() if kind.startswith("bt.callout."))
        growth = f"{whole['bt.translate.bytes_out'] / whole['bt.translate.bytes_in']:.2f}" if whole["bt.translate.bytes_in"] else "–"
        rows.append([escape(f"{name(view.variant(cell))}: {_work(view, cell)}"), f"{whole['bt.translate.unit']:,}",
                     f"{whole['bt.translate.instruction']:,}", growth, ident, f"{whole['bt.chain']:,}", f"{callouts:,}"])
    if not rows:
        return ""
    head = ["cell", "units translated", "instructions translated", "bytes out per byte in", f"{link('ident', 'identical copies')}, of what ran",
            link("chain", "jumps chained"), f"{link('callouts')} in the region"]
    return f"<h3>Translated code</h3>{_table(head, rows, 1)}"


def cells(view: View) -> str:
    """Every cell: status, outcome, slowdown on each CPU generation at the published costs."""
    head = ["cell", "status", "outcome", *(escape(short(generation)) for generation in view.generations)]
    rows = []
    for cell in view.all:
        match = (cell.get("fidelity") or {}).get("matches_native")
        same = "" if match is None else "as native" if match else "differs from native"
        status = str(cell.get("status")) + (f": {cell['error']}" if cell.get("error") else "")
        rows.append([escape(str(cell.get("id"))), escape(status), same, *(_slowdown(cell, g.name) for g in view.generations)])
    return (f"<details><summary>{len(view.all)} cells, with slowdown by CPU generation at the published costs</summary>"
            f"{_table(head, rows, 3)}</details>")


def _slowdown(cell: Cell, profile: str) -> str:
    """The cell's slowdown with its range; its cycles where there is no native run to compare with."""
    found, price = ratio(cell, profile), cycles(cell, profile)
    if not found:
        return f"{float(price['total']):,.0f} cycles" if price else "–"
    ranged = f" <small>{times(found.low)}–{times(found.high)}</small>" if found.low != found.high else ""
    return times(found.value) + ranged


def costs_used(view: View) -> str:
    """Every figure that has a part in this run's prices, with its source, and the sources as a list."""
    parts, sources = [], set()
    for generation in view.known:
        profile = costs.load(generation.name)
        used = {key: figure for cell in view.cells for key, figure in costs.costs_used(cell.get("events") or {}, profile).items()}
        sources |= {source for figure in used.values() for source in figure.sources}
        rows = [[escape(key), f"{figure.value:g}", f"{figure.low:g}–{figure.high:g}", link(figure.provenance),
                 escape(", ".join(part for part in (", ".join(figure.sources), figure.where) if part) or figure.note)]
                for key, figure in sorted(used.items()) if not key.startswith(("path.", "shared.")) or generation is view.known[0]]
        parts.append(f"<details><summary>{escape(generation.words)}: {len(rows)} figures</summary>"
                     f"{_table(['cost', 'value', 'range', 'provenance', 'where from'], rows)}</details>")
    if not parts:
        return ""
    book = costs.bibliography()
    cited = "".join(f"<li>{escape(key)}: {escape(book[key].words())}</li>" for key in sorted(sources))
    return ("<details><summary>Costs used, and where they come from</summary><p>"
            + mark("Values and ranges in cycles; path lengths in instructions, the same for all generations and listed with the first.")
            + f"</p>{''.join(parts)}<h3>Sources</h3><ul>{cited}</ul></details>")


def threats() -> str:
    """What to doubt."""
    return "".join(f"<li>{mark(threat)}</li>" for threat in THREATS)


def safety(view: View) -> str:
    """What guests tried and were refused, in words; nothing where there was nothing."""
    said = [f"{cell.get('id')}: {what}" for cell in view.all for what in (cell.get("safety") or {}).get("refused") or []]
    if not said:
        return ""
    return f"<details><summary>{len(said)} attempts refused</summary><ul>{''.join(f'<li>{escape(text)}</li>' for text in said)}</ul></details>"


def manifest(view: View, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How the run was made, and what its guests printed (each text once)."""
    said: dict[str, list[str]] = {}
    for cell in view.all:
        said.setdefault(str(cell.get("console") or ""), []).append(str(cell.get("id")))
    consoles = "".join(f"<h3>{escape(ids[0])}{f' and {len(ids) - 1} more' if len(ids) > 1 else ''}</h3><pre>{escape(text[:4000])}</pre>"
                       for text, ids in said.items() if text)
    short_manifest = {key: value for key, value in manifest.items() if key != "files"}
    return (f"<pre>{escape(json.dumps(short_manifest, indent=1, sort_keys=True))}</pre>"
            f"<pre>{escape(json.dumps(config, indent=1, default=str))}</pre>{consoles}")


def words() -> str:
    """The glossary, which the words in the page link to."""
    made = []
    for entry in sorted(glossary.entries().values(), key=lambda e: e.term):
        source = f" <small>{escape(entry.source)}</small>" if entry.source else ""
        made.append(f'<div id="{entry.anchor}"><dt>{escape(entry.term)}</dt><dd>{escape(entry.text)}{source}</dd></div>')
    return f"<dl>{''.join(made)}</dl>"
