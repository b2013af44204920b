"""The host that enters AMD-V guests: page tables, descriptors, and a page of code with one routine for each thing a VMM must execute.

It lies below :data:`VMM_END` in machine memory. Its handlers are Python; see ``docs/hardware-assistance.md``.
"""

from __future__ import annotations

import struct

from vmlab.errors import ConfigError
from vmlab.machine.cpu import Segment
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import RAX

# Host-physical map of the VMM. What a VMM adds of its own goes to FREE_FRAMES and above.
BOOT, GDT, CODE, HOST_SAVE, PML4, FREE_FRAMES, VMM_END = 0x3000, 0x2000, 0x4000, 0x5000, 0x10000, 0x20000, 16 << 20
#: The host is 64-bit and sees all of machine memory from here on: no guest has code at such addresses.
HIGH = 0xFFFF800000000000

# 32-bit code at BOOT: into long mode with SVM enabled, VM_HSAVE_PA set, GIF off, interrupts on, then to the door.
_BOOT_CODE = bytes.fromhex(
    "0f011580200000"      # lgdt [GDT+0x80]
    "b820000000 0f22e0"   # mov eax, CR4.PAE ; mov cr4, eax
    "b800000100 0f22d8"   # mov eax, PML4 ; mov cr3, eax
    "b9800000c0 0f32"     # mov ecx, EFER ; rdmsr
    "0d00190000 0f30"     # or eax, LME|NXE|SVME ; wrmsr
    "eb00"                # jmp $+2: what follows is decoded with EFER.SVME set
    "b811000180 0f22c0"   # mov eax, PG|WP|ET|PE ; mov cr0, eax
    "ea363000000800"      # jmp far 8:next
    "b810000000 8ed8 8ec0 8ed0"      # next: mov eax, 0x10 ; mov ds, es, ss
    "31d2 b800500000 b9170101c0 0f30"  # xor edx, edx ; mov eax, HOST_SAVE ; mov ecx, VM_HSAVE_PA ; wrmsr
    "0f01dd fb"           # clgi ; sti: VMRUN with the host's IF on lets physical interrupts end the guest's run
    "48b86040000000 80ffff ffe0")     # mov rax, HIGH+CODE+0x60 ; jmp rax
VMRUN, _VMLOAD, _VMSAVE, _WINDOW, _IDLE, _DOOR = (HIGH + CODE + 0x10 * i for i in range(1, 7))
_ROUTINES = {
    VMRUN: "0f01d8",            # vmrun rax; #VMEXIT comes back behind it
    _VMLOAD: "0f01da eb3b",      # vmload rax ; jmp door
    _VMSAVE: "0f01db eb2b",      # vmsave rax ; jmp door
    _WINDOW: "0f01dc eb00 0f01dd eb16",  # stgi ; jmp $+2 ; clgi ; jmp door
    _IDLE: "0f01dc f4 0f01dd eb07",      # stgi ; hlt ; clgi ; jmp door
    _DOOR: "ebfe",               # jmp $
}


class Host:
    """Host-mode code by which a VMM uses AMD-V."""

    def __init__(self, machine: Machine) -> None:
        if machine.ram.size < VMM_END:
            raise ConfigError(f"hardware assistance needs at least {VMM_END >> 20} MiB of machine memory")
        self.machine = machine
        outer = machine.tagger
        machine.tagger = lambda pc, code: [None] * len(code) if self._is_host(pc) else outer(pc, code)
        self._booting = True
        self._boot()
        self._booting = False

    def _is_host(self, pc: int) -> bool:
        return HIGH + CODE <= pc < HIGH + CODE + 0x1000 or self._booting

    def _boot(self) -> None:
        machine, ram = self.machine, self.machine.ram
        ram.write64(PML4, PML4 + 0x1000 | 3)
        ram.write64(PML4 + 8 * 256, PML4 + 0x1000 | 3)   # HIGH
        ram.write64(PML4 + 0x1000, PML4 + 0x2000 | 3)
        for i in range(512):
            ram.write64(PML4 + 0x2000 + 8 * i, i << 21 | 0x83)
        for i, descriptor in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)):
            ram.write64(GDT + 8 * i, descriptor)
        ram.write(GDT + 0x80, struct.pack("<HI", 0x17, GDT))
        ram.write(BOOT, _BOOT_CODE)
        for address, code in _ROUTINES.items():
            ram.write(address - HIGH, bytes.fromhex(code))
        machine.gate(_DOOR, lambda: machine.stop(Stop(StopReason.REQUESTED)))
        machine.cpu.enter_protected(BOOT, Segment(0x08, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
        machine.run()
        # Guests have their own code at these linear addresses.
        machine.forget_code(BOOT, BOOT + len(_BOOT_CODE))

    def _call(self, routine: int, rax: int = 0) -> Stop:
        cpu = self.machine.cpu
        cpu.set_gpr(RAX, rax, 8)
        cpu.rip = routine
        cpu.store()
        return self.machine.run()

    def vmload(self, address: int) -> None:
        """VMLOAD: FS, GS, TR, LDTR and the system-call registers from the VMCB (APM Vol. 2 §15.5.2)."""
        self._call(_VMLOAD, address)

    def vmsave(self, address: int) -> None:
        """VMSAVE: the same registers, which #VMEXIT leaves in the CPU, into the VMCB."""
        self._call(_VMSAVE, address)

    def take_interrupts(self) -> None:
        """STGI … CLGI: pending physical interrupts enter the host, that is the machine's monitor."""
        self._call(_WINDOW)

    def wait(self) -> Stop:
        """STGI; HLT; CLGI: halt the physical CPU until an interrupt; HALTED when none can come."""
        return self._call(_IDLE)
