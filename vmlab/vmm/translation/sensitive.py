"""Templates: sensitive instructions that work on the virtual CPU without leaving the cache.

Each leaves the guest's registers and flags as the guest's instruction would. What a template does not cover
(operand-size prefixes, a change of IOPL, TF or NT, an IRET to another ring) calls out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from vmlab.machine.counter import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RAX, RCX
from vmlab.vmm.operands import CONTROL, REGISTERS
from vmlab.vmm.translation.emitter import Emitter, load, load_by_byte, stack_byte, store, store_byte
from vmlab.vmm.translation.layout import FLAGS_REFUSED, FLAGS_UPPER, FLAGS_VIRTUAL, NEW_FLAGS, TARGET, VIRTUAL_CR, VIRTUAL_FLAGS

Template = Callable[[Emitter, int, Instruction], bool]


def has_size_prefix(instruction: Instruction) -> bool:
    """16-bit operands in 32-bit code."""
    return 0x66 in bytes(instruction.cs.prefix)


def _done(instruction: Instruction) -> Tag:
    return Tag(instruction, "incache")


def _following(at: int, instruction: Instruction) -> int:
    return (at + instruction.size) & 0xFFFFFFFF


def _cli(em: Emitter, at: int, ins: Instruction) -> bool:
    em.emit(store_byte(VIRTUAL_FLAGS + 1, em.iopl << 4), _done(ins))
    return False


def _sti(em: Emitter, at: int, ins: Instruction) -> bool:
    """The check for a waiting interrupt follows the next instruction: that is the shadow (SDM Vol. 2, STI)."""
    em.emit(store_byte(VIRTUAL_FLAGS + 1, em.iopl << 4 | 2), _done(ins))
    return False


def _pushf(em: Emitter, at: int, ins: Instruction) -> bool:
    """The physical IF is always 1 and IOPL 0, so image - 0x200 + virtual flags is the guest's; LEA adds without flags."""
    em.emit(b"\x9c")
    em.moved_stack(4)
    em.save(RAX)
    em.save(RCX)
    em.emit(b"\x8b\x04\x24")                                      # mov eax, [esp]
    em.emit(load(RCX, VIRTUAL_FLAGS))
    em.emit(b"\x8d\x84\x08" + struct.pack("<i", -0x200))          # lea eax, [eax + ecx - 0x200]
    em.emit(b"\x89\x04\x24")                                      # mov [esp], eax
    em.restore(RAX)
    em.restore(RCX, _done(ins))
    return False


def _flags_from(em: Emitter, at: int, ins: Instruction, offset: int, *, iret: bool) -> None:
    """ECX = what the second byte of the virtual flags becomes, from the image at [esp + offset]; or a callout."""
    checks = [(offset + 1, FLAGS_REFUSED), (offset + 2, FLAGS_UPPER)] if iret else [(offset + 1, FLAGS_REFUSED)]
    for byte, table in checks:
        em.emit(stack_byte(byte))
        em.emit(load_by_byte(table))
        em.callout_if_not(b"\xe3", em.site("iret" if iret else "popf", at, ins))
    em.emit(stack_byte(offset + 1))
    em.emit(load_by_byte(FLAGS_VIRTUAL))


def _popf(em: Emitter, at: int, ins: Instruction) -> bool:
    """IF to the virtual CPU, the rest by a real POPF, which at CPL 1 leaves the physical IF and IOPL alone."""
    em.save(RCX)
    _flags_from(em, at, ins, 0, iret=False)
    em.emit(b"\x9d")
    em.emit(b"\x36\x88\x0d" + struct.pack("<I", VIRTUAL_FLAGS + 1), _done(ins))   # mov ss:[VIRTUAL_FLAGS + 1], cl
    em.commit(_following(at, ins))
    em.check_pending()
    em.restore(RCX)
    return False


def _iret(em: Emitter, at: int, ins: Instruction) -> bool:
    """IRET within the kernel: to the code segment it is in, with flags that POPF could set (SDM Vol. 2, IRET)."""
    em.save(RCX)
    em.emit(b"\x0f\xb7\x4c\x24\x04")                              # movzx ecx, word [esp + 4]
    em.emit(b"\x8d\x89" + struct.pack("<i", -em.selector))        # lea ecx, [ecx - selector]
    em.callout_if_not(b"\xe3", em.site("iret", at, ins))
    _flags_from(em, at, ins, 8, iret=True)
    em.emit(store(NEW_FLAGS, RCX))
    em.emit(b"\x8b\x0c\x24")                                      # mov ecx, [esp]
    em.emit(store(TARGET, RCX))
    em.emit(b"\x8d\x64\x24\x08")                                  # lea esp, [esp + 8]
    em.moved_stack(-8)
    em.emit(b"\x9d")
    em.moved_stack(-4)
    em.emit(load(RCX, NEW_FLAGS))
    em.emit(b"\x36\x88\x0d" + struct.pack("<I", VIRTUAL_FLAGS + 1), _done(ins))
    em.commit(None)
    em.check_pending()
    em.look_up()
    return True


def _mov_from_cr(em: Emitter, at: int, ins: Instruction) -> bool:
    target, source = ins.cs.operands
    em.emit(load(REGISTERS[target.reg][0], VIRTUAL_CR + 4 * CONTROL[source.reg]), _done(ins))
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
    if instruction.op == "mov_from_cr" and CONTROL[instruction.cs.operands[1].reg] not in (0, 2, 3, 4):
        return None
    return TEMPLATES.get(instruction.op or "")


def flag_tables(iopl: int) -> dict[int, bytes]:
    """The three tables that POPF and IRET look flags up in, by address, for the current IOPL."""
    refused = bytes(int(b & 0x41 != 0 or b >> 4 & 3 != iopl) for b in range(256))          # NT, TF; IOPL
    virtual = bytes(b & 2 | iopl << 4 for b in range(256))
    upper = bytes(int(b & ~0x24 != 0) for b in range(256))                                   # any but AC and ID
    return {FLAGS_REFUSED: refused, FLAGS_VIRTUAL: virtual, FLAGS_UPPER: upper}
