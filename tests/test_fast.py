"""The fast path counts what the portable path counts, whatever of it the host denies."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.errors import GuestBudget, UnsupportedHost
from vmlab.ledger import Snapshot
from vmlab.machine import fast
from vmlab.machine import state as hidden
from vmlab.machine.code import Block, Code
from vmlab.machine.counter import Counter, block_hook
from vmlab.machine.cpu import Segment
from vmlab.machine.native import build
from vmlab.machine.pc import Machine, StopReason
from vmlab.machine.state import RAX, RCX, RSP

CODE, STACK, GDT, IDT, TSS, HANDLERS, DATA = 0x10000, 0x8000, 0x1000, 0x2000, 0x3000, 0x20000, 0x5000
EXIT = b"\xb0\x2a\xe6\xf4"  # mov al, 42; out 0xf4, al
# What the IDT leads to: past a two-byte instruction and back, without and with an error code; and plainly back.
SKIP2 = b"\x83\x04\x24\x02\xcf"  # add dword [esp], 2; iret
DROP_SKIP2 = b"\x83\xc4\x04\x83\x04\x24\x02\xcf"  # add esp, 4; add dword [esp], 2; iret
BACK = b"\xcf"
# Acknowledge the interrupt at serial port and controller, count it in memory, go back.
SERIAL = (b"\x50\x52\x66\xba\xfa\x03\xec"  # push eax; push edx; mov dx, 0x3fa; in al, dx
          b"\xff\x05\x00\x51\x00\x00"      # inc dword [0x5100]
          b"\xb0\x20\xe6\x20\x5a\x58\xcf")  # mov al, 0x20; out 0x20, al; pop edx; pop eax; iret
HANDLER_OF = {0: SKIP2, 6: SKIP2, 13: DROP_SKIP2, 0x24: SERIAL, 0x80: BACK, 0x81: SKIP2}

Outcome = tuple[Snapshot, int, bytes, tuple[tuple[int, int, int], ...], tuple[int, ...], bytes]
PATHS = ("portable", "C, CPL asked for", "C, CPL in place")


def machine(code: bytes, path: str) -> Machine:
    """A machine in 32-bit protected mode with rings 0, 1 and 3, about to run ``code`` at CPL 0."""
    pc = Machine(1 << 20, path)
    ram, cpu = pc.ram, pc.cpu
    for i, descriptor in enumerate((0, 0xCF9B000000FFFF, 0xCF93000000FFFF, 0xCFFB000000FFFF, 0xCFF3000000FFFF,
                                    0x890030000067, 0xCFBB000000FFFF, 0xCFB3000000FFFF)):
        ram.write64(GDT + 8 * i, descriptor)
    ram.write(TSS + 4, struct.pack("<II", 0x7000, 0x10))
    for i, (vector, handler) in enumerate(HANDLER_OF.items()):
        at = HANDLERS + 0x100 * i
        ram.write(at, handler)
        ram.write(IDT + 8 * vector, struct.pack("<HHHH", at & 0xFFFF, 8, 0xEE00, at >> 16))
    ram.write(CODE, code)
    cpu.enter_protected(CODE, Segment(8, 0, 0xFFFFFFFF, 0xCF9B00), Segment(0x10, 0, 0xFFFFFFFF, 0xCF9300))
    cpu.load()
    cpu.set_table("gdt", Segment(0, GDT, 0x3F, 0))
    cpu.set_table("idt", Segment(0, IDT, 0x7FF, 0))
    cpu.set_table("tr", Segment(0x28, TSS, 0x67, 0x8900))
    cpu.set_gpr(RSP, STACK)
    cpu.store()
    return pc


def outcome(pc: Machine) -> Outcome:
    """All that two paths must agree in."""
    pc.cpu.load()
    return (pc.snapshot(), pc.time, bytes(pc.console), tuple(pc.device_log), tuple(pc.cpu.gpr(i) for i in range(8)),
            pc.ram.read(DATA, 0x200))


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes the host as ``path`` (of PATHS) needs it; gives VMLAB_MACHINE's value."""
    def choose(path: str) -> str:
        if path == "portable":
            return "portable"
        if fast.why_not():
            pytest.skip(f"no C library here: {fast.why_not()}")
        if path == "C, CPL asked for":
            monkeypatch.setattr(hidden, "live_address", lambda engine, layout: None)
        else:
            monkeypatch.undo()
            engine = Machine(1 << 20, "portable").engine
            if hidden.live_address(engine, hidden.calibrate()) is None:
                pytest.skip("the CPU's state cannot be verified in place here")
        return "fast"

    return choose


def run_all(code: bytes, deny: Callable[[str], str], budget: int = 100_000) -> Outcome:
    """Run ``code`` on every path; the one outcome of all."""
    found: list[Outcome] = []
    for path in PATHS:
        pc = machine(code, deny(path))
        assert pc.path == ("portable" if path == "portable" else "fast")
        assert pc.run(budget).exit_code == 42
        found.append(outcome(pc))
    assert found[1] == found[0]
    assert found[2] == found[0]
    events = found[0][0].events
    assert events.get("machine.iret", 0) == events.get("iret.same", 0) + events.get("iret.outer", 0)
    return found[0]


def rep(count: int) -> bytes:
    """cld; mov ecx, count; mov esi, DATA; mov edi, DATA+0x80; rep movsb"""
    return b"\xfc\xb9" + struct.pack("<I", count) + b"\xbe\x00\x50\x00\x00\xbf\x80\x50\x00\x00\xf3\xa4"


def test_faults(deny: Callable[[str], str]) -> None:
    # ud2; mov ds, cx (a bad selector); div ecx by 0
    counted = run_all(b"\xb9\x34\x12\x00\x00\x0f\x0b\x8e\xd9\x31\xc9\xf7\xf1" + EXIT, deny)[0]
    assert {v: counted.events[f"fault.delivered.{v}"] for v in (0, 6, 13)} == {0: 1, 6: 1, 13: 1}
    # 2 of one's own before EXIT's 2; the faulting three did not retire; handlers 2 + 3 + 2.
    assert counted.kernel == 2 + 2 + 7


# Each in a loop, for C knows of a block only once it has been left in the middle.
_PORTS = {
    "in al, imm": b"\xe4\x21", "in eax, imm": b"\xe5\x21", "in ax, dx": b"\x66\xed", "out imm, al": b"\xe6\x80", "out dx, ax": b"\x66\xef",
    "out dx, eax": b"\xef", "the last of its block": b"\xec\xeb\x00", "two in a row": b"\xec\xee", "in the shadow of sti": b"\xfb\xec\xfa",
    "a timer's count": b"\xb0\x00\xe6\x43\xe4\x40\xe4\x40",
}


@pytest.mark.parametrize("access", _PORTS)
@pytest.mark.parametrize("ring", [0, 1, 3])
def test_ports(deny: Callable[[str], str], access: str, ring: int) -> None:
    # mov ecx, 5 ; mov eax, 0x11223344 ; mov edx, 0x12343fd ; then five times: the access, rol eax, add ebx, eax
    loop = b"\xb9\x05\x00\x00\x00\xb8\x44\x33\x22\x11\xba\xfd\x43\x23\x01" + _PORTS[access] + b"\xc1\xc0\x07\x01\xc3"
    loop += b"\x49\x75" + bytes([0x100 - len(_PORTS[access]) - 8])
    into = b"" if ring == 0 else _into_ring(ring, CODE + 0x80).ljust(0x80, b"\x90")
    counted, _, _, log, registers, _ = run_all(into + loop + EXIT, deny)
    accesses = sum(_PORTS[access].count(bytes([opcode])) for opcode in (0xE4, 0xE5, 0xE6, 0xEC, 0xED, 0xEE, 0xEF))
    assert counted.events["io.device"] == 5 * accesses + 1                  # EXIT's own
    assert registers[RCX] == 0
    assert len(log) == 1 + 5 * sum(_PORTS[access].count(bytes([opcode])) for opcode in (0xE6, 0xEE, 0xEF))


def test_software_interrupts(deny: Callable[[str], str]) -> None:
    counted = run_all(b"\xcd\x80\x90\xcd\x80" + EXIT, deny)[0]
    assert (counted.events["machine.int"], counted.events["machine.iret"], counted.kernel) == (2, 2, 7)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_repeated_string_instruction(deny: Callable[[str], str], count: int) -> None:
    counted = run_all(rep(count) + EXIT, deny)[0]
    assert (counted.events.get("machine.string", 0), counted.kernel) == (count, 7)


def test_interrupts_between_the_elements_of_one_instruction(deny: Callable[[str], str]) -> None:
    # Controller: vectors from 0x20, only line 4 open. Port: transmitter may interrupt. Then seven characters by REP OUTSB.
    program = b""
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)):
        program += bytes((0xB0, value, 0xE6, port))
    program += b"\x66\xba\xf9\x03\xb0\x02\xee\x66\xba\xf8\x03"  # out 0x3f9, 2; mov dx, 0x3f8
    program += b"\xfc\xb9\x07\x00\x00\x00\xbe\x00\x50\x00\x00\xfb\x90\xf3\x6e"  # cld; ecx = 7; esi = DATA; sti; nop; rep outsb
    counted, _, console, _, registers, data = run_all(program + EXIT, deny)
    assert console == bytes(7)
    assert registers[RCX] == 0
    assert (counted.events["interrupt.delivered"], data[0x100]) == (8, 8)  # enabling it is the first
    assert (counted.events["machine.string"], counted.events["machine.outs"]) == (7, 1)
    assert counted.kernel == 10 + 4 + 3 + 2 + 1 + 2 + 8 * 10


def _into_ring(ring: int, address: int) -> bytes:
    """Six instructions: push SS, ESP, EFLAGS with IOPL 3, CS, EIP; iret."""
    code, data = {1: (0x31, 0x39), 3: (0x1B, 0x23)}[ring]
    return b"\x6a" + bytes([data]) + b"\x68\x00\x60\x00\x00\x68\x02\x30\x00\x00\x6a" + bytes([code]) + b"\x68" + struct.pack(
        "<I", address) + b"\xcf"


def test_ring_one_is_not_user(deny: Callable[[str], str]) -> None:
    counted = run_all(_into_ring(1, CODE + 0x80).ljust(0x80, b"\x90") + b"\x90\xeb\x00" + EXIT, deny)[0]
    assert (counted.user, counted.kernel) == (0, 6 + 2 + 2)


def test_halt_and_ring_changes(deny: Callable[[str], str]) -> None:
    into_user = _into_ring(3, CODE + 0x80)
    # At CPL 3: five times round a loop with INT 0x80, then HLT, which is #GP there, then EXIT (IOPL is 3).
    at_user = b"\xb9\x05\x00\x00\x00" + b"\xcd\x80\x49\x75\xfb" + b"\x66\xf4" + EXIT
    counted = run_all(into_user.ljust(0x80, b"\x90") + at_user, deny)[0]
    assert counted.user == 1 + 5 * 3 + 2
    assert counted.kernel == 6 + 5 + 3
    assert counted.events["retired.user"] == counted.user


@pytest.mark.parametrize("path", PATHS)
def test_halt_ends_the_run(deny: Callable[[str], str], path: str) -> None:
    pc = machine(b"\x90\xf4", deny(path))
    assert pc.run().reason is StopReason.HALTED
    assert (pc.time, pc.snapshot().events["machine.hlt"]) == (2, 1)


def test_self_modifying_code(deny: Callable[[str], str]) -> None:
    # Call a routine, overwrite its first instruction (inc eax by dec eax), call it again.
    routine = CODE + 0x40
    call = b"\xe8" + struct.pack("<i", 0x40 - 5)
    patch = b"\xc6\x05" + struct.pack("<I", routine) + b"\x48"
    again = b"\xe8" + struct.pack("<i", 0x40 - 5 - 7 - 5)
    counted, _, _, _, registers, _ = run_all((call + patch + again + EXIT).ljust(0x40, b"\x90") + b"\x40\xc3", deny)
    assert registers[RAX] & 0xFFFFFF00 == 0
    assert counted.kernel == 1 + 2 + 1 + 1 + 2 + 2


def test_more_blocks_than_the_tables_first_hold(deny: Callable[[str], str]) -> None:
    # 3000 times "jmp to the next instruction", twice over.
    jumps = b"\xeb\x00" * 3000
    loop = b"\xb9\x02\x00\x00\x00" + jumps + b"\x49\x0f\x85" + struct.pack("<i", -(len(jumps) + 7))
    counted = run_all(loop + EXIT, deny)[0]
    assert counted.kernel == 1 + 2 * 3002 + 2


@pytest.mark.parametrize("path", PATHS)
def test_budget_stops_before_the_block_that_would_pass_it(deny: Callable[[str], str], path: str) -> None:
    pc = machine(b"\x90\x90\x90\xeb\xfb", deny(path))
    with pytest.raises(GuestBudget, match="1000"):
        pc.run(1000)
    assert pc.time == 1000


@pytest.mark.parametrize("path", PATHS)
def test_what_a_callback_raises_comes_out_of_run(deny: Callable[[str], str], path: str) -> None:
    pc = machine(b"\xeb\x00\xeb\x00" + EXIT, deny(path))

    def broken(address: int, instructions: object) -> None:
        raise KeyError(address)

    pc.tagger = broken
    with pytest.raises(KeyError):
        pc.run()


# ---- any small program
def _loop(count: int, body: bytes) -> bytes:
    return b"\xbd" + struct.pack("<I", count) + body + b"\x4d\x0f\x85" + struct.pack("<i", -(len(body) + 7))


INSTRUCTIONS = st.sampled_from([
    b"\x01\xd8", b"\x0f\xaf\xc3", b"\xa3\x00\x50\x00\x00", b"\x8b\x15\x04\x50\x00\x00", b"\x43", b"\x90",  # ordinary
    b"\xa8\x01\x74\x01\x40", b"\xeb\x00", b"\x50\x58", b"\x9c\x9d",  # test al, 1; jz; inc eax / jmp / push, pop / pushf, popf
    b"\xcd\x80", b"\x0f\x0b", b"\x31\xc9\xf7\xf1", b"\x66\xb9\x34\x12\x8e\xd9",  # INT n, #UD, #DE, #GP
    b"\xfa", b"\xfb", b"\x0f\x31", b"\x31\xc0\x31\xc9\x0f\xa2", b"\x0f\x20\xc0", b"\xe4\x21",  # CLI STI RDTSC CPUID MOV-CR IN
    rep(0), rep(1), rep(3), b"\xb9\x04\x00\x00\x00\xbf\x20\x50\x00\x00\xf3\xab", b"\xa4",
    b"\xbf\x20\x50\x00\x00\xb9\x09\x00\x00\x00\xf2\xae",  # repne scasb
])
STRAIGHT = st.lists(INSTRUCTIONS, max_size=8).map(b"".join)
PROGRAMS = st.lists(STRAIGHT | st.builds(_loop, st.integers(1, 6), STRAIGHT), min_size=1, max_size=5).map(b"".join)


@pytest.fixture(scope="module")
def a_library() -> None:
    if fast.why_not():
        pytest.skip(f"no C library here: {fast.why_not()}")


@pytest.mark.usefixtures("a_library")
@settings(max_examples=60, deadline=None)
@given(program=PROGRAMS, live=st.booleans())
def test_any_program_counts_the_same(program: bytes, live: bool) -> None:
    code = b"\xbe\x00\x50\x00\x00\xbf\x40\x50\x00\x00" + program + EXIT
    slow = machine(code, "portable")
    with pytest.MonkeyPatch.context() as patch:
        if not live:
            patch.setattr(hidden, "live_address", lambda engine, layout: None)
        quick = machine(code, "fast")
    for pc in (slow, quick):
        assert pc.run(100_000).exit_code == 42
    assert outcome(quick) == outcome(slow)


# ---- the tables alone
@pytest.mark.usefixtures("a_library")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_follow_any_sequence(data: st.DataObject) -> None:
    """Blocks added, entered, closed and added again, above the 4 GiB line too: C and Python agree at every step."""
    library = fast._load()
    assert isinstance(library, fast.Library)
    function = library.block
    cpl = [0]
    quick, slow = fast.FastCounter(lambda: cpl[0], lambda pc, size: False, None), Counter(lambda: cpl[0])
    in_c = fast._BLOCK_FUNCTION(function)
    in_python = block_hook(slow, lambda pc, size: False, pytest.fail)  # type: ignore[arg-type]
    places = [(pc, size) for pc in (0x1000, 0x1002, 0xFFFF_8000_0000_1000, 0xFFFF_FFFF_FFFF_FFF0) for size in (2, 4, 300)]
    for _ in range(data.draw(st.integers(1, 60))):
        pc, size = data.draw(st.sampled_from(places))
        match data.draw(st.sampled_from(["enter", "enter", "enter", "add", "close", "cpl"])):
            case "enter":
                in_c(None, pc, size, quick.address)
                in_python(0, pc, size, 0)
            case "add":
                weight, rep_, ring = data.draw(st.integers(1, 9)), data.draw(st.booleans()), data.draw(st.booleans())
                for counter in (quick, slow):
                    block = Block(pc, Code(bytes(size), 32, []), None)
                    block.weight, block.rep, block.ring = weight, rep_, ring
                    counter.add(block)
            case "close":
                for counter in (quick, slow):
                    if (known := counter.blocks.get(pc << 16 | size)) is not None:
                        counter.close(known)
            case "cpl":
                cpl[0] = 3 - cpl[0]
        assert _numbers(quick) == _numbers(slow)


def _numbers(counter: Counter) -> object:
    current = None if counter.current is None else counter.current.pc
    return (counter.time, counter.user, current,
            [(b.key, b.pc, b.size, b.runs, b.taken, b.again) for b in counter._all_blocks()])


@pytest.mark.usefixtures("a_library")
def test_closing_blocks_again_and_again_does_not_fill_the_tables() -> None:
    counter = fast.FastCounter(lambda: 0, lambda pc, size: False, None)
    for i in range(5000):
        counter.add(block := Block(i, Code(b"\0", 32, []), None))
        counter.close(block)
    assert len(counter.by_number) == 1024
    assert len(counter._places) == 2048


# ---- a host that denies
@pytest.fixture
def bare_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing prebuilt, an empty cache, and a fresh mind; gives the cache's place."""
    package = tmp_path / "package"
    package.mkdir()
    for path in (*build.SOURCES, *build.HEADERS):
        (package / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "HERE", package)
    for group in ("SOURCES", "HEADERS"):
        monkeypatch.setattr(build, group, tuple(package / path.name for path in getattr(build, group)))
    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.delenv("CC", raising=False)
    fast._load.cache_clear()
    yield tmp_path / "cache"
    fast._load.cache_clear()


@pytest.mark.parametrize("live", [True, False])
def test_without_a_compiler_python_counts(bare_host: Path, monkeypatch: pytest.MonkeyPatch, live: bool) -> None:
    monkeypatch.setenv("PATH", "")
    if not live:
        monkeypatch.setattr(hidden, "live_address", lambda engine, layout: None)
    code = rep(7) + b"\xcd\x80" + EXIT
    machines = [machine(code, path) for path in ("auto", "portable")]
    for pc in machines:
        assert pc.path == "portable"
        pc.run()
    assert outcome(machines[0]) == outcome(machines[1])
    assert "no C compiler" in fast.why_not()
    assert not bare_host.exists()
    with pytest.raises(UnsupportedHost, match="no C compiler"):
        Machine(1 << 20, "fast")


@pytest.mark.skipif(not build.compilers(), reason="no C compiler")
def test_first_use_builds_the_library_once(bare_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast.why_not() == ""
    assert [path.name for path in bare_host.iterdir()] == [build.file_name()]
    fast._load.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert fast.why_not() == ""


@pytest.mark.skipif(not build.compilers(), reason="no C compiler")
def test_a_library_is_never_used_for_another_source(bare_host: Path) -> None:
    assert fast.why_not() == ""
    blocks = build.HERE / "blocks.c"
    blocks.write_text(blocks.read_text(encoding="utf-8") + "\n#error not C any more\n", encoding="utf-8")
    fast._load.cache_clear()
    assert "cannot build it" in fast.why_not()
    assert "not C any more" in fast.why_not()


@pytest.mark.skipif(not build.compilers(), reason="no C compiler")
def test_a_library_that_counts_wrongly_is_refused(bare_host: Path) -> None:
    blocks = build.HERE / "blocks.c"
    text = blocks.read_text(encoding="utf-8")
    assert "->taken[s->user]++" in text
    blocks.write_text(text.replace("->taken[s->user]++", "->taken[0]++"), encoding="utf-8")
    assert "counts wrongly" in fast.why_not()


@pytest.mark.skipif(not build.compilers(), reason="no C compiler")
def test_an_unwritable_cache_is_a_reason(bare_host: Path) -> None:
    bare_host.write_text("a file where the directory should be", encoding="utf-8")
    assert "cannot be written" in fast.why_not()


def test_a_spoilt_library_is_a_reason(bare_host: Path) -> None:
    bare_host.mkdir()
    (bare_host / build.file_name()).write_bytes(b"not a library")
    assert "cannot be loaded" in fast.why_not()


@pytest.mark.skipif(sys.platform == "win32" or not build.compilers(), reason="needs a compiler found on PATH")
def test_cc_chooses_the_compiler_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path(build.compilers()[0][0]).name
    monkeypatch.setenv("CC", f"{name} -g")
    assert build.compilers()[0][1:] == ["-g"]
    monkeypatch.setenv("CC", os.devnull + "/none")
    assert build.compilers() == []


def test_line_ends_do_not_change_the_name(tmp_path: Path) -> None:
    text = build.SOURCES[0].read_text(encoding="utf-8")
    for kind, content in (("unix", text), ("dos", text.replace("\n", "\r\n"))):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "blocks.c").write_bytes(content.encode())
    assert build.file_name([tmp_path / "unix" / "blocks.c"]) == build.file_name([tmp_path / "dos" / "blocks.c"]) != build.file_name()


