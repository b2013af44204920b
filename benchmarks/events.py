"""Rows of ``run.py``: events and counted loops, the lab against the naive way or bare Unicorn, in host CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import guests
import naive
from rows import Row, row

from vmlab import strategies
from vmlab.guests.image import GuestImage
from vmlab.machine.pc import Machine
from vmlab.parameters import Value

_BUDGET = 10_000_000_000


def lab(technique: str, image: GuestImage, event: str, path: str | None = None, **chosen: Value) -> tuple[float, int]:
    """CPU seconds of a guest's whole run under a technique, and how often the ledger says that ``event`` was."""
    strategy = strategies.load(technique)(Machine(path=path), chosen)
    strategy.load(image, "")
    start = time.process_time()
    stop = strategy.run(_BUDGET)
    seconds = time.process_time() - start
    if stop.exit_code != 0:
        raise SystemExit(f"{technique}: the benchmark's guest ended with {stop}")
    snapshot = strategy.snapshot()
    return seconds, snapshot.events.get(event, 0) if event else snapshot.user + snapshot.kernel


@dataclass(frozen=True)
class Event:
    """One kind of event: the lab's guest and its count in the ledger, and the naive way of the same work."""

    name: str
    limit: float | None
    count: int
    lab: Callable[[int], tuple[float, int]]
    naive: Callable[[int], float]


def _pages(count: int) -> tuple[float, int]:
    code, tables = guests.paging(count // guests.WINDOW_PAGES)
    return lab("trap-and-emulate", guests.image(code, tables), "shadow.fault.hidden", memory="lazy", sensitive="trap")


def _naive_pages(count: int) -> float:
    rounds = count // guests.WINDOW_PAGES
    code, tables = guests.paging(rounds)
    # Each round the pages, and the kernel's own; before paging its code once more.
    return naive.hidden_faults(code, tables, rounds * (guests.WINDOW_PAGES + 1) + 2)


def _interrupts(count: int) -> tuple[float, int]:
    code, _, data = guests.interrupted(count)
    return lab("native", guests.image(code, data), "interrupt.delivered")


def _naive_interrupts(count: int) -> float:
    _, code, data = guests.interrupted(count)
    return naive.interrupts(code, data, count)


EVENTS = (
    Event("#GP traps (CLI, trap-and-emulate)", 15, 20_000,
          lambda n: lab("trap-and-emulate", guests.image(guests.clis(n)), "trap.gp"), lambda n: naive.traps(guests.clis(n), n)),
    Event("callouts (CLI, binary translation)", 10, 20_000,
          lambda n: lab("binary-translation", guests.image(guests.clis(n)), "bt.callout.cli", emulation="callout"),
          lambda n: naive.callouts(*guests.gated(n), n)),
    Event("hypercalls (xen_version)", 10, 20_000,
          lambda n: lab("paravirtualization", guests.pv_image(guests.hypercalls(n)), "hypercall.xen_version"),
          lambda n: naive.hypercalls(guests.hypercalls(n, guests.END), n)),
    Event("VM exits (CPUID, nested paging)", 10, 5_000,
          lambda n: lab("hardware-assisted", guests.image(guests.cpuids(n)), "exit.cpuid", memory="nested"),
          lambda n: naive.exits(guests.cpuids(n), n)),
    Event("VM exits (IN, nested paging)", None, 5_000,
          lambda n: lab("hardware-assisted", guests.image(guests.port_reads(n)), "exit.io", memory="nested"),
          lambda n: naive.exits(guests.port_reads(n), n, naive.IN)),
    Event("VM exits (load from the APIC, guest and nested paging)", None, 5_000,
          lambda n: lab("hardware-assisted", guests.image(*guests.apic_reads(n)), "exit.nested_page_fault", memory="nested"),
          lambda n: naive.exits(guests.apic_reads(n)[0], n, naive.NESTED_FAULT, guests.apic_reads(n)[1])),
    Event("hidden faults (lazy shadow paging)", 5, 5_120, _pages, _naive_pages),
    Event("port reads (IN, bare machine)", None, 20_000,
          lambda n: lab("native", guests.image(guests.port_reads(n)), "io.device"), lambda n: naive.port_reads(guests.port_reads(n), n)),
    Event("interrupts (timer, each 1000 blocks, bare machine)", None, 1_000, _interrupts, _naive_interrupts),
    Event("#GP traps that Python handles (MOV from CR0)", None, 20_000,
          lambda n: lab("trap-and-emulate", guests.image(guests.moves(n)), "trap.gp"), lambda n: naive.traps(guests.moves(n), n)),
)


def events(rounds: int, scale: float, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Events per second against the naive way."""
    for event in EVENTS:
        if not wanted(event.name):
            continue
        count = max(int(event.count * scale) // guests.WINDOW_PAGES, 2) * guests.WINDOW_PAGES
        ratios, mine, theirs = [], [], []
        for _ in range(rounds):
            before = event.naive(count)
            seconds, seen = event.lab(count)
            if seen < count:
                raise SystemExit(f"{event.name}: the ledger has {seen} events, not {count}")
            after = event.naive(count)
            ratios.append((before + after) / 2 / count / (seconds / seen))
            mine.append(1e6 * seconds / seen)
            theirs.append(1e6 * min(before, after) / count)
        yield row(event.name, ratios, event.limit, "higher", f"{min(mine):.2f} µs each; naive {min(theirs):.1f}")


#: (technique, what it is given, limit)
_UNDER: tuple[tuple[str, dict[str, Value], float], ...] = (
    ("native", {}, 1.25), ("trap-and-emulate", {}, 1.25), ("paravirtualization", {}, 1.25),
    ("hardware-assisted", {}, 1.25), ("hardware-assisted", {"memory": "nested"}, 1.25), ("binary-translation", {}, 1.5),
)


def loops(rounds: int, scale: float, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Exact counts of loops of ten instructions a block, with an event each 100 000 instructions, against no hooks at all."""
    def measure(name: str, technique: str, chosen: dict[str, Value], limit: float | None, loop: str, length: int, passes: int,
                repeat: int) -> Iterator[Row]:
        if not wanted(name):
            return
        paravirtual = technique == "paravirtualization"
        plain = guests.computing(passes, loop, repeat, "90" if paravirtual else "fa")
        image = (guests.pv_image(guests.computing(passes, loop, repeat, "90", guests.PV_END)) if paravirtual
                 else guests.image(guests.computing(passes, loop, repeat, "fa")))
        ratios, rates = [], []
        for _ in range(rounds):
            before = naive.bare(plain)
            seconds, instructions = lab(technique, image, "", **chosen)
            after = naive.bare(plain)
            rates.append((instructions / seconds / 1e6, instructions / min(before, after) / 1e6))
            if length and instructions < length * passes * repeat:
                raise SystemExit(f"{name}: only {instructions} instructions were counted")
            ratios.append(2 * seconds / (before + after))
        mine, theirs = (max(column) for column in zip(*rates, strict=True))
        yield row(name, ratios, limit, "lower", f"{mine:.0f} million instructions a second; bare {theirs:.0f}")

    many = max(int(200 * scale), 20)
    for technique, chosen, limit in _UNDER:
        words = ", ".join([technique, *map(str, chosen.values())])
        yield from measure(f"computing loop, {words}", technique, chosen, limit, guests.COMPUTING, 10, 10_000, many)
    for name, loop, length in (("blocks of five and eight instructions", guests.MIXED, 13), ("blocks of two instructions", guests.TINY, 2)):
        for technique in ("native", "binary-translation"):
            yield from measure(f"{name}, {technique}", technique, {}, None, loop, length, 20_000, many // 2)
    for technique in ("trap-and-emulate", "hardware-assisted", "binary-translation"):
        yield from measure(f"a CLI each 1000 instructions, {technique}", technique, {}, None, guests.COMPUTING, 10, 100, many * 20)
