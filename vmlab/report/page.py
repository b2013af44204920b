"""report.html: one file that needs nothing else. Everything from a run is escaped where it is put in."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from vmlab.report import findings
from vmlab.report.findings import short
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

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.question { color: #5a5a5a; margin-top: .2rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; vertical-align: top; border-bottom: 1px solid #d0d0d0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; }
img { width: 100%; max-width: 46rem; height: auto; border: 1px solid #d0d0d0; }
.verdict { font-weight: 600; white-space: nowrap; }
.holds { color: #0b6b3a; }
.fails { color: #a5260a; }
.undecided { color: #6b5200; }
small { color: #5a5a5a; }
.verdict small { display: block; font-weight: 400; }
pre { overflow-x: auto; font-size: .8rem; background: #f5f5f5; padding: 1rem; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="question">$question</p>
<h2>What was found</h2>
$sentences
<h2>Claims</h2>
$claims
<h2>Charts</h2>
$charts
<h2>Cells</h2>
<details><summary>$count cells, with slowdown by CPU generation</summary><div class="wide">$cells</div></details>
<h2>Threats to validity</h2>
<ul>$threats</ul>
<h2>How this was made</h2>
<details><summary>Manifest and configuration</summary><pre>$manifest</pre><pre>$config</pre></details>
</body>
</html>
""")


def page(
    results: Mapping[str, Any], config: Mapping[str, Any], charts: Sequence[tuple[str, str, bytes]],
    manifest: Mapping[str, Any],
) -> str:
    """The page as text.

    :param charts: name, title and SVG of each chart.
    """
    view = View(results)
    title = str(config.get("title") or results.get("experiment") or "vmlab")
    return _PAGE.substitute(
        title=escape(title), question=escape(str(config.get("question") or "")),
        sentences="\n".join(f"<p>{escape(sentence)}</p>" for sentence in findings.summary(results)),
        claims=_claims(results.get("claims") or []),
        charts="\n".join(_chart(*chart) for chart in charts) or "<p>This run has nothing to draw.</p>",
        count=len(view.all), cells=_cells(view),
        threats="".join(f"<li>{escape(threat)}</li>" for threat in THREATS),
        manifest=escape(json.dumps(manifest, indent=1, sort_keys=True)), config=escape(json.dumps(config, indent=1, default=str)),
    )


def _chart(name: str, title: str, svg: bytes) -> str:
    # As an image, a drawing can neither run scripts nor be styled by the page, whatever text is in it.
    data = base64.b64encode(svg).decode("ascii")
    return f'<figure><img alt="{escape(f"{name}: {title}", quote=True)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return "<p>This run judged no claim.</p>"
    rows = []
    for claim in claims:
        verdict = str(claim.get("verdict"))
        shade = verdict if verdict in ("holds", "fails", "undecided") else "undecided"
        per = "; ".join(f"{profile}: {said}" for profile, said in (claim.get("by_profile") or {}).items())
        calibrated = " <small>calibrated</small>" if claim.get("calibrated") else ""
        rows.append(
            f'<tr><td class="verdict {shade}">{escape(verdict)}{calibrated}</td>'
            f"<td>{escape(str(claim.get('statement')))} <small>{escape(str(claim.get('id')))}, {escape(str(claim.get('kind')))}. "
            f"{escape(str(claim.get('source')))}</small></td>"
            f"<td>{escape(str(claim.get('reason') or ''))} <small>{escape(per)}</small></td></tr>"
        )
    head = "<thead><tr><th>Verdict</th><th>Claim</th><th>Because</th></tr></thead>"
    note = ("A verdict is an answer, not a failure. “Calibrated”: a figure of the claim's own source set a cost, so the "
            "verdict is a consistency check and no prediction.")
    body = "\n".join(rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n<p><small>{note}</small></p>'


def _cells(view: View) -> str:
    head = "".join(f"<th>{escape(short(generation))}</th>" for generation in view.generations)
    rows = []
    for cell in view.all:
        fields = []
        for generation in view.generations:
            fields.append(f'<td class="number">{_slowdown(cell, generation.name)}</td>')
        match = (cell.get("fidelity") or {}).get("matches_native")
        same = "" if match is None else "as native" if match else "differs from native"
        status = str(cell.get("status")) + (f": {cell['error']}" if cell.get("error") else "")
        rows.append(f"<tr><td>{escape(str(cell.get('id')))}</td><td>{escape(status)}</td><td>{same}</td>{''.join(fields)}</tr>")
    return (f"<table><thead><tr><th>Cell</th><th>Status</th><th>Outcome</th>{head}</tr></thead><tbody>" + "\n".join(rows)
            + "</tbody></table>")


def _slowdown(cell: Cell, profile: str) -> str:
    """The cell's slowdown with its range; its cycles where there is no native run to compare with."""
    found, price = ratio(cell, profile), cycles(cell, profile)
    if not found:
        return f"{float(price['total']):,.0f} cycles" if price else "–"
    ranged = f" <small>{times(found.low)}–{times(found.high)}</small>" if found.low != found.high else ""
    return times(found.value) + ranged
