"""``vmlab answer``: is the answer to an exercise of the coursework right?"""

from __future__ import annotations

import argparse

from vmlab.cli.output import table
from vmlab.errors import ConfigError

EXAMPLE = """\
examples:
  vmlab answer                              the exercises
  vmlab answer paravirtual/batch-8          what is asked
  vmlab answer paravirtual/batch-8 42       right or not, with a hint
  vmlab answer trapping/write-a-strategy mine.py:MineStrategy
  vmlab answer cli/price-trapped --solution what is right, for a teacher

What is right is not stored: it is counted, priced or judged now, on runs kept below results/.
Exit status: 0 right, or nothing was answered; 1 not right; 2 no such exercise, or an answer of another form.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("exercise", nargs="?", metavar="FOLDER/EXERCISE", help="which one (default: name them all)")
    parser.add_argument("answer", nargs="?", metavar="ANSWER", help="yours (default: say what is asked)")
    parser.add_argument("--solution", action="store_true", help="say what is right")


def run(arguments: argparse.Namespace) -> int:
    """Check an answer; see :data:`EXAMPLE` for the exit status."""
    from vmlab import coursework

    if arguments.exercise is None:
        courses = map(coursework.load, coursework.names())
        rows = [[f"{course.name}/{exercise.id}", exercise.title] for course in courses for exercise in course.exercises]
        print(table(["exercise", "title"], rows))
        print("\nvmlab new coursework DIR copies their folders out.")
        return 0
    folder, slash, name = arguments.exercise.rpartition("/")
    if not slash:
        raise ConfigError(f"answer: write FOLDER/EXERCISE, as paravirtual/batch-8, not {arguments.exercise!r}; 'vmlab answer' names them")
    course = coursework.load(folder)
    if arguments.solution:
        print(f"{course.name}/{name}: {course.solution(name).words}")
        return 0
    reply = course.answer(name, arguments.answer)
    print(reply.words)
    return 1 if reply.right is False else 0
