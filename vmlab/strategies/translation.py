"""Binary translation: the guest's kernel runs as translated code at CPL 1, its users directly at CPL 3.

CLI becomes a store to the virtual CPU's IF. What the cache cannot do by itself calls out into the VMM,
by a jump, without any trap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmlab.errors import UnsupportedByStrategy
from vmlab.guests import GuestImage
from vmlab.machine.cpu import IF, IOPL, OF, Cpu, Segment
from vmlab.machine.delivery import Fault
from vmlab.machine.pc import Machine, Stop
from vmlab.machine.state import CS, DS
from vmlab.parameters import Value
from vmlab.strategies.base import GuestState
from vmlab.strategies.techniques import BinaryTranslationTechnique
from vmlab.vmm.guest_tables import GuestMmu
from vmlab.vmm.monitor import DeprivilegingMonitor
from vmlab.vmm.space import StaticSpace
from vmlab.vmm.translator import GATE, PENDING, SITE, TARGET, VIRTUAL_FLAGS, Translator
from vmlab.vmm.vcpu import KERNEL_RING, VirtualCpu

#: CS while the cache runs: flat, ring 1; its selector is never shown to anybody.
_CACHE_CS = Segment(0xFFF8 | KERNEL_RING, 0, 0xFFFFFFFF, 0x00CF9B00 | KERNEL_RING << 13)
_FLAT_KERNEL_CS = Segment(0x08, 0, 0xFFFFFFFF, 0x00CF9B00)


class TranslatedCpu(VirtualCpu):
    """The virtual CPU of a translated kernel: RIP and CS are virtual, IF lives where translated code reaches it."""

    def __init__(self, cpu: Cpu, space: StaticSpace, mmu: GuestMmu) -> None:
        self._flags_at = space.hole_frame(VIRTUAL_FLAGS)
        super().__init__(cpu, space, mmu, true_selectors=True)
        self._rip = 0
        self.kernel_cs = _FLAT_KERNEL_CS

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
        self._rip = value & 0xFFFFFFFF

    def selector(self, number: int) -> int:
        if number == CS and self.cpl == 0:
            return self.kernel_cs.selector
        return super().selector(number)

    def segment(self, number: int) -> Segment:
        return self.kernel_cs if number == CS and self.cpl == 0 else super().segment(number)

    def set_segment(self, number: int, value: Segment) -> None:
        if number == CS and value.selector & 3 == 0:
            if value.base:
                raise UnsupportedByStrategy("the translator carries flat kernels only; this guest's CS has a base")
            self.kernel_cs = value
            self.cpu.set_segment(CS, _CACHE_CS)
            self.cpu.set_cpl(KERNEL_RING)
            return
        super().set_segment(number, value)


class BinaryTranslation(BinaryTranslationTechnique, DeprivilegingMonitor):
    """A VMM after VMware's (Adams & Agesen, ASPLOS 2006), without its adaptive half."""

    trap_tsc = False
    vcpu: TranslatedCpu

    def __init__(self, machine: Machine, parameters: Mapping[str, Value] | None = None) -> None:
        self._watched: dict[int, Callable[[int], None]] = {}
        super().__init__(machine, parameters)
        in_cache = self.chosen["emulation"] == "in-cache"
        self.trap_tsc = not in_cache
        self.translator = Translator(self.space, self.counts, in_cache=in_cache, on_patch=machine.forget_code,
                                     watched=self._watched, watch=machine.watch)
        machine.tagger = self.translator.tag_block
        machine.gate(GATE, self._gate)
        self._site_at = self.space.hole_frame(SITE)
        self._target_at = self.space.hole_frame(TARGET)
        self._pending_at = self.space.hole_frame(PENDING)

    def make_vcpu(self) -> TranslatedCpu:
        return TranslatedCpu(self.machine.cpu, self.space, self.mmu)

    def load(self, image: GuestImage, command_line: str) -> None:
        super().load(image, command_line)
        cpu = self.machine.cpu
        cpu.load()
        cpu.set_segment(CS, _CACHE_CS)
        cpu.set_cpl(KERNEL_RING)
        self.vcpu.rip = image.entry
        self.resume()
        cpu.store()

    def watch(self, address: int, callback: Callable[[int], None]) -> None:
        """Kernel code is watched where its translation begins, user code at its own address."""
        self._watched[address] = callback
        self.machine.watch(address, callback)

    def run(self, budget: int | None = None) -> Stop:
        stop = super().run(budget)
        self.translator.check_sources(self.vcpu.read_linear)
        return stop

    # ---- into and out of the cache
    def resume(self) -> None:
        """Let the physical CPU go on where the virtual CPU is: in the cache, or directly in user code."""
        vcpu, cpu = self.vcpu, self.machine.cpu
        if vcpu.cpl == 3:
            if self.translator.space.in_hole(cpu.rip) or cpu.rip != vcpu.rip:
                self.counts["bt.direct.enter"] += 1
            cpu.rip = vcpu.rip
        else:
            cpu.rip = self.cache_address(vcpu.rip)

    def cache_address(self, guest: int) -> int:
        """Where the translation of the guest's kernel code at ``guest`` begins; translates it if need be."""
        unit = self.translator.find(guest)
        if unit is None:
            if self.machine.cpu.segment(DS).base:
                raise UnsupportedByStrategy("the translator carries flat kernels only; this guest's DS has a base")
            unit = self.translator.translate(guest, self.vcpu.read_linear, self.vcpu.iopl)
        return unit.start

    def _locate(self) -> bool:
        """Set the virtual RIP from the physical one; True where the guest's state is exact there."""
        rip = self.machine.cpu.rip
        if self.machine.cpu.cpl == 3:
            self.vcpu.rip = rip
            return True
        exact = self.translator.boundaries.get(rip)
        self.vcpu.rip = exact if exact is not None else self.translator.owners.get(rip, rip)
        return exact is not None

    # ---- the machine calls
    def _gate(self) -> None:
        """A callout from the cache."""
        number = self.machine.ram.read32(self._site_at)
        if number >= len(self.translator.sites):
            self.refuse(f"callout {number} does not exist: the guest wrote the VMM's page")
        site = self.translator.sites[number]
        self.counts[f"bt.callout.{site.cause}"] += 1
        vcpu = self.vcpu
        vcpu.rip = site.guest
        instruction = site.instruction
        if site.cause == "chain":
            before = self.translator.flushes
            self.cache_address(site.guest)
            unit = self.translator.find(site.guest)
            if unit is not None and self.translator.flushes == before:
                self.translator.chain(site, unit)
        elif site.cause == "indirect":
            self.counts["bt.lookup.indirect"] += 1
            vcpu.rip = self.machine.ram.read32(self._target_at)
            self.inject_pending()
        elif site.cause == "interrupt":
            self.inject_pending()
        elif instruction is None:
            self.reflect(Fault(6))
        elif instruction.op == "into" and not vcpu.eflags & OF:
            vcpu.rip += instruction.size
            self.emulator.count("into", False)
        elif instruction.op in ("int", "int3", "into", "int1"):
            self.software_interrupt(instruction)
        elif self.emulator.knows(instruction.op):
            iopl = vcpu.iopl
            self.emulate(instruction)
            if vcpu.iopl != iopl:
                self.translator.flush()  # CLI, STI and POPF were translated for the old IOPL
        else:
            self.reflect(Fault(6))
        self.resume()

    def exception(self, vector: int, error_code: int | None, *, software: bool) -> None:
        self._locate()
        super().exception(vector, error_code, software=software)
        self.resume()

    def page_fault(self, error_code: int) -> None:
        in_cache = self.translator.space.in_hole(self.machine.cpu.cr2)
        if in_cache and error_code & 2:
            self.refuse(f"store into the translation cache or another page of the VMM at {self.machine.cpu.cr2:#x}")
        super().page_fault(error_code)

    def interrupt(self) -> None:
        exact = self._locate()
        self.platform_devices.physical_interrupt()
        if exact:
            self.inject_pending()
        else:
            self._note_pending()
            self.machine.request_attention(True)
        if exact:
            self.resume()

    def attend(self) -> bool:
        if not self._locate():
            return False
        before = self.machine.cpu.rip
        if not super().attend():
            return False
        self.resume()
        return self.machine.cpu.rip != before

    def inject_pending(self) -> bool:
        injected = super().inject_pending()
        self._note_pending()
        return injected

    def _note_pending(self) -> None:
        """Translated STI and POPF look here."""
        self.machine.ram.write32(self._pending_at, int(self.platform_devices.pending))

    def guest_state(self) -> GuestState:
        self.machine.cpu.load()
        return super().guest_state()
