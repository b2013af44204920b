"""Guest memory under hardware assistance: shadow page tables, or nested ones.

Each class says what the VMCB must hold and intercept for it, and handles the exits that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmlab.errors import UnsupportedByStrategy
from vmlab.machine import vmcb as v
from vmlab.machine.cpu import AC
from vmlab.machine.delivery import PAGE_FAULT, Fault
from vmlab.machine.paging import CR4_SMAP, CR4_SMEP, PF_FETCH, PF_PRESENT, PF_USER, PF_WRITE, PageFault, walk
from vmlab.vmm.emulate import Emulator
from vmlab.vmm.guest_mode import GuestModeCpu
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.nested import NestedPager
from vmlab.vmm.shadow import Outcome, ShadowPager
from vmlab.vmm.space import LARGE

_SHADOWED_CRS = 1 << 0 | 1 << 3 | 1 << 4


class AssistedVmm(Protocol):
    """What the schemes need of the VMM."""

    cpu: GuestModeCpu
    emulator: Emulator
    mmu: GuestMmu

    def inject(self, fault: Fault, during: int = 0) -> None: ...

    def inject_again(self, during: int) -> None: ...

    def carry_out(self, address: int) -> None: ...

    def emulate_next(self) -> None: ...

    def note_foreign(self, gpa: int, verb: str = "mapped") -> None: ...


class AssistedMemory(Protocol):
    """A scheme. ``exits``: the exit codes that are its own."""

    exits: dict[int, Callable[[], None]]

    @property
    def pager(self) -> NestedPager | ShadowPager: ...

    def prepare(self, vmcb: v.Vmcb) -> int:
        """Fill in the VMCB for a guest that is about to start; returns bits for its intercept vector."""

    def follow(self) -> None:
        """After each exit: let the CPU see what changed."""

    def forget(self) -> None:
        """Page tables were stored to at a place that could not be told."""


class Shadowed:
    """The CPU walks shadow tables: #PF exits, and so do the registers that say where the guest's tables are."""

    def __init__(self, vmm: AssistedVmm, pager: ShadowPager) -> None:
        self._vmm, self.pager = vmm, pager
        pager.on_foreign = vmm.mmu.memory.on_foreign = vmm.note_foreign
        vmm.emulator.registers.on_paging = pager.reload
        vmm.emulator.registers.on_invlpg = pager.invlpg
        self.exits: dict[int, Callable[[], None]] = {v.EXIT_EXCEPTION + PAGE_FAULT: self._page_fault, v.EXIT_INVLPG: vmm.emulate_next}

    def prepare(self, vmcb: v.Vmcb) -> int:
        vmcb["intercept_cr_read"] = vmcb["intercept_cr_write"] = _SHADOWED_CRS
        vmcb["intercept_exceptions"] = 1 << PAGE_FAULT
        self._vmm.cpu.load_paging(self.pager.root)
        # A task switch loads CR3, and no other intercept sees that (APM Vol. 2 §15.14.1).
        return v.intercept_bit(v.EXIT_TASK_SWITCH) | (v.intercept_bit(v.EXIT_INVLPG) if self.pager.scheme == "lazy" else 0)

    def follow(self) -> None:
        if self.pager.stale:
            self.pager.stale = False
            self._vmm.cpu.load_paging(self.pager.root)
            self._vmm.emulator.machine.flush_guest()

    def forget(self) -> None:
        self.pager.drop_all()

    def _page_fault(self) -> None:
        """#PF on the shadow: hidden, a store to a traced table, or the guest's own; what it interrupted is injected again."""
        vmm = self._vmm
        code, address, during = (vmm.cpu.read(field) for field in ("exit_info_1", "exit_info_2", "exit_interrupt_info"))
        during = during if during & v.EVENT_VALID else 0
        try:
            if code & PF_PRESENT and not code & PF_USER and vmm.mmu.cr4 & (CR4_SMAP | CR4_SMEP):
                self._keep_out_of_user_pages(address, code)
            outcome = self.pager.fault(address, write=bool(code & PF_WRITE), user=bool(code & PF_USER), fetch=bool(code & PF_FETCH))
        except PageFault as fault:
            vmm.emulator.counts["shadow.fault.true"] += 1
            vmm.inject(Fault(PAGE_FAULT, fault.error_code, fault.address), during)
            return
        if outcome is Outcome.HIDDEN:
            vmm.inject_again(during)
        elif during:
            raise UnsupportedByStrategy(f"the guest at {vmm.cpu.rip:#x} has a stack at {address:#x} in one of its own page tables")
        else:
            vmm.carry_out(address)


    def _keep_out_of_user_pages(self, address: int, code: int) -> None:
        """SMAP and SMEP: the CPU has both of the guest's, and found its own right against a user's page (SDM Vol. 3A §4.6). Raises PageFault."""
        mmu, fetch = self._vmm.mmu, code & PF_FETCH
        if not mmu.cr4 & (CR4_SMEP if fetch else CR4_SMAP) or (not fetch and self._vmm.cpu.eflags & AC):
            return
        if walk(mmu.memory, mmu.tables, address, 0, mark=False).user:
            raise PageFault(address, PF_PRESENT | code & (PF_WRITE | PF_FETCH))


class Nested:
    """The CPU walks the guest's own tables and nested ones; it exits for a part of guest memory that was never touched."""

    def __init__(self, vmm: AssistedVmm, page: str, is_device: Callable[[int], bool]) -> None:
        self._vmm = vmm
        self.pager = NestedPager(vmm.mmu.memory, vmm.emulator.counts, LARGE if page == "2m" else 4096, is_device)
        self.pager.on_foreign = vmm.mmu.memory.on_foreign = vmm.note_foreign
        vmm.emulator.registers.on_paging = lambda flush: vmm.cpu.follow_registers()
        self.exits: dict[int, Callable[[], None]] = {v.EXIT_NPF: self._nested_fault}

    def prepare(self, vmcb: v.Vmcb) -> int:
        vmcb["nested_control"], vmcb["nested_cr3"] = 1, self.pager.root
        self._vmm.cpu.start_nested()
        return 0

    def follow(self) -> None:
        """The guest's registers are its own; VMRUN flushes the TLB."""

    def forget(self) -> None:
        """Nothing is derived from the guest's tables."""

    def _nested_fault(self) -> None:
        cpu = self._vmm.cpu
        gpa, during = cpu.read("exit_info_2"), cpu.read("exit_interrupt_info")
        if self.pager.fault(gpa):
            self._vmm.inject_again(during if during & v.EVENT_VALID else 0)
        else:
            self._vmm.carry_out(gpa)
