"""Translations as plain data, for people and programs to look at: units, pieces, what each became, how often it ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vmlab.machine.counter import Counter
from vmlab.machine.decode import Instruction, decode
from vmlab.vmm.translation.emitter import entry_size
from vmlab.vmm.translation.forms import LEAVE_SIZE
from vmlab.vmm.translation.translator import Translator
from vmlab.vmm.translation.units import Piece, Unit

#: By cache address, mnemonic and size (a chained exit keeps those): how often the instruction there retired, and jumped.
Runs = Mapping[tuple[int, str, int], tuple[int, int]]


def listing(translator: Translator, counter: Counter) -> list[dict[str, Any]]:
    """Every unit that exists now, in the order of the guest's addresses.

    ``executed`` counts since the cache was last emptied. ``events`` are machine events of the unit's own code and
    ``native`` those of the same guest instructions on the bare machine; both can be priced.
    """
    before = translator.emptied_at
    runs = {at: (n - before.get(at, (0, 0))[0], taken - before.get(at, (0, 0))[1]) for at, (n, taken) in counter.runs_by_code().items()}
    return [_unit(translator, unit, runs) for _, unit in sorted(translator.units.items())]


def _unit(translator: Translator, unit: Unit, runs: Runs) -> dict[str, Any]:
    events: dict[str, int] = {}
    native: dict[str, int] = {}
    pieces: list[dict[str, Any]] = []
    executed_unit = 0
    if unit.entry:
        _count(events, _code(translator, unit.entry, unit.entry + entry_size(translator.forms, unit.guest)), runs)
    # Where the next unit took the place of this one's last stub, this one's code ends.
    ends = min([site.stub for site in unit.sites if site.form == "inline" and site.target and site.target.start == site.stub], default=unit.end)
    for piece in unit.pieces:
        code = list(_code(translator, piece.start, min(piece.end, ends)))
        _count(events, code, runs)
        executed = _runs(runs, *code[0])[0] if code else 0
        executed_unit = executed_unit or (executed if not pieces else 0)
        if piece.instruction is not None:
            _add(native, piece.instruction, executed, _runs(runs, *code[0])[1] if code else 0)
        pieces.append({
            "guest": piece.guest, "bytes": piece.instruction.raw.hex() if piece.instruction else "",
            "text": text(piece, translator.forms.mask),
            "kind": piece.kind.value, "executed": executed,
            "code": [{"at": at, "bytes": ins.raw.hex(), "text": _at(ins, at, translator.forms.mask), "executed": _runs(runs, at, ins)[0]}
                     for at, ins in code],
        })
    for site in unit.sites:
        if site.calls:
            kind = f"bt.callout.{site.cause}"
            events[kind] = events.get(kind, 0) + site.calls
            if not site.is_exit and site.instruction is not None and site.cause != "int" and site.instruction.op:
                events[f"emulate.{site.instruction.op}"] = events.get(f"emulate.{site.instruction.op}", 0) + site.calls
    return {
        "guest": unit.guest, "start": unit.start, "end": unit.end, "looked_up": bool(unit.entry),
        "bytes_in": len(unit.source), "bytes_out": unit.end - (unit.entry if 0 < unit.entry < unit.start else unit.start),
        "executed": executed_unit, "pieces": pieces,
        "exits": [{"to": site.guest, "chained": site.target is not None, "form": site.form} for site in unit.sites if site.is_exit],
        "callouts": [{"cause": site.cause, "guest": site.guest, "calls": site.calls} for site in unit.sites if not site.is_exit],
        "events": events, "native": native,
    }


def _runs(runs: Runs, at: int, instruction: Instruction) -> tuple[int, int]:
    return runs.get((at, instruction.cs.mnemonic, instruction.size), (0, 0))


def text(piece: Piece, mask: int) -> str:
    """The guest's instruction in Intel syntax, its target absolute; ``mask``: of an address."""
    return _at(piece.instruction, piece.guest, mask) if piece.instruction else "(no instruction)"


def _at(instruction: Instruction, address: int, mask: int) -> str:
    if instruction.kind in ("branch", "jcc"):
        return f"{instruction.cs.mnemonic} {(address + int(instruction.cs.operands[0].imm)) & mask:#x}"
    return instruction.text


def _code(translator: Translator, start: int, end: int) -> Iterator[tuple[int, Instruction]]:
    at = start
    while at < end:
        if at not in translator.states:
            return
        found = decode(translator.ram.read(translator.space.hole_frame(at), min(15, end - at + LEAVE_SIZE)), translator.forms.bits)
        if found is None:
            return
        yield at, found
        at += found.size


def _count(events: dict[str, int], code: Iterator[tuple[int, Instruction]] | list[tuple[int, Instruction]], runs: Runs) -> None:
    for at, instruction in code:
        _add(events, instruction, *_runs(runs, at, instruction))


def _add(events: dict[str, int], instruction: Instruction, n: int, taken: int) -> None:
    kinds = {f"machine.{instruction.op or instruction.kind}": n}
    if instruction.op is None and instruction.kind == "jcc":
        kinds = {"machine.branch": taken, "machine.alu": n - taken}
    for kind, count in kinds.items():
        if count:
            events[kind] = events.get(kind, 0) + count
