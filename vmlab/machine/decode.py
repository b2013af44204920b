"""What an instruction is to the lab: its canonical name if it is a system instruction, else its class.

Capstone decodes (disassembler.py); this file maps its answer onto the names of :mod:`vmlab.ledger`. What an instruction is
is kept by its bytes, since a guest runs few distinct instructions many times.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import capstone
from capstone import x86_const as cs_x86

from vmlab.machine import disassembler
from vmlab.machine.disassembler import Facts

_GROUP_JUMP, _GROUP_CALL = capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL

#: Capstone's mnemonic → ours, for system instructions whose operands do not matter.
_SYSTEM = {
    "cli": "cli", "sti": "sti", "hlt": "hlt", "cpuid": "cpuid", "rdtsc": "rdtsc", "rdtscp": "rdtscp", "rdpmc": "rdpmc",
    "pushf": "pushf", "pushfd": "pushf", "pushfq": "pushf", "popf": "popf", "popfd": "popf", "popfq": "popf",
    "iret": "iret", "iretd": "iret", "iretq": "iret", "in": "in", "out": "out",
    "insb": "ins", "insw": "ins", "insd": "ins", "outsb": "outs", "outsw": "outs", "outsd": "outs",
    "lgdt": "lgdt", "lidt": "lidt", "lldt": "lldt", "ltr": "ltr", "sgdt": "sgdt", "sidt": "sidt", "sldt": "sldt", "str": "str",
    "smsw": "smsw", "lmsw": "lmsw", "clts": "clts", "invlpg": "invlpg", "invd": "invd", "wbinvd": "wbinvd",
    "rdmsr": "rdmsr", "wrmsr": "wrmsr", "xgetbv": "xgetbv", "xsetbv": "xsetbv", "swapgs": "swapgs",
    "lar": "lar", "lsl": "lsl", "verr": "verr", "verw": "verw", "arpl": "arpl",
    "lds": "load_far", "les": "load_far", "lfs": "load_far", "lgs": "load_far", "lss": "load_far",
    "lcall": "call_far", "ljmp": "jmp_far", "retf": "ret_far", "retfq": "ret_far",
    "int": "int", "int3": "int3", "into": "into", "int1": "int1",
    "syscall": "syscall", "sysret": "sysret", "sysretq": "sysret", "sysenter": "sysenter", "sysexit": "sysexit", "sysexitq": "sysexit",
    "vmrun": "vmrun", "vmmcall": "vmmcall", "monitor": "monitor", "mwait": "mwait",
}
_SEGMENT_REGISTERS = {cs_x86.X86_REG_ES, cs_x86.X86_REG_CS, cs_x86.X86_REG_SS, cs_x86.X86_REG_DS, cs_x86.X86_REG_FS, cs_x86.X86_REG_GS}
_CONTROL_REGISTERS = {getattr(cs_x86, f"X86_REG_CR{i}") for i in range(16)}
_DEBUG_REGISTERS = {getattr(cs_x86, f"X86_REG_DR{i}") for i in range(16)}
_STRING = {cs_x86.X86_INS_MOVSB, cs_x86.X86_INS_MOVSW, cs_x86.X86_INS_MOVSQ, cs_x86.X86_INS_STOSB, cs_x86.X86_INS_STOSW,
           cs_x86.X86_INS_STOSD, cs_x86.X86_INS_STOSQ, cs_x86.X86_INS_LODSB, cs_x86.X86_INS_LODSW, cs_x86.X86_INS_LODSD,
           cs_x86.X86_INS_LODSQ, cs_x86.X86_INS_SCASB, cs_x86.X86_INS_SCASW, cs_x86.X86_INS_SCASD, cs_x86.X86_INS_SCASQ,
           cs_x86.X86_INS_CMPSB, cs_x86.X86_INS_CMPSW, cs_x86.X86_INS_CMPSQ}
_STRING_OR_SSE = {cs_x86.X86_INS_MOVSD, cs_x86.X86_INS_CMPSD}  # the mnemonic also names an SSE instruction
_MULDIV = {"mul", "imul", "div", "idiv"}
_NO_ACCESS = {"lea", "nop"}
_RANDOM = (cs_x86.X86_INS_RDRAND, cs_x86.X86_INS_RDSEED)
_MOVBE = b"\x0f\x38"
_MOVBE_OF_REGISTERS = re.compile(rb"[\x26\x2e\x36\x3e\x64-\x67]*[\x40-\x4f]?\x0f\x38[\xf0\xf1][\xc0-\xff]", re.DOTALL)
_LOOPS = {"loop", "loope", "loopne"}  # Capstone does not put them into its group of jumps

#: Instructions after which the CPU may be in another ring without the machine having been told.
RING_CHANGERS = frozenset({"vmrun", "iret", "ret_far", "call_far", "jmp_far", "sysret", "sysexit"})


class Instruction:
    """One decoded instruction, shared by all places with the same bytes.

    ``op`` is a name of :data:`vmlab.ledger.SYSTEM_INSTRUCTIONS` or None; ``kind`` a class of
    :data:`vmlab.ledger.CLASSES` or ``jcc`` (a branch when taken, else alu); ``search`` says REP SCAS or REP CMPS:
    besides ECX the flags end it. ``undefined``: Unicorn would run it, and a CPU raises #UD; ``cs`` then shows a defined
    neighbour of the same length. ``random``: RDRAND, RDSEED.
    """

    __slots__ = ("_cs", "bits", "kind", "op", "random", "raw", "rep", "search", "size", "string", "undefined")

    def __init__(self, raw: bytes, bits: int, op: str | None, kind: str, *, rep: bool, string: bool, search: bool,
                 random: bool = False) -> None:
        self.raw, self.size, self.bits = raw, len(raw), bits
        self.op, self.kind, self.rep, self.string, self.search = op, kind, rep, string, search
        self._cs: capstone.CsInsn | None = None
        self.undefined, self.random = False, random

    @property
    def cs(self) -> capstone.CsInsn:
        """Capstone's view, with operands, its address always 0: made when somebody looks, for it costs a hundred times the rest."""
        if self._cs is None:
            self._cs = disassembler.full(self.raw, self.bits)
        return self._cs

    @property
    def text(self) -> str:
        """Assembly in Intel syntax (relative targets as if at address 0)."""
        return f"{self.cs.mnemonic} {self.cs.op_str}".strip()


def _make(bits: int) -> Callable[[bytes, Facts], Instruction]:
    def make(raw: bytes, found: Facts) -> Instruction:
        rep = found.prefix[0] in (0xF2, 0xF3)
        string = found.id in _STRING or (found.id in _STRING_OR_SSE and found.opcode[0] in (0xA5, 0xA7))
        op = _system_name(found)
        if op in ("ins", "outs"):
            string = True
        return Instruction(raw, bits, op, _class(found, string), rep=rep and string, string=string,
                           search=rep and string and found.mnemonic[:4] in ("scas", "cmps"), random=found.id in _RANDOM)

    return make


#: Of each mode: what makes an instruction, and those made so far, by their bytes.
_MODES = {bits: (_make(bits), dict[bytes, Instruction]()) for bits in (16, 32, 64)}
_KEPT = 1 << 18     # instructions of a mode; a Linux boot meets some 100 000


def _decode(raw: bytes, bits: int, count: int) -> list[Instruction]:
    make, known = _MODES[bits]
    if len(known) > _KEPT:
        known.clear()
    return disassembler.split(raw, bits, count, make, known)


def decode(raw: bytes, bits: int) -> Instruction | None:
    """Decode the first instruction of ``raw`` (up to 15 bytes are looked at); None where there is none."""
    return _first(raw[:15], bits)


@functools.lru_cache(maxsize=1 << 14)
def _first(raw: bytes, bits: int) -> Instruction | None:
    """A VMM decodes the same few instructions at most of its exits, without knowing where they end."""
    found = _decode(raw, bits, 1)
    return found[0] if found else _movbe_of_registers(raw, bits)


def decode_block(raw: bytes, bits: int) -> list[Instruction]:
    """All instructions of a straight line; stops at the first bytes that do not decode."""
    found = _decode(raw, bits, 0)
    if _MOVBE in raw:
        at = sum(instruction.size for instruction in found)
        if (undefined := _movbe_of_registers(raw[at:], bits)) is not None:
            return [*found, undefined, *decode_block(raw[at + undefined.size:], bits)]
    return found


def _movbe_of_registers(raw: bytes, bits: int) -> Instruction | None:
    """MOVBE has a memory operand (SDM Vol. 2); with a register Unicorn runs it all the same."""
    if (found := _MOVBE_OF_REGISTERS.match(raw)) is None:
        return None
    like = _decode(raw[:found.end() - 1] + b"\0", bits, 1)
    if not like or like[0].size != found.end():
        return None
    instruction = Instruction(raw[:found.end()], bits, None, "alu", rep=False, string=False, search=False)
    instruction.undefined, instruction._cs = True, like[0].cs
    return instruction


def _system_name(found: Facts) -> str | None:
    mnemonic = found.mnemonic
    if mnemonic in _SYSTEM:
        return _SYSTEM[mnemonic]
    operands = found.operands
    if mnemonic in ("call", "jmp") and found.opcode[0] == 0xFF and found.modrm >> 3 & 7 in (3, 5):
        return f"{mnemonic}_far"        # through memory; Capstone's name is the near one's
    if mnemonic == "mov" and len(operands) == 2:
        for registers, name in ((_CONTROL_REGISTERS, "cr"), (_DEBUG_REGISTERS, "dr"), (_SEGMENT_REGISTERS, "seg")):
            if operands[0][0] == cs_x86.X86_OP_REG and operands[0][1] in registers:
                return f"mov_to_{name}"
            if operands[1][0] == cs_x86.X86_OP_REG and operands[1][1] in registers:
                return f"mov_from_{name}"
    if mnemonic in ("push", "pop") and operands and operands[0][0] == cs_x86.X86_OP_REG and operands[0][1] in _SEGMENT_REGISTERS:
        return f"{mnemonic}_seg"
    return None


def _class(found: Facts, string: bool) -> str:
    mnemonic = found.mnemonic
    operands = found.operands
    if string:
        return "alu"  # the elements are counted apart
    if mnemonic in _LOOPS:
        return "jcc"
    if _GROUP_CALL in found.groups or _GROUP_JUMP in found.groups:
        if operands and operands[0][0] == cs_x86.X86_OP_IMM:
            return "branch" if mnemonic in ("jmp", "call") else "jcc"
        return "indirect"
    if mnemonic == "ret":
        return "indirect"
    if mnemonic in _MULDIV:
        return "muldiv"
    if mnemonic in ("push", "pushal", "pushaw", "enter"):
        return "store"
    if mnemonic in ("pop", "popal", "popaw", "leave"):
        return "load"
    if mnemonic in _NO_ACCESS:
        return "alu"
    accesses = [access for kind, _, access in operands if kind == cs_x86.X86_OP_MEM]
    if any(access & capstone.CS_AC_WRITE for access in accesses):
        return "store"
    return "load" if accesses else "alu"
