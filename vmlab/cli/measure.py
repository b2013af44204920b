"""``vmlab measure``: a cost profile of the machine that one sits at."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmlab.cli.output import print_json, table
from vmlab.errors import ConfigError

EXAMPLE = """\
examples:
  vmlab measure                        measure, show, and keep it as the profile 'this-machine'
  vmlab measure --out mine.yaml        keep it in a file, for --profile mine.yaml
  vmlab measure --dry-run --json       measure and show only

User mode on x86-64 can run CPUID, RDTSC, PUSHF, POPF, a system call and a signal; where /dev/kvm can be used, a guest of our
own exits for CPUID, a hypercall, OUT and HLT. What cannot be measured here is listed with the reason.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the profile there (default: the user's data directory)")
    parser.add_argument("--no-kvm", action="store_true", help="leave /dev/kvm alone")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write. Exit status 1 where nothing could be measured."""
    from vmlab import costs
    from vmlab.experiment.store import write
    from vmlab.measure import measure, profile_text
    from vmlab.measure.native import CannotMeasure

    out: Path = arguments.out or costs.user_profiles() / "this-machine.yaml"
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: the name must end in .yaml")
    measured = measure(with_kvm=not arguments.no_kvm)
    if arguments.json:
        print_json(measured.as_dict())
    else:
        if measured.host:
            print(f"{measured.host.words}, {measured.mhz:,.0f} MHz while busy; core cycles")
            print(table(["what", "cycles", "5 %", "95 %"], [[name, s.value, s.low, s.high] for name, s in measured.rows.items()]))
            print()
        print("Not measured:")
        for name, reason in measured.cannot.items():
            print(f"  {name}: {reason}")
    try:
        text = profile_text(measured)
    except CannotMeasure as why:
        raise ConfigError(f"no profile was made: {why}") from why
    if not arguments.dry_run:
        write(out, text)
        costs.load(out)  # what was written must load like any other
        if not arguments.json:
            print(f"\nProfile: {out}" + ("" if arguments.out else ", known as 'this-machine'"))
    return 0
