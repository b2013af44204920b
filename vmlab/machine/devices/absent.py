"""Ports at which guests look and nothing answers, each with the reason. They read all ones and swallow writes, as an ISA bus does.

A guest that reaches for any other port without a device gets the same answer, and the port is listed among the run's unknown ports.
"""

from __future__ import annotations

#: (first port, last port, what is there on other PCs, why it is left out here).
ABSENT = (
    (0x0000, 0x000F, "8237 DMA controller", "no device of this machine moves data by it"),
    (0x0022, 0x0023, "IMCR", "the MP table says that there is none: the 8259 pair is wired to LINT0"),
    (0x0080, 0x0080, "power-on self test display", "written to for its delay alone"),
    (0x0081, 0x008F, "DMA page registers", "as the DMA controller"),
    (0x00C0, 0x00DF, "second DMA controller", "as the first"),
    (0x00ED, 0x00ED, "nothing", "written to for its delay alone where 0x80 is in use"),
    (0x00F0, 0x00F1, "coprocessor busy latch", "x87 errors come as exceptions (CR0.NE)"),
    (0x0170, 0x0177, "second IDE channel", "the first has room for all disks"),
    (0x01CE, 0x01D0, "display extension of some emulators", "text mode only"),
    (0x0278, 0x027A, "parallel port", "none"),
    (0x02E8, 0x02EF, "fourth serial port", "one serial port"),
    (0x02F8, 0x02FF, "second serial port", "one serial port"),
    (0x0376, 0x0377, "second IDE channel, control", "the first has room for all disks"),
    (0x0378, 0x037A, "parallel port", "none"),
    (0x03B0, 0x03BF, "monochrome display", "the display is a colour one"),
    (0x03E8, 0x03EF, "third serial port", "one serial port"),
    (0x03F0, 0x03F5, "floppy disk controller", "none"),
    (0x03F7, 0x03F7, "floppy disk controller", "none"),
    (0x0402, 0x0402, "debug console of some emulators", "the serial port is the console"),
    (0x0510, 0x0511, "configuration device of some emulators", "images and command line come by the boot protocol"),
    (0x5658, 0x5659, "backdoor of some hypervisors", "none"),
)


def reason(port: int) -> str | None:
    """What would be at ``port`` and why it is not; None for a port that nobody thought of."""
    for first, last, what, why in ABSENT:
        if first <= port <= last:
            return f"{what}: {why}"
    return None
