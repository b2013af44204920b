"""``vmlab claims``: the textbook's sentences, each tested by an experiment of its own, with a verdict and figures."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmlab.cli.output import Progress, print_json
from vmlab.errors import ConfigError

if TYPE_CHECKING:
    from vmlab.experiment.gather import Observer
    from vmlab.experiment.lab import Lab

EXAMPLE = """\
examples:
  vmlab claims                                     every claim; runs what has not been run yet
  vmlab claims cli-bt-beats-native exit-cost-falls these two
  vmlab claims --brief                             a line for each
  vmlab claims --cost prescott-2005:insn.cli=5     what if? No run is made again
  vmlab claims --json                              for a program

A verdict is an answer: the exit status is 0 whatever it says, and 1 where a claim could not be evaluated or a cell of its
experiment failed. What is run is kept below results/claims and used again as long as the code that counts is the same.
"""
WIDTH = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims (default: all); 'vmlab list claims' names them")
    parser.add_argument("--profile", dest="profiles", metavar="NAME", action="append",
                        help="judge on this profile (default: all); may be repeated; a claim adds those that it speaks of")
    parser.add_argument("--cost", dest="costs", metavar="PROFILE:COST=VALUE", action="append", default=[],
                        help="hold a cost at another value; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="cells to run at a time")
    parser.add_argument("--brief", action="store_true", help="one line for each claim")
    parser.add_argument("--json", action="store_true", help="print {schema_version, claims} and nothing else on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Gather the evidence, judge, print."""
    from vmlab import claims, costs
    from vmlab.claims.running import judge
    from vmlab.experiment.lab import Lab

    if arguments.jobs < 1:
        raise ConfigError(f"--jobs: a whole number from 1 is needed, not {arguments.jobs}")
    chosen = [claims.load(name) for name in arguments.ids or claims.names()]
    profiles = arguments.profiles or costs.names()
    book = costbook(arguments.costs)
    lab = Lab()
    progress = Progress(0)

    def starting(todo: int, reused: int) -> Observer:
        progress.total = todo
        if todo:
            print(f"{todo} cells to run, {reused} found", file=sys.stderr)
        return progress.finished

    try:
        judged = judge(chosen, lab, profiles, jobs=arguments.jobs, starting=starting, costbook=book, probe=lambda: probed(lab))
    finally:
        progress.close()
    verdicts = judged.verdicts
    if arguments.json:
        print_json({"schema_version": 1, "claims": verdicts})
    else:
        print("\n".join(map(brief, verdicts)) if arguments.brief else "\n\n".join(map(screen, verdicts)))
        print(f"\n{tally(verdicts)}")
    broken = [f"{claim}: {reason}" for claim, several in judged.absent.items() for reason in sorted(set(several.values()))]
    failed = [f"{cell['id']}: {cell['error']}" for cell in judged.failed]
    for line in [*(f"claim not evaluated: {text}" for text in broken), *(f"cell failed: {text}" for text in failed)]:
        print(f"vmlab: {line}", file=sys.stderr)
    return 1 if broken or failed else 0


def costbook(changes: Sequence[str]) -> dict[str, Any]:
    """``PROFILE:COST=VALUE`` texts as altered profiles.

    :raises ConfigError: not of that form, or no such profile or cost.
    """
    from vmlab import costs

    altered: dict[str, dict[str, float]] = {}
    for change in changes:
        profile, colon, rest = change.partition(":")
        key, equals, value = rest.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not colon or not equals or number <= 0:
            raise ConfigError(f"--cost {change}: write PROFILE:COST=VALUE with a positive value, as prescott-2005:insn.cli=5")
        altered.setdefault(profile, {})[key] = number
    return {name: costs.load(name).with_values(values) for name, values in altered.items()}


def probed(lab: Lab) -> dict[str, Any]:
    """The probe's result, made once for this state of the lab's code."""
    from vmlab.cli.probe import telling
    from vmlab.experiment.gather import RESULTS, kept

    def make() -> dict[str, Any]:
        from vmlab.probe import probe

        return probe()

    return telling(kept(RESULTS, "claims", f"probe-{lab.code(('probe',))}", make))


# --- words -------------------------------------------------------------------------------------------------


def brief(verdict: Mapping[str, Any]) -> str:
    """A claim in one line."""
    return f"{verdict['verdict']:<10} {verdict['id']:<28} {_kind(verdict)}"


def screen(verdict: Mapping[str, Any]) -> str:
    """A claim with its figures, for people."""
    lines = [f"{verdict['verdict'].upper():<10} {verdict['id']}  ({_kind(verdict)})", *_wrapped(verdict["statement"])]
    lines += _wrapped(f"Found: {verdict['reason']}")
    for word in ("holds", "fails", "undecided"):
        where = [name for name, answer in verdict["by_profile"].items() if answer == word]
        lines += _wrapped(f"{word} on {', '.join(where)}") if where and len(verdict["by_profile"]) > 1 else []
    lines += _wrapped(_crossings(verdict)) if _crossings(verdict) else []
    for profile, decided in verdict["decided_by"].items():
        share = f"{100 * verdict['confidence'][profile]:.3g} % of the cost samples agree"
        if decided is None:
            lines += _wrapped(f"{profile}: {share}; no single cost can flip it")
            continue
        beyond = "within its range" if decided["within_range"] else "outside its range"
        lines += _wrapped(
            f"{profile}: {share}; decided by {decided['cost']} = {decided['value']:g} ({decided['low']:g} to {decided['high']:g}, "
            f"{decided['provenance']}): flips at {decided['flips_at']:.3g}, {beyond}")
    return "\n".join(lines)


def _crossings(verdict: Mapping[str, Any]) -> str:
    """Of a claim with several price checks: the oldest profile on which each of them holds."""
    figures = verdict["figures"]
    names: dict[str, None] = {}
    for profile in verdict["by_profile"]:
        checks = figures.get(profile, {})
        names |= dict.fromkeys(checks) if isinstance(checks, dict) and "reason" not in checks else {}
    if len(names) < 3 or "so on" not in figures:
        return ""
    return "First so: " + "; ".join(f"{name}: {figures['so on'].get(name, ['nowhere'])[0]}" for name in names)


def _kind(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['kind']}{', calibrated' if verdict['calibrated'] else ''}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def tally(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """How many of each verdict."""
    counts = {word: sum(v["verdict"] == word for v in verdicts) for word in ("holds", "fails", "undecided")}
    return f"{len(verdicts)} claim{'s' if len(verdicts) != 1 else ''}: " + ", ".join(f"{n} {word}" for word, n in counts.items())
