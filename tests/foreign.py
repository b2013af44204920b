"""Guests that nobody here wrote, found by environment variables; where one is absent the test is skipped and says what it needs."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmlab.experiment import schema
from vmlab.experiment.cell import Cell, run_cell
from vmlab.parameters import Value

XV6, KVM_UNIT_TESTS, LINUX, MEMTEST = (f"VMLAB_GUEST_{name}" for name in ("XV6", "KVM_UNIT_TESTS", "LINUX", "MEMTEST"))
#: What the folder that each variable names must hold.
HOLDS = {
    XV6: "xv6 for x86, built: kernelmemfs, xv6.img and fs.img",
    KVM_UNIT_TESTS: "kvm-unit-tests, built: x86_64/NAME.flat and i386/NAME.flat",
    LINUX: "vmlinuz of Debian's linux-image-cloud-amd64, and initrd.gz whose /init starts a shell of busybox-static with the prompt 'vmlab# '",
    MEMTEST: "memtest86+ia32.bin and memtest86+x64.bin of Debian's memtest86+",
}
#: What a Linux kernel must be told on this machine: no ACPI, no APIC without it, no PCI, and how fast its delay loop is.
LINUX_LINE = "console=ttyS0 nokaslr acpi=off nolapic noapic pci=off lpj=4000000 cryptomgr.notests"

TECHNIQUES: dict[str, tuple[str, dict[str, Value]]] = {
    "native": ("native", {}),
    "nested": ("hardware-assisted", {"memory": "nested", "nested_page": "2m"}),
    "shadow": ("hardware-assisted", {"memory": "lazy"}),
    "tracing": ("hardware-assisted", {"memory": "tracing"}),
    "translation": ("binary-translation", {"memory": "lazy"}),
    "trapping": ("trap-and-emulate", {"memory": "lazy", "sensitive": "trap"}),
    "silent": ("trap-and-emulate", {"memory": "lazy"}),
}


def guest(variable: str, name: str) -> str:
    """The path of an image, to be given to a cell. Skips the test where it is absent."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to a folder with {HOLDS[variable]}")
    if not (Path(folder) / name).is_file():
        pytest.skip(f"${variable}/{name} is absent; the folder should hold {HOLDS[variable]}")
    return f"${variable}/{name}"


def need_images_of(experiment: str) -> None:
    """Skips the test of a shipped experiment whose guest is found by a variable that is not set."""
    for variable in re.findall(r"\$(VMLAB_GUEST_\w+)", schema.find(experiment).read_text(encoding="utf-8")):
        if not os.environ.get(variable):
            pytest.skip(f"set {variable} to a folder with {HOLDS[variable]}")


def run(how: str, image: str, **parameters: Value) -> Cell:
    """One cell under the technique that :data:`TECHNIQUES` calls ``how``."""
    technique, more = TECHNIQUES[how]
    return run_cell(technique, {"guest": image, **more, **parameters})


def lines(console: str, word: str) -> list[str]:
    """The lines of a test's output that begin with ``word``."""
    return re.findall(rf"^{word}.*", console, re.MULTILINE)


@functools.cache
def environment(folder: Path) -> str:
    """A Multiboot module that tells kvm-unit-tests what it would else ask of a configuration device."""
    path = folder / "env"
    path.write_text("NR_CPUS=1\nMEMSIZE=128\nMEMLIMIT=128\nTEST_DEVICE=1\n")
    return str(path)


def exits(cell: Mapping[str, Any]) -> dict[str, int]:
    """Exits by reason."""
    return {kind.removeprefix("exit."): n for kind, n in cell["events"].items() if kind.startswith("exit.")}
