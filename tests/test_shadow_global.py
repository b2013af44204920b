"""Global pages under lazy shadow paging: what a CR3 load leaves, and what INVLPG and CR4.PGE take away, counted by hand."""

from __future__ import annotations

import itertools

import pytest
from machinelab import PATHS, asm
from paginglab import ALL, SCHEMES, Layout, boot, layout, raw_kernel, raw_origin

from vmlab.guests import GuestImage
from vmlab.machine.paging import G
from vmlab.machine.pc import Stop, StopReason

DONE = Stop(StopReason.EXIT, 0)
LAZY = ("trap-and-emulate/lazy", "hardware-assisted/lazy")
OTHER = 0x60000         # another root, with the same tables below


def program(where: Layout, *steps: str) -> tuple[GuestImage, list[int]]:
    """Page 0 of the window is global, page 1 is not; the steps run one after another. The image, and where each step begins and the last ends."""
    bits, r = (64, "r") if where.mode == "64" else (32, "e")
    begin = raw_origin(where)
    words = {"both": f"mov eax, [{where.base:#x}]; mov eax, [{where.base + 0x1000:#x}];", "reload": f"mov {r}ax, cr3; mov cr3, {r}ax;",
             "other": f"mov eax, {OTHER:#x}; mov cr3, {r}ax;", "invlpg": f"invlpg [{where.base:#x}];",
             "off": f"mov {r}ax, cr4; and eax, 0xffffff7f; mov cr4, {r}ax;", "on": f"mov {r}ax, cr4; or eax, 0x80; mov cr4, {r}ax;"}
    code, marks = b"", []
    for step in steps:
        marks.append(begin + len(code))
        code += asm("nop;" + "".join(words[word] for word in step.split()), begin + len(code), bits)
    marks.append(begin + len(code))
    code += asm("nop; xor eax, eax; mov edx, 0xf4; out dx, eax; hlt", begin + len(code), bits)
    entries = [0x101000 | ALL | G, 0x102000 | ALL]
    window = b"".join(entry.to_bytes(where.size, "little") for entry in entries)
    return raw_kernel(where, code, {where.window: window.ljust(0x1000, b"\0"), OTHER: where.tables[0x40000]}), marks


@pytest.mark.parametrize("mode", ["32", "pae", "64"])
@pytest.mark.parametrize("scheme", LAZY)
@pytest.mark.parametrize("path", PATHS)
def test_a_global_page_outlives_a_cr3_load_and_nothing_else(mode: str, scheme: str, path: str) -> None:
    where = layout(mode)
    image, marks = program(where, "on", "both", "both", "reload both", "other both", "invlpg both", "reload both", "off on both", "off both",
                           "reload both")
    kind, parameters = SCHEMES[scheme]
    guest = boot(kind, image, parameters, path)
    seen: dict[int, int] = {}
    for at in marks:        # an instruction that faults comes by again
        guest.watch(at, lambda at: seen.setdefault(at, guest.snapshot(at).events.get("shadow.fault.hidden", 0)))
    assert guest.run(10_000) == DONE
    counts = [seen[b] - seen[a] for a, b in itertools.pairwise(marks)]
    # After every change of all the page of the code itself must come back, which is not global.
    assert counts == [
        1,      # PGE is changed: the code
        2, 0,   # both pages, once
        2,      # MOV to CR3: the code and the local page
        2 + (mode == "32"),     # another root: the same; and where that is the page directory itself, the way to the global page
        1,      # INVLPG: the global page
        2,
        1 + 1 + 2,  # PGE is changed twice: the code, again the code, both pages
        1 + 2,  # without global pages …
        1 + 2,  # … a CR3 load voids all
    ]
