"""The stepper: a page that shows recorded lanes in step. Drawn from the recording alone; prices are the page's (:mod:`vmlab.report.live`)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

from vmlab import costs
from vmlab.report import glossary, live
from vmlab.report.document import document
from vmlab.report.glossary import link, mark
from vmlab.report.style import LOOKS, look

SCRIPTS = ("pricing.js", "step.js")

_BODY = Template("""<header>
<h1>$title</h1>
<p>$look</p>
</header>
<main>
<section id="bar" aria-label="Steps" hidden>
<div class="buttons">
<button type="button" id="first" aria-label="First step">|◀</button>
<button type="button" id="back" aria-label="Step back">◀</button>
<button type="button" id="forward" aria-label="Step forward">▶</button>
<button type="button" id="end" aria-label="Last step">▶|</button>
<label class="wide">Step <input type="range" id="step" min="0" max="0" value="0"></label>
<output id="where" for="step"></output>
<label>Cycles of <select id="cpu"></select></label>
<a id="permalink" href="#">Link</a>
</div>
<p id="said" role="status"></p>
</section>
<div id="stage" hidden>
<nav aria-label="The guest's instructions, as the bare machine runs them"><h2>$guest_code</h2><ol id="code"></ol></nav>
<div id="lanes" role="list" aria-label="Techniques"></div>
</div>
<p class="hint" id="hint" hidden>Arrow keys: left and right step, up and down choose a lane. What a lane shows is what its run really did, recorded
from the machine; cycles are counts times published costs.</p>
<details id="all"><summary>All steps as a table</summary><div class="wide-table">$table</div></details>
<details id="glossary"><summary>Words</summary>$glossary</details>
</main>""")

#: The lab's words that a stepper uses.
_WORDS = ("ring", "interrupt flag", "virtual interrupt flag", "trap", "vm exit", "vm entry", "hypercall", "callout", "translation cache",
          "in-cache emulation", "chaining", "event channel", "interrupt window", "cycles", *LOOKS)


def page(recorded: Mapping[str, Any]) -> str:
    """The page of a scenario, from :func:`vmlab.trace.stepper.layout`'s data."""
    kinds = sorted({kind for lane in recorded["lanes"] for group in lane["groups"] for kind in group["events"]})
    number = {kind: i for i, kind in enumerate(kinds)}
    data = live.model(kinds, costs.names()) | {
        "lanes": [_compact(lane, number) | {"name": lane_name(lane), "colour": look(lane["technique"]).colour} for lane in recorded["lanes"]],
        "groups": recorded["groups"], "codes": recorded["codes"], "kinds": kinds, "order": costs.names(), "cpu": _first_cpu(recorded),
    }
    body = _BODY.substitute(title=escape(recorded["title"]), look=mark(recorded["look"]), guest_code=link("guest", "The guest's code"),
                            table=_table(recorded), glossary=_glossary())
    return document(recorded["title"], body, style=live.asset("step.css"), script=live.script(*SCRIPTS), data=live.embed(data))


def _compact(lane: Mapping[str, Any], number: Mapping[str, int]) -> dict[str, Any]:
    """A lane as the page's script reads it: events as [number of kind, count, ...], of a line only what is shown."""
    groups = []
    for group in lane["groups"]:
        lines = [{key: line[key] for key in ("where", "code", "kind", "did", "skipped", "path") if key in line} for line in group["lines"]]
        groups.append({"lines": lines, "before": group["before"], "after": group["after"],
                       "events": [part for kind, count in group["events"].items() for part in (number[kind], count)]})
    return {"technique": lane["technique"], "label": lane["label"], "reason": lane["reason"], "groups": groups, "platform": lane.get("platform")}


def _first_cpu(recorded: Mapping[str, Any]) -> str:
    """The CPU that the page opens with: the oldest one with hardware assistance that could have run most of the lanes."""
    platforms = [lane["platform"] for lane in recorded["lanes"] if not lane["reason"]]
    profiles = sorted((costs.load(name) for name in costs.names()), key=lambda p: (p.year, p.vendor != "Intel", p.name))
    able = {p.name: sum(costs.supports(p, platform) for platform in platforms) for p in profiles}
    assisted = [p.name for p in profiles if costs.supports(p, "svm")]
    return max(assisted or list(able), key=lambda name: able[name])


def lane_name(lane: Mapping[str, Any]) -> str:
    """A lane as people call it."""
    short = look(lane["technique"]).short or lane["technique"]
    return f"{short} ({lane['label']})" if lane["label"] else short


def _glossary() -> str:
    made = []
    for word in _WORDS:
        entry = glossary.find(word)
        source = f" <small>{escape(entry.source)}</small>" if entry.source else ""
        made.append(f'<div id="{entry.anchor}"><dt>{escape(entry.term)}</dt><dd>{escape(entry.text)}{source}</dd></div>')
    return f"<dl>{''.join(dict.fromkeys(made))}</dl>"


#: Of more steps than this a printed table may break within a row, or it would be half empty.
_LONG = 60


def _table(recorded: Mapping[str, Any]) -> str:
    """Every step and lane: for print, for screen readers, and without scripts."""
    lanes = recorded["lanes"]
    head = "".join(f'<th scope="col">{escape(lane_name(lane))}</th>' for lane in lanes)
    rows = []
    for number, group in enumerate(recorded["groups"]):
        fields = "".join(f"<td>{_cell(lane, number)}</td>" for lane in lanes)
        where = f" <small>{escape(group['symbol'])}</small>" if group["count"] > 1 and group["symbol"] else ""
        rows.append(f'<tr><th scope="row">{number + 1}. <code>{escape(group["code"])}</code>{where}</th>{fields}</tr>')
    long = ' class="long"' if len(rows) > _LONG else ""
    return f'<table{long}><thead><tr><th scope="col">guest instruction</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def quiet(line: Mapping[str, Any]) -> str:
    """A stretch in which nothing happened that is worth a stop, in words."""
    return f"{line['skipped']:,} instructions, {'; '.join(line['did']) or 'no event'}"


def _cell(lane: Mapping[str, Any], number: int) -> str:
    if lane["reason"]:
        return escape(lane["reason"]) if number == 0 else ""
    group = lane["groups"][number]
    if not group["lines"]:
        return "–"
    said = []
    for line in group["lines"]:
        if "skipped" in line:
            said.append(escape(quiet(line)))
            continue
        happened = f" <em>{escape(line['kind'])}: {escape('; '.join(line['did']))}</em>" if "kind" in line else ""
        said.append(f"<code>{escape(line['code'])}</code>{happened}")
    cpl, real, virtual, waits, _ = group["after"]
    state = f"CPL {cpl}, IF {real}, virtual IF {virtual}" + (f", waiting for {waits}" if waits else "")
    return "<br>".join(said) + f"<br><small>{escape(state)}</small>"
