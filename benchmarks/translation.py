"""What binary translation costs in host time: guest kernel code under the technique against the same code on the bare machine.

    python benchmarks/translation.py [--rounds N] [--passes N] [--json]

Two loops, a computing one and one of nothing but calls and returns, under each scheme of finding targets. Prints the
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
import sys
import time
from typing import Any

from vmlab.guests.image import GuestImage, Segment
from vmlab.machine.pc import Machine
from vmlab.parameters import Value
from vmlab.strategies.base import Strategy
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation

ENTRY = 0x100000
#: mov esp, 0x90000; mov ecx, <passes>
BEFORE = "bc00000900" "b9{passes}"
#: cli; xor eax, eax; mov dx, 0xf4; out dx, eax; hlt (the port ends the guest: HLT is not reached)
AFTER = "fa" "31c0" "66baf400" "ef" "f4"

#: name → (the loop, counting ECX down to 0; guest instructions of a pass; those before the first and behind the last)
LOOPS = {
    "computing": (
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
    "call/return": (
        "e805000000"        # again: call work
        "49"                # dec ecx
        "75f8"              # jnz again
        "eb01"              # jmp behind
        "c3", 4, 7),        # work: ret; behind:
}
SCHEMES: dict[str, dict[str, Value]] = {
    "lookup in the cache, chained": {},
    "lookup by callout, chained": {"lookup": "callout"},
    "lookup in the cache, unchained": {"chaining": "off"},
    "lookup by callout, unchained": {"lookup": "callout", "chaining": "off"},
}


def image(loop: str, passes: int) -> GuestImage:
    """A guest that goes through the loop and ends."""
    code = bytes.fromhex(BEFORE.format(passes=passes.to_bytes(4, "little").hex()) + loop + AFTER)
    return GuestImage("loop", (Segment(ENTRY, code, len(code)),), ENTRY, None, {}, hashlib.sha256(code).hexdigest())


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
    loop, length, around = LOOPS[name]
    parameters = SCHEMES[scheme]
    if "chaining" in parameters or ("lookup" in parameters and name == "call/return"):
        passes = max(passes // 10, 1)   # the monitor is asked in every pass: slow
    guest, budget = image(loop, passes), 2 * length * passes + 1000
    ratios = []
    for _ in range(rounds):
        before, instructions = seconds(Native, {}, guest, budget)
        translated, same = seconds(BinaryTranslation, parameters, guest, budget)
        after, _ = seconds(Native, {}, guest, budget)
        if not instructions == same == length * passes + around:
            raise SystemExit(f"{name}, {scheme}: {length * passes + around} guest instructions expected, {instructions} natively, {same} translated")
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
                print(f"{name:12} {scheme:31} {line['ratio']:7.2f}x native   "
                      f"({line['lowest']:.2f} to {line['highest']:.2f}, {options.rounds} rounds, {line['passes']} passes)", flush=True)
    if options.json:
        print(json.dumps({"schema_version": 1, "rounds": options.rounds, "lines": lines}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
