"""Traces: what the steps say is what the run did, on every technique; windows, filters, forms."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vmlab import costs, strategies
from vmlab.cli.main import main
from vmlab.errors import ConfigError
from vmlab.experiment.cell import Run
from vmlab.trace import Step, Trace, Trigger, did, kind_of, record
from vmlab.trace.chrome import chrome
from vmlab.trace.pricing import cycles

SMALL: dict[str, Any] = {"guest": "nano", "workload": "cli_sti", "iterations": 3, "density": 500}
TECHNIQUES = list(strategies.BUILT_IN)


@pytest.mark.parametrize("workload", ["cli_sti", "pushf_popf", "interrupt", "mixed"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_steps_add_up_to_the_regions_ledger(technique: str, workload: str) -> None:
    parameters = SMALL | {"workload": workload, "iterations": 2}
    if technique == "trap-and-emulate":
        parameters["sensitive"] = "trap"
    trace = record(technique, parameters)
    run = Run(technique, parameters, path="portable")
    run.go()
    region = run.marks["vmlab_roi_end"].minus(run.marks["vmlab_roi_begin"])
    added: Counter[str] = Counter()
    for step in trace.steps:
        added.update(step.events)
    # The marker's own instruction is recorded from the next one on, and the end is seen at the first instruction past it.
    assert trace.steps[0].number <= 1
    missing = {kind: n - added[kind] for kind, n in region.events.items() if added[kind] != n}
    assert sum(abs(n) for kind, n in missing.items() if not kind.startswith(("machine.", "retired.", "translated."))) == 0, missing
    assert abs(sum(step.instructions for step in trace.steps) - (region.user + region.kernel)) <= 4
    assert sum(abs(n) for n in missing.values()) <= 16


@pytest.mark.parametrize(("technique", "parameters"), [
    *((technique, SMALL | {"workload": "mixed", "iterations": 1}) for technique in TECHNIQUES),
    # A system's first touch of a page: faults, and REP over whole pages, which is looked at once.
    *(pytest.param(technique, {"guest": "minios", "workload": "pagefault", "iterations": 1, "memory": memory}, marks=marks)
      for technique, memory, marks in (("hardware-assisted", "tracing", ()), ("binary-translation", "tracing", pytest.mark.slow),
                                       ("paravirtualization", "direct", pytest.mark.slow)))])
def test_the_quick_ledger_is_the_runs_own_at_every_instruction(
    technique: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmlab.trace.ledger import RunningLedger

    quick, compared = RunningLedger.snapshot, 0

    def both(self: RunningLedger, upto: int) -> Any:
        nonlocal compared
        ours, whole = quick(self, upto), self._strategy.snapshot(upto)
        assert ({k: n for k, n in ours.events.items() if n}, ours.user, ours.kernel, ours.machine) == (
            {k: n for k, n in whole.events.items() if n}, whole.user, whole.kernel, whole.machine)
        compared += 1
        return ours

    monkeypatch.setattr(RunningLedger, "snapshot", both)
    record(technique, parameters)
    assert compared > 100


def steps(technique: str, **more: Any) -> list[Step]:
    return record(technique, SMALL | more).steps


def test_one_cli_five_ways() -> None:
    """The textbook's paragraph, read off the recorded flags."""
    def clis(technique: str) -> list[Step]:
        found = [s for s in steps(technique) if s.guest_code == "cli" or s.code == "cli" or (s.code.endswith(", 1") and "byte" in s.code)]
        return [s for s in found if s.instructions]

    for technique in TECHNIQUES:
        cli = clis(technique)[-1]
        assert cli.after is not None
        assert cli.before.virtual_if and not cli.after.virtual_if, technique
        assert cli.after.real_if == (technique != "native"), technique
    assert kind_of(clis("trap-and-emulate")[-1]) == "trap" and clis("trap-and-emulate")[-1].before.cpl == 1
    translated = clis("binary-translation")[-1]
    assert translated.where == "cache" and translated.code.startswith("mov byte ptr") and kind_of(translated) == "instruction"
    hardware = clis("hardware-assisted")[-1]
    assert hardware.code == "cli" and hardware.before.cpl == 0 and hardware.before.guest_mode


def test_popf_is_silent_at_cpl_1_and_traps_where_it_must() -> None:
    silent = [s for s in steps("trap-and-emulate", workload="pushf_popf", sensitive="silent") if s.code == "popfd"]
    trapped = [s for s in steps("trap-and-emulate", workload="pushf_popf", sensitive="trap") if s.code == "popfd"]
    assert silent and all(kind_of(s) == "instruction" and s.after is not None and not s.after.virtual_if for s in silent)
    assert trapped and all(kind_of(s) == "trap" and s.after is not None and s.after.virtual_if for s in trapped)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_an_interrupt_waits_for_the_virtual_flag(technique: str) -> None:
    place = next(s for s in steps("native") if s.code.startswith("add edi") and s.number > 10)
    found = record(technique, SMALL, interrupt=Trigger(4, address=place.address, visit=2)).steps
    waiting = [s for s in found if s.before.pending]
    assert waiting and not waiting[0].before.virtual_if, "it arrives while interrupts are off"
    delivered = next(s for s in found if {"interrupt.delivered", "interrupt.injected", "event.upcall"} & set(s.events))
    assert found.index(delivered) >= found.index(waiting[0])
    handler = next(s for s in found if s.code.startswith("pusha") or "upcall" in s.symbol or "pusha" in s.guest_code)
    assert found.index(handler) > found.index(waiting[0])


def test_a_window_is_what_was_asked_for() -> None:
    every = steps("native")
    some = record("native", SMALL, first=5, last=9)
    assert [s.address for s in some.steps] == [s.address for s in every if 5 <= s.number < 9]
    assert [s.address for s in record("native", SMALL, limit=3).steps] == [s.address for s in every[:3]]
    assert not some.complete
    with pytest.raises(ConfigError, match="nothing to record"):
        record("native", SMALL, first=9, last=9)
    boot = record("native", SMALL, whole=True, limit=5)
    assert boot.steps[0].number == 0 and boot.complete is False


@pytest.mark.slow
def test_recording_changes_nothing_that_the_guest_sees() -> None:
    plain = Run("trap-and-emulate", SMALL, path="portable")
    plain.go()
    watched = Run("trap-and-emulate", SMALL, path="portable")
    from vmlab.trace.recorder import Recorder

    recorder = Recorder(watched, 0, None, 10**9, True, None)
    watched.go()
    assert len(recorder.steps) > 1000
    assert watched.outcome(0) == plain.outcome(0) and watched.strategy.snapshot() == plain.strategy.snapshot()


def test_a_steps_cycles_are_its_events_prices() -> None:
    trace = record("trap-and-emulate", SMALL)
    found = cycles(trace, "prescott-2005")
    assert found is not None
    cli = next(i for i, s in enumerate(trace.steps) if s.code == "cli")
    assert found[cli] == pytest.approx(costs.nominal(trace.steps[cli].events, costs.load("prescott-2005"), "x86"))
    assert cycles(record("hardware-assisted", SMALL, limit=3), "k8-2005") is None


def test_words_say_what_was_counted() -> None:
    trap = next(s for s in steps("trap-and-emulate") if kind_of(s) == "trap")
    assert did(trap)[0] == "#GP into the VMM" and "CLI emulated by the VMM" in did(trap)


def check_trace_events(document: dict[str, Any]) -> None:
    """The rules of the Trace Event Format (Google, "Trace Event Format", JSON Object Format): what a phase needs, and units that nest."""
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {*document} <= {"traceEvents", "displayTimeUnit", "otherData"} and document["displayTimeUnit"] in ("ms", "ns")
    named: set[tuple[int, int]] = set()
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str) and event["name"] and isinstance(event["pid"], int)
        if event["ph"] == "M":  # metadata: no time; its name says which argument it has
            assert event["name"] in ("process_name", "thread_name") and {*event["args"]} == {"name"}
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "X":  # complete: a duration, on a thread
            assert event["dur"] >= 0 and isinstance(event["cat"], str)
            rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        else:  # counter: every argument a series of numbers
            assert event["ph"] == "C" and event["args"] and all(isinstance(value, (int, float)) for value in event["args"].values())
    assert {*rows} <= named, "every row has a name"
    for spans in rows.values():  # slices of one thread follow one another or nest, else a viewer drops them
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-6 * max(1.0, end)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_chrome_export_keeps_the_rules_of_its_format(technique: str) -> None:
    trace = record(technique, SMALL)
    lengths = cycles(trace, "prescott-2005") or []
    document = chrome(trace, lengths)
    check_trace_events(document)
    slices = [e for e in document["traceEvents"] if e["ph"] == "X" and e["tid"] != 4]
    assert [(e["name"], e["dur"]) for e in slices] == [(step.code, length) for step, length in zip(trace.steps, lengths, strict=True)]
    beside = [e["name"] for e in document["traceEvents"] if e["ph"] == "X" and e["tid"] == 4]
    assert beside == [kind_of(step) for step in trace.steps if kind_of(step) != "instruction"]
    flags = [e["args"] for e in document["traceEvents"] if e["ph"] == "C"]
    assert flags == [{"real": int(s.before.real_if), "virtual": int(s.before.virtual_if)} for s in trace.steps]


def test_the_rules_refuse_what_breaks_them() -> None:
    document = chrome(record("native", SMALL, limit=4), [1.0] * 4)
    for break_it in ({"dur": -1}, {"ts": -1.0}, {"name": ""}, {"ph": "Z"}, {"tid": 9}, {"dur": 50.0}):
        broken = json.loads(json.dumps(document))
        next(e for e in broken["traceEvents"] if e["ph"] == "X").update(break_it)
        with pytest.raises(AssertionError):
            check_trace_events(broken)


def test_filters_choose_steps_and_change_none(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["trace", "cli_sti", "--technique", "binary-translation", "--set", "density=500", "--set", "iterations=3", "--json", "--limit", "100000"]

    def lines(*more: str) -> list[dict[str, Any]]:
        assert main([*base, *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    every = lines()
    for kinds in ("callout", "callout,translation", "instruction", "trap"):
        assert lines("--kind", kinds) == [line for line in every if line["kind"] in kinds.split(",")], kinds
    assert lines("--from", "10", "--to", "20") == [line for line in every if 10 <= line["number"] < 20]
    assert lines("--kind", "instruction", "--limit", "3") == [line for line in every if line["kind"] == "instruction"][:3]


def test_the_command_prints_filters_and_exports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["trace", "cli_sti", "--technique", "trap-and-emulate", "--set", "density=500", "--set", "iterations=2"]
    assert main([*base, "--limit", "8"]) == 0
    assert "#GP into the VMM" in capsys.readouterr().out
    assert main([*base, "--kind", "trap", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and {line["kind"] for line in lines} == {"trap"}
    assert lines[0]["code"] == "cli" and lines[0]["after"]["virtual_if"] is False and lines[0]["cycles"] > 1000
    assert main([*base, "--chrome", str(tmp_path / "t.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["traceEvents"]


@pytest.mark.parametrize(("more", "said"), [
    (["--kind", "trp"], "trap"), (["--interrupt", "x"], "7:4"), (["--from", "5", "--to", "2"], "nothing to record"),
    (["--profile", "prescot"], "prescott"), (["--set", "densty=3"], "density")])
def test_wrong_use_is_one_sentence(capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert main(["trace", "cli_sti", "--technique", "native", *more]) == 2
    assert said in capsys.readouterr().err


def test_a_trace_is_the_same_twice() -> None:
    def once() -> Trace:
        return record("paravirtualization", SMALL)

    assert once() == once()
