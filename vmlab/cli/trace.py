"""``vmlab trace``: a run event by event: guest instruction, trap or exit, what the VMM did, state before and after, cycles."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmlab.cli.output import table

if TYPE_CHECKING:
    from vmlab.trace import Trace, Trigger

EXAMPLE = """\
examples:
  vmlab trace cli_sti --technique trap-and-emulate --limit 20
  vmlab trace interrupt --technique hardware-assisted --kind exit,entry --profile penryn-2008
  vmlab trace cli_sti --technique binary-translation --from 10 --to 40 --json > steps.jsonl
  vmlab trace rdtsc --technique binary-translation --chrome trace.json      open it in https://ui.perfetto.dev

Steps are counted in guest instructions from the beginning of the region of interest.
kinds: exit, hypercall, callout, trap, interrupt, fault, entry, translation, instruction
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("workload", nargs="?", help="what the guest does")
    parser.add_argument("--technique", required=True, help="how it is virtualized")
    parser.add_argument("--guest", default="nano", help="a built-in guest, or an image file (default: nano)")
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[], help="a parameter; may be repeated")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="N", help="guest instruction to begin at (default: 0)")
    parser.add_argument("--to", dest="last", type=int, metavar="N", help="guest instruction to end at (default: the region's end)")
    parser.add_argument("--whole", action="store_true", help="count from the guest's first instruction, its boot included")
    parser.add_argument("--limit", type=int, default=100, help="steps shown at most, after filtering (default: 100)")
    parser.add_argument("--kind", metavar="KIND,…", help="only steps of these kinds")
    parser.add_argument("--interrupt", metavar="N:IRQ", help="raise this line of the interrupt controller at guest instruction N")
    parser.add_argument("--profile", metavar="NAME", default="prescott-2005", help="price on this profile (default: prescott-2005)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--chrome", metavar="FILE", help="write Chrome's and Perfetto's trace format instead")


def run(arguments: argparse.Namespace) -> int:
    """Record and print. Exit status 2 for a window or kind that does not exist."""
    from vmlab.cli.step import checked
    from vmlab.errors import ConfigError
    from vmlab.experiment import schema
    from vmlab.parameters import nearest
    from vmlab.trace import words
    from vmlab.trace.chrome import chrome
    from vmlab.trace.pricing import cycles
    from vmlab.trace.recorder import LIMIT, as_json, record

    kinds = arguments.kind.split(",") if arguments.kind else list(words.NAMES)
    for kind in kinds:
        if kind not in words.NAMES:
            raise ConfigError(f"--kind: {kind!r} is no kind of step{nearest(kind, words.NAMES)}")
    chosen = {}
    for text in arguments.sets:
        key, values = schema.parse_set(text)
        chosen[key] = values[0]
    parameters = checked(arguments.technique, arguments.guest, arguments.workload, chosen)
    everything = set(kinds) == set(words.NAMES) and not arguments.chrome
    trace = record(arguments.technique, parameters, first=arguments.first, last=arguments.last, whole=arguments.whole,
                   limit=arguments.limit if everything else LIMIT, interrupt=_interrupt(arguments.interrupt))
    prices = cycles(trace, arguments.profile)
    if arguments.chrome:
        if prices is None:
            raise ConfigError(f"--profile {arguments.profile}: that CPU could not have run {arguments.technique}")
        Path(arguments.chrome).write_text(json.dumps(chrome(trace, prices)), encoding="utf-8")
        print(f"{len(trace.steps)} steps in {arguments.chrome}; open it in https://ui.perfetto.dev")
        return 0
    wanted = [i for i, step in enumerate(trace.steps) if words.kind_of(step) in kinds][:arguments.limit]
    if arguments.json:
        for i in wanted:
            print(json.dumps(as_json(trace.steps[i], None if prices is None else prices[i])))
        return 0
    print(shown(trace, wanted, prices, arguments.profile))
    if len(trace.steps) >= LIMIT or not trace.complete:
        print(f"vmlab: {len(trace.steps)} steps were recorded; there may be more (--from, --to, --limit)", file=sys.stderr)
    return 0


def _interrupt(text: str | None) -> Trigger | None:
    from vmlab.errors import ConfigError
    from vmlab.trace import Trigger

    if text is None:
        return None
    number, _, line = text.partition(":")
    if not (number.isdigit() and line.isdigit() and int(line) < 16):
        raise ConfigError(f"--interrupt {text}: give the guest instruction and the controller's line (0 to 15), as 7:4")
    return Trigger(int(line), number=int(number))


def shown(trace: Trace, wanted: list[int], prices: list[float] | None, profile: str) -> str:
    """The steps as a table for a terminal."""
    from vmlab.trace.words import did, kind_of

    rows, so_far = [], 0.0
    totals = []
    for length in prices or []:
        so_far += length
        totals.append(so_far)
    for i in wanted:
        step = trace.steps[i]
        before, after = step.before, step.after or step.before
        code = step.code if step.where == "guest" else f"{step.where}: {step.code}"
        stands = f" [{step.guest_code}]" if step.where == "cache" and step.guest_code and step.guest_code != step.code else ""
        happened = "; ".join([*([kind_of(step)] if kind_of(step) != "instruction" else []), *did(step)])
        change = f"{before.cpl}" if before.cpl == after.cpl else f"{before.cpl}→{after.cpl}"
        flags = "/".join(_flag(getattr(before, name), getattr(after, name)) for name in ("real_if", "virtual_if"))
        registers = " ".join(f"{name}={new:#x}" for name, (_, new) in step.changed().items() if name not in ("esp", "rsp"))
        rows.append([step.number, f"{step.address:#x}", step.symbol, code + stands, change, flags, ",".join(before.pending), happened, registers,
                     "" if prices is None else round(prices[i]), "" if prices is None else round(totals[i])])
    head = ["guest instr.", "address", "symbol", "code", "CPL", "IF/virtual", "waiting", "what happened", "changed", f"cycles ({profile})", "so far"]
    return f"{trace.technique}, {trace.end}\n\n" + table(head, rows)


def _flag(before: bool, after: bool) -> str:
    return str(int(before)) if before == after else f"{int(before)}→{int(after)}"
