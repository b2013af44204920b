"""README.md and the notebook of a folder, made from its ``course.yaml``: one text, read on paper, on a terminal or run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmlab.coursework.course import Course, Exercise


def readme(course: Course) -> str:
    """The folder's README.md."""
    parts = [
        f"# {course.title}", f"**Question.** {course.question}",
        f"```sh\nvmlab experiment {course.configuration.name}\n```",
        f"(in this folder; {course.takes})", "**Look for**", "\n".join(f"- {line}" for line in course.look_for), "**Exercises**",
    ]
    for number, exercise in enumerate(course.exercises, 1):
        commands = "\n".join(f"   {line}" for line in ("```sh", *exercise.tries, f"vmlab answer {course.name}/{exercise.id} ANSWER", "```"))
        parts.append(f"{number}. **{exercise.title}.** {exercise.ask}\n\n{commands}")
    parts.append(f"The same as a notebook: `{course.name}.ipynb`. Claims: {', '.join(f'`{name}`' for name in course.claims)}.")
    return "\n\n".join(parts) + "\n"


def notebook(course: Course) -> str:
    """The folder's notebook, nbformat 4.5, without outputs. Each answer is a line ``answer = None`` to be filled in."""
    imports = "import vmlab\n" if any("vmlab.run(" in exercise.code for exercise in course.exercises) else ""
    cells = [
        _markdown("head", f"# {course.title}\n\n**Question.** {course.question}\n\n"
                          f"Run the cells from the top ({course.takes} for the configuration)."),
        _code("run", f'{imports}from vmlab import coursework\n\ncourse = coursework.load(".")  # {course.configuration.name} beside this file\n'
                     "results = course.run()"),
        _markdown("look", "**Look for**\n\n" + "\n".join(f"- {line}" for line in course.look_for)),
    ]
    for number, exercise in enumerate(course.exercises, 1):
        cells += _exercise(number, exercise)
    return json.dumps({
        "cells": cells,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}},
        "nbformat": 4, "nbformat_minor": 5,
    }, indent=1, ensure_ascii=False) + "\n"


def _exercise(number: int, exercise: Exercise) -> list[dict[str, Any]]:
    return [
        _markdown(f"{exercise.id}-ask", f"## {number}. {exercise.title}\n\n{exercise.ask}"),
        *([_code(f"{exercise.id}-try", exercise.code.rstrip())] if exercise.code else []),
        _code(f"{exercise.id}-answer", f'answer = None\ncourse.answer("{exercise.id}", answer)'),
    ]


def _markdown(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "id": name, "metadata": {}, "outputs": [], "source": text.splitlines(keepends=True)}


def files(course: Course) -> dict[Path, str]:
    """What is generated: file -> content."""
    return {course.folder / "README.md": readme(course), course.folder / f"{course.name}.ipynb": notebook(course)}
