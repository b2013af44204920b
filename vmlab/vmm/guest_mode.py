"""The guest's CPU as a hardware-assisted VMM sees it at a #VMEXIT: partly in the VMCB, partly in the CPU.

General registers but RAX and RSP, and FS, GS, TR and LDTR, are still in the physical CPU; everything else
is in the VMCB. The surface is that of :class:`~vmlab.vmm.vcpu.VirtualCpu`, as far as instructions that can
exit need it, so that one emulator serves all VMMs.
"""

from __future__ import annotations

from vmlab.machine.cpu import IF, Cpu, Segment
from vmlab.machine.paging import CR0_PG, CR4_PSE
from vmlab.machine.state import CS, DS, ES, HF_CS32, RAX, RSP, SS
from vmlab.machine.vmcb import CountedVmcb
from vmlab.vmm.space import GUEST_FRAMES

_IN_VMCB = {ES: "es", CS: "cs", SS: "ss", DS: "ds"}


class GuestModeCpu:
    """A 32-bit guest that believes itself unpaged, on page tables of the VMM's.

    Fields of the VMCB are read once an exit at most: a VMM keeps them in its own variables.
    """

    shadow_at: int | None = None  # the interrupt shadow is the VMCB's; see end_shadow()
    #: Rights to ports were checked by the CPU before it exited.
    iopl = 3

    def __init__(self, cpu: Cpu, vmcb: CountedVmcb, guest_memory: int) -> None:
        self._physical, self._vmcb, self._memory_size = cpu, vmcb, guest_memory
        self._ram = cpu.ram
        self._known: dict[str, int] = {}
        #: Control registers as the guest wrote them; the VMCB has those that it really runs with.
        self._cr0, self.cr3, self._cr4 = 0x11, 0, 0

    def at_exit(self) -> None:
        """A new exit: what was read before is stale."""
        self._known.clear()

    def read(self, field: str) -> int:
        """A VMCB field, through the counted accessor the first time."""
        if field not in self._known:
            self._known[field] = self._vmcb[field]
        return self._known[field]

    def write(self, field: str, value: int) -> None:
        """Set a VMCB field."""
        self._known[field] = value
        self._vmcb[field] = value

    # ---- registers
    def gpr(self, number: int) -> int:
        if number in (RAX, RSP):
            return self.read("rax" if number == RAX else "rsp")
        return self._physical.gpr(number)

    def set_gpr(self, number: int, value: int, size: int = 4) -> None:
        """Write a general register as an instruction of operand size ``size`` bytes would."""
        if number not in (RAX, RSP):
            self._physical.set_gpr(number, value, size)
            return
        mask = (1 << (8 * size)) - 1
        field = "rax" if number == RAX else "rsp"
        self.write(field, value & mask if size >= 4 else (self.read(field) & ~mask) | (value & mask))

    @property
    def rip(self) -> int:
        return self.read("rip")

    @rip.setter
    def rip(self, value: int) -> None:
        self.write("rip", value)

    @property
    def cpl(self) -> int:
        return self.read("cpl")

    @property
    def eflags(self) -> int:
        return self.read("rflags")

    @property
    def interrupts_enabled(self) -> bool:
        return bool(self.eflags & IF)

    @property
    def cpu(self) -> GuestModeCpu:
        """Operand decoding asks a VirtualCpu for its physical CPU; here the physical CPU is the host's by now."""
        return self

    @property
    def hflags(self) -> int:
        """The guest's code size, where :func:`~vmlab.machine.pc.port_operands` looks for it."""
        return HF_CS32 if self.read("cs.attributes") & 0x400 else 0

    def segment(self, number: int) -> Segment:
        name = _IN_VMCB.get(number)
        if name is None:
            return self._physical.segment(number)
        attributes = self.read(f"{name}.attributes")
        return Segment(self.read(f"{name}.selector"), self.read(f"{name}.base"), self.read(f"{name}.limit"),
                       (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12)

    def end_shadow(self) -> None:
        """An instruction was completed: an interrupt shadow ends with it."""
        if self.read("interrupt_shadow"):
            self.write("interrupt_shadow", 0)

    # ---- control registers: what the guest believes, and what the CPU runs with
    @property
    def cr0(self) -> int:
        return self._cr0

    @cr0.setter
    def cr0(self, value: int) -> None:
        self._cr0 = value
        self.write("cr0", value | CR0_PG)

    @property
    def cr4(self) -> int:
        return self._cr4

    @cr4.setter
    def cr4(self, value: int) -> None:
        self._cr4 = value
        self.write("cr4", value | CR4_PSE)

    @property
    def cr2(self) -> int:
        return self.read("cr2")

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.write("cr2", value)

    def cr(self, number: int) -> int:
        return {0: self.cr0, 2: self.cr2, 3: self.cr3, 4: self.cr4}[number]

    # ---- guest memory: linear is guest-physical; nothing answers beyond RAM
    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        address &= 0xFFFFFFFF
        inside = max(0, min(size, self._memory_size - address))
        return self._ram.read(GUEST_FRAMES + address, inside) + b"\xff" * (size - inside)

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store into the guest's RAM; what lies beyond is dropped."""
        address &= 0xFFFFFFFF
        self._ram.write(GUEST_FRAMES + address, data[:max(0, self._memory_size - address)])
