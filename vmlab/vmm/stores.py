"""Accesses that the VMM carries out in place of the CPU: stores to traced page tables, registers of devices.

A plain MOV, either way, is done at once; everything else by :class:`~vmlab.vmm.single_step.SingleStep`. Either way the guest
instruction counts once, as one that the VMM emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from capstone import x86_const as cs_x86

from vmlab.machine.decode import Instruction
from vmlab.machine.delivery import Fault
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.operands import REGISTERS, Registers, effective_address, read_operand, write_operand
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
        if _is_plain_store(instruction):
            target, source = instruction.cs.operands
            value = read_operand(cpu, instruction, source) & ((1 << (8 * target.size)) - 1)
            try:
                cpu.write_linear(effective_address(cpu, instruction, target), value.to_bytes(target.size, "little"), user=user)
            except PageFault as fault:
                raise Fault(14, fault.error_code, fault.address) from fault
            cpu.rip = cpu.advance(instruction.size)
        elif _is_plain_load(instruction):
            target, source = instruction.cs.operands
            try:
                write_operand(cpu, instruction, target, read_operand(cpu, instruction, source))
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


def _is_plain_load(instruction: Instruction) -> bool:
    """MOV of memory to a general register: how drivers read registers of devices."""
    found = instruction.cs
    if found.id != cs_x86.X86_INS_MOV or instruction.op is not None:
        return False
    target, source = found.operands
    return bool(source.type == cs_x86.X86_OP_MEM and target.type == cs_x86.X86_OP_REG and target.reg in REGISTERS)


def _is_plain_store(instruction: Instruction) -> bool:
    """MOV of a general register or an immediate to memory."""
    found = instruction.cs
    if found.id != cs_x86.X86_INS_MOV or instruction.op is not None:
        return False
    target, source = found.operands
    return bool(target.type == cs_x86.X86_OP_MEM and (source.type == cs_x86.X86_OP_IMM or source.reg in REGISTERS))
