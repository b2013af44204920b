"""Boot loaders: tiny kernels of our own by every protocol, what they find in memory, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import struct
from pathlib import Path
from types import MappingProxyType

import pytest
from machinelab import PATHS, asm

from vmlab import guests, strategies
from vmlab.errors import ConfigError, GuestImageError
from vmlab.guests import boot, bzimage, files, lz4
from vmlab.guests.boot import firmware, pvh, sector
from vmlab.guests.boot.layout import RAM
from vmlab.guests.image import GuestImage, Segment
from vmlab.machine.pc import Machine, StopReason
from vmlab.strategies.techniques import machine_memory

AT = 0x100000
#: Ends the run with EAX as exit code.
EXIT = "mov dx, 0xf4; out dx, eax; hlt;"
TECHNIQUES = [("native", {}), ("hardware-assisted", {"memory": "nested"}), ("hardware-assisted", {"memory": "lazy"})]


def image(source: str | bytes, protocol: str = "multiboot", *, at: int = AT, bits: int = 32, **more: object) -> GuestImage:
    code = source if isinstance(source, bytes) else asm(source, at, bits)
    made = GuestImage("tiny", (Segment(at, code, len(code)),), at, None, MappingProxyType({}), "0" * 64, protocol)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def ended(guest: GuestImage, technique: str = "native", parameters: dict[str, str | int] | None = None, line: str = "",
          path: str = "portable") -> int:
    """The exit code of the guest's run."""
    chosen = dict(parameters or {})
    machine = Machine(machine_memory(chosen), path, drives=guest.drives)
    strategy = strategies.load(technique)(machine, chosen)
    strategy.load(guest, line)
    stop = strategy.run(100_000)
    assert stop.reason is StopReason.EXIT, bytes(machine.console)
    assert stop.exit_code is not None
    return stop.exit_code


@pytest.mark.parametrize(("technique", "parameters"), [*TECHNIQUES, ("trap-and-emulate", {}), ("binary-translation", {})])
def test_a_multiboot_kernel_finds_its_modules(technique: str, parameters: dict[str, str | int]) -> None:
    """EAX is the magic number; the second module's first word is the exit code."""
    source = f"cmp eax, 0x2badb002; jne no; mov ecx, [ebx+24]; mov ecx, [ecx+16]; mov eax, [ecx]; {EXIT} no: xor eax, eax; {EXIT}"
    guest = image(source, modules=(b"first", struct.pack("<I", 0x1234) + b"second"))
    assert ended(guest, technique, parameters) == 0x1234


@pytest.mark.parametrize("path", PATHS)
def test_a_pvh_kernel_finds_start_info(path: str) -> None:
    """EBX points at the structure: magic, one module, whose first word is the exit code."""
    source = (f"mov eax, [ebx]; cmp eax, {pvh.MAGIC:#x}; jne no; cmp dword ptr [ebx+12], 1; jne no; mov ecx, [ebx+16]; mov ecx, [ecx];"
              f"mov eax, [ecx]; {EXIT} no: xor eax, eax; {EXIT}")
    assert ended(image(source, "pvh", modules=(struct.pack("<I", 77),)), path=path) == 77


def bzimage_file(kernel: bytes, *, xloadflags: int = 0, payload: bytes = b"", size: int | None = None) -> bytes:
    """One setup sector, then the protected-mode kernel, relocatable, preferring 1 MiB, with the payload behind it."""
    head = bytearray(1024)
    whole = kernel + payload
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, ((size or len(whole)) + 15) // 16)
    struct.pack_into("<H", head, 0x1FE, 0xAA55)
    head[0x201] = 0x6A
    struct.pack_into("<4sH", head, 0x202, b"HdrS", 0x20F)
    head[0x211], head[0x234], head[0x236] = 1, 1, xloadflags
    struct.pack_into("<I", head, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<I", head, 0x238, 255)
    struct.pack_into("<II", head, 0x248, len(kernel), len(payload))
    struct.pack_into("<QI", head, 0x258, AT, 0x4000)
    return bytes(head) + whole


@pytest.mark.parametrize(("technique", "parameters"), [*TECHNIQUES, ("trap-and-emulate", {})])
def test_linux32_enters_with_the_zero_page(technique: str, parameters: dict[str, str | int]) -> None:
    """ESI is the zero page: the initrd's first word plus the command line's first byte; EBP, EDI and EBX are 0, CS is __BOOT_CS."""
    source = ("mov ecx, [esi+0x218]; mov eax, [ecx]; mov ecx, [esi+0x228]; movzx ecx, byte ptr [ecx]; add eax, ecx; or ebx, ebp; or ebx, edi;"
              f"add eax, ebx; mov cx, ds; sub ecx, 0x18; movzx ecx, cx; shr ecx, 2; add eax, ecx; {EXIT}")
    guest = files.parse("tiny", bzimage_file(asm(source, AT, 32)))
    assert guest.protocol == "linux32"
    guest = dataclasses.replace(guest, modules=(struct.pack("<I", 1000),))
    assert ended(guest, technique, parameters, "A") == 1000 + ord("A")


@pytest.mark.parametrize(("technique", "parameters"), TECHNIQUES)
def test_linux64_enters_in_long_mode(technique: str, parameters: dict[str, str | int]) -> None:
    """RAX holds what only 64-bit code can make; RSI is the zero page, whose memory map has three entries."""
    source = f"mov rax, 0x100000000; shr rax, 30; movzx ecx, byte ptr [rsi+0x1e8]; add eax, ecx; {EXIT}"
    kernel = bytes(0x200) + asm(source, AT + 0x200, 64)
    guest = files.parse("tiny", bzimage_file(kernel, xloadflags=1))
    assert guest.protocol == "linux64"
    assert ended(guest, technique, parameters) == 4 + 3


@pytest.mark.parametrize(("technique", "parameters"), TECHNIQUES)
def test_a_boot_sector_starts_in_real_mode(technique: str, parameters: dict[str, str | int]) -> None:
    code = asm("mov ax, dx; add ax, sp; sub ax, 0x7c00; movzx eax, al; mov dx, 0xf4; out dx, eax; hlt", sector.AT, 16)
    disk = code.ljust(510, b"\0") + b"\x55\xaa" + bytes(100)
    guest = files.parse("disk.img", disk)
    assert guest.protocol == "sector"
    assert len(guest.drives[0]) == 1024
    assert ended(guest, technique, parameters) == sector.FIRST_DISK


def test_who_calls_the_firmware_is_told_so() -> None:
    disk = asm("mov ax, 0x0e41; int 0x10", sector.AT, 16).ljust(510, b"\0") + b"\x55\xaa"
    guest = files.parse("disk.img", disk)
    machine = Machine(drives=guest.drives)
    strategy = strategies.load("native")(machine)
    strategy.load(guest, "")
    assert strategy.run(10_000).reason is StopReason.HALTED
    assert b"no services" in machine.console


def test_the_mp_table_is_found_and_sums_to_zero() -> None:
    """As a kernel looks for it: in the first KiB of the EBDA, whose segment is at 0x40E."""
    memory = bytearray(1 << 20)
    for at, data in firmware.areas():
        memory[at:at + len(data)] = data
    ebda = int.from_bytes(memory[0x40E:0x410], "little") << 4
    pointer = memory.index(b"_MP_", ebda, ebda + 1024)
    assert pointer % 16 == 0
    assert sum(memory[pointer:pointer + 16]) % 256 == 0
    table = int.from_bytes(memory[pointer + 4:pointer + 8], "little")
    length = int.from_bytes(memory[table + 4:table + 6], "little")
    assert memory[table:table + 4] == b"PCMP"
    assert sum(memory[table:table + length]) % 256 == 0
    assert table + length <= 0xA0000
    count = int.from_bytes(memory[table + 34:table + 36], "little")
    at, kinds = table + 44, []
    for _ in range(count):
        kinds.append(memory[at])
        at += 20 if memory[at] == 0 else 8
    assert (at, kinds) == (table + length, [0, 1, 2, *[3] * 15, 4, 4])


def test_every_protocol_reports_the_same_memory() -> None:
    memory = 48 << 20
    begin = boot.start(image("hlt", "pvh"), "", memory)
    info = next(data for at, data in begin.pieces if at == begin.registers[3])
    at, count = struct.unpack_from("<QI", info, 40)
    base = begin.registers[3]
    regions = [struct.unpack_from("<QQI", info, at - base + 24 * i) for i in range(count)]
    assert sum(size for _, size, kind in regions if kind == RAM) == memory - 0x60000


def test_multiboot_information_as_the_specification_lays_it_out() -> None:
    """Multiboot 0.6.96 §3.3: memory from KiB 0 and 1024 on, command line, modules with a string each, memory map, loader's name."""
    memory, line = 64 << 20, "console=ttyS0 root=/dev/ram"
    begin = boot.start(image("hlt", modules=(b"one" * 100, b"two")), line, memory)
    base = begin.registers[3]
    assert begin.registers[0] == 0x2BADB002
    info = next(data for at, data in begin.pieces if at == base)
    placed = dict(begin.pieces)

    def word(offset: int) -> int:
        return int(struct.unpack_from("<I", info, offset)[0])

    def text(address: int) -> bytes:
        return info[address - base:info.index(b"\0", address - base)]

    assert word(0) == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9       # memory, command line, modules, map, loader
    assert (word(4), word(8)) == (640, (memory - (1 << 20)) >> 10)
    assert text(word(16)) == line.encode()
    modules = [struct.unpack_from("<IIII", info, word(24) - base + 16 * i) for i in range(word(20))]
    assert [placed[first] for first, *_ in modules] == [b"one" * 100, b"two"]
    assert [end - first for first, end, *_ in modules] == [300, 3]
    assert all(text(string) == b"" and not reserved for _, _, string, reserved in modules)
    regions, at, end = [], word(48), word(48) + word(44)
    while at < end:                                 # "size" does not count itself
        size, *region = struct.unpack_from("<IQQI", info, at - base)
        regions.append(tuple(region))
        at += size + 4
    assert at == end
    assert regions == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (1 << 20, memory - (1 << 20), 1)]
    assert text(word(64)) == b"vmlab"


def test_modules_end_at_the_top_of_ram_and_must_fit() -> None:
    guest = image("hlt", modules=(bytes(5000), bytes(1)))
    begin = boot.start(guest, "", 2 << 20)
    places = sorted(at for at, data in begin.pieces if data in (bytes(5000), bytes(1)) and at > AT)
    assert places == [(2 << 20) - 3 * 4096, (2 << 20) - 2 * 4096]
    with pytest.raises(GuestImageError, match=r"do not fit into 2 MiB.*ram"):
        boot.start(image("hlt", modules=(bytes(1 << 20),)), "", 2 << 20)


def test_what_a_loader_must_say_moves_out_of_the_images_way() -> None:
    low = image("hlt", at=0x7000, segments=(Segment(0x7000, b"\xf4", 0x8000),))
    assert boot.arena(low) != boot.arena(image("hlt"))
    with pytest.raises(GuestImageError, match="no room in low memory"):
        boot.arena(image("hlt", segments=(Segment(0x1000, b"\xf4", 0x9E000),)))


def test_an_image_larger_than_ram_is_refused() -> None:
    with pytest.raises(GuestImageError, match=r"needs memory up to .* 1 MiB of RAM"):
        boot.start(image("hlt", segments=(Segment(AT, b"\xf4", 8 << 20),)), "", 1 << 20)
    with pytest.raises(GuestImageError, match="beyond ASCII"):
        boot.start(image("hlt"), "naïve", 4 << 20)


# ---- bzImage
def elf64(notes: bytes, *, machine: int = 62) -> bytes:
    """One segment at 1 MiB and one of notes."""
    header = struct.pack("<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, machine, 1, AT, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    code_at = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 5, code_at, AT, AT, 16, 16, 1)
    note = struct.pack("<IIQQQQQQ", 4, 4, code_at + 16, 0, 0, len(notes), len(notes), 4)
    return header + load + note + b"\xf4" * 16 + notes


PHYS32 = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", AT + 4)


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: lzma.compress(data, lzma.FORMAT_XZ), lambda data: lz4.MAGIC + _lz4_block(data), bytes])
def test_the_kernel_inside_is_unpacked_for_pvh(pack: object) -> None:
    assert callable(pack)
    data = bzimage_file(b"\xf4" * 64, payload=pack(elf64(PHYS32)))
    guest = files.parse("vmlinuz", data, "pvh")
    assert (guest.protocol, guest.entry) == ("pvh", AT + 4)


def _lz4_block(data: bytes) -> bytes:
    """All literals: a token of 15, then lengths (LZ4 Block Format)."""
    left = len(data) - 15
    block = b"\xf0" + b"\xff" * (left // 255) + bytes((left % 255,)) + data
    return struct.pack("<I", len(block)) + block + struct.pack("<I", len(data))


def test_lz4_copies_may_overlap() -> None:
    """One literal 'a', then ten bytes from one back; then literals."""
    block = b"\x16a\x01\x00" + b"\x30xyz"
    packed = lz4.MAGIC + struct.pack("<I", len(block)) + block
    assert lz4.unpack_legacy(packed) == b"a" * 11 + b"xyz"


@pytest.mark.parametrize("block", [b"\x10", b"\xf0\xff", b"\x16a\x05\x00", b"\x16a\x00\x00", b"\x50ab"])
def test_damaged_lz4_is_refused(block: bytes) -> None:
    with pytest.raises(ValueError, match=r"block|copy"):
        lz4.unpack_legacy(lz4.MAGIC + struct.pack("<I", len(block)) + block)


def test_what_is_wrong_with_a_bzimage_is_said() -> None:
    whole = bzimage_file(b"\xf4" * 0x4000)
    for cut in (0x206, 0x220, 0x267, 1500):
        with pytest.raises(GuestImageError, match="truncated"):
            files.parse("vmlinuz", whole[:cut])
    old = bytearray(whole)
    struct.pack_into("<H", old, 0x206, 0x203)
    with pytest.raises(GuestImageError, match=r"version 2\.03"):
        files.parse("vmlinuz", bytes(old))
    with pytest.raises(GuestImageError, match="no 64-bit entry; try protocol=linux32"):
        files.parse("vmlinuz", whole, "linux64")
    with pytest.raises(GuestImageError, match="not known here"):
        files.parse("vmlinuz", bzimage_file(b"\xf4" * 64, payload=b"????"), "pvh")
    with pytest.raises(GuestImageError, match="cannot be unpacked"):
        files.parse("vmlinuz", bzimage_file(b"\xf4" * 64, payload=gzip.compress(bytes(5000))[:10] + b"\xff" * 40), "pvh")
    assert bzimage.is_bzimage(whole)


def test_a_64_bit_elf_needs_a_pvh_note() -> None:
    with pytest.raises(GuestImageError, match="64 bits, and has no PVH entry"):
        files.parse("vmlinux", elf64(b""))
    with pytest.raises(GuestImageError, match="EM_AARCH64"):
        files.parse("vmlinux", elf64(PHYS32, machine=183))
    assert files.parse("vmlinux", elf64(PHYS32)).protocol == "pvh"


def test_a_protocol_that_does_not_fit_names_what_it_needs() -> None:
    with pytest.raises(GuestImageError, match="is a boot disk; protocol 'pvh' needs an ELF or bzImage"):
        files.parse("disk.img", bytes(510) + b"\x55\xaa", "pvh")
    with pytest.raises(GuestImageError, match="not an ELF file, no bzImage"):
        files.parse("notes.txt", b"hello")
    for magic, machine in ((b"ARM\x64", "arm64"), (b"RSC\x05", "RISC-V")):
        with pytest.raises(GuestImageError, match=f"'Image' is a Linux kernel for {machine}; one for x86 is needed"):
            files.parse("Image", b"MZ".ljust(56, b"\0") + magic.ljust(1000, b"\0"))


# ---- files
def test_initrd_and_drives_are_read(tmp_path: Path) -> None:
    initrd, disk = tmp_path / "initrd", tmp_path / "disk"
    initrd.write_bytes(b"abc")
    disk.write_bytes(b"x" * 513)
    nano = str(Path(guests.__file__).parent / "nano" / "nano.elf")
    found = guests.configured({"guest": nano, "initrd": str(initrd), "drives": f"{disk},{disk}"})
    assert found.modules == (b"abc",)
    assert [len(drive) for drive in found.drives] == [1024, 1024]
    with pytest.raises(GuestImageError, match="no initrd at"):
        guests.configured({"guest": nano, "initrd": str(tmp_path / "absent")})
    with pytest.raises(GuestImageError, match="no disk image at"):
        guests.configured({"guest": nano, "drives": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="two IDE disks"):
        guests.configured({"guest": nano, "drives": ",".join([str(disk)] * 3)})
    disk.write_bytes(b"")
    with pytest.raises(GuestImageError, match="empty"):
        guests.configured({"guest": nano, "drives": str(disk)})


def test_a_path_may_begin_with_an_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel").write_bytes((Path(guests.__file__).parent / "nano" / "nano.elf").read_bytes())
    monkeypatch.setenv("VMLAB_GUEST_TEST", str(tmp_path))
    assert guests.load("$VMLAB_GUEST_TEST/kernel").name == "kernel"
    monkeypatch.delenv("VMLAB_GUEST_TEST")
    with pytest.raises(GuestImageError, match="set VMLAB_GUEST_TEST to the folder"):
        guests.load("$VMLAB_GUEST_TEST/kernel")
