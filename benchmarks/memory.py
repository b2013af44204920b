"""Host CPU time of one event of memory virtualization: a trace fault, a hidden fault, a nested fault.

    python benchmarks/memory.py [--events 3000]

A small kernel makes the event again and again; the time of the same loop without it is taken off. What is printed is the host's time,
no figure of the lab's: it says how long experiments take. The target is 50 µs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from paginglab import ALL, END, boot, layout, paging_kernel

from vmlab.machine import fast
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

WHERE = layout("pae")


def seconds(kind: type[Strategy], memory: str, body: str, rounds: int, path: str) -> tuple[float, dict[str, int]]:
    """Best of three runs of the loop, and what it counted."""
    source = (f"mov dword ptr [{WHERE.slot(0):#x}], {0x101000 | ALL:#x}; mov eax, [{WHERE.base:#x}]; xor ecx, ecx; mov cr2, ecx;"
              f"mov esi, {rounds}; l: {body} dec esi; jnz l;" + END)
    best, events = 1e9, {}
    for _ in range(3):
        more = {"sensitive": "trap"} if kind is TrapAndEmulate else {}
        guest = boot(kind, paging_kernel(WHERE, source), {"memory": memory, **more}, path)
        begin = time.process_time()
        guest.run(10_000_000)
        best = min(best, time.process_time() - begin)
        events = guest.snapshot().events
    return best, events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=3000)
    rounds = parser.parse_args().events
    slot, base = WHERE.slot(0), WHERE.base
    cases = [
        ("trace fault, MOV", "tracing", f"mov dword ptr [{slot:#x}], {0x101067:#x};", "shadow.trace.write"),
        ("trace fault, LOCK OR", "tracing", f"lock or dword ptr [{slot:#x}], 0x60;", "shadow.trace.write"),
        ("INVLPG and hidden fault", "lazy", f"invlpg [{base:#x}]; mov eax, [{base:#x}];", "shadow.fault.hidden"),
    ]
    for path in ("portable", *(() if fast.why_not() else ("fast",))):
        for kind in (TrapAndEmulate, HardwareAssisted):
            for name, memory, body, event in cases:
                empty, without = seconds(kind, memory, "nop;", rounds, path)
                full, events = seconds(kind, memory, body, rounds, path)
                count = events[event] - without.get(event, 0)
                print(f"{path:9} {kind.name:18} {name:26} {(full - empty) / count * 1e6:6.1f} us")


if __name__ == "__main__":
    main()
