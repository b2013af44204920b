"""The instructions that are probed, as data: machine code, the state it needs, what it is in the literature.

Machine code is written out so that no assembler is needed; a test decodes every line and compares it with its text.
An instruction may have several cases; the first of an ``op`` is the telling one and stands for it in claims.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from vmlab.probe.layout import (
    CODE_0,
    CODE_3,
    CODE_CONFORMING,
    DATA_0,
    DATA_3,
    DATA_LIMITED,
    OTHER_LOCAL,
    OTHER_TASK,
    OWN_STACK,
    STACK,
    TARGET,
)

#: Popek & Goldberg 1974: *control*-sensitive (would change resources or the mode) and *behaviour*-sensitive (its
#: effect depends on the mode or on where the machine's resources lie).
Sensitivity = Literal["no", "control", "behaviour", "control, behaviour"]
Bytes = Callable[[int], bytes]


def _nothing(_cpl: int) -> bytes:
    return b""


@dataclass(frozen=True)
class Case:
    """One instruction in one situation. ``stack``, ``data``: what lies at ESP and in the operand, by ring."""

    op: str
    name: str
    text: str
    code: bytes
    sensitive: Sensitivity
    means: str
    """Why it matters to a monitor, in one sentence."""
    registers: Mapping[str, int] = field(default_factory=dict)
    flags: int = 0
    stack: Bytes = _nothing
    data: Bytes = _nothing
    cr4: int = 0
    gate: int | None = None
    """Vector that the instruction enters on purpose."""
    pushed: tuple[str, ...] = ()
    """Names of the doublewords that it pushes, the last pushed first."""
    operand: tuple[tuple[str, int, int], ...] = ()
    """(name, offset, size) of what it stores in the memory operand."""
    ignore: frozenset[str] = frozenset()
    """Effects that differ because the case itself must differ by ring."""
    bits: Literal[32, 64] = 32


def _words(*values: int | str) -> Bytes:
    """Doublewords; "CS" stands for the running code segment's selector with the ring's RPL."""
    return lambda cpl: b"".join(struct.pack("<I", CODE_CONFORMING | cpl if v == "CS" else v) for v in values)


def _own_stack(cpl: int) -> bytes:
    return struct.pack("<IH", STACK, OWN_STACK[cpl])


def _case(op: str, name: str, text: str, code: str, sensitive: Sensitivity, means: str, **more: Any) -> Case:
    return Case(op, name, text, bytes.fromhex(code), sensitive, means, **more)


_TABLE = (("limit", 0, 2), ("base", 2, 4))
_KERNEL_DATA, _USER_DATA = {"EBX": DATA_0}, {"EBX": DATA_LIMITED | 3}
_OWN = frozenset({"SS", "SS rights"})  # each ring must have a stack of its own
_IF, _IOPL = 0x200, 0x3000

C: Final = "control"
B: Final = "behaviour"
CB: Final = "control, behaviour"
NO: Final = "no"

CASES: tuple[Case, ...] = (
    # Flags
    _case("pushf", "PUSHF", "pushfd", "9c", B, "the guest reads the machine's IF, not its own", pushed=("EFLAGS",)),
    _case("popf", "POPF", "popfd", "9d", CB, "outside IOPL the new IF is dropped without a trap", stack=_words(0x202)),
    _case("iret", "IRET", "iretd", "cf", CB, "outside IOPL the saved IF is dropped without a trap", stack=_words(TARGET, "CS", 0x202)),
    _case("iret", "IRET (ring 0 frame)", "iretd", "cf", CB, "a frame that names ring 0 is refused outside it",
          stack=_words(TARGET, CODE_0, 0x202)),
    # Tables and machine status
    _case("sgdt", "SGDT", "sgdt [0x9000]", "0f010500900000", B, "stores where the monitor's GDT is", operand=_TABLE),
    _case("sidt", "SIDT", "sidt [0x9000]", "0f010d00900000", B, "stores where the monitor's IDT is", operand=_TABLE),
    _case("sldt", "SLDT", "sldt eax", "0f00c0", B, "reads the monitor's LDT selector"),
    _case("str", "STR", "str eax", "0f00c8", B, "reads the monitor's task register"),
    _case("smsw", "SMSW", "smsw ax", "660f01e0", B, "reads the machine's CR0, as TS and MP that the monitor set"),
    # Segments seen from a ring
    _case("lar", "LAR", "lar eax, ebx", "0f02c3", B, "a kernel segment is invisible outside its ring: ZF clear, no result",
          registers=_KERNEL_DATA),
    _case("lsl", "LSL", "lsl eax, ebx", "0f03c3", B, "a kernel segment is invisible outside its ring: ZF clear, no result",
          registers=_KERNEL_DATA),
    _case("verr", "VERR", "verr bx", "0f00e3", B, "says that a kernel segment cannot be read", registers=_KERNEL_DATA),
    _case("verw", "VERW", "verw bx", "0f00eb", B, "says that a kernel segment cannot be written", registers=_KERNEL_DATA),
    _case("push_seg", "PUSH CS", "push cs", "0e", B, "CS holds the ring", pushed=("CS",)),
    _case("mov_from_seg", "MOV r, CS", "mov eax, cs", "8cc8", B, "CS holds the ring"),
    _case("pop_seg", "POP ES", "pop es", "07", B, "loads the descriptor in the monitor's GDT", stack=_words(DATA_LIMITED | 3)),
    _case("pop_seg", "POP SS (ring 0)", "pop ss", "17", B, "a ring 0 stack cannot be loaded outside it", stack=_words(DATA_0)),
    _case("mov_to_seg", "MOV ES, r", "mov es, ebx", "8ec3", B, "loads the descriptor in the monitor's GDT", registers=_USER_DATA),
    _case("mov_to_seg", "MOV SS, r (ring 0)", "mov ss, ebx", "8ed3", B, "a ring 0 stack cannot be loaded outside it",
          registers=_KERNEL_DATA),
    _case("load_far", "LSS", "lss esp, [0x9000]", "0fb22500900000", B, "loads the descriptor in the monitor's GDT",
          data=_own_stack, ignore=_OWN),
    _case("load_far", "LSS (ring 0)", "lss esp, [0x9000]", "0fb22500900000", B, "a ring 0 stack cannot be loaded outside it",
          data=lambda _: struct.pack("<IH", STACK, DATA_0)),
    _case("arpl", "ARPL", "arpl ax, bx", "63d8", NO, "works on its operands alone; but they come from registers that hold the ring",
          registers={"EAX": 0x10, "EBX": 0x0B}),
    # Transfers
    _case("call_far", "CALL far", "lcall 0x58:0x11000", "9a001001005800", B, "pushes CS, which holds the ring",
          pushed=("EIP", "CS")),
    _case("call_far", "CALL far (gate)", "lcall 0x60:0", "9a000000006000", B, "switches stacks only from outside",
          pushed=("EIP", "CS", "old ESP", "old SS")),
    _case("call_far", "CALL far (ring 0)", "lcall 0x18:0x11000", "9a001001001800", CB, "ring 0 code cannot be called from outside"),
    _case("jmp_far", "JMP far", "ljmp 0x58:0x11000", "ea001001005800", B, "loads CS, which then holds the ring"),
    _case("jmp_far", "JMP far (ring 0)", "ljmp 0x18:0x11000", "ea001001001800", CB, "ring 0 code cannot be reached from outside"),
    _case("ret_far", "RET far (to ring 3)", "retf", "cb", CB, "pops a stack only when the ring changes",
          stack=_words(TARGET, CODE_3 | 3, STACK + 0x80, DATA_3 | 3)),
    _case("ret_far", "RET far (ring 0 frame)", "retf", "cb", CB, "a frame that names ring 0 is refused outside it",
          stack=_words(TARGET, CODE_0)),
    _case("int", "INT n", "int 0x80", "cd80", CB, "the frame holds the ring, and the stack is switched from outside", gate=0x80,
          pushed=("EIP", "CS", "EFLAGS", "old ESP", "old SS")),
    _case("int", "INT n (ring 0 gate)", "int 0x81", "cd81", CB, "a gate for ring 0 is closed to others", gate=0x81),
    # Interrupts, ports
    _case("cli", "CLI", "cli", "fa", C, "would shut out the monitor's interrupts", flags=_IF),
    _case("cli", "CLI (IOPL 3)", "cli", "fa", C, "with this IOPL a guest does shut out the monitor's interrupts", flags=_IF | _IOPL),
    _case("sti", "STI", "sti", "fb", C, "would let interrupts in"),
    _case("hlt", "HLT", "hlt", "f4", C, "would stop the machine"),
    _case("in", "IN", "in al, 0x80", "e480", CB, "would talk to the machine's devices"),
    _case("in", "IN (IOPL 3)", "in al, 0x80", "e480", CB, "with this IOPL a guest does reach the machine's devices", flags=_IOPL),
    _case("out", "OUT", "out 0x80, al", "e680", C, "would talk to the machine's devices"),
    _case("ins", "INS", "insb", "6c", CB, "would talk to the machine's devices", registers={"EDX": 0x80}),
    _case("outs", "OUTS", "outsb", "6e", C, "would talk to the machine's devices", registers={"EDX": 0x80}),
    # Control registers and tables
    _case("mov_from_cr", "MOV r, CR0", "mov eax, cr0", "0f20c0", B, "would read the machine's mode"),
    _case("mov_to_cr", "MOV CR0, r", "mov cr0, ebx", "0f22c3", C, "would change the machine's mode", registers={"EBX": 0x19}),
    _case("mov_to_cr", "MOV CR3, r", "mov cr3, ebx", "0f22db", C, "would change the page tables", registers={"EBX": 0x20000}),
    _case("mov_to_cr", "MOV CR4, r", "mov cr4, ebx", "0f22e3", C, "would change the machine's mode", registers={"EBX": 0x10}),
    _case("mov_from_dr", "MOV r, DR7", "mov eax, dr7", "0f21f8", B, "would read the machine's breakpoints"),
    _case("mov_to_dr", "MOV DR0, r", "mov dr0, ebx", "0f23c3", C, "would set the machine's breakpoints"),
    _case("lgdt", "LGDT", "lgdt [0x9000]", "0f011500900000", C, "would take the GDT from the monitor",
          data=lambda _: struct.pack("<HI", 0x97, 0x1400)),
    _case("lidt", "LIDT", "lidt [0x9000]", "0f011d00900000", C, "would take the IDT from the monitor",
          data=lambda _: struct.pack("<HI", 0x7F7, 0x2800)),
    _case("lldt", "LLDT", "lldt bx", "0f00d3", C, "would load another LDT", registers={"EBX": OTHER_LOCAL}),
    _case("ltr", "LTR", "ltr bx", "0f00db", C, "would take the TSS, and with it the stacks, from the monitor",
          registers={"EBX": OTHER_TASK}),
    _case("lmsw", "LMSW", "lmsw bx", "0f01f3", C, "would change the machine's mode", registers={"EBX": 0x9}),
    _case("clts", "CLTS", "clts", "0f06", C, "would give away the FPU"),
    _case("invlpg", "INVLPG", "invlpg [0x9000]", "0f013d00900000", C, "would change what the TLB holds"),
    _case("invd", "INVD", "invd", "0f08", C, "would throw away what the caches hold"),
    _case("wbinvd", "WBINVD", "wbinvd", "0f09", C, "would empty the caches"),
    _case("rdmsr", "RDMSR", "rdmsr", "0f32", B, "would read the machine's registers", registers={"ECX": 0xC0000080}),
    _case("wrmsr", "WRMSR", "wrmsr", "0f30", C, "would change the machine's registers",
          registers={"ECX": 0x174, "EAX": 0x18, "EDX": 0}),
    _case("xsetbv", "XSETBV", "xsetbv", "0f01d1", C, "would change which state XSAVE saves", cr4=1 << 18,
          registers={"ECX": 0, "EAX": 3, "EDX": 0}),
    _case("swapgs", "SWAPGS (64-bit)", "swapgs", "0f01f8", C, "would exchange the GS base", bits=64),
    _case("mov_to_cr", "MOV CR8, r (64-bit)", "mov cr8, rbx", "440f22c3", C, "would change the interrupt priority",
          registers={"EBX": 5}, bits=64),
    # For comparison: not sensitive in Popek and Goldberg's sense
    _case("rdtsc", "RDTSC", "rdtsc", "0f31", NO, "shows the machine's time, which their model leaves out"),
    _case("rdtsc", "RDTSC (CR4.TSD)", "rdtsc", "0f31", NO, "a monitor that hides its time makes it trap", cr4=1 << 2),
    _case("rdtscp", "RDTSCP", "rdtscp", "0f01f9", NO, "shows the machine's time, which their model leaves out"),
    _case("cpuid", "CPUID", "cpuid", "0fa2", NO, "names the machine's CPU: the guest cannot be shown another one",
          registers={"EAX": 0, "ECX": 0}),
    _case("xgetbv", "XGETBV", "xgetbv", "0f01d0", NO, "the same in every ring", cr4=1 << 18, registers={"ECX": 0}),
)

#: Instructions of the ledger that are not probed, and why.
NOT_PROBED = {
    "rdpmc": "the machine has no performance counters (#UD in every ring)",
    "syscall": "entering takes the ring away from the experiment", "sysret": "leaves for ring 3 only from ring 0; see RET far",
    "sysenter": "entering takes the ring away from the experiment", "sysexit": "leaves for ring 3 only from ring 0; see RET far",
    "vmrun": "needs AMD-V", "vmmcall": "needs AMD-V", "monitor": "the machine has no second processor to wait for",
    "mwait": "the machine has no second processor to wait for", "int3": "as INT n", "into": "as INT n", "int1": "as INT n",
}

#: Where this machine is not the CPU of the manuals, as far as the probe can be mistaken for one.
GAPS = (
    "UMIP does not exist here, as on CPUs before 2017: with it SGDT, SIDT, SLDT, STR and SMSW would trap at CPL 3.",
    "Unicorn never faults IN and OUT and reads the host's clock: the machine decides IOPL, CR4.TSD and the time itself.",
    "Unicorn does not deliver: every entry into a handler (also INT n) is the machine's, by the manual's rules.",
    "An unknown MSR reads 0 instead of raising #GP; INVD, WBINVD and INVLPG have no effect that could be seen.",
    "Segment limits are loaded and reported but not enforced on data accesses.",
)
