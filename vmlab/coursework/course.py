"""A folder of the coursework, as its ``course.yaml`` says it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmlab.coursework import answers
from vmlab.coursework.answers import Reply
from vmlab.coursework.folders import names, root
from vmlab.errors import ConfigError
from vmlab.parameters import nearest

_TOP = ("order", "title", "question", "takes", "claims", "look_for", "exercises")
_EXERCISE = ("id", "title", "ask", "answer", "hint")
_OPTIONAL = ("try", "code", "cells")


@dataclass(frozen=True)
class Exercise:
    """One exercise. ``tries`` are commands, ``code`` the same in Python; ``cells`` are the runs that the right answer comes from."""

    id: str
    title: str
    ask: str
    answer: Mapping[str, Any]
    hint: str
    tries: tuple[str, ...] = ()
    code: str = ""
    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """A folder: its question, configuration, and exercises."""

    folder: Path
    order: int
    title: str
    question: str
    takes: str
    claims: tuple[str, ...]
    look_for: tuple[str, ...]
    exercises: tuple[Exercise, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def configuration(self) -> Path:
        """The experiment's file: the one YAML file beside ``course.yaml``."""
        found = [path for path in sorted(self.folder.glob("*.yaml")) if path.name != "course.yaml"]
        if len(found) != 1:
            raise ConfigError(f"{self.folder}: one configuration is needed beside course.yaml, not {len(found)}")
        return found[0]

    def exercise(self, name: str) -> Exercise:
        """:raises ConfigError: there is none of that name (says the nearest)."""
        for exercise in self.exercises:
            if exercise.id == name:
                return exercise
        known = [exercise.id for exercise in self.exercises]
        raise ConfigError(f"{self.name} has no exercise {name!r}{nearest(name, known)}")

    def run(self, jobs: int = 2) -> dict[str, Any]:
        """Run the configuration into ``results/``, print table and verdicts, and return what results.json holds.

        :raises ConfigError: the configuration is broken.
        """
        from vmlab.experiment import schema, yamlfile
        from vmlab.experiment.lab import Lab
        from vmlab.experiment.runner import Options, Run

        lab = Lab()
        outcome = Run(schema.load(yamlfile.read(self.configuration), lab), lab, Options(jobs)).execute(lambda _id, _status, _seconds: None)
        print(lab.terminal_table(outcome.results), "", *lab.summary(outcome.results), sep="\n")
        for claim in outcome.results["claims"]:
            print(f"{claim['verdict']:<10} {claim['id']}: {claim['statement']}")
        print(f"The report: {outcome.report}")
        return outcome.results

    def answer(self, name: str, answer: object = None) -> Reply:
        """Whether ``answer`` is right; without one, what is asked.

        :raises ConfigError: no such exercise, or an answer of another form than is asked for.
        """
        return answers.check(self.exercise(name), answer)

    def vmlab(self, line: str) -> None:
        """Run the ``vmlab`` command with these words, by this Python, and print what it says; for notebooks, whose shell may know no vmlab."""
        done = subprocess.run([sys.executable, "-m", "vmlab", *shlex.split(line)], capture_output=True, text=True, encoding="utf-8", check=False)
        print(done.stdout + done.stderr, end="")

    def solution(self, name: str) -> answers.Truth:
        """What is right, for a teacher: counted, priced or judged now."""
        return answers.truth(self.exercise(name))


def load(where: str | Path) -> Course:
    """The folder of that name, or at that path.

    :raises ConfigError: there is none, or its ``course.yaml`` is broken.
    """
    folder = root() / where if str(where) in names() else Path(where)
    if not (folder / "course.yaml").is_file():
        raise ConfigError(f"{str(where)!r} is neither a folder with a course.yaml nor one of the coursework's{nearest(str(where), names())}")
    return read(folder / "course.yaml")


def read(file: Path) -> Course:
    """A ``course.yaml``.

    :raises ConfigError: unreadable, a key that is missing or unknown, an answer of no known kind.
    """
    from vmlab.costs.figures import read_yaml

    data = read_yaml(file)
    shown = f"{file.parent.name}/{file.name}"
    _keys(shown, data, _TOP, ())
    exercises = []
    for raw in data["exercises"]:
        _keys(f"{shown}: {raw.get('id')}", raw, _EXERCISE, _OPTIONAL)
        kind = raw["answer"].get("kind")
        if kind not in answers.KINDS:
            raise ConfigError(f"{shown}: {raw['id']}: no kind of answer {kind!r}{nearest(str(kind), answers.KINDS)}")
        exercises.append(Exercise(
            raw["id"], raw["title"], _text(raw["ask"]), raw["answer"], _text(raw["hint"]), tuple(raw.get("try", ())), raw.get("code", ""),
            raw.get("cells", {})))
    return Course(
        file.parent.resolve(), int(data["order"]), data["title"], _text(data["question"]), data["takes"], tuple(data["claims"]),
        tuple(map(_text, data["look_for"])), tuple(exercises))


def _keys(where: str, data: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in data:
        if key not in (*needed, *optional):
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), (*needed, *optional))}")
    for key in needed:
        if key not in data:
            raise ConfigError(f"{where}: lacks {key}")


def _text(value: object) -> str:
    return " ".join(str(value).split())
