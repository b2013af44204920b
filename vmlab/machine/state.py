"""The CPU's hidden state: descriptor caches, CPL, interrupt shadow, error code.

Unicorn's interface does not reach them, yet a machine that delivers interrupts needs them. They lie
in QEMU's ``CPUX86State``, which a ``uc_context`` carries as raw bytes. Where each field lies is found
by :func:`calibrate` on a scratch engine and verified by experiment, never assumed for good; where the
experiment disagrees the lab refuses to run (:class:`~vmlab.errors.UnsupportedHost`).

Two windows onto the same bytes: :class:`ContextWindow` copies them out and in by the public context
functions; :class:`LiveWindow` looks at the engine's own memory, where its address can be verified.
Both give the same views, so the rest of the machine is written once.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.errors import UnsupportedHost
from vmlab.machine.engine import INTR_CALLBACK, Engine, library

ES, CS, SS, DS, FS, GS = range(6)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R10, R11 = 8, 10, 11

# Offsets from the start of CPUX86State (QEMU target/i386/cpu.h, as in Unicorn 2.1.4), in bytes.
AT_EIP, AT_EFLAGS, AT_HFLAGS, AT_HFLAGS2, AT_SEGMENTS, AT_LDT, AT_TR, AT_GDT, AT_IDT, AT_CR, AT_EFER = (
    128, 136, 176, 180, 184, 328, 352, 376, 400, 424, 592)
_HEADER = 40  # of uc_context, before the state

# hflags (QEMU target/i386/cpu.h: HF_*_SHIFT)
HF_CPL, HF_SHADOW, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_LMA, HF_CS64, HF_GUEST = 1 << 14, 1 << 15, 1 << 21
HF2_GIF, HF2_HIF, HF2_VINTR, HF2_NPT = 1 << 0, 1 << 1, 1 << 3, 1 << 6


@dataclass(frozen=True)
class Layout:
    """Byte offsets, from the start of the state, of what lies behind the segments and control registers."""

    size: int
    debug_registers: int
    #: Model-specific registers by number, each 8 bytes but for IA32_SYSENTER_CS.
    msrs: Mapping[int, int]

    @property
    def error_code(self) -> int:
        return self.debug_registers - 16

    @property
    def exception_is_int(self) -> int:
        return self.debug_registers - 12

    @property
    def old_exception(self) -> int:
        return self.debug_registers + 96

    @property
    def vm_vmcb(self) -> int:
        return self.debug_registers + 104

    @property
    def intercepts(self) -> int:
        """Start of the intercept words: 8 bytes of intercepts, then CR/DR read/write, then exceptions."""
        return self.debug_registers + 120


@functools.cache
def calibrate() -> Layout:
    """Find and verify the hidden fields on a scratch engine; raises UnsupportedHost when anything disagrees."""
    engine = Engine()
    uc = engine.uc
    uc.mem_map(0, 0x10000)
    magic = [0x51A7C0D0 + i for i in range(4)]
    for i, value in enumerate(magic):
        uc.reg_write(x86.UC_X86_REG_DR0 + i, value)
    window = ContextWindow(engine, None)
    debug = window.raw().find(struct.pack("<4Q", *magic))
    if debug < 1000 or window.raw().find(struct.pack("<4Q", *magic), debug + 1) >= 0:
        raise _unknown("debug registers not found")
    layout = Layout(window.size, debug, _msrs(uc, window))

    registers = [x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RBX,
                 x86.UC_X86_REG_RSP, x86.UC_X86_REG_RBP, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDI]
    for i, register in enumerate(registers):
        uc.reg_write(register, 0x1122334455660000 + i)
    uc.reg_write(x86.UC_X86_REG_RIP, 0x1234)
    uc.reg_write(x86.UC_X86_REG_CR2, 0x5678)
    uc.reg_write(x86.UC_X86_REG_GDTR, (0, 0x1000, 0x7F, 0))
    uc.reg_write(x86.UC_X86_REG_IDTR, (0, 0x2000, 0x6F, 0))
    uc.reg_write(x86.UC_X86_REG_TR, (0x38, 0x3000, 0x67, 0x8900))
    # mov ds, ax with a selector beyond the GDT: #GP with the selector as its error code.
    uc.mem_write(0x4000, b"\x8e\xd8")
    seen: list[tuple[int, int, int, int]] = []

    def on_exception(_uc: int, vector: int, _data: int) -> None:
        window.load()
        seen.append((vector, window.i32[layout.error_code // 4], window.i32[layout.old_exception // 4], window.u64[AT_EIP // 8]))
        engine.stop()

    engine.hook(uc_const.UC_HOOK_INTR, INTR_CALLBACK, on_exception)
    window.load()
    checks = {
        "general registers": list(window.u64[0:8]) == [0x1122334455660000 + i for i in range(8)],
        "RIP": window.u64[AT_EIP // 8] == 0x1234,
        "CR2": window.u64[AT_CR // 8 + 2] == 0x5678,
        "GDTR": (window.u64[AT_GDT // 8 + 1], window.u32[AT_GDT // 4 + 4]) == (0x1000, 0x7F),
        "IDTR": (window.u64[AT_IDT // 8 + 1], window.u32[AT_IDT // 4 + 4]) == (0x2000, 0x6F),
        "TR": tuple(window.u32[AT_TR // 4: AT_TR // 4 + 1]) == (0x38,) and window.u64[AT_TR // 8 + 1] == 0x3000,
        "CPL": window.u32[AT_HFLAGS // 4] & HF_CPL == 0,
        "old exception": window.i32[layout.old_exception // 4] == -1,
    }
    uc.reg_write(x86.UC_X86_REG_RAX, 0x1230)
    engine.start(0x4000)
    checks["error code"] = len(seen) == 1 and seen[0] == (13, 0x1230, 13, 0x4000)
    uc.reg_write(x86.UC_X86_REG_RCX, 0xC0000080)
    uc.reg_write(x86.UC_X86_REG_RDX, 0)
    uc.mem_write(0x4010, b"\x0f\x32\xf4")  # rdmsr EFER; hlt
    engine.start(0x4010)
    window.load()
    checks["EFER"] = window.u64[0] & 0xFFFFFFFF == window.u64[AT_EFER // 8] & 0xFFFFFFFF
    wrong = [name for name, ok in checks.items() if not ok]
    if wrong:
        raise _unknown(f"{', '.join(wrong)} not where expected")
    return layout


#: MSRs that system calls use, in the state's order: IA32_SYSENTER_ESP and _EIP, STAR, LSTAR, CSTAR, SFMASK.
_SYSTEM_CALLS = (0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084)


def _msrs(uc: Any, window: Window) -> Mapping[int, int]:
    """Where the MSRs of system calls lie, each found by a value of its own; IA32_SYSENTER_CS, 16 bits, is checked in its place."""
    found: dict[int, int] = {}
    for i, number in enumerate(_SYSTEM_CALLS):
        value = 0x00005E7C0DE51A70 + i
        uc.reg_write(x86.UC_X86_REG_MSR, (number, value))
        window.load()
        raw, pattern = window.raw(), struct.pack("<Q", value)
        found[number] = raw.find(pattern)
        if found[number] < 0 or found[number] % 8 or raw.find(pattern, found[number] + 1) >= 0:
            raise _unknown(f"MSR {number:#x} not found")
    selector = found[0x174] = found[0x175] - 8
    for value in (0xA5A4, 0x1230):
        uc.reg_write(x86.UC_X86_REG_MSR, (0x174, value))
        window.load()
        if window.u32[selector // 4] != value:
            raise _unknown("MSR 0x174 not where expected")
    return MappingProxyType(found)


def _unknown(what: str) -> UnsupportedHost:
    return UnsupportedHost(f"the CPU state of this Unicorn build is not understood ({what}); install unicorn 2.1.4 and run `vmlab doctor`")


class Window:
    """Typed views of the state: ``u64``, ``u32`` and ``i32`` indexed by byte offset / item size."""

    live = False

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        memory = (ctypes.c_ubyte * size).from_address(address)
        view = memoryview(memory).cast("B")
        self.u64 = view.cast("Q")
        self.u32 = view.cast("I")
        self.i32 = view.cast("i")

    def raw(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def load(self) -> None:
        """Make the views show the CPU's state."""

    def store(self) -> None:
        """Make the CPU's state what the views show."""


class ContextWindow(Window):
    """The state copied out and in by ``uc_context_save`` and ``uc_context_restore``: any host."""

    def __init__(self, engine: Engine, layout: Layout | None) -> None:
        self._engine = engine
        self._context = engine.uc.context_save()
        pointer = ctypes.cast(self._context.context, ctypes.c_void_p).value
        if pointer is None:
            raise _unknown("no context")
        super().__init__(pointer + _HEADER, self._context.size - _HEADER)
        if layout is not None and layout.size != self.size:
            raise _unknown("context size changed")
        self._save, self._restore, self._handle = library().uc_context_save, library().uc_context_restore, engine.handle
        self._blob = ctypes.c_void_p(pointer)

    def load(self) -> None:
        self._save(self._handle, self._blob)

    def store(self) -> None:
        self._restore(self._handle, self._blob)


class LiveWindow(Window):
    """The engine's own state in place: no copying. Only where :func:`live_address` verified it."""

    live = True


# Unicorn 2.1.4's Linux x86-64 wheel: uc_struct.cpu, and the state inside X86CPU.
_UC_CPU, _CPU_STATE = 0x1B8, 0x8A50


def live_address(engine: Engine, layout: Layout) -> int | None:
    """Where the engine keeps its state, or None where that cannot be verified.

    The guess holds for one build; it is accepted only if the memory is readable and equals a context
    saved at the same moment, byte for byte, before and after a register was changed.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8 or engine.handle.value is None:
        return None
    found = _peek(engine.handle.value + _UC_CPU, 8)
    if found is None:
        return None
    address = int.from_bytes(found, "little") + _CPU_STATE
    if _peek(address, layout.size) is None:
        return None
    window = ContextWindow(engine, layout)
    before = engine.read_register(x86.UC_X86_REG_RAX)
    try:
        for probe in (0x5A17C0DE12345678, 0x0123456789ABCDEF):
            engine.write_register(x86.UC_X86_REG_RAX, probe)
            window.load()
            if ctypes.string_at(address, layout.size) != window.raw() or window.u64[0] != probe:
                return None
    finally:
        engine.write_register(x86.UC_X86_REG_RAX, before)
    return address


def _peek(address: int, size: int) -> bytes | None:
    """Memory of this process, or None where there is none to read: the kernel looks, so a wrong address is harmless."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            data = memory.read(size)
    except (OSError, ValueError, OverflowError):
        return None
    return data if len(data) == size else None
