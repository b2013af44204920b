"""Everything that vmlab raises on purpose, in one tree.

    VmlabError                    message says what happened and what to do
    ├── ConfigError               bad configuration or command line (exit status 2)
    ├── GuestImageError           an image is missing, truncated or of the wrong kind (exit status 2)
    ├── UnsupportedByStrategy     this technique cannot run this combination (cell: unsupported)
    ├── UnsupportedHost           calibration failed: this Unicorn build is not understood
    ├── ExperimentError           a run directory cannot be used, a worker died
    └── GuestError                the guest ended its own run (cell: failed)
        ├── GuestFault            an exception that nobody could take
        ├── TripleFault           the CPU shut down
        ├── GuestRefused          the VMM stopped a guest that reached outside its frames
        └── GuestBudget           the instruction budget was spent (endless loop)
"""

from __future__ import annotations


class VmlabError(Exception):
    """Base of every deliberate error; ``str(error)`` is one sentence for people."""


class ConfigError(VmlabError):
    """A configuration, option or parameter is wrong. Exit status 2."""


class GuestImageError(VmlabError):
    """A guest image is missing, truncated, or not what its header says. Exit status 2."""


class UnsupportedByStrategy(VmlabError):
    """The technique cannot carry this guest with these parameters; says why."""


class UnsupportedHost(VmlabError):
    """The CPU's hidden state could not be found and verified on this host."""


class ExperimentError(VmlabError):
    """The runner cannot go on: output directory, worker, resume."""


class GuestError(VmlabError):
    """The guest's run ended badly; the lab itself is fine."""


class GuestFault(GuestError):
    """An exception that no handler could take.

    :param vector: exception vector (SDM Vol. 3A table 6-1).
    :param error_code: the pushed error code, or None where the vector has none.
    :param rip: address of the faulting instruction.
    """

    def __init__(self, vector: int, error_code: int | None, rip: int, why: str = "") -> None:
        self.vector, self.error_code, self.rip = vector, error_code, rip
        code = "" if error_code is None else f", error code {error_code:#x}"
        super().__init__(f"exception {vector}{code} at {rip:#x}{': ' + why if why else ''}")


class TripleFault(GuestError):
    """A fault while delivering a double fault: the CPU shut down."""


class GuestRefused(GuestError):
    """The VMM ended a guest that tried to reach what is not its own."""


class GuestBudget(GuestError):
    """The instruction budget was spent before the guest ended."""
