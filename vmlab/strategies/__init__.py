"""Techniques by name: the built-in five and whatever is installed in the entry-point group ``vmlab.strategies``."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import pathlib
from typing import TYPE_CHECKING

from vmlab.errors import ConfigError
from vmlab.parameters import nearest
from vmlab.strategies.techniques import DESCRIBED, Technique

if TYPE_CHECKING:
    from vmlab.strategies.base import Strategy

#: The order in which tables and charts list the techniques. Others follow in alphabetical order.
BUILT_IN = {
    "native": "vmlab.strategies.native:Native",
    "trap-and-emulate": "vmlab.strategies.trap_and_emulate:TrapAndEmulate",
    "binary-translation": "vmlab.strategies.translation:BinaryTranslation",
    "paravirtualization": "vmlab.strategies.paravirtual:Paravirtualization",
    "hardware-assisted": "vmlab.strategies.hardware:HardwareAssisted",
}


@functools.cache
def _found() -> dict[str, str]:
    """Name -> module:class. What is installed is looked through once: that costs as much as starting Python."""
    found = dict(BUILT_IN)
    for point in sorted(importlib.metadata.entry_points(group="vmlab.strategies"), key=lambda p: p.name):
        found.setdefault(point.name, point.value)
    return found


def names() -> list[str]:
    """All techniques, built-in ones first."""
    return list(_found())


def describe(name: str) -> type[Technique]:
    """What the technique says of itself. A built-in one says it without its machine; others have to be loaded.

    Raises ConfigError with the nearest name.
    """
    return DESCRIBED.get(name) or load(name)


def load(name: str) -> type[Strategy]:
    """The class of a technique; ``FILE.py:CLASS`` names one in a file. Raises ConfigError with the nearest name."""
    if ".py:" in name:
        return _from_file(name)
    target = BUILT_IN.get(name) or _found().get(name)    # what is installed is looked through only for what is not built in
    if target is None:
        raise ConfigError(f"technique: {name!r} is not known{nearest(name, _found())}")
    module, _, attribute = target.partition(":")
    found: type[Strategy] = getattr(importlib.import_module(module), attribute)
    return found


def _from_file(name: str) -> type[Strategy]:
    from vmlab.strategies.base import Strategy

    file, _, attribute = name.rpartition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise ConfigError(f"strategy: no file {file!r}")
    spec = importlib.util.spec_from_file_location(f"vmlab_strategy_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"strategy: {file} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Strategy) and v is not Strategy]
        raise ConfigError(f"strategy: {file} has no strategy class {attribute!r}{nearest(attribute, classes)}")
    return found
