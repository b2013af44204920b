"""Where does a technique first differ from the bare machine? Both run in step, compared instruction by instruction.

The comparison sees what the guest can see without looking at memory: RIP, general registers and
arithmetic flags before every instruction. It is slow (a hook on every instruction), and meant for
small runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from unicorn import unicorn_const as uc_const

from vmlab.errors import GuestError
from vmlab.experiment.cell import Run
from vmlab.machine.decode import decode
from vmlab.machine.engine import CODE_CALLBACK
from vmlab.parameters import Value
from vmlab.strategies.trap_and_emulate import SENSITIVE

#: Instructions compared at most.
LIMIT = 400_000

Step = tuple[int, tuple[int, ...]]


def record_steps(technique: str, parameters: Mapping[str, Value], limit: int = LIMIT) -> tuple[Run, list[Step]]:
    """(run, one step for every attempt to execute an instruction): RIP and the eight general registers."""
    run = Run(technique, {**parameters, "budget": limit})
    steps: list[Step] = []
    cpu = run.machine.cpu

    def on_instruction(_uc: int, address: int, _size: int, _data: int) -> None:
        cpu.load()
        step = (address, tuple(cpu.gpr(i) & 0xFFFFFFFF for i in range(8)))
        # A fault that the VMM handled unseen lets the same instruction run again, with the same registers.
        if not steps or steps[-1] != step:
            steps.append(step)

    run.machine.engine.hook(uc_const.UC_HOOK_CODE, CODE_CALLBACK, on_instruction)
    with contextlib.suppress(GuestError):  # how the run ended is the cell's business; the steps up to there count
        run.go()
    return run, steps


def first_divergence(technique: str, parameters: Mapping[str, Value], limit: int = LIMIT) -> dict[str, Any] | None:
    """The first instruction after which the guest's registers or path differ from native; None if they never do.

    Returns ``{"address", "symbol", "instruction", "step", "registers": {name: [native, here]}, "suspect"}``: the
    instruction is the last one that both executed from the same state. Its effect may be the late
    echo of an earlier one (PUSHF, then POP EAX): ``suspect`` is the nearest sensitive instruction at
    or before it, with its address.
    """
    native_run, native = record_steps("native", {k: v for k, v in parameters.items() if k not in ("sensitive", "emulation")}, limit)
    _, here = record_steps(technique, parameters, limit)
    if native == here:
        return None
    same = (a == b for a, b in zip(native, here, strict=False))
    index = next((i for i, equal in enumerate(same) if not equal), min(len(native), len(here)))
    if index == 0:
        raise GuestError("the two runs differ before their first instruction")
    address = native[index - 1][0]
    raw = native_run.strategy.read_guest(address, 15)
    instruction = decode(raw, 32)
    suspect = None
    for at, _ in reversed(native[:index]):
        found = decode(native_run.strategy.read_guest(at, 15), 32)
        if found is not None and found.op in SENSITIVE:
            suspect = {"address": at, "symbol": symbol_at(native_run.image.symbols, at), "instruction": found.text}
            break
    names = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
    differ: dict[str, list[int]] = {}
    if index < len(native) and index < len(here):
        if native[index][0] != here[index][0]:
            differ["eip"] = [native[index][0], here[index][0]]
        for name, x, y in zip(names, native[index][1], here[index][1], strict=True):
            if x != y:
                differ[name] = [x, y]
    return {
        "address": address, "symbol": symbol_at(native_run.image.symbols, address),
        "instruction": instruction.text if instruction else raw.hex(), "step": index, "registers": differ,
        "suspect": suspect,
    }


def symbol_at(symbols: Mapping[str, int], address: int) -> str:
    """The symbol at or before ``address``, with the distance; empty where there is none."""
    below = [(value, name) for name, value in symbols.items() if value <= address]
    if not below:
        return ""
    value, name = max(below)
    return name if value == address else f"{name}+{address - value:#x}"

