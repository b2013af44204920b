"""Accesses that the VMM carries out in place of the CPU: stores to traced page tables, registers of devices.

A plain MOV, either way, is done at once; everything else by :class:`~vmlab.vmm.single_step.SingleStep`. Either way the guest
instruction counts once, as one that the VMM emulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

from capstone import x86_const as cs_x86

from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.operands import REGISTERS, AddressForm, Registers, address_form
from vmlab.vmm.single_step import LOADS, SingleStep, SteppingCpu


class StoringCpu(Registers, SteppingCpu, Protocol):
    """What both ways need of the guest's CPU."""


class Stores:
    """Carries out one instruction that touches memory which the CPU may not.

    :param own_tables: the guest's segment registers and descriptor tables are those that the CPU runs it with.
    """

    def __init__(self, machine: Machine, mmu: GuestMmu, emulator: Emulator, on_foreign_write: Callable[[], None], *,
                 own_tables: bool = False) -> None:
        self._machine, self._mmu, self._emulator, self._own_tables = machine, mmu, emulator, own_tables
        self._on_foreign_write = on_foreign_write
        self._second: SingleStep | None = None

    @property
    def single_step(self) -> SingleStep:
        """The second CPU, made on first use."""
        if self._second is None:
            self._second = SingleStep(self._machine, self._mmu, on_foreign_write=self._on_foreign_write)
        return self._second

    def carry_out(self, cpu: StoringCpu, instruction: Instruction, near: int) -> None:
        """Do ``instruction``, which is at ``cpu``'s RIP and faulted at linear ``near``; RIP moves on. Raises Fault as the bare machine would."""
        op = instruction.op
        if self._system(op):
            self._emulator.emulate(instruction)
            return
        user = cpu.cpl == 3
        plain = _plain(instruction)
        if plain is not None:
            try:
                plain.carry_out(cpu, user)
            except PageFault as fault:
                raise Fault(14, fault.error_code, fault.address) from fault
            cpu.rip = cpu.advance(instruction.size)
        else:
            step = self.single_step
            try:
                step.step(cpu, instruction, near, own_tables=self._own_tables)
            finally:
                if step.elements:
                    self._emulator.counts["emulate.string"] += step.elements
        self._emulator.count(op if op is not None and self._own_tables else "other", user)

    def _system(self, op: str | None) -> bool:
        """Whether this is the emulator's: LMSW writes a control register, and what a deprivileged guest loads is not what its CPU has."""
        return op == "lmsw" or (op in LOADS and not self._own_tables and self._emulator.knows(op))


class _Plain(NamedTuple):
    """MOV between memory and a general register, or of an immediate to memory: how drivers reach registers of devices."""

    store: bool
    at: AddressForm
    size: int
    register: int | None
    width: int              # of the register, in bytes
    shift: int              # AH and its like: 8
    immediate: int

    def carry_out(self, cpu: Registers, user: bool) -> None:
        if not self.store:
            assert self.register is not None
            value = int.from_bytes(cpu.read_linear(self.at.linear(cpu), self.size, user=user), "little")
            if self.shift:
                cpu.set_gpr(self.register, cpu.gpr(self.register) & ~0xFF00 | value << 8, 4)
            else:
                cpu.set_gpr(self.register, value, self.width)
            return
        value = self.immediate if self.register is None else cpu.gpr(self.register) >> self.shift
        cpu.write_linear(self.at.linear(cpu), (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little"), user=user)


@functools.lru_cache(maxsize=1 << 12)
def _plain(instruction: Instruction) -> _Plain | None:
    """What the instruction is, where it is a plain MOV; None where it is not."""
    if instruction.op is not None or instruction.cs.id != cs_x86.X86_INS_MOV:
        return None
    target, source = instruction.cs.operands
    store = target.type == cs_x86.X86_OP_MEM
    memory, other = (target, source) if store else (source, target)
    if memory.type != cs_x86.X86_OP_MEM:
        return None
    if other.type == cs_x86.X86_OP_REG and other.reg in REGISTERS:
        number, width, shift = REGISTERS[other.reg]
        return _Plain(store, address_form(instruction, memory), memory.size, number, width, shift, 0)
    if store and other.type == cs_x86.X86_OP_IMM:
        return _Plain(store, address_form(instruction, memory), memory.size, None, 0, 0, int(other.imm))
    return None
