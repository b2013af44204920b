"""Records a scenario's lanes and lays them out in step: the data of a stepper page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmlab.errors import VmlabError
from vmlab.parameters import Value
from vmlab.trace.align import Group, groups, places
from vmlab.trace.listing import Listing
from vmlab.trace.recorder import Moment, Step, Trace, Trigger, record
from vmlab.trace.scenarios import LaneChoice, Scenario
from vmlab.trace.words import did, eventful, in_words, kind_of

#: A region of up to so many guest instructions is shown instruction by instruction; of a longer one quiet stretches are folded.
MOST_GROUPS = 90
#: Lines of executed code shown for one instruction and lane; of more, stretches without event are folded.
MOST_LINES = 14
#: Steps of a lane recorded at most: ten times what the longest scenario's takes.
MOST_STEPS = 1_000_000

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
            trace = record(choice.technique, parameters, limit=MOST_STEPS, interrupt=interrupt or _first_trigger(scenario), registers=False)
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

    ``codes`` is the table of instructions that the paths of folded stretches go through (:mod:`vmlab.trace.listing`).

    :raises VmlabError: the bare machine itself could not be recorded.
    """
    first = lanes[0]
    if first.trace is None:
        raise VmlabError(f"{scenario.name}: the bare machine could not be recorded: {first.reason}")
    ruler, listing = first.trace.steps, Listing()
    placed = {id(lane): places(ruler, lane.trace.steps) for lane in lanes if lane.trace is not None}
    parts = groups(ruler, [(lane.trace.steps, placed[id(lane)]) for lane in lanes if lane.trace is not None], MOST_GROUPS)
    return {
        "name": scenario.name, "title": scenario.title, "look": scenario.look, "instructions": len(ruler),
        "groups": [_group(ruler, part) for part in parts],
        "lanes": [_absent(lane) if lane.trace is None else _lane(lane.choice, lane.trace, placed[id(lane)], parts, listing) for lane in lanes],
        "codes": listing.rows,
    }


def _group(ruler: list[Step], part: Group) -> dict[str, Any]:
    steps = ruler[part.start:part.end]
    at = {"first": part.start + 1, "count": len(steps), "address": f"{steps[0].address:#x}"}
    if len(steps) == 1:
        return at | {"code": steps[0].code, "symbol": steps[0].symbol}
    functions = list(dict.fromkeys(step.symbol.partition("+")[0] for step in steps if step.symbol))
    words = ", ".join(functions[:_FUNCTIONS]) + (f" and {len(functions) - _FUNCTIONS} more" if len(functions) > _FUNCTIONS else "")
    return at | {"code": f"{len(steps):,} instructions", "symbol": words}


#: Functions named in the line of a folded stretch.
_FUNCTIONS = 3


def _absent(lane: Recorded) -> dict[str, Any]:
    return {"technique": lane.choice.technique, "label": lane.choice.label, "reason": lane.reason, "groups": []}


def _lane(choice: LaneChoice, trace: Trace, at: list[int], parts: list[Group], listing: Listing) -> dict[str, Any]:
    made = []
    j, last = 0, trace.steps[0].before
    for part in parts:
        mine = []
        while j < len(at) and at[j] < part.end:
            mine.append(trace.steps[j])
            j += 1
        before = mine[0].before if mine else last
        last = (mine[-1].after or mine[-1].before) if mine else last
        made.append({"lines": _lines(mine, part.end - part.start > 1, listing), "steps": len(mine), "before": _state(before), "after": _state(last),
                     "events": _sum(mine)})
    return {"technique": choice.technique, "label": choice.label, "platform": trace.platform, "groups": made, "reason": "",
            "parameters": dict(trace.parameters)}


def _sum(steps: list[Step]) -> dict[str, int]:
    events: dict[str, int] = {}
    for step in steps:
        for kind, count in step.events.items():
            events[kind] = events.get(kind, 0) + count
    return events


def _lines(steps: list[Step], folded: bool, listing: Listing) -> list[dict[str, Any]]:
    """What executed, a line per step; of a long row, and of a folded stretch, what is quiet runs together."""
    if len(steps) <= MOST_LINES and not folded:
        return [_line(step) for step in steps]
    made: list[dict[str, Any]] = []
    quiet: list[Step] = []
    for step in [*steps, None]:
        if step is not None and not eventful(step):
            quiet.append(step)
            continue
        if len(quiet) > 1:
            happened = _sum([one for one in quiet if kind_of(one) != "instruction"])
            made.append({"skipped": len(quiet), "path": listing.path(quiet), "did": in_words(happened)})
        else:
            made += [_line(one) for one in quiet]
        quiet = []
        if step is not None:
            made.append(_line(step))
    return made


def _line(step: Step) -> dict[str, Any]:
    line: dict[str, Any] = {"where": step.where, "address": f"{step.address:#x}", "code": step.code, "cpl": step.before.cpl}
    return line if kind_of(step) == "instruction" else line | {"kind": kind_of(step), "did": did(step)}


def _state(moment: Moment) -> list[Any]:
    """[CPL, real IF, virtual IF, who waits, guest mode]."""
    return [moment.cpl, int(moment.real_if), int(moment.virtual_if), " and ".join(moment.pending), int(moment.guest_mode)]
