"""Guests of the benchmarks: small kernels in machine code, the same for the lab and for the naive way.

Each is a loop that makes one kind of event ``count`` times and then ends: OUT to the debug-exit port, and a HLT for whoever
has no such port.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from vmlab.guests.image import GuestImage, PvNotes, Segment

ENTRY, STACK, TABLES, WINDOW, WINDOW_PAGES = 0x100000, 0x90000, 0x200000, 0x400000, 256
#: Where code written here finds its first byte in a paravirtual image, and its hypercall page.
PV_ENTRY, PV_PAGE = 0x100040, 0x101000
#: xor eax, eax; mov dx, 0xf4; out dx, eax; hlt
END = bytes.fromhex("31c0 66baf400 ef f4")
PV_END = bytes.fromhex("31f6 bb01000000 b9f4000000 ba04000000 b837000000 cd82 ebfe")


def _loop(body: str, count: int, before: str = "") -> bytes:
    """``body`` that many times, counted down in ESI."""
    code = bytes.fromhex(body)
    back = -(len(code) + 3)
    return (b"\xbc" + struct.pack("<I", STACK) + bytes.fromhex(before) + b"\xbe" + struct.pack("<I", count)
            + code + b"\x4e\x75" + struct.pack("<b", back))


def image(code: bytes, data: Mapping[int, bytes] | None = None) -> GuestImage:
    """A guest for full virtualization."""
    pieces = {ENTRY: code, **(data or {})}
    segments = tuple(Segment(address, content, len(content)) for address, content in sorted(pieces.items()))
    return GuestImage("benchmark", segments, ENTRY, None, {}, hashlib.sha256(code).hexdigest())


def pv_image(code: bytes) -> GuestImage:
    """The same for a paravirtual hypervisor."""
    memory = bytearray(0x5000)
    memory[PV_ENTRY - ENTRY:PV_ENTRY - ENTRY + len(code)] = code
    notes = PvNotes(PV_ENTRY, PV_PAGE, 0, 0, "benchmark", "xen-3.0", "generic", "yes", "")
    return GuestImage("benchmark", (Segment(ENTRY, bytes(memory), len(memory)),), PV_ENTRY, notes, {}, hashlib.sha256(code).hexdigest())


def clis(count: int) -> bytes:
    """CLI."""
    return _loop("fa", count) + END


def moves(count: int) -> bytes:
    """MOV from CR0."""
    return _loop("0f20c0", count) + END


def gated(count: int) -> tuple[bytes, int, int]:
    """Translated code for the naive way: where CLI stood, a note of the place and a jump to the gate. Code, gate, the way back."""
    # mov dword ptr [0x5000], 1 ; jmp gate
    code = _loop("c7050050000001000000 e900000000", count)
    gate = ENTRY + 0x100
    at = code.index(b"\xe9\0\0\0\0")
    code = code[:at + 1] + struct.pack("<i", gate - ENTRY - at - 5) + code[at + 5:]
    return code + END, gate, ENTRY + at + 5


def hypercalls(count: int, end: bytes = PV_END) -> bytes:
    """HYPERVISOR_xen_version(XENVER_version)."""
    # mov eax, 17 ; xor ebx, ebx ; int 0x82; no stack is needed
    return _loop("b811000000 31db cd82", count)[5:] + end


def cpuids(count: int) -> bytes:
    """CPUID, leaf 0."""
    return _loop("31c0 0fa2", count) + END


def port_reads(count: int) -> bytes:
    """IN from the interrupt controller's mask."""
    return _loop("e421", count) + END


def apic_reads(count: int) -> tuple[bytes, dict[int, bytes]]:
    """MOV from the local APIC's ID, with paging on: large pages for the lowest 4 MiB and for the APIC. Code, and the guest's tables."""
    code = _loop("a12000e0fe", count, "b810000000 0f22e0 b800002000 0f22d8 b811000080 0f22c0") + END     # CR4.PSE, CR3, CR0.PG
    return code, {TABLES: struct.pack("<I", 0x83) + bytes(4 * 1018) + struct.pack("<I", 0xFEC00083) + bytes(4 * 4)}


#: Where the tables of guests with interrupts lie, and their handler's vector and address.
IDT, GDT, VECTOR, HANDLER = 0x4000, 0x4800, 0x20, 0x110000
#: Blocks of two instructions between two interrupts of the timer.
BLOCKS_APART = 1000


def interrupted(count: int) -> tuple[bytes, bytes, dict[int, bytes]]:
    """A loop of two-instruction blocks with an interrupt every 1000 blocks or so: by the 8254 for the lab, and with nothing set up
    for the naive way, which has no devices. Both end when ``count`` interrupts have come: EBX counts them.
    """
    # 1: mov ecx, 0x10000 ; 2: dec ecx ; jnz 2b ; cmp ebx, count ; jb 1b
    loop = "b900000100 49 75fd 81fb" + struct.pack("<I", count).hex() + "72f0"
    period = 2 * BLOCKS_APART * 1_193_182 // 1_000_000_000 or 2         # a guest instruction takes a nanosecond
    tables = "0f0115" + struct.pack("<I", GDT + 0x18).hex() + "0f011d" + struct.pack("<I", IDT + 0x108).hex()    # lgdt, lidt
    tables += "ea" + struct.pack("<IH", ENTRY + 21, 8).hex()            # and into the code segment
    timer = ("b011 e620 b020 e621 b004 e621 b001 e621 b0fe e621"        # 8259A: vectors from 0x20, the timer alone
             f"b034 e643 b0{period & 0xFF:02x} e640 b0{period >> 8:02x} e640")     # 8254: channel 0, mode 2
    start = "bc" + struct.pack("<I", STACK).hex() + "31db"
    segments = "b810000000 8ed0 8ed8 8ec0"
    lab = bytes.fromhex(tables + segments + start + timer + "fb" + loop + "fa") + END
    plain = bytes.fromhex(tables + segments + start + "fb" + loop + "fa") + END
    handler = bytes.fromhex("43 50 b020 e620 58 cf")                    # inc ebx ; push eax ; end of interrupt ; pop eax ; iret
    data = {
        GDT: struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF) + struct.pack("<HI", 0x17, GDT),
        IDT + 8 * VECTOR: struct.pack("<HHHH", HANDLER & 0xFFFF, 8, 0x8E00, HANDLER >> 16) + struct.pack("<HI", 0x107, IDT),
        HANDLER: handler,
    }
    return lab, plain, data


def paging(rounds: int) -> tuple[bytes, dict[int, bytes]]:
    """Each round loads CR3 and touches every page of the window. Code, and the guest's tables."""
    code = _loop("b800002000 0f22d8"                            # mov eax, TABLES ; mov cr3, eax
                 "bb00004000 ba00010000"                        # mov ebx, WINDOW ; mov edx, WINDOW_PAGES
                 "8b03 81c300100000 4a 75f5", rounds,           # 1: mov eax, [ebx] ; add ebx, 0x1000 ; dec edx ; jnz 1b
                 "b800002000 0f22d8 b811000080 0f22c0") + END   # tables and paging on
    tables = {
        TABLES: struct.pack("<2I", TABLES + 0x1007, TABLES + 0x2007) + bytes(0xFF8),
        TABLES + 0x1000: struct.pack("<1024I", *(page << 12 | 7 for page in range(1024))),
        TABLES + 0x2000: struct.pack("<1024I", *((WINDOW >> 12) + page << 12 | 7 for page in range(1024))),
    }
    return code, tables


#: Ten instructions a pass, one block: add, store, load, xor, add, imul, rol, add, dec (ECX), jnz.
COMPUTING = "01d8 a300500000 8b1500500000 31f2 83c603 0faffe c1c305 81c301010000 49 75df"
#: Five and eight instructions a block, branches both ways.
MIXED = "01d8 a300500000 8b1500500000 31f2 83c603 0faffe f6c201 7405 01d3 c1c305 90 81c301010000 ff0504500000 49 75d1"
#: Blocks of two.
TINY = "49 75fd"


def computing(passes: int, loop: str = COMPUTING, rounds: int = 1, event: str = "90", end: bytes = END) -> bytes:
    """``rounds`` times ``event`` and then ``passes`` through the loop, which counts ECX down."""
    inner = b"\xb9" + struct.pack("<I", passes) + bytes.fromhex(loop)
    body = bytes.fromhex(event) + inner
    # EBP counts the rounds: every other register is the loop's.
    return (b"\xbc" + struct.pack("<I", STACK) + b"\xbd" + struct.pack("<I", rounds) + body + b"\x4d\x0f\x85"
            + struct.pack("<i", -(len(body) + 7)) + end)
