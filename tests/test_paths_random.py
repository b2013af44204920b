"""Random guests: the fast path and the portable one give the same ledger, the same state and the same end, whatever the guest does.

A guest goes through random slots (``test_translation_random``) several times with interrupts of the timer arriving in between, so
that what C has learnt in the first round (where blocks are left, which traps change only the virtual flag) is used in the next.
``pytest -m slow tests/test_paths_random.py`` runs 1000 guests.
"""

from __future__ import annotations

import random
from typing import Any

import pvlab
import pytest
import test_shadow_random as shadow_random
from hypothesis import given, settings
from hypothesis import strategies as st
from machinelab import CODE, DATA, DEBUG_EXIT, asm, kernel
from paginglab import SCHEMES, boot
from test_shadow_random import Access, Directory, Edit
from test_translation_random import FUNCTIONS, HANDLER, HANDLER_TEXTS, KERNEL_SLOTS, TABLE, arithmetic, flags, loops, memory, sensitive

from vmlab import strategies
from vmlab.errors import GuestError
from vmlab.guests import GuestImage
from vmlab.machine import fast
from vmlab.machine.pc import Machine

UNDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("native", {}), ("trap-and-emulate", {"sensitive": "trap"}), ("trap-and-emulate", {"sensitive": "silent"}),
    ("binary-translation", {}), ("binary-translation", {"emulation": "callout"}),
    ("hardware-assisted", {}), ("hardware-assisted", {"memory": "nested"}), ("trap-and-emulate", {"sensitive": "trap", "hypervisor": "type2"}),
)
#: 8259A: vectors from 0x20, only the timer; 8254: channel 0, mode 2, a short period.
TIMER = ("mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al; mov al, 0xfe; out 0x21, al;"
         "mov al, 0x34; out 0x43, al; mov al, {low}; out 0x40, al; mov al, {high}; out 0x40, al; sti;")
ON_TIMER = HANDLER + "push eax; mov al, 0x20; out 0x20, al; pop eax; iretd"


def held_back(r: random.Random, n: int) -> str:
    """Long enough for the timer's interrupt to wait for the STI."""
    return f"cli; mov ecx, {r.randrange(600, 1200)}; h{n}: dec ecx; jnz h{n}; {r.choice(('sti', 'sti; cli; sti', 'pushfd; sti; popfd; sti'))}"


def full_virtualization(r: random.Random) -> GuestImage:
    """Slots, again and again, under the timer or not."""
    kinds = r.choices([KERNEL_SLOTS, (sensitive, arithmetic, flags, memory, loops, held_back)], k=1)[0]
    texts = [r.choice(kinds)(random.Random(r.getrandbits(32)), n) for n in range(r.randrange(1, 16))]
    functions = "".join(f"f{i}: nop; g{i}: mov edx, {i + 1}; add esi, edx; ret; " for i in range(FUNCTIONS))
    table = "".join(f"mov dword ptr [{TABLE + 4 * i:#x}], f{i}; " for i in range(FUNCTIONS))
    timer = TIMER.format(low=r.choice((2, 3, 5, 9)), high=0) if r.random() < 0.7 else ""
    again = f"dec dword ptr [{DATA + 0x7E0:#x}]; jz out; jmp again; out: "
    source = (f"{table} {timer} mov dword ptr [{DATA + 0x7E0:#x}], {r.choice((3, 90))}; mov edi, 0x12345678; again: {'; '.join(texts)}; {again}"
              f"cli; xor eax, eax; {DEBUG_EXIT} hlt; {functions}")
    return kernel(asm(source, CODE), {**HANDLER_TEXTS, 0x20: ON_TIMER}, data={DATA: bytes(range(256))})


def outcome(technique: str, chosen: dict[str, Any], image: GuestImage, path: str) -> tuple[Any, ...]:
    """All that two paths must agree in."""
    strategy = strategies.load(technique)(Machine(path=path), chosen)
    strategy.load(image, "")
    end: object
    try:
        end = strategy.run(20_000)
    except GuestError as error:
        end = str(error)
    assert strategy.machine.path == path
    return (end, strategy.machine.time, strategy.snapshot(), strategy.guest_state(), strategy.state_digest(), tuple(strategy.refused),
            dict(strategy.counts))


def paravirtual(r: random.Random) -> GuestImage:
    """Hypercalls that may come in any order, with arithmetic between them; some of them name nothing."""
    def call() -> bytes:
        number = r.choice((17, 17, 5, 29, 21, 33, 99))
        arguments = {17: (r.choice((0, 6, 7)),), 5: (r.randrange(2),), 29: (0, 0), 21: (r.randrange(2), 4), 33: (99,), 99: (1, 2)}[number]
        return pvlab.call(number, *arguments)

    body = b"".join(call() if r.random() < 0.6 else asm(arithmetic(r, 0).replace("esi", "ebp"), 0) for _ in range(r.randrange(1, 20)))
    code = pvlab.mov(pvlab.EBP, 3) + body
    return pvlab.image(code * 3 + pvlab.mov(pvlab.EAX, 0) + pvlab.EXIT_WITH_EAX)


def check(seed: int) -> None:
    """One guest, under one technique after another."""
    if fast.why_not():
        pytest.skip(f"no C library here: {fast.why_not()}")
    r = random.Random(seed)
    image = full_virtualization(r)
    for technique, chosen in r.sample(UNDER, 3):
        assert outcome(technique, chosen, image, "fast") == outcome(technique, chosen, image, "portable"), (technique, chosen)
    image = paravirtual(r)
    assert outcome("paravirtualization", {}, image, "fast") == outcome("paravirtualization", {}, image, "portable")


@pytest.mark.parametrize("seed", range(20))
def test_random_guests_are_counted_the_same_on_both_paths(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_a_thousand_random_guests(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        check(1000 + seed)


# ---- shadow page tables: hidden faults that C carries out
_EDITS = st.builds(Edit, shadow_random._PAGE, st.integers(0, 3), shadow_random._FLAGS, st.just(False), st.just(False))
_ACCESSES = st.builds(Access, shadow_random._PAGE, shadow_random._OFFSET, st.sampled_from(["read", "write", "movs", "stos", "lock"]), st.booleans())
#: Little that empties the shadow, so that what C has learnt lasts.
_CALM = st.lists(st.one_of(_EDITS, *[_ACCESSES] * 4, st.builds(Directory, shadow_random._FLAGS, st.just(False))), min_size=20, max_size=40)


@pytest.mark.parametrize("mode", ["32", "pae"])
@settings(max_examples=30, **shadow_random._SETTINGS)
@given(operations=st.one_of(_CALM, _CALM, shadow_random._OPERATIONS), pge=st.booleans())
def test_random_page_tables_are_shadowed_the_same_on_both_paths(mode: str, operations: list[object], pge: bool) -> None:
    if fast.why_not():
        pytest.skip(f"no C library here: {fast.why_not()}")
    mapped = [Edit(page, page, 7, False, False) for page in range(4)]
    image = shadow_random.assemble(mode, [*mapped, *operations], pge)
    kind, parameters = SCHEMES["trap-and-emulate/lazy"]
    ends = []
    for path in ("portable", "fast"):
        guest = boot(kind, image, parameters, path)
        stop = guest.run(60_000)
        ends.append((stop, guest.machine.time, guest.snapshot(), guest.guest_state(), shadow_random.memory(mode, guest), guest.refused))
    assert ends[0] == ends[1]


def test_c_fills_a_lazy_shadow() -> None:
    """One that fills nothing would pass the test above."""
    if fast.why_not():
        pytest.skip(f"no C library here: {fast.why_not()}")
    code = asm("mov eax, 0x200000; mov cr3, eax; mov eax, 0x80000011; mov cr0, eax; mov esi, 3; l: mov eax, 0x200000; mov cr3, eax;"
               "mov ebx, 0x400000; mov ecx, 64; p: mov eax, [ebx]; mov [ebx], eax; add ebx, 0x1000; loop p;"
               "dec esi; jnz l; xor eax, eax;" + DEBUG_EXIT, CODE)
    tables = {0x200000: (0x201007).to_bytes(4, "little") + (0x202007).to_bytes(4, "little"),
              0x201000: b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(1024)),
              0x202000: b"".join(((0x400 + page) << 12 | 7).to_bytes(4, "little") for page in range(1024))}
    guest = boot(SCHEMES["trap-and-emulate/lazy"][0], kernel(code, {}, data=tables), {"memory": "lazy", "sensitive": "trap"}, "fast")
    native = guest.machine.native_events
    if native is None:
        pytest.skip("C cannot see the CPU's state here")
    guest.run(100_000)
    assert native.faults is not None
    in_c = native.faults.waiting
    events = guest.snapshot().events
    assert events["shadow.fault.hidden"] >= 3 * 64 and events["shadow.fault.dirty"] == 64
    assert in_c >= 3 * 62 + 64
