"""What counting costs: guest code under the machine's counter against bare Unicorn with no hook at all.

    python benchmarks/counting.py [--rounds N] [--passes N] [--limit RATIO]

Prints, for each way of counting, the median of (CPU time counted / bare) and its spread. The two are timed in turn,
and in each round against each other, so that a busy host disturbs the spread more than the median. With ``--limit``
the exit status is 1 when the first line's ratio (mixed loop, fast path) is above it, or cannot be measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import unicorn
from unicorn import x86_const as x86

from vmlab.machine import fast
from vmlab.machine.cpu import Segment
from vmlab.machine.pc import Machine

CODE, STACK, RAM = 0x10000, 0x8000, 8 << 20

#: A loop over ordinary code, without calls: arithmetic, loads, stores, branches both ways; blocks of 5 to 8 instructions.
MIXED = bytes.fromhex(
    "01d8"              # again: add eax, ebx
    "a300500000"        # mov [0x5000], eax
    "8b1500500000"      # mov edx, [0x5000]
    "31f2"              # xor edx, esi
    "83c603"            # add esi, 3
    "0faffe"            # imul edi, esi
    "f6c201"            # test dl, 1
    "7405"              # jz even
    "01d3"              # add ebx, edx
    "c1c305"            # rol ebx, 5
    "90"                # even: nop
    "81c301010000"      # add ebx, 0x101
    "ff0504500000"      # inc dword [0x5004]
    "49"                # dec ecx
    "75d1"              # jnz again
    "f4"                # hlt
)
#: The same with a call in it; its return makes Unicorn look up the next block.
CALLS = bytes.fromhex(
    "01d8"              # again: add eax, ebx
    "a300500000"        # mov [0x5000], eax
    "8b1500500000"      # mov edx, [0x5000]
    "31f2"              # xor edx, esi
    "83c603"            # add esi, 3
    "50"                # push eax
    "e80b000000"        # call work
    "58"                # pop eax
    "81c301010000"      # add ebx, 0x101
    "49"                # dec ecx
    "75de"              # jnz again
    "f4"                # hlt
    "90"
    "8b442404"          # work: mov eax, [esp + 4]
    "8d0480"            # lea eax, [eax + eax*4]
    "89442404"          # mov [esp + 4], eax
    "c3"                # ret
)
#: The worst there is: nothing but blocks of two instructions.
TINY = bytes.fromhex("49" "75fd" "f4")  # again: dec ecx; jnz again; hlt


def bare(code: bytes, passes: int) -> float:
    """CPU seconds that Unicorn needs, as anybody would use it."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    uc.mem_map(0, RAM)
    uc.mem_write(CODE, code)
    uc.reg_write(x86.UC_X86_REG_ESP, STACK)
    uc.reg_write(x86.UC_X86_REG_ECX, passes)
    start = time.process_time()
    uc.emu_start(CODE, CODE + len(code))
    return time.process_time() - start


def counted(code: bytes, passes: int, path: str) -> float:
    """CPU seconds that the machine needs, and everything it retires counted."""
    machine = Machine(RAM, path)
    machine.ram.write(CODE, code)
    cpu = machine.cpu
    cpu.enter_protected(CODE, Segment(8, 0, 0xFFFFFFFF, 0xCF9B00), Segment(16, 0, 0xFFFFFFFF, 0xCF9300))
    cpu.load()
    cpu.set_gpr(4, STACK)
    cpu.set_gpr(1, passes)
    cpu.store()
    start = time.process_time()
    machine.run()
    seconds = time.process_time() - start
    if machine.time < 2 * passes:
        raise SystemExit(f"the machine counted only {machine.time} instructions")
    return seconds


def measure(name: str, code: bytes, path: str, passes: int, rounds: int) -> float:
    """Print one line; returns the median ratio."""
    ratios = []
    for _ in range(rounds):
        before, count, after = bare(code, passes), counted(code, passes, path), bare(code, passes)
        ratios.append(2 * count / (before + after))
    median = statistics.median(ratios)
    print(f"{name:24} {path:9} {median:6.2f}x bare Unicorn   ({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)")
    return median


def main() -> int:
    """Measure both loops on both paths."""
    parser = argparse.ArgumentParser(description="what counting costs against bare Unicorn")
    parser.add_argument("--rounds", type=int, default=7, help="measurements per line (7)")
    parser.add_argument("--passes", type=int, default=1_000_000, help="passes through the loop on the fast path (1000000)")
    parser.add_argument("--limit", type=float, help="exit with status 1 when the first ratio is above this")
    options = parser.parse_args()
    ratio = None
    if fast.why_not():
        print(f"no fast path: {fast.why_not()}")
    else:
        ratio = measure("mixed loop", MIXED, "fast", options.passes, options.rounds)
        measure("mixed loop with a call", CALLS, "fast", options.passes, options.rounds)
        measure("two-instruction blocks", TINY, "fast", 4 * options.passes, options.rounds)
    measure("mixed loop", MIXED, "portable", max(1000, options.passes // 20), options.rounds)
    if options.limit is None:
        return 0
    return 0 if ratio is not None and ratio <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
