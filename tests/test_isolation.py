"""A hostile kernel under full virtualization: what lies outside its frames is poisoned before and unchanged after.

The kernel maps frames that it was not given, aims page tables, CR3 and its disk's DMA at the monitor's memory, stores into the monitor's part
of its linear space, and executes AMD-V's instructions with machine addresses. On the bare machine each of these reaches an empty
bus or faults; so it must here, and reaching for foreign frames is reported. Task switches that bring a CR3: test_tasks.py.
"""

from __future__ import annotations

import pytest
from machinelab import asm
from paginglab import ALL, SCHEMES, layout, raw_kernel, raw_origin

from vmlab.errors import TripleFault
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.strategies.techniques import GUEST_MEMORY
from vmlab.strategies.trap_and_emulate import TrapAndEmulate
from vmlab.vmm.space import GUEST_FRAMES, HOLE, POOL, hole_address

#: Guest-physical addresses that a VMM that only adds would turn into: behind the guest, the machine's end, and the monitor below it.
FOREIGN = (GUEST_MEMORY, GUEST_MEMORY + (15 << 20), (1 << 32) - (16 << 20), (1 << 40) - (16 << 20) + 0x20000)
_AMD_V = ("0f01d8", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01d9")     # vmrun, vmload, vmsave, stgi, clgi, vmmcall

ALL_SCHEMES = {**SCHEMES, "trap-and-emulate/none": (TrapAndEmulate, {"memory": "none", "sensitive": "trap"})}


#: Where the disk is told to put a sector. The first begins inside the guest; the last wraps what only adds.
BUFFERS = (GUEST_MEMORY - 0x100, GUEST_MEMORY, GUEST_MEMORY + 0x20000, (1 << 64) - GUEST_FRAMES + 0x20000)


def dma(gpa: int) -> str:
    """Read a sector of the disk to ``gpa``, wait until that has failed or been done, and acknowledge."""
    outs = ((0xC08, 0), (0xC0C, 1), (0xC10, gpa & 0xFFFFFFFF), (0xC14, gpa >> 32), (0xC18, 1))
    return ("".join(f"mov edx, {port:#x}; mov eax, {value:#x}; out dx, eax;" for port, value in outs)
            + "mov ecx, 60000; wait_a_while: dec ecx; jnz wait_a_while; mov edx, 0xc18; in eax, dx; mov edx, 0xc1c; out dx, eax;")


def hostile(mode: str) -> tuple[bytes, int]:
    """Machine code of all attacks, CR3 the last; and how many foreign frames it maps. A fault goes on at EBP."""
    where = layout(mode)
    bits, r = (64, "r") if mode == "64" else (32, "e")
    origin, code = raw_origin(where), bytearray()
    attacks: list[str | bytes] = []
    mapped = [gpa for gpa in FOREIGN if where.size == 8 or gpa < 1 << 32]
    for page, gpa in enumerate(mapped):
        store = f"mov edi, {where.slot(page):#x}; mov dword ptr [{r}di], {(gpa | ALL) & 0xFFFFFFFF:#x};"
        if where.size == 8:
            store += f"mov dword ptr [{r}di + 4], {gpa >> 32:#x};"
        attacks.append(store + f"mov edi, {where.base + 0x1000 * page:#x}; mov eax, [{r}di]; mov dword ptr [{r}di], 0x666; mov ecx, 1024; rep stosd;")
    # A page table at a foreign address, then stores through it.
    attacks.append(f"mov edi, {where.directory:#x}; mov esi, [{r}di]; mov dword ptr [{r}di], {GUEST_MEMORY + 0x100000 | ALL:#x};"
                   f"mov {r}ax, cr3; mov cr3, {r}ax; mov edi, {where.base:#x}; mov dword ptr [{r}di], 0x666;")
    attacks.append(f"mov edi, {where.directory:#x}; mov [{r}di], esi; mov {r}ax, cr3; mov cr3, {r}ax;")
    attacks += [f"mov {r}di, {hole_address(HOLE + offset, bits):#x}; mov dword ptr [{r}di], 0x666;" for offset in (0, 0x11000, 0x3FF000)]
    attacks.append(f"mov {r}di, {hole_address(HOLE, bits):#x}; mov dword ptr [{r}sp - 16], 0; sgdt [{r}di];")
    attacks += [dma(gpa) for gpa in BUFFERS]
    attacks += [asm("mov eax, 0x20000;", 0, bits) + bytes.fromhex(instruction) for instruction in _AMD_V]
    attacks.append("mov ecx, 0xc0010117; mov eax, 0x20000; xor edx, edx; wrmsr;")      # VM_HSAVE_PA
    attacks.append("mov ecx, 0xc0000080; rdmsr; or eax, 0x1000; wrmsr;")               # EFER.SVME
    attacks.append(f"mov eax, {GUEST_MEMORY + 0x20000:#x}; mov cr3, {r}ax; nop; hlt;")
    landing = len(asm("mov ebp, 0x12345678;", 0, bits))
    for attack in attacks:
        size = len(attack) if isinstance(attack, bytes) else len(asm(attack, 0, bits))
        code += asm(f"mov ebp, {origin + len(code) + landing + size:#x};", 0, bits)
        code += attack if isinstance(attack, bytes) else asm(attack, 0, bits)
    return bytes(code) + asm("xor eax, eax; mov edx, 0xf4; out dx, eax; hlt", 0, bits), len(mapped)


#: (hpa, size) of what is neither the guest's nor changed by the VMM for it.
OUTSIDE = ((0x30000, (4 << 20) - 0x30000), (POOL.stop - (4 << 20), 4 << 20), (GUEST_FRAMES + GUEST_MEMORY, 16 << 20))

_CASES = [(scheme, mode) for scheme in ALL_SCHEMES for mode in ("32", "pae", "64")]


@pytest.mark.parametrize(("scheme", "mode"), _CASES)
def test_a_hostile_kernel_harms_nobody_and_is_reported(scheme: str, mode: str) -> None:
    kind, parameters = ALL_SCHEMES[scheme]
    code, foreign = hostile(mode)
    guest = kind(Machine(64 << 20, "portable", disk=b"\x66" * 512), parameters)
    guest.load(raw_kernel(layout(mode), code, {}), "")
    for at, size in OUTSIDE:
        guest.machine.ram.write(at, b"\xa5" * size)
    if mode == "pae" and "nested" not in scheme:
        assert guest.run(1_000_000) == Stop(StopReason.EXIT, 0)   # such directory pointers have reserved bits: loading them is #GP
    else:
        with pytest.raises(TripleFault):
            guest.run(1_000_000)
    for at, size in OUTSIDE:
        assert guest.machine.ram.read(at, size) == b"\xa5" * size, hex(at)
    assert guest.snapshot().events["safety.refused"] == len(guest.refused) >= foreign + len(BUFFERS)
    assert all("beyond its 32 MiB" in words for words in guest.refused)
