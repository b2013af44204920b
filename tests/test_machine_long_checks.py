"""What a CPU refuses and Unicorn does not: stack addresses and transfers that are not canonical, a null SS of another ring, MOVBE of registers.

On the bare machine, and as an instruction that a VMM carries out because its operand is in a device.
"""

from __future__ import annotations

import struct

import pytest
from longlab import SECRET, long_kernel
from machinelab import CODE, CODE0, DATA, DATA0, DEBUG_EXIT, GDT, LONG, PATHS, STACK0, TASK, Bench, asm, kernel, long_bench
from paginglab import SCHEMES, boot

from vmlab.errors import TripleFault
from vmlab.guests import GuestImage
from vmlab.machine.decode import decode
from vmlab.machine.long_checks import canonical
from vmlab.machine.pc import Stop, StopReason
from vmlab.machine.state import RBX, RDI
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation

END = "xor eax, eax;" + DEBUG_EXIT
NOT = 0xAAAA_AAAA_AAAA_AAAA
#: A handler that notes its vector, the error code and the frame's RIP and RSP, and ends the run.
NOTE = "mov rbx, {vector}; pop rcx; pop rdi; mov rsi, [rsp + 16]; " + END


@pytest.mark.parametrize(("address", "is_canonical"), [
    (0, True), (0x7FFF_FFFF_FFFF, True), (0x8000_0000_0000, False), (NOT, False), (0xFFFF_7FFF_FFFF_FFFF, False), (0xFFFF_8000_0000_0000, True),
    (0xFFFF_FFFF_FFFF_FFFF, True)])
def test_canonical_addresses(address: int, is_canonical: bool) -> None:
    assert canonical(address) is is_canonical


#: An instruction with RAX not canonical, and the vector that it raises: #GP, or #SS where the stack segment is meant (SDM Vol. 3A §6.15).
REFERENCES = {
    "or qword ptr [rax], 0": 13, "or qword ptr [rsp + rax], 0": 12, "or qword ptr [rbp + rax], 0": 12, "mov ecx, [rsi + rax]": 13,
    "mov rcx, fs:[rbp + rax]": 13, "mov rsp, rax; nop; push rcx": 12, "mov rsp, rax; nop; pop rcx": 12, "mov rsp, rax; nop; ret": 12,
    "mov rsp, rax; nop; pushfq": 12, "mov rbp, rax; nop; leave": 12, "mov rsp, rax; nop; call l; l: nop": 12,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", REFERENCES)
def test_an_address_that_is_not_canonical_faults_as_what_it_was_for(source: str, path: str) -> None:
    bench = long_bench(f"movabs rax, {NOT:#x}; {source}", path, {v: (NOTE.format(vector=v), 1, 0) for v in (12, 13)})
    assert bench.run() == Stop(StopReason.EXIT, 0)
    bench.cpu.load()
    assert bench.cpu.gpr(RBX) == REFERENCES[source]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transfer", ["jmp rax", "call rax", "push rax; ret", "push rax; push rax; pop rax; ret 8"])
def test_a_transfer_to_where_nothing_can_be_is_its_own_fault(transfer: str, path: str) -> None:
    """RIP of the frame is the transfer's, RSP what it was before it, and it did not retire."""
    before = f"movabs rax, {NOT:#x}; mov r8, rsp; nop;"
    start, _, last = transfer.rpartition("; ")
    before += f"{start};" if start else ""
    bench = long_bench(before + last, path, {13: (NOTE.format(vector=13), 1, 0)})
    assert bench.run() == Stop(StopReason.EXIT, 0)
    bench.cpu.load()
    assert bench.cpu.gpr(RBX) == 13 and bench.cpu.gpr(RDI) == LONG + len(asm(before, LONG, 64))
    assert bench.cpu.gpr(6) == bench.cpu.gpr(8) - 8 * start.count("push") + 8 * start.count("pop")
    assert bench.counts().events.get("machine.indirect", 0) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("selector", "faults"), [(0, False), (1, True), (3, True), (DATA0, False)])
def test_a_null_ss_has_its_rings_rpl(selector: int, faults: bool, path: str) -> None:
    handlers = {13: (NOTE.format(vector=13), 1, 0)}
    for source in (f"mov eax, {selector}; mov ss, eax; mov ebx, 1; {END}",
                   f"mov word ptr [{DATA:#x}], {selector}; mov ss, word ptr [{DATA:#x}]; mov ebx, 1; {END}"):
        bench = long_bench(source, path, handlers)
        assert bench.run() == Stop(StopReason.EXIT, 0)
        bench.cpu.load()
        assert bench.cpu.gpr(RBX) == (13 if faults else 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("raw", "defined"), [
    ("0f38f0c0", False), ("0f38f1c8", False), ("660f38f0c1", False), ("0f38f003", True), ("f20f38f0c0", True)])
def test_movbe_of_registers_is_undefined(raw: str, defined: bool, path: str) -> None:
    """F2 0F 38 F0 is CRC32, which takes registers."""
    code = asm(f"mov ebx, {DATA:#x}", CODE) + bytes.fromhex(raw) + asm("mov ebx, 1;" + END)
    bench = Bench(code, {6: f"mov ebx, 6; {END}"}, path=path)
    assert bench.run() == Stop(StopReason.EXIT, 0)
    bench.cpu.load()
    assert bench.cpu.gpr(RBX) == (1 if defined else 6)
    found = decode(bytes.fromhex(raw) + b"\x90" * 8, 32)
    assert found is not None and found.undefined is not defined and found.size == len(raw) // 2


# ---- carried out by a VMM, for the operand is in a device
MMIO = 0xFF00_0000
_PUT = "mov word ptr [{0:#x}], {1:#x};"
_POINTER = f"mov dword ptr [{MMIO + 4:#x}], {GDT:#x}; mov word ptr [{MMIO + 2:#x}], {7 * 8 - 1:#x};"
#: 32-bit instructions whose operand, or stack, is in the test device's memory; all registers and tables are compared.
OPERANDS = {
    "ltr": f"and byte ptr [{GDT + TASK + 5:#x}], 0xfd;" + _PUT.format(MMIO, TASK) + f"ltr word ptr [{MMIO:#x}]; str ebx;",
    "lldt": _PUT.format(MMIO, 0) + f"lldt word ptr [{MMIO:#x}]; sldt ebx;",
    "mov es": _PUT.format(MMIO, DATA0) + f"mov es, word ptr [{MMIO:#x}];",
    "mov fs null": _PUT.format(MMIO, 3) + f"mov fs, word ptr [{MMIO:#x}];",
    "mov es refused": _PUT.format(MMIO, 0x1230) + f"mov es, word ptr [{MMIO:#x}];",
    "lgdt": _POINTER + f"lgdt [{MMIO + 2:#x}]; sgdt [{DATA:#x}];",
    "lidt": f"sidt [{MMIO:#x}]; lidt [{MMIO:#x}]; sidt [{DATA:#x}];",
    "lss": f"mov dword ptr [{MMIO:#x}], {STACK0 - 64:#x};" + _PUT.format(MMIO + 4, DATA0) + f"lss esp, [{MMIO:#x}];",
    "jmp far": f"mov eax, l; mov [{MMIO:#x}], eax;" + _PUT.format(MMIO + 4, CODE0) + f".byte 0xff, 0x2d; .long {MMIO:#x}; hlt; l: nop;",
    "call far": f"mov eax, l; mov [{MMIO:#x}], eax;" + _PUT.format(MMIO + 4, CODE0) + f".byte 0xff, 0x1d; .long {MMIO:#x}; hlt; l: pop ecx; pop edx;",
    "stack": f"mov ebp, esp; mov esp, {MMIO + 0x100:#x}; push es; pop es; push 0x10; pop fs; mov ecx, esp; mov esp, ebp;",
    "iret": f"mov ebp, esp; mov esp, {MMIO + 0x100:#x}; pushfd; push cs; mov eax, l; push eax; iretd; hlt; l: mov esp, ebp;",
    "lmsw": f"smsw eax; or eax, 8; mov [{MMIO:#x}], eax; lmsw word ptr [{MMIO:#x}]; smsw ebx; clts;",
    "smsw": f"smsw [{MMIO:#x}]; mov eax, [{MMIO:#x}]; and eax, 0xffff;",
}


def operand_kernel(body: str) -> GuestImage:
    return kernel(body + END, {13: "pop ebx; mov esi, 0x13; add esp, 12;" + END})


@pytest.mark.parametrize("scheme", [*SCHEMES, "hardware-assisted/static"])
@pytest.mark.parametrize("name", OPERANDS)
def test_system_instructions_with_an_operand_in_a_device(name: str, scheme: str) -> None:
    kind, parameters = SCHEMES.get(scheme, (HardwareAssisted, {}))
    image = operand_kernel(OPERANDS[name])
    native, here = boot(Native, image), boot(kind, image, parameters)
    assert native.run(100_000) == here.run(100_000) == Stop(StopReason.EXIT, 0)
    assert here.state_digest() == native.state_digest()
    if kind is HardwareAssisted:
        assert any(kind.startswith("emulate.") and n for kind, n in here.counts.items())


@pytest.mark.parametrize("memory", ["tracing", "lazy", "nested"])
@pytest.mark.parametrize("source", [
    f"mov rbx, [r10]; mov word ptr [rbx], {DATA0}; mov ss, word ptr [rbx]; mov r12, ss",
    "mov rbx, [r10]; mov word ptr [rbx], 3; mov ss, word ptr [rbx]",
    "mov rbx, [r10]; mov word ptr [rbx], 0; mov ss, word ptr [rbx]; mov r12, ss", f"mov rbx, [r10]; movabs rax, {NOT:#x}; mov [rbx], rax; jmp [rbx]",
    "mov rbx, [r10]; lea rax, [rip + 16]; mov [rbx], rax; mov word ptr [rbx + 8], 8; .byte 0x48, 0xff, 0x2b; hlt; nop; nop; nop; nop; nop; nop"])
def test_the_same_in_64_bit_code(source: str, memory: str) -> None:
    """The kernel maps the test device's memory beside the local APIC's."""
    table = {DATA: struct.pack("<Q", MMIO)}
    body = "mov rax, [0x40000 + 0x1000 + 24]; and rax, -4096; movabs rcx, 0xff00009f; mov [rax + 8 * 0x1f8], rcx; invlpg [rbx];" + source + ";" + END
    image = long_kernel(body, {13: "pop r11; mov r13, 0x13; " + END}, data=table)
    native, here = boot(Native, image), boot(HardwareAssisted, image, {"memory": memory})
    assert native.run(100_000) == here.run(100_000) == Stop(StopReason.EXIT, 0)
    assert here.guest_state().gpr == native.guest_state().gpr and here.guest_state().selectors == native.guest_state().selectors



# ---- SMAP and SMEP
SMAP, SMEP = 1 << 21, 1 << 20
_SET = "mov rax, cr4; or eax, {0:#x}; mov cr4, rax;"
STAC, CLAC = ".byte 0x0f, 0x01, 0xcb;", ".byte 0x0f, 0x01, 0xca;"


@pytest.mark.parametrize("memory", ["tracing", "lazy", "nested"])
@pytest.mark.parametrize("path", PATHS)
def test_smap_is_the_guests_own(path: str, memory: str) -> None:
    """Every page of this kernel is its users' too: with AC clear a read and a store fault, with AC set they do not; the VMM hands the fault on."""
    handler = STAC + "inc r12; pop r13; mov r14, cr2; or dword ptr [rsp + 16], 0x40000; iretq"
    body = (STAC + _SET.format(SMAP) + "mov rbx, [r10];" + CLAC + "mov rbx, [r10 + 8];" + CLAC + "mov [r10 + 16], rbx;"
            + STAC + "mov [r10 + 24], rbx;" + END)
    image = long_kernel(body, {14: handler}, data={DATA: struct.pack("<4Q", 1, 2, 3, 4)})
    native, here = boot(Native, image), boot(HardwareAssisted, image, {"memory": memory}, path)
    assert native.run(100_000) == here.run(100_000) == Stop(StopReason.EXIT, 0)
    assert native.guest_state().gpr[12:15] == (2, 3, DATA + 16)         # two faults, the last of a store to a page that is present
    assert here.guest_state().gpr == native.guest_state().gpr and here.read_guest(DATA, 32) == struct.pack("<4Q", 1, 2, 2, 2)


@pytest.mark.parametrize("memory", ["tracing", "lazy", "nested"])
def test_smep_is_the_guests_own(memory: str) -> None:
    """From the kernel's own page into one of its users': a page fault whose handler is such a page too, and so no handler at all."""
    image = long_kernel(f"mov eax, {SECRET}; jmp rax", {14: END}, data={SECRET: asm(_SET.format(SMEP) + f"mov eax, {LONG:#x}; jmp rax", SECRET, 64)})
    for strategy in (boot(Native, image), boot(HardwareAssisted, image, {"memory": memory})):
        with pytest.raises(TripleFault):
            strategy.run(100_000)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.startswith("hardware")])
def test_a_kernel_above_ring_0_is_told_that_it_has_neither(scheme: str) -> None:
    kind, parameters = SCHEMES[scheme]
    source = f"mov eax, 7; xor ecx, ecx; cpuid; mov esi, ebx; mov eax, cr4; or eax, {SMEP:#x}; mov cr4, eax; {END}"
    image = kernel(source, {13: "mov edi, 13; " + END})
    native, here = boot(Native, image), boot(kind, image, parameters)
    assert native.run(100_000) == here.run(100_000) == Stop(StopReason.EXIT, 0)
    features, refused = here.guest_state().gpr[6:8]
    hidden = 1 << 7 | 1 << 20 if kind is BinaryTranslation else 0       # a trapping VMM is not asked: CPUID runs on the CPU
    assert native.guest_state().gpr[6] ^ features == hidden and refused == 13 and native.guest_state().gpr[7] == 0


@pytest.mark.parametrize("path", PATHS)
def test_smsw_into_a_register_stores_all_of_cr0(path: str) -> None:
    """CR0.CD is bit 30; into memory, and with the operand-size prefix, SMSW stores a word."""
    source = f"mov eax, cr0; or eax, 0x40000000; mov cr0, eax; mov eax, -1; smsw eax; mov ebx, -1; .byte 0x66, 0x0f, 0x01, 0xe3; {END}"
    image = kernel("mov ecx, -1; mov [0x5000], ecx; smsw [0x5000];" + source.replace("xor eax, eax;", "mov ebp, eax; xor eax, eax;"))
    ways = [(Native, {}), *((HardwareAssisted, {"memory": memory}) for memory in ("static", "lazy", "nested")), SCHEMES["binary-translation/lazy"]]
    for kind, parameters in ways:
        strategy = boot(kind, image, parameters, path)
        assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
        assert strategy.guest_state().gpr[5] == 0x40000011 and strategy.guest_state().gpr[3] == 0xFFFF0011
        assert strategy.read_guest(0x5000, 4) == b"\x11\0\xff\xff"


@pytest.mark.parametrize("scheme", ["native", *SCHEMES, "hardware-assisted/static"])
@pytest.mark.parametrize("path", PATHS)
def test_cr4_takes_only_the_bits_that_cpuid_tells_of(scheme: str, path: str) -> None:
    """VME, UMIP, LA57, VMXE, PCIDE, PKE and what is reserved raise #GP and leave CR4 alone (SDM Vol. 3A §2.5)."""
    kind, parameters = {"native": (Native, {}), "hardware-assisted/static": (HardwareAssisted, {})}.get(scheme) or SCHEMES[scheme]
    tries = "".join(f"mov eax, {1 << bit:#x}; mov cr4, eax;" for bit in (0, 1, 11, 12, 13, 14, 15, 17, 19, 22, 23, 31))
    image = kernel(f"mov eax, 0x610; mov cr4, eax; {tries} mov ebx, cr4; {END}", {13: "inc esi; add esp, 4; add dword ptr [esp], 3; iretd"})
    strategy = boot(kind, image, parameters, path)
    assert strategy.run(100_000) == Stop(StopReason.EXIT, 0)
    assert strategy.guest_state().gpr[6] == 12 and strategy.guest_state().gpr[3] == strategy.guest_state().cr4 == 0x610
