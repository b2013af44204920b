"""The priced clock: what a guest measures with RDTSC is what the lab prices."""

from __future__ import annotations

import functools

import pytest
from machinelab import DEBUG_EXIT, PATHS, kernel

from vmlab import costs
from vmlab.errors import ConfigError, UnsupportedByStrategy
from vmlab.experiment import clock, store
from vmlab.experiment.cell import run_cell
from vmlab.experiment.matrix import Cell
from vmlab.machine.pc import Machine, Stop, StopReason
from vmlab.machine.state import RBX
from vmlab.strategies.base import Strategy
from vmlab.strategies.hardware import HardwareAssisted
from vmlab.strategies.native import Native
from vmlab.strategies.translation import BinaryTranslation
from vmlab.strategies.trap_and_emulate import TrapAndEmulate

END = "xor eax, eax; " + DEBUG_EXIT
PROFILE = "haswell-2013"
TECHNIQUES: dict[str, tuple[type[Strategy], dict[str, str]]] = {
    "native": (Native, {}), "trapping": (TrapAndEmulate, {"sensitive": "trap"}), "translated": (BinaryTranslation, {}),
    "assisted": (HardwareAssisted, {}), "nested": (HardwareAssisted, {"memory": "nested"}),
}


def ran(technique: str, source: str, path: str = "portable", **parameters: str) -> Strategy:
    """A kernel that ran to its end under a priced clock."""
    kind, more = TECHNIQUES[technique]
    strategy = kind(Machine(64 << 20, path), {**more, **parameters})
    clock.install(strategy, {"clock": PROFILE, **more, **parameters})
    strategy.load(kernel(source), "")
    assert strategy.run(1_000_000) == Stop(StopReason.EXIT, 0)
    return strategy


def measured(strategy: Strategy) -> int:
    """What the guest left in EBX."""
    return strategy.guest_state().gpr[RBX]


def between(body: str) -> str:
    """A kernel that measures ``body``, which leaves ESI alone."""
    return f"rdtsc; mov esi, eax; {body}; rdtsc; sub eax, esi; mov ebx, eax; {END}"


def test_instructions_by_their_classes() -> None:
    def of(key: str) -> float:
        figure = costs.load(PROFILE).figure(key)
        assert figure is not None
        return figure.value

    # From one RDTSC to the next: the first itself, MOV, 100 NOP, 10 loads, 10 stores, CLI.
    source = between("; ".join(["nop"] * 100 + ["mov eax, [0x9000]"] * 10 + ["mov [0x9000], eax"] * 10 + ["cli"]))
    cycles = of("insn.rdtsc") + 101 * of("class.alu") + 10 * of("class.load") + 10 * of("class.store") + of("insn.cli")
    assert measured(ran("native", source)) in (int(cycles), int(cycles) + 1)


@functools.cache
def twice(technique: str, path: str) -> tuple[Strategy, Strategy]:
    """A hundred CPUIDs, and two hundred."""
    def source(n: int) -> str:
        return between(f"mov edi, {n}; l: xor eax, eax; cpuid; dec edi; jnz l")

    return ran(technique, source(100), path), ran(technique, source(200), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_guest_measures_what_the_lab_prices(technique: str, path: str) -> None:
    short, long = twice(technique, path)
    profile, platform = costs.load(PROFILE), short.platform(short.chosen)
    prices = [costs.nominal(strategy.snapshot().events, profile, platform) for strategy in (short, long)]
    assert all(isinstance(price, float) for price in prices)
    assert abs(measured(long) - measured(short) - (prices[1] - prices[0])) < 2      # each reading is a whole number


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_same_on_both_paths(technique: str) -> None:
    portable, fast = (twice(technique, path) for path in ("portable", "auto"))
    assert [measured(strategy) for strategy in portable] == [measured(strategy) for strategy in fast]


def test_an_exit_costs_what_its_parts_cost() -> None:
    short, long = twice("assisted", "auto")
    profile = costs.load(PROFILE)
    per_exit = {"exit.cpuid": 1, "entry": 1, "vmm.decode": 1, "emulate.cpuid": 1,
                **{kind: (long.counts[kind] - short.counts[kind]) // 100 for kind in ("vmcb.read", "vmcb.write")},
                "machine.alu": 2, "machine.branch": 1}     # XOR, DEC and a JNZ that is taken; the CPUID itself did not retire
    events = {kind: n * 100 for kind, n in per_exit.items()}
    assert per_exit["vmcb.read"] > 3
    assert measured(long) - measured(short) == pytest.approx(costs.nominal(events, profile, "svm"), abs=2)


def test_devices_keep_to_virtual_time() -> None:
    """The ledger of a guest that does not look at its clock is the same whatever the clock counts."""
    plain, priced = (run_cell("native", {"workload": "interrupt", "iterations": 3, **more}) for more in ({}, {"clock": PROFILE}))
    assert plain["status"] == "ok" and plain["events"] == priced["events"] and plain["fidelity"]["state"] == priced["fidelity"]["state"]


def test_waiting_takes_the_clock_rate() -> None:
    """HLT until something due in 10000 ns: 34000 cycles at 3400 MHz."""
    strategy = ran("native", END)
    machine, cycles = strategy.machine, strategy.machine.cycles
    assert cycles is not None
    before = cycles(None)
    machine.timeline.at(machine.time + 10_000, lambda: None)
    machine.patience = 1
    assert not machine.wait() and cycles(None) - before == 34_000


def test_setting_it_sets_it() -> None:
    source = "mov ecx, 0x10; mov eax, 5000000; xor edx, edx; wrmsr; rdtsc; mov ebx, eax; " + END
    for technique in TECHNIQUES.keys() - {"translated"}:    # RDTSC runs in its cache, and shows the machine's counter
        assert 5_000_000 <= measured(ran(technique, source)) < 5_020_000


def test_a_cpu_that_could_not_have_run_it_has_no_clock_for_it() -> None:
    cell = run_cell("hardware-assisted", {"workload": "cpuid", "iterations": 1, "memory": "nested", "clock": "prescott-2005"})
    assert cell["status"] == "unsupported" and "prescott-2005 could not have run this" in cell["error"]
    with pytest.raises(UnsupportedByStrategy, match="northwood-2002"):
        clock.install(HardwareAssisted(Machine(64 << 20, "portable")), {"clock": "northwood-2002"})


def test_an_unknown_clock_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'haswell-2013'"):
        run_cell("native", {"workload": "cpuid", "iterations": 1, "clock": "haswel-2013"})


def test_the_prices_are_part_of_a_cells_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, priced = Cell("native", {"guest": "nano"}), Cell("native", {"guest": "nano", "clock": PROFILE})
    before = store.content_hash(plain, "", {}), store.content_hash(priced, "", {})
    changed = costs.load(PROFILE).with_values({"insn.cli": 77})
    costs_of = dict(costs.load(PROFILE).costs) | dict(changed.overrides)
    monkeypatch.setattr(clock, "load", lambda name: type("Changed", (), {"costs": costs_of}))
    assert store.content_hash(plain, "", {}) == before[0] != before[1] != store.content_hash(priced, "", {})
