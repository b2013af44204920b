"""The probe's result as text: groups of rows, the counts, the verdicts, what this machine is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

WIDTH = 100
_INSTRUCTION, _CELL = 22, 8
_SENSITIVE = {"no": "-", "control": "C", "behaviour": "B", "control, behaviour": "CB"}

#: Heading of a group -> the rows in it.
GROUPS: tuple[tuple[str, str, str], ...] = (
    ("Silently different: the ring shows", "silently different", "ring"),
    ("Silently different: the monitor's tables and flags show", "silently different", "monitor"),
    ("Same as at CPL 0, without a trap", "same", ""),
    ("Trap, so a monitor can emulate them", "traps", ""),
)


def groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows under their headings; a group without rows is left out."""
    found = [(title, [row for row in rows if (row["verdict"], row["shows"]) == (verdict, shows)]) for title, verdict, shows in GROUPS]
    return [(title, members) for title, members in found if members]


def screen(result: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]] = (), *, explain: bool = False) -> str:
    """The whole output, no line longer than :data:`WIDTH`.

    :param verdicts: of the claims, as ``vmlab.claims.evaluate`` gives them.
    :param explain: also print the code and the meaning of every row (for a few named instructions).
    """
    lines = ["Each instruction was run at CPL 0, 1 and 3 (32-bit protected mode unless said otherwise, IOPL 0)."]
    if result["sensitive"] == "trap":
        lines.append("The CPU is the hypothetical one on which a listed set of sensitive instructions traps.")
    for title, members in groups(result["rows"]):
        lines += ["", f"{title} ({len(members)})", _line(("instruction", "CPL 0", "CPL 1", "CPL 3", "P&G", "list", _heading(members)))]
        for row in members:
            lines.append(_line((row["instruction"], row["cpl0"], row["cpl1"], row["cpl3"], _SENSITIVE[row["sensitive"]], row["lists"],
                                shortened(row["difference"], _room()))))
            if explain:
                lines += _wrapped(f"{row['text']}  ({row['bytes']}): {row['means']}", "    ")
                lines += _wrapped(row["difference"], "    ") if row["difference"] else []
    lines += ["", *_tally(result)]
    for verdict in verdicts:
        lines += ["", *_wrapped(f"{verdict['id']}: {verdict['verdict']}. {verdict['statement']}", ""), *_wrapped(verdict["reason"] + ".", "  ")]
    lines += ["", "P&G: control- (C) or behaviour-sensitive (B) in Popek & Goldberg, CACM 17(7), 1974; '-': neither.",
              "What this machine is not:"]
    for gap in result["gaps"]:
        lines += _wrapped(f"- {gap}", "  ")
    return "\n".join(lines)


def _heading(members: Sequence[Mapping[str, Any]]) -> str:
    return "what is different" if any(row["difference"] for row in members) else ""


def _room() -> int:
    return WIDTH - len(_line(("", "", "", "", "", "", "|"))) + 1


def _line(fields: Sequence[str]) -> str:
    widths = (_INSTRUCTION, 5, _CELL, _CELL, 3, 4)
    return "  ".join([*(text.ljust(width) for text, width in zip(fields, widths, strict=False)), fields[-1]]).rstrip()


def shortened(difference: str, room: int) -> str:
    """As many whole differences as fit, with a count of the rest."""
    items = difference.split("; ")
    for kept in range(len(items), 0, -1):
        rest = len(items) - kept
        text = "; ".join(items[:kept]) + (f" (+{rest})" if rest else "")
        if len(text) <= room:
            return text
    return items[0][:room]


def _wrapped(text: str, indent: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _tally(result: Mapping[str, Any]) -> list[str]:
    counts = result["counts"]
    rows, instructions = counts["rows"], counts["instructions"]
    lines = _wrapped(
        f"{sum(rows.values())} cases of {sum(instructions.values())} instructions. By instruction: "
        + ", ".join(f"{n} {_VERB[word]}" for word, n in instructions.items())
        + f". Sensitive by definition: {counts['sensitive']}, of which {counts['sensitive_unprivileged']} do not (always) trap.", "")
    if not result["complete"]:
        return lines
    lines.append("Published lists of sensitive, unprivileged instructions, each by its own count of mnemonics:")
    for letter, each in counts["lists"].items():
        said = f" (says {each['stated']})" if each["stated"] not in (None, each["mnemonics"]) else ""
        lines += _wrapped(f"{letter}: {each['mnemonics']}{said}: {each['silently different']} silently different, {each['same']} same, "
                          f"{each['traps']} trap. {each['source']}.", "  ")
    return lines


_VERB = {"traps": "trap", "same": "do the same", "silently different": "are silently different"}
