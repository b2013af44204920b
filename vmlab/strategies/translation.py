"""Binary translation: the guest's kernel runs as translated code at CPL 1, its users directly at CPL 3.

CLI becomes a store to the virtual CPU's IF. What the cache cannot do by itself calls out into the VMM,
by a jump, without any trap. :mod:`vmlab.vmm.translation` makes the code; this module runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmlab.errors import UnsupportedByStrategy
from vmlab.guests import GuestImage
from vmlab.machine.cpu import OF, TF
from vmlab.machine.decode import Instruction, decode
from vmlab.machine.delivery import Fault
from vmlab.machine.fast_events import Shortcuts
from vmlab.machine.paging import PageFault
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, DS
from vmlab.parameters import Value
from vmlab.strategies.techniques import BinaryTranslationTechnique
from vmlab.vmm.operands import effective_address, fetch
from vmlab.vmm.translation import Mode, Options, Site, State, Translator, Unit
from vmlab.vmm.translation.adapt import Adaptation, accessed
from vmlab.vmm.translation.forms import LONG, NARROW
from vmlab.vmm.translation.layout import GATE, TARGET
from vmlab.vmm.translation.pages import CodePages
from vmlab.vmm.translation.precise import PreciseMonitor
from vmlab.vmm.translation.priority import Priority
from vmlab.vmm.translation.user_return import UserReturns
from vmlab.vmm.translation.vcpu import CACHE_CS, TranslatedCpu
from vmlab.vmm.translation.windows import Windows
from vmlab.vmm.vcpu import KERNEL_RING

_TRAPS = frozenset({"int", "int3", "into", "int1"})


class BinaryTranslation(BinaryTranslationTechnique, PreciseMonitor):
    """A VMM after VMware's (Adams & Agesen, ASPLOS 2006)."""

    trap_tsc = False

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        self._watched: dict[int, Callable[[int], None]] = {}
        super().__init__(machine, parameters)
        chosen = self.chosen
        self.options = Options(
            emulation=str(chosen["emulation"]), lookup=str(chosen["lookup"]), chaining=str(chosen["chaining"]),
            adaptation=str(chosen["adaptation"]), guilty_after=int(chosen["guilty"]),
            cache_size=int(chosen["cache"]), unit_limit=int(chosen["unit"]),
        )
        self.trap_tsc = self.options.emulation != "in-cache"
        self.translator = Translator(self.space, self.counts, self.options, on_patch=self._forget_code,
                                     watched=self._watched.get, watch=machine.watch)
        self.pages = CodePages(self.pager, self.translator, self.counts)
        self.priority = Priority(self.space, self.platform_devices.lapic)
        self.windows = Windows(self.pager, self.translator.cache, self.pages, self.priority, self.counts)
        self.adaptation = Adaptation(self.translator, self.windows)
        self.user_returns = UserReturns(self.vcpu, self.translator.cache)
        self.translator.on_site_gone = self._site_gone
        self.translator.clock = lambda: machine.time
        self.vcpu.on_gdt = self.user_returns.forget_all
        self.emulator.registers.on_paging = self._paging_changed
        self.emulator.registers.on_invlpg = self._invlpg
        machine.tagger = self.translator.tag_block
        for forms in (NARROW, LONG):
            machine.gate(forms.linear(GATE), self._gate)
        native = machine.native_events if type(self) is BinaryTranslation else None
        self._shortcuts: Shortcuts | None = None
        self._short_sites: dict[int, Site] = {}     # callouts that C carries out
        if native is not None:
            self._shortcuts = native.offer(self.counts, self.vcpu.words_at, door=GATE, on_callouts=self._called_out)
            self.translator.on_drop = self._dropped
        self._new_space = False      # the guest has just changed its address space

    def warm_up(self) -> list[dict[str, int]]:
        return self.translator.learning.curve(self.machine.time)

    def make_vcpu(self) -> TranslatedCpu:
        return TranslatedCpu(self.machine.cpu, self.space, self.mmu)

    def load(self, image: GuestImage, command_line: str) -> None:
        super().load(image, command_line)
        cpu = self.machine.cpu
        cpu.load()
        cpu.set_segment(CS, CACHE_CS)
        cpu.set_cpl(KERNEL_RING)
        if self.vcpu.interpreted is None:
            self.vcpu.rip = cpu.rip
        self.resume()
        cpu.store()

    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Kernel code is watched where its translation begins, user code at its own address."""
        self._watched[address] = callback
        self.machine.watch(address, callback)

    def _forget_code(self, start: int, end: int) -> None:
        """Code in the cache changed. The machine finds it by its linear address, which ring 3 cannot reach."""
        cpu = self.machine.cpu
        user = cpu.cpl == 3
        if user:
            cpu.set_cpl(KERNEL_RING)
        cpu.store()
        self.machine.forget_code(start, end)
        if user:
            cpu.set_cpl(3)

    def _site_gone(self, site: Site) -> None:
        self.windows.release(site)
        self.user_returns.forget(site)

    def _paging_changed(self, flush: bool) -> None:
        self._registers_written(flush)
        self.pages.look_again()
        self.windows.look_again()
        self._new_space = True

    def _invlpg(self, address: int) -> None:
        self.pager.invlpg(address)
        self.pages.look_again()
        self.windows.look_again()

    def prepare_long_mode(self) -> None:
        """Translations of 32-bit code go while the CPU can still reach them."""
        self.windows.close_all()
        self.translator.set_mode(Mode(64, self.vcpu.kernel_cs.selector, self.vcpu.iopl))

    # ---- into the cache
    def resume(self, site: Site | None = None) -> None:
        """Let the physical CPU go on where the virtual CPU is: in the cache, or directly in user code.

        :param site: the callout that is being returned from.
        """
        vcpu, cpu = self.vcpu, self.machine.cpu
        self._interpreting = vcpu.interpreted is not None
        if self._interpreting:
            cpu.rip = self._door
            self.follow_tables()
            return
        if vcpu.cpl == 3:
            if self.space.in_hole(cpu.rip) or cpu.rip != vcpu.rip:
                self.counts["bt.direct.enter"] += 1
            cpu.rip = vcpu.rip
            self.follow_tables()
            return
        if cpu.system_flags & TF:
            raise UnsupportedByStrategy(f"the guest's kernel single-steps itself at {vcpu.rip:#x} (EFLAGS.TF); translated code cannot")
        if self._new_space:
            self._new_space = False
            try:
                self.mmu.translate(vcpu.rip, fetch=True)   # as fetching the next instruction does: A bits, or a page fault
            except PageFault as fault:
                self.reflect(Fault(14, fault.error_code, fault.address))
        if self.in_long_mode and vcpu.bits != 64:
            self._interpreting = True
            cpu.rip = self._door
            self.follow_tables()
            return
        if self.windows and cpu.segment(DS).base:
            self.windows.close_all()    # they are found by their offset in a flat DS
        self._show_state()
        instruction = site.instruction if site is not None else None
        if (site is not None and instruction is not None and site.after and site.unit.alive
                and vcpu.rip == (site.guest or 0) + instruction.size):
            cpu.rip = site.after
        else:
            cpu.rip = self._unit().start
        self.follow_tables()

    def _show_state(self) -> None:
        """What translated code reads of the virtual CPU, and what it has built in."""
        self.vcpu.show_control_registers()
        self.translator.set_mode(Mode(64 if self.in_long_mode else 32, self.vcpu.selector(CS), self.vcpu.iopl))

    def _unit(self, after: Site | None = None, *, indirect: bool = False) -> Unit:
        """The unit of the guest's kernel code at RIP, translated if need be; a fetch that faults is the guest's own #PF."""
        unit = self.translator.find(self.vcpu.rip)
        while unit is None:
            try:
                unit = self.translator.translate(self.vcpu.rip, self.vcpu.fetch, after=after, indirect=indirect)
            except (PageFault, Fault) as fault:
                self.reflect(Fault(14, fault.error_code, fault.address) if isinstance(fault, PageFault) else fault)
                self._show_state()
                after, indirect = None, False
                unit = self.translator.find(self.vcpu.rip)
        return unit

    # ---- out of the cache: a callout
    def _gate(self) -> None:
        """Translated code left for the VMM."""
        self._at_work = True
        try:
            self._call_out()
        finally:
            self._at_work = False

    def _call_out(self) -> None:
        """SITE says why translated code left."""
        self.priority.take()
        if self._interpreting:
            self.interpret()
            self.resume()
            return
        site = self.translator.sites.get(self.machine.ram.read32(self._site_at))
        if site is None:
            self.refuse("a callout that does not exist: the guest wrote the VMM's page")
        site.calls += 1
        self.counts[f"bt.callout.{site.cause}"] += 1
        vcpu = self.vcpu
        vcpu.rip = self.translator.read_word(TARGET) if site.guest is None else site.guest
        self._state = State(vcpu.rip)
        if site.is_exit:
            self._follow(site)
            return
        if site.cause == "indirect":
            self._look_up()
            return
        if site.cause == "interrupt":
            self.inject_pending()
        elif site.instruction is None:
            self.reflect(Fault(6))
        elif site.cause == "adapted":
            self._adapted(site, site.instruction)
        elif site.instruction.op == "into" and not vcpu.eflags & OF:
            vcpu.rip += site.instruction.size
            self.emulator.count("into", False)
        elif site.instruction.op in _TRAPS:
            self.software_interrupt(site.instruction)
        elif self.emulator.knows(site.instruction.op):
            self.emulate(site.instruction)
            if site.cause == "iret" and site.binding and site.unit.alive and vcpu.cpl == 3:
                self.user_returns.learn(site)
        else:
            self.reflect(Fault(6))
        self.resume(site)
        if self._shortcuts is not None and not self.in_long_mode and site.cause in ("cli", "sti") and self.machine.cpu.rip == site.after:
            instruction = site.instruction
            assert instruction is not None and site.guest is not None
            self._short_sites[site.number] = site
            self._shortcuts.callout(site.number, site.cause, site.after, site.guest, instruction.size)

    def _called_out(self, number: int, n: int) -> None:
        """C took this callout ``n`` times."""
        self._short_sites[number].calls += n

    def _dropped(self, unit: Unit) -> None:
        self.pages.dropped(unit)
        for site in unit.sites:
            if site.number in self._short_sites and self._shortcuts is not None:
                self._shortcuts.forget(site.number)
                del self._short_sites[site.number]

    def _follow(self, site: Site) -> None:
        """An exit to a unit that it is not chained to."""
        self.counts["bt.lookup.direct"] += 1
        chaining = self.options.chaining == "on"
        unit = self._unit(site if chaining else None)
        if chaining and site.unit.alive and unit.guest == site.guest:
            self.translator.chain(site, unit)
        self.machine.cpu.rip = unit.start
        self.follow_tables()

    def _look_up(self) -> None:
        """An indirect target that the table does not hold, or that is looked up here by choice."""
        self.counts["bt.lookup.indirect"] += 1
        in_cache = self.options.lookup == "in-cache"
        unit = self._unit(indirect=in_cache)
        if in_cache:
            self.translator.give_entry(unit)
        self.machine.cpu.rip = unit.start
        self.follow_tables()

    # ---- out of the cache: a store that the VMM has to see
    def carry_out(self, address: int) -> None:
        """A store to translated code or a traced table, or a device's register."""
        if self.mmu.peek(address) >> 12 in self.pager.guarded:
            self.counts["bt.code_write"] += 1
        instruction = self.decode_at(self.vcpu.rip) if self.vcpu.cpl == 0 else None
        if instruction is not None:
            self.adaptation.fault(self.vcpu.rip, instruction)
        if instruction is not None and self.emulator.knows(instruction.op):
            self.emulate(instruction)
        else:
            super().carry_out(address)

    def _adapted(self, site: Site, instruction: Instruction) -> None:
        """A guilty access, without the trap; where it goes is looked at anew each time."""
        vcpu = self.vcpu
        at, address = vcpu.rip, effective_address(vcpu, instruction, accessed(instruction))
        try:
            self.stores.carry_out(vcpu, instruction, address)
        except Fault as fault:
            self.reflect(fault)
            return
        self.adaptation.callout(site, at, address)
        if vcpu.shadow_at == at:
            vcpu.shadow_at = None
        self.inject_pending()

    def decode_at(self, rip: int) -> Instruction | None:
        """The guest's instruction; what the machine saw fault may be a template's."""
        if self.vcpu.cpl == 3:
            return super().decode_at(rip)
        self.counts["vmm.decode"] += 1
        return decode(fetch(self.vcpu, rip), self.vcpu.bits)
