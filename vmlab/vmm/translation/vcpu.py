"""The virtual CPU of a translated kernel: RIP and CS are virtual, and what translated code reads lies in machine memory."""

from __future__ import annotations

from collections.abc import Callable

from vmlab.machine.cpu import IF, IOPL, Cpu, Segment
from vmlab.machine.state import CS, SS
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.long_mode import LongModeCpu, uncompressed
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translation.layout import NEGATIVE_STACK, PENDING, SITE, VIRTUAL_CR, VIRTUAL_FLAGS
from vmlab.vmm.vcpu import FLAGS_AT, KERNEL_RING, NOTED_AT, SITE_AT, Interpreted

#: CS while the cache runs: flat, ring 1; its selector is never shown to anybody.
CACHE_CS = Segment(0xFFF8 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9B00 | KERNEL_RING << 13)
_FLAT_KERNEL_CS = Segment(0x08, 0, 0xFFFFFFFF, 0x00CF9B00)
_BIG = 1 << 22


class TranslatedCpu(LongModeCpu):
    """IF, IOPL and copies of the control registers are in the VMM's pages; RIP is the guest's, not the cache's."""

    def __init__(self, cpu: Cpu, space: StaticSpace, mmu: GuestMmu) -> None:
        self._flags_at = space.hole_frame(VIRTUAL_FLAGS)
        super().__init__(cpu, space, mmu, true_selectors=True)
        for word, address in ((FLAGS_AT, VIRTUAL_FLAGS), (NOTED_AT, PENDING), (SITE_AT, SITE)):
            self.words[word] = space.ram.address + space.hole_frame(address)
        self._rip = 0
        #: Told when the guest has loaded another GDT.
        self.on_gdt: Callable[[], None] = lambda: None
        self.kernel_cs = _FLAT_KERNEL_CS

    def show_control_registers(self) -> None:
        """Put the guest's control registers where translated code reads them."""
        for number in (0, 2, 3, 4):
            self.space.ram.write64(self.space.hole_frame(VIRTUAL_CR + 8 * number), self.cr(number))
        if self.long_mode:
            self.space.ram.write32(self.space.hole_frame(NEGATIVE_STACK), -self.selector(SS) & 0xFFFFFFFF)

    def start_long_mode(self) -> None:
        self.enter_long_mode(self.kernel_cs, uncompressed(self.cpu.segment(SS)))

    @property
    def flags(self) -> int:
        """IF and IOPL. The guest's ring can write the page, so nothing else of it is believed."""
        return self.space.ram.read32(self._flags_at) & (IF | IOPL)

    @flags.setter
    def flags(self, value: int) -> None:
        self.space.ram.write32(self._flags_at, value & (IF | IOPL))

    @property
    def rip(self) -> int:
        return self._rip

    @rip.setter
    def rip(self, value: int) -> None:
        self._rip = value & self._limit

    @property
    def _limit(self) -> int:
        return 0xFFFFFFFFFFFFFFFF if self.long_mode else 0xFFFFFFFF

    def load_gdt(self, base: int, limit: int) -> int:
        made = super().load_gdt(base, limit)
        self.on_gdt()
        return made

    def selector(self, number: int) -> int:
        return self.kernel_cs.selector if number == CS and self._in_cache else super().selector(number)

    def segment(self, number: int) -> Segment:
        return self.kernel_cs if number == CS and self._in_cache else super().segment(number)

    @property
    def _in_cache(self) -> bool:
        """Whether the CPU's own CS is the cache's."""
        return self.cpl == 0 and not self.long_mode and self.interpreted is None

    def set_segment(self, number: int, value: Segment) -> None:
        """As the guest says. A kernel whose code or stack is not flat 32-bit is interpreted as long as it is so."""
        if self.long_mode or self.interpreted is not None:
            super().set_segment(number, value)
            return
        kernel = value.selector & 3 == 0
        if number in (CS, SS) and kernel and (value.base or not value.flags & _BIG):
            segments = {other: uncompressed(self.segment(other)) for other in range(6)}
            self.interpreted = Interpreted(self.rip, segments | {number: value})
            return
        if number == CS and kernel:
            self.kernel_cs = value
            self.cpu.set_segment(CS, CACHE_CS)
            self.cpu.set_cpl(KERNEL_RING)
            return
        super().set_segment(number, value)
