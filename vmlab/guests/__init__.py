"""Guest images and their workloads. Knows nothing of VMMs and prices, and needs no Unicorn.

    image = load("nano")                       # or a path to an ELF32 i386 kernel
    line = command_line({"workload": "cli_sti", "iterations": 1000, "density": 100})
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vmlab.errors import ConfigError, GuestImageError
from vmlab.guests.elf import parse
from vmlab.guests.image import GuestImage, PvNotes, Segment, Workload
from vmlab.guests.nano.workloads import PARAMETERS, WORKLOADS
from vmlab.parameters import Parameter, nearest

__all__ = ["GuestImage", "PvNotes", "Segment", "Workload", "command_line", "load", "names", "parameters", "workloads"]

_BUILT_IN = {"nano": Path(__file__).resolve().parent / "nano" / "nano.elf"}


def names() -> list[str]:
    """The built-in guests."""
    return sorted(_BUILT_IN)


def load(name_or_path: str | Path) -> GuestImage:
    """The built-in guest of that name, or the kernel in that file.

    A word without a path separator or suffix is a name. Raises :class:`GuestImageError` for a file that is missing,
    truncated, or not an ELF32 i386 kernel with a Multiboot header, and for an unknown name with the nearest choice.
    """
    text = os.fspath(name_or_path)
    path = _BUILT_IN.get(text)
    if path is None:
        path = Path(text)
        if isinstance(name_or_path, str) and not path.suffix and path.name == text and not path.exists():
            raise GuestImageError(f"no guest {text!r}{nearest(text, _BUILT_IN)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise GuestImageError(f"no guest image at {text!r}") from None
    except OSError as error:
        raise GuestImageError(f"guest image {text!r} cannot be read: {error.strerror or error}") from error
    return parse(text if text in _BUILT_IN else path.name, data)


def workloads(name: str) -> Mapping[str, Workload]:
    """The guest's workloads by name; none for a kernel from a file."""
    return WORKLOADS if name in _BUILT_IN else MappingProxyType({})


def parameters(name: str) -> Mapping[str, Parameter]:
    """All parameters that the guest's command line takes; none for a kernel from a file."""
    return PARAMETERS if name in _BUILT_IN else MappingProxyType({})


def command_line(values: Mapping[str, object]) -> str:
    """The kernel's command line: ``workload=… iterations=…`` of those ``values`` that the workload takes.

    Others are left out. Missing ones get their default; a wrong one is a :class:`ConfigError`.
    """
    name = PARAMETERS["workload"].check("workload", values.get("workload", PARAMETERS["workload"].default))
    workload = WORKLOADS.get(str(name))
    if workload is None:
        raise ConfigError(f"no workload {name!r}{nearest(str(name), WORKLOADS)}")
    words = [f"workload={workload.name}"]
    for key, parameter in workload.parameters.items():
        words.append(f"{key}={parameter.check(key, values.get(key, parameter.default))}")
    return " ".join(words)
