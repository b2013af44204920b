"""The memory of a 64-bit domain: four-level tables, two roots for each process, and the hypervisor's slots of the L4.

With 64 bits there is no ring 1 that paging would tell from ring 3 and no segment limit, so the guest's kernel runs in ring 3
like its users, on page tables of its own; theirs are another root (xen.h: MMUEXT_NEW_USER_BASEPTR). The hypervisor
has slots 256 to 271 of every L4. The first shows the machine-to-physical table, which the guest's kernel may read: it is
in the root that the kernel uses and not in its users' (as with VMASST_TYPE_m2p_strict in Xen). Slot 260 holds the
hypervisor's own pages, supervisor and so out of reach: GDT, IDT, TSS, and the code at which SYSCALL arrives.
"""

from __future__ import annotations

from vmlab.machine.cpu import IF, Cpu, Segment
from vmlab.machine.memory import PAGE
from vmlab.machine.msr import CSTAR, EFER_LME, EFER_SCE, LSTAR, SFMASK, STAR
from vmlab.machine.paging import CR4_PAE, RW, US, P
from vmlab.machine.state import CS, DS, ES, FS, GS, RSI, RSP, SS
from vmlab.vmm import xen
from vmlab.vmm.xen.abi import WIDE
from vmlab.vmm.xen.descriptors import PRIVATE_PAGES, WideDescriptorTables
from vmlab.vmm.xen.domain import CR0, M2P_L1, PRIVATE_L1, Domain, StartOfDay
from vmlab.vmm.xen.tables import FOUR_LEVEL

# The hypervisor's pages (hpa).
_L3S, _L2S, _ENTRIES = (0x5000, 0x6000), (0x7000, 0x8000), 0x33000
_M2P_SLOT, _PRIVATE_SLOT = 256, 260     # of an L4
PRIVATE = 0xFFFF820000000000            # where slot 260 begins (Xen: PERDOMAIN_VIRT_START)
#: Where SYSCALL arrives: from 64-bit code, and from 32-bit code. Behind the pages that both widths have.
ENTRY, ENTRY32 = PRIVATE + PRIVATE_PAGES * PAGE, PRIVATE + PRIVATE_PAGES * PAGE + 0x10
_HYPERVISOR_CS = 0xE008                 # the hypervisor's own selectors in its part of the GDT; SS lies behind
_MASKED = 0x47700                       # flags that SYSCALL clears: AC, NT, IOPL, DF, IF, TF
_NOWHERE = b"\xeb\xfe"                  # jmp $: what lies there is never run, the monitor's door is before it


class WideDomain(Domain):
    """The memory of one paravirtual guest of 64 bits."""

    abi, format, tables_of, private, m2p_rights = WIDE, FOUR_LEVEL, WideDescriptorTables, PRIVATE, US
    hole = ((_PRIVATE_SLOT, _L3S[1] | RW | P),)

    #: hpa of the root for the guest's users; 0: it has named none yet.
    user_root = 0

    def _show_m2p(self) -> None:
        """The hypervisor's tables: the machine-to-physical table for all of ring 3 to read, and its own pages for nobody there."""
        super()._show_m2p()
        ram = self.ram
        for table in (*_L3S, *_L2S):
            ram.write(table, bytes(PAGE))
        ram.write64(_L3S[0], _L2S[0] | US | P)
        ram.write64(_L2S[0], M2P_L1 | US | P)
        ram.write64(_L3S[1], _L2S[1] | RW | P)
        ram.write64(_L2S[1], PRIVATE_L1 | RW | P)

    def _upper_tables(self, base: int) -> int:
        """L4, L3, L2 of the first GiB; returns the L2."""
        for table, below in ((base, base + PAGE), (base + PAGE, base + 2 * PAGE)):
            self._put(table, 0, self.machine(below) | US | RW | P)
        return base + 2 * PAGE

    def set_base(self, mfn: int) -> None:
        super().set_base(mfn)
        self.ram.write64(self.root + 8 * _M2P_SLOT, _L3S[0] | US | P)

    def set_user_base(self, mfn: int) -> None:
        """The root on which the guest's users run. Raises :class:`~vmlab.vmm.xen.frames.Refused`."""
        self.frames.get(mfn, self.format.root)
        if self.user_root:
            self.frames.put(self.user_root >> 12)
        self.user_root = mfn << 12
        if self.user_root != self.root:
            self.ram.write64(self.user_root + 8 * _M2P_SLOT, 0)

    def start(self, cpu: Cpu, begin: StartOfDay) -> None:
        """The physical CPU in long mode, ring 3, at the domain's entry; SYSCALL leads to :data:`ENTRY`."""
        self.ram.write(_ENTRIES, bytes(PAGE))
        for entry in (ENTRY, ENTRY32):
            self.ram.write(_ENTRIES + entry % PAGE, _NOWHERE)
        self.ram.write64(PRIVATE_L1 + 8 * PRIVATE_PAGES, _ENTRIES | P)
        cpu.enter_protected(begin.entry, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.load()
        cpu.set_cr(4, CR4_PAE)
        cpu.set_cr(3, self.root)
        cpu.set_efer(EFER_LME | EFER_SCE)
        cpu.set_cr(0, CR0)              # with paging on, LME becomes long mode (SDM Vol. 3A section 9.8.5)
        cpu.set_msr(STAR, xen.FLAT_RING3_CS32 << 48 | _HYPERVISOR_CS << 32)
        cpu.set_msr(LSTAR, ENTRY)
        cpu.set_msr(CSTAR, ENTRY32)
        cpu.set_msr(SFMASK, _MASKED)
        self._load_tables(cpu, 16)
        cpu.set_segment(CS, self.tables.descriptor(xen.FLAT_RING3_CS64))
        cpu.set_segment(SS, self.tables.descriptor(xen.FLAT_RING3_SS64))
        for number in (DS, ES, FS, GS):
            cpu.set_segment(number, Segment(0, 0, 0, 0))
        cpu.set_cpl(3)
        cpu.eflags = IF | 2             # the physical flag stays on: the machine's interrupts are the hypervisor's
        cpu.set_gpr(RSI, begin.start_info, 8)
        cpu.set_gpr(RSP, begin.stack, 8)
        cpu.rip = begin.entry
        cpu.store()
