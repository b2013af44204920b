"""What exact counting costs on a kernel that nobody here wrote: Linux to its shell, with counting on and off.

    VMLAB_GUEST_LINUX=FOLDER python benchmarks/linux.py [--rounds N] [--json FILE]

Each boot has a fresh interpreter, so that neither profits from the other's decoded code; they take turns, and what is compared is
CPU time from the guest's first instruction to the prompt, the ledger's sum included (not unpacking the image, which both do). With
counting off (vmlab/machine/uncounted.py) devices and delivery are the same and virtual time is a guess, so that the guest does
about as much. The exit status is 1 where the limit is missed, 2 where there is no guest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rows import Row, row

LIMIT = 3.0
#: As in docs/foreign-guests.md.
APPEND = "console=ttyS0 nokaslr acpi=off nolapic noapic pci=off lpj=4000000 cryptomgr.notests"
_WAYS = ("auto", "uncounted")


def boot(folder: Path, path: str) -> dict[str, float]:
    """One boot in this process: CPU seconds, guest instructions (a guess of them where nothing counts), accesses to devices."""
    from vmlab.experiment.cell import Run
    from vmlab.machine.pc import StopReason

    run = Run("native", {"guest": str(folder / "vmlinuz"), "protocol": "pvh", "initrd": str(folder / "initrd.gz"), "ram": 256, "append": APPEND,
                         "script": "expect 'vmlab# '"}, path=path)
    before = time.process_time()
    stop = run.go()
    counted = run.strategy.snapshot()
    seconds = time.process_time() - before
    if stop.reason is not StopReason.SAID or not run.machine.console.endswith(b"vmlab# "):
        raise SystemExit(f"the boot did not come to its shell: {stop}")
    return {"seconds": seconds, "time": run.machine.time, "instructions": counted.machine, "accesses": counted.events.get("io.device", 0)}


def in_a_fresh_interpreter(folder: Path, path: str) -> dict[str, float]:
    """The same, elsewhere."""
    done = subprocess.run([sys.executable, __file__, "--boot", path], env={**os.environ, "VMLAB_GUEST_LINUX": str(folder)},
                          check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(folder: Path, rounds: int) -> Row:
    """The row: counting on against counting off."""
    ratios, last = [], dict[str, dict[str, float]]()
    for _ in range(rounds):
        last = {path: in_a_fresh_interpreter(folder, path) for path in _WAYS}
        ratios.append(last["auto"]["seconds"] / last["uncounted"]["seconds"])
    on, off = (last[path] for path in _WAYS)
    note = (f"{on['seconds']:.1f} s for {on['instructions']:,.0f} instructions and {on['accesses']:,.0f} accesses to devices; "
            f"{off['seconds']:.1f} s, some {off['time']:,.0f} and {off['accesses']:,.0f} without")
    return row("Linux to its shell, native: counting on against off", ratios, LIMIT, "lower", note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the row to this file")
    parser.add_argument("--boot", choices=_WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = os.environ.get("VMLAB_GUEST_LINUX", "")
    if not folder or not (Path(folder) / "vmlinuz").exists():
        print("benchmarks/linux.py: VMLAB_GUEST_LINUX has to name a folder with vmlinuz and initrd.gz (docs/foreign-guests.md)", file=sys.stderr)
        return 2
    if arguments.boot:
        print(json.dumps(boot(Path(folder), arguments.boot)))
        return 0
    found = compare(Path(folder), arguments.rounds)
    print(found.text())
    if arguments.json:
        arguments.json.write_text(json.dumps([found.as_dict()], indent=1) + "\n")
    return 0 if found.met else 1


if __name__ == "__main__":
    sys.exit(main())
