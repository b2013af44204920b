"""The guest's CPU as a hardware-assisted VMM sees it at a #VMEXIT: partly in the VMCB, partly in the CPU.

General registers but RAX and RSP, and FS, GS, TR and LDTR, are still in the physical CPU; everything else
is in the VMCB. The surface is that of :class:`~vmlab.vmm.vcpu.VirtualCpu`, as far as instructions that can
exit need it, so that one emulator serves all VMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmlab.machine.cpu import IF, Cpu, Segment
from vmlab.machine.paging import CR0_PG, CR0_WP, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE
from vmlab.machine.state import CS, DS, ES, HF_CS32, HF_CS64, RAX, RSP, SS
from vmlab.machine.vmcb import FIELDS, CountedVmcb
from vmlab.vmm.guest_tables import GuestMmu

_IN_VMCB = {ES: "es", CS: "cs", SS: "ss", DS: "ds"}
_L, _D = 0x200, 0x400               # of a code segment's attributes in the VMCB (APM Vol. 2 table B-2)
_SVME = 1 << 12
_KEPT_SEGMENTS = 256


def _where(fields: list[tuple[int, memoryview, int]]) -> tuple[int, int, int, int, int]:
    """The bits of a segment's four fields together, and the index of each in its view."""
    bits, (selector, base, limit, attributes) = sum(bit for bit, _, _ in fields), (index for _, _, index in fields)
    return bits, selector, base, limit, attributes


class GuestModeCpu:
    """The guest's CPU at an exit.

    Fields of the VMCB are read once an exit at most: a VMM keeps them in its own variables. Which were, two sets of bits say, and
    :meth:`settle` counts them: adding to the ledger at each would cost more than the access.

    :param nested: the guest's paging registers are its own, in the VMCB; otherwise the CPU runs on shadow tables and
        ``mmu`` holds what the guest wrote.
    """

    virtual_8086 = True
    shadow_at: int | None = None  # the interrupt shadow is the VMCB's; see end_shadow()
    #: Rights to ports were checked by the CPU before it exited.
    iopl = 3

    def __init__(self, cpu: Cpu, vmcb: CountedVmcb, mmu: GuestMmu, *, nested: bool) -> None:
        #: Writes a control register with all that follows; whoever emulates registers puts itself here.
        self.write_cr: Callable[[int, int], None]
        self._physical, self._mmu, self._nested = cpu, mmu, nested
        self._registers = cpu.gprs
        #: The guest's system-call and segment-base registers are in the CPU, and its own to read and write.
        self.msrs: dict[int, int] = {}
        self._counts = vmcb.counts
        page = memoryview(vmcb.bytes)[vmcb.address:vmcb.address + 0x1000]
        views: dict[str, memoryview] = {"B": page, "H": page.cast("H"), "I": page.cast("I"), "Q": page.cast("Q")}
        #: By name: the field's bit in the sets, and where it is.
        self._at: dict[str, tuple[int, memoryview, int]] = {
            name: (1 << i, views[code.format[-1]], offset // code.size) for i, (name, (offset, code)) in enumerate(FIELDS.items())}
        self._exit, self._words, self._exit_at = self._at["exit_code"]
        self._rip, _, self._rip_at = self._at["rip"]
        self._rax, _, self._rax_at = self._at["rax"]
        self._rsp, _, self._rsp_at = self._at["rsp"]
        self._shadow, _, self._shadow_at = self._at["interrupt_shadow"]
        self._cpl, self._bytes, self._cpl_at = self._at["cpl"]
        self._code, self._halves, self._code_at = self._at["cs.attributes"]
        self._paging = self._at["cr0"][0] | self._at["cr3"][0] | self._at["cr4"][0] | self._at["efer"][0]
        self._cr0_at, self._cr3_at, self._cr4_at, self._efer_at = (self._at[name][2] for name in ("cr0", "cr3", "cr4", "efer"))
        self._code_base, _, self._code_base_at = self._at["cs.base"]
        self._doubles = views["I"]
        self._segment_at = {number: _where([self._at[f"{name}.{field}"] for field in ("selector", "base", "limit", "attributes")])
                            for number, name in _IN_VMCB.items()}
        self._segments: dict[tuple[int, int, int, int], Segment] = {}
        self._read = self._kept = 0     # fields read at this exit, and fields that were known already: written, or counted
        self._written = 0               # how many were written
        self._mmu_known = False
        self._loaded: dict[str, int] = {}

    def at_exit(self) -> int:
        """A new exit: what was read before, and counted when the guest was entered, is stale. The exit code."""
        self._read, self._kept, self._mmu_known = self._exit, 0, False
        return self._words[self._exit_at]

    def settle(self) -> None:
        """Bring the accesses so far to the ledger. To be called before anybody may look there."""
        fresh = self._read & ~self._kept
        if fresh:
            self._counts["vmcb.read"] += fresh.bit_count()
            self._kept |= fresh
        if self._written:
            self._counts["vmcb.write"] += self._written
            self._written = 0

    def read(self, field: str) -> int:
        """A VMCB field, which counts the first time at an exit."""
        bit, view, index = self._at[field]
        self._read |= bit
        return view[index]

    def write(self, field: str, value: int) -> None:
        """Set a VMCB field."""
        bit, view, index = self._at[field]
        self._kept |= bit & ~self._read
        self._written += 1
        view[index] = value

    def _change(self, field: str, value: int) -> None:
        """The same, but for one that is known to hold this value."""
        bit, view, index = self._at[field]
        if view[index] != value or not (self._read | self._kept) & bit:
            self.write(field, value)

    def state(self) -> dict[str, Any]:
        """Which fields of the VMCB are known already, and the registers that the VMM keeps. What was read or written so far is counted."""
        return {"msrs": dict(self.msrs), "read": self._read, "kept": self._kept, "mmu_known": self._mmu_known, "loaded": dict(self._loaded)}

    def from_state(self, state: dict[str, Any]) -> None:
        self.msrs.clear()
        self.msrs.update(state["msrs"])
        self._read, self._kept, self._written = state["read"], state["kept"], 0
        self._mmu_known, self._loaded = state["mmu_known"], dict(state["loaded"])

    # ---- registers
    def gpr(self, number: int) -> int:
        if number == RAX:
            self._read |= self._rax
            return self._words[self._rax_at]
        if number == RSP:
            self._read |= self._rsp
            return self._words[self._rsp_at]
        return self._registers[number]

    def set_gpr(self, number: int, value: int, size: int = 4) -> None:
        """Write a general register as an instruction of operand size ``size`` bytes would."""
        if number != RAX and number != RSP:
            if size == 4:
                self._registers[number] = value & 0xFFFFFFFF
            else:
                self._physical.set_gpr(number, value, size)
            return
        mask = (1 << (8 * size)) - 1
        field = "rax" if number == RAX else "rsp"
        self._change(field, value & mask if size >= 4 else (self.read(field) & ~mask) | (value & mask))

    @property
    def rip(self) -> int:
        self._read |= self._rip
        return self._words[self._rip_at]

    @rip.setter
    def rip(self, value: int) -> None:
        self._kept |= self._rip & ~self._read
        self._written += 1
        self._words[self._rip_at] = value

    def advance(self, size: int) -> int:
        """RIP behind an instruction of ``size`` bytes."""
        self._read |= self._rip | self._code
        long = self._halves[self._code_at] & _L and self.bits == 64
        return (self._words[self._rip_at] + size) & (0xFFFFFFFFFFFFFFFF if long else 0xFFFFFFFF)

    @property
    def cpl(self) -> int:
        self._read |= self._cpl
        return self._bytes[self._cpl_at]

    @property
    def eflags(self) -> int:
        return self.read("rflags")

    @eflags.setter
    def eflags(self, value: int) -> None:
        self._change("rflags", value)

    @property
    def interrupts_enabled(self) -> bool:
        return bool(self.eflags & IF)

    @property
    def cpu(self) -> GuestModeCpu:
        """Operand decoding asks a VirtualCpu for its physical CPU; here the physical CPU is the host's by now."""
        return self

    @property
    def bits(self) -> int:
        """Size of the guest's code: 16, 32 or 64."""
        self._read |= self._code
        attributes = self._halves[self._code_at]
        if attributes & _L and self.mmu.efer & EFER_LMA:
            return 64
        return 32 if attributes & _D else 16

    def code_at(self) -> tuple[int, int]:
        """The linear address of the instruction at RIP, and the size of its code."""
        self._read |= self._rip | self._code
        attributes, rip = self._halves[self._code_at], self._words[self._rip_at]
        if attributes & _L and self.bits == 64:
            return rip, 64
        self._read |= self._code_base
        return (self._words[self._code_base_at] + rip) & 0xFFFFFFFF, 32 if attributes & _D else 16

    @property
    def hflags(self) -> int:
        """The guest's code size, where :func:`~vmlab.machine.instructions.port_operands` looks for it."""
        return {64: HF_CS64 | HF_CS32, 32: HF_CS32, 16: 0}[self.bits]

    def segment(self, number: int) -> Segment:
        name = _IN_VMCB.get(number)
        if name is None:
            return self._physical.segment(number)
        bits, selector, base, limit, attributes = self._segment_at[number]
        self._read |= bits
        found = self._halves[selector], self._words[base], self._doubles[limit], self._halves[attributes]
        known = self._segments.get(found)
        if known is None:
            if len(self._segments) >= _KEPT_SEGMENTS:
                self._segments.clear()
            known = self._segments[found] = Segment(*found[:3], (found[3] & 0xFF) << 8 | (found[3] & 0xF00) << 12)
        return known

    # ---- what a task switch needs besides (vmlab.machine.task): it is 32-bit code's, on shadow tables
    @property
    def long_mode(self) -> bool:
        return bool(self.mmu.efer & EFER_LMA)

    def selector(self, number: int) -> int:
        name = _IN_VMCB.get(number)
        return self._physical.selector(number) if name is None else self.read(f"{name}.selector")

    def task_selector(self, number: int) -> int:
        """What a task switch saves of a segment register."""
        return self.selector(number)

    def set_segment(self, number: int, value: Segment) -> None:
        """Load a segment register with this descriptor."""
        name = _IN_VMCB.get(number)
        if name is None:
            self._physical.set_segment(number, value)
            return
        for field, new in (("selector", value.selector), ("base", value.base), ("limit", value.limit),
                           ("attributes", (value.flags >> 8) & 0xFF | (value.flags >> 12) & 0xF00)):
            self._change(f"{name}.{field}", new)

    def set_cpl(self, cpl: int) -> None:
        self.write("cpl", cpl)

    def table(self, name: str) -> Segment:
        if name in ("tr", "ldt"):
            return self._physical.table(name)
        return Segment(0, self.read(f"{name}r.base"), self.read(f"{name}r.limit"), 0)

    def set_table(self, name: str, value: Segment) -> None:
        """The task register and LDTR are in the CPU: #VMEXIT leaves them there."""
        if name in ("tr", "ldt"):
            self._physical.set_table(name, value)
            return
        self.write(f"{name}r.base", value.base)
        self.write(f"{name}r.limit", value.limit)

    def set_cr(self, number: int, value: int) -> None:
        self.write_cr(number, value)

    def clear_shadow(self) -> None:
        self.end_shadow()

    def forget_exception(self) -> None:
        """The next VMRUN starts with none."""

    def end_shadow(self) -> None:
        """An instruction was completed: an interrupt shadow ends with it."""
        self._read |= self._shadow
        if self._words[self._shadow_at]:
            self.write("interrupt_shadow", 0)

    # ---- control registers: what the guest believes, and what the CPU runs with
    @property
    def mmu(self) -> GuestMmu:
        """The guest's paging registers; under nested paging read from the VMCB, once an exit."""
        if self._nested and not self._mmu_known:
            self._mmu_known = True
            self._read |= self._paging
            words = self._words
            self._mmu.assume(words[self._cr0_at], words[self._cr3_at], words[self._cr4_at], words[self._efer_at] & ~_SVME)
        return self._mmu

    def load_paging(self, root: int) -> None:
        """Have the CPU run on the shadow tables at ``root``: only fields that change are written."""
        mmu = self._mmu
        active = EFER_LME | EFER_LMA if mmu.efer & EFER_LMA else 0
        wanted = {"cr0": mmu.cr0 | CR0_PG | CR0_WP, "cr3": root, "cr4": mmu.cr4 | CR4_PAE,
                  "efer": mmu.efer & ~(EFER_LME | EFER_LMA) | active | EFER_NXE | _SVME}
        for field, value in wanted.items():
            if self._loaded.get(field) != value:
                self.write(field, value)
        self._loaded = wanted

    def start_nested(self) -> None:
        """Nested paging: the guest's registers as they are at reset, all its own."""
        mmu = self._mmu
        for field, value in (("cr0", mmu.cr0), ("cr3", 0), ("cr4", 0), ("efer", _SVME)):
            self.write(field, value)

    def follow_registers(self) -> None:
        """Nested paging: the VMM wrote one of the guest's paging registers in its place."""
        mmu = self._mmu
        for field, value in (("cr0", mmu.cr0), ("cr3", mmu.cr3), ("cr4", mmu.cr4), ("efer", mmu.efer | _SVME)):
            if self.read(field) != value:
                self.write(field, value)

    @property
    def cr2(self) -> int:
        return self.read("cr2")

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.write("cr2", value)

    def cr(self, number: int) -> int:
        if number == 2:
            return self.cr2
        mmu = self.mmu
        return mmu.cr4 if number == 4 else {0: mmu.cr0, 3: mmu.cr3}[number]

    # ---- guest memory, through the guest's own tables
    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        return self.mmu.read_linear(address, size, user=user)

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store into the guest's memory; raises its own PageFault."""
        self.mmu.write_linear(address, data, user=user)
