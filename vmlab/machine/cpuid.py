"""CPUID, as the physical CPU answers it."""

from __future__ import annotations

import functools

from unicorn import x86_const as x86

from vmlab.machine.engine import Engine


@functools.cache
def _scratch() -> Engine:
    engine = Engine()
    engine.uc.mem_map(0, 0x1000)
    engine.uc.mem_write(0, b"\x0f\xa2\xf4")
    return engine


@functools.cache
def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """(EAX, EBX, ECX, EDX) as the physical CPU answers CPUID: a VMM that emulates it executes it."""
    engine = _scratch()
    engine.write_register(x86.UC_X86_REG_RAX, leaf)
    engine.write_register(x86.UC_X86_REG_RCX, subleaf)
    engine.start(0)
    a, b, c, d = (engine.read_register(r) & 0xFFFFFFFF for r in (
        x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX))
    return a, b, c, d
