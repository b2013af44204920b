"""A guest that stands between two blocks, as values for a file (:mod:`vmlab.experiment.saved_run`), and a run that goes on from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.errors import ConfigError, UnsupportedByStrategy
from vmlab.experiment import saved_run
from vmlab.guests import GuestImage
from vmlab.ledger import Snapshot
from vmlab.machine import saved as machine_state
from vmlab.machine.memory import PAGE, Ram

if TYPE_CHECKING:
    from vmlab.experiment.cell import Run

_IMAGE = ("name", "entry", "sha256", "protocol")


def save(run: Run, path: Path, code: str) -> None:
    """Write the run as it stands; it has been stopped by who looks on, or by what the guest said.

    :param code: hash of the code that counts.
    :raises UnsupportedByStrategy: the technique cannot be saved, or this moment cannot.
    :raises ExperimentError: the file cannot be written.
    """
    ram = run.machine.ram
    values = {
        "code": code, "technique": run.technique, "parameters": run.parameters, "ram": ram.size,
        "image": {name: getattr(run.image, name) for name in _IMAGE} | {"symbols": dict(run.image.symbols)},
        "marks": {name: dataclasses.astuple(mark) for name, mark in run.marks.items()},
        "vmm": run.strategy.state(), "machine": machine_state.state(run.machine),
    }
    saved_run.write(path, values, _pages(ram))


def _pages(ram: Ram) -> Iterator[tuple[int, bytes]]:
    yield from ram.pages_in_use(0, ram.size & ~(PAGE - 1))


def image(saved: saved_run.Saved) -> GuestImage:
    """What is still to be known of the image: its symbols and its name. Its bytes are in memory."""
    try:
        known = saved.values["image"]
        return GuestImage(segments=(), pv=None, symbols=known["symbols"], **{name: known[name] for name in _IMAGE})
    except (KeyError, TypeError) as error:
        raise misfit(error) from error


def misfit(error: Exception) -> ConfigError:
    """What to say of a file that is whole, and whose parts do not belong together."""
    return ConfigError(f"the saved run does not fit together ({type(error).__name__}: {error}); run the guest again with --save")


def restore(run: Run, saved: saved_run.Saved) -> None:
    """Bring a run whose machine and VMM have just been made to where the saved one stood.

    :raises ConfigError: the file does not fit together.
    """
    values: Any = saved.values
    try:
        ram = run.machine.ram
        if ram.size != values["ram"]:
            raise ValueError("RAM of another size")
        for offset, _ in _pages(ram):
            if offset // PAGE not in saved.pages:
                ram.write(offset, bytes(PAGE))
        for number, content in saved.pages.items():
            if not 0 <= number < ram.size // PAGE:
                raise ValueError("a page outside of RAM")
            ram.bytes[number * PAGE:(number + 1) * PAGE] = content
        run.marks.update((name, Snapshot(*mark)) for name, mark in values["marks"].items())
        machine_state.restore(run.machine, values["machine"])
        run.strategy.from_state(values["vmm"])
        run.machine.interrupts.update()
    except UnsupportedByStrategy:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise misfit(error) from error
