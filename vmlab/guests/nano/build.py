"""Builds ``nano.elf`` from its sources: ``python -m vmlab.guests.nano.build``. For developers of the kernel only.

Needs GNU ``as`` and ``ld`` with i386 support. Everybody else uses the committed image; ``image.lock`` ties it to
the sources (both hashes) and to the versions of the tools, with which a rebuild is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OBJECTS = ("boot", "console", "paravirt", "generate", "workloads", "recipes")
SOURCES = ("nano.inc", *(f"{name}.S" for name in OBJECTS), "nano.lds")
IMAGE = "nano.elf"
LOCK = "image.lock"


def source_hash() -> str:
    """SHA-256 over the sources in order, with line ends as ``\\n`` so that a Windows checkout agrees."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(name.encode() + b"\0")
        digest.update((HERE / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def tools() -> dict[str, str] | None:
    """First line of each tool's version, or None where one is absent."""
    versions = {}
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            return None
        run = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        versions[tool] = run.stdout.splitlines()[0]
    return versions


def build() -> bytes:
    """The image, built anew in a temporary directory. Raises ``CalledProcessError`` with the tool's words shown."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in SOURCES:
            (work / name).write_bytes((HERE / name).read_bytes().replace(b"\r\n", b"\n"))
        for name in OBJECTS:
            subprocess.run(["as", "--32", "--fatal-warnings", "-o", f"{name}.o", f"{name}.S"], cwd=work, check=True)
        subprocess.run(
            ["ld", "-m", "elf_i386", "--build-id=none", "-T", "nano.lds", "-o", IMAGE, *(f"{n}.o" for n in OBJECTS)],
            cwd=work, check=True,
        )
        return (work / IMAGE).read_bytes()


def read_lock() -> dict[str, object]:
    """The lock file's content."""
    lock: dict[str, object] = json.loads((HERE / LOCK).read_text(encoding="utf-8"))
    return lock


def main() -> None:
    """Build, and write the image and the lock beside the sources."""
    image = build()
    (HERE / IMAGE).write_bytes(image)
    lock = {
        "image": IMAGE,
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "source_sha256": source_hash(),
        "sources": list(SOURCES),
        "tools": tools(),
    }
    (HERE / LOCK).write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(f"{IMAGE}: {len(image)} bytes, SHA-256 {lock['image_sha256']}")


if __name__ == "__main__":
    main()
