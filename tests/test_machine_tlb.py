"""The TLB and walk model: by itself, and fed by real code; misses and references counted by hand."""

from __future__ import annotations

import pytest
from machinelab import CODE, DATA, PATHS, STACK0, Bench, long_bench
from test_svm import FREE_FRAMES, GUEST, Box, long_box

from vmlab.errors import ConfigError
from vmlab.experiment.cell import run_cell
from vmlab.ledger import Counts
from vmlab.machine import vmcb as v
from vmlab.machine.pc import StopReason
from vmlab.machine.tlb import DATA as DATA_SIDE
from vmlab.machine.tlb import INSTRUCTION, Tlb, TlbConfig, WalkSteps, configured

PLAIN = TlbConfig()


def steps(linear: int, levels: int = 4, *, is_global: bool = False, nested: int = 0) -> WalkSteps:
    """A walk of 4 KiB pages; table entries lie at made-up addresses."""
    entries = tuple(((level, linear >> 12 + 9 * (level - 1)), level << 20) for level in range(levels, 0, -1))
    inner = (lambda gpa: tuple((level, gpa >> 12 + 9 * (level - 1)) for level in range(nested, 0, -1))) if nested else None
    return WalkSteps(entries, 12, linear, is_global, inner)


class Model:
    def __init__(self, config: TlbConfig = PLAIN, **walk: object) -> None:
        self.events = Counts("machine")
        self.tlb, self._walk = Tlb(config, self.events), walk

    def touch(self, *pages: int, side: str = DATA_SIDE, space: int = 0, **walk: object) -> list[bool]:
        return [self.tlb.access(side, space, page << 12, lambda page=page: steps(page << 12, **{**self._walk, **walk})) for page in pages]


# ---- the model alone
def test_a_set_keeps_the_most_recently_used() -> None:
    model = Model(TlbConfig(entries=8, ways=2))      # four sets: 0, 4 and 8 share one
    assert model.touch(0, 4, 0, 8, 0, 4) == [False, False, True, False, True, False]
    assert model.events["tlb.miss.data"] == 4


def test_the_sides_are_apart() -> None:
    model = Model()
    model.touch(1)
    model.touch(1, side=INSTRUCTION)
    assert (model.events["tlb.miss.data"], model.events["tlb.miss.instruction"]) == (1, 1)


@pytest.mark.parametrize(("guest", "nested"), [(2, 0), (3, 0), (4, 0), (2, 4), (3, 4), (4, 4), (4, 3)])
def test_references_without_walk_caches(guest: int, nested: int) -> None:
    """n natively; (n + 1)(m + 1) − 1 under nested paging: 24 for four levels on four."""
    model = Model(levels=guest, nested=nested)
    model.touch(0x12345, 0x12346)
    assert model.events["walk.reference.guest"] == 2 * guest
    assert model.events["walk.reference.nested"] == 2 * (((guest + 1) * (nested + 1) - 1 - guest) if nested else 0)


def test_walk_caches_leave_the_last_entry() -> None:
    model = Model(TlbConfig(walk_caches=8))
    model.touch(0, 1, 2, 512)        # 4, then 1 and 1 by the cached directory entry; 512: another table, 2
    assert model.events["walk.reference.guest"] == 4 + 1 + 1 + 2


def test_a_nested_walk_profits_on_both_sides() -> None:
    model = Model(TlbConfig(walk_caches=8), nested=4)
    model.touch(0)
    first = model.events["walk.reference.nested"]
    model.touch(1)
    assert model.events["walk.reference.guest"] == 4 + 1
    assert model.events["walk.reference.nested"] - first == 2, "one for the guest's last entry, one for the page"


def test_flushes() -> None:
    model = Model(TlbConfig(tagged=True))
    model.touch(1)
    model.touch(2, is_global=True)
    model.touch(1, space=1)
    model.tlb.flush(0, keep_global=True)
    assert model.touch(1, 2) == [False, True]
    assert model.touch(1, space=1) == [True]
    model.tlb.flush_page(0, 2 << 12)
    assert model.touch(1, 2) == [True, False]
    model.tlb.flush()
    assert model.touch(1, space=1) == [False]
    assert (model.events["tlb.flush.full"], model.events["tlb.flush.page"]) == (2, 1)


def test_what_is_not_mapped_is_no_miss() -> None:
    events = Counts("machine")
    assert not Tlb(PLAIN, events).access(DATA_SIDE, 0, 0x1000, lambda: None)
    assert dict(events) == {}


@pytest.mark.parametrize(("entries", "ways"), [(0, 1), (64, 0), (10, 4)])
def test_an_impossible_geometry_is_refused(entries: int, ways: int) -> None:
    with pytest.raises(ConfigError, match="multiple"):
        TlbConfig(entries=entries, ways=ways)


# ---- fed by the CPU
TABLES, ALIAS = 0x41000, 0x40000000
PAGING = f"mov eax, {TABLES:#x}; mov cr3, eax; mov eax, cr0; or eax, 0x80000000; mov cr0, eax; jmp on; on:"


def paged(source: str, path: str, config: TlbConfig = PLAIN, **more: object) -> Bench:
    """32-bit two-level tables: the first 4 MiB as they are, and at ALIAS the 2 MiB from 0x200000, all in 4 KiB pages."""
    bench = Bench(PAGING + source + "; hlt", path=path, tlb=config, **more)  # type: ignore[arg-type]
    ram = bench.machine.ram
    for i in range(1024):
        ram.write32(TABLES + 0x1000 + 4 * i, i << 12 | 7)
        ram.write32(TABLES + 0x2000 + 4 * i, (0x200000 + (i << 12)) % 0x400000 | 7)
    ram.write32(TABLES, TABLES + 0x1007)
    ram.write32(TABLES + 4 * (ALIAS >> 22), TABLES + 0x2007)
    return bench


def counted(bench: Bench) -> dict[str, int]:
    loaded = bench.counts()     # putting the machine into protected mode flushes too
    assert bench.run().reason is StopReason.HALTED
    return {k: n for k, n in bench.counts().minus(loaded).events.items() if k.startswith(("tlb.", "walk."))}


@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_access_memory_is_seen_at_its_linear_page(path: str) -> None:
    # Data pages: ALIAS (mov, add, movs both, push [m], cmpxchg, xlat), ALIAS+1 (a store across), the stack, the GDT. Code: one page.
    bench = paged(f"mov ebx, {ALIAS + 0x123}; mov eax, [ebx]; push eax; pop ecx; add dword ptr [ebx + 8], 1; mov esi, {ALIAS};"
                  f"mov edi, {ALIAS + 0x80}; mov ecx, 3; .byte 0xf3, 0xa5; push dword ptr [ebx]; call f; cmpxchg [ebx], ecx; xlatb;"
                  "pushad; popad; enter 8, 0; leave;"
                  f"movups xmm0, [ebx]; mov dword ptr [{ALIAS + 0xFFE}], 5; mov eax, 0x10; mov ds, eax; jmp over; f: ret; over: nop", path)
    bench.cpu.set_cr(4, 1 << 9)
    # CR3 and CR0 each flush; no data was touched by then, and no code translated: paging was off.
    assert counted(bench) == {"tlb.flush.full": 2, "tlb.miss.instruction": 1, "tlb.miss.data": 4, "walk.reference.guest": 10}


@pytest.mark.parametrize("path", PATHS)
def test_an_alias_is_another_page(path: str) -> None:
    # The same frame by two addresses: two misses, whichever is used again.
    bench = paged(f"mov eax, [{ALIAS}]; mov eax, [0x200000]; mov eax, [{ALIAS + 4}]; mov eax, [0x200008]", path)
    assert counted(bench)["tlb.miss.data"] == 2


@pytest.mark.parametrize("path", PATHS)
def test_a_chase_beyond_the_tlb_misses_every_time(path: str) -> None:
    """Eight pages round and round in a TLB of four entries, one set: least recently used gives no hit; in one of eight, no second miss."""
    source = f"mov ecx, 10; again: mov ebx, {ALIAS}; mov edx, 8; next: mov eax, [ebx]; add ebx, 0x1000; dec edx; jnz next; dec ecx; jnz again"
    assert counted(paged(source, path, TlbConfig(4, 4)))["tlb.miss.data"] == 80
    assert counted(paged(source, path, TlbConfig(8, 8)))["tlb.miss.data"] == 8


@pytest.mark.parametrize("path", PATHS)
def test_invlpg_and_cr3_loads_make_misses(path: str) -> None:
    source = (f"mov ebx, {ALIAS}; mov eax, [ebx]; mov eax, [ebx + 0x1000]; invlpg [ebx]; mov eax, [ebx]; mov eax, [ebx + 0x1000];"
              "mov eax, cr3; mov cr3, eax; jmp on2; on2: mov eax, [ebx]; mov eax, [ebx + 0x1000]")
    found = counted(paged(source, path))
    assert found == {"tlb.flush.full": 3, "tlb.flush.page": 1, "tlb.miss.data": 2 + 1 + 2, "tlb.miss.instruction": 2,
                     "walk.reference.guest": 2 * (5 + 2)}


@pytest.mark.parametrize("path", PATHS)
def test_without_paging_nothing_is_translated(path: str) -> None:
    bench = Bench(f"mov eax, [{DATA}]; push eax; hlt", path=path, tlb=PLAIN)
    assert counted(bench) == {}


@pytest.mark.parametrize("path", PATHS)
def test_large_pages_of_long_mode_take_three_references(path: str) -> None:
    bench = long_bench(f"mov rsp, {STACK0}; push rax; pop rbx; mov eax, [{DATA}]; mov ecx, [rip]; hlt", path, {}, tlb=PLAIN)
    found = counted(bench)
    # All below 2 MiB: one page of data, one of code. PML4, PDPT, PD.
    assert (found["tlb.miss.data"], found["tlb.miss.instruction"], found["walk.reference.guest"]) == (1, 1, 6)
    assert "tlb.unattributed" not in found


# ---- as cells ask for it
def test_cells_ask_for_it_by_parameters() -> None:
    assert configured({"tlb": "off", "tlb_entries": 8}) is None
    assert configured({}) is None
    assert configured({"tlb": "on"}) == TlbConfig()
    assert configured({"tlb": "on", "tlb_entries": 8, "tlb_ways": 2, "walk_caches": 16, "asid": "on"}) == TlbConfig(8, 2, 16, True)
    with pytest.raises(ConfigError, match="multiple"):
        configured({"tlb": "on", "tlb_entries": 9})


@pytest.mark.parametrize(("technique", "more"), [
    ("native", {}), ("hardware-assisted", {"memory": "nested"}),
    pytest.param("hardware-assisted", {"memory": "tracing"}, marks=pytest.mark.slow),
    pytest.param("trap-and-emulate", {"memory": "tracing", "sensitive": "trap"}, marks=pytest.mark.slow),
    pytest.param("paravirtualization", {"memory": "direct"}, marks=pytest.mark.slow)])
def test_the_model_changes_no_other_count_and_attributes_everything(technique: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"guest": "minios", "workload": "chase", "iterations": 2, "pages": 32, **more}
    plain = run_cell(technique, cell)["events"]
    ledgers = []
    for path in PATHS:
        monkeypatch.setenv("VMLAB_MACHINE", path)
        found = run_cell(technique, {**cell, "tlb": "on", "tlb_entries": 16})
        assert found["status"] == "ok", found["error"]
        ledgers.append(found["events"])
    assert ledgers[0] == ledgers[-1]
    mine = {k: n for k, n in ledgers[0].items() if not k.startswith(("tlb.", "walk."))}
    assert mine == plain
    assert ledgers[0].get("tlb.unattributed", 0) == 0
    assert ledgers[0]["tlb.miss.data"] >= 32


# ---- guest mode
CHASE = "mov ecx, 5; again: mov eax, [0x100000]; mov eax, [0x101000]; loop again; hlt"


def nested_box(path: str, config: TlbConfig) -> Box:
    """A 64-bit guest with 4 KiB pages of its own, on nested tables of 4 KiB pages: four levels on four."""
    box = long_box(path, CHASE, tlb=config)
    ram, own, nested = box.machine.ram, 0x200000, FREE_FRAMES + 0x20000
    for table, entry in ((own, own + 0x1007), (own + 0x1000, own + 0x2007), (own + 0x2000, own + 0x3007)):
        box.write(table, entry.to_bytes(8, "little"))
    box.write(own + 0x2008, (own + 0x4007).to_bytes(8, "little"))
    for i in range(512):
        box.write(own + 0x3000 + 8 * i, (i << 12 | 7).to_bytes(8, "little"))
    ram.write64(nested, nested + 0x1007)
    ram.write64(nested + 0x1000, nested + 0x2007)
    for slot in range(2):
        ram.write64(nested + 0x2000 + 8 * slot, nested + 0x3007 + slot * 0x1000)
        for i in range(512):
            ram.write64(nested + 0x3000 + slot * 0x1000 + 8 * i, GUEST + (slot << 21) + (i << 12) | 0x67)
    box.vmcb["cr3"], box.vmcb["nested_control"], box.vmcb["nested_cr3"] = own, 1, nested
    return box


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("caches", "guest", "nested"), [(0, 4 * 3, 20 * 3), (8, None, None)])
def test_a_nested_walk_has_24_references(path: str, caches: int, guest: int | None, nested: int | None) -> None:
    box = nested_box(path, TlbConfig(walk_caches=caches))
    box.machine.snapshot()
    before = dict(box.machine.events)
    assert box.run() == v.EXIT_HLT
    found = {k: n - before.get(k, 0) for k, n in box.machine.events.items() if k.startswith(("tlb.miss", "walk", "tlb.un"))}
    # The host's own code and its VMRUN: one instruction page, 2 MiB, three references. The guest's: code and two of data.
    assert (found["tlb.miss.data"], found.get("tlb.unattributed", 0)) == (2, 0)
    if guest is not None and nested is not None:
        assert found["walk.reference.guest"] == guest + 3 * (found["tlb.miss.instruction"] - 1)
        assert found["walk.reference.nested"] == nested
    else:
        assert found["walk.reference.nested"] < 60


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tagged", [False, True])
def test_tags_save_a_guest_its_misses(path: str, tagged: bool) -> None:
    box = nested_box(path, TlbConfig(tagged=tagged))
    loaded = box.machine.events["tlb.miss.data"]
    box.run()
    assert box.machine.events["tlb.miss.data"] - loaded == 2
    box.vmcb["rip"] = CODE
    box.run()
    assert box.machine.events["tlb.miss.data"] - loaded == (2 if tagged else 4)
