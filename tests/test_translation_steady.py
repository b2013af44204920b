"""The translator once it is warm: on the operating system's mixed load, everything on."""

from __future__ import annotations

import json

import pytest

from vmlab.cli.main import main
from vmlab.vmm.translation.steady import row


def steady(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, float]]:
    assert main(["translate", "minios", "--workload", "mixed", "--steady", "--json", *more]) == 0
    found: list[dict[str, float]] = json.loads(capsys.readouterr().out)["halves"]
    return found


@pytest.mark.parametrize("memory", ["tracing", pytest.param("lazy", marks=pytest.mark.slow)])
def test_a_warm_translator_is_left_alone(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than one entry for translation or control flow, and one translation, in 1000 units; no sensitive instruction is copied."""
    first, second = steady(capsys, "--set", f"memory={memory}")
    assert second["units"] > 50_000
    assert second["entries_per_1000"] < 1
    assert second["translated_per_1000"] < 1
    assert first["entries"] > 10 * second["entries"] > 0      # the guest is not done learning in the first half, nor quite in the second
    assert first["sensitive"] == second["sensitive"] == 0
    assert second["callouts"] > 0 < second["interrupts"]


def test_without_chaining_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """The measure can fail."""
    _, second = steady(capsys, "--set", "memory=tracing", "--set", "chaining=off", "--iterations", "4")
    assert second["entries_per_1000"] > 100


def test_entries_are_those_for_translation_or_control_flow() -> None:
    events = {"translated.unit": 2000, "bt.callout.chain": 3, "bt.callout.indirect": 1, "bt.callout.in": 5, "bt.callout.adapted": 2,
              "bt.translate.unit": 1, "interrupt.injected": 7, "translated.sensitive": 0}
    assert row(events) == {"units": 2000, "entries": 4, "translated": 1, "entries_per_1000": 2.0, "translated_per_1000": 0.5, "callouts": 7,
                           "interrupts": 7, "sensitive": 0}
    assert row({})["entries_per_1000"] is None
