"""report.html: one file that needs nothing else. Everything from a run is escaped where it is put in.

Without scripts the page shows the run's figures as images and tables; with them it follows its reader (:mod:`vmlab.report.live`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from vmlab import costs
from vmlab.ledger import CLASSES, EVENTS, EXIT_REASONS, SYSTEM_INSTRUCTIONS
from vmlab.report import ablation, findings, glossary, live, nanobench, sections
from vmlab.report.document import document
from vmlab.report.exits_chart import COLOURS as REASON_COLOURS
from vmlab.report.exits_chart import exits_title, per_operation
from vmlab.report.style import CAUSES, LOOKS
from vmlab.report.view import Generation, View

SCRIPTS = ("pricing.js", "claims.js", "charts.js", "figures.js", "page.js")


#: How to read the charts that the page's script draws; of the others the page shows the image.
CAPTIONS = {
    "slowdown": "Time relative to the bare machine on the chosen CPU generation; left of the line is faster than native. Dots are nominal costs, "
                "whiskers the 5th and 95th percentile of 1000 sampled costs. Each workload at its densest.",
    "causes": "Nominal costs. Stacks are linear and can be compared within a panel; bars that differ by more than a factor of eight have panels of "
              "their own, because the shorter could not be read.",
    "density": "Density: executions of the named instruction per 1000 other instructions of the guest. Below the line the technique is faster than "
               "the bare machine. Whiskers are the 5th and 95th percentile of sampled costs.",
    "generations": "Oldest CPU generation at the top, each workload at its densest. Lines join successive generations of one maker; the others, in "
                   "italics, stand apart. Left of the line is faster than native.",
    "exits": "VM exits, traps, hypercalls and callouts of the chosen workload, counted exactly: no price has a part in the bars. What one takes on "
             "the chosen CPU generation (hardware and the monitor's entry code, without the work of emulating) is in the table.",
    "ablation": "Time relative to the same translator with everything on, nominal costs of the chosen CPU generation. Below, where the run recorded "
                "it: units translated so far, and exits chained, by the guest's instructions from its first on.",
    "nanobenchmarks": "Cycles of one operation: the loop less the same loop around nothing, by iterations. Filled: ours on the paper's CPU, whiskers "
                      "the 5th and 95th percentile of sampled costs; hollow: published; upright line: ours on the chosen CPU generation. On the "
                      "right ours over the published figure; a star marks figures that set one of the costs: they agree with themselves.",
}


@dataclass(frozen=True)
class Drawn:
    """A chart as the page takes it: its name, its finding, its SVG (which says how to read it)."""

    name: str
    title: str
    svg: bytes


_BODY = Template("""<a class="skip" href="#finding">To the finding</a>
<header>
<h1>$title</h1>
<p class="question">$question</p>
</header>
<main>
<section id="finding" aria-label="What was found">
<ul class="finding">$sentences</ul>
</section>
<section id="controls" aria-label="Prices" hidden>
<div class="fields">
<label>CPU generation <select id="cpu"></select></label>
<label>Workload <select id="work"></select></label>
<button type="button" id="reset">Reset</button>
<a id="permalink" href="#">Link to this setting</a>
</div>
<details><summary>Move a cost: the dearest first, the published range in blue</summary><ul id="costs-list"></ul></details>
<p id="moved" role="status"></p>
</section>
$headline
<h2 id="claims">Verdicts</h2>
$claims
<h2>More of this run</h2>
$charts
$exits
$properties
$cells
$costs
<details class="print" open><summary>Threats to validity</summary><ul>$threats</ul></details>
$safety
<details><summary>Manifest, configuration, consoles</summary>$manifest</details>
<details id="glossary"><summary>Words</summary>$glossary</details>
</main>""")


def page(results: Mapping[str, Any], config: Mapping[str, Any], charts: Sequence[Drawn], manifest: Mapping[str, Any]) -> str:
    """The page as text. The first chart is the headline, and what it found the first sentence."""
    view = View(results)
    title = str(config.get("title") or results.get("experiment") or "vmlab")
    sentences = findings.summary(results)
    if charts and charts[0].name == "nanobenchmarks":  # the others' findings are the summary's own
        sentences[0] = f"{charts[0].title}."
    headline, *others = [_chart(chart, view) for chart in charts] or ["<p>This run has nothing to draw.</p>"]
    body = _BODY.substitute(
        title=escape(title), question=escape(str(config.get("question") or "")),
        sentences="\n".join(f"<li>{glossary.mark(sentence)}</li>" for sentence in sentences),
        headline=headline,
        charts="\n".join(f'<details class="print"><summary>{_summary(chart)}</summary>{made}</details>'
                         for chart, made in zip(charts[1:], others, strict=True)),
        claims=sections.claims(results.get("claims") or []),
        exits="" if any(chart.name == "exits" for chart in charts) else _exits(view),
        properties=sections.properties(view), cells=sections.cells(view), costs=sections.costs_used(view),
        threats=sections.threats(), safety=sections.safety(view), manifest=sections.manifest(view, manifest, config),
        glossary=sections.words(),
    )
    return document(title, body, style=live.asset("page.css"), script=live.script(*SCRIPTS), data=live.embed(data(results)))


def data(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script reads: costs, counts, claims, and how the charts are laid out."""
    view = View(results)
    operations = nanobench.tables(results) if nanobench.worth_drawing(results) else []
    kinds = sorted({*live.kinds_of(results), *(kind for table in operations for f in table.figures if f.quantity for kind in f.quantity.events)})
    number = {kind: i for i, kind in enumerate(kinds)}
    names = [generation.name for generation in view.known]
    claims = live.judged(results, names)
    more_kinds, more_keys, more_profiles = live.needed_by(claims)
    more_profiles |= {table.profile for table in operations}
    model = live.model({*kinds, *more_kinds}, [*names, *sorted(more_profiles - set(names))], more_keys)
    keys = sorted({*model["shared"], *(key for profile in model["profiles"].values() for key in profile["figures"])})
    return model | {
        "kinds": kinds, "order": names, "cells": live.cells(results, number), "claims": claims,
        "operations": [_operations(table, number) for table in operations], "ablation": _ablation(view),
        "words": {kind: EVENTS[kind].words for kind in kinds}, "costWords": {key: cost_words(key) for key in keys},
        "looks": {name: {"colour": look.colour, "marker": look.marker, "short": look.short} for name, look in LOOKS.items()},
        "colours": dict(CAUSES), "reasonColours": REASON_COLOURS, "workloads": _workloads(view),
        "generations": [{"name": g.name, "short": findings.short(g), "words": f"{g.words} ({g.year})" if g.year else g.words,
                         "joined": g in view.intel} for g in view.known],
    }


def _workloads(view: View) -> list[dict[str, Any]]:
    """The workloads, the headline first, each with its variants and their cells as numbers in the run's list."""
    number = {id(cell): i for i, cell in enumerate(view.all)}
    made = []
    for workload in view.workloads:
        siblings = view.rows([workload])
        variants = []
        for variant in view.variants(workload):
            same = [v for v in siblings if v[0] == variant[0]]
            variants.append({"technique": variant[0], "label": findings.name(variant), "hollow": same.index(variant) if variant in same else 0,
                             "cells": [number[id(cell)] for cell in view.column(workload, variant)]})
        made.append({"name": workload, "label": view.what(workload), "densities": view.densities(workload), "variants": variants})
    return made


def _ablation(view: View) -> dict[str, Any]:
    """By workload the cell of the translator with everything on, those without a mechanism each, and the warm-up of the first."""
    number = {id(cell): i for i, cell in enumerate(view.all)}
    works = []
    for workload in ablation.shown(view):
        whole, parts = ablation.pieces(view, workload)
        if whole is not None:
            works.append({"name": workload, "whole": number[id(whole)], "parts": [[words, number[id(cell)]] for words, cell in parts.items()],
                          "warmUp": [[row["instructions"], row["translated"], row["chained"]] for row in whole.get("warm_up") or []]})
    return {"technique": ablation.TECHNIQUE, "everything": ablation.EVERYTHING_OFF, "works": works}


def _operations(table: nanobench.Table, number: Mapping[str, int]) -> dict[str, Any]:
    """A paper's table: its systems with the techniques that stand for them, its rows with the events of one operation each."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in table.figures:
        events = None if figure.quantity is None else [part for kind, n in figure.quantity.events.items() for part in (number[kind], n)]
        rows.setdefault(figure.row, {"words": figure.words, "note": figure.note, "figures": []})["figures"].append(
            {"system": table.systems.index(figure.system), "published": figure.published, "calibrated": figure.calibrated, "events": events,
             "platform": figure.platform})
    techniques = {figure.system: figure.technique for figure in table.figures}
    profile = costs.load(table.profile)
    return {"title": table.title, "cpu": table.cpu, "profile": table.profile, "rows": list(rows.values()),
            "short": findings.short(Generation(profile.name, profile.words, profile.vendor, profile.year)),
            "systems": [[system, techniques[system]] for system in table.systems]}


def cost_words(key: str) -> str:
    """A cost key in words, for people who move it."""
    family, _, name = key.partition(".")
    if family == "insn":
        return f"{SYSTEM_INSTRUCTIONS.get(name, 'any other system instruction')} on the CPU"
    if family == "class":
        return f"ordinary instructions: {CLASSES.get(name, name)}"
    if family == "exit":
        return f"VM exit: {name.replace('_', ' ') if name in EXIT_REASONS else 'any other reason'}"
    if family == "path":
        return f"the monitor's handler: {name.replace('.', ' ').replace('_', ' ')}"
    if name == "delivery":
        return f"delivery of {'an' if family in ('exception', 'interrupt', 'int') else 'a'} {family if family != 'int' else 'INT n'}"
    return {"entry": "VM entry", "vmread": "reading a VMCB field", "vmwrite": "writing a VMCB field", "mhz": "the CPU's clock",
            "shared.port_latency_ns": "a port's answer"}.get(key, key)


def _summary(chart: Drawn) -> str:
    return escape({"causes": "Cycles by cause", "density": "Slowdown against density", "generations": "Slowdown over CPU generations",
                   "slowdown": "Slowdown by technique", "exits": "Exits by reason", "ablation": "What each mechanism buys",
                   "nanobenchmarks": "Operations beside published figures",
                   }.get(chart.name, chart.name.replace("_", " ").capitalize()))


def _chart(chart: Drawn, view: View) -> str:
    source = base64.b64encode(chart.svg).decode("ascii")
    image = f'<img alt="{escape(f"{chart.name}: {chart.title}", quote=True)}" src="data:image/svg+xml;base64,{source}">'
    if chart.name not in CAPTIONS:
        return f'<figure id="chart-{escape(chart.name, quote=True)}">{image}</figure>'
    return _live(chart.name, chart.title, image + (sections.exits(view) if chart.name == "exits" else ""))


def _live(name: str, title: str, without: str) -> str:
    """A chart that the page's script draws; ``without`` stands in its place where there are no scripts."""
    head = (f'<figcaption><span class="title">{escape(title)}</span> '
            f'<span class="caption">{glossary.mark(CAPTIONS[name])}</span></figcaption>')
    return (f'<figure id="chart-{name}" data-chart="{name}">{head}<noscript>{without}</noscript><div class="live"></div>'
            '<details><summary>The same as a table</summary><div class="table wide-table"></div></details></figure>')


def _exits(view: View) -> str:
    """Exits by reason in a fold of their own, where the run has no chart of them among its own."""
    if not view.generations:
        return ""
    title = exits_title(view) if per_operation(view) else "No technique leaves the guest"
    return f'<details class="print"><summary>Exits by reason</summary>{_live("exits", title, sections.exits(view))}</details>'
