"""No part of a machine or VMM is forgotten by who saves it: whatever differs between a run that has booted and one that has been set up is there
after a saved run was read. Somebody who adds an attribute hears of it here."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_saved_run import BUSY, MINIOS

from vmlab.experiment import resume, saved_run
from vmlab.experiment.cell import Run
from vmlab.ledger import Counts
from vmlab.machine.pc import StopReason

#: Attributes that need not be the same, by the class that has them, and why.
LEFT_OUT = {
    # Code is decoded and translated anew where it is met, and what is counted for it begins at 0; see Machine.earlier.
    "FastCounter": "*", "Counter": "*", "Blocks": "*", "FastEvents": "*", "WorldSwitch": "*", "HiddenFaults": "*", "Engine": "*", "Snapshot": "*",
    "Ram": "*",                                 # compared by what it holds
    "LiveWindow": "*", "ContextWindow": "*",    # where the CPU's state lies; compared by what it holds
    "Machine": ("left_off", "code_frames", "ending", "console_listeners", "_broken_off", "_budget", "_stale_code", "_interrupted", "_asked_for"),
    "StopReason": "*",
    "Exceptions": ("faulting",),                # of the trap that is being taken
    "Interrupts": ("_nmi_since",),              # in IRETs that the counter has seen
    "Timeline": ("_asked",),                    # order is kept, numbers are not
    "Handle": ("order",),
    "Cmos": ("_handles",),                      # what waits there is compared in the timeline
    "PortBus": ("accesses",),                   # nobody's count
    # The VMM's: what is worked out anew, or was of the exit that is over.
    "HardwareAssisted": ("_handled", "_reset_registers"), "Svm": ("exiting",), "Emulator": ("_next",), "GuestMmu": ("_tables", "_walks"),
    "ShadowPager": ("_linked",), "GuestModeCpu": ("_written", "_segments"), "SingleStep": "*",
}
_PLAIN = (int, float, str, bytes, bytearray, bool, type(None), enum.Enum)


def _plain(value: Any) -> Any:
    """``value`` where it is made of plain values, with its order; else None in a tuple, that nothing else is."""
    if isinstance(value, _PLAIN):
        return bytes(value) if isinstance(value, bytearray) else value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, Counts):
        return {key: n for key, n in value.items() if n}
    if isinstance(value, dict):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    return ("an object",)


def state_of(run: Run) -> dict[str, Any]:
    """Every plain attribute of every object of the lab's that can be reached, by the way to it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("machine", run.machine), ("vmm", run.strategy)]
    while waiting:
        path, value = waiting.pop(0)
        for name, item in _attributes(value):
            way = f"{path}.{name}"
            left_out = LEFT_OUT.get(type(value).__name__, ())
            if left_out == "*" or name in left_out:
                continue
            found[way] = _plain(item)
            for key, part in _parts(item):
                if type(part).__module__.startswith("vmlab.") and id(part) not in seen:
                    seen.add(id(part))
                    waiting.append((f"{way}{key}", part))
    return found


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    yield from sorted({**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in names if hasattr(value, name)}}.items())


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, (list, tuple)):
        yield from ((f"[{number}]", part) for number, part in enumerate(item))
    elif isinstance(item, dict):
        yield from ((f"[{number}]", part) for number, part in enumerate(item.values()))
    elif hasattr(item, "__self__"):
        yield "", item.__self__
    else:
        yield "", item


@pytest.mark.parametrize(("technique", "chosen"), [
    ("native", {}), ("hardware-assisted", {"memory": "nested"}), ("hardware-assisted", {"memory": "lazy"}),
    ("hardware-assisted", {"memory": "tracing", "hypervisor": "type2"}),
])
def test_whatever_differs_from_a_fresh_run_is_saved(technique: str, chosen: dict[str, Any], tmp_path: Path) -> None:
    parameters = {"guest": MINIOS, "append": BUSY, "script": 'expect "workload="', **chosen}
    run = Run(technique, parameters)
    fresh = state_of(run)
    assert run.go().reason is StopReason.SAID
    resume.save(run, tmp_path / "run", "code")
    again = Run(technique, parameters, saved=saved_run.read(tmp_path / "run", "code"))
    before, after = state_of(run), state_of(again)
    # Objects that came to be on the way, pages and handles, are compared inside of what holds them.
    changed = {way for way, value in before.items() if way in fresh and value != fresh[way]}
    assert len(changed) > 10
    lost = {way: (value, after.get(way)) for way, value in before.items() if way in fresh and value != after.get(way)}
    assert not lost, "\n".join(f"{way}: {str(was)[:200]}, then {str(now)[:200]}" for way, (was, now) in lost.items())
    ram, other = run.machine.ram, again.machine.ram
    assert list(ram.pages_in_use(0, ram.size)) == list(other.pages_in_use(0, other.size))
    assert run.machine.cpu.window.raw() == again.machine.cpu.window.raw()
    assert run.strategy.snapshot() == again.strategy.snapshot() and run.machine.time == again.machine.time
    assert [(handle.due, str(handle.callback).partition(" at ")[0]) for handle in run.machine.timeline.pending()] == [
        (handle.due, str(handle.callback).partition(" at ")[0]) for handle in again.machine.timeline.pending()]


def test_an_attribute_that_nobody_saves_is_noticed(tmp_path: Path) -> None:
    parameters = {"guest": MINIOS, "append": BUSY, "script": 'expect "workload="'}
    run = Run("native", parameters)
    run.machine.uart.forgotten = 0      # type: ignore[attr-defined]
    fresh = state_of(run)
    run.machine.uart.forgotten = 3      # type: ignore[attr-defined]
    ways = [way for way, value in state_of(run).items() if value != fresh.get(way)]
    assert ways == ["machine.uart.forgotten"]
