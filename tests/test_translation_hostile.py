"""Guests that do what a translator would like them not to: each ends as on the bare machine, in registers, flags and memory.

A jump into the middle of an instruction, code in a page that it unmaps, stores at the cache, code changed through another mapping,
code that reads itself, and a cache too small for the guest.
"""

from __future__ import annotations

import random

import pytest
from machinelab import CODE, DATA, asm, kernel
from paginglab import ALL, END, LOG, bare, boot, faults, layout, length, paging_kernel
from test_translation_random import check

from vmlab.experiment.cell import Run
from vmlab.guests import GuestImage
from vmlab.strategies.translation import BinaryTranslation
from vmlab.vmm.translation.layout import CACHE, CHARTS, GATE, TABLE

MEMORIES = ("tracing", "lazy")
MODES = ("32", "pae")


def agree(image: GuestImage, memory: str = "static", counted: bool = True, **parameters: str) -> BinaryTranslation:
    """Native and translated, compared in everything that the guest can see; ``counted``: also in instructions."""
    native, here = bare(image), boot(BinaryTranslation, image, {"memory": memory, **parameters}, "auto")
    assert isinstance(here, BinaryTranslation)
    for guest in (native, here):
        guest.run(100_000)
    assert here.guest_state() == native.guest_state()
    for at in (DATA, CODE, LOG):
        assert here.read_guest(at, 0x1000) == native.read_guest(at, 0x1000), hex(at)
    assert here.state_digest() == native.state_digest()
    ours, theirs = here.snapshot(), native.snapshot()
    if counted:
        assert (ours.user, ours.kernel) == (theirs.user, theirs.kernel)
    assert not ours.events.get("translated.sensitive")
    assert not ours.events.get("retired.kernel")
    return here


# ---- instructions that overlap
def test_a_jump_into_the_middle_of_an_instruction_finds_another_one() -> None:
    """MOV EAX, 0x04EBC301 holds ADD EBX, EAX; JMP +4: both ways are run in turn, each as often as the other."""
    overlapping = bytes.fromhex("b8" "01c3eb04" "0f0b" "0f0b")          # read from its second byte: add ebx, eax; jmp over both UD2
    start = asm("mov ebx, 7; mov ecx, 10", CODE)
    at = CODE + len(start)
    body_at = at + len(asm(f"test ecx, 1; jz {at:#x}", at))
    head = asm(f"test ecx, 1; jz {body_at + 1:#x}", at)                  # odd: from the first byte, which UD2 follows
    code = start + head + overlapping
    behind = CODE + len(code)
    code += asm(f"pushfd; pop edx; xor edi, edx; loop {at:#x}; mov [{DATA:#x}], ebx; mov [{DATA + 4:#x}], edi; cli; {END}", behind)
    guest = agree(kernel(code, {6: f"mov dword ptr [esp], {behind:#x}; inc dword ptr [{DATA + 8:#x}]; iretd"}))
    assert int.from_bytes(guest.read_guest(DATA + 8, 4), "little") == 5
    units = guest.translator.units
    assert body_at + 1 in units
    assert any(unit.guest < body_at + 1 < unit.guest_end for unit in units.values())


def test_a_prefix_that_is_jumped_over_is_no_prefix() -> None:
    """The same bytes with and without their 66h: MOV AX, 0x1234; NOP; NOP, and MOV EAX, 0x90901234."""
    code = asm("mov ecx, 6; mov eax, 0x11223344; xor ebx, ebx", CODE)
    at = CODE + len(code)
    target = at + len(asm(f"test ecx, 1; jnz {at:#x}", at))
    code += asm(f"test ecx, 1; jnz {target + 1:#x}", at)
    code += bytes.fromhex("66b834129090")
    code += asm(f"add ebx, eax; loop {at:#x}; mov [{DATA:#x}], ebx; cli; {END}", CODE + len(code))
    agree(kernel(code))


# ---- code that unmaps itself
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("mode", MODES)
def test_code_in_a_page_that_it_unmaps_faults_at_its_next_instruction(mode: str, memory: str) -> None:
    """In the window, in a loop: the entry goes, INVLPG, and the fetch behind it is the guest's own #PF; then the entry comes back."""
    where = layout(mode)
    frame, page = 0x50000, where.base + 0x5000
    slot = where.slot(5)
    inside = asm(f"inc edi; mov dword ptr [{slot:#x}], 0; invlpg [{page:#x}]; inc edi; inc edi; ret", page)
    lost = page + len(asm(f"inc edi; mov dword ptr [{slot:#x}], 0; invlpg [{page:#x}]", page))
    source = (f"mov ecx, 12; l: mov dword ptr [{slot:#x}], {frame | ALL:#x}; mov esi, offset_back; push ecx; mov eax, {page:#x}; call eax;"
              f"back: pop ebx; pop ecx; loop l; mov [{DATA:#x}], edi; {END}")
    # The handler goes on at ESI: what is behind the call.
    before = source.partition("back:")[0].replace("offset_back", "0x11111111")
    source = source.replace("offset_back", hex(length(where, before)))
    guest = agree(paging_kernel(where, source, data={frame: inside}), memory)
    assert [(error & ~0x10, address, eip) for error, address, eip in faults(guest)] == [(0, lost, lost)] * 12
    assert int.from_bytes(guest.read_guest(DATA, 4), "little") == 12


@pytest.mark.parametrize("memory", MEMORIES)
def test_another_frame_behind_the_same_address_is_other_code(memory: str) -> None:
    """The page is unmapped from under a loop and another frame mapped there: what was translated of the first is not run again."""
    where = layout("pae")
    page, slot = where.base + 0x5000, where.slot(5)
    frames = {0x50000: asm("add edi, 1; ret", page), 0x51000: asm("add edi, 0x100; ret", page)}
    source = (f"mov ecx, 20; l: mov eax, {0x50000 | ALL:#x}; test ecx, 1; jz s; mov eax, {0x51000 | ALL:#x}; s: mov [{slot:#x}], eax;"
              f"invlpg [{page:#x}]; mov eax, {page:#x}; call eax; loop l; mov [{DATA:#x}], edi; {END}")
    guest = agree(paging_kernel(where, source, data=frames), memory)
    assert int.from_bytes(guest.read_guest(DATA, 4), "little") == 10 * 0x101


# ---- aimed at the translator's own memory
_READ_ONLY = {"cache": CACHE + 0x20, "look-up table": TABLE + 0x100, "gate": GATE, "charts": CHARTS}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("what", sorted(_READ_ONLY))
def test_a_paged_guests_stores_at_the_translator_are_its_own_page_faults(what: str, memory: str) -> None:
    """By MOV, POP, a read-modify-write and a string, until any of them would have been adapted: error code and CR2 of the bare machine."""
    where, at = layout("pae"), _READ_ONLY[what]
    stores = (f"mov dword ptr [{at:#x}], 0xcccccccc", f"add dword ptr [{at + 4:#x}], eax", f"mov ebx, esp; push eax; pop dword ptr [{at + 8:#x}]",
              f"mov edi, {at:#x}; mov edx, ecx; mov ecx, 3; rep stosb")
    source = "mov ecx, 12; l:"
    for n, store in enumerate(stores):
        source += f"mov esi, offset_{n}; {store}; b{n}: nop;"
        if "ebx" in store:
            source += "mov esp, ebx;"
        if "edx" in store:
            source += "mov ecx, edx;"
    source += f"dec ecx; jnz l; {END}"
    plain = source
    for n in range(len(stores)):
        plain = plain.replace(f"offset_{n}", "0x11111111")
    for n in range(len(stores)):
        source = source.replace(f"offset_{n}", hex(length(where, plain.partition(f"b{n}:")[0])))
    guest = agree(paging_kernel(where, source), memory)
    assert len(faults(guest)) == 12 * len(stores)
    assert [error & 2 for error, _, _ in faults(guest)[:4]] == [2, 0, 2, 2]     # the read-modify-write faults reading


# ---- code changed from elsewhere
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adaptation", ["simulate", "callout", "off"])
def test_code_changed_through_another_mapping_is_the_new_code(mode: str, memory: str, adaptation: str) -> None:
    """Two addresses of one frame: run through the first, written through the second, each time around."""
    where = layout(mode)
    frame, run_at, write_at = 0x50000, where.base + 0x5000, where.base + 0x6000
    code = asm("pushfd; add edi, 1; nop; popfd; adc ebx, 0; ret", run_at)
    operand = 1 + 2                     # the 1 of ADD EDI, 1
    maps = "".join(f"mov dword ptr [{where.slot(n):#x}], {frame | ALL:#x};" for n in (5, 6))
    source = (f"{maps} mov ecx, 60; l: stc; mov eax, {run_at:#x}; call eax; inc byte ptr [{write_at + operand:#x}]; mov [{write_at + 0x800:#x}], ecx;"
              f"mov edx, [{run_at + 0x800:#x}]; add [{DATA + 4:#x}], edx; loop l; mov [{DATA:#x}], edi; mov [{DATA + 8:#x}], ebx; {END}")
    guest = agree(paging_kernel(where, source, data={frame: code}), memory, adaptation=adaptation)
    signed = [n - 256 if n > 127 else n for n in range(1, 61)]
    assert int.from_bytes(guest.read_guest(DATA, 4), "little") == sum(signed)
    assert guest.counts["bt.invalidate"] >= 60


@pytest.mark.parametrize("memory", MEMORIES)
def test_code_reads_its_own_bytes_after_it_was_translated_and_chained(memory: str) -> None:
    """A checksum over the code that computes it, through its own address and through another: the guest's bytes, not the cache's."""
    where = layout("pae")
    frame, run_at, read_at = 0x50000, where.base + 0x5000, where.base + 0x6000
    maps = "".join(f"mov dword ptr [{where.slot(n):#x}], {frame | ALL:#x};" for n in (5, 6))
    body = (f"mov edx, 3; a: mov esi, {run_at:#x}; mov ecx, 64; c: lodsb; rol edi, 3; add edi, eax; loop c; cli; sti; dec edx; jnz a;"
            f"mov esi, {read_at:#x}; mov ecx, 64; d: lodsb; rol ebx, 3; add ebx, eax; loop d; cli; ret")
    source = f"{maps} xor eax, eax; xor edi, edi; xor ebx, ebx; mov edx, {run_at:#x}; call edx; mov [{DATA:#x}], edi; mov [{DATA + 4:#x}], ebx; {END}"
    agree(paging_kernel(where, source, data={frame: asm(body, run_at)}), memory)


# ---- a small cache
@pytest.mark.parametrize("seed", range(1))
def test_a_cache_of_64_kib_evicts_and_agrees(seed: int) -> None:
    """Two thousand random slots of straight code, branches and loops: more than 64 KiB of translations."""
    r = random.Random(seed)
    slots = [(r.choice((0, 1, 2, 4, 6, 7, 9)), r.getrandbits(32)) for _ in range(2000)]
    guest = check(slots, cache=64 << 10)
    assert guest.counts["bt.evict"] > 0


@pytest.mark.parametrize(("workload", "memory"), [("mixed", "tracing"), pytest.param("mixed", "lazy", marks=pytest.mark.slow),
                                                  pytest.param("build", "tracing", marks=pytest.mark.slow),
                                                  pytest.param("server", "lazy", marks=pytest.mark.slow)])
def test_an_operating_system_in_the_smallest_cache_evicts_and_agrees(workload: str, memory: str) -> None:
    """minios needs 20 KiB of translations, and 40 with one instruction a unit; it gets less."""
    def seen(technique: str, **more: str | int) -> tuple[object, Run]:
        run = Run(technique, {"guest": "minios", "workload": workload, "iterations": 4, **more})
        outcome = run.outcome(run.go().exit_code)
        counted = run.strategy.snapshot()
        return (outcome, counted.user, counted.kernel), run

    expected, _ = seen("native")
    for more in ({"cache": 16 << 10}, {"cache": 32 << 10, "unit": 1}):
        found, run = seen("binary-translation", memory=memory, **more)
        assert found == expected
        assert run.strategy.counts["bt.evict"] > 0



@pytest.mark.parametrize("adaptation", ["simulate", "callout", "off"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_store_that_unmaps_the_page_it_stores_to(memory: str, adaptation: str) -> None:
    """The window's table maps itself; its own entry goes by a store through itself, until that store was adapted, and after."""
    where = layout("pae")
    page, slot = where.base + 0x5000, where.slot(5)
    own = page + (slot & 0xFFF)
    source = (f"mov ecx, 20; l: mov dword ptr [{slot:#x}], {slot & ~0xFFF | ALL:#x}; mov eax, [{own:#x}]; mov dword ptr [{own:#x}], 0;"
              f"invlpg [{page:#x}]; mov esi, offset_back; mov ebx, [{own:#x}]; back: add edi, eax; loop l; mov [{DATA:#x}], edi; {END}")
    before = source.partition("back:")[0].replace("offset_back", "0x11111111")
    source = source.replace("offset_back", hex(length(where, before)))
    guest = agree(paging_kernel(where, source), memory, adaptation=adaptation)
    assert len(faults(guest)) == 20
