"""The naive way: what the lab's events cost as anybody would first write them with Unicorn's Python binding.

Binding callbacks, registers by ``reg_read`` and ``reg_write``, memory by ``mem_read`` and ``mem_write``, Capstone (with details)
wherever an instruction has to be understood, and the world switch by saving and restoring a context. The guest's work is the
same as in ``guests.py``, and so is what happens at each event; nothing is counted beside the events themselves, and nothing
is slower than it must be: decoders and contexts are made once, register lists are read where one instruction of Python does.
``run.py`` divides by these figures.

Each function runs ``count`` events and returns the CPU seconds they took. One that did not see exactly as many raises SystemExit.
"""

from __future__ import annotations

import ctypes
import struct
import time

import capstone
import unicorn
from guests import BLOCKS_APART, ENTRY, IDT, STACK, VECTOR
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmlab.machine.state import calibrate

RAM = 32 << 20
_GDT, _BOOT = 0x1000, 0x2000
_CONTEXT_HEADER = 40
#: Flat segments: ring 0 code and data, ring 1 code and data.
_DESCRIPTORS = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFBB000000FFFF, 0x00CFB3000000FFFF)


def flush(uc: unicorn.Uc) -> None:
    """Forget every cached translation: the binding has no name for it."""
    uc.ctl(uc_const.UC_CTL_TLB_FLUSH, uc_const.UC_CTL_IO_WRITE)


class Guest:
    """A Unicorn engine with a guest that runs at CPL 1; ``forget`` undoes the double-fault logic that Unicorn never clears."""

    def __init__(self, code: bytes, *, paging: int | None = None) -> None:
        self.uc = uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_32)
        uc.mem_map(0, RAM)
        uc.mem_write(ENTRY, code)
        uc.mem_write(_GDT, struct.pack("<5Q", *_DESCRIPTORS) + struct.pack("<HI", 0x27, _GDT))
        # lgdt; flat segments; (paging); iret to ring 1
        on = b"" if paging is None else b"\xb8" + struct.pack("<I", paging) + bytes.fromhex("0f22d8 0f20c0 0d00000180 0f22c0")
        boot = (bytes.fromhex("0f0115") + struct.pack("<I", _GDT + 0x28) + bytes.fromhex("b810000000 8ed0 8ed8 8ec0") + on
                + bytes.fromhex("6a21 68") + struct.pack("<I", STACK) + bytes.fromhex("6a02 6a19 68") + struct.pack("<I", ENTRY) + b"\xcf")
        self.boot = boot
        uc.mem_write(_BOOT, boot)
        uc.reg_write(x86.UC_X86_REG_ESP, STACK)
        self.decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
        self.decoder.detail = True
        self._context = uc.context_save()
        address = ctypes.cast(self._context.context, ctypes.c_void_p).value or 0
        self._old_exception = ctypes.c_int.from_address(address + _CONTEXT_HEADER + calibrate().old_exception)
        self.events = 0
        self.enabled = True         # the virtual interrupt flag

    def iopl(self) -> None:
        """Let the guest reach ports from CPL 1."""
        self.uc.mem_write(_BOOT, self.boot.replace(bytes.fromhex("6a02 6a19"), bytes.fromhex("6802100000 6a19")))

    def forget(self) -> None:
        self.uc.context_update(self._context)
        self._old_exception.value = -1
        self.uc.context_restore(self._context)

    def instruction(self) -> capstone.CsInsn:
        """The instruction at EIP, decoded."""
        eip = self.uc.reg_read(x86.UC_X86_REG_EIP)
        return next(self.decoder.disasm(bytes(self.uc.mem_read(eip, 15)), eip, 1))

    def run(self, count: int) -> float:
        start = time.process_time()
        self.uc.emu_start(_BOOT, 0)
        seconds = time.process_time() - start
        if self.events != count:
            raise SystemExit(f"the naive way saw {self.events} events instead of {count}")
        return seconds


def traps(code: bytes, count: int) -> float:
    """#GP of CLI, or of MOV from CR0, at CPL 1: decode, do it on the virtual CPU, go on behind it."""
    guest = Guest(code)

    def on_exception(uc: unicorn.Uc, vector: int, _data: object) -> None:
        guest.forget()
        found = guest.instruction()
        if vector == 13 and found.mnemonic == "cli":
            guest.events += 1
            guest.enabled = False
            uc.reg_write(x86.UC_X86_REG_EIP, found.address + found.size)
        elif vector == 13 and found.mnemonic == "mov" and found.operands[1].reg == capstone.x86_const.X86_REG_CR0:
            guest.events += 1
            uc.reg_write(_GENERAL[found.operands[0].reg], 0x11)
            uc.reg_write(x86.UC_X86_REG_EIP, found.address + found.size)
        else:
            uc.emu_stop()           # HLT: the end

    guest.uc.hook_add(uc_const.UC_HOOK_INTR, on_exception)
    return guest.run(count)


def callouts(code: bytes, gate: int, back: int, count: int) -> float:
    """A jump out of translated code to a gate: what stood there is decoded and done, then back into the cache."""
    guest = Guest(code)
    guest.uc.mem_write(gate, b"\x90\xfa")   # behind the gate: the guest's own instruction, CLI
    guest.uc.hook_add(uc_const.UC_HOOK_INTR, lambda uc, vector, data: uc.emu_stop())

    def at_gate(uc: unicorn.Uc, address: int, _size: int, _data: object) -> None:
        found = next(guest.decoder.disasm(bytes(uc.mem_read(address + 1, 15)), address + 1, 1))
        if found.mnemonic == "cli":
            guest.events += 1
            guest.enabled = False
            uc.reg_write(x86.UC_X86_REG_EIP, back)

    guest.uc.hook_add(uc_const.UC_HOOK_CODE, at_gate, None, gate, gate)
    return guest.run(count)


_GENERAL = {getattr(capstone.x86_const, f"X86_REG_{name}"): getattr(x86, f"UC_X86_REG_{name}")
            for name in ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")}
_ARGUMENTS = (x86.UC_X86_REG_EBX, x86.UC_X86_REG_ECX, x86.UC_X86_REG_EDX, x86.UC_X86_REG_ESI, x86.UC_X86_REG_EDI)


def hypercalls(code: bytes, count: int) -> float:
    """INT 0x82: number and arguments from registers, the answer in EAX."""
    guest = Guest(code)

    def on_exception(uc: unicorn.Uc, vector: int, _data: object) -> None:
        if vector != 0x82:
            uc.emu_stop()
            return
        guest.forget()
        number = uc.reg_read(x86.UC_X86_REG_EAX)
        arguments = [uc.reg_read(register) for register in _ARGUMENTS]
        if number == 17 and arguments[0] == 0:      # xen_version(XENVER_version)
            guest.events += 1
            uc.reg_write(x86.UC_X86_REG_EAX, 3 << 16)

    guest.uc.hook_add(uc_const.UC_HOOK_INTR, on_exception)
    return guest.run(count)


def hidden_faults(code: bytes, data: dict[int, bytes], count: int) -> float:
    """#PF for want of a shadow entry: walk the guest's two levels of tables, fill the shadow's; MOV to CR3 empties it."""
    shadow = 0x1800000                              # a directory and two tables; the lowest megabyte is always there
    guest = Guest(code, paging=shadow)
    for address, content in data.items():
        guest.uc.mem_write(address, content)
    low = struct.pack("<256I", *(page << 12 | 7 for page in range(256)))
    root = [0]                                      # the guest's CR3, once its paging is on

    def empty(uc: unicorn.Uc) -> None:
        uc.mem_write(shadow, struct.pack("<2I", shadow + 0x1007, shadow + 0x2007) + bytes(0xFF8) + low + bytes(0x1C00))
        flush(uc)

    def walk(uc: unicorn.Uc, address: int) -> int:
        if not root[0]:
            return address & ~0xFFF | 7
        upper = struct.unpack("<I", uc.mem_read(root[0] + 4 * (address >> 22), 4))[0]
        if not upper & 1:
            return 0
        return int(struct.unpack("<I", uc.mem_read((upper & ~0xFFF) + 4 * (address >> 12 & 1023), 4))[0])

    def on_exception(uc: unicorn.Uc, vector: int, _data: object) -> None:
        guest.forget()
        if vector == 14:
            address = uc.reg_read(x86.UC_X86_REG_CR2)
            entry = walk(uc, address)
            if not entry & 1:
                raise SystemExit(f"the naive guest has nothing at {address:#x}")
            uc.mem_write(shadow + 0x1000 + 4 * (address >> 12), struct.pack("<I", entry))
            flush(uc)
            guest.events += 1
            return
        found = guest.instruction()
        if vector == 13 and found.mnemonic == "mov" and found.operands[0].reg == capstone.x86_const.X86_REG_CR3:
            root[0] = uc.reg_read(x86.UC_X86_REG_EAX)
            empty(uc)
            uc.reg_write(x86.UC_X86_REG_EIP, found.address + found.size)
        elif vector == 13 and found.mnemonic == "mov":      # MOV to CR0: paging is on already
            uc.reg_write(x86.UC_X86_REG_EIP, found.address + found.size)
        else:
            uc.emu_stop()

    empty(guest.uc)
    guest.uc.hook_add(uc_const.UC_HOOK_INTR, on_exception)
    return guest.run(count)


# ---- hardware assistance: the whole world switch, by the public interface
_HOST, _TABLES64, _SAVE, _VMCB = 0x3000, 0x10000, 0x20000, 0x21000
_SWITCHED = (
    (x86.UC_X86_REG_RAX, 0x5F8), (x86.UC_X86_REG_RIP, 0x578), (x86.UC_X86_REG_RSP, 0x5D8), (x86.UC_X86_REG_RFLAGS, 0x570),
    (x86.UC_X86_REG_CR0, 0x558), (x86.UC_X86_REG_CR2, 0x640), (x86.UC_X86_REG_CR3, 0x550), (x86.UC_X86_REG_CR4, 0x548))
_SELECTORS = ((x86.UC_X86_REG_ES, 0x400), (x86.UC_X86_REG_CS, 0x410), (x86.UC_X86_REG_SS, 0x420), (x86.UC_X86_REG_DS, 0x430))
_KEPT = tuple(getattr(x86, f"UC_X86_REG_{name}") for name in (
    "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"))
_HOST_CODE = bytes.fromhex(
    "0f01142580200000" "b820000000 0f22e0" "b800000100 0f22d8"                 # lgdt [0x2080] ; CR4.PAE ; CR3
    "b9800000c0 0f32 0d00190000 0f30" "eb00" "b811000180 0f22c0"               # EFER: LME, NXE, SVME ; CR0: PG, WP, ET, PE
    "48c7c400800000 6a08 488d0503000000 50 48cb" "b810000000 8ed8 8ec0 8ed0"                  # rsp ; retf to 8:next ; next: data segments
    "31d2 b800000200 b9170101c0 0f30" "b800100200")             # VM_HSAVE_PA ; rax = VMCB


CPUID, IN, NESTED_FAULT = 0x72, 0x7B, 0x400     # exit codes
_EXIT_INFO_2, _VMCB_RAX, _VMCB_RIP, _VMCB_CR0, _VMCB_CR3 = 0x80, 0x5F8, 0x578, 0x558, 0x550


def exits(code: bytes, count: int, kind: int = CPUID, data: dict[int, bytes] | None = None) -> float:
    """Exits of guest mode: #VMEXIT by hand (guest to the VMCB, host's context back), the instruction decoded and done, VMRUN again.

    Of ``kind``: CPUID; IN, at which Unicorn's own intercept is dead, so that a hook on its address stands for it; or a load from a page that
    the nested tables lack. A guest that has paging on is fetched from through its tables (of large pages).
    """
    uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
    uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
    uc.mem_map(0, RAM)
    put = uc.mem_write

    def word(address: int) -> int:
        return int(struct.unpack("<Q", uc.mem_read(address, 8))[0])

    for address, content in {ENTRY: code, **(data or {})}.items():
        put(address, content)
    put(0x2000, struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
    put(0x2080, struct.pack("<HQ", 0x17, 0x2000))
    put(_TABLES64, struct.pack("<Q", _TABLES64 + 0x1003))
    put(_TABLES64 + 0x1000, struct.pack("<Q", _TABLES64 + 0x2003))
    put(_TABLES64 + 0x2000, struct.pack("<512Q", *(page << 21 | 0x83 for page in range(512))))
    put(_HOST, _HOST_CODE + b"\x0f\x01\xd8\xf4")
    nested = 0x30000                                # nested tables: the guest's memory one to one
    put(nested, struct.pack("<Q", nested + 0x1007))
    put(nested + 0x1000, struct.pack("<Q", nested + 0x2007))
    put(nested + 0x2000, struct.pack("<512Q", *(page << 21 | 0x87 for page in range(512))))
    put(_VMCB + 0x0C, struct.pack("<Q", 1 << 0x12 | 1 << 0x18 | 1 << 0x20))        # CPUID, HLT, VMRUN
    put(_VMCB + 0x58, struct.pack("<I", 1))
    put(_VMCB + 0x90, struct.pack("<Q", 1))
    put(_VMCB + 0xB0, struct.pack("<Q", nested))
    for _, at in _SELECTORS:
        put(_VMCB + at, struct.pack("<HHIQ", 8 if at == 0x410 else 0x10, 0xC9B if at == 0x410 else 0xC93, 0xFFFFFFFF, 0))
    for at, value in ((0x4D0, 1 << 12), (_VMCB_CR0, 0x11), (0x570, 2), (_VMCB_RIP, ENTRY), (0x5D8, STACK), (0x668, 0x0007040600070406)):
        put(_VMCB + at, struct.pack("<Q", value))
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    decoder.detail = True
    vmrun = _HOST + len(_HOST_CODE)
    reason = [0]

    def on_exception(_uc: unicorn.Uc, number: int, _data: object) -> None:
        reason[0] = number
        uc.emu_stop()

    def on_in(_uc: unicorn.Uc, _address: int, _size: int, _data: object) -> None:
        reason[0] = 0x100 + IN
        uc.emu_stop()

    def fetch(rip: int) -> bytes:
        if word(_VMCB + _VMCB_CR0) >> 31:
            upper = struct.unpack("<I", uc.mem_read((word(_VMCB + _VMCB_CR3) & 0xFFFFF000) + 4 * (rip >> 22), 4))[0]
            if upper & 0x81 != 0x81:
                raise SystemExit(f"the naive guest has no large page at {rip:#x}")
            rip = (upper & 0xFFC00000) | (rip & 0x3FFFFF)
        return bytes(uc.mem_read(rip, 15))

    uc.emu_start(_HOST, vmrun)
    host = uc.context_save()
    uc.hook_add(uc_const.UC_HOOK_INTR, on_exception)
    if kind == IN:
        place = ENTRY + code.index(b"\xe4\x21")
        uc.hook_add(uc_const.UC_HOOK_CODE, on_in, None, place, place)
    seen = 0
    start = time.process_time()
    while True:
        uc.emu_start(vmrun, 0)
        if reason[0] < 0x100:
            raise SystemExit(f"the naive guest raised exception {reason[0]}")
        for register, at in _SWITCHED:
            put(_VMCB + at, struct.pack("<Q", uc.reg_read(register)))
        for register, at in _SELECTORS:
            put(_VMCB + at, struct.pack("<H", uc.reg_read(register)))
        general = {register: uc.reg_read(register) for register in _KEPT}
        put(_VMCB + 0x70, struct.pack("<Q", reason[0] - 0x100))
        uc.context_restore(host)
        flush(uc)
        if reason[0] - 0x100 != kind:
            break
        rip = word(_VMCB + _VMCB_RIP)
        found = next(decoder.disasm(fetch(rip), rip, 1))
        if kind == CPUID and found.mnemonic == "cpuid":
            put(_VMCB + _VMCB_RAX, struct.pack("<Q", 0))
            general[x86.UC_X86_REG_RBX] = general[x86.UC_X86_REG_RCX] = general[x86.UC_X86_REG_RDX] = 0
        elif kind == IN and found.mnemonic == "in" and found.operands[1].imm == 0x21:
            put(_VMCB + _VMCB_RAX, struct.pack("<Q", word(_VMCB + _VMCB_RAX) & ~0xFF | 0xFB))
        elif kind == NESTED_FAULT and found.mnemonic == "mov" and word(_VMCB + _EXIT_INFO_2) == 0xFEE00020:
            put(_VMCB + _VMCB_RAX, struct.pack("<Q", 0))
        else:
            raise SystemExit(f"the naive guest exited at {found.mnemonic}")
        seen += 1
        put(_VMCB + _VMCB_RIP, struct.pack("<Q", rip + found.size))
        for register, value in general.items():
            uc.reg_write(register, value)
    seconds = time.process_time() - start
    if seen != count:
        raise SystemExit(f"the naive way saw {seen} exits instead of {count}")
    return seconds


# ---- the bare machine
def port_reads(code: bytes, count: int) -> float:
    """IN with the check of rights that Unicorn leaves out: CPL against IOPL by ``reg_read``."""
    guest = Guest(code)
    guest.uc.hook_add(uc_const.UC_HOOK_INTR, lambda uc, vector, data: uc.emu_stop())

    def on_in(uc: unicorn.Uc, port: int, _size: int, _data: object) -> int:
        if uc.reg_read(x86.UC_X86_REG_CS) & 3 > uc.reg_read(x86.UC_X86_REG_EFLAGS) >> 12 & 3:
            raise SystemExit("no right to the port")
        guest.events += 1
        return 0xFB if port == 0x21 else 0xFF

    guest.uc.hook_add(uc_const.UC_HOOK_INSN, on_in, None, 1, 0, x86.UC_X86_INS_IN)
    guest.iopl()
    return guest.run(count)


def interrupts(code: bytes, data: dict[int, bytes], count: int) -> float:
    """A device's interrupt between two instructions: a hook on every block counts them, and delivers through the IDT by hand."""
    uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_32)
    uc.mem_map(0, RAM)
    uc.mem_write(ENTRY, code)
    for address, content in data.items():
        uc.mem_write(address, content)
    seen = [0, 0]       # blocks since the last interrupt, interrupts

    def on_block(_uc: unicorn.Uc, address: int, _size: int, _data: object) -> None:
        seen[0] += 1
        if seen[0] < BLOCKS_APART:
            return
        flags = uc.reg_read(x86.UC_X86_REG_EFLAGS)
        if not flags & 1 << 9:
            return
        low, selector, _, high = struct.unpack("<HHHH", uc.mem_read(IDT + 8 * VECTOR, 8))
        esp = uc.reg_read(x86.UC_X86_REG_ESP) - 12
        uc.mem_write(esp, struct.pack("<3I", address, uc.reg_read(x86.UC_X86_REG_CS), flags))
        uc.reg_write(x86.UC_X86_REG_ESP, esp)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, flags & ~(1 << 9))
        uc.reg_write(x86.UC_X86_REG_EIP, low | high << 16)
        assert selector == 8
        seen[0] = 0
        seen[1] += 1

    uc.hook_add(uc_const.UC_HOOK_BLOCK, on_block)
    start = time.process_time()
    uc.emu_start(ENTRY, 0)
    seconds = time.process_time() - start
    if seen[1] < count:
        raise SystemExit(f"the naive way delivered {seen[1]} interrupts instead of {count}")
    return seconds


def bare(code: bytes) -> float:
    """Unicorn with no hook at all, at CPL 0, until the guest stores to the port at its end or halts."""
    uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_32)
    uc.mem_map(0, RAM)
    uc.mem_write(ENTRY, code)
    start = time.process_time()
    uc.emu_start(ENTRY, 0)
    return time.process_time() - start
