"""Cost profiles: one CPU generation each, read from YAML, every figure with its provenance."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vmlab.costs.bibliography import bibliography
from vmlab.costs.figures import Figure, figure, number, read_yaml, text, texts
from vmlab.costs.paths import path_table
from vmlab.errors import ConfigError
from vmlab.ledger import CLASSES, EXIT_REASONS, SYSTEM_INSTRUCTIONS

PROFILES = Path(__file__).with_name("profiles")

#: What a CPU may provide, in words.
CAPABILITIES = {
    "x86": "the base instruction set", "long": "long mode (64 bits)",
    "shadow": "hardware assistance with shadow page tables",
    "vmx": "Intel VT-x", "ept": "Intel extended page tables",
    "svm": "AMD-V", "npt": "AMD nested page tables",
}

#: Techniques' platforms. A hardware-assisted run goes through one accessor for control-block fields and intercepts what VT-x
#: intercepts too, so that its ledger can be priced on either vendor's figures (docs/adr/0003-pricing.md).
_OF_TECHNIQUES: Mapping[str, tuple[str, ...]] = {
    "x86": ("x86",), "svm": ("svm", "vmx"), "svm-npt": ("npt", "ept"), "vmx": ("vmx",), "vmx-ept": ("ept",),
}
#: Platform of a run -> what a profile must provide: one of each group. With ``-64``, the guest ran in long mode.
PLATFORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    name + bits: (one_of, *more) for name, one_of in _OF_TECHNIQUES.items() for bits, more in (("", ()), ("-64", (("long",),)))
}

#: Cost keys every profile must have; instructions and exits not listed fall back to a ``default``.
_REQUIRED = (
    *(f"class.{name}" for name in CLASSES), "insn.default", "insn.iret", "exception.delivery", "interrupt.delivery",
    "int.delivery", "walk.reference",
)
_ASSISTED = ("entry", "exit.default", "vmread", "vmwrite")
_ALLOWED = {
    *_REQUIRED, *_ASSISTED, *(f"insn.{op}" for op in SYSTEM_INSTRUCTIONS), *(f"exit.{reason}" for reason in EXIT_REASONS),
}


@dataclass(frozen=True, eq=False)
class Profile:
    """One CPU generation: identity, what it provides, and its costs in cycles by key.

    Keys: ``class.<class>`` cycles per instruction of a class; ``insn.<name>`` per system instruction;
    ``exception.delivery``, ``interrupt.delivery``, ``int.delivery``; ``walk.reference`` per page-table entry
    that the page walker reads; ``entry``, ``exit.<reason>``, ``vmread``, ``vmwrite``; ``mhz`` (clock).
    ``path.*`` and ``shared.*`` are the shared path table's.
    ``overrides`` holds figures fixed by :meth:`with_values`.
    """

    name: str
    words: str
    vendor: str
    year: int
    provides: frozenset[str]
    costs: Mapping[str, Figure]
    overrides: Mapping[str, Figure] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What pricing has worked out for this profile; lives and dies with it."""

    def figure(self, key: str) -> Figure | None:
        """The figure that prices ``key``, falling back to the family's default; None where there is none."""
        shared = path_table()
        # Only a key that a profile may hold has a default: a misspelt one must not be priced by it.
        for name in (key, f"{key.split('.')[0]}.default") if key in _ALLOWED else (key,):
            for table in (self.overrides, self.costs, shared.paths, shared.shared):
                if name in table:
                    return table[name]
        return None

    def with_values(self, override: Mapping[str, float]) -> Profile:
        """This profile with figures held at given values ("what if CLI cost 5 cycles?").

        :param override: cost key -> cycles (instructions for ``path.*``). A fallback can be given a value of
            its own (``insn.lgdt`` where the profile has only ``insn.default``).
        :raises ConfigError: no such key on this profile.
        """
        fixed = dict(self.overrides)
        for key, value in override.items():
            found = self.figure(key)
            if found is None:
                known = sorted({*self.costs, *path_table().paths, *path_table().shared, *_ALLOWED})
                near = difflib.get_close_matches(key, known, 1)
                raise ConfigError(f"profile {self.name!r} has no cost {key!r}{f'; nearest: {near[0]!r}' if near else ''}")
            fixed[key] = replace(found.fixed(value), key=key)
        return replace(self, overrides=MappingProxyType(fixed))


def names() -> list[str]:
    """Built-in profiles, oldest generation first (a name ends in the year, which a test holds)."""
    return sorted(_builtin(), key=lambda name: (name.rpartition("-")[2], name))


def user_profiles() -> Path:
    """The folder of the user's own profiles, where ``vmlab measure`` writes: ``VMLAB_PROFILES``, or the usual place for data."""
    if chosen := os.environ.get("VMLAB_PROFILES"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "vmlab" / "profiles"


def own_names() -> list[str]:
    """Profiles in the user's folder, by name. They are never priced on unless named."""
    return sorted(path.stem for path in user_profiles().glob("*.yaml") if path.stem not in _builtin())


def load(name_or_path: str | Path) -> Profile:
    """A built-in profile by name, one of the user's folder by name, or any by path to a ``.yaml`` file.

    :raises ConfigError: unknown name (says the nearest), or a broken file (says file and key).
    """
    name = str(name_or_path)
    if name in _builtin():
        return _load(PROFILES / f"{name}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return _load_own(path)
    if name in own_names():
        return _load_own(user_profiles() / f"{name}.yaml")
    known = (*_builtin(), *own_names())
    near = difflib.get_close_matches(name, known, 1, 0.3)
    raise ConfigError(f"no cost profile {name!r}; "
                      + (f"nearest: {near[0]!r}; " if near else "")
                      + f"there are {', '.join(known)}, or give the path of a .yaml file")


def _load_own(path: Path) -> Profile:
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return read_profile(path)  # says what is wrong with it
    return _load_version(path.resolve(), changed)


@lru_cache(maxsize=32)
def _load_version(path: Path, _changed: int) -> Profile:
    return read_profile(path)


@lru_cache(maxsize=1)
def _builtin() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PROFILES.glob("*.yaml")))


@cache
def _load(path: Path) -> Profile:
    profile = read_profile(path)
    if profile.name != path.stem:
        raise ConfigError(f"{path}: name: is {profile.name!r}, but the file is called {path.stem!r}")
    return profile


def read_profile(file: Path) -> Profile:
    """Read and check a profile file; ConfigError names file and key."""
    data = read_yaml(file)
    fields = {"name", "words", "vendor", "year", "provides", "mhz", "costs"}
    if extra := sorted(str(key) for key in set(data) - fields):
        raise ConfigError(f"{file}: unknown key {extra[0]!r}; the keys are {', '.join(sorted(fields))}")
    provides = frozenset(texts(data, "provides", str(file)))
    if unknown := sorted(provides - set(CAPABILITIES)):
        raise ConfigError(f"{file}: provides: unknown {unknown[0]!r}; the choices are {', '.join(CAPABILITIES)}")
    rows = data.get("costs")
    if not isinstance(rows, dict):
        raise ConfigError(f"{file}: costs: must be a mapping of figures")
    assisted = bool(provides & {"vmx", "svm"})
    for key in rows:
        if key not in _ALLOWED:
            near = difflib.get_close_matches(str(key), sorted(_ALLOWED), 1)
            raise ConfigError(f"{file}: costs: unknown cost {key!r}{f'; nearest: {near[0]!r}' if near else ''}")
    for key in (*_REQUIRED, *(_ASSISTED if assisted else ())):
        if key not in rows:
            raise ConfigError(f"{file}: costs: {key!r} is missing")
    costs = {key: figure(key, row, file, bibliography()) for key, row in rows.items()}
    costs["mhz"] = figure("mhz", data.get("mhz"), file, bibliography())
    return Profile(
        text(data, "name", str(file)), text(data, "words", str(file)), text(data, "vendor", str(file)),
        int(number(data, "year", str(file))), provides, MappingProxyType(costs),
    )


def supports(profile: Profile, platform: str) -> bool:
    """Whether a run of this platform could have run on this CPU.

    :raises ConfigError: no such platform.
    """
    return lacks(profile, platform) is None


def lacks(profile: Profile, platform: str) -> str | None:
    """What a run of this platform needs and this CPU does not provide, in words. Errors as for :func:`supports`."""
    if platform not in PLATFORMS:
        raise ConfigError(f"unknown platform {platform!r}; there are {', '.join(PLATFORMS)}")
    for one_of in PLATFORMS[platform]:
        if profile.provides.isdisjoint(one_of):
            return " or ".join(CAPABILITIES[name] for name in one_of)
    return None
