"""Shadow page tables: small kernels with tables of their own, against the bare machine, and their faults counted by hand."""

from __future__ import annotations

import pytest
from machinelab import CODE, PATHS, asm
from paginglab import ALL, END, PS, SCHEMES, Layout, bare, boot, faults, layout, paging_kernel, raw_kernel, raw_origin

from vmlab.errors import UnsupportedByStrategy
from vmlab.guests import GuestImage
from vmlab.machine.pc import Stop, StopReason
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

DONE = Stop(StopReason.EXIT, 0)
MODES = ("32", "pae")


def agree(image: GuestImage, scheme: str, path: str = "portable") -> Strategy:
    """Run under ``scheme`` and on the bare machine: everything that the guest can see must be equal."""
    kind, parameters = SCHEMES[scheme]
    oracle, guest = bare(image), boot(kind, image, parameters, path)
    assert oracle.run(200_000) == DONE
    assert guest.run(200_000) == DONE
    assert faults(guest) == faults(oracle)
    assert guest.guest_state() == oracle.guest_state()
    assert guest.read_guest(0, 0x400000) == oracle.read_guest(0, 0x400000)
    mine, theirs = guest.snapshot(), oracle.snapshot()
    assert (mine.user, mine.kernel) == (theirs.user, theirs.kernel)
    assert guest.machine.time == oracle.machine.time
    strings = mine.events.get("machine.string", 0) + mine.events.get("emulate.string", 0)
    assert strings == theirs.events.get("machine.string", 0)
    return guest


def put(where: Layout, page: int, entry: int) -> str:
    """Assembly: one store of an entry of the window's table."""
    return f"mov dword ptr [{where.slot(page):#x}], {entry:#x};"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_pages_come_and_go(scheme: str, mode: str, path: str) -> None:
    where = layout(mode)
    source = (put(where, 0, 0x100000 | ALL) + f"mov dword ptr [{where.base:#x}], 0x1234; mov ebx, [{where.base:#x}];"
              + put(where, 0, 0x101000 | ALL) + f"invlpg [{where.base:#x}]; mov ecx, [{where.base:#x}]; mov edx, [0x100000];"
              + put(where, 0, 0) + f"invlpg [{where.base:#x}]; mov esi, offset next; mov edi, [{where.base:#x}]; next: " + END)
    source = source.replace("offset next", "0x7ffffff0")
    image = paging_kernel(where, resolve(where, source, "next"))
    guest = agree(image, scheme, path)
    assert faults(guest)[0][:2] == (0, where.base)
    if "nested" not in scheme:
        assert guest.snapshot().events["shadow.fault.true"] == 1


def resolve(where: Layout, source: str, label: str) -> str:
    """Put the address of ``label:`` where 0x7ffffff0 stands (keystone has no offset operator)."""
    before = source.split(f"{label}:")[0]
    return source.replace("0x7ffffff0", hex(CODE + len(asm(where.load + before, CODE))))


# ---- traced: every store to a table in use is one trace fault, however it is made
#: A store to the window's first two entries (or so), by what instruction; and how many elements a string instruction moves.
STORES = {
    "mov": "mov dword ptr [edi], 0x100067;",
    "or": "or dword ptr [edi], 0x60;",
    "lock": "lock xadd dword ptr [edi], eax;",
    "cmpxchg8b": "mov eax, [edi]; mov edx, [edi + 4]; mov ebx, 0x100067; xor ecx, ecx; lock cmpxchg8b [edi];",
    "push": "mov ebx, esp; lea esp, [edi + 4]; push 0x100067; mov esp, ebx;",
    "call": "mov ebx, esp; lea esp, [edi + 4]; call l; l: mov esp, ebx;",
    "rep stosd": "mov eax, 0x100067; mov ecx, 2; rep stosd;",
    "rep movsd": "mov esi, 0x5000; mov ecx, 2; .byte 0xf3, 0xa5;",
    "byte": "mov byte ptr [edi], 0x67;",
    "sse": "mov eax, cr4; or eax, 0x200; mov cr4, eax; movups [edi], xmm0;",
    "misaligned": "mov dword ptr [edi + 2], 0;",
}


@pytest.mark.parametrize("technique", ["trap-and-emulate", "hardware-assisted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", STORES)
def test_a_store_to_a_traced_table_is_one_trace_fault(technique: str, mode: str, how: str) -> None:
    where = layout(mode)
    # Map and use two pages, so that the window's table is in use; the stores then come between two looks at them.
    source = (put(where, 0, 0x101000 | ALL) + put(where, 1, 0x102000 | ALL) + f"mov eax, [{where.base:#x}]; mov edx, [{where.base + 0x1000:#x}];"
              + f"mov edi, {where.slot(0):#x};" + STORES[how] + "mov eax, cr3; mov cr3, eax;"
              + f"mov esi, 0x7ffffff0; mov ebp, [{where.base:#x}]; next: " + END)
    data = {0x101000: b"old ", 0x102000: b"more", 0x5000: b"\x67\0\x10\0" * 2}
    image = paging_kernel(where, resolve(where, source, "next"), data=data)
    guest = agree(image, f"{technique}/tracing")
    events = guest.snapshot().events
    assert events["shadow.trace.write"] == 1
    assert events["emulate.other"] == 1
    assert events.get("emulate.string", 0) == (2 if how.startswith("rep") else 0)


@pytest.mark.parametrize("technique", ["trap-and-emulate", "hardware-assisted"])
def test_a_store_across_two_tables_is_one_trace_fault_and_corrects_both(technique: str) -> None:
    where = layout("pae")
    # The low table and the window's are neighbours in guest-physical memory, and mapped one to one.
    edge = where.window
    source = (put(where, 0, 0x101000 | ALL) + f"mov eax, [{where.base:#x}]; mov dword ptr [{edge - 2:#x}], 0x10670000; mov eax, cr3; mov cr3, eax;"
              f"mov esi, 0x7ffffff0; mov ebp, [{where.base:#x}]; next: " + END)
    guest = agree(paging_kernel(where, resolve(where, source, "next")), f"{technique}/tracing")
    assert guest.snapshot().events["shadow.trace.write"] == 1


def small_program(mode: str) -> tuple[GuestImage, int, int]:
    """One page read, written, mapped elsewhere, read, and read again after a CR3 load: the image, where that begins, and where it ends."""
    where = layout(mode)
    bits, r = (64, "r") if mode == "64" else (32, "e")
    begin = raw_origin(where)
    code = asm(put(where, 0, 0x101000 | ALL) + f"mov eax, [{where.base:#x}]; mov [{where.base:#x}], eax;"
               + put(where, 0, 0x102000 | ALL) + f"invlpg [{where.base:#x}]; mov ebx, [{where.base:#x}];"
               f"mov {r}ax, cr3; mov cr3, {r}ax; mov esi, [{where.base:#x}];", begin, bits)
    end = asm("xor eax, eax; mov edx, 0xf4; out dx, eax; hlt", 0, bits)
    return raw_kernel(where, code + end, {0x101000: b"old ", 0x102000: b"new "}), begin, begin + len(code)


#: Every reason to fault or to exit for memory.
COUNTED = ("shadow.fault.hidden", "shadow.fault.dirty", "shadow.fault.true", "shadow.trace.write", "emulate.invlpg", "emulate.mov_to_cr",
           "trap.pf", "exit.page_fault", "exit.invlpg", "exit.cr_write", "exit.cr_read", "exit.nested_page_fault")


@pytest.mark.parametrize("mode", [*MODES, "64"])
@pytest.mark.parametrize("technique", ["trap-and-emulate", "hardware-assisted"])
def test_faults_of_a_small_program_by_hand_count(technique: str, mode: str) -> None:
    """Tracing and lazy fill differ where they must, and in nothing else: not by technique, format or width."""
    image, begin, end = small_program(mode)
    for scheme in ("tracing", "lazy", *(("nested",) if technique == "hardware-assisted" else ())):
        kind, parameters = SCHEMES[f"{technique}/{scheme}"]
        guest = boot(kind, image, parameters)
        seen: dict[int, dict[str, int]] = {}
        for at in (begin, end):         # an instruction that faults comes by again
            guest.watch(at, lambda at, guest=guest, seen=seen: seen.setdefault(at, guest.snapshot(at).events))
        assert guest.run(10_000) == DONE
        count = {event: n for event in COUNTED if (n := seen[end].get(event, 0) - seen[begin].get(event, 0))}
        if scheme == "tracing":
            # Hidden: the first store finds the table's own page not mapped for writing, then the window's page.
            # After its entry was stored to, the shadow of the new frame is made at once: A was clear, so by another hidden fault.
            wanted = {"shadow.fault.hidden": 3, "shadow.fault.dirty": 1, "shadow.trace.write": 1}
        elif scheme == "lazy":
            # INVLPG drops one page; the CR3 load drops all, and code and window must come back.
            wanted = {"shadow.fault.hidden": 5, "shadow.fault.dirty": 1}
        else:
            # The table, the old frame and the new one are touched for the first time. Nothing else, ever.
            assert count == {"exit.nested_page_fault": 3}
            continue
        exits = sum(wanted.values())
        if technique == "trap-and-emulate":     # INVLPG and MOV to CR3 are privileged: #GP, whatever the scheme
            wanted |= {"trap.pf": exits, "emulate.invlpg": 1, "emulate.mov_to_cr": 1}
        else:                                   # a traced shadow is in step already: INVLPG need not exit
            wanted |= {"exit.page_fault": exits, "emulate.mov_to_cr": 1, "exit.cr_write": 1, "exit.cr_read": 1}
            wanted |= {"emulate.invlpg": 1, "exit.invlpg": 1} if scheme == "lazy" else {}
        assert count == wanted


@pytest.mark.parametrize("mode", [*MODES, "64"])
def test_without_tracing_the_shadow_goes_stale_and_the_guest_goes_wrong(mode: str) -> None:
    image, _, _ = small_program(mode)
    seen = {}
    for scheme in ("tracing", "lazy", "none"):
        guest = boot(TrapAndEmulate, image, {"memory": scheme, "sensitive": "trap"})
        assert guest.run(10_000) == DONE
        seen[scheme] = guest.guest_state().gpr[3].to_bytes(4, "little")
    assert seen == {"tracing": b"new ", "lazy": b"new ", "none": b"old "}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page", ["4k", "2m"])
def test_nested_paging_exits_once_for_each_part_of_memory_and_never_for_the_guests_tables(mode: str, page: str) -> None:
    where = layout(mode)
    again = "".join(put(where, i, 0x101000 + 0x1000 * i | ALL) + f"invlpg [{where.base + 0x1000 * i:#x}]; mov eax, [{where.base + 0x1000 * i:#x}];"
                    for i in range(4)) + "mov eax, cr3; mov cr3, eax;"
    faulting = "mov esi, 0x7ffffff0; mov eax, [0x40000000]; next: "
    source = again + "nop;" + again + faulting + END
    image = paging_kernel(where, resolve(where, source, "next"))
    guest = boot(HardwareAssisted, image, {"memory": "nested", "nested_page": page})
    steady = CODE + len(asm(where.load + again, CODE))
    seen: list[dict[str, int]] = []
    guest.watch(steady, lambda at: seen.append(guest.snapshot(at).events))
    assert guest.run(10_000) == DONE
    before, after = seen[0], guest.snapshot().events
    exits = {kind: n - before.get(kind, 0) for kind, n in after.items() if kind.startswith("exit.") and n != before.get(kind, 0)}
    # What is left is the port of the end, and in the 4 KiB case the pages of the fault handler and of what it reads.
    assert exits.pop("exit.io") == 1
    assert exits.pop("exit.nested_page_fault", 0) <= (4 if page == "4k" else 0)
    assert exits == {}


# ---- what a VMM refuses
def test_a_guest_that_maps_the_vmms_hole_is_refused_in_words() -> None:
    # The last directory entry of the last GiB: PDPTE 3 is made to point at the directory that there is.
    source = f"mov dword ptr [{0x41000 + 8 * 511:#x}], {0x42000 | ALL:#x}; mov dword ptr [0x40018], 0x41001; mov eax, cr3; mov cr3, eax;" + END
    for scheme in ("tracing", "lazy", "none"):
        guest = boot(TrapAndEmulate, paging_kernel(layout("pae"), source), {"memory": scheme, "sensitive": "trap"})
        with pytest.raises(UnsupportedByStrategy, match="must leave that range free"):
            guest.run(10_000)


def test_a_mapping_of_the_empty_bus_in_the_hole_is_no_obstacle() -> None:
    """A kernel may map the whole end of the address space for its devices; a store there vanishes, as on the bare machine."""
    table = 0x46000
    source = (f"mov dword ptr [{0x41000 + 8 * 511:#x}], {table | ALL:#x}; mov dword ptr [{0x41000 + 8 * 510:#x}], {table | ALL:#x};"
              f"mov dword ptr [{table:#x}], 0xffc00003; mov dword ptr [{table + 8:#x}], {0x5000 | ALL:#x};"
              "mov dword ptr [0x40018], 0x41001; mov eax, cr3; mov cr3, eax; mov dword ptr [0xffe00000], 1;" + END)
    for scheme in ("tracing", "lazy"):
        guest = boot(TrapAndEmulate, paging_kernel(layout("pae"), source), {"memory": scheme, "sensitive": "trap"})
        assert guest.run(10_000).exit_code == 0
    reach = source.replace("[0xffe00000], 1", "[0xffe01000], 1")     # the next page is mapped to RAM
    guest = boot(TrapAndEmulate, paging_kernel(layout("pae"), reach), {"memory": "lazy", "sensitive": "trap"})
    with pytest.raises(UnsupportedByStrategy, match="must leave that range free"):
        guest.run(10_000)


def test_paging_on_static_memory_is_refused_in_words() -> None:
    guest = boot(TrapAndEmulate, paging_kernel(layout("32"), END), {"memory": "static", "sensitive": "trap"})
    with pytest.raises(UnsupportedByStrategy, match="paging"):
        guest.run(10_000)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_address_spaces_and_their_tables_are_recycled(scheme: str) -> None:
    """Many page directories in turn, each filled anew in frames that were tables and data before."""
    where = layout("pae")
    # Directory pointers at 0x200000 + 0x3000 n, directory and table behind; 70 of them, made three times over.
    source = (
        "mov ebp, 3; again: mov ecx, 70; mov edi, 0x200000; next1:"
        "mov eax, edi; add eax, 0x1001; mov [edi], eax; mov dword ptr [edi + 4], 0;"
        f"mov dword ptr [edi + 0x1000], {0x42000 | ALL:#x}; mov dword ptr [edi + 0x1004], 0;"
        f"mov eax, edi; add eax, {0x2000 | ALL:#x}; mov [edi + 0x1008], eax; mov dword ptr [edi + 0x100c], 0;"
        f"mov eax, ecx; shl eax, 12; add eax, {0x400000 | ALL:#x}; mov [edi + 0x2000], eax; mov dword ptr [edi + 0x2004], 0;"
        f"mov cr3, edi; add dword ptr [{where.base:#x}], ecx; mov eax, {0x40000:#x}; mov cr3, eax; add edi, 0x3000;"
        "loop next1; dec ebp; jnz again;" + END)
    guest = agree(paging_kernel_identity(where, source), scheme)
    assert guest.read_guest(0x400000 + 70 * 0x1000, 4) == (3 * 70).to_bytes(4, "little")


def paging_kernel_identity(where: Layout, source: str) -> GuestImage:
    """As paging_kernel, but 2 MiB pages map the memory from 2 MiB to 8 MiB one to one; the window is not used."""
    directory = bytearray(where.tables[0x41000])
    for i in range(1, 4):
        directory[8 * i:8 * i + 8] = (i << 21 | PS | ALL).to_bytes(8, "little")
    return paging_kernel(where, source, data={0x41000: bytes(directory)})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["cr3", "invlpg"])
def test_code_of_two_address_spaces_at_one_address_is_counted_apart(how: str, path: str) -> None:
    """Two pages of code, equal in length, take turns at the window's first address; Unicorn keeps both translations."""
    where = layout("pae")
    other = {0x60000: (0x61000 | 1).to_bytes(8, "little"), 0x61000: (0x42000 | ALL).to_bytes(8, "little") + (0x62000 | ALL).to_bytes(8, "little"),
             0x62000: (0x102000 | ALL).to_bytes(8, "little")}
    data = {**other, 0x43000: (0x101000 | ALL).to_bytes(8, "little"), 0x101000: asm("cpuid; ret"), 0x102000: asm("nop; nop; ret")}
    to = {"cr3": ("mov eax, 0x60000; mov cr3, eax;", "mov eax, 0x40000; mov cr3, eax;"),
          "invlpg": (put(where, 0, 0x102000 | ALL) + f"invlpg [{where.base:#x}];", put(where, 0, 0x101000 | ALL) + f"invlpg [{where.base:#x}];")}[how]
    source = f"mov esi, 10; again: xor eax, eax; call {where.base:#x}; {to[0]} call {where.base:#x}; {to[1]} dec esi; jnz again;" + END
    image = paging_kernel(where, source, data=data)
    seen = set()
    for kind, parameters in ((Native, {}), *SCHEMES.values()):
        guest = boot(kind, image, parameters, path)
        assert guest.run(10_000) == DONE
        snapshot = guest.snapshot()
        cpuid = snapshot.events.get("retired.cpuid", 0) + snapshot.events.get("emulate.cpuid", 0)
        seen.add((cpuid, snapshot.kernel))
    assert len(seen) == 1 and seen.pop()[0] == 10
