"""Templates of control flow: jumps, conditional jumps, calls, returns.

Return addresses on the guest's stack are the guest's own. A direct target is an exit that chaining patches; an
indirect one goes to TARGET and is looked up.
"""

from __future__ import annotations

import struct

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine.code import Tag
from vmlab.machine.decode import Instruction
from vmlab.machine.state import RCX
from vmlab.vmm.translation.emitter import Emitter
from vmlab.vmm.translation.forms import fits
from vmlab.vmm.translation.layout import TARGET
from vmlab.vmm.translation.relative import load_target
from vmlab.vmm.translation.sensitive import has_size_prefix


def control_flow(em: Emitter, at: int, ins: Instruction) -> None:
    """Translate a jump, call or return; the unit ends."""
    if has_size_prefix(ins):
        raise UnsupportedByStrategy(f"the guest's jump, call or return at {at:#x} has 16-bit operands ({ins.text}), which the "
                                    "translator does not carry")
    following = (at + ins.size) & em.forms.mask
    mnemonic = ins.cs.mnemonic.split()[-1]
    done = Tag(ins, "incache")
    if ins.kind == "branch":
        _direct(em, (at + int(ins.cs.operands[0].imm)) & em.forms.mask, following, done, call=mnemonic == "call")
    elif ins.kind == "jcc":
        _conditional(em, (at + int(ins.cs.operands[0].imm)) & em.forms.mask, following, ins, done)
    else:
        _indirect(em, following, ins, mnemonic, done)


def _direct(em: Emitter, target: int, following: int, done: Tag, *, call: bool) -> None:
    check = em.check_next
    if call:
        _push(em, following, done)
        em.commit(target)
        if check:
            em.saved_check()
        em.exit_inline(target)
    elif check:
        em.save(RCX, done)
        em.commit(target)
        em.check_pending()
        em.restore(RCX)
        em.exit_inline(target)
    else:
        em.exit_jump(target, done)


def _conditional(em: Emitter, target: int, following: int, ins: Instruction, done: Tag) -> None:
    """Jcc leads straight to the taken side, and falls through to the other one's place. LOOPcc and JECXZ have only a short form."""
    check = em.check_next
    opcode = ins.cs.opcode
    has_long_form = opcode[0] == 0x0F or 0x70 <= opcode[0] <= 0x7F
    if has_long_form and not check:
        em.exit_jcc((opcode[1] if opcode[0] == 0x0F else opcode[0]) & 0xF, target, done)
        em.exit_inline(following)
        return
    short = bytes([0x70 | opcode[1] & 0xF, 0]) if opcode[0] == 0x0F else ins.raw[:-2] + bytes([opcode[0], 0])
    em.emit(short, done)
    before = len(em.code)
    for way in (following, target):
        em.commit(way)
        if check:
            em.saved_check()
        if way == target:
            em.exit_inline(way)
        else:
            em.exit_jump(way)
            em.code[before - 1] = len(em.code) - before


def _push(em: Emitter, following: int, done: Tag) -> None:
    """Push the guest's return address: PUSH sign-extends 32 bits, and where those are not enough the upper half follows."""
    low = b"\x68" + struct.pack("<I", following & 0xFFFFFFFF)
    if em.forms.bits == 32 or fits(following):
        em.emit(low, done)
        return
    em.emit(low)
    em.moved_stack(8)
    em.emit(b"\xc7\x44\x24\x04" + struct.pack("<I", following >> 32), done)     # mov dword [rsp + 4], upper half


def _indirect(em: Emitter, following: int, ins: Instruction, mnemonic: str, done: Tag) -> None:
    check, forms = em.check_next, em.forms
    em.save(RCX)
    if mnemonic == "ret":
        release = int(ins.cs.operands[0].imm) if ins.cs.operands else 0
        em.emit(forms.pop(TARGET), None if release else done)
        if release:
            em.moved_stack(-forms.word)
            em.emit(forms.move_stack(release), done)
    else:
        if forms.bits == 64:
            load_target(em, ins, following)
        else:
            opcode_at = ins.raw.index(0xFF)   # behind the prefixes, none of which is FF
            prefixes, modrm, rest = ins.raw[:opcode_at], ins.raw[opcode_at + 1], ins.raw[opcode_at + 2:]
            em.emit(prefixes + bytes([0x8B, modrm & 0xC7 | RCX << 3]) + rest)                # mov ecx, <the operand>
        em.emit(forms.store(TARGET, RCX), None if mnemonic == "call" else done)
        if mnemonic == "call":
            _push(em, following, done)
    em.commit(None)
    if check:
        em.check_pending()
    em.look_up()
