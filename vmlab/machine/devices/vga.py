"""The display in text mode: IBM VGA Technical Reference (PS/2 Hardware Interface, "Video Subsystem"), registers by port.

Text memory is RAM at 0xB8000, two bytes a character, of which this device knows nothing. The registers are kept as written; nothing
follows from them but where the screen begins. There is no font, no graphics mode and no picture: :func:`text` reads the characters.
"""

from __future__ import annotations

from typing import Any

from vmlab.machine.timeline import Timeline

FIRST_PORT, PORT_COUNT = 0x3C0, 0x20
TEXT, COLUMNS, ROWS = 0xB8000, 80, 25
#: Index and data ports of the register sets, from 0x3C0: sequencer, graphics controller, CRT controller.
_SETS = {0x04: 0x05, 0x0E: 0x0F, 0x14: 0x15}
_ATTRIBUTE, _ATTRIBUTE_READ, _MISCELLANEOUS, _MISCELLANEOUS_READ, _STATUS_1 = 0x00, 0x01, 0x02, 0x0C, 0x1A
_START_HIGH, _START_LOW = 0x0C, 0x0D
# Vertical retrace of a 70 Hz text mode: the last 2 of 449 lines (VGA: 400 lines shown). Horizontal: about a fifth of a line.
_FRAME, _LINE, _SHOWN_LINES, _SHOWN_PIXELS, _LINE_PIXELS = 14_268_000, 31_777, 400, 640, 800


class Vga:
    """Ports 0x3C0–0x3DF."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.index = dict.fromkeys(_SETS, 0)
        self.registers = {index: bytearray(256) for index in _SETS}
        self.attributes, self.attribute_index, self.attribute_data = bytearray(32), 0, False
        self.miscellaneous = 0x67          # colour addresses, RAM enabled, 28 MHz clock: text mode 3

    @property
    def start(self) -> int:
        """Characters of text memory before the screen's first."""
        crt = self.registers[0x14]
        return crt[_START_HIGH] << 8 | crt[_START_LOW]

    def read(self, offset: int, size: int) -> int:
        if offset in _SETS:
            return self.index[offset]
        if offset - 1 in _SETS:
            return self.registers[offset - 1][self.index[offset - 1]]
        if offset == _STATUS_1:
            self.attribute_data = False     # the attribute port takes an index next
            line, into = divmod(self._timeline.now % _FRAME, _LINE)
            vertical = line >= _SHOWN_LINES
            blank = vertical or into * _LINE_PIXELS >= _LINE * _SHOWN_PIXELS
            return (8 if vertical else 0) | (1 if blank else 0)
        return {_ATTRIBUTE: self.attribute_index, _ATTRIBUTE_READ: self.attributes[self.attribute_index & 31],
                _MISCELLANEOUS_READ: self.miscellaneous}.get(offset, 0xFF)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset in _SETS:
            self.index[offset] = value & 0xFF
            if size == 2:                   # index and data in one access
                self.registers[offset][value & 0xFF] = value >> 8 & 0xFF
        elif offset - 1 in _SETS:
            self.registers[offset - 1][self.index[offset - 1]] = value & 0xFF
        elif offset == _ATTRIBUTE:
            if self.attribute_data:
                self.attributes[self.attribute_index & 31] = value & 0xFF
            else:
                self.attribute_index = value & 0x3F
            self.attribute_data = not self.attribute_data
        elif offset == _MISCELLANEOUS:
            self.miscellaneous = value & 0xFF

    def state(self) -> dict[str, Any]:
        return {"index": dict(self.index), "registers": {k: bytes(v) for k, v in self.registers.items()}, "attributes": bytes(self.attributes),
                "attribute_index": self.attribute_index, "attribute_data": self.attribute_data, "miscellaneous": self.miscellaneous}

    def from_state(self, state: dict[str, Any]) -> None:
        self.index = dict(state["index"])
        self.registers = {k: bytearray(v) for k, v in state["registers"].items()}
        self.attributes = bytearray(state["attributes"])
        self.attribute_index, self.attribute_data = state["attribute_index"], state["attribute_data"]
        self.miscellaneous = state["miscellaneous"]


def text(memory: bytes) -> list[str]:
    """The screen's lines without trailing blanks, of the text memory from its first character on; no line where nothing was written."""
    shown = memory[:2 * COLUMNS * ROWS:2].decode("cp437")
    lines = [shown[at:at + COLUMNS].replace("\0", " ").rstrip() for at in range(0, len(shown), COLUMNS)]
    return lines if any(lines) else []
