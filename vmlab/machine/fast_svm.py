"""AMD-V's world switch in C (``native/svm.c``), and what Python says to it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vmlab.machine.decode import Instruction
from vmlab.machine.engine import library

if TYPE_CHECKING:
    from vmlab.machine.pc import Machine

#: Words of ``state`` in native/machine.h: the instruction at which C left a block; and where its `svm` is.
TOKEN, SVM = 24, 35
_CALLBACK = ctypes.CFUNCTYPE(None)
#: Words of ``svm``: the code of the exit that C carried out; and to be set where the VMM has handled it and enters the guest again.
EXIT_CODE, AGAIN = 7, 8


class WorldSwitch:
    """#VMEXIT in C (``native/svm.c``)."""

    def __init__(self, machine: Machine, state: memoryview, tokens: Sequence[Instruction | None], address: int, function: int, host: int, vmrun: int,
                 on_exit: Callable[[], None], on_entry: Callable[[], None]) -> None:
        self._machine, self.state, self.tokens = machine, state, tokens
        memory = (ctypes.c_uint64 * 14)()
        #: ``svm`` of machine.h; the two that are of use elsewhere are named below.
        self.words, self._state_at = memoryview(memory).cast("B").cast("Q"), ctypes.c_void_p(address)
        self._at = ctypes.c_void_p(ctypes.addressof(memory))
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(function)
        self._callbacks = [_CALLBACK(callback) for callback in (on_exit, on_entry)]
        exited, entered = (ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in self._callbacks)
        words = (0, machine.ram.address, 0, host, machine.cpu.layout.debug_registers,
                 ctypes.cast(library().uc_reg_read, ctypes.c_void_p).value or 0, exited, 0, 0, 0, 0, vmrun, entered, machine.ram.size)
        for i, word in enumerate(words):
            self.words[i] = word
        state[SVM] = ctypes.addressof(memory)

    def entering(self, vmcb: int, nested_root: int, plain: bool) -> None:
        """VMRUN comes next, with the VMCB at this hpa. ``plain``: no event is to be injected, none waits, and the TLB is not modelled."""
        words = self.words
        words[2], words[10], words[0], words[9] = vmcb, nested_root, plain, not plain

    def plain(self) -> None:
        """In the guest, whose event is delivered: nothing is under way or waits any more."""
        self.words[0], self.words[9] = 1, 0

    def not_plain(self) -> None:
        """Something waits in the guest now."""
        self.words[0], self.words[9] = 0, 1

    def switch(self) -> None:
        """Guest to the VMCB, host back: what svm_switch.py does."""
        self.words[0] = 0
        self._function(self._machine.engine.handle, self._state_at, self._at)
