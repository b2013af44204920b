"""The probe: what classical x86 lets pass, on both machine paths."""

from __future__ import annotations

import json

import pytest

from vmlab.cli.main import main
from vmlab.probe import probe


def verdicts(**options: str) -> dict[str, str]:
    return {row["instruction"]: row["verdict"] for row in probe([], options.get("sensitive", "silent"))["rows"]}


def test_classical_x86() -> None:
    found = verdicts()
    assert found["CLI"] == found["HLT"] == found["LGDT"] == found["IN"] == "traps"
    assert found["POPF"] == found["SGDT"] == found["PUSH CS"] == found["SMSW"] == "silently different"
    assert found["CPUID"] == "same"


def test_the_hypothetical_x86_traps() -> None:
    found = verdicts(sensitive="trap")
    assert found["POPF"] == found["SGDT"] == found["PUSH CS"] == found["SMSW"] == "traps"


def test_both_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for path in ("portable", "auto"):
        monkeypatch.setenv("VMLAB_MACHINE", path)
        rows[path] = probe([], "silent")["rows"]
    assert rows["portable"] == rows["auto"]


def test_json_and_unknown_instruction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {claim["id"]: claim["verdict"] for claim in result["claims"]} == {"popek-goldberg": "holds", "ring-visible": "holds"}
    assert main(["probe", "popff"]) == 2
    assert "popf" in capsys.readouterr().err.lower()


@pytest.mark.parametrize("path", ["portable", "auto"])
def test_ring_1_is_supervisor_to_paging_in_64_bit_mode(path: str) -> None:
    from vmlab.probe.rings import rings

    for row in rings(path):
        assert (row["cpl0"], row["cpl1"]) == ("runs", "runs") and row["cpl3"].startswith("#PF"), row
