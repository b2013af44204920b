"""Shadow page tables: small kernels with tables of their own, against the bare machine, and their faults counted by hand."""

from __future__ import annotations

import pytest
from machinelab import CODE, PATHS, STACK3, USER, USER_CODE, USER_DATA
from paginglab import ALL, END, SCHEMES, WINDOW, Layout, bare, boot, faults, layout, paging_kernel

from vmlab.guests import GuestImage
from vmlab.machine.paging import RW, US, A, D, P  # noqa: F401
from vmlab.machine.pc import Stop, StopReason
from vmlab.strategies.base import Strategy

DONE = Stop(StopReason.EXIT, 0)
MODES = ("32", "pae")
TO_USER = f"push {USER_DATA}; push {STACK3}; push 0x202; push {USER_CODE}; push {USER}; iretd"


def agree(image: GuestImage, scheme: str, path: str = "portable") -> Strategy:
    """Run under ``scheme`` and on the bare machine: everything that the guest can see must be equal."""
    kind, parameters = SCHEMES[scheme]
    oracle, guest = bare(image), boot(kind, image, parameters, path)
    assert oracle.run(200_000) == DONE
    assert guest.run(200_000) == DONE
    assert faults(guest) == faults(oracle)
    assert guest.guest_state() == oracle.guest_state()
    assert guest.read_guest(0, 0x400000) == oracle.read_guest(0, 0x400000)
    mine, theirs = guest.snapshot(), oracle.snapshot()
    assert (mine.user, mine.kernel) == (theirs.user, theirs.kernel)
    assert guest.machine.time == oracle.machine.time
    strings = mine.events.get("machine.string", 0) + mine.events.get("emulate.string", 0)
    assert strings == theirs.events.get("machine.string", 0)
    return guest


def put(where: Layout, page: int, entry: int) -> str:
    """Assembly: one store of an entry of WINDOW's table."""
    return f"mov dword ptr [{where.slot(page):#x}], {entry:#x};"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_pages_come_and_go(scheme: str, mode: str, path: str) -> None:
    where = layout(mode)
    source = (put(where, 0, 0x100000 | ALL) + f"mov dword ptr [{WINDOW:#x}], 0x1234; mov ebx, [{WINDOW:#x}];"
              + put(where, 0, 0x101000 | ALL) + f"invlpg [{WINDOW:#x}]; mov ecx, [{WINDOW:#x}]; mov edx, [0x100000];"
              + put(where, 0, 0) + f"invlpg [{WINDOW:#x}]; mov esi, offset next; mov edi, [{WINDOW:#x}]; next: " + END)
    source = source.replace("offset next", "0x7ffffff0")
    image = paging_kernel(where, resolve(where, source, "next"))
    guest = agree(image, scheme, path)
    assert faults(guest)[0][:2] == (0, WINDOW)
    if "nested" not in scheme:
        assert guest.snapshot().events["shadow.fault.true"] == 1


def resolve(where: Layout, source: str, label: str) -> str:
    """Put the address of ``label:`` where 0x7ffffff0 stands (keystone has no offset operator)."""
    from machinelab import asm
    before = source.split(f"{label}:")[0]
    return source.replace("0x7ffffff0", hex(CODE + len(asm(where.load + before, CODE))))
