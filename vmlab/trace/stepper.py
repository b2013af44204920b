"""Records a scenario's lanes and lays them out in step: the data of a stepper page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmlab.errors import VmlabError
from vmlab.parameters import Value
from vmlab.trace.align import Group, groups, places
from vmlab.trace.recorder import Step, Trace, Trigger, record
from vmlab.trace.scenarios import LaneChoice, Scenario
from vmlab.trace.words import did, kind_of

#: Groups of guest instructions that a page has at most, about.
MOST_GROUPS = 90
#: Lines of executed code shown for one group and lane; of more the eventful ones are kept.
MOST_LINES = 14

#: A lane is recorded for at most this many times the ruler's instructions.
_LONGER = 4

Check = Callable[[str, str, str, Mapping[str, Value]], Mapping[str, Value]]


@dataclass(frozen=True)
class Recorded:
    """One lane: its trace, or why there is none."""

    choice: LaneChoice
    trace: Trace | None
    reason: str = ""


def record_lanes(scenario: Scenario, check: Check) -> list[Recorded]:
    """Run every lane of a scenario and record it.

    :param check: (technique, guest, workload, parameters) -> the cell's parameters, or ConfigError where the lab has no such cell.
    """
    made: list[Recorded] = []
    interrupt: Trigger | None = None
    for choice in scenario.lanes:
        try:
            parameters = check(choice.technique, scenario.guest, scenario.workload, {**scenario.parameters, **choice.parameters})
            # A lane may need several instructions of its kernel for one of the bare machine's, and a translator several steps for each.
            longer = 1 if choice.technique == "native" else _LONGER
            trace = record(choice.technique, parameters, first=scenario.first, last=scenario.first + longer * scenario.steps,
                           limit=2 * longer * scenario.steps + 200, interrupt=interrupt or _first_trigger(scenario))
        except VmlabError as error:
            made.append(Recorded(choice, None, str(error)))
            continue
        if scenario.interrupt_at is not None and interrupt is None:
            interrupt = _same_place(trace, *scenario.interrupt_at)
        made.append(Recorded(choice, trace) if trace.steps else Recorded(choice, None, f"nothing was recorded: {trace.end}"))
    return made


def _first_trigger(scenario: Scenario) -> Trigger | None:
    """On the bare machine the scenario's instruction is found by its number."""
    return None if scenario.interrupt_at is None else Trigger(scenario.interrupt_at[1], number=scenario.interrupt_at[0])


def _same_place(ruler: Trace, number: int, line: int) -> Trigger:
    """The same moment for a lane whose kernel has other instructions: the instruction's address, and how often it had been met by then."""
    address = next(step.address for step in ruler.steps if step.number >= number)
    visits = sum(step.address == address for step in ruler.steps if step.number <= number)
    return Trigger(line, address=address, visit=visits)


def layout(scenario: Scenario, lanes: list[Recorded]) -> dict[str, Any]:
    """The page's data: groups of guest instructions, and what each lane did for each.

    :raises VmlabError: the bare machine itself could not be recorded.
    """
    first = lanes[0]
    if first.trace is None:
        raise VmlabError(f"{scenario.name}: the bare machine could not be recorded: {first.reason}")
    ruler = first.trace.steps[:scenario.steps]
    placed = [(lane, lane.trace.steps, places(ruler, lane.trace.steps)) for lane in lanes if lane.trace is not None]
    cut = [(lane, *_within(steps, at, len(ruler))) for lane, steps, at in placed]
    parts = groups(ruler, [(steps, at) for _, steps, at in cut], MOST_GROUPS)
    found = {id(lane): (steps, at) for lane, steps, at in cut}
    return {
        "name": scenario.name, "title": scenario.title, "look": scenario.look,
        "groups": [_group(ruler, part) for part in parts],
        "lanes": [_lane(lane, *found[id(lane)], parts) if id(lane) in found else _absent(lane) for lane in lanes],
    }


def _within(steps: list[Step], at: list[int], count: int) -> tuple[list[Step], list[int]]:
    """A lane's steps up to where it leaves the ruler's last instruction for good."""
    end = next((j for j, i in enumerate(at) if i == count - 1 and steps[j].instructions), len(at) - 1)
    return steps[:end + 1], at[:end + 1]


def _group(ruler: list[Step], part: Group) -> dict[str, Any]:
    steps = ruler[part.start:part.end]
    if len(steps) == 1:
        step = steps[0]
        return {"count": 1, "code": step.code, "address": f"{step.address:#x}", "symbol": step.symbol}
    return {"count": len(steps), "code": f"{len(steps)} instructions", "address": f"{steps[0].address:#x}",
            "symbol": f"{steps[0].symbol} … {steps[-1].symbol}"}


def _absent(lane: Recorded) -> dict[str, Any]:
    return {"technique": lane.choice.technique, "label": lane.choice.label, "reason": lane.reason, "groups": []}


def _lane(lane: Recorded, steps: list[Step], at: list[int], parts: list[Group]) -> dict[str, Any]:
    assert lane.trace is not None
    made = []
    j, last = 0, steps[0].before
    for part in parts:
        mine = []
        while j < len(steps) and at[j] < part.end:
            mine.append(steps[j])
            j += 1
        before = mine[0].before if mine else last
        last = (mine[-1].after or mine[-1].before) if mine else last
        events: dict[str, int] = {}
        for step in mine:
            for kind, count in step.events.items():
                events[kind] = events.get(kind, 0) + count
        made.append({"lines": _lines(mine), "steps": len(mine), "before": _state(before), "after": _state(last), "events": events})
    return {"technique": lane.choice.technique, "label": lane.choice.label, "platform": lane.trace.platform, "groups": made, "reason": "",
            "parameters": dict(lane.trace.parameters), "ended": len(steps) < len(lane.trace.steps) or not lane.trace.complete}


def _lines(steps: list[Step]) -> list[dict[str, Any]]:
    """What executed, a line per step; a long row keeps its beginning and what is eventful."""
    kept = list(range(len(steps)))
    if len(steps) > MOST_LINES:
        eventful = [i for i, step in enumerate(steps) if kind_of(step) != "instruction"]
        kept = sorted({*range(4), *eventful[:MOST_LINES - 5], len(steps) - 1})
    made: list[dict[str, Any]] = []
    previous = -1
    for i in kept:
        if i > previous + 1:
            made.append({"skipped": i - previous - 1})
        step = steps[i]
        line: dict[str, Any] = {"where": step.where, "address": f"{step.address:#x}", "code": step.code, "cpl": step.before.cpl}
        if kind_of(step) != "instruction":
            line |= {"kind": kind_of(step), "did": did(step)}
        made.append(line)
        previous = i
    return made


def _state(moment: Any) -> list[Any]:
    """[CPL, real IF, virtual IF, who waits, guest mode]."""
    return [moment.cpl, int(moment.real_if), int(moment.virtual_if), " and ".join(moment.pending), int(moment.guest_mode)]
