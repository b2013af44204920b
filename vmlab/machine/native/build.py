"""Turn the C files here into a shared library: at installation, or at first use where there is a compiler.

The library needs no Python headers and no libraries, and its file carries the sources' hash in its name: one that
does not belong to the sources at hand is never loaded. ``setup.py`` runs this file by its path, before
vmlab's dependencies exist, hence it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(sorted(HERE.glob("*.c")))
HEADERS = tuple(sorted(HERE.glob("*.h")))
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_SECONDS = 60


class Unavailable(Exception):
    """There is no library; the message says why, in a sentence without a full stop."""


def file_name(sources: Sequence[Path] | None = None) -> str:
    """``machine-<hash>.so`` (.dll, .dylib). Line ends do not matter, since version control may change them."""
    text = "".join(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources or (*SOURCES, *HEADERS))
    return f"machine-{hashlib.sha256(text.encode()).hexdigest()[:12]}{_SUFFIX}"


def compilers() -> list[list[str]]:
    """Commands to try, best first: ``CC`` where it is set, else what is usual."""
    chosen = shlex.split(os.environ.get("CC", ""))
    candidates = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    return [[found, *command[1:]] for command in candidates if (found := shutil.which(command[0]))]


def cache_directory() -> Path:
    """The user's own place for built libraries, one for each kind of host; it need not exist."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vmlab" / sysconfig.get_platform()


def compile_library(target: Path) -> None:
    """Compile the sources to ``target``, which appears whole or not at all. Raises :class:`Unavailable`."""
    commands = compilers()
    if not commands:
        raise Unavailable("no prebuilt library and no C compiler (cc, gcc, clang, or the one that CC names)")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only a directory of one's own keeps others from reading, or writing, what will be loaded.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            product = Path(scratch) / target.name
            for command in commands:
                complaint = _run([*command, *_options(), "-o", str(product), *map(str, SOURCES)])
                if product.exists():
                    _move(product, target)
                    return
            raise Unavailable(f"{command[0]} cannot build it: {complaint or 'it said nothing'}")
    except OSError as error:
        raise Unavailable(f"it cannot be written: {error}") from error


def _options() -> list[str]:
    return ["-O2", "-shared"] if sys.platform == "win32" else ["-O2", "-shared", "-fPIC", "-fvisibility=hidden"]


def _run(command: list[str]) -> str:
    """Run a compiler; its complaints, as one short line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {_SECONDS} seconds"
    return " ".join(done.stderr.split())[:300]


def _move(product: Path, target: Path) -> None:
    """Put the library in its place; another process may have done so, and Windows keeps a loaded file."""
    try:
        os.replace(product, target)
    except PermissionError:
        if not target.exists():
            raise
