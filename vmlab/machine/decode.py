"""What an instruction is to the lab: its canonical name if it is a system instruction, else its class.

Capstone decodes; this file maps its answer onto the names of :mod:`vmlab.ledger`. Decoding is cached
by the bytes, since a guest runs few distinct instructions many times.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import capstone
from capstone import x86_const as cs_x86

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
_LOOPS = {"loop", "loope", "loopne"}  # Capstone does not put them into its group of jumps

#: Instructions after which the CPU may be in another ring without the machine having been told.
RING_CHANGERS = frozenset({"vmrun", "iret", "ret_far", "call_far", "jmp_far", "sysret", "sysexit"})


@dataclass(frozen=True, eq=False)
class Instruction:
    """One decoded instruction.

    ``op`` is a name of :data:`vmlab.ledger.SYSTEM_INSTRUCTIONS` or None; ``kind`` a class of
    :data:`vmlab.ledger.CLASSES` or ``jcc`` (a branch when taken, else alu). ``cs`` is Capstone's
    view, with operands, its address always 0: decoding is shared by all places with the same bytes.
    """

    size: int
    raw: bytes
    op: str | None
    kind: str
    rep: bool
    string: bool
    cs: capstone.CsInsn

    @property
    def search(self) -> bool:
        """REP SCAS or REP CMPS: besides ECX the flags end it."""
        return self.rep and self.cs.mnemonic.split()[-1][:4] in ("scas", "cmps")

    @property
    def text(self) -> str:
        """Assembly in Intel syntax (relative targets as if at address 0)."""
        return f"{self.cs.mnemonic} {self.cs.op_str}".strip()


_CAPSTONE = {}
for _bits, _mode in ((16, capstone.CS_MODE_16), (32, capstone.CS_MODE_32), (64, capstone.CS_MODE_64)):
    _CAPSTONE[_bits] = capstone.Cs(capstone.CS_ARCH_X86, _mode)
    _CAPSTONE[_bits].detail = True


@functools.lru_cache(maxsize=65536)
def _decode_exact(raw: bytes, bits: int) -> Instruction | None:
    found = next(_CAPSTONE[bits].disasm(raw, 0, 1), None)
    if found is None:
        return None
    rep = found.prefix[0] in (0xF2, 0xF3)
    string = found.id in _STRING or (found.id in _STRING_OR_SSE and _is_string_form(found))
    op = _system_name(found)
    if op in ("ins", "outs"):
        string = True
    return Instruction(found.size, bytes(found.bytes), op, _class(found, string), rep and string, string, found)


def decode(raw: bytes, bits: int) -> Instruction | None:
    """Decode the first instruction of ``raw`` (up to 15 bytes are looked at); None where there is none."""
    return _decode_exact(raw[:15], bits)


def decode_block(raw: bytes, bits: int) -> list[Instruction]:
    """All instructions of a straight line; stops at the first bytes that do not decode."""
    found: list[Instruction] = []
    at = 0
    while at < len(raw):
        instruction = decode(raw[at:at + 15], bits)
        if instruction is None:
            break
        found.append(instruction)
        at += instruction.size
    return found


def _is_string_form(found: capstone.CsInsn) -> bool:
    return found.opcode[0] in (0xA5, 0xA7)


def _system_name(found: capstone.CsInsn) -> str | None:
    mnemonic = found.mnemonic.split()[-1]  # Capstone writes "rep insb"
    if mnemonic in _SYSTEM:
        return _SYSTEM[mnemonic]
    operands = found.operands
    if mnemonic in ("call", "jmp") and found.opcode[0] == 0xFF and found.modrm >> 3 & 7 in (3, 5):
        return f"{mnemonic}_far"        # through memory; Capstone's name is the near one's
    if mnemonic == "mov" and len(operands) == 2:
        for registers, name in ((_CONTROL_REGISTERS, "cr"), (_DEBUG_REGISTERS, "dr"), (_SEGMENT_REGISTERS, "seg")):
            if operands[0].type == cs_x86.X86_OP_REG and operands[0].reg in registers:
                return f"mov_to_{name}"
            if operands[1].type == cs_x86.X86_OP_REG and operands[1].reg in registers:
                return f"mov_from_{name}"
    if mnemonic in ("push", "pop") and operands and operands[0].type == cs_x86.X86_OP_REG and operands[0].reg in _SEGMENT_REGISTERS:
        return f"{mnemonic}_seg"
    return None


def _class(found: capstone.CsInsn, string: bool) -> str:
    mnemonic = found.mnemonic.split()[-1]
    operands = found.operands
    if string:
        return "alu"  # the elements are counted apart
    if mnemonic in _LOOPS:
        return "jcc"
    if found.group(_GROUP_CALL) or found.group(_GROUP_JUMP):
        if operands and operands[0].type == cs_x86.X86_OP_IMM:
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
    for operand in operands:
        if operand.type == cs_x86.X86_OP_MEM and operand.access & capstone.CS_AC_WRITE:
            return "store"
    if any(operand.type == cs_x86.X86_OP_MEM for operand in operands):
        return "load"
    return "alu"
