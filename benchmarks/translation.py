"""What binary translation costs in host time: guest kernel code under the technique against the same code on the bare machine.

    python benchmarks/translation.py [--rounds N] [--passes N] [--json]

Two loops, a computing one and one of nothing but calls and returns, of 32 and of 64 bits, under each scheme of finding targets. Prints the
median of (CPU time translated / native) and its spread. Native is timed before and after each translated run, and
both are counted by the same machine, so that a busy host disturbs the spread more than the median. Translating
itself is part of the time; the loops are long enough for it not to matter. The figures are the host's, hence belong to
no ledger. A guest that does not execute, natively and translated, exactly the instructions of its loop stops the benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

from vmlab.guests.image import GuestImage, Segment
from vmlab.machine.pc import Machine
from vmlab.parameters import Value
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation

ENTRY, TABLES, GDT = 0x100000, 0x2000, 0x1000
#: mov esp, 0x90000; mov ecx, <passes>
BEFORE = "bc00000900" "b9{passes}"
#: Long mode: CR4.PAE, EFER.LME, CR3, CR0.PG with PE and WP, the descriptors, and a far jump behind itself
LONG_MODE = "b820000000 0f22e0 b9800000c0 b800010000 31d2 0f30 b800200000 0f22d8 b811000180 0f22c0 0f011500100000 ea{behind}0800"
#: mov eax, 0x10; mov ss, eax; mov ds, eax; mov es, eax; mov esp, 0x90000; mov r10d, 0x5000; mov ecx, <passes>
BEFORE64 = "b810000000 8ed0 8ed8 8ec0 bc00000900 41ba00500000 b9{passes}"
#: cli; xor eax, eax; mov dx, 0xf4; out dx, eax; hlt (the port ends the guest: HLT is not reached)
AFTER = "fa" "31c0" "66baf400" "ef" "f4"


@dataclass(frozen=True)
class Loop:
    """Code that counts (E/R)CX down to 0; guest instructions of a pass, and those before the first and behind the last."""

    code: str
    length: int
    around: int
    bits: int = 32


LOOPS = {
    "computing": Loop(
        "01d8"              # again: add eax, ebx
        "a300500000"        # mov [0x5000], eax
        "8b1500500000"      # mov edx, [0x5000]
        "31f2"              # xor edx, esi
        "83c603"            # add esi, 3
        "0faffe"            # imul edi, esi
        "c1c305"            # rol ebx, 5
        "81c301010000"      # add ebx, 0x101
        "49"                # dec ecx
        "75df", 10, 6),      # jnz again
    "call/return": Loop(
        "e805000000"        # again: call work
        "49"                # dec ecx
        "75f8"              # jnz again
        "eb01"              # jmp behind
        "c3", 4, 7),        # work: ret; behind:
    "computing, 64 bits": Loop(
        "4801d8"            # again: add rax, rbx
        "498902"            # mov [r10], rax
        "498b12"            # mov rdx, [r10]
        "4831f2"            # xor rdx, rsi
        "4883c603"          # add rsi, 3
        "480faffe"          # imul rdi, rsi
        "48c1c305"          # rol rbx, 5
        "4881c301010000"    # add rbx, 0x101
        "48ffc9"            # dec rcx
        "75dc", 10, 23, 64),  # jnz again
    "call/return, 64 bits": Loop(
        "e807000000"        # again: call work
        "48ffc9"            # dec rcx
        "75f6"              # jnz again
        "eb01"              # jmp behind
        "c3", 4, 24, 64),   # work: ret; behind:
}
SCHEMES: dict[str, dict[str, Value]] = {
    "lookup in the cache, chained": {},
    "lookup by callout, chained": {"lookup": "callout"},
    "lookup in the cache, unchained": {"chaining": "off"},
    "lookup by callout, unchained": {"lookup": "callout", "chaining": "off"},
}


def image(loop: Loop, passes: int) -> GuestImage:
    """A guest that goes through the loop and ends; one of 64 bits with the first GiB mapped in pages of 2 MiB."""
    words = {"passes": passes.to_bytes(4, "little").hex()}
    if loop.bits == 32:
        code, data = bytes.fromhex(BEFORE.format(**words)), {}
    else:
        size = len(bytes.fromhex(LONG_MODE.format(behind="00000000")))
        code = bytes.fromhex(LONG_MODE.format(behind=(ENTRY + size).to_bytes(4, "little").hex()) + BEFORE64.format(**words))
        data = {
            GDT: struct.pack("<HIxx3Q", 31, GDT, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0),    # its null descriptor holds its own pointer
            TABLES: struct.pack("<Q", TABLES + 0x1003), TABLES + 0x1000: struct.pack("<Q", TABLES + 0x2003),
            TABLES + 0x2000: struct.pack("<512Q", *(page << 21 | 0x83 for page in range(512))),
        }
    code += bytes.fromhex(loop.code + AFTER)
    pieces = sorted({ENTRY: code, **data}.items())
    return GuestImage("loop", tuple(Segment(at, raw, len(raw)) for at, raw in pieces), ENTRY, None, {}, hashlib.sha256(code).hexdigest())


def seconds(technique: type[Strategy], parameters: dict[str, Value], guest: GuestImage, budget: int) -> tuple[float, int]:
    """(CPU seconds, guest instructions) of a run to the guest's own end.

    :raises GuestError: the guest did not come to its end.
    """
    strategy = technique(Machine(), parameters)
    strategy.load(guest, "")
    start = time.process_time()
    strategy.run(budget)
    return time.process_time() - start, strategy.machine.time


def measure(name: str, scheme: str, passes: int, rounds: int) -> dict[str, Any]:
    """One line's figures."""
    loop = LOOPS[name]
    parameters: dict[str, Value] = {**SCHEMES[scheme], **({"memory": "lazy"} if loop.bits == 64 else {})}
    if "chaining" in parameters or ("lookup" in parameters and name.startswith("call/return")):
        passes = max(passes // 10, 1)   # the monitor is asked in every pass: slow
    guest, budget, expected = image(loop, passes), 2 * loop.length * passes + 1000, loop.length * passes + loop.around
    ratios = []
    for _ in range(rounds):
        before, instructions = seconds(Native, {}, guest, budget)
        translated, same = seconds(BinaryTranslation, parameters, guest, budget)
        after, _ = seconds(Native, {}, guest, budget)
        if not instructions == same == expected:
            raise SystemExit(f"{name}, {scheme}: {expected} guest instructions expected, {instructions} natively, {same} translated")
        ratios.append(2 * translated / (before + after))
    return {"loop": name, "scheme": scheme, "passes": passes, "instructions": instructions,
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def main() -> int:
    """Measure every loop under every scheme."""
    parser = argparse.ArgumentParser(description="host time of binary translation against native")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per line (5)")
    parser.add_argument("--passes", type=int, default=1_000_000, help="passes through a loop; a tenth where the monitor is asked (1000000)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    if options.rounds < 1 or options.passes < 1:
        parser.error("--rounds and --passes: at least 1")
    lines = []
    for name in LOOPS:
        for scheme in SCHEMES:
            line = measure(name, scheme, options.passes, options.rounds)
            lines.append(line)
            if not options.json:
                print(f"{name:20} {scheme:31} {line['ratio']:7.2f}x native   "
                      f"({line['lowest']:.2f} to {line['highest']:.2f}, {options.rounds} rounds, {line['passes']} passes)", flush=True)
    if options.json:
        print(json.dumps({"schema_version": 1, "rounds": options.rounds, "lines": lines}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
