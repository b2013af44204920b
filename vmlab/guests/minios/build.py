"""Builds ``minios.elf`` and ``minios64.elf``: ``python -m vmlab.guests.minios.build``. For developers of the kernel only.

Needs GNU C, ``as``, ``ld`` and ``objcopy`` for i386 and x86-64. Everybody else uses the committed images; ``image.lock``
ties them to the sources (all hashes) and to the versions of the tools, with which a rebuild is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = "image.lock"
TOOLS = ("gcc", "as", "ld", "objcopy")

#: By image: width in bits, and what only it is made of; all other sources are in both.
IMAGES = {"minios.elf": 32, "minios64.elf": 64}
_ONLY = {"start32.S": 32, "entry32.S": 32, "library32.S": 32, "start64.S": 64, "entry64.S": 64, "library64.S": 64}
_FLAGS = [
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wa,--fatal-warnings",
    "-ffreestanding", "-fno-builtin", "-fno-pic", "-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns", "-mgeneral-regs-only",
]
_WIDTH = {32: ["-m32", "-march=i686", "-mregparm=3"], 64: ["-m64", "-mno-red-zone", "-mcmodel=small"]}


def sources() -> list[str]:
    """Every file that an image is made of, by its path here, sorted."""
    found = [path for pattern in ("*.[chS]", "*.inc", "*.lds", "programs/*") for path in HERE.glob(pattern)]
    return sorted(path.relative_to(HERE).as_posix() for path in found)


def source_hash() -> str:
    """SHA-256 over the sources in order, with line ends as ``\\n`` so that a Windows checkout agrees."""
    digest = hashlib.sha256()
    for name in sources():
        digest.update(name.encode() + b"\0")
        digest.update((HERE / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def tools() -> dict[str, str] | None:
    """First line of each tool's version, or None where one is absent."""
    versions = {}
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return None
        run = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        versions[tool] = run.stdout.splitlines()[0]
    return versions


def build(image: str) -> bytes:
    """The image, built anew in a temporary directory. Raises ``CalledProcessError`` with the tool's words shown."""
    bits = IMAGES[image]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in sources():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes((HERE / name).read_bytes().replace(b"\r\n", b"\n"))
        (work / "kernel").mkdir()

        def run(*command: str) -> None:
            subprocess.run(command, cwd=work, check=True)

        objects = []
        for name in sources():
            path = Path(name)
            if path.suffix not in (".c", ".S") or _ONLY.get(path.name, bits) != bits:
                continue
            target = f"{path.parent if path.parent.name else 'kernel'}/{path.name}.o"
            run("gcc", *_WIDTH[bits], *_FLAGS, "-c", "-o", target, name)
            objects.append(target)
        programs = [name for name in objects if name.startswith("programs/")]
        machine = "elf_i386" if bits == 32 else "elf_x86_64"
        # Programs must not reach into the kernel: alone, they lack nothing.
        run("ld", "-m", machine, "-z", "noexecstack", "--entry=user_entry", "-o", "programs.elf", *programs)
        run("ld", "-m", machine, "--build-id=none", "-z", "noexecstack", "-z", "max-page-size=4096", "--no-warn-rwx-segments",
            "-T", "minios.lds", "-o", image, *objects)
        if bits == 64:  # a Multiboot loader wants an ELF32 file; all addresses are below 4 GiB
            run("objcopy", "-O", "elf32-i386", image)
        return (work / image).read_bytes()


def read_lock() -> dict[str, object]:
    """The lock file's content."""
    lock: dict[str, object] = json.loads((HERE / LOCK).read_text(encoding="utf-8"))
    return lock


def main() -> None:
    """Build, and write the images and the lock beside the sources."""
    hashes = {}
    for name in IMAGES:
        image = build(name)
        (HERE / name).write_bytes(image)
        hashes[name] = hashlib.sha256(image).hexdigest()
        print(f"{name}: {len(image)} bytes, SHA-256 {hashes[name]}")
    lock = {"images": hashes, "source_sha256": source_hash(), "sources": sources(), "tools": tools()}
    (HERE / LOCK).write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
