"""Where a VMM stands: on the machine (type 1), or beside a host operating system that owns the devices (type 2).

A VMM reaches physical devices through a :class:`PhysicalBus`. A type 1 has it to itself. A type 2 must ask its host, in a
world switch: the CPU leaves the monitor's address space, descriptor tables and stack for the host's, the host carries out
the accesses or the interrupt, and the CPU comes back. That code really runs, at CPL 0 in machine memory; its instructions
are counted and priced like all others, as machine instructions that are none of the guest's. The shape is that of the
original hosted VMware (Sugerman, Venkitachalam & Lim, USENIX ATC 2001): a page of code that both address spaces map at the
same place, and all that the CPU knows saved and loaded on either side.

The host here is no more than it must be: a loop that performs port accesses for the monitor, and interrupt handlers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmlab.ledger import Counts
from vmlab.machine.cpu import Segment
from vmlab.machine.memory import PAGE
from vmlab.machine.paging import CR4_PAE, RW, P
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS, DS, ES, FS, GS, HF_CS64, HF_GUEST, HF_LMA, RAX, RBX, RCX, RSP, SS

#: Vectors at which the physical interrupt controller interrupts; any free ones would do.
PHYSICAL_BASE = 0x20

# Host-physical pages from here on, shown to the CPU from LINEAR on, where no guest of this lab has code.
_FRAMES, LINEAR = 2 << 20, 0xFFB00000
_CROSS, _SAVED, _HOST_TABLES, _LIST, _HOST_STACK, _MONITOR_TABLES, _MONITOR_STACK, _HOST_ROOT, _MONITOR_ROOT = (
    0, 1, 2, 3, 4, 5, 6, 7, 10)         # the roots take three pages each: L3, L2, L1
_HOST_PAGES = (_CROSS, _SAVED, _LIST, _HOST_TABLES, _HOST_STACK)
_MONITOR_PAGES = (_CROSS, _SAVED, _LIST, _MONITOR_TABLES, _MONITOR_STACK)
_CR0 = 0x80010011                       # PG, WP, ET, PE
_CODE, _DATA, _TASK = 0x08, 0x10, 0x18
_TSS, _IDT = 0x100, 0x800               # in a page of tables, behind the GDT
_HOST_SIDE = 0x40                       # in the page of saved state, behind the monitor's
_LONGEST = PAGE // 12                   # accesses in one list

# At LINEAR: to the host and back. EBX = the host's routine, EAX and ECX its arguments. Saved state: SS:ESP, GDTR at 8, IDTR
# at 16, TR at 24, CR0, CR4, CR3 at 28, 32, 36; the monitor's at LINEAR + 0x1000, the host's 0x40 further on.
_SWITCH = bytes.fromhex(
    "9c 55"                                     # pushf ; push ebp
    "8c150410b0ff 89250010b0ff"                 # mov [ss], ss ; mov [esp], esp
    "0f01050810b0ff 0f010d1010b0ff"             # sgdt, sidt
    "0f000d1810b0ff"                            # str
    "0f20c5 892d1c10b0ff"                       # mov ebp, cr0 ; save
    "0f20e5 892d2010b0ff 0f20dd 892d2410b0ff"   # cr4, cr3 too
    "8b2d6410b0ff 0f22dd"                       # the host's cr3: another address space
    "8b2d6010b0ff 0f22e5 8b2d5c10b0ff 0f22c5"   # cr4, cr0
    "0f01154810b0ff 0f011d5010b0ff"             # lgdt, lidt
    "0fb2254010b0ff"                            # lss esp
    "80251d20b0fffd 0f001d5810b0ff"             # its task is not busy any more: and byte [descriptor + 5], ~2 ; ltr
    "ffd3"                                      # call ebx
    "8b2d2410b0ff 0f22dd"                       # and back: the monitor's cr3
    "8b2d2010b0ff 0f22e5 8b2d1c10b0ff 0f22c5"
    "0f01150810b0ff 0f011d1010b0ff"
    "0fb2250010b0ff"
    "80251d50b0fffd 0f001d1810b0ff"
    "5d 9d ebfe")                               # pop ebp ; popf ; jmp $: the door
_DOOR = LINEAR + len(_SWITCH) - 2

# At LINEAR + 0x800: the host. ECX accesses of the list: port, which of the six below, value.
_SERVE = 0x800
_SERVE_CODE = bytes.fromhex(
    "be0030b0ff"                                # mov esi, list
    "8b16 8b5e04 8b4608"                        # 1: mov edx, [esi] ; mov ebx, [esi+4] ; mov eax, [esi+8]
    "ff249d4008b0ff"                            # jmp [table + 4*ebx]
    "ec eb0f 66ed eb0b ed eb08"                 # in al, dx ; jmp 2f ; in ax, dx ; jmp 2f ; in eax, dx ; jmp 2f
    "ee eb05 66ef eb01 ef"                      # out dx, al ; jmp 2f ; out dx, ax ; jmp 2f ; out dx, eax
    "894608 83c60c 49 75d6 c3")                 # 2: mov [esi+8], eax ; add esi, 12 ; dec ecx ; jnz 1b ; ret
_TABLE = 0x840
_KINDS = (0x14, 0x17, 0x1B, 0x1E, 0x21, 0x25)   # offsets of the accesses in _SERVE_CODE: reads of 1, 2, 4 bytes, then writes
# EAX = IRQ: its handler is called by INT, as the monitor's interrupt had come to the host.
_INTERRUPT, _ISSUE = 0x860, 0x870
_INTERRUPT_CODE = bytes.fromhex("8d04857008b0ff ffe0")      # lea eax, [issue + 4*eax] ; jmp eax
# Handlers: push eax ; mov al, 0x20 ; end of interrupt to the slave ; and to the master ; pop eax ; iret
_MASTER, _SLAVE = 0x8C0, 0x8D0
_MASTER_CODE, _SLAVE_CODE = bytes.fromhex("50 b020 e620 58 cf"), bytes.fromhex("50 b020 e6a0 e620 58 cf")

#: (port, bytes, value to write or None to read)
Access = tuple[int, int, int | None]


class PhysicalBus:
    """The devices in the hands of a type 1 VMM: it reaches them by itself."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def port_read(self, port: int, size: int) -> int:
        """A read that the guest asked for."""
        return self._machine.port_read(port, size)

    def port_write(self, port: int, size: int, *values: int) -> None:
        """Writes that the guest asked for, one after another; they join the ordered log of device writes."""
        for value in values:
            self._machine.port_write(port, size, value)

    def own(self, *accesses: Access) -> list[int]:
        """Accesses of the VMM's own, for itself; what was read, and what was written, in order."""
        ports, results = self._machine.ports, []
        for port, size, value in accesses:
            if value is None:
                results.append(ports.read(port, size))
            else:
                ports.write(port, size, value)
                results.append(value)
        return results

    def acknowledge(self) -> int:
        """Take the physical interrupt: INTA and end of interrupt; returns its IRQ."""
        irq = self._machine.pic.acknowledge() - PHYSICAL_BASE
        self._end_of_interrupt(irq)
        return irq

    def _end_of_interrupt(self, irq: int) -> None:
        if irq >= 8:
            self.own((0xA0, 1, 0x20))
        self.own((0x20, 1, 0x20))


class HostedBus(PhysicalBus):
    """The devices are the host's: each request, and each interrupt, is a world switch there and back."""

    def __init__(self, machine: Machine, counts: Counts) -> None:
        super().__init__(machine)
        self._counts = counts
        self._build()
        machine.gate(_DOOR, machine.engine.stop)

    # ---- requests
    def port_read(self, port: int, size: int) -> int:
        return self._serve([(port, size, None)])[0]

    def port_write(self, port: int, size: int, *values: int) -> None:
        for first in range(0, len(values), _LONGEST):
            self._serve([(port, size, value) for value in values[first:first + _LONGEST]])

    def own(self, *accesses: Access) -> list[int]:
        log = len(self._machine.device_log)
        results = self._serve(accesses)
        del self._machine.device_log[log:]      # not the guest's
        return results

    def _end_of_interrupt(self, irq: int) -> None:
        """The host handles it: the monitor hands on the interrupt that came to it."""
        log = len(self._machine.device_log)
        self._switch(_INTERRUPT, irq)
        del self._machine.device_log[log:]

    def _serve(self, accesses: Sequence[Access]) -> list[int]:
        at = _FRAMES + _LIST * PAGE
        kinds = {1: 0, 2: 1, 4: 2}
        self._machine.ram.write(at, b"".join(
            struct.pack("<III", port, kinds[size] + (0 if value is None else 3), (value or 0) & 0xFFFFFFFF) for port, size, value in accesses))
        self._switch(_SERVE, 0, len(accesses))
        return [self._machine.ram.read32(at + 12 * i + 8) & ((1 << 8 * size) - 1) for i, (_, size, _value) in enumerate(accesses)]

    # ---- the switch
    def _switch(self, routine: int, eax: int, ecx: int = 0) -> None:
        """From the monitor to the host and back, by the code above. The guest's CPU state is the same afterwards."""
        machine = self._machine
        self._counts["host.world_switch"] += 2
        with machine.detour() as cpu:
            self._enter_monitor()
            cpu.set_gpr(RAX, eax)
            cpu.set_gpr(RCX, ecx)
            cpu.set_gpr(RBX, LINEAR + routine)
            cpu.rip = LINEAR

    def _enter_monitor(self) -> None:
        """The CPU as the trap into the monitor left it: CPL 0, the monitor's address space, tables and stack."""
        cpu = self._machine.cpu
        cpu.hflags &= ~(HF_LMA | HF_CS64 | HF_GUEST)
        cpu.set_efer(0)
        cpu.set_crs(_CR0, _FRAMES + _MONITOR_ROOT * PAGE, CR4_PAE)
        cpu.set_segment(CS, Segment(_CODE, 0, 0xFFFFFFFF, 0xCF9B00))
        for number in (SS, DS, ES, FS, GS):
            cpu.set_segment(number, Segment(_DATA, 0, 0xFFFFFFFF, 0xCF9300))
        cpu.set_cpl(0)
        cpu.clear_shadow()
        tables = LINEAR + _MONITOR_TABLES * PAGE
        cpu.set_table("gdt", Segment(0, tables, 0x1F, 0))
        cpu.set_table("idt", Segment(0, tables + _IDT, 0x7FF, 0))
        cpu.set_table("tr", Segment(_TASK, tables + _TSS, 0x67, 0x8900))
        cpu.eflags = 2
        cpu.set_gpr(RSP, LINEAR + (_MONITOR_STACK + 1) * PAGE)

    # ---- building
    def _build(self) -> None:
        ram = self._machine.ram
        ram.write(_FRAMES, bytes((_MONITOR_ROOT + 3) * PAGE))
        issue = b"".join(bytes((0xCD, PHYSICAL_BASE + irq, 0xC3, 0x90)) for irq in range(16))  # int n ; ret ; nop
        table = struct.pack("<6I", *(LINEAR + _SERVE + offset for offset in _KINDS))
        for at, code in ((0, _SWITCH), (_SERVE, _SERVE_CODE), (_TABLE, table), (_INTERRUPT, _INTERRUPT_CODE), (_ISSUE, issue),
                         (_MASTER, _MASTER_CODE), (_SLAVE, _SLAVE_CODE)):
            ram.write(_FRAMES + at, code)
        for page in (_HOST_TABLES, _MONITOR_TABLES):
            tss = LINEAR + page * PAGE + _TSS
            descriptor = 0x67 | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24) << 56
            ram.write(_FRAMES + page * PAGE, struct.pack("<4Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, descriptor))
        for irq in range(16):
            handler = LINEAR + (_MASTER if irq < 8 else _SLAVE)
            ram.write(_FRAMES + _HOST_TABLES * PAGE + _IDT + 8 * (PHYSICAL_BASE + irq),
                      struct.pack("<HHHH", handler & 0xFFFF, _CODE, 0x8E00, handler >> 16))
        tables = LINEAR + _HOST_TABLES * PAGE
        ram.write(_FRAMES + _SAVED * PAGE + _HOST_SIDE, struct.pack(
            "<IIHIxxHIxxIIII", LINEAR + (_HOST_STACK + 1) * PAGE, _DATA, 0x1F, tables, 0x7FF, tables + _IDT, _TASK,
            _CR0, CR4_PAE, _FRAMES + _HOST_ROOT * PAGE))
        for root, pages in ((_HOST_ROOT, _HOST_PAGES), (_MONITOR_ROOT, _MONITOR_PAGES)):
            l3, l2, l1 = (_FRAMES + (root + i) * PAGE for i in range(3))
            ram.write64(l3 + 8 * 3, l2 | P)
            ram.write64(l2 + 8 * (LINEAR >> 21 & 511), l1 | RW | P)
            for page in pages:
                ram.write64(l1 + 8 * ((LINEAR >> 12 & 511) + page), (_FRAMES + page * PAGE) | P | (0 if page == _CROSS else RW))


def physical_bus(machine: Machine, counts: Counts, hypervisor: object) -> PhysicalBus:
    """The way to the devices for a VMM that stands where the parameter ``hypervisor`` says: type1 or type2."""
    return HostedBus(machine, counts) if hypervisor == "type2" else PhysicalBus(machine)
