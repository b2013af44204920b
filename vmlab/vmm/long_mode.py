"""A 64-bit guest of a deprivileging VMM: its kernel at CPL 3, kept from the VMM by page tables alone.

In 64-bit mode segments have no limits, and rings 1 and 2 are supervisor to paging as the VMM is (SDM Vol. 3A §4.6, §5.3.1), so
nothing but CPL 3 and page tables can hold a guest's kernel. Then the page tables cannot tell the guest's kernel from its
users, and each address space has two views (:class:`~vmlab.vmm.shadow_page.View`). Which of the two is running is virtual state:
:class:`LongModeCpu` keeps it. In legacy mode, where every guest begins, this is an ordinary
:class:`~vmlab.vmm.vcpu.VirtualCpu`.
"""

from __future__ import annotations

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine.cpu import IF, TF, Cpu, Segment
from vmlab.machine.delivery import GENERAL_PROTECTION, Fault
from vmlab.machine.msr import CSTAR, EFER_SCE, LSTAR, SFMASK, STAR
from vmlab.machine.paging import EFER_LMA, EFER_LME, EFER_NXE
from vmlab.machine.state import CS, HF_CS32, HF_CS64, R11, RCX, SS
from vmlab.machine.syscalls import syscall
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.vcpu import KERNEL_RING, VirtualCpu

#: CS and SS while the guest's kernel runs: flat, ring 3. Their selectors are never shown to anybody.
KERNEL_CODE = Segment(0xFFFB, 0, 0xFFFFFFFF, 0x00AFFB00)
KERNEL_STACK = Segment(0xFFF3, 0, 0xFFFFFFFF, 0x00CFF300)
#: CS of users, as far as it matters once they have left.
USER_CODE, USER_CODE32 = KERNEL_CODE, Segment(0xFFFB, 0, 0xFFFFFFFF, 0x00CFFB00)
_VMM_CODE = 0xFFE0
_LONG, _BIG = 1 << 21, 1 << 22
_RING3 = 3 << 13
_WORD = 0xFFFFFFFFFFFFFFFF


def canonical(address: int) -> bool:
    """Whether bits 47 to 63 are alike (SDM Vol. 1 §3.3.7.1)."""
    return (address + (1 << 47)) & _WORD < 1 << 48


class LongModeCpu(VirtualCpu):
    """The guest's CPU in legacy and long mode. In long mode CPL, and CS and SS of the kernel, are virtual."""

    def __init__(self, cpu: Cpu, space: StaticSpace, mmu: GuestMmu, *, true_selectors: bool) -> None:
        super().__init__(cpu, space, mmu, true_selectors=true_selectors)
        self._ring = 0
        self._kernel = {CS: KERNEL_CODE, SS: KERNEL_STACK}
        #: Whether the kernel's code runs where it lies, and in its own size, rather than from a cache of 64-bit code.
        self.in_place = False

    @property
    def long_mode(self) -> bool:
        return bool(self.mmu.efer & EFER_LMA)

    def start_long_mode(self) -> None:
        """:meth:`enter_long_mode` with the segments that the guest's kernel has."""
        self.enter_long_mode(uncompressed(self.cpu.segment(CS)), uncompressed(self.cpu.segment(SS)))

    def enter_long_mode(self, code: Segment, stack: Segment) -> None:
        """The guest turned paging on with EFER.LME: from here on the CPU runs in long mode, the guest's kernel at CPL 3.

        :param code: the guest's CS and SS, which stay what they are (compatibility mode, until it loads another CS).
        """
        cpu = self.cpu
        self._ring, self._kernel = 0, {CS: code, SS: stack}
        self.follow_efer()
        cpu.set_segment(CS, self._physical(CS, code))
        cpu.set_segment(SS, KERNEL_STACK)
        cpu.set_cpl(3)
        table = cpu.table("gdt")
        cpu.set_table("gdt", Segment(0, self.space.base, table.limit, 0))

    # ---- system calls: the CPU's SYSCALL leads to the VMM, when the guest's EFER.SCE lets it
    def follow_efer(self) -> None:
        """The guest wrote EFER (long mode): SCE is the CPU's too."""
        self.cpu.set_efer(EFER_LME | EFER_LMA | EFER_NXE | self.mmu.efer & EFER_SCE)

    def take_system_calls(self, door: int, door32: int) -> None:
        """Let SYSCALL go to these addresses of the VMM's, from 64- and from 32-bit code, with interrupts off."""
        for number, value in ((STAR, _VMM_CODE << 32), (LSTAR, door), (CSTAR, door32), (SFMASK, IF | TF)):
            self.cpu.set_msr(number, value)

    def system_call(self, bits: int) -> None:
        """The CPU is where SYSCALL in the guest's user code led: into the guest's kernel, as the guest's own MSRs say."""
        cpu = self.cpu
        cpu.set_segment(CS, USER_CODE if bits == 64 else USER_CODE32)
        cpu.set_segment(SS, KERNEL_STACK)
        cpu.set_cpl(3)
        cpu.eflags = cpu.gpr(R11)
        syscall(self, cpu.gpr(RCX))

    # ---- privilege
    @property
    def cpl(self) -> int:
        return self._ring if self.long_mode else super().cpl

    def set_cpl(self, cpl: int) -> None:
        if not self.long_mode:
            super().set_cpl(cpl)
            return
        if cpl in (1, 2):
            raise UnsupportedByStrategy(f"the guest goes to ring {cpl} of long mode, which is supervisor to paging; rings 0 and 3 are carried")
        self._ring = cpl
        self.cpu.set_cpl(3)

    # ---- code size and addresses
    @property
    def bits(self) -> int:
        """Size of the guest's code: 16, 32 or 64."""
        flags = self.segment(CS).flags
        return 64 if self.long_mode and flags & _LONG else 32 if flags & _BIG else 16

    @property
    def hflags(self) -> int:
        """The guest's code size, where SYSCALL and port instructions look for it."""
        if not self.long_mode:
            return super().hflags
        return self.cpu.hflags & ~(HF_CS64 | HF_CS32) | {64: HF_CS64 | HF_CS32, 32: HF_CS32, 16: 0}[self.bits]

    def advance(self, size: int) -> int:
        return (self.rip + size) & (_WORD if self.bits == 64 else 0xFFFFFFFF)

    # ---- segments
    def _is_virtual(self, number: int) -> bool:
        return self.long_mode and self._ring == 0 and number in (CS, SS)

    def selector(self, number: int) -> int:
        return self._kernel[number].selector if self._is_virtual(number) else super().selector(number)

    def segment(self, number: int) -> Segment:
        return self._kernel[number] if self._is_virtual(number) else super().segment(number)

    def set_segment(self, number: int, value: Segment) -> None:
        """As the guest says. CS and SS of its kernel stay virtual; FS and GS have their whole base."""
        if not self.long_mode:
            super().set_segment(number, value)
        elif number not in (CS, SS):
            self.cpu.set_segment(number, value)
        else:
            if value.selector & 3 == 0:
                self._kernel[number] = value
                value = self._physical(number, value)
            self.cpu.set_segment(number, Segment(value.selector, value.base, value.limit, value.flags | _RING3))
            self.cpu.set_cpl(3)

    def _physical(self, number: int, value: Segment) -> Segment:
        """What the CPU gets for CS or SS of the guest's kernel."""
        if not self.in_place:
            return KERNEL_CODE if number == CS else KERNEL_STACK
        if number == SS:
            return Segment(value.selector | 3, KERNEL_STACK.base, KERNEL_STACK.limit, KERNEL_STACK.flags)
        return Segment(value.selector | 3, value.base, value.limit, value.flags | _RING3)

    def empty_gdt(self, empty: bool) -> None:
        """Give the CPU no descriptors, so that whatever wants one traps; or those of the guest's shadow."""
        limit = 0 if empty else max((self.gdt.limit + 1) // 8 * 8 - 1, 0)
        if self.cpu.table("gdt").limit != limit:
            self.cpu.set_table("gdt", Segment(0, self.space.base, limit, 0))

    def set_segment_base(self, number: int, base: int) -> None:
        if not self.long_mode:
            super().set_segment_base(number, base)
            return
        old = self.cpu.segment(number)
        self.cpu.set_segment(number, Segment(old.selector, base, old.limit, old.flags))

    # ---- guest memory
    def fetch(self, address: int, size: int) -> bytes:
        self._check(address, size)
        return super().fetch(address, size)

    def read_linear(self, address: int, size: int, *, user: bool = False) -> bytes:
        self._check(address, size)
        return super().read_linear(address, size, user=user)

    def write_linear(self, address: int, data: bytes, *, user: bool = False) -> None:
        self._check(address, len(data))
        super().write_linear(address, data, user=user)

    def _check(self, address: int, size: int) -> None:
        """#GP for an address that is not canonical, as the machine's CPU raises it."""
        if self.long_mode and not (canonical(address) and canonical(address + size - 1)):
            raise Fault(GENERAL_PROTECTION, 0)


def uncompressed(segment: Segment) -> Segment:
    """A kernel's segment as the guest knows it, from what ring compression made of it."""
    if segment.selector & 3 != KERNEL_RING and segment.dpl != KERNEL_RING:
        return segment
    return Segment(segment.selector & 0xFFFC, segment.base, segment.limit, segment.flags & ~_RING3)
