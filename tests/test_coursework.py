"""The coursework: each configuration gives the verdicts that its text relies on, and each command in the text is one that vmlab takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vmlab.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent.name for path in ROOT.glob("experiments/*/README.md"))
TEXTS = sorted(ROOT.glob("experiments/**/README.md"))
COMMANDS = sorted({line.strip() for text in TEXTS for line in text.read_text("utf-8").splitlines() if line.strip().startswith("vmlab ")})


def parse(command: str) -> argparse.Namespace:
    words = shlex.split(command)
    assert words[1] in VERBS
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"vmlab.cli.{words[1]}").configure(parser)
    return parser.parse_args(words[2:])


def test_the_folders_are_on_the_teachers_page() -> None:
    page = (ROOT / "experiments/README.md").read_text("utf-8")
    assert FOLDERS == ["cli", "memory", "verdicts"]
    assert all(f"({name}/README.md)" in page for name in FOLDERS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "memory" else []) for name in FOLDERS])
def test_a_configuration_gives_the_expected_verdicts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = ROOT / f"experiments/{name}/{name}.yaml"
    assert main(["experiment", str(file), "--strict", "--jobs", "2", "--out", "out"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_text_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = parse(command)
    if command.startswith("vmlab experiment "):
        assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    assert parsed is not None


def test_the_verdict_flips_within_the_range_as_the_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["claims", "trap-vs-callout-vs-incache", "--brief"]) == 0
    assert re.search(r"(?i)^holds +trap-vs", capsys.readouterr().out, re.M)
    assert main(["claims", "trap-vs-callout-vs-incache", "--brief", "--cost", "prescott-2005:path.callout=570"]) == 0
    assert not re.search(r"(?i)^holds +trap-vs", capsys.readouterr().out, re.M)
