"""Template of a guilty access that writes: simulated in the cache where that is sound, else a callout.

A page that the VMM watches is read-only where the guest has it. For a guilty access the VMM opens a *window* on it
(:mod:`vmlab.vmm.translation.windows`): the same frame, writable, in the hole, and a map that says for each byte of the
page whether a store there concerns the VMM. The template finds the address, looks whether it is in the window's page and
what the map says, and does the guest's instruction through the window. Else it calls out.

Flags are the guest's all the way: LEA subtracts, JECXZ compares, a table answers what else must be asked.
"""

from __future__ import annotations

import struct

from capstone import x86_const as cs_x86

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RAX, RBP, RCX, RSP
from vmlab.vmm.operands import REGISTERS
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.layout import BELOW_16, NO_WINDOW, SIMULATED
from vmlab.vmm.translation.relative import is_relative
from vmlab.vmm.translation.units import Site

_OPERATIONS = frozenset(getattr(cs_x86, f"X86_INS_{name}") for name in (
    "MOV", "ADD", "ADC", "SUB", "SBB", "AND", "OR", "XOR", "INC", "DEC", "NOT", "NEG", "XCHG", "XADD"))
_ACCUMULATOR_STORES = {0xA2: 0x88, 0xA3: 0x89}   # MOV moffs, AL/EAX: the same with ModRM
_SS = 0x36


def simulable(ins: Instruction, bits: int) -> bool:
    """Whether the template covers this instruction: a known operation of a register's size at most on memory in DS or SS, not relative to RIP."""
    found = ins.cs
    if found.id not in _OPERATIONS or found.addr_size != bits // 8 or found.prefix[1] not in (0, 0x3E, _SS):
        return False
    if bits == 64 and (is_relative(ins) or found.opcode[0] in _ACCUMULATOR_STORES):
        return False
    target = next((o for o in found.operands if o.type == cs_x86.X86_OP_MEM), None)
    return target is not None and target.size <= bits // 8 and _scratch(ins) is not None


def _scratch(ins: Instruction) -> int | None:
    """The register that holds the address in the window: one that the instruction itself does not use."""
    used = {REGISTERS[o.reg][0] for o in ins.cs.operands if o.type == cs_x86.X86_OP_REG}
    return next((register for register in (RCX, RAX) if register not in used), None)


def _parts(ins: Instruction, bits: int) -> tuple[bytes, int, bytes, int, bytes, bytes, bool]:
    """(prefixes, REX or 0, opcode, reg field, memory operand as ModRM's mod and rm with SIB and displacement, immediate, addressed by EBP or ESP)."""
    raw, found = ins.raw, ins.cs
    at = 0
    while raw[at] in (0xF0, 0xF2, 0xF3, 0x66, 0x3E, _SS):
        at += 1
    prefixes = bytes(b for b in raw[:at] if b not in (0x3E, _SS))
    rex = raw[at] if bits == 64 and raw[at] & 0xF0 == 0x40 else 0
    at += bool(rex)
    if raw[at] in _ACCUMULATOR_STORES:
        return prefixes, 0, bytes([_ACCUMULATOR_STORES[raw[at]]]), 0, b"\x05" + raw[at + 1:], b"", False
    modrm_at = at + (2 if raw[at] == 0x0F else 1)
    modrm = raw[modrm_at]
    immediate = ins.size - found.imm_size if found.imm_size else ins.size
    target = next(o for o in found.operands if o.type == cs_x86.X86_OP_MEM)
    stack = target.mem.base in REGISTERS and REGISTERS[target.mem.base][0] in (RBP, RSP)
    return (prefixes, rex, raw[at:modrm_at], modrm >> 3 & 7, bytes([modrm & 0xC7]) + raw[modrm_at + 1:immediate], raw[immediate:], stack)


def _operand(em: Emitter, raw: bytes) -> int:
    """Emit an instruction that ends with a displacement; where that lies."""
    return em.emit(raw) + len(raw) - 4


def simulate(em: Emitter, at: int, ins: Instruction) -> Site:
    """Emit the template; the caller sets where its callouts come back to. The window is bound later (:class:`Site`'s ``binding``)."""
    forms, scratch = em.forms, _scratch(ins)
    wide = forms.bits == 64
    prefixes, rex, opcode, reg, memory, immediate, stack = _parts(ins, forms.bits)
    assert scratch is not None
    site = em.site("adapted", at, ins)
    page, chart, frame = NO_WINDOW
    em.save(RCX)
    em.emit((bytes([0x48 | rex & 3]) if wide else b"") + b"\x8d" + bytes([memory[0] | RCX << 3]) + memory[1:])      # lea ecx, <the operand>
    page_at = _operand(em, forms.subtract(page))
    em.emit(forms.store(SIMULATED, RCX))
    if wide:
        em.emit(forms.load_low(RCX, SIMULATED + 4))
        em.callout_if_not(b"\xe3", site)
    em.emit(forms.load_half(SIMULATED + 2))
    em.callout_if_not(b"\xe3", site)
    em.emit(forms.load_byte(SIMULATED + 1))
    em.emit(forms.load_by_byte(BELOW_16))
    em.callout_if_not(b"\xe3", site)
    em.emit(forms.load(RCX, SIMULATED))
    chart_at = _operand(em, forms.load_by_byte(chart))
    em.callout_if_not(b"\xe3", site)
    if scratch == RCX:
        em.emit(forms.load(RCX, SIMULATED))
    else:
        em.restore(RCX)
        em.save(scratch)
        em.emit(forms.load(scratch, SIMULATED))
    segment = bytes([_SS]) if not wide and (stack or ins.cs.prefix[1] == _SS) else b""
    before = prefixes + segment + (bytes([rex & ~3]) if rex else b"") + opcode + bytes([0x80 | reg << 3 | scratch])
    through = em.emit(before + struct.pack("<I", frame) + immediate, Tag(ins, "incache"), "simulated")
    site.binding = (page_at, chart_at, through + len(before))
    em.commit((at + ins.size) & forms.mask)
    em.restore(scratch)
    return site
