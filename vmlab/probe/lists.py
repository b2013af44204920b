"""Which instructions the literature lists as sensitive and unprivileged, and how each list counts.

The lists disagree about the number because they disagree about what one instruction is.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A list's mnemonic -> the ledger's names, where they differ. MOV names both directions at once.
_OPS = {"POP": ("pop_seg",), "PUSH": ("push_seg",), "MOV": ("mov_from_seg", "mov_to_seg"), "CALL": ("call_far",),
        "JMP": ("jmp_far",), "RET": ("ret_far",), "INT n": ("int",), "LSS": ("load_far",)}


@dataclass(frozen=True)
class Published:
    """A published list. ``mnemonics`` are the headings as printed; ``stated`` is the number that it gives itself."""

    letter: str
    source: str
    stated: int | None
    mnemonics: tuple[str, ...]

    def ops(self) -> frozenset[str]:
        """The ledger's names of its instructions."""
        return frozenset(op for mnemonic in self.mnemonics for op in ops(mnemonic))


def ops(mnemonic: str) -> tuple[str, ...]:
    """The ledger's names for a list's mnemonic."""
    return _OPS.get(mnemonic, (mnemonic.lower(),))


LISTS = (
    Published("R", "Robin & Irvine, USENIX Security 2000, §3.1 and §3.2", 17, (
        "SGDT", "SIDT", "SLDT", "SMSW", "PUSHF", "POPF",
        "LAR", "LSL", "VERR", "VERW", "POP", "PUSH", "CALL", "JMP", "INT n", "RET", "STR", "MOV")),
    Published("H", "Bugnion, Nieh & Tsafrir, Hardware and Software Support for Virtualization, 2017, table 2.2", None, (
        "PUSHF", "POPF", "IRET", "LAR", "VERR", "VERW", "LSL", "POP", "PUSH", "MOV",
        "SGDT", "SLDT", "SIDT", "SMSW", "CALL", "JMP", "RET", "STR", "INT n")),
    Published("V", "Amsden et al., VMI specification 2.0, 2006, appendix C", None, (
        "ARPL", "IRET", "LAR", "LSL", "LSS", "MOV", "POP", "POPF", "PUSH", "PUSHF", "SGDT", "SIDT", "SLDT", "STR")),
)


def letters(op: str) -> str:
    """Which lists name the instruction, as their letters."""
    return "".join(published.letter for published in LISTS if op in published.ops())
