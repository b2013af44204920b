"""``vmlab probe``: really run sensitive instructions at CPL 0, 1 and 3, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmlab.cli.output import print_json

CLAIMS = ("popek-goldberg", "ring-visible")

EXAMPLE = """\
examples:
  vmlab probe                          every instruction, the counts, two verdicts
  vmlab probe popf sgdt 'PUSH CS'      these, with what each of them means to a monitor
  vmlab probe --sensitive trap         on the hypothetical CPU of 'trap-and-emulate, sensitive: trap'
  vmlab probe --figure probe.png       one page to print; .svg too
  vmlab probe --json                   the same for a program
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("instructions", nargs="*", metavar="INSTRUCTION", help="mnemonics (default: all that are probed)")
    parser.add_argument("--sensitive", choices=("silent", "trap"), default="silent",
                        help="silent: x86 as it was (default); trap: sensitive instructions raise #GP above CPL 0")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE.png|svg", help="also draw the result on one page")


def run(arguments: argparse.Namespace) -> int:
    """Probe, judge, print. A verdict is an answer: the exit status is 0 whatever it says."""
    from vmlab.errors import ConfigError
    from vmlab.probe import probe

    file: Path | None = arguments.figure
    if file is not None and file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--figure {file}: the name must end in .png or .svg")
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--figure {file}: there is no folder {str(file.parent)!r}")
    result = probe(arguments.instructions, arguments.sensitive)
    verdicts = judge(result)
    if file is not None:
        from vmlab.probe.figure import draw

        try:
            file.write_bytes(draw(result)[file.suffix[1:]])
        except OSError as error:
            raise ConfigError(f"--figure {file}: cannot be written: {error.strerror or error}") from error
    if arguments.json:
        print_json(result | {"claims": verdicts})
        return 0
    from vmlab.probe.words import screen

    print(screen(result, verdicts, explain=bool(arguments.instructions)))
    if file is not None:
        print(f"\nFigure: {file}")
    return 0


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts on the claims about single instructions; none of a part of the probe, which would mislead."""
    if not result["complete"]:
        return []
    from vmlab.claims import evaluate

    return evaluate(CLAIMS, [], [], probe=telling(result))


def telling(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a probe that claims judge: instructions that no one calls sensitive are left out."""
    return result | {"rows": [row for row in result["rows"] if row["op"] and (row["sensitive"] != "no" or row["lists"])]}
