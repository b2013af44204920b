"""What the VMCB says the CPU is to intercept, for instructions at which QEMU's model does not look (APM Vol. 2 §15.9–15.11)."""

from __future__ import annotations

from vmlab.machine import vmcb as v
from vmlab.machine.cpu import Cpu
from vmlab.machine.decode import Instruction
from vmlab.machine.instructions import port_operands
from vmlab.machine.memory import Ram
from vmlab.machine.state import RCX
from vmlab.machine.vmcb import Vmcb

#: Exit code and the two words of exit information; None: the second stays as it is.
Exit = tuple[int, int, int | None]


class Intercepts:
    """Those of the guest whose VMCB ``vmcb`` stands at."""

    def __init__(self, vmcb: Vmcb, ram: Ram) -> None:
        self._vmcb, self._ram = vmcb, ram

    def wants(self, code: int) -> bool:
        """Whether an exit with this code (0x60–0x9F) is asked for."""
        return bool(self._vmcb["intercepts"] & v.intercept_bit(code))

    def of_instruction(self, op: str, instruction: Instruction, cpu: Cpu) -> Exit | None:
        """The exit that the instruction at RIP makes, before it does anything; None: it is carried out."""
        if op in ("rdtsc", "rdtscp"):
            code = v.EXIT_RDTSC if op == "rdtsc" else v.EXIT_RDTSCP
            return (code, 0, None) if self.wants(code) else None
        if op in ("rdmsr", "wrmsr"):
            exits = self.wants(v.EXIT_MSR) and self._msr(cpu.gpr(RCX) & 0xFFFFFFFF, op == "wrmsr")
            return (v.EXIT_MSR, int(op == "wrmsr"), None) if exits else None
        if op in ("mov_to_cr", "mov_from_cr"):  # CR8
            kind, code = ("write", v.EXIT_CR_WRITE) if op == "mov_to_cr" else ("read", v.EXIT_CR_READ)
            return (code + 8, 0, None) if self._vmcb[f"intercept_cr_{kind}"] >> 8 & 1 else None
        port, size = port_operands(instruction, cpu)
        if not self.wants(v.EXIT_IOIO) or not self._port(port, size):
            return None
        information = (port << v.IO_PORT_SHIFT | size << v.IO_SIZE_SHIFT | fixed_io_information(instruction)
                       | (v.IO_IN if op in ("in", "ins") else 0))
        return v.EXIT_IOIO, information, cpu.rip + instruction.size

    def _port(self, port: int, size: int) -> bool:
        """The I/O permission map: a bit for each port (APM Vol. 2 §15.10.1)."""
        at = self._vmcb["iopm_base"] + port // 8
        bits = int.from_bytes(self._ram.read(at, 2), "little")
        return bool((bits >> port % 8) & ((1 << size) - 1))

    def _msr(self, number: int, write: bool) -> bool:
        """The MSR permission map: two bits a register, in three ranges; all others are intercepted (APM Vol. 2 §15.11)."""
        for first, at in ((0, 0), (0xC0000000, 0x800), (0xC0010000, 0x1000)):
            if first <= number < first + 0x2000:
                bit = 2 * (number - first) + write
                return bool(self._ram.read(self._vmcb["msrpm_base"] + at + bit // 8, 1)[0] >> bit % 8 & 1)
        return True


def fixed_io_information(instruction: Instruction) -> int:
    """What the instruction's encoding alone says in exit_info_1 of an IOIO exit (APM Vol. 2 figure 15-2)."""
    return (int(instruction.cs.addr_size) >> 1 << v.IO_ADDRESS_SHIFT | (v.IO_STRING if instruction.string else 0)
            | (v.IO_REP if instruction.rep else 0))
