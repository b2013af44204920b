"""Rows of ``run.py``: the lab's bare machine beside QEMU (TCG) and Bochs, where they are installed, on the same guests with the same work.

Each guest is put into a ROM in place of a BIOS, with a few instructions that do a boot loader's work: one image for both emulators, no
disk, no firmware's waits. The loader sends one character to the serial port before it jumps into the guest, and waits for one; from there
to the last character of what the guest prints in the lab is what is measured, of the emulator's CPU time. Its start-up lies before.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import guests
from rows import Row, Skipped, row

from vmlab import guests as images
from vmlab.experiment.cell import Run
from vmlab.guests import boot
from vmlab.guests.image import GuestImage
from vmlab.machine.pc import Machine, StopReason
from vmlab.parameters import Value
from vmlab.strategies.native import Native
from vmlab.strategies.techniques import BESIDE_GUEST

BEGUN = b">"
_LAST_SEGMENT, _STUB = 0x10000, 0xF000          # of the ROM: what the CPU sees at reset (SDM Vol. 3A §10.1.4); where the loader is in it
_TABLE_ROOM, _LOW_END, _HIGH = 0x400, 0xA0000, 0x100000
_PATIENCE = 120                                 # seconds of the clock, after which an emulator counts as stuck


def rom(image: GuestImage, line: str, memory: int) -> bytes:
    """A ROM of the last bytes below 4 GiB that starts ``image`` as the lab's boot loader does.

    A table of (where to, bytes, where from), the bytes, and in the last segment the loader, descriptors and the reset vector.
    """
    begin = boot.start(image, line, memory)
    # What is left out lies in ROM itself: a routine for guests that call the firmware.
    pieces = [(address, data.rstrip(b"\0")) for address, data in begin.pieces if not _LOW_END <= address < _HIGH and any(data)]
    needed = _TABLE_ROOM + sum(len(data) for _, data in pieces) + _LAST_SEGMENT
    size = max(1 << (needed - 1).bit_length(), 2 * _LAST_SEGMENT)
    base, stub, content, at = (1 << 32) - size, size - _LAST_SEGMENT + _STUB, bytearray(b"\xff" * size), _TABLE_ROOM
    table = b""
    for address, data in pieces:
        content[at:at + len(data)] = data
        table += struct.pack("<III", address, len(data), base + at)
        at += len(data)
    content[:len(table) + 12] = table + bytes(12)
    start, descriptors = base + stub, stub + 0xD8
    #     cli ; lgdt cs:[0xf0f0] ; mov eax, cr0 ; or al, 1 ; mov cr0, eax ; jmp 8:start + 0x40
    real = bytes.fromhex("fa 662e0f0116f0f0 0f20c0 0c01 0f22c0 66ea") + struct.pack("<IH", start + 0x40, 8)
    #     mov eax, 0x10 ; mov ds, eax ; mov es, eax ; mov ss, eax ; mov ebx, table ; cld
    # 1:  mov edi, [ebx] ; mov ecx, [ebx + 4] ; mov esi, [ebx + 8] ; add ebx, 12 ; jecxz 2f ; rep movsb ; jmp 1b
    # What guests take for granted: eight bits a character, and a display that listens at 0x3D4.
    # 2:  mov dx, 0x3fb ; mov al, 3 ; out dx, al ; mov dx, 0x3c2 ; mov al, 1 ; out dx, al
    #     mov dx, 0x3f8 ; mov al, BEGUN ; out dx, al
    # 3:  mov dx, 0x3fd ; in al, dx ; test al, 1 ; jz 3b ; mov dx, 0x3f8 ; in al, dx
    #     mov eax, … ; mov ebx, … ; mov ecx, entry ; jmp ecx
    protected = (bytes.fromhex("b810000000 8ed8 8ec0 8ed0 bb") + struct.pack("<I", base)
                 + bytes.fromhex("fc 8b3b 8b4b04 8b7308 83c30c e304 f3a4 ebef")
                 + bytes.fromhex("66bafb03 b003 ee 66bac203 b001 ee 66baf803 b0") + BEGUN
                 + bytes.fromhex("ee 66bafd03 ec a801 74f7 66baf803 ec")
                 + struct.pack("<BIBIBI", 0xB8, begin.registers.get(0, 0), 0xBB, begin.registers.get(3, 0), 0xB9, begin.rip) + b"\xff\xe1")
    content[stub:stub + len(real)] = real
    content[stub + 0x40:stub + 0x40 + len(protected)] = protected
    content[descriptors:descriptors + 30] = struct.pack("<3QHI", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 23, base + descriptors)
    content[-16:-13] = b"\xe9" + struct.pack("<h", _STUB - 0xFFF3)
    return bytes(content)


def _cpu_time(pid: int) -> float:
    """Seconds of CPU that a running process has had, all threads: its clock as clock_getcpuclockid(3) of Linux makes it."""
    return time.clock_gettime((~pid << 3) | 2)


class Emulator:
    """One that is installed, started anew for each measurement."""

    def __init__(self, name: str, program: str, arguments: Callable[[Path, int, str], list[str]]) -> None:
        self.name, self.program, self._arguments = name, program, arguments

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if not sys.platform.startswith("linux"):
            return "its CPU time is read as Linux tells it"
        return None if shutil.which(self.program) else f"{self.program} is not installed"

    def run(self, content: bytes, memory: int, console: bytes) -> tuple[float, float]:
        """CPU seconds of (start-up, the guest up to the end of ``console``, which it must print)."""
        with tempfile.TemporaryDirectory() as scratch, socket.create_server(("127.0.0.1", 0)) as server:
            (Path(scratch) / "guest.rom").write_bytes(content)
            server.settimeout(_PATIENCE)
            address = f"127.0.0.1:{server.getsockname()[1]}"
            master, terminal = os.openpty()                     # Bochs wants a screen
            drain = threading.Thread(target=_swallow, args=(master,), daemon=True)
            process = subprocess.Popen([self.program, *self._arguments(Path(scratch), memory, address)], cwd=scratch, stdin=terminal,
                                       stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"}, start_new_session=True)
            drain.start()
            try:
                with server.accept()[0] as serial:
                    serial.settimeout(_PATIENCE)
                    started = self._hear(process.pid, serial, BEGUN)
                    serial.sendall(b"!")
                    return started, self._hear(process.pid, serial, console) - started
            except TimeoutError:
                raise SystemExit(f"{self.name}: nothing came from its serial port for {_PATIENCE} seconds") from None
            finally:
                process.kill()
                process.wait()
                os.close(terminal)      # which ends the thread
                drain.join()
                os.close(master)

    def _hear(self, pid: int, serial: socket.socket, expected: bytes) -> float:
        """Wait for ``expected`` on the serial port; the emulator's CPU seconds then."""
        heard = b""
        while len(heard) < len(expected) and (more := serial.recv(len(expected) - len(heard))):
            heard += more
        if heard != expected:
            raise SystemExit(f"{self.name}: the guest printed {heard!r}, in the lab it prints {expected!r}")
        return _cpu_time(pid)


def _swallow(terminal: int) -> None:
    """What an emulator shows on its screen."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        return      # the other end was closed


def _qemu(_scratch: Path, memory: int, serial: str) -> list[str]:
    return ["-accel", "tcg", "-bios", "guest.rom", "-m", str(memory >> 20), "-display", "none", "-vga", "std", "-net", "none",
            "-serial", f"tcp:{serial}", "-monitor", "none"]


def _bochs(scratch: Path, memory: int, serial: str) -> list[str]:
    (scratch / "bochsrc").write_text(
        f"display_library: term\nmegs: {memory >> 20}\nromimage: file=guest.rom\ncom1: enabled=1, mode=socket-client, dev={serial}\n"
        # A microsecond an instruction: xv6 counts on a serial port that is as fast as its waiting loop.
        "clock: sync=none\ncpu: ips=1000000\n"
        "log: /dev/null\npanic: action=fatal\nboot: disk\n", encoding="utf-8")
    (scratch / "go").write_text("c\n", encoding="utf-8")       # a Bochs with its debugger built in asks before it starts
    return ["-q", "-f", "bochsrc", "-rc", "go"]


EMULATORS = (Emulator("QEMU TCG", "qemu-system-x86_64", _qemu), Emulator("Bochs", "bochs", _bochs))


@dataclass(frozen=True)
class Guest:
    """The same work for the lab and the emulators. ``lab``: runs it on the bare machine: CPU seconds, what it printed."""

    name: str
    memory: int
    rom: Callable[[], bytes]
    lab: Callable[[], tuple[float, bytes]]


def _cell(name: str, ram: int, parameters: Mapping[str, Value]) -> Guest:
    """A guest as a cell runs it."""
    values: dict[str, Value] = {"ram": ram, **parameters}

    def lab() -> tuple[float, bytes]:
        run = Run("native", values)
        start = time.process_time()
        stop = run.go()
        seconds = time.process_time() - start
        if stop.exit_code != 0 and stop.reason != StopReason.SAID:
            raise SystemExit(f"{name} in the lab ended with {stop}")
        return seconds, bytes(run.machine.console)

    image = images.configured(values)
    line = images.command_line(values) if "workload" in values else ""
    return Guest(name, ram << 20, lambda: rom(image, line, ram << 20), lab)


def _loop(rounds: int) -> Guest:
    #                         mov dx, 0x3f8 ; mov al, '.' ; out dx, al
    code = guests.computing(10_000, guests.COMPUTING, rounds, "90", bytes.fromhex("66baf803 b02e ee") + guests.END)
    image, ram = guests.image(code), 16 << 20

    def lab() -> tuple[float, bytes]:
        strategy = Native(Machine(ram + BESIDE_GUEST))
        strategy.load(image, "")
        start = time.process_time()
        strategy.run(1 << 40)
        return time.process_time() - start, bytes(strategy.machine.console)

    return Guest("computing loop", ram, lambda: rom(image, "", ram), lab)


def _guests(scale: float) -> Iterator[Guest]:
    yield _loop(max(int(2000 * scale), 1))
    for workload, iterations in (("compute", 600), ("forkwait", 1500)):
        yield _cell(f"minios {workload}", 32, {"guest": "minios", "workload": workload, "iterations": max(int(iterations * scale), 1)})
    if os.environ.get("VMLAB_GUEST_XV6"):
        yield _cell("xv6 to its prompt", 240, {"guest": "$VMLAB_GUEST_XV6/kernelmemfs", "script": 'expect "$ "'})


def emulators(rounds: int, scale: float, wanted: Callable[[str], bool]) -> Iterator[Row | Skipped]:
    """The lab's CPU time for a guest over an emulator's; in each round the emulators run between two runs of the lab."""
    for guest in _guests(scale):
        chosen = {f"{guest.name} against {emulator.name}": emulator for emulator in EMULATORS}
        present = {name: emulator for name, emulator in chosen.items() if wanted(name) and not emulator.missing}
        ratios: dict[str, list[float]] = {name: [] for name in present}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in present}
        content = guest.rom() if present else b""
        for _ in range(rounds if present else 0):
            before, console = guest.lab()
            for name, emulator in present.items():
                times[name].append(emulator.run(content, guest.memory, console))
            after, _ = guest.lab()
            for name, measured in times.items():
                ratios[name].append((before + after) / 2 / measured[-1][1])
        for name, emulator in chosen.items():
            if name in present:
                start_up, theirs = min(start for start, _ in times[name]), min(seconds for _, seconds in times[name])
                yield row(name, ratios[name], None, "lower", f"{theirs:.2f} s there, behind {start_up:.2f} s of start-up")
            elif wanted(name):
                yield Skipped(name, str(emulator.missing))
