"""Builds ``hog.elf``: ``python -m vmlab.guests.hog.build``. Needs GNU ``as`` and ``ld``; everybody else uses the committed image.

``image.lock`` ties the image to its source, as nano's does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from vmlab.guests.nano.build import tools

HERE = Path(__file__).resolve().parent
SOURCE, IMAGE, LOCK = "hog.S", "hog.elf", "image.lock"


def source() -> bytes:
    """The source with line ends as ``\\n``, so that a Windows checkout agrees."""
    return (HERE / SOURCE).read_bytes().replace(b"\r\n", b"\n")


def build() -> bytes:
    """The image, built anew in a temporary directory. Raises ``CalledProcessError`` with the tool's words shown."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / SOURCE).write_bytes(source())
        subprocess.run(["as", "--32", "--fatal-warnings", "-o", "hog.o", SOURCE], cwd=work, check=True)
        # The header must lie in the first 8 KiB of the file: sections in the order of the object, from 1 MiB on.
        subprocess.run(
            ["ld", "-m", "elf_i386", "--build-id=none", "-N", "-z", "noexecstack", "--no-warn-rwx-segments", "--section-start=.multiboot=0x100000",
             "-Ttext", "0x100010", "-Tdata", "0x101000", "-Tbss", "0x102000", "-e", "start", "-o", IMAGE, "hog.o"], cwd=work, check=True)
        return (work / IMAGE).read_bytes()


def main() -> None:
    """Build, and write the image and the lock beside the source."""
    image = build()
    (HERE / IMAGE).write_bytes(image)
    lock = {"image": IMAGE, "image_sha256": hashlib.sha256(image).hexdigest(), "source_sha256": hashlib.sha256(source()).hexdigest(),
            "tools": tools()}
    (HERE / LOCK).write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(f"{IMAGE}: {len(image)} bytes")


if __name__ == "__main__":
    main()
