"""The keyboard controller, an 8042, with a keyboard and no mouse: IBM PC/AT Technical Reference ("Keyboard Controller"),
IBM PS/2 Hardware Interface Technical Reference (keyboard commands, auxiliary port).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DATA_PORT, COMMAND_OFFSET = 0x60, 4
_OUTPUT_FULL, _SYSTEM, _COMMAND, _UNLOCKED, _AUX_FULL = 1, 4, 8, 0x10, 0x20           # status
_INTERRUPT, _AUX_INTERRUPT, _DISABLE, _AUX_DISABLE, _TRANSLATE = 1, 2, 0x10, 0x20, 0x40  # command byte
_A20, _NOT_RESET = 2, 1                                                                  # output port
_ACKNOWLEDGE, _RESEND, _SELF_TEST_PASSED = 0xFA, 0xFE, 0xAA
_KEYBOARD_ID = b"\xab\x83"
_WITH_ARGUMENT = frozenset({0xED, 0xF0, 0xF3})      # keyboard: LEDs, scan code set, rate


class KeyboardController:
    """Ports 0x60 (offset 0) and 0x64 (4). ``line`` and ``aux_line`` are IRQ 1 and IRQ 12; ``reset`` is the CPU's reset input.

    The A20 gate is kept as a bit: addresses do not wrap, as on PCs whose memory has no such gate.
    """

    def __init__(self, line: Callable[[bool], None], aux_line: Callable[[bool], None], reset: Callable[[], None]) -> None:
        self._line, self._aux_line, self._reset = line, aux_line, reset
        self._output: list[tuple[int, bool]] = []       # bytes for the CPU, and whether from the auxiliary port
        self.control = _INTERRUPT | _SYSTEM | _TRANSLATE
        self.port = _A20 | _NOT_RESET
        self.was_command = False
        self._pending = 0               # a command that waits for its byte at the data port
        self._argument = 0              # a keyboard command that waits for one

    def press(self, codes: bytes) -> None:
        """Scan codes (set 1) from the keyboard."""
        if not self.control & _DISABLE:
            self._put(*codes)

    def _put(self, *values: int, aux: bool = False) -> None:
        self._output += [(value, aux) for value in values]
        self._update()

    def _update(self) -> None:
        aux = bool(self._output) and self._output[0][1]
        self._line(bool(self._output) and not aux and bool(self.control & _INTERRUPT))
        self._aux_line(aux and bool(self.control & _AUX_INTERRUPT))

    # ---- the two ports
    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            value = self._output.pop(0)[0] if self._output else 0
            self._line(False)
            self._aux_line(False)
            self._update()
            return value
        status = _UNLOCKED | (self.control & _SYSTEM) | (_COMMAND if self.was_command else 0)
        if self._output:
            status |= _OUTPUT_FULL | (_AUX_FULL if self._output[0][1] else 0)
        return status

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        self.was_command = offset != 0
        if offset:
            self._command(value)
        elif self._pending:
            pending, self._pending = self._pending, 0
            self._complete(pending, value)
        else:
            self._to_keyboard(value)

    def _command(self, value: int) -> None:
        if value == 0x20:
            self._put(self.control)
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4):
            self._pending = value
        elif value == 0xAA:
            self._put(0x55)             # the controller's self test passed
        elif value in (0xA9, 0xAB):
            self._put(0x00)             # interface test: no error
        elif value in (0xA7, 0xA8):
            self.control = self.control & ~_AUX_DISABLE | (_AUX_DISABLE if value == 0xA7 else 0)
        elif value in (0xAD, 0xAE):
            self.control = self.control & ~_DISABLE | (_DISABLE if value == 0xAD else 0)
        elif value == 0xD0:
            self._put(self.port)
        elif value >= 0xF0 and not value & _NOT_RESET:
            self._reset()               # pulses the output port's low bits

    def _complete(self, command: int, value: int) -> None:
        if command == 0x60:
            self.control = value
            self._update()
        elif command == 0xD1:
            self.port = value | _NOT_RESET
            if not value & _NOT_RESET:
                self._reset()
        elif command in (0xD2, 0xD3):
            self._put(value, aux=command == 0xD3)   # as if the keyboard, or the mouse, had sent it

    def _to_keyboard(self, value: int) -> None:
        """A byte for the keyboard: a command, or the argument of the last one."""
        if self._argument:
            command, self._argument = self._argument, 0
            self._put(_ACKNOWLEDGE)
            if command == 0xF0 and not value:
                self._put(2)            # it speaks scan code set 2, which the controller translates to set 1
        elif value == 0xFF:
            self._put(_ACKNOWLEDGE, _SELF_TEST_PASSED)
        elif value == 0xF2:
            self._put(_ACKNOWLEDGE, *_KEYBOARD_ID)
        elif value == 0xEE:
            self._put(0xEE)             # echo
        elif value in _WITH_ARGUMENT:
            self._argument = value
            self._put(_ACKNOWLEDGE)
        elif value >= 0xF3:
            self._put(_ACKNOWLEDGE)
        else:
            self._put(_RESEND)

    _FIELDS = ("control", "port", "was_command", "_pending", "_argument")

    def state(self) -> dict[str, Any]:
        return {name.lstrip("_"): getattr(self, name) for name in self._FIELDS} | {"output": list(self._output)}

    def from_state(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name.lstrip("_")])
        self._output = [(value, aux) for value, aux in state["output"]]
        self._update()


class SystemPort:
    """Port 0x92 of the PS/2: bit 0 resets the CPU, bit 1 is the A20 gate, kept as a bit (PS/2 Hardware Interface Technical Reference)."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.value = _A20

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value & 0xFE
        if value & 1:
            self._reset()

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def from_state(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
