"""Random sequences of system instructions at CPL 0 and CPL 3: every full technique ends in the bare machine's state.

A program is a row of 16-byte slots. An exception handler writes vector, error code and EIP of what faulted to a log in
the guest's memory and goes on at the next slot, so that a sequence never ends early and every exception is compared
too: the log is part of the memory digest. What the sequences leave out, and why: TF (single steps), NT (IRET would
switch tasks), HLT (nothing wakes these guests), and what Unicorn accepts where a CPU and the VMMs raise #GP (LTR of a
null selector).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machinelab import CODE, CODE0, CODE3, DATA, DATA0, DATA3, DEBUG_EXIT, SPARE, STACK3, TASK, USER, USER_CODE, USER_DATA, asm, kernel

from vmlab.guests import GuestImage
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

SLOT = 16
LOG = 0x6000                     # pointer to the next free entry, then entries of 16 bytes
BOXES = DATA + 0x100             # pseudo-descriptors and far pointers for the programs below

#: On the way into a handler the CPU pushed an error code for some vectors; 6, 3, 4, 0x80 have none.
_LOGGED = ("push eax; push ebx; mov ebx, dword ptr ss:[{log}]; mov dword ptr ss:[ebx], {vector}; mov eax, [esp + 8];"
           "mov dword ptr ss:[ebx + 4], eax; mov eax, [esp + {eip}]; mov dword ptr ss:[ebx + 8], eax; add ebx, 16;"
           "mov dword ptr ss:[{log}], ebx; {resume} pop ebx; pop eax; {drop} iretd")
_NEXT_SLOT = "add eax, {slot}; and eax, {mask}; mov [esp + {eip}], eax;"


def handler(vector: int, *, error_code: bool, resume: bool = True) -> str:
    """Log the exception; go on at the next slot, or (``resume`` off) behind the instruction."""
    eip = 12 if error_code else 8
    skip = _NEXT_SLOT.format(slot=SLOT, mask=0x100000000 - SLOT, eip=eip) if resume else ""
    return _LOGGED.format(log=LOG, vector=vector, eip=eip, resume=skip, drop="add esp, 4;" if error_code else "")


HANDLERS: dict[int, str | tuple[str, int]] = {
    **{vector: handler(vector, error_code=False) for vector in (0, 5, 6, 7)},
    **{vector: handler(vector, error_code=True) for vector in (10, 11, 12, 13)},
    3: (handler(3, error_code=False, resume=False), 3),
    4: (handler(4, error_code=False, resume=False), 3),
    0x80: (handler(0x80, error_code=False, resume=False), 3),
    0x82: handler(0x82, error_code=False, resume=False),      # DPL 0: INT 0x82 from ring 3 is #GP
    0x81: ("xor eax, eax;" + DEBUG_EXIT, 3),
}

SELECTORS = (0, 3, CODE0, DATA0, CODE3, DATA3, CODE3 | 3, DATA3 | 3, DATA0 | 3, TASK, SPARE, 0x38, 0x4C, 0xFFF8)
SEGMENTS = ("ds", "es", "fs", "gs")
#: IF, IOPL, DF and the arithmetic flags, AC, ID is left alone: CPUID exists.
FLAGS = 0x47ED5 & ~0x4100
CR0, CR4 = 0x11, 0x0

PLAIN = (
    "cli", "sti", "pushfd; pop ebx", "pushf; pop bx", "clts", "wbinvd", "invd", "invlpg [0x5000]", "cpuid", "rdtsc", "rdtscp", "rdpmc",
    "ud2", "int3", "into", "int 0x80", "int 0x82", "int 0x90", "nop", "xor ecx, ecx; div ecx", "add eax, 0x7fffffff",
    "sgdt [0x5000]", "sidt [0x5008]", "sldt ax", "str bx", "smsw cx", "smsw edx", "sldt [0x5010]", "str [0x5012]", "smsw [0x5014]",
    "mov eax, cr0", "mov ebx, cr2", "mov ecx, cr3", "mov edx, cr4", "mov eax, dr0", "mov eax, dr7", "mov dr1, ecx",
    "in al, 0x80", "in al, dx", "out 0x80, al", "mov dx, 0x3ff; in al, dx", "mov dx, 0x3ff; out dx, al", "mov dx, 0x3ff; in ax, dx",
    "mov esi, 0x5000; mov dx, 0x3ff; outsb", "mov edi, 0x5040; mov dx, 0x3ff; insb", "mov edi, 0x5040; mov dx, 0x80; insd",
    "mov ecx, 3; mov dx, 0x3ff; rep outsb", "mov ecx, 3; mov dx, 0x3ff; rep insb",
    "push cs; pop eax", ".byte 0x0e; pop eax", ".byte 0x16; pop ecx", "push ss; pop eax",
    "push ds; pop es", "push es; pop ds", "push fs; pop gs", "pop ds", "pop ss",
    "mov eax, cs", "mov ebx, ss", "mov cx, ds", "mov [0x5016], es", "mov [0x5018], cs",
    f"lgdt [{BOXES}]", f"lidt [{BOXES + 8}]", f"lds esi, [{BOXES + 16}]", f"les edi, [{BOXES + 24}]", f"lss ebx, [{BOXES + 32}]",
    f"lfs eax, [{BOXES + 24}]", "mov ecx, 0xc0000080; rdmsr", "mov ecx, 0x12345678; rdmsr", "xor eax, eax; lldt ax", "mov eax, 8; lldt ax",
)


def _to(slot: int) -> str:
    return hex(slot + SLOT)


# Each makes assembly for the slot at an address, at most 16 bytes of it.
Instruction = Callable[[int], str]
_one_of_plain = st.sampled_from(PLAIN).map(lambda text: lambda at: text)
_selector = st.sampled_from(SELECTORS)
INSTRUCTIONS: st.SearchStrategy[Instruction] = st.one_of(
    _one_of_plain, _one_of_plain, _one_of_plain,
    st.integers(0, 0xFFFFFFFF).map(lambda v: lambda at: f"push {v & FLAGS | 2:#x}; popfd"),
    st.integers(0, 0xFFFF).map(lambda v: lambda at: f".byte 0x66, 0x68; .word {v & FLAGS | 2:#x}; popf"),
    st.integers(0, 0xFFFFFFFF).map(lambda v: lambda at: f"push {v & FLAGS | 2:#x}; .byte 0x0e; push {_to(at)}; iretd"),
    st.sampled_from((0, 1, 0x80000000, 0x80000001, 0x40000000)).map(lambda leaf: lambda at: f"mov eax, {leaf:#x}; cpuid"),
    # MP, EM, TS, NE, WP, AM: what no instruction here depends on; PE stays and PG stays off.
    st.integers(0, 0xFFFFFFFF).map(lambda v: lambda at: f"mov eax, {v & 0x5002E | CR0:#x}; mov cr0, eax"),
    st.integers(0, 15).map(lambda v: lambda at: f"mov eax, {v | 1}; lmsw ax"),
    st.integers(0, 0xFFFFFFFF).map(lambda v: lambda at: f"mov ecx, {v:#x}; mov cr2, ecx"),
    st.sampled_from((0, 0x1000, 0x7000)).map(lambda v: lambda at: f"mov ecx, {v:#x}; mov cr3, ecx"),
    st.sampled_from((0, 4, 8)).map(lambda v: lambda at: f"mov ecx, {v | CR4:#x}; mov cr4, ecx"),
    st.tuples(st.sampled_from(("lar", "lsl")), _selector).map(lambda p: lambda at: f"mov ecx, {p[1]}; {p[0]} ebx, ecx"),
    st.tuples(st.sampled_from(("verr", "verw")), _selector).map(lambda p: lambda at: f"mov ecx, {p[1]}; {p[0]} cx"),
    st.tuples(st.sampled_from((*SEGMENTS, "ss")), _selector).map(lambda p: lambda at: f"mov ecx, {p[1]}; mov {p[0]}, ecx"),
    st.tuples(st.sampled_from(SEGMENTS), _selector).map(lambda p: lambda at: f"push {p[1]}; pop {p[0]}"),
    _selector.filter(lambda s: s > 3).map(lambda s: lambda at: f"mov ecx, {s}; ltr cx"),
    _selector.map(lambda s: lambda at: f"push {s}; push {_to(at)}; retf"),
    _selector.map(lambda s: lambda at: f".byte 0xea; .long {_to(at)}; .word {s}"),
    _selector.map(lambda s: lambda at: f".byte 0x9a; .long {_to(at)}; .word {s}"),
    st.integers(0, 3).map(lambda n: lambda at: f"mov eax, cr{(0, 2, 3, 4)[n]}; mov ecx, eax"),
)


def slots(program: list[Instruction], origin: int, end: str) -> bytes:
    """The program's code at ``origin``."""
    code = b""
    for instruction in program:
        raw = asm(instruction(origin + len(code)), origin + len(code))
        assert len(raw) <= SLOT
        code += raw.ljust(SLOT, b"\x90")
    return code + asm(end, origin + len(code))


def pseudo(limit: int, base: int) -> bytes:
    return limit.to_bytes(2, "little") + base.to_bytes(4, "little") + bytes(2)


def far(offset: int, selector: int) -> bytes:
    return offset.to_bytes(4, "little") + selector.to_bytes(2, "little") + bytes(2)


BOXED = pseudo(7 * 8 - 1, 0x1000) + pseudo(0x7FF, 0x2000) + far(0x5000, DATA0) + far(0x5040, DATA3) + far(5, DATA0)
TO_USER = f"push {USER_DATA}; push {STACK3}; push {{flags}}; push {USER_CODE}; push {USER}; iretd"


def image(program: list[Instruction], ring: int, iopl: int) -> GuestImage:
    """A kernel that runs ``program`` in this ring."""
    data = {BOXES: BOXED, LOG: (LOG + 16).to_bytes(4, "little")}
    if ring == 0:
        return kernel(slots(program, CODE, "xor eax, eax;" + DEBUG_EXIT), HANDLERS, data=data)
    data[USER] = slots(program, USER, "int 0x81")
    return kernel(TO_USER.format(flags=hex(2 | iopl << 12)), HANDLERS, data=data)


def finish(kind: type[Strategy], guest: GuestImage, **parameters: str) -> tuple[object, ...]:
    """All that must be the same: how it ended, registers, memory and device writes, guest instructions, exception log."""
    strategy = kind(Machine(64 << 20, "portable"), parameters)
    strategy.load(guest, "")
    stop = strategy.run(50_000)
    assert stop == Stop(StopReason.EXIT, 0)
    counted = strategy.snapshot()
    return (strategy.guest_state(), logged(strategy), strategy.machine.device_log, (counted.user, counted.kernel), strategy.state_digest())


def logged(strategy: Strategy) -> list[tuple[int, int, int]]:
    """(vector, top of the stack at entry, EIP) of every exception."""
    end = int.from_bytes(strategy.read_guest(LOG, 4), "little")
    raw = strategy.read_guest(LOG + 16, end - LOG - 16)
    words = [int.from_bytes(raw[i:i + 4], "little") for i in range(0, len(raw), 4)]
    return [(words[i], words[i + 1], words[i + 2]) for i in range(0, len(words), 4)]


TECHNIQUES: tuple[tuple[type[Strategy], dict[str, str]], ...] = (
    (TrapAndEmulate, {"sensitive": "trap"}),
    (BinaryTranslation, {"emulation": "callout"}),
    (BinaryTranslation, {"emulation": "in-cache"}),
    (HardwareAssisted, {}),
)


#: In user code, which a translator runs directly, these neither trap nor lie: they show the machine's tables and flags.
VISIBLE = ("pushf", "popf", "iret", "sgdt", "sidt", "sldt", "str ", "smsw", "lar", "lsl", "verr", "verw")


def compare(program: list[Instruction], ring: int, iopl: int) -> None:
    guest = image(program, ring, iopl)
    bare = finish(Native, guest)
    seen = ring == 3 and any(word in instruction(USER) for instruction in program for word in VISIBLE)
    for kind, parameters in TECHNIQUES:
        if seen and kind is BinaryTranslation:
            continue
        found = finish(kind, guest, **parameters)
        for what, here, there in zip(("state", "exceptions", "device writes", "instructions", "memory"), found, bare, strict=True):
            assert here == there, (kind.name, parameters, what)


PROGRAMS = st.lists(INSTRUCTIONS, min_size=1, max_size=24)
RINGS = {"ring": st.sampled_from((0, 0, 3)), "iopl": st.sampled_from((0, 3))}
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True, "print_blob": False}


@settings(max_examples=12, **QUIET)
@given(program=PROGRAMS, **RINGS)
def test_any_sequence_of_system_instructions_ends_as_on_the_bare_machine(program: list[Instruction], ring: int, iopl: int) -> None:
    compare(program, ring, iopl)


@pytest.mark.slow
@settings(max_examples=400, **QUIET)
@given(program=PROGRAMS, **RINGS)
def test_many_sequences_of_system_instructions_end_as_on_the_bare_machine(program: list[Instruction], ring: int, iopl: int) -> None:
    compare(program, ring, iopl)


@pytest.mark.parametrize("ring", [0, 3])
def test_each_instruction_alone_ends_as_on_the_bare_machine(ring: int) -> None:
    """Twenty a boot, those that a translator lets user code see in boots of their own."""
    apart = [text for text in PLAIN if any(word in text for word in VISIBLE)]
    for texts in ([text for text in PLAIN if text not in apart], apart):
        for start in range(0, len(texts), 20):
            compare([lambda at, text=text: text for text in texts[start:start + 20]], ring, 0)
