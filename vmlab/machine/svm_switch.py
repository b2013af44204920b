"""#VMEXIT: the registers that AMD-V's CPU moves (APM Vol. 2 §15.6), on the portable path."""

from __future__ import annotations

from vmlab.machine.cpu import Cpu, Segment
from vmlab.machine.state import CS, DS, ES, HF2_GIF, HF2_HIF, HF2_NPT, HF2_VINTR, HF_GUEST, RAX, RSP, SS
from vmlab.machine.vmcb import Vmcb

_SWITCHED = (ES, CS, SS, DS)
_TABLES = (("gdtr", "gdt"), ("idtr", "idt"))


def world_switch(cpu: Cpu, vmcb: Vmcb, host: Vmcb) -> None:
    """Guest to the VMCB, host from the save area; ``native/svm.c`` does the same."""
    vmcb.set_switched_segments([cpu.segment(number) for number in _SWITCHED])
    for name, table in _TABLES:
        register = cpu.table(table)
        vmcb[f"{name}.base"], vmcb[f"{name}.limit"] = register.base, register.limit
    vmcb.set_switched_registers(cpu.cr(4), cpu.cr(3), cpu.cr(0), cpu.debug_register(7), cpu.debug_register(6),
                                cpu.eflags, cpu.rip)
    vmcb["rsp"], vmcb["rax"], vmcb["cr2"] = cpu.gpr(RSP), cpu.gpr(RAX), cpu.cr2
    vmcb["efer"], vmcb["cpl"] = cpu.efer, cpu.cpl
    vmcb["interrupt_shadow"] = int(cpu.shadow)

    cpu.clear_shadow()
    cpu.forget_exception()
    cpu.hflags &= ~HF_GUEST
    cpu.hflags2 &= ~(HF2_GIF | HF2_HIF | HF2_VINTR | HF2_NPT)
    cr4, cr3, cr0, _, _, rflags, rip = host.switched_registers()
    cpu.set_efer(host["efer"])
    cpu.set_crs(cr0, cr3, cr4, told=False)  # which flushes Unicorn's TLB; a real one may keep what is tagged
    for number, segment in zip(_SWITCHED, host.switched_segments(), strict=True):
        cpu.set_segment(number, segment)
    for name, table in _TABLES:
        cpu.set_table(table, Segment(0, host[f"{name}.base"], host[f"{name}.limit"], 0))
    cpu.set_cpl(0)
    cpu.eflags = rflags
    cpu.set_debug_register(7, 0x400)
    cpu.set_gpr(RSP, host["rsp"], 8)
    cpu.set_gpr(RAX, host["rax"], 8)
    cpu.rip = rip
