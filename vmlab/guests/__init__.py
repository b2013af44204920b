"""Guest images and their workloads. Knows nothing of VMMs and prices, and needs no Unicorn.

    image = load("nano")                       # or a path: an ELF kernel, a bzImage, a boot disk
    line = command_line({"guest": "nano", "workload": "cli_sti", "iterations": 1000, "density": 100})
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vmlab.errors import ConfigError, GuestImageError
from vmlab.guests import files
from vmlab.guests.hog import WORKLOADS as HOG_WORKLOADS
from vmlab.guests.image import GuestImage, PvNotes, Segment, Workload
from vmlab.guests.minios import workloads as minios
from vmlab.guests.nano.workloads import WORKLOADS as NANO_WORKLOADS
from vmlab.parameters import Parameter, nearest

__all__ = ["GuestImage", "PvNotes", "Segment", "Workload", "asynchronous", "command_line", "configured", "digest", "disk", "from_file", "load",
           "names", "parameters", "workloads"]

_HERE = Path(__file__).resolve().parent
_DEFAULT = "nano"


@dataclass(frozen=True)
class _BuiltIn:
    """A guest that comes with the lab; ``usual`` is the workload where none is said."""

    image: Path
    workloads: Mapping[str, Workload]
    usual: str
    #: Where it first looks at its command line, natively and started by a hypervisor: a symbol of code that runs once. Until there it does the
    #: same whatever it is told. None: not known.
    told_at: str | None = None
    told_at_paravirtual: str | None = None


_BUILT_IN = {
    "nano": _BuiltIn(_HERE / "nano" / "nano.elf", NANO_WORKLOADS, "cli_sti", "parse_command_line", "parse_command_line"),
    "hog": _BuiltIn(_HERE / "hog" / "hog.elf", HOG_WORKLOADS, "cli_loop"),
    "minios": _BuiltIn(_HERE / "minios" / "minios.elf", minios.WORKLOADS, "forkwait", "options_init"),
    "minios64": _BuiltIn(_HERE / "minios" / "minios64.elf", minios.WORKLOADS, "forkwait", "options_init"),
}


def names() -> list[str]:
    """The built-in guests."""
    return sorted(_BUILT_IN)


def load(name_or_path: str | Path, protocol: str = "auto") -> GuestImage:
    """The built-in guest of that name, or the kernel in that file.

    A word without a path separator or suffix is a name. Raises :class:`GuestImageError` for a file that is missing,
    truncated, or no image that a loader knows (:mod:`vmlab.guests.files`), and for an unknown name with the nearest choice.
    """
    text = os.fspath(name_or_path)
    if text in _BUILT_IN:
        return _built_in(text, files.read(str(_BUILT_IN[text].image)), protocol)
    path = Path(text)
    if isinstance(name_or_path, str) and not path.suffix and path.name == text and not text.startswith("$") and not path.exists():
        raise GuestImageError(f"no guest {text!r}{nearest(text, _BUILT_IN)}")
    return files.parse(path.name, files.read(text), protocol)


def digest(name: str) -> str:
    """SHA-256 of the guest's image, which is whole. Raises as :func:`load` does.

    A built-in image that its ``image.lock`` knows is not taken apart for that: reading ELF costs more than all else of ``vmlab validate``.
    """
    if name in _BUILT_IN:
        image = _BUILT_IN[name].image
        found = hashlib.sha256(files.read(str(image))).hexdigest()
        if found in image.with_name("image.lock").read_text(encoding="utf-8"):
            return found
    return load(name).sha256


@functools.lru_cache(maxsize=8)
def _built_in(name: str, data: bytes, protocol: str) -> GuestImage:
    """A worker runs many cells with one image."""
    return files.parse(name, data, protocol)


def from_file(name: str) -> bool:
    """Whether this guest is an image from a file, and none of the built-in ones."""
    return name not in _BUILT_IN


def configured(values: Mapping[str, object]) -> GuestImage:
    """The guest that a cell's parameters name, with its initrd and disks. Raises as :func:`load` does."""
    guest = str(values.get("guest", _DEFAULT))
    image = load(guest, str(values.get("protocol", "auto")))
    return files.equip(image, values) if from_file(guest) else image


def workloads(name: str) -> Mapping[str, Workload]:
    """The guest's workloads by name; none for a kernel from a file."""
    return _BUILT_IN[name].workloads if name in _BUILT_IN else MappingProxyType({})


def parameters(name: str) -> Mapping[str, Parameter]:
    """All parameters that the guest's command line takes; none for a kernel from a file.

    One that several workloads take is described as the first of them does; defaults and ranges may differ.
    """
    if name not in _BUILT_IN:
        return MappingProxyType({})
    guest = _BUILT_IN[name]
    found = {"workload": Parameter("what the guest does", guest.usual, choices=tuple(guest.workloads))}
    for workload in guest.workloads.values():
        for key, parameter in workload.parameters.items():
            found.setdefault(key, parameter)
    return MappingProxyType(found)


def _chosen(values: Mapping[str, object]) -> Workload:
    """The workload that ``values`` name, of the built-in guest that they name. Raises :class:`ConfigError`."""
    guest = str(values.get("guest", _DEFAULT))
    if guest not in _BUILT_IN:
        raise ConfigError(f"{guest!r} is no built-in guest{nearest(guest, _BUILT_IN)}")
    name = str(values.get("workload", _BUILT_IN[guest].usual))
    known = _BUILT_IN[guest].workloads
    if name not in known:
        raise ConfigError(f"no workload {name!r} in {guest}{nearest(name, known)}")
    return known[name]


def command_line(values: Mapping[str, object]) -> str:
    """The kernel's command line: ``workload=… iterations=…`` of those ``values`` that the workload takes.

    Others are left out. Missing ones get their default; a wrong one is a :class:`ConfigError`.
    """
    workload = _chosen(values)
    words = [f"workload={workload.name}"]
    for key, parameter in workload.parameters.items():
        words.append(f"{key}={parameter.check(key, values.get(key, parameter.default))}")
    return " ".join(words)


def disk(values: Mapping[str, object]) -> bytes | None:
    """The content of the disk that the guest finds at its start, or None where it has none.

    Raises :class:`ConfigError` for an unknown workload or a disk of an impossible size.
    """
    if str(values.get("guest", _DEFAULT)) not in ("minios", "minios64"):
        return None
    return minios.disk({**values, "workload": _chosen(values).name})


def told_at(name: str, technique: str) -> str | None:
    """The symbol of the code in which the built-in guest first looks at its command line; None where that is not known."""
    guest = _BUILT_IN[name]
    return guest.told_at_paravirtual if technique == "paravirtualization" else guest.told_at


def asynchronous(values: Mapping[str, object]) -> bool:
    """Whether interrupts come in this run at times that differ by technique: then only its outcome can be compared.

    A kernel from a file is taken to have some. Raises :class:`ConfigError` for an unknown workload.
    """
    if str(values.get("guest", _DEFAULT)) not in _BUILT_IN:
        return True
    workload = _chosen(values)
    timer = workload.parameters.get("timer")
    return workload.asynchronous or (timer is not None and bool(values.get("timer", timer.default)))
