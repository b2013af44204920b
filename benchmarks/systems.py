"""Rows of ``run.py``: the lab's operating system under every technique against itself on the bare machine, in host CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rows import Row, row

from vmlab.experiment.cell import Run
from vmlab.parameters import Value

_UNDER: tuple[tuple[str, dict[str, Value]], ...] = (
    ("trap-and-emulate", {"memory": "tracing", "sensitive": "trap"}), ("binary-translation", {"memory": "tracing"}),
    ("paravirtualization", {"memory": "direct"}), ("hardware-assisted", {"memory": "tracing"}), ("hardware-assisted", {"memory": "nested"}))


def _seconds(technique: str, times: int, iterations: int, **chosen: Value) -> float:
    """Mean CPU seconds of the guest's whole run, made so many times."""
    spent = 0.0
    for _ in range(times):
        run = Run(technique, {"guest": "minios", "workload": "forkwait", "iterations": iterations, **chosen})
        start = time.process_time()
        stop = run.go()
        spent += time.process_time() - start
        if stop.exit_code != 0:
            raise SystemExit(f"minios under {technique} ended with {stop}")
    return spent / times


def systems(rounds: int, scale: float, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """A boot with one fork and wait, where all code is new to the machine and to the VMM; and with hundreds of them, where it is not."""
    for what, iterations, boots in (("minios from boot to end", 1, 3), ("minios with 300 forks", max(int(300 * scale), 1), 1)):
        for technique, chosen in _UNDER:
            name = f"{what}, {technique}, {chosen['memory']}"
            if not wanted(name):
                continue
            ratios = []
            for _ in range(rounds):
                before = _seconds("native", boots, iterations)
                mine = _seconds(technique, boots, iterations, **chosen)
                ratios.append(2 * mine / (before + _seconds("native", boots, iterations)))
            yield row(name, ratios, None, "lower", "× native in the lab")
