"""Loops of single instructions in user mode, as machine code in an executable page (x86-64, System V calling convention).

A loop is timed with RDTSC, which counts at a constant rate; a chain of dependent additions, one a cycle on every x86,
says how many core cycles a tick is, so that results are in core cycles at whatever clock the CPU runs.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

#: Samples of each loop, and about how many ticks one takes.
SAMPLES, TICKS = 41, 400_000
_SIGTRAP = 5

_STAMP = bytes.fromhex("0faee8 0f31 48c1e220 4809d0")   # lfence; rdtsc; shl rdx,32; or rax,rdx
_PROLOGUE = b"\x53" + _STAMP + bytes.fromhex("4989c0")  # push rbx; stamp; mov r8,rax
_EPILOGUE = _STAMP + bytes.fromhex("4c29c0 5b c3")      # stamp; sub rax,r8; pop rbx; ret


class CannotMeasure(Exception):
    """This host does not allow it; the message says why."""


@dataclass(frozen=True)
class Spread:
    """A measured figure in core cycles: median, 5th and 95th percentile of the samples."""

    value: float
    low: float
    high: float


def loop(body: bytes) -> bytes:
    """A function ``ticks(n)`` that runs ``body`` n times. The body may use RAX, RBX, RCX, RDX, RSI, R9 to R11."""
    round_ = body + bytes.fromhex("48ffcf")             # dec rdi
    back = -(len(round_) + 6)
    return _PROLOGUE + round_ + b"\x0f\x85" + struct.pack("<i", back) + _EPILOGUE


class Page:
    """An executable page with functions in it.

    :raises CannotMeasure: not x86-64, or the host gives no executable memory.
    """

    def __init__(self) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise CannotMeasure(f"this is {platform.machine()}, and the loops are x86-64 machine code")
        if sys.platform == "win32":
            raise CannotMeasure("on Windows no executable page is asked for, and the loops follow the System V convention")
        try:
            self._memory = mmap.mmap(-1, 1 << 16, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except (OSError, ValueError) as error:
            raise CannotMeasure(f"the host gives no executable page: {error}") from error
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._used = 0

    def place(self, code: bytes) -> int:
        """Put ``code`` into the page; its address."""
        at = self._used
        self._memory[at:at + len(code)] = code
        self._used = (at + len(code) + 63) & ~63
        return self._base + at

    def function(self, code: bytes) -> Callable[..., int]:
        """``code`` as a function of unsigned 64-bit numbers."""
        kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
        call = kind(self.place(code))
        # The page lives as long as a function in it.
        return lambda first, second=0, page=self: int(call(first, second))


def cpuid(page: Page, leaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a CPUID leaf."""
    # push rbx; mov eax,edi; xor ecx,ecx; cpuid; mov [rsi],eax; mov [rsi+4],ebx; +8 ecx; +12 edx; pop rbx; ret
    code = bytes.fromhex("53 89f8 31c9 0fa2 8906 895e04 894e08 89560c 5b c3")
    out = (ctypes.c_uint32 * 4)()
    page.function(code)(leaf, ctypes.addressof(out))
    return out[0], out[1], out[2], out[3]


@dataclass(frozen=True)
class Host:
    """What the CPU says of itself. No host's or user's name is in it."""

    vendor: str
    words: str
    hypervisor: str | None
    """Name of the hypervisor that the CPU's CPUID admits to, or None on bare hardware."""


def host(page: Page) -> Host:
    """Ask CPUID."""
    def text(*registers: int) -> str:
        return b"".join(r.to_bytes(4, "little") for r in registers).decode("ascii", "replace").strip("\0 ")

    _, b, c, d = cpuid(page, 0)
    brand = "".join(text(*cpuid(page, leaf)) for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004))
    hypervisor = text(*cpuid(page, 0x4000_0000)[1:]) or "unnamed" if cpuid(page, 1)[2] >> 31 else None
    return Host(text(b, d, c), " ".join(brand.split()) or "an x86-64 CPU", hypervisor)


class Clock:
    """Core cycles per tick of the time-stamp counter, from a chain of dependent additions."""

    CHAIN = 200

    def __init__(self, page: Page) -> None:
        self._chain = page.function(loop(bytes.fromhex("4883c101") * self.CHAIN))    # add rcx,1
        self._read = page.function(_STAMP + b"\xc3")
        self.ratio()  # the first run warms the page up

    def ratio(self) -> float:
        """Cycles per tick now: the best of a few runs, since nothing makes a chain faster than it is."""
        rounds = 200
        return rounds * self.CHAIN / min(self._chain(rounds) for _ in range(5))

    def mhz(self) -> float:
        """Core clock while busy, in MHz."""
        ticks_before, before = self._read(0), time.perf_counter()
        while (elapsed := time.perf_counter() - before) < 0.05:
            self._chain(100)
        return (self._read(0) - ticks_before) / elapsed / 1e6 * self.ratio()


def measure(page: Page, clock: Clock, body: bytes, copies: int = 8) -> Spread:
    """Core cycles of one ``body``: a loop with ``copies`` of it less the empty loop, by the number of copies."""
    run, empty = page.function(loop(body * copies)), page.function(loop(b""))
    rounds = 16
    while rounds < 1 << 20 and run(rounds) < TICKS:
        rounds *= 2
    # Nothing makes a loop faster than it is, so the empty one is its best run; the spread is the measured loop's.
    nothing = min(empty(rounds) for _ in range(9))
    return spread([(run(rounds) - nothing) * clock.ratio() / (rounds * copies) for _ in range(SAMPLES)])


def spread(samples: list[float]) -> Spread:
    """Median, 5th and 95th percentile (nearest rank), never below a hundredth of a cycle."""
    ordered = sorted(max(sample, 0.01) for sample in samples)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.05, 0.95)]
    return Spread(*(float(f"{value:.4g}") for value in at))


#: Instructions that user mode may run: profile's cost key -> body.
INSTRUCTIONS = {
    "insn.cpuid": bytes.fromhex("31c0 0fa2"),            # xor eax,eax; cpuid
    "insn.rdtsc": bytes.fromhex("0f31"),
    "insn.pushf": bytes.fromhex("9c 488d642408"),        # pushfq; lea rsp,[rsp+8]
}
PAIR = bytes.fromhex("9c 9d")                            # pushfq; popfq
GETPPID = bytes.fromhex("b86e000000 0f05")               # mov eax,110; syscall


def system_call(page: Page, clock: Clock) -> Spread:
    """A whole system call that does next to nothing (getppid), the kernel's entry and exit code included."""
    if not sys.platform.startswith("linux"):
        raise CannotMeasure("the system call is made by Linux's number")
    return measure(page, clock, GETPPID, copies=1)


def signal_round_trip(page: Page, clock: Clock) -> Spread:
    """INT3, the kernel's signal code, a handler of one RET, and back behind the INT3."""
    if not sys.platform.startswith("linux"):
        raise CannotMeasure("the handler is installed and left as Linux does it")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(_SIGTRAP, page.place(b"\xc3"))
    try:
        return measure(page, clock, b"\xcc", copies=1)
    finally:
        libc.signal(_SIGTRAP, before)
