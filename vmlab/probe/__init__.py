"""The probe: every sensitive instruction really run at CPL 0, 1 and 3, and what came of it compared.

Each case runs first with nothing changed but the ring. What then differs shows the *ring*. Where nothing differs it
runs again with a monitor's tables and flags in place of the kernel's; what differs now shows the *monitor*.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vmlab.errors import ConfigError, GuestError
from vmlab.parameters import nearest
from vmlab.probe import bench, compare, layout, lists
from vmlab.probe.cases import CASES, GAPS, NOT_PROBED, Case
from vmlab.probe.rings import rings

__all__ = ["CASES", "choose", "probe"]

RINGS = (0, 1, 3)
TRAPS, SAME, SILENT = VERDICTS = ("traps", "same", "silently different")


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of the named instructions, in the probe's order; all where none is named.

    A name is the ledger's (``push_seg``), a mnemonic (``push``, ``PUSHF``) or a case's own (``PUSH CS``).

    :raises ConfigError: no such instruction (says the nearest), or it is not probed (says why).
    """
    wanted: set[str] = set()
    for name in names:
        key = " ".join(name.lower().split())
        found = {case.name for case in CASES if key in _names(case)}
        if not found and key in NOT_PROBED:
            raise ConfigError(f"{name} is not probed: {NOT_PROBED[key]}")
        if not found:
            raise ConfigError(f"no instruction {name!r} is probed{nearest(key, {n for case in CASES for n in _names(case)})}")
        wanted |= found
    return [case for case in CASES if not names or case.name in wanted]


def _names(case: Case) -> set[str]:
    """Lower-case names by which a case is found."""
    printed = [m for m in {m for published in lists.LISTS for m in published.mnemonics} if case.op in lists.ops(m)]
    return {case.op, case.name.lower(), case.name.lower().split(" (")[0], case.name.lower().split()[0], *map(str.lower, printed)}


def probe(names: Sequence[str] = (), sensitive: str = "silent", path: str | None = None) -> dict[str, Any]:
    """Run the named instructions (default: all) in the three rings.

    :param sensitive: ``silent`` for x86 as it was; ``trap`` for the hypothetical one of ``trap-and-emulate``.
    :param path: way into the machine, as VMLAB_MACHINE.
    :raises ConfigError: an unknown instruction, or another word for ``sensitive``.
    """
    cases = choose(names)
    if sensitive not in ("silent", "trap"):
        raise ConfigError(f"sensitive: {sensitive!r} is not allowed{nearest(sensitive, ('silent', 'trap'))}")
    trapping: Collection[str] = frozenset()
    if sensitive == "trap":
        from vmlab.strategies.trap_and_emulate import SENSITIVE

        trapping = SENSITIVE
    seen: set[str] = set()
    rows = []
    for case in cases:
        rows.append(_row(case, first=case.op not in seen, trapping=trapping, path=path))
        seen.add(case.op)
    return {
        "schema_version": 1, "sensitive": sensitive, "complete": len(cases) == len(CASES), "rows": rows,
        "counts": counts(rows), "not_probed": dict(NOT_PROBED), "gaps": list(GAPS), "rings": rings(path),
    }


def _row(case: Case, *, first: bool, trapping: Collection[str], path: str | None) -> dict[str, Any]:
    base = bench.run(case, 0, layout.KERNEL, trapping, path)
    if base.trap is not None:
        raise GuestError(f"{case.name} raised {compare.trap_words(base.trap)} in ring 0: this CPU does not have it")
    row: dict[str, Any] = {"instruction": case.name, "op": case.op if first else None, "of": case.op, "text": case.text,
                           "bytes": case.code.hex(), "cpl0": "runs"}
    found: dict[int, list[str]] = {}
    traps, shows = [], ""
    for cpl in RINGS[1:]:
        outcome, by = bench.run(case, cpl, layout.KERNEL, trapping, path), "ring"
        if outcome.trap is None and not compare.differences(outcome, base):
            outcome, by = bench.run(case, cpl, layout.MONITOR, trapping, path), "monitor"
        if outcome.trap is not None:
            row[f"cpl{cpl}"] = compare.trap_words(outcome.trap)
            traps.append(outcome.trap.precise)
            continue
        found[cpl] = compare.differences(outcome, base)
        row[f"cpl{cpl}"] = "differs" if found[cpl] else "same"
        shows = shows or (by if found[cpl] else "")
    different = [cpl for cpl, each in found.items() if each]
    verdict = SILENT if different else TRAPS if len(traps) == len(RINGS) - 1 else SAME
    return row | {
        "verdict": verdict, "difference": "; ".join(found[different[-1]]) if different else "",
        "shows": shows, "means": case.means, "privileged": verdict == TRAPS, "precise": all(traps),
        "sensitive": case.sensitive, "lists": lists.letters(case.op),
    }


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many instructions came out how; by published list, in its own way of counting.

    An instruction is silently different if one of its cases is, and traps only if all of them do.
    """
    by_op: dict[str, set[str]] = {}
    for row in rows:
        by_op.setdefault(row["of"], set()).add(row["verdict"])
    verdict = {op: SILENT if SILENT in v else SAME if SAME in v else TRAPS for op, v in by_op.items()}
    sensitive = {row["of"] for row in rows if row["sensitive"] != "no"}
    published = {}
    for each in lists.LISTS:
        found = {m: [verdict[op] for op in lists.ops(m) if op in verdict] for m in each.mnemonics}
        published[each.letter] = {
            "source": each.source, "stated": each.stated, "mnemonics": len(each.mnemonics), "probed": sum(map(bool, found.values())),
            **{word: sum(bool(v) and _worst(v) == word for v in found.values()) for word in VERDICTS},
        }
    return {
        "rows": {word: sum(row["verdict"] == word for row in rows) for word in VERDICTS},
        "instructions": {word: sum(v == word for v in verdict.values()) for word in VERDICTS},
        "sensitive": len(sensitive), "sensitive_unprivileged": sum(verdict[op] != TRAPS for op in sensitive),
        "lists": published,
    }


def _worst(verdicts: Sequence[str]) -> str:
    return SILENT if SILENT in verdicts else SAME if SAME in verdicts else TRAPS
