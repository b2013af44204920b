"""Where the folders are, and a copy of them to work in."""

from __future__ import annotations

import shutil
from pathlib import Path

from vmlab.errors import ConfigError

#: What is copied of a folder; a checkout may hold runs beside it.
_SUFFIXES = (".md", ".yaml", ".ipynb")


def root() -> Path:
    """``experiments/`` of a checkout, ``vmlab/coursework/folders`` when installed."""
    package = Path(__file__).resolve().parent
    checkout = package.parent.parent / "experiments"
    return checkout if (package.parent.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "folders"


def names() -> list[str]:
    """The folders' names, in the order of the teacher's page (``order`` in each ``course.yaml``)."""
    from vmlab.coursework.course import read

    found = [read(path) for path in root().glob("*/course.yaml")]
    return [course.name for course in sorted(found, key=lambda course: (course.order, course.name))]


def copy(target: Path) -> list[Path]:
    """Copy every folder, with the teacher's page, into ``target``, which is made; the files written.

    :raises ConfigError: ``target`` holds something already, or cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise ConfigError(f"new coursework: {target} is not empty; nothing is overwritten")
        written = []
        for source in sorted(path for path in root().rglob("*") if path.suffix in _SUFFIXES and _ours(path)):
            to = target / source.relative_to(root())
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, to)
            written.append(to)
        return written
    except OSError as error:
        raise ConfigError(f"new coursework: {target} cannot be written: {error.strerror or error}") from error


def _ours(path: Path) -> bool:
    """Whether a file is of the coursework: the teacher's page, or directly in one of its folders."""
    return path.parent == root() or (path.parent.parent == root() and (path.parent / "course.yaml").is_file())
