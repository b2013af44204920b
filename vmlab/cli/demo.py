"""``vmlab demo``: what one CLI costs under each technique on each CPU generation, on one screen.

Small cells of ``cli_sti`` are really run, one per technique, in this process; their counts are priced on every
profile. A CLI cannot be repeated without the STI that undoes it, so the pair is what is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from vmlab.cli.output import print_json

#: Pairs of CLI and STI per cell: enough for a steady state, few enough for a second.
ITERATIONS = 2000
#: One cell per row: technique, its parameters, how it is called here.
ROWS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("native", {}, "native"),
    ("trap-and-emulate", {"sensitive": "silent"}, "trap-and-emulate"),
    ("binary-translation", {"emulation": "callout"}, "translation, calling out"),
    ("binary-translation", {"emulation": "in-cache"}, "translation, in the cache"),
    ("paravirtualization", {}, "paravirtualization"),
    ("hardware-assisted", {}, "hardware-assisted"),
)
#: The CPUs of the screen's columns: deep and short pipelines, before hardware assistance and after.
PROFILES = ("k8-2005", "prescott-2005", "penryn-2008", "haswell-2013")
TEXTBOOK = "Tanenbaum & Bos, Modern Operating Systems, 4th ed., p. 490 ff."
NEXT = "vmlab experiment cli_heavy"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = "example:\n  vmlab demo            one screen, a few seconds"


def run(arguments: argparse.Namespace) -> int:
    """Run the cells, price them, print. Exit status 1 if a technique failed."""
    from vmlab.experiment.cell import run_cell

    result = measure(run_cell)
    if arguments.json:
        print_json(result)
    else:
        print(screen(result))
    return 1 if any(row["error"] for row in result["techniques"]) else 0


def measure(run_cell: Callable[[str, dict[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
    """Run one cell per row and work out cycles per pair on every profile.

    :param run_cell: makes an unpriced cell of a technique and parameters.
    """
    from vmlab import costs
    from vmlab.claims.evidence import Evidence

    work = {"guest": "nano", "workload": "cli_sti", "iterations": ITERATIONS, "density": 500}
    cells = [_cell(run_cell, technique, work | extra) for technique, extra, _ in ROWS]
    # Every cell did this work, whatever a technique made of its parameters.
    cells = [cell | {"technique": row[0], "parameters": work | row[1]} for cell, row in zip(cells, ROWS, strict=True)]
    profiles = [costs.load(name) for name in PROFILES]
    evidence = Evidence(cells, tuple(profile.name for profile in profiles), {profile.name: profile for profile in profiles})
    return {
        "schema_version": 1, "unit": "cycles per CLI and STI, nominal costs", "iterations": ITERATIONS,
        "profiles": [{"name": p.name, "words": p.words, "year": p.year} for p in profiles],
        "techniques": [_row(evidence, cell, label) for cell, (_, _, label) in zip(cells, ROWS, strict=True)],
        "textbook": TEXTBOOK, "next": NEXT,
    }


def _cell(
    run_cell: Callable[[str, dict[str, Any]], Mapping[str, Any]], technique: str, parameters: dict[str, Any],
) -> dict[str, Any]:
    """The cell, or a failed one: one technique that cannot run here must not hide what the others show."""
    from vmlab.errors import VmlabError

    try:
        return dict(run_cell(technique, parameters))
    except VmlabError as error:
        return {"status": "failed", "error": str(error), "events": {}, "platform": "x86"}


def _row(evidence: Any, cell: Mapping[str, Any], label: str) -> dict[str, Any]:
    from vmlab.claims.checks import per_operation, repetitions
    from vmlab.claims.evidence import Missing, steady

    row: dict[str, Any] = {"technique": cell["technique"], "label": label, "error": None, "cycles": {}, "why": "", "per_pair": {}}
    if cell["status"] != "ok":
        return row | {"error": cell.get("error") or str(cell["status"])}
    try:
        pairs = repetitions(evidence.native_of(cell), ["cli", "sti"])
    except Missing as missing:
        return row | {"error": str(missing)}
    row["per_pair"] = {kind: n / pairs for kind, n in steady(cell).items() if n >= pairs / 10}
    row["why"] = _why(label, row["per_pair"])
    for profile in evidence.profiles:
        try:
            evidence.runnable(cell, profile)
            row["cycles"][profile] = round(evidence.value(per_operation(evidence, cell, ["cli", "sti"]), profile), 1)
        except Missing:
            row["cycles"][profile] = None  # this CPU could not have run it
    return row


def _why(label: str, per_pair: Mapping[str, float]) -> str:
    """One sentence, with the numbers that this run counted."""

    def times(*families: str) -> str:
        found = sum(n for kind, n in per_pair.items() if kind.startswith(families))
        return f"{found:.0f}" if abs(found - round(found)) < 0.05 else f"{found:.1f}"

    return {
        "native": "the CPU really switches interrupts; a deep pipeline must drain first.",
        "trap-and-emulate": f"{times('trap.')} traps a pair: exception, decode, emulate, IRET.",
        "translation, calling out": f"{times('bt.callout.')} calls of the monitor a pair: no exception, but state to save.",
        "translation, in the cache": "the pair became a few moves on the virtual CPU's interrupt flag.",
        "paravirtualization": f"the flag is a byte in shared memory; {times('hypercall.', 'trap.')} hypercalls.",
        "hardware-assisted": f"the guest has a real flag of its own; {times('exit.')} exits a pair.",
    }[label]


def screen(result: Mapping[str, Any]) -> str:
    """The result as at most 80 columns and 24 lines."""
    profiles = result["profiles"]
    names = [str(p["name"]).removesuffix(f"-{p['year']}") for p in profiles]
    wide = [max(len(name), 8) for name in names]
    lines = [
        "What a CLI costs, with the STI that undoes it: cycles per pair",
        f"One guest was just run {len(result['techniques'])} ways, {result['iterations']} pairs each; "
        f"counts priced on {len(profiles)} CPUs.",
        "",
        " " * 26 + "".join(f"{name.capitalize():>{w + 2}}" for name, w in zip(names, wide, strict=True)),
        " " * 26 + "".join(f"{p['year']:>{w + 2}}" for p, w in zip(profiles, wide, strict=True)),
    ]
    for row in result["techniques"]:
        if row["error"]:
            lines.append(f"{row['label']:<26}  did not run: {row['error']}"[:80])
        else:
            fields = (_cycles(row["cycles"][p["name"]]) for p in profiles)
            lines.append(f"{row['label']:<26}" + "".join(f"{field:>{w + 2}}" for field, w in zip(fields, wide, strict=True)))
    lines += ["", "Why:"]
    lines += [f"  {_first(row['label'])}: {row['why']}" for row in result["techniques"] if not row["error"]]
    lines += ["", "'-': that CPU could not have run it. The experiment adds ranges and charts."]
    return "\n".join([*lines, f"Read: {result['textbook']}", f"Next: {result['next']}"])


def _first(label: str) -> str:
    return {"translation, calling out": "callout", "translation, in the cache": "in-cache"}.get(label, label)


def _cycles(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"
