"""``vmlab new``: something to start from. A strategy that runs, is wrong where classical x86 is, and says so; the coursework to work in."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from vmlab.errors import ConfigError

EXAMPLE = """\
examples:
  vmlab new strategy mine                  writes mine.py here: class MineStrategy
  vmlab new strategy mine --dir coursework
  vmlab run cli_sti --strategy mine.py:MineStrategy --iterations 1000
  vmlab new coursework                     writes the folders of questions and exercises into coursework/
  vmlab new coursework lab1

A file that exists is never overwritten, and a folder must be absent or empty (exit status 2).
"""

#: What NAME may be: it becomes a file, a class and a technique's name.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")

TEMPLATE = '''\
"""{name}: a strategy to finish. docs/writing-a-strategy.md is its manual.

It is trap-and-emulate on classical x86: the guest's kernel runs at CPL 1, and what is privileged traps to the monitor.
Some sensitive instructions are not privileged, and nobody has done anything about that here. MISSING says what follows.

    vmlab run cli_sti --strategy {file}:{cls} --iterations 1000        right
    vmlab run pushf_popf --strategy {file}:{cls} --iterations 1000     wrong, and says where it shows

In a checkout of vmlab, the whole suite:

    python -m pytest tests/test_conformance.py --technique {file}:{cls}
"""

from vmlab.machine.decode import Instruction
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

#: Workloads of nano on which this file fails the conformance suite, and why. Strike out what you have mended.
MISSING = {{
{missing}}}

#: Instructions that raise #GP above CPL 0 although x86 lets them pass. Empty: x86 as it was. The inherited emulate()
#: knows how to carry out those in vmlab.strategies.trap_and_emulate.SENSITIVE once they trap: which ones does MISSING need?
#: (No CPU of the time could be told to trap them. A monitor for a real one has to find them before they run: translation.)
TRAPPING: frozenset[str] = frozenset()


class {cls}(TrapAndEmulate):
    """Trap-and-emulate, to be finished."""

    name = "{name}"
    summary = "trap-and-emulate, to be finished"
    #: What a cell may choose. "sensitive" is left out: which instructions trap is decided above, in this file.
    parameters = {{key: value for key, value in TrapAndEmulate.parameters.items() if key != "sensitive"}}

    def __init__(self, machine, parameters=None):
        # Frames that the monitor builds show the guest the privilege that it believes in, once IRET, which reads them, traps.
        super().__init__(machine, {{**(parameters or {{}}), "sensitive": "trap" if "iret" in TRAPPING else "silent"}})
        machine.trapping = TRAPPING

    @classmethod
    def unfaithful(cls, workload, parameters):
        """A strategy that knows that it changes an outcome says why here. This one claims to be right everywhere, and is not yet."""
        return None

    def emulate(self, instruction: Instruction) -> None:
        """Called at each #GP of the guest's kernel, with the instruction that caused it.

        Yours goes here: look at ``instruction.op``, read and write the guest's registers by ``self.vcpu.gpr(i)`` and
        ``self.vcpu.set_gpr(i, value)``. What you count goes to ``self.counts``; ``emulate.<op>`` is counted for you.
        """
        super().emulate(instruction)
'''


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("kind", choices=("strategy", "coursework"), metavar="KIND", help="strategy or coursework")
    parser.add_argument("name", nargs="?", metavar="NAME",
                        help="of a strategy: letters, digits, _ and -, the file is NAME.py; of coursework: the folder (default: coursework)")
    parser.add_argument("--dir", dest="folder", type=Path, default=Path(), metavar="DIR", help="the folder to write it to (default: here)")


def run(arguments: argparse.Namespace) -> int:
    """Write it; of a strategy say what passes and what is missing."""
    if arguments.kind == "coursework":
        return _coursework(arguments.folder / (arguments.name or "coursework"))
    from vmlab import strategies

    if arguments.name is None:
        raise ConfigError("new strategy: a name is needed, as in 'vmlab new strategy mine'")
    name: str = arguments.name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"new strategy: {name!r} is not a name: a letter, then letters, digits, _ or -, 41 at most")
    technique = name.lower().replace("_", "-")
    if technique in strategies.names():
        raise ConfigError(f"new strategy: {technique!r} is a technique already; choose another name")
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise ConfigError(f"new strategy: there is no folder {str(folder)!r}")
    path = folder / f"{name}.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text(name))
    except FileExistsError:
        raise ConfigError(f"new strategy: {path} exists; it is left as it is") from None
    except OSError as error:
        raise ConfigError(f"new strategy: {path} cannot be written: {error.strerror or error}") from error
    print(screen(path))
    return 0


def _coursework(target: Path) -> int:
    """Copy the folders out and say how to begin."""
    from vmlab import coursework

    written = coursework.copy(target)
    courses = [coursework.load(target / name) for name in coursework.names()]
    print(f"{len(written)} files in {target}: README.md for the teacher, and a folder for each question.\n")
    print("\n".join(f"  {course.name:<12} {course.title}" for course in courses))
    print(f"\nTry:\n  cd {target / courses[0].name}\n  vmlab experiment {courses[0].configuration.name}\n"
          f"  vmlab answer {courses[0].name}/{courses[0].exercises[0].id}\n"
          f"  jupyter lab {courses[0].name}.ipynb        (where Jupyter is installed)")
    return 0


def class_name(name: str) -> str:
    """``my-own`` becomes ``MyOwnStrategy``: never a keyword of Python, nor a name that the file imports."""
    return "".join(part[:1].upper() + part[1:] for part in re.split("[_-]", name)) + "Strategy"


def missing() -> dict[str, str]:
    """The workloads on which the new file is wrong, with the reason: those that classical x86 spoils."""
    from vmlab.strategies.techniques import TrapAndEmulateTechnique

    return dict(TrapAndEmulateTechnique.SILENT_DAMAGE["nano"])


def text(name: str) -> str:
    """The new file."""
    lines = "".join(f'    "{workload}": "{why}",\n' for workload, why in missing().items())
    return TEMPLATE.format(name=name.lower().replace("_", "-"), file=f"{name}.py", cls=class_name(name), missing=lines)


def screen(path: Path) -> str:
    """What was written, what it can do, what it cannot."""
    from vmlab import guests

    lacking = missing()
    right = [workload for workload in guests.workloads("nano") if workload not in lacking]
    strategy = f"{path}:{class_name(path.stem)}"
    return "\n".join([
        f"{path} is written: trap-and-emulate on classical x86, to be finished.", "",
        f"Right already: {', '.join(right)}.", "Missing:", *(f"  {workload}: {why}" for workload, why in lacking.items()), "",
        "Try:",
        f"  vmlab run {right[0]} --strategy {strategy} --iterations 1000",
        f"  vmlab run {next(iter(lacking))} --strategy {strategy} --iterations 1000",
        f"  vmlab answer trapping/write-a-strategy {strategy}        is it right everywhere?",
        "In a checkout of vmlab, all that is asked of a technique:",
        f"  python -m pytest tests/test_conformance.py --technique {strategy}",
    ])
