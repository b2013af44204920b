"""Templates: sensitive instructions that work on the virtual CPU without leaving the cache.

Each leaves the guest's registers and flags as the guest's instruction would. What a template does not cover
(operand-size prefixes, a change of IOPL, TF or NT) calls out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RAX, RCX, RSP
from vmlab.vmm.operands import CONTROL, REGISTERS
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.layout import (
    BELOW_16,
    FLAGS_REFUSED,
    FLAGS_UPPER,
    FLAGS_VIRTUAL,
    NEGATIVE_STACK,
    NEW_FLAGS,
    NEW_STACK,
    TARGET,
    VIRTUAL_CR,
    VIRTUAL_FLAGS,
    saved,
)
from vmlab.vmm.translation.priority import mov_from_cr8, mov_to_cr8
from vmlab.vmm.translation.user_return import iret_to_user

Template = Callable[[Emitter, int, Instruction], bool]


def has_size_prefix(instruction: Instruction) -> bool:
    """16-bit operands in 32-bit code."""
    return 0x66 in bytes(instruction.cs.prefix)


def _done(instruction: Instruction) -> Tag:
    return Tag(instruction, "incache")


def _following(em: Emitter, at: int, instruction: Instruction) -> int:
    return (at + instruction.size) & em.forms.mask


def _cli(em: Emitter, at: int, ins: Instruction) -> bool:
    em.emit(em.forms.store_byte(VIRTUAL_FLAGS + 1, em.mode.iopl << 4), _done(ins))
    return False


def _sti(em: Emitter, at: int, ins: Instruction) -> bool:
    """The check for a waiting interrupt follows the next instruction: that is the shadow (SDM Vol. 2, STI)."""
    em.emit(em.forms.store_byte(VIRTUAL_FLAGS + 1, em.mode.iopl << 4 | 2), _done(ins))
    return False


def _pushf(em: Emitter, at: int, ins: Instruction) -> bool:
    """The physical IF is always 1 and IOPL 0, so image - 0x200 + virtual flags is the guest's; LEA adds without flags."""
    forms = em.forms
    em.emit(b"\x9c")
    em.moved_stack(forms.word)
    em.save(RAX)
    em.save(RCX)
    em.emit(forms.load_stack(RAX, 0))
    em.emit(forms.load_low(RCX, VIRTUAL_FLAGS))
    em.emit(forms.rex + b"\x8d\x84\x08" + struct.pack("<i", -0x200))          # lea eax, [eax + ecx - 0x200]
    em.emit(forms.store_stack(RAX))
    em.restore(RAX)
    em.restore(RCX, _done(ins))
    return False


def _flags_from(em: Emitter, at: int, ins: Instruction, offset: int, *, iret: bool) -> None:
    """ECX = what the second byte of the virtual flags becomes, from the image at [esp + offset]; or a callout."""
    forms = em.forms
    checks = [(offset + 1, FLAGS_REFUSED), (offset + 2, FLAGS_UPPER)] if iret else [(offset + 1, FLAGS_REFUSED)]
    for byte, table in checks:
        em.emit(forms.stack_byte(byte))
        em.emit(forms.load_by_byte(table))
        em.callout_if_not(b"\xe3", em.site("iret" if iret else "popf", at, ins))
    em.emit(forms.stack_byte(offset + 1))
    em.emit(forms.load_by_byte(FLAGS_VIRTUAL))


def _popf(em: Emitter, at: int, ins: Instruction) -> bool:
    """IF to the virtual CPU, the rest by a real POPF, which above CPL 0 leaves the physical IF and IOPL alone."""
    em.save(RCX)
    _flags_from(em, at, ins, 0, iret=False)
    em.emit(b"\x9d")
    em.emit(em.forms.store_cl(VIRTUAL_FLAGS + 1), _done(ins))
    em.commit(_following(em, at, ins))
    em.check_pending()
    em.restore(RCX)
    return False


def _iret(em: Emitter, at: int, ins: Instruction) -> bool:
    """IRET within the kernel: to the code segment it is in, with flags that POPF could set (SDM Vol. 2, IRET). And to user mode, of 32 bits.

    In 64-bit mode the frame always has a stack pointer and segment too; the segment must be the one that is loaded. That one
    is no part of the mode, for an interrupt from user mode makes it null (SDM Vol. 3A §6.14.4).
    """
    forms, word = em.forms, em.forms.word
    wide = forms.bits == 64
    em.save(RCX)
    user = None
    if wide:
        em.emit(forms.stack_half(word))
        em.emit(forms.subtract(em.mode.selector))
        em.callout_if_not(b"\xe3", em.site("iret", at, ins))
    else:
        _flags_from(em, at, ins, 2 * word, iret=True)
        em.emit(forms.store(NEW_FLAGS, RCX))
        em.emit(forms.stack_half(word))
        em.emit(forms.subtract(em.mode.selector))
        em.emit(b"\xe3\x05")
        em.emit(b"\xe9" + bytes(4))                                     # jmp to what comes behind the look-up
        user = len(em.code), em.state
    if wide:
        em.emit(forms.stack_half(4 * word))
        em.save(RAX)
        em.emit(forms.load_low(RAX, NEGATIVE_STACK))
        em.emit(b"\x8d\x0c\x01")                                      # lea ecx, [rcx + rax]
        em.restore(RAX)
        em.callout_if_not(b"\xe3", em.site("iret", at, ins))
        _flags_from(em, at, ins, 2 * word, iret=True)
        em.emit(forms.store(NEW_FLAGS, RCX))
    em.emit(forms.load_stack(RCX, 0))
    em.emit(forms.store(TARGET, RCX))
    if wide:
        em.emit(forms.load_stack(RCX, 3 * word))
        em.emit(forms.store(NEW_STACK, RCX))
    em.emit(forms.move_stack(2 * word))
    em.moved_stack(-2 * word)
    em.emit(b"\x9d")
    em.moved_stack(-word)
    em.emit(forms.load_low(RCX, NEW_FLAGS))
    if wide:
        em.emit(forms.store(saved(RSP), RSP))
        em.emit(forms.load(RSP, NEW_STACK))
        em.moved_to_saved_stack()
    em.emit(forms.store_cl(VIRTUAL_FLAGS + 1), _done(ins))
    em.commit(None)
    em.check_pending()
    em.look_up()
    if user is not None:
        behind, em.state = user
        em.code[behind - 4:behind] = struct.pack("<I", len(em.code) - behind)
        iret_to_user(em, ins, em.site("iret", at, ins))
    return True


def _mov_from_cr(em: Emitter, at: int, ins: Instruction) -> bool:
    target, source = ins.cs.operands
    em.emit(em.forms.load(REGISTERS[target.reg][0], VIRTUAL_CR + 8 * CONTROL[source.reg]), _done(ins))
    return False


def _rdtsc(em: Emitter, at: int, ins: Instruction) -> bool:
    """Virtual time is physical time here: the offset is 0."""
    em.emit(b"\x0f\x31", _done(ins))
    return False


#: By operation; each returns True when it ended the unit.
TEMPLATES: Mapping[str, Template] = {
    "cli": _cli, "sti": _sti, "pushf": _pushf, "popf": _popf, "iret": _iret, "mov_from_cr": _mov_from_cr, "rdtsc": _rdtsc,
}


def template(instruction: Instruction) -> Template | None:
    """The template for this sensitive instruction, if there is one that covers it."""
    if has_size_prefix(instruction):
        return None
    if instruction.op in ("mov_from_cr", "mov_to_cr"):
        to, number = instruction.op == "mov_to_cr", CONTROL.get(instruction.cs.operands[instruction.op == "mov_from_cr"].reg)
        if number == 8:
            return mov_to_cr8 if to else mov_from_cr8
        if to or number not in (0, 2, 3, 4):
            return None
    return TEMPLATES.get(instruction.op or "")


def flag_tables(iopl: int) -> dict[int, bytes]:
    """The tables that POPF and IRET look flags up in, by address, for the current IOPL, and that of simulated stores."""
    refused = bytes(int(b & 0x41 != 0 or b >> 4 & 3 != iopl) for b in range(256))          # NT, TF; IOPL
    virtual = bytes(b & 2 | iopl << 4 for b in range(256))
    upper = bytes(int(b & ~0x24 != 0) for b in range(256))                                   # any but AC and ID
    return {FLAGS_REFUSED: refused, FLAGS_VIRTUAL: virtual, FLAGS_UPPER: upper, BELOW_16: bytes(int(b >= 16) for b in range(256))}
