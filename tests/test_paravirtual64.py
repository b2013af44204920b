"""64-bit paravirtual guests: kernel and users in ring 3 on two roots, frames by hand, direct paging with four levels, and hostile guests."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machinelab import PATHS, asm
from pvlab import DATA, ENTRY, EXIT64, STACK, Asking, call64, check_counts, guest, image
from test_paravirtual_hostile import nearby, poison, untouched

from vmlab.errors import GuestError, GuestFault, GuestRefused, UnsupportedByStrategy
from vmlab.machine.pc import Machine, Stop
from vmlab.strategies.paravirtual import Paravirtualization
from vmlab.vmm import xen
from vmlab.vmm.xen.abi import WIDE, SharedInfo
from vmlab.vmm.xen.domain import GUEST_FRAMES
from vmlab.vmm.xen.domain64 import ENTRY as SYSCALL_ENTRY
from vmlab.vmm.xen.frames import Kind
from vmlab.vmm.xen.ring3 import WideHypervisor

P, RW, US = 1, 2, 4
PIN_L1, PIN_L4, UNPIN, NEW_BASE, NEW_USER_BASE = 0, 3, 4, 5, 15
POOL = 0x200                        # pfns from here are free to play with
FIRST = GUEST_FRAMES >> 12          # mfn of the guest's first frame
USER_CODE, USER_STACK = 0x40000000, 0x40001000     # in the users' root of a guest made by `two_sides`
CS, SS = xen.FLAT_RING3_CS64, xen.FLAT_RING3_SS64


def wide() -> Asking:
    return Asking(guest(bits=64))


def code(source: str, at: int = ENTRY) -> bytes:
    return asm(source, at, 64)


def run(source: str, data: bytes = b"", *, path: str = "portable", budget: int = 100_000, **chosen: str) -> tuple[Stop, Paravirtualization]:
    strategy = guest(code(source), data, path=path, bits=64, **chosen)
    return strategy.run(budget), strategy


# --- structures ----------------------------------------------------------------------------------------


def test_start_info_has_the_public_layout() -> None:
    """Every offset as a C compiler for x86-64 puts struct start_info."""
    info = WIDE.start_info(pages=8192, shared_info=0x32000, pt_base=0x170000, pt_frames=19, mfn_list=0x16C000, command_line="a=b", flags=5)
    assert len(info) == 1168
    assert info.startswith(b"xen-3.0-x86_64\0")
    assert struct.unpack_from("<QQI", info, 32) == (8192, 0x32000, 5)
    assert struct.unpack_from("<QQQ", info, 88) == (0x170000, 19, 0x16C000)
    assert info[128:132] == b"a=b\0"


def test_the_hypercall_page_saves_what_syscall_loses() -> None:
    page = WIDE.hypercall_page()
    assert page[29 * 32:][:14] == b"\x51\x41\x53\xb8" + struct.pack("<I", 29) + b"\x0f\x05\x41\x5b\x59\xc3"
    assert page[23 * 32:][:11] == b"\x51\x41\x53\x50\xb8" + struct.pack("<I", 23) + b"\x0f\x05"


def test_shared_info_has_words_of_64_bits() -> None:
    ask = wide()
    shared, at = ask.domain.shared, ask.domain.shared.frame
    assert isinstance(shared, SharedInfo) and shared.ports == 4096
    shared.raise_event(70)
    assert ask.ram.read64(at + 2048 + 8) == 1 << 6
    assert ask.ram.read64(at + 8) == 1 << 1         # evtchn_pending_sel
    ask.ram.write64(at + 2048 + 512 + 16, 1)        # mask port 128
    ask.ram.write(at, bytes(16))
    shared.raise_event(128)
    assert not shared.pending
    shared.unmask(128)
    assert shared.pending
    shared.set_cr2(0x123456789ABC)
    assert ask.ram.read64(at + 16) == 0x123456789ABC
    assert struct.unpack("<III", ask.ram.read(at + 3072, 12)) == (2, xen.WALL_CLOCK, 0)


# --- start of day and direct paging --------------------------------------------------------------------


def test_the_tables_of_start_of_day_are_counted() -> None:
    ask = wide()
    assert ask.frames.kind(ask.domain.root >> 12) is Kind.L4
    assert ask.frames.uses(ask.domain.root >> 12) == 2    # pinned, and in CR3
    check_counts(ask.strategy)


def new_space(ask: Asking, first: int = POOL) -> tuple[int, int, int, int]:
    """The kernel's root and its L3, the users' root and its L3, as mfns, not pinned. They share nothing yet."""
    root, middle, users, lower = (ask.fresh_frame(first + i) for i in range(4))
    kernel = ask.ram.read64(ask.ram.read64(ask.domain.root) & 0xFFFFFF000)
    assert ask.update((root << 12, middle << 12 | P | RW), (middle << 12, kernel), (users << 12, lower << 12 | P | RW)) == 0
    return root, middle, users, lower


def test_an_address_space_is_two_roots() -> None:
    ask = wide()
    root, middle, users, lower = new_space(ask)
    l2, l1 = ask.fresh_frame(POOL + 4), ask.fresh_frame(POOL + 5)
    page = ask.domain.mfn(POOL + 6)
    assert ask.update((l1 << 12, page << 12 | P | RW), (l2 << 12, l1 << 12 | P | RW),
                      ((middle << 12) + 8, l2 << 12 | P | RW), ((lower << 12) + 8, l2 << 12 | P | RW)) == 0
    counts = ask.strategy.counts
    before = counts["mmu.validate"]
    assert ask.extended((PIN_L4, root), (PIN_L4, users)) == 0
    assert counts["mmu.validate"] - before == 6         # two L4, two L3, one L2, one L1; the kernel's were tables already
    assert ask.frames.uses(l2) == 2
    assert ask.ram.read64(l1 << 12) == page << 12 | P | RW | US     # the kernel is a user to the CPU
    assert ask.extended((NEW_BASE, root), (NEW_USER_BASE, users)) == 0
    assert ask.domain.root == root << 12 == ask.strategy.machine.cpu.cr(3)
    for table, m2p in ((root, 0x5005), (users, 0)):
        assert ask.ram.read64((table << 12) + 8 * 256) == m2p
        assert ask.ram.read64((table << 12) + 8 * 260) == 0x6003
    assert ask.hypervisor.memory.read(1 << 30, 16) == ask.ram.read(page << 12, 16)
    check_counts(ask.strategy)
    assert ask.extended((UNPIN, root), (UNPIN, users)) == 0
    assert ask.frames.uses(root) == ask.frames.uses(users) == 1     # in the registers
    check_counts(ask.strategy)


REFUSALS = {
    "a frame of the hypervisor": lambda ask, l1: ((l1 << 12), 0x20000 | P),
    "a frame beyond the guest": lambda ask, l1: ((l1 << 12), ask.domain.mfn(ask.domain.pages) << 12 | P),
    "its own table writable": lambda ask, l1: ((l1 << 12), l1 << 12 | P | RW),
    "the root writable": lambda ask, l1: ((l1 << 12), ask.domain.root | P | RW),
    "a large page": lambda ask, l1: ((ask.entry_at(0) & ~0xFFF) - 0x1000, ask.domain.mfn(512) << 12 | 0x83),
    "a global page": lambda ask, l1: ((l1 << 12), ask.domain.mfn(5) << 12 | 0x103),
    "an address of 41 bits": lambda ask, l1: ((l1 << 12), 1 << 40 | P),
    "NX, which is off": lambda ask, l1: ((l1 << 12), 1 << 63 | ask.domain.mfn(5) << 12 | P),
    "the hypervisor's slots": lambda ask, l1: (ask.domain.root + 8 * 260, 0),
    "a page table in the hypervisor's slots": lambda ask, l1: (ask.domain.root + 8 * 271, l1 << 12 | P),
    "the hypervisor's tables as its own": lambda ask, l1: (ask.domain.root + 8, 0x6000 | P | RW),
    "the root in place of an L3": lambda ask, l1: (ask.domain.root + 8, ask.domain.root | P),
    "an L1 in place of an L3": lambda ask, l1: (ask.domain.root + 8, l1 << 12 | P),
    "the hypervisor's memory": lambda ask, l1: (0x6000, 0),
    "an address between two entries": lambda ask, l1: ((l1 << 12) + 4, 0),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_an_update_that_is_not_allowed_changes_nothing(what: str) -> None:
    ask = wide()
    l1 = ask.fresh_frame(POOL)
    assert ask.extended((PIN_L1, l1)) == 0
    address, entry = REFUSALS[what](ask, l1)
    ask.put(DATA, struct.pack("<QQ", address, entry))
    end = GUEST_FRAMES + (4 << 20)
    before = bytes(ask.ram.bytes[:end])
    assert ask.call(1, DATA, 1, 0, xen.DOMID_SELF) == xen.EINVAL
    assert ask.strategy.counts["safety.refused"] == 1
    assert ask.ram.bytes[:end] == before
    check_counts(ask.strategy)


def test_a_root_with_entries_in_the_hypervisors_slots_gets_the_hypervisors() -> None:
    ask = wide()
    root, *_ = new_space(ask)
    ask.ram.write64((root << 12) + 8 * 260, 0x20000 | P | RW | US)      # while it is plain memory, as the guest may
    assert ask.extended((PIN_L4, root)) == 0
    assert ask.ram.read64((root << 12) + 8 * 260) == 0x6003


@pytest.mark.parametrize(("number", "arguments", "answer"), [
    (1, (DATA, 1, 0, 0), xen.ESRCH),                        # another domain
    (1, (DATA, 2049, 0, xen.DOMID_SELF), xen.EINVAL),
    (1, (0xFFFF800000000000, 1, 0, xen.DOMID_SELF), xen.EFAULT),
    (1, (1 << 47, 1, 0, xen.DOMID_SELF), xen.EFAULT),       # no address at all
    (1, (DATA, 0, SYSCALL_ENTRY, xen.DOMID_SELF), xen.EFAULT),
    (14, (0xFFFF800000000000, 0, 0), xen.EINVAL),
    (14, (1 << 40, 0, 0), xen.EINVAL),                      # no table there
    (26, (DATA, 1, 0, xen.DOMID_SELF), xen.EINVAL),         # pin frame 0 as an L1
    (13, (DATA, 129), xen.EINVAL),
    (4, (1 << 47, ENTRY, ENTRY), xen.EINVAL),
    (3, (0x10, STACK), xen.EINVAL),
    (3, (SS & ~3, STACK), 0),
    (25, (xen.SEGBASE_FS, 1 << 47), xen.EINVAL),
    (25, (7, 0), xen.EINVAL),
    (21, (xen.VMASST_CMD_ENABLE, xen.VMASST_TYPE_M2P_STRICT), 0),
    (21, (xen.VMASST_CMD_ENABLE, 2), xen.EINVAL),
])
def test_what_hypercalls_answer(number: int, arguments: tuple[int, ...], answer: int) -> None:
    ask = wide()
    assert ask.call(number, *arguments) == answer
    check_counts(ask.strategy)


def test_users_can_have_a_root_only_in_64_bits() -> None:
    ask = Asking()
    assert ask.extended((NEW_USER_BASE, ask.domain.root >> 12)) == xen.ENOSYS
    assert ask.extended((PIN_L4, ask.domain.mfn(POOL))) == xen.EINVAL


# --- what the guest's kernel can reach --------------------------------------------------------------------


def test_the_machine_to_physical_table_is_read_and_not_written() -> None:
    at = WIDE.m2p + 8 * (FIRST + POOL)
    stop, _ = run(f"movabs rbx, {at:#x}; mov eax, [rbx];" + EXIT64)
    assert stop.exit_code == POOL
    with pytest.raises(GuestFault, match="exception 14, error code 0x3"):       # present, a write; told as the kernel's
        run(f"movabs rbx, {at:#x}; mov [rbx], eax;")


@pytest.mark.parametrize("access", ["mov eax, [rbx]", "mov [rbx], eax", "jmp rbx"])
@pytest.mark.parametrize("at", [0xFFFF820000000000, SYSCALL_ENTRY])
def test_the_hypervisors_own_pages_are_out_of_reach(at: int, access: str) -> None:
    strategy = guest(code(f"movabs rbx, {at:#x}; {access};"), bits=64)
    with pytest.raises(GuestFault, match="exception 14"):
        strategy.run(1000)
    assert hex(at) in strategy.refused[0]


@pytest.mark.parametrize("instruction", ["cli", "hlt", "in al, dx", "mov cr3, rax", "mov cr8, rax", "swapgs", "rdmsr", "sysret", "lgdt [rsp]"])
def test_an_unpatched_kernel_gets_a_protection_fault(instruction: str) -> None:
    with pytest.raises(GuestFault, match="exception 13, error code 0x0"):
        run(instruction)


# --- two sides ------------------------------------------------------------------------------------------

# The kernel at ENTRY names its stack and its handlers, makes a space with a users' root, and goes to its user by HYPERVISOR_iret.
_HANDLERS = 0x104800
#: [vector, level] of traps that lead to the code at _HANDLERS.


def two_sides(user: str, handler: str, *, traps: tuple[tuple[int, int], ...] = (), callback: bool = True, path: str = "portable",
              before: str = "", **chosen: str) -> Paravirtualization:
    """A kernel that goes to ``user`` at USER_CODE; whatever enters the kernel again runs ``handler``."""
    probe = wide()
    l2, l1 = 4, 5
    mfns = [probe.domain.mfn(POOL + i) for i in range(8)]
    root, middle, users, lower = mfns[:4]
    rows = b"".join(WIDE.trap.pack(vector, level, CS, _HANDLERS) for vector, level in traps) + bytes(16)
    frame = struct.pack("<6Q", 0, USER_CODE, CS, 0x202, USER_STACK + 0x1000, SS)
    kernel_entry = probe.ram.read64(probe.ram.read64(probe.domain.root) & 0xFFFFFF000)
    updates = [(root << 12, middle << 12 | 7), (middle << 12, kernel_entry), (users << 12, lower << 12 | 7),
               ((middle << 12) + 8, mfns[l2] << 12 | 7), ((lower << 12) + 8, mfns[l2] << 12 | 7), (mfns[l2] << 12, mfns[l1] << 12 | 7),
               (mfns[l1] << 12, mfns[6] << 12 | 5), ((mfns[l1] << 12) + 8, mfns[7] << 12 | 7)]
    operations = [(PIN_L4, root), (PIN_L4, users), (NEW_BASE, root), (NEW_USER_BASE, users)]
    data = rows.ljust(0x400, b"\0") + b"".join(struct.pack("<QQ", *u) for u in updates).ljust(0x400, b"\0") + b"".join(
        WIDE.extended.pack(*o, 0) for o in operations)
    data = data.ljust(0xC00, b"\0") + frame
    source = call64(0, DATA) + call64(4, _HANDLERS, _HANDLERS, _HANDLERS if callback else 0) + call64(3, SS, 0x104700)
    for pfn in range(POOL, POOL + 6):                       # what becomes a table is no longer writable
        source += call64(14, pfn << 12, (FIRST + pfn) << 12 | 1, 2)
    source += call64(1, DATA + 0x400, len(updates), 0, xen.DOMID_SELF) + call64(26, DATA + 0x800, len(operations), 0, xen.DOMID_SELF)
    source += before + f"mov rsp, {DATA + 0xC00:#x}; push rcx; push r11; push rax; mov eax, 23; syscall;"
    strategy = guest(code(source), data, path=path, bits=64, **chosen)
    assert len(code(source)) < 0x900
    domain = strategy.domain
    domain.write(_HANDLERS, code(handler, _HANDLERS))
    domain.write((POOL + 6) << 12, code(user, USER_CODE))
    return strategy


@pytest.mark.parametrize("path", PATHS)
def test_a_system_call_is_two_crossings_and_two_loads_of_cr3(path: str) -> None:
    """The frame on the kernel's stack: RCX, R11, RIP, CS with RPL 3, RFLAGS, RSP, SS; and back by iret to behind the SYSCALL."""
    handler = ("mov rbx, rsp; mov r12, [rbx + 24]; mov r13, [rbx + 16]; mov r14, [rbx + 40];"
               "pop rcx; pop r11; push 0; push rcx; push r11; push rax; mov eax, 23; syscall;")
    user = "mov eax, 5; syscall; mov r15, rcx; mov eax, 6; int 0x81;"
    strategy = two_sides(user, f"cmp eax, 6; je end; {handler} end:" + "mov rax, r12; cmp r15, r13; jne bad; cmp rcx, r15; jne bad;"
                         f"movabs rdx, {USER_STACK + 0x1000:#x}; cmp r14, rdx; jne bad; jmp out; bad: mov eax, 99; out: and eax, 0xffff;"
                         + EXIT64, traps=((0x81, 3),), path=path)
    assert strategy.run(10_000).exit_code == CS
    counts, events = strategy.counts, strategy.snapshot().events
    assert strategy.refused == []
    assert counts["crossing.system_call"] == 2                  # the SYSCALL and the INT
    assert counts["crossing.return"] == counts["hypercall.iret"] == 2
    assert counts["guest.side"] == 4
    assert events["trap.int"] == 1
    hypercalls = sum(n for kind, n in events.items() if kind.startswith("hypercall."))
    assert events["trap.syscall"] == hypercalls + 1
    check_counts(strategy)


@pytest.mark.parametrize("path", PATHS)
def test_instructions_count_as_the_halfs_that_runs_them(path: str) -> None:
    """Both halves are at CPL 3; a user of 5 000 turns of two instructions, and a kernel that takes no more than a few hundred."""
    strategy = two_sides("mov ecx, 5000; again: dec ecx; jnz again; syscall", "xor eax, eax;" + EXIT64, path=path)
    assert strategy.run(100_000).exit_code == 0
    counted = strategy.snapshot()
    assert counted.user == 1 + 2 * 5000 + 1
    assert 0 < counted.kernel < 300
    assert counted.events["retired.user"] == counted.user


def test_users_make_no_hypercalls() -> None:
    """SYSCALL of a user with the number of a hypercall is a system call, whatever it carries."""
    strategy = two_sides(call64(29, xen.SCHEDOP_SHUTDOWN, DATA), "mov ebx, eax; mov eax, ebx;" + EXIT64)
    assert strategy.run(10_000).exit_code == 29
    assert strategy.counts.get("hypercall.sched_op", 0) == 0


def test_without_a_callback_syscall_is_no_instruction() -> None:
    """#UD with RIP at the instruction, in a frame with RCX and R11."""
    strategy = two_sides("nop; syscall", "mov rax, [rsp + 16];" + EXIT64, traps=((6, 0),), callback=False)
    assert strategy.run(10_000).exit_code == USER_CODE + 1


def test_a_users_page_fault_says_user_and_a_kernels_does_not() -> None:
    handler = "mov rax, [rsp + 16]; mov rbx, [rsp + 32]; and ebx, 3; shl ebx, 8; or eax, ebx;" + EXIT64
    strategy = two_sides(f"mov eax, [{ENTRY:#x}]", handler, traps=((14, 0),))
    assert strategy.run(10_000).exit_code == 0x304      # not there in the users' root; RPL 3
    assert strategy.counts["crossing.exception"] == strategy.counts["reflect.14"] == 1
    strategy = two_sides("nop", handler, traps=((14, 0),), before="mov eax, [0x7f000000];")
    assert strategy.run(10_000).exit_code == 0x000


@pytest.mark.parametrize(("at", "error"), [(WIDE.m2p + 8 * FIRST, 4), (0xFFFF820000000000, 5), (DATA, 4)])
def test_users_reach_neither_the_hypervisor_nor_their_kernel(at: int, error: int) -> None:
    """The machine-to-physical table is not in their root, nor is their kernel; the hypervisor's own pages are there, but supervisor."""
    strategy = two_sides(f"movabs rbx, {at:#x}; mov eax, [rbx]", "mov rax, [rsp + 16];" + EXIT64, traps=((14, 0),))
    assert strategy.run(10_000).exit_code == error


@pytest.mark.parametrize(("level", "code_"), [(3, 0), (1, 0x81 * 8 + 2), (0, 0x81 * 8 + 2)])
def test_int_n_of_a_user_needs_level_3(level: int, code_: int) -> None:
    """Else #GP with the vector in its error code, at the instruction."""
    strategy = two_sides("xor eax, eax; int 0x81", "test eax, eax; mov rax, [rsp + 16]; jnz $ + 2;"
                         f"cmp rax, {0x81 * 8 + 2}; je out; xor eax, eax; out:" + EXIT64, traps=((0x81, level), (13, 0)))
    assert strategy.run(10_000).exit_code == code_


def test_the_kernel_may_raise_what_its_users_may_not() -> None:
    strategy = two_sides("nop", "mov eax, 77;" + EXIT64, traps=((0x81, 1),), before="int 0x81;")
    assert strategy.run(10_000).exit_code == 77


def test_each_side_has_a_gs_base_of_its_own() -> None:
    bases = call64(25, xen.SEGBASE_GS_KERNEL, DATA + 0xD00) + call64(25, xen.SEGBASE_GS_USER, USER_STACK)
    before = bases + "xor esi, esi; mov qword ptr gs:[rsi], 0x111;"
    handler = "xor esi, esi; mov rax, gs:[rsi]; add rax, rdi;" + EXIT64
    strategy = two_sides("mov esi, 8; mov edi, 0x222; mov gs:[rsi], rdi; mov rdi, gs:[rsi]; syscall", handler, before=before)
    assert strategy.run(10_000).exit_code == 0x333
    assert strategy.machine.ram.read64(strategy.domain.machine((POOL + 7) << 12) + 8) == 0x222


@pytest.mark.parametrize(("frame", "match"), [
    ((0, ENTRY, 0xE02B, 0x202, STACK, SS), "selectors 0xe02b"),
    ((0, ENTRY, xen.FLAT_RING3_CS32, 0x202, STACK, SS), "selectors 0xe023"),
    ((0, ENTRY, 0x8, 0x202, STACK, SS), "selectors 0x8"),
    ((0, ENTRY, CS & ~3, 0x202, STACK, 0x18), "and 0x18"),
    ((0, ENTRY, CS, 0x202, STACK, SS), "no page tables"),
    ((0, 1 << 47, CS & ~3, 0x202, STACK, SS), "no address"),
])
def test_iret_goes_only_where_the_guest_may_be(frame: tuple[int, ...], match: str) -> None:
    with pytest.raises(GuestRefused, match=match):
        run(f"mov rsp, {DATA:#x}; push rcx; push r11; push rax; mov eax, 23; syscall;", struct.pack("<6Q", *frame))


def test_a_guest_that_runs_its_stack_into_the_hypervisor_is_ended() -> None:
    with pytest.raises(GuestError, match="which is not its own"):
        run(call64(0, DATA) + "movabs rsp, 0xffff800000001000; ud2", WIDE.trap.pack(6, 0, CS, ENTRY) + bytes(16))


# --- rings and rights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mfn", "fine"), [(FIRST + POOL, True), (0x20, False), (FIRST + 8192, False)])
def test_a_block_request_names_frames_of_the_guests_own(mfn: int, fine: bool) -> None:
    """io/blkif.h in 64 bits: id at 8, sector at 16, segments from 24, 112 bytes."""
    ask = Asking(guest(bits=64, disk=bytes(range(256)) * 2 * 8))
    before = poison(ask.strategy)
    ring = ask.domain.mfn(POOL + 1)
    ask.ram.write(ring << 12, struct.pack("<4I", 0, 1, 0, 1) + bytes(4080))
    assert ask.call(54, 0, ring, DATA) == 0
    port, sectors = struct.unpack("<II", ask.hypervisor.memory.read(DATA, 8))
    assert sectors == 8
    request = struct.pack("<BBHxxxxQQIBBxx", 0, 1, 0, 0x1122334455667788, 3, mfn, 0, 1)
    ask.ram.write((ring << 12) + 64, request)
    ask.ram.write32(ring << 12, 1)
    ask.put(DATA, struct.pack("<I", port))
    assert ask.call(32, xen.EVTCHNOP_SEND, DATA) == 0
    if fine:
        assert ask.strategy.machine.wait()
        ask.hypervisor.interrupt()
    identity, operation, status = struct.unpack("<QBxh", ask.ram.read((ring << 12) + 64, 12))
    assert (identity, operation, status) == (0x1122334455667788, 0, 0 if fine else -1)
    assert len(ask.strategy.refused) == (not fine)
    assert ask.ram.read(ask.domain.machine(POOL << 12), 512) == (bytes(range(256)) * 2 if fine else bytes(512))
    assert untouched(ask.strategy) == before


_POINTERS = st.sampled_from((0, DATA, DATA + 0xFF8, 0x5000, 0x1FFFFF0, 0x2000000, (1 << 47) - 4, 1 << 47, 0xFFFF800000000000, 0xFFFF820000012000,
                             0xFFFF880000000000, 2**64 - 1))
_WORDS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 40), _POINTERS, st.just(xen.DOMID_SELF),
                   st.integers(FIRST, FIRST + POOL + 8), st.sampled_from((CS, SS, 0x20, 0xF4, 0xC18, 0x3F8)))
_NUMBERS = st.sampled_from([n for n, name in xen.HYPERCALLS.items() if name != "iret"] + [6, 7, 255, 0x7FFFFFFF])
_CALLS = st.tuples(_NUMBERS, st.lists(_WORDS, min_size=5, max_size=5), st.lists(_WORDS, min_size=8, max_size=8))


@pytest.mark.parametrize("memory", ["direct", "static"])
def test_any_hypercall_with_any_arguments_is_answered(memory: str) -> None:
    strategy = guest(bits=64, memory=memory, disk=bytes(512 * 8))
    before = poison(strategy)
    ask = Asking(strategy)

    @given(_CALLS)
    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def answered(case: tuple[int, list[int], list[int]]) -> None:
        number, arguments, words = case
        if xen.HYPERCALLS.get(number) == "port_io" and arguments[0] == 1 and arguments[1] == 0xF4:
            return                      # the guest's own end
        ask.put(DATA, struct.pack("<8Q", *words))
        with contextlib.suppress(GuestError):
            assert isinstance(ask.call(number, *arguments), int)

    answered()
    check_counts(strategy)
    assert untouched(strategy) == before


@given(st.binary(max_size=64), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_code_ends_as_a_guest_does(random: bytes, handlers: bool) -> None:
    """Random bytes as the guest's kernel, with handlers that go nowhere good for some exceptions."""
    traps = WIDE.trap.pack(14, 0, CS, ENTRY) + WIDE.trap.pack(13, 4, CS, ENTRY) + bytes(16)
    strategy = guest((code(call64(0, DATA)) if handlers else b"") + random + b"\xeb\xfe", traps, bits=64)
    before = nearby(strategy)
    with contextlib.suppress(GuestError):
        strategy.run(3000)
    assert nearby(strategy) == before


@given(st.lists(_WORDS, min_size=9, max_size=9))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_frame_for_iret_goes_to_ring_3_or_ends_the_guest(words: list[int]) -> None:
    strategy = guest(code(f"mov rsp, {DATA:#x}; mov eax, 23; syscall"), struct.pack("<9Q", *words), bits=64)
    before = nearby(strategy)
    try:
        strategy.run(200)
    except GuestRefused:
        pass                                                         # it ended in the hypervisor
    except GuestError:
        strategy.machine.cpu.load()
        assert strategy.machine.cpu.cpl == 3
        assert strategy.machine.cpu.system_flags & 0x23200 == 0x200  # IF on, IOPL 0, VM off
    assert isinstance(strategy.hypervisor, WideHypervisor) and not strategy.hypervisor.in_users
    assert nearby(strategy) == before


@given(st.binary(max_size=64))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_code_of_a_user_ends_as_a_guest_does(random: bytes) -> None:
    """Whatever a user runs, it stays a user: the hypervisor, and its own kernel's pages, are as they were."""
    strategy = two_sides("nop", "mov eax, 3;" + EXIT64, traps=tuple((vector, 0) for vector in (0, 3, 6, 13, 14)))
    domain, ram = strategy.domain, strategy.machine.ram
    domain.write((POOL + 6) << 12, random + b"\xeb\xfe")
    before = nearby(strategy)
    with contextlib.suppress(GuestError):
        assert strategy.run(3000).exit_code == 3
    assert nearby(strategy) == before
    assert ram.read(domain.machine(_HANDLERS), 16) == code("mov eax, 3;" + EXIT64, _HANDLERS)[:16]
    check_counts(strategy)


_FRAMES = st.integers(POOL, POOL + 7)
_ENTRIES = st.tuples(_FRAMES, st.sampled_from((0, P, P | RW, P | RW | US, P | 0x20, 0x83, P | 1 << 45)))
_OPERATIONS = st.one_of(
    st.tuples(st.just("update"), _FRAMES, st.sampled_from((0, 1, 255, 256, 260, 271, 272, 511)), _ENTRIES),
    st.tuples(st.just("extended"), st.sampled_from((0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 12, 15)), _FRAMES),
    st.tuples(st.just("map"), _FRAMES, _ENTRIES),
    st.tuples(st.just("gdt"), st.lists(_FRAMES, max_size=3)),
    st.tuples(st.just("descriptor"), _FRAMES, st.integers(0, 2**64 - 1)),
    st.tuples(st.just("space"), _FRAMES, _FRAMES),
)


@given(st.lists(_OPERATIONS, min_size=1, max_size=25))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_counts_agree_with_the_tables_whatever_is_asked(operations: list[tuple]) -> None:  # type: ignore[type-arg]
    ask = wide()
    domain = ask.domain
    for pfn in range(POOL, POOL + 8):
        ask.fresh_frame(pfn)
    for kind, *rest in operations:
        if kind == "update":
            pfn, slot, (target, flags) = rest
            ask.update(((domain.mfn(pfn) << 12) + 8 * slot, domain.mfn(target) << 12 | flags))
        elif kind == "extended":
            ask.extended((rest[0], domain.mfn(rest[1])))
        elif kind == "map":
            ask.map(rest[0] << 12, domain.mfn(rest[1][0]) << 12 | rest[1][1])
        elif kind == "gdt":
            ask.put(DATA, struct.pack(f"<{len(rest[0])}Q", *(domain.mfn(pfn) for pfn in rest[0])))
            ask.call(2, DATA, 512 * len(rest[0]))
        elif kind == "descriptor":
            ask.call(10, domain.mfn(rest[0]) << 12, rest[1])
        else:
            root, middle = (domain.mfn(pfn) for pfn in rest)
            ask.update((middle << 12, ask.ram.read64(ask.ram.read64(domain.root) & 0xFFFFFF000)), (root << 12, middle << 12 | P | RW))
    check_counts(ask.strategy)
    assert ask.ram.read(0x20000, 0xE000) == bytes(0xE000)   # the hypervisor's part was not the guest's to write


@pytest.mark.parametrize(("bits", "ram", "fits"), [(32, 256, True), (64, 896, True), (64, 1100, False)])
def test_a_guest_with_more_memory_has_a_longer_machine_to_physical_table(bits: int, ram: int, fits: bool) -> None:
    """Its last frame is in the table, and the table covers nothing else of the hypervisor's."""
    strategy = Paravirtualization(Machine(ram + 32 << 20, path="portable"), {"memory": "direct", "ram": min(ram, 896)})
    if not fits:
        with pytest.raises(UnsupportedByStrategy, match="has room for 1024 MiB"):
            strategy.load(image(b"\xeb\xfe", bits=bits), "")
        return
    strategy.load(image(b"\xeb\xfe", bits=bits), "")
    ask = Asking(strategy)
    last = ask.domain.pages - 1
    at = ask.abi.m2p + ask.abi.word * ask.domain.mfn(last)
    assert int.from_bytes(strategy.machine.cpu.read_linear(at, ask.abi.word), "little") == last
    assert ask.update((ask.domain.mfn(last) << 12 | xen.MMU_MACHPHYS_UPDATE, 5)) == 0
    assert int.from_bytes(strategy.machine.cpu.read_linear(at, ask.abi.word), "little") == 5
    assert not ask.domain.tables.descriptor(ask.abi.kernel_cs).base and not ask.domain.shared.pending and ask.domain.shared.masked
    check_counts(strategy)
