"""How a technique looks, in every chart: one colour, one marker, one short name.

The colours follow Okabe and Ito's idea (told apart by people with any colour vision), shifted so that their
lightness differs as well: in greyscale, on a bad projector, they stay five different greys (a test holds this).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Colour (sRGB), matplotlib marker, and the technique's name where space is short."""

    colour: str
    marker: str
    short: str


#: By technique, in the order in which they are always shown.
LOOKS = {
    "native": Look("#000000", "D", "native"),
    "trap-and-emulate": Look("#B3420D", "o", "trap-and-emulate"),
    "binary-translation": Look("#0A3070", "s", "binary translation"),
    "paravirtualization": Look("#F0B323", "^", "paravirtualization"),
    "hardware-assisted": Look("#2C9C80", "P", "hardware-assisted"),
}
_OTHER = Look("#8A8A8A", "X", "")

#: Fill colour of each cause of a breakdown. What belongs to one technique has that technique's colour.
CAUSES = {
    "guest instructions": "#C3C9D0", "sensitive instructions": "#3A3E45", "interrupts and faults": "#E79AB0",
    "traps": "#B3420D", "VM exits": "#2C9C80", "hypercalls": "#F0B323", "callouts": "#0A3070", "translation": "#79B4E3",
    "VMM emulation": "#7B5EA7", "devices": "#8C6D3F",
}
OTHER_CAUSE = "#8A8A8A"

INK, FAINT, RULE = "#1A1A1A", "#5A5A5A", "#D0D0D0"


def look(technique: str) -> Look:
    """The technique's look; one that came from elsewhere is grey, under its own name."""
    return LOOKS.get(technique) or Look(_OTHER.colour, _OTHER.marker, technique)


def order(technique: str) -> tuple[int, str]:
    """Sort key: the five of the lab first, in their order."""
    known = list(LOOKS)
    return (known.index(technique) if technique in known else len(known), technique)


def lightness(colour: str) -> float:
    """CIE L* of a ``#rrggbb`` colour, 0 (black) to 100 (white): how it looks in greyscale."""
    linear = []
    for i in (1, 3, 5):
        channel = int(colour[i:i + 2], 16) / 255
        linear.append(channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance
