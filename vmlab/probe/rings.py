"""Ring compression: which rings does paging keep out of a supervisor page in 64-bit mode?

Paging knows user and supervisor only, and CPL 0 to 2 are supervisor (SDM Vol. 3A §4.6). With segment limits gone in 64-bit
mode (§5.3.1: no limit checks but for the descriptor tables), nothing keeps a guest kernel in ring 1 out of a monitor's pages.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from vmlab.machine.pc import Machine
from vmlab.probe import bench, compare, layout
from vmlab.probe.cases import Case

#: The first 2 MiB once more, for supervisors only.
SUPERVISOR_ALIAS = 0x200000
_PRESENT_WRITABLE_LARGE = 0x83
_AT = SUPERVISOR_ALIAS + layout.DATA

READ = Case("mov", "read of a supervisor page", "mov eax, [address]", b"\x8b\x04\x25" + struct.pack("<I", _AT), "no",
            "a monitor keeps its data in such pages", bits=64)
WRITE = replace(READ, name="write of a supervisor page", text="mov [address], eax", code=b"\x89\x04\x25" + struct.pack("<I", _AT))


def rings(path: str | None = None) -> list[dict[str, Any]]:
    """What each access does at CPL 0, 1 and 3: ``runs``, or the exception."""
    def alias(machine: Machine) -> None:
        machine.ram.write(layout.PAGE_TABLES + 0x2000 + 8, struct.pack("<Q", _PRESENT_WRITABLE_LARGE))

    rows = []
    for case in (READ, WRITE):
        row: dict[str, Any] = {"access": case.name, "bits": 64}
        for cpl in (0, 1, 3):
            trap = bench.run(case, cpl, layout.KERNEL, path=path, arrange=alias).trap
            row[f"cpl{cpl}"] = compare.trap_words(trap) if trap else "runs"
        rows.append(row)
    return rows
