"""``vmlab run``: one workload, or one image from a file, under one technique, and its ledger."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vmlab.cli import live
from vmlab.cli.output import print_json, table

EXAMPLE = """\
examples:
  vmlab run cli_sti --technique trap-and-emulate --iterations 1000 --density 100
  vmlab run rdtsc --technique binary-translation --set emulation=callout --profile prescott-2005
  vmlab run compute --technique native --json
  vmlab run kernelmemfs --technique hardware-assisted --set memory=nested --ram 240
  vmlab run vmlinuz --initrd initrd.gz --append console=ttyS0 --ram 256 --technique native --expect '# ' --send 'ls\\n' --expect '# '
  vmlab run kernelmemfs --ram 240 --technique native --expect '$ ' --save booted.vmlab
  vmlab run --from booted.vmlab --send 'ls\\n' --expect '$ '

The native run of the same work is made along with a workload's, for slowdown and fidelity. An image from a file runs alone; at a
terminal its console is yours (Ctrl-] ends the run). A saved run goes on where it stood; its ledger is that of one run from the boot.
'vmlab list workloads' and 'vmlab list techniques' name what can be run.
"""


#: What has an argument of its own, and which.
_OF_THEIR_OWN = {"technique": "with --technique", "workload": "as the first argument", "guest": "with --guest"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("workload", nargs="?", metavar="WORKLOAD|IMAGE", help="what the guest does; or the file of a guest from elsewhere")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--technique", help="how it is virtualized ('native': not at all)")
    how.add_argument("--strategy", metavar="FILE.py:CLASS", help="a technique of your own, from a file")
    parser.add_argument("--guest", default="nano", help="a built-in guest, or an image file (default: nano)")
    parser.add_argument("--iterations", help="how often the workload's loop runs")
    parser.add_argument("--density", help="the workload's own instructions per 1000 others")
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[],
                        help="another parameter; may be repeated")
    parser.add_argument("--profile", dest="profiles", metavar="NAME|FILE", action="append",
                        help="price on this profile, or on that of a .yaml file (default: on all built-in ones); may be repeated")
    parser.add_argument("--json", action="store_true", help="print the cell as results.json holds it")
    live.configure(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the cell and print it. Exit status 1 when the cell failed, or could not be carried though a text was expected of it."""
    from vmlab.errors import ConfigError
    from vmlab.experiment import schema, single
    from vmlab.experiment.lab import Lab
    from vmlab.parameters import Value

    live.check(arguments)
    parameters: dict[str, Value] = {}
    for key, text in (("iterations", arguments.iterations), ("density", arguments.density)):
        if text is not None:
            parameters[key] = schema.word_or_number(text)
    for text in arguments.sets:
        key, values = schema.parse_set(text)
        if key in _OF_THEIR_OWN:
            raise ConfigError(f"--set {text}: the {key} is given {_OF_THEIR_OWN[key]}, not with --set")
        if len(values) != 1:
            raise ConfigError(f"--set {text}: one value for one parameter; 'vmlab experiment' sweeps")
        parameters[key] = values[0]
    lab = Lab([arguments.strategy] if arguments.strategy else [])
    technique = arguments.technique or arguments.strategy
    parameters |= live.parameters(arguments)
    if arguments.saved is not None:
        cell = live.go_on(arguments.saved, parameters, lab, profiles=arguments.profiles, quiet=arguments.json, save=arguments.save)
    elif live.is_image(arguments.workload):
        cell = live.run(technique, arguments.workload, parameters, lab, profiles=arguments.profiles, quiet=arguments.json, save=arguments.save)
    else:
        cell = single.run(technique, arguments.workload, guest=arguments.guest, profiles=arguments.profiles, parameters=parameters, lab=lab)
    if arguments.json:
        print_json(cell)
    elif cell["status"] == "ok":
        print(ledger(cell))
    if cell["status"] != "ok":
        print(f"vmlab: {cell['status']}: {cell['id']}: {cell['error']}", file=sys.stderr)
    return 1 if cell["status"] == "failed" or (arguments.script and cell["status"] != "ok") else 0


def ledger(cell: dict[str, Any]) -> str:
    """A finished cell in words: what was counted, what it costs, whether it came out as natively."""
    from vmlab.ledger import EVENTS

    guest, work = cell["instructions"]["guest"], cell["work"]
    parts = [
        cell["id"],
        f"{work.get('operations', 0):,} operations; guest instructions: {guest['kernel']:,} kernel, {guest['user']:,} user; "
        f"machine instructions: {cell['instructions']['machine']:,}",
        "",
        table(["event", "count", "in words"], [
            [kind, count, EVENTS[kind].words if kind in EVENTS else ""] for kind, count in cell["events"].items()
        ]),
    ]
    if cell["cycles"]:
        parts += ["", table(["profile", "cycles", "slowdown", "5 %", "95 %"], [_price_row(cell, p) for p in cell["cycles"]])]
    fidelity = cell["fidelity"]
    if fidelity.get("matches_native") is False:
        declared = fidelity.get("declared")
        parts += ["", f"The outcome differs from the native run's{difference(fidelity['first_difference'])}"
                      + (f"\nThe technique says so itself: {declared}." if declared else "")]
    elif fidelity.get("matches_native"):
        parts += ["", "The outcome is the native run's."]
    return "\n".join(parts)


def difference(found: dict[str, Any] | None) -> str:
    """Where two runs first part, as the end of a sentence."""
    if not found:
        return "."
    if "instruction" in found:
        parts = [f"{name} {there:#x} natively, {here:#x} here" for name, (there, here) in found.get("registers", {}).items()]
        said = f": {'; '.join(parts)}." if parts else "."
        suspect = found.get("suspect")
        cause = f", which shows what {_place(suspect)} did" if suspect else ""
        return f", first by {_place(found)}{said[:-1]}{cause}."
    if "error" in found:
        return f"; the first difference was not found: {found['error']}."
    place = f" line {found['line']}" if "line" in found else ""
    return f", first in {found['in']}{place}: {found['native']!r} natively, {found['here']!r} here."


def _place(found: dict[str, Any]) -> str:
    symbol = f" ({found['symbol']})" if found.get("symbol") else ""
    return f"'{found['instruction']}' at {found['address']:#x}{symbol}"


def _price_row(cell: dict[str, Any], profile: str) -> list[Any]:
    price, ratio = cell["cycles"][profile], cell["slowdown"].get(profile, {})
    if "total" not in price:
        return [profile, f"unsupported: {price.get('reason', '')}", "", "", ""]
    return [profile, round(price["total"]), ratio.get("value"), ratio.get("low"), ratio.get("high")]
