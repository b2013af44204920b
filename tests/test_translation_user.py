"""IRET to user mode inside the cache: into user code without the monitor, and to the monitor whenever something is not as it was."""

from __future__ import annotations

import struct

import pytest
from machinelab import CODE, DATA, DEBUG_EXIT, GDT, IDT, PATHS, STACK3, TSS, USER, USER_CODE, USER_DATA, asm, kernel

from vmlab.experiment.cell import Run
from vmlab.machine.pc import Machine
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation

_END = f"cli; xor eax, eax; {DEBUG_EXIT} hlt"
#: To the user's code with these flags, ESI times; the user comes back by INT 0x80, whose handler leaves the frame alone.
_ROUND = (f"mov esi, {{rounds}}; l: mov eax, {USER_DATA:#x}; {{before}} push {USER_DATA:#x}; push {STACK3:#x}; push {{flags}}; push {USER_CODE:#x};"
          f"push {USER:#x}; iretd; back: dec esi; jnz l; {_END}")
_USER = "pushfd; pop ebx; mov ecx, ds; mov edx, es; inc edi; int 0x80"


def both(before: str = "", *, rounds: int = 20, flags: str = "0x202", user: str = _USER, handlers: dict[int, str | tuple[str, int]] | None = None,
         data: dict[int, bytes] | None = None, **parameters: int | str) -> BinaryTranslation:
    """Run natively and translated, compared in registers, flags, segments and memory."""
    source = _ROUND.format(rounds=rounds, flags=flags, before=before)
    back = CODE + len(asm(source.partition("back:")[0], CODE))
    image = kernel(source, {0x80: (f"add esp, 20; push {back:#x}; ret", 3), **(handlers or {})}, user=user, data=data)
    native, here = Native(Machine()), BinaryTranslation(Machine(), parameters)
    for guest in (native, here):
        guest.load(image, "")
        guest.run(100_000)
    assert here.guest_state() == native.guest_state()
    for at in (DATA, GDT, IDT, TSS, STACK3 - 0x1000, CODE):
        assert here.read_guest(at, 0x800) == native.read_guest(at, 0x800), hex(at)
    ours, theirs = here.snapshot(), native.snapshot()
    assert (ours.user, ours.kernel) == (theirs.user, theirs.kernel)
    assert not ours.events.get("translated.sensitive")
    return here


def direct(guest: BinaryTranslation) -> tuple[int, int]:
    """(into user code in the cache, by the monitor)"""
    return guest.snapshot().events.get("translated.direct", 0), guest.counts["bt.callout.iret"]


def test_only_the_first_return_of_each_place_asks_the_monitor() -> None:
    """The IRET is in two units: the one that begins before the loop, and the loop's."""
    assert direct(both()) == (18, 2)


def test_without_emulation_in_the_cache_every_one_asks() -> None:
    assert direct(both(emulation="callout")) == (0, 20)


@pytest.mark.parametrize("flags", ["0xa02", "0x240ad7", "0x202"])
def test_the_user_has_its_flags_and_the_kernel_what_it_pushed(flags: str) -> None:
    assert direct(both(flags=flags)) == (18, 2)


@pytest.mark.parametrize(("flags", "expected"), [("0x4202", (0, 20)), ("0x10202", (0, 20)), ("0x3202", (18, 2)), ("0x2", (18, 2))])
def test_flags_that_the_template_does_not_cover_call_out(flags: str, expected: tuple[int, int]) -> None:
    """NT, RF; another IOPL, which the kernel then keeps. (A user's own PUSHF shows the machine's IF and IOPL: users run directly.)"""
    assert direct(both(flags=flags, user=_USER[_USER.index("mov"):])) == expected


def test_a_descriptor_that_the_guest_rewrites_calls_out_once() -> None:
    """User code's descriptor gets another type (conforming code of ring 3), seen by LAR; then the new one is known.

    (Three places: the first pass, the loop, and the unit that goes on behind the change.)"""
    at = GDT + (USER_CODE & ~7) + 5
    guest = both(f"cmp esi, 10; jne s; xor byte ptr [{at:#x}], 4; s:", user=f"mov eax, {USER_CODE:#x}; lar ebx, eax; {_USER[_USER.index('mov'):]}")
    assert direct(guest) == (17, 3)


def test_a_user_segment_taken_away_faults_as_on_the_bare_machine() -> None:
    """Not present from the tenth round on: #NP with the selector, at the IRET, from the kernel."""
    at = GDT + (USER_CODE & ~7) + 5
    end = f"pop edi; mov [{DATA:#x}], edi; pop edi; mov [{DATA + 4:#x}], edi; {_END}"
    guest = both(f"cmp esi, 10; jne s; and byte ptr [{at:#x}], 0x7f; s:", handlers={11: end})
    assert struct.unpack("<I", guest.read_guest(DATA, 4))[0] == USER_CODE & ~3
    assert direct(guest) == (9, 2)


def test_another_table_is_another_table() -> None:
    """LGDT to a copy in which the user's stack segment has a base."""
    copy = DATA + 0x200
    change = (f"cmp esi, 10; jne s; push esi; push edi; mov esi, {GDT:#x}; mov edi, {copy:#x}; mov ecx, 14; .byte 0xf3, 0xa5; pop edi; pop esi;"
              f"mov dword ptr [{DATA + 0x100:#x}], {(copy & 0xFFFF) << 16 | 0x37:#x}; mov word ptr [{DATA + 0x104:#x}], {copy >> 16};"
              f"mov byte ptr [{copy + (USER_DATA & ~7) + 3:#x}], 1; lgdt [{DATA + 0x100:#x}]; s:")
    assert direct(both(change)) == (18, 2)


def test_an_interrupt_that_waits_comes_before_the_users_first_instruction() -> None:
    """Raised by the UART while the kernel has interrupts off; the handler sees the user's frame, with nothing done yet."""
    pic = "".join(f"mov al, {v}; out {p}, al;" for p, v in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)))
    before = f"{pic} mov dx, 0x3fc; mov al, 8; out dx, al; mov dx, 0x3f9; mov al, 2; out dx, al;"
    handler = (f"push eax; push edx; mov dx, 0x3fa; in al, dx; mov dx, 0x3f9; xor al, al; out dx, al; mov al, 0x20; out 0x20, al;"
               f"mov eax, [esp + 8]; mov [{DATA:#x}], eax; add [{DATA + 4:#x}], edi; pop edx; pop eax; iretd")
    guest = both(before, handlers={0x24: handler})
    assert struct.unpack("<I", guest.read_guest(DATA, 4))[0] == USER
    assert guest.counts["interrupt.injected"] == 20


@pytest.mark.parametrize(("technique", "parameters"), [("binary-translation", {}), ("trap-and-emulate", {"sensitive": "silent"})])
def test_a_users_first_fetch_may_fault_behind_an_iret_of_the_cpus_own(technique: str, parameters: dict[str, str]) -> None:
    """And the next access too: two page faults, no double fault, on every path; the same ledger."""
    seen = []
    for path in PATHS:
        run = Run(technique, {"guest": "minios", "workload": "fork", "iterations": 1, "pages": 4, "memory": "tracing", **parameters}, path=path)
        run.go()
        seen.append(run.strategy.snapshot())
    assert not seen[0].events.get("trap.df")
    assert seen[0].events["iret.outer"] > 5
    assert all(one == seen[0] for one in seen)
