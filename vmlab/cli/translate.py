"""``vmlab translate``: guest code beside its translation, unit by unit, after a run; or the translation itself, step by step."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmlab.cli.output import print_json

if TYPE_CHECKING:
    from vmlab.guests import GuestImage
    from vmlab.ledger import Snapshot
    from vmlab.parameters import Value
    from vmlab.strategies.translation import BinaryTranslation
    from vmlab.vmm.translation import Site, Unit

EXAMPLE = """\
examples:
  vmlab translate nano --workload pushf_popf --iterations 20 --limit 5
  vmlab translate nano --workload cli_sti --symbol uart_write --profile prescott-2005
  vmlab translate --asm "cli; mov eax, 1; sti; ret"          (needs the extra: pip install 'vmlab[asm]')
  vmlab translate --bytes "fa b8 01 00 00 00 fb c3" --steps
  vmlab translate --bits 64 --asm "lea r9, [rip + 16]; cli; mov rax, cr8; sti; ret"
  vmlab translate minios --workload mixed --set memory=tracing --steady

Units that ran most come first. Kinds: identical (copied), relocated (a copy whose operand, relative to RIP, is made absolute),
in-cache (works on the virtual CPU), callout (into the monitor), control flow, simulated (adapted: it kept faulting as a copy),
forwarding (jumps to where it was adapted). Cycles are per execution of the unit, beside those of the same guest code on the bare machine.
"""

_COLOURS = {"identical": "37", "in-cache": "32", "callout": "31", "control flow": "36", "simulated": "35", "forwarding": "35", "relocated": "34"}
_MARKS = {"identical": " ", "in-cache": "*", "callout": "!", "control flow": ">", "simulated": "~", "forwarding": "~", "relocated": "+"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("guest", nargs="?", default="nano", help="a built-in guest, or an image file (default: nano)")
    parser.add_argument("--workload", help="what the guest does before its translations are shown")
    parser.add_argument("--iterations", help="how often the workload's loop runs (default: 20)")
    parser.add_argument("--density", help="the workload's own instructions per 1000 others")
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[], help="another parameter; may be repeated")
    parser.add_argument("--symbol", metavar="NAME", help="only units that begin in this function")
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--asm", metavar="TEXT", help="translate and run these instructions instead of a guest")
    code.add_argument("--bytes", metavar="HEX", help="the same, as machine code")
    parser.add_argument("--bits", choices=("32", "64"), default="32", help="size of that code (default: 32)")
    parser.add_argument("--profile", metavar="NAME", default="prescott-2005", help="price on this profile (default: prescott-2005)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="units or steps shown at most (default: 20)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--steps", action="store_true", help="what happened to the translations, in order")
    shown.add_argument("--warm-up", action="store_true", help="units translated and chained by each power of two of guest instructions")
    shown.add_argument("--steady", action="store_true",
                       help="both halves of the guest's work: units, entries into the monitor for translation or control flow, and what is apart")
    parser.add_argument("--json", action="store_true", help="units (or steps) as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the guest under translation and print. Exit status 2 for a name or code that does not exist."""
    from vmlab import costs
    from vmlab.errors import ConfigError, GuestError
    from vmlab.parameters import nearest
    from vmlab.vmm.translation.listing import listing

    if arguments.profile not in costs.names():
        raise ConfigError(f"--profile: {arguments.profile!r} is not a profile{nearest(arguments.profile, costs.names())}")
    if arguments.steady:
        return _steady(arguments)
    strategy, image, budget, _ = _prepared(arguments)
    if arguments.symbol is not None and arguments.symbol not in image.symbols:
        raise ConfigError(f"--symbol: {arguments.symbol!r} is not in {image.name}{nearest(arguments.symbol, image.symbols)}")
    steps: list[dict[str, Any]] = []
    strategy.translator.runs_by_code = strategy.machine.counter.runs_by_code

    def listener(what: str, unit: Unit, site: Site | None) -> None:
        steps.append({
            "at": strategy.machine.time, "what": what, "guest": unit.guest, "cache": unit.start, "end": unit.end,
            "from": None if site is None else site.unit.guest, "by": None if site is None else site.form,
            "access": site.guest if site is not None and site.form == "forward" else None,
        })

    for made_before in strategy.translator.units.values():   # made when the guest was loaded
        listener("translated", made_before, None)
    strategy.translator.listener = listener
    ended = "it ended by itself"
    try:
        strategy.run(budget)
    except GuestError as error:
        ended = str(error)
    if arguments.warm_up:
        curve = strategy.warm_up()
        if arguments.json:
            print_json({"schema_version": 1, "warm_up": curve})
        else:
            print(f"{'by':>14} {'translated':>11} {'chained':>9}")
            print("\n".join(f"{row['instructions']:>14,} {row['translated']:>11,} {row['chained']:>9,}" for row in curve))
            print(f"Virtual time in guest instructions, idle time included; {ended}.")
        return 0
    if arguments.steps:
        shown = [step for step in steps if _belongs(step["guest"], arguments.symbol, image.symbols)][:arguments.limit]
        if arguments.json:
            print_json({"schema_version": 1, "steps": shown})
        else:
            print("\n".join(_step(step, image.symbols) for step in shown))
            print(f"{len(steps)} steps in all; {ended}.")
        return 0
    units = [u for u in listing(strategy.translator, strategy.machine.counter) if _belongs(u["guest"], arguments.symbol, image.symbols)]
    profile = costs.load(arguments.profile)
    for unit in units:
        unit["symbol"] = _symbol(image.symbols, unit["guest"])
        n = max(unit["executed"], 1)
        for name, key in (("cycles", "events"), ("native_cycles", "native")):
            price = costs.price(unit[key], profile, "x86").as_dict()
            unit[name] = float(price["total"]) / n if "total" in price else None  # type: ignore[arg-type]
    units.sort(key=lambda u: (-u["executed"], u["guest"]))
    if arguments.json:
        print_json({"schema_version": 1, "profile": arguments.profile, "units": units[:arguments.limit]})
        return 0
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(_unit(unit, colour) for unit in units[:arguments.limit]))
    made = len(units)
    print(f"\n{made} units, {sum(u['bytes_in'] for u in units)} bytes of guest code became {sum(u['bytes_out'] for u in units)}; "
          f"{min(made, arguments.limit)} shown, priced on {profile.name}; the guest: {ended}.")
    return 0


def _steady(arguments: argparse.Namespace) -> int:
    """The same run twice, since every run is the same: once to know how long its work is, once to look at the middle."""
    from vmlab.errors import GuestBudget, GuestError
    from vmlab.ledger import Snapshot
    from vmlab.vmm.translation.steady import halves

    ended = "it ended by itself"
    strategy, _, budget, marks = _prepared(arguments)
    try:
        strategy.run(budget)
    except GuestError as error:
        ended = str(error)
    begin, end = marks.get("vmlab_roi_begin", Snapshot()), marks.get("vmlab_roi_end", strategy.snapshot())
    again, *_ = _prepared(arguments)
    with contextlib.suppress(GuestBudget):
        again.run((begin.user + begin.kernel + end.user + end.kernel) // 2)
    rows = halves(begin, again.snapshot(), end)
    if arguments.json:
        print_json({"schema_version": 1, "halves": rows})
        return 0
    columns = (("half", "half"), ("units", "units"), ("translated", "translated"), ("per 1000", "translated_per_1000"), ("entries", "entries"),
               ("per 1000", "entries_per_1000"), ("callouts", "callouts"), ("interrupts", "interrupts"), ("sensitive", "sensitive"))
    print(" ".join(f"{title:>11}" for title, _ in columns))
    for row in rows:
        print(" ".join(f"{_figure(row[key]):>11}" for _, key in columns))
    print("Halves of the guest's measured work, by its instructions. Entries: into the monitor for translation or control flow;\n"
          f"callouts and interrupts are apart. Sensitive: copies of sensitive instructions that retired. The guest: {ended}.")
    return 0


def _figure(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _prepared(arguments: argparse.Namespace) -> tuple[BinaryTranslation, GuestImage, int, Mapping[str, Snapshot]]:
    """The guest loaded under translation, its budget, and what will have been counted when it passes its markers."""
    from vmlab.cli import own_code
    from vmlab.errors import ConfigError
    from vmlab.experiment import schema, single
    from vmlab.experiment.cell import DEFAULT_BUDGET, Run
    from vmlab.experiment.lab import Lab
    from vmlab.machine.pc import Machine
    from vmlab.strategies.translation import BinaryTranslation

    parameters: dict[str, Value] = {}
    for text in arguments.sets:
        key, values = schema.parse_set(text)
        if len(values) != 1:
            raise ConfigError(f"--set {text}: one value for one parameter")
        parameters[key] = values[0]
    if arguments.asm is not None or arguments.bytes is not None:
        bits = int(arguments.bits)
        image = own_code.image(own_code.assembled(arguments.asm, bits) if arguments.asm is not None else own_code.from_hex(arguments.bytes), bits)
        if bits == 64:
            parameters.setdefault("memory", "lazy")     # long mode is paged
        for key in parameters:
            if key not in BinaryTranslation.parameters:
                raise ConfigError(f"--set {key}: code of your own takes the technique's parameters only")
        strategy = BinaryTranslation(Machine(), parameters)
        strategy.load(image, "")
        return strategy, image, 100_000, {}
    if arguments.bits != "32":
        raise ConfigError("--bits is for code of your own: --asm or --bytes; a guest has its own size")
    for key, given in (("iterations", arguments.iterations or "20"), ("density", arguments.density)):
        if given is not None and not (key == "iterations" and arguments.iterations is None and arguments.workload is None):
            parameters[key] = schema.word_or_number(given)
    cell = single.expand("binary-translation", arguments.workload, arguments.guest, parameters, Lab())[0]
    made = Run("binary-translation", cell.parameters)
    assert isinstance(made.strategy, BinaryTranslation)
    return made.strategy, made.image, DEFAULT_BUDGET, made.marks


def _symbol(symbols: Mapping[str, int], address: int) -> str:
    below = [(value, name) for name, value in symbols.items() if value <= address]
    if not below:
        return f"{address:#x}"
    value, name = max(below)
    return name if value == address else f"{name}+{address - value:#x}"


def _belongs(address: int, symbol: str | None, symbols: Mapping[str, int]) -> bool:
    return symbol is None or _symbol(symbols, address).partition("+")[0] == symbol


def _cycles(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _unit(unit: Mapping[str, Any], colour: bool) -> str:
    head = (f"{unit['symbol']} at {unit['guest']:#x} -> {unit['start']:#x}: executed {unit['executed']:,} times; cycles a time: "
            f"{_cycles(unit['native_cycles'])} natively, {_cycles(unit['cycles'])} here")
    lines = [head]
    for piece in unit["pieces"]:
        code = [c["text"] for c in piece["code"]] or [""]
        for i, translated in enumerate(code):
            guest = f"{piece['guest']:#9x}  {piece['text']:<38.38}" if i == 0 else " " * 49
            line = f"{guest} {_MARKS[piece['kind']]} {translated}"
            lines.append(f"\x1b[{_COLOURS[piece['kind']]}m{line}\x1b[0m" if colour else line)
    for leaving in unit["exits"]:
        lines.append(f"{'':49}   exit to {leaving['to']:#x}, {'chained' if leaving['chained'] else 'asks the monitor'}")
    return "\n".join(lines)


def _step(step: Mapping[str, Any], symbols: Mapping[str, int]) -> str:
    where = f"{_symbol(symbols, step['guest'])} ({step['guest']:#x})"
    at = f"{step['at']:>10,}"
    if step["what"] == "translated":
        return f"{at}  {where} was unmapped; translated to {step['cache']:#x}..{step['end']:#x}, and runs for the first time"
    if step["what"] == "chained":
        how = "falls through" if step["by"] == "inline" else "jumps"
        return f"{at}  the exit of {_symbol(symbols, step['from'])} now {how} to {where} without the monitor"
    if step["what"] in ("adapted", "adapted back"):
        why = "kept faulting on watched memory" if step["what"] == "adapted" else "meets watched memory no more"
        if step["access"] is None:
            return f"{at}  {where} was thrown away, since an access in it {why}; it will be translated anew with the access's other form"
        return (f"{at}  {where}: the access at {_symbol(symbols, step['access'])} ({step['access']:#x}) {why}; "
                "a forwarding jump takes its place, and leads to where it is translated anew")
    return f"{at}  {where} was {step['what']}"
