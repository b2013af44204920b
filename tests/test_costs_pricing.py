"""Pricing: sums, ranges from common samples, platform gating, what-if values."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab import costs
from vmlab.errors import ConfigError

X86_KINDS = sorted(k for k in costs.RULES if k.split(".")[0] not in ("entry", "exit", "vmcb"))
LEDGERS = st.dictionaries(st.sampled_from(X86_KINDS), st.integers(1, 10**7), min_size=1, max_size=25)
P4 = costs.load("prescott-2005")


def priced(
    events: dict[str, int], profile: costs.Profile = P4, override: dict[str, float] | None = None,
) -> costs.Price:
    result = costs.price(events, profile, "x86", override=override)
    assert isinstance(result, costs.Price), result
    return result


def ratio(events: dict[str, int], native: dict[str, int], profile: costs.Profile = P4) -> costs.Ratio:
    result = costs.slowdown(events, native, profile, "x86")
    assert isinstance(result, costs.Ratio), result
    return result


@settings(max_examples=30, deadline=None)
@given(events=LEDGERS, name=st.sampled_from(costs.names()))
def test_breakdown_sums_to_total_and_the_range_holds_it(events: dict[str, int], name: str) -> None:
    result = priced(events, costs.load(name))
    assert sum(result.breakdown.values()) == result.total
    assert all(cycles > 0 for cycles in result.breakdown.values())
    assert result.low <= result.total <= result.high
    by_hand = sum(n * cost for k, n in events.items() if isinstance(cost := costs.unit_cost(k, costs.load(name)), float))
    assert result.total == pytest.approx(by_hand)


def test_one_cost_alone_has_its_own_range() -> None:
    result = priced({"machine.cli": 1000})
    assert result.total == 60_000
    assert result.low == pytest.approx(52_000, rel=0.01)
    assert result.high == pytest.approx(66_000, rel=0.01)


def test_slowdown_uses_common_samples() -> None:
    events = {"machine.alu": 1000, "trap.gp": 10, "vmm.decode": 10}
    assert ratio(events, events) == costs.Ratio(1.0, 1.0, 1.0)
    twice = ratio({kind: 2 * n for kind, n in events.items()}, events)
    assert (twice.value, twice.low, twice.high) == (2.0, 2.0, 2.0)
    # Priced apart, the same two runs would overlap widely.
    apart = priced(events)
    assert apart.high / apart.low > 1.2


def test_different_costs_vary_independently() -> None:
    one, other = priced({"machine.alu": 1000}), priced({"machine.load": 500})
    both = priced({"machine.alu": 1000, "machine.load": 500})
    assert both.high < one.high + other.high
    assert both.low > one.low + other.low


def test_pricing_twice_gives_the_same_bits_and_order_does_not_matter() -> None:
    events = {"machine.alu": 12345, "machine.cli": 77, "trap.gp": 3, "emulate.cli": 3}
    fresh = costs.load("penryn-2008").with_values({})
    again = costs.load("penryn-2008").with_values({})
    assert priced(events, fresh) == priced(dict(events), again)
    backwards = priced(dict(reversed(events.items())), fresh)
    assert backwards.total == pytest.approx(priced(events, fresh).total)


@pytest.mark.parametrize(("name", "platform", "can"), [
    ("prescott-2005", "x86", True), ("prescott-2005", "svm", True), ("prescott-2005", "svm-npt", False),
    ("penryn-2008", "vmx", True), ("penryn-2008", "svm-npt", False),
    ("haswell-2013", "svm", True), ("haswell-2013", "svm-npt", True), ("haswell-2013", "vmx-ept", True),
    ("northwood-2002", "x86", True), ("northwood-2002", "x86-64", False), ("prescott-2005", "svm-64", True), ("prescott-2005", "svm-npt-64", False),
    ("k8-2005", "x86", True), ("k8-2005", "x86-64", True), ("k8-2005", "svm", False), ("k8-2005", "svm-npt", False),
])
def test_a_cpu_prices_only_what_it_could_have_run(name: str, platform: str, can: bool) -> None:
    result = costs.price({"machine.alu": 1}, costs.load(name), platform)
    assert isinstance(result, costs.Price if can else costs.Unsupported)
    if isinstance(result, costs.Unsupported):
        assert name in result.reason
        assert result.as_dict()["status"] == "unsupported"
        assert isinstance(costs.slowdown({"machine.alu": 1}, {"machine.alu": 1}, costs.load(name), platform), costs.Unsupported)


def test_an_exit_without_a_figure_is_refused_not_free() -> None:
    result = costs.price({"entry": 1, "exit.cpuid": 1}, costs.load("k8-2005"), "x86")
    assert isinstance(result, costs.Unsupported)
    assert "entry" in result.reason


def test_hypercall_transitions_are_shown_with_the_hypercalls() -> None:
    only = priced({"trap.int": 5, "hypercall.sched_op": 5})
    assert set(only.breakdown) == {"hypercalls"}
    some = priced({"trap.int": 7, "hypercall.sched_op": 5})
    gate = costs.unit_cost("trap.int", P4)
    assert isinstance(gate, float)
    assert some.breakdown["traps"] == pytest.approx(2 * gate)


def test_kinds_that_are_not_priced_cost_nothing_and_do_not_change_shares() -> None:
    assert priced({"machine.alu": 5, "retired.kernel": 10**6, "idle": 9}) == priced({"machine.alu": 5})


@pytest.mark.parametrize(("events", "platform", "says"), [
    ({"machine.cly": 1}, "x86", "machine.cly"), ({"machine.cli": -1}, "x86", "negative"), ({"machine.cli": 1}, "arm", "arm"),
])
def test_misuse_is_named(events: dict[str, int], platform: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        costs.price(events, P4, platform)


def test_an_empty_native_run_cannot_be_compared_with() -> None:
    assert isinstance(costs.slowdown({"machine.alu": 1}, {"idle": 1}, P4, "x86"), costs.Unsupported)


def test_override_holds_a_cost_without_a_range() -> None:
    result = priced({"machine.cli": 10}, override={"insn.cli": 5.0})
    assert (result.total, result.low, result.high) == (50.0, 50.0, 50.0)
    assert priced({"machine.cli": 10}).total == 600  # the profile itself is untouched


def test_override_can_single_out_what_a_default_prices() -> None:
    changed = P4.with_values({"insn.lgdt": 7})
    assert costs.unit_cost("machine.lgdt", changed) == 7
    assert costs.unit_cost("machine.lidt", changed) == costs.unit_cost("machine.lidt", P4)


def test_an_override_of_an_unknown_cost_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"insn\.cli"):
        costs.price({"machine.cli": 1}, P4, "x86", override={"insn.cly": 1})
    with pytest.raises(ConfigError, match="positive"):
        costs.price({"machine.cli": 1}, P4, "x86", override={"insn.cli": 0})


@pytest.mark.parametrize("key", ["insn.sti", "class.store", "path.callout", "insn.iret"])
def test_breakeven_is_where_both_cost_the_same(key: str) -> None:
    native = {"machine.cli": 50, "machine.sti": 50, "machine.store": 10, "machine.iret": 1}
    other = {"machine.store": 5000, "machine.iret": 3, "bt.callout.hlt": 1}
    if key == "insn.iret":
        native, other = {"machine.iret": 3, "machine.alu": 100}, {"machine.iret": 1, "machine.alu": 1000}
    value = costs.breakeven(native, other, P4, key)
    assert value is not None
    sides = [costs.nominal(side, P4, "x86", override={key: value}) for side in (native, other)]
    assert sides[0] == pytest.approx(sides[1])


def test_no_breakeven_where_the_cost_plays_no_part_or_would_be_negative() -> None:
    assert costs.breakeven({"machine.alu": 10}, {"machine.alu": 20}, P4, "insn.cli") is None
    assert costs.breakeven({"machine.cli": 1, "machine.sti": 1}, {"machine.alu": 1}, P4, "insn.cli") is None


def test_a_price_of_forty_kinds_is_quick() -> None:
    events = {kind: 1000 + i for i, kind in enumerate(X86_KINDS[:: max(1, len(X86_KINDS) // 40)])}
    costs.price(events, P4, "x86")  # the first draws the samples
    best = 1.0
    for _ in range(5):
        start = time.process_time()
        costs.price(events, P4, "x86")
        best = min(best, time.process_time() - start)
    assert best < 0.03
