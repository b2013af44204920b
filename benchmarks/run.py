"""The lab's speed, as ratios measured within one run.

    python benchmarks/run.py [--json FILE] [--rounds N] [--scale X] [--only WORDS] [--table]
    python benchmarks/run.py --only "computing loop" --rounds 3      for example

Each row is the median of several rounds, in which the two sides are timed in turn, so that a busy host disturbs the spread more
than the median. Host time belongs to no ledger. The exit status is 1 where a row misses its limit, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks
import emulators
import events
import programs
import systems
from rows import Row, Skipped, table

#: Each gives its rows: (rounds, scale, which names are wanted).
GROUPS: tuple[Callable[[int, float, Callable[[str], bool]], Iterator[Row | Skipped]], ...] = (
    events.loops, events.events, systems.systems, emulators.emulators, checks.checks, programs.commands, programs.experiments)


def main() -> int:
    """Measure, print, and say whether every limit is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row (5)")
    parser.add_argument("--scale", type=float, default=1.0, help="how much work a measurement is, against the usual (1)")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--table", action="store_true", help="print a table in Markdown at the end")
    options = parser.parse_args()
    if options.rounds < 1 or not 0 < options.scale <= 100:
        parser.error("--rounds: at least 1; --scale: above 0, at most 100")
    found: list[Row | Skipped] = []
    for group in GROUPS:
        for row in group(options.rounds, options.scale, lambda name: options.only.lower() in name.lower()):
            found.append(row)
            print(row.text(), flush=True)
    if not found:
        parser.error(f"--only: no row's name contains {options.only!r}")
    rows = [row for row in found if isinstance(row, Row)]
    if options.json:
        Path(options.json).write_text(json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.table:
        print("\n" + table(rows))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
