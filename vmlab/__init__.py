"""vmlab: one guest, five ways to virtualize it, exact counts, cited prices.

    >>> import vmlab
    >>> cell = vmlab.run("trap-and-emulate", "cli_sti", iterations=1000, density=100)
    >>> cell["events"]["trap.gp"]
    2000

Importing this package loads nothing else; :func:`run` is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmlab.experiment.single import run

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from vmlab.experiment.single import run

        return run
    raise AttributeError(f"module 'vmlab' has no attribute {name!r}")
