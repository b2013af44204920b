"""Which cost decides a comparison, how certain it is, and that a changed cost changes what depends on it and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab import costs
from vmlab.costs import Quantity
from vmlab.errors import ConfigError

P4 = costs.load("prescott-2005")
KINDS = sorted(costs.RULES)
LEDGERS = st.dictionaries(st.sampled_from(KINDS), st.integers(1, 10**6), min_size=1, max_size=12)


def quantity(**events: float) -> Quantity:
    return Quantity({name.replace("__", "."): n for name, n in events.items()})


@settings(max_examples=40, deadline=None)
@given(events=LEDGERS)
def test_a_quantity_is_the_price_of_its_events_nominally_and_under_every_sample(events: dict[str, int]) -> None:
    price = costs.price(events, P4, "x86")
    if isinstance(price, costs.Unsupported):
        with pytest.raises(costs.NoFigure):
            Quantity(events).value(P4)
        return
    whole = Quantity(events)
    assert whole.value(P4) == pytest.approx(price.total)
    ordered = sorted(whole.samples(P4))
    assert min(ordered[50], price.total) == pytest.approx(price.low)
    assert max(ordered[950], price.total) == pytest.approx(price.high)


@settings(max_examples=40, deadline=None)
@given(a=LEDGERS, b=LEDGERS, factor=st.floats(-3, 3))
def test_quantities_add_and_scale_as_their_values_do(a: dict[str, int], b: dict[str, int], factor: float) -> None:
    x, y = Quantity(a), Quantity(b)
    try:
        each = x.value(P4), y.value(P4)
    except costs.NoFigure:
        return
    assert ((x - y) * factor).value(P4) == pytest.approx((each[0] - each[1]) * factor, rel=1e-6, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(events=LEDGERS, key=st.sampled_from(sorted({*P4.costs, *costs.path_table().paths, *costs.path_table().shared})))
def test_changing_one_cost_changes_exactly_the_prices_that_depend_on_it(events: dict[str, int], key: str) -> None:
    changed = P4.with_values({key: P4.figure(key).value * 3})  # type: ignore[union-attr]
    for kind in events:
        before, after = costs.unit_cost(kind, P4), costs.unit_cost(kind, changed)
        depends = key in costs.costs_used({kind: 1}, P4)
        assert (before != after) == depends, (kind, key)


def test_a_single_cost_and_a_constant() -> None:
    pair = Quantity(costs={"insn.cli": 1, "insn.sti": 1}, constant=-60)
    assert pair.value(P4) == 64
    assert set(pair.figures(P4)) == {"insn.cli", "insn.sti"}
    assert Quantity(costs={"path.hypercall": 2}).value(P4) == pytest.approx(160 * 1.89, rel=0.01)
    with pytest.raises(costs.NoFigure, match="entry"):
        Quantity(costs={"entry": 1}).value(costs.load("k8-2005"))
    with pytest.raises(ConfigError, match=r"machine\.cly"):
        Quantity({"machine.cly": 1})


def test_agreement_is_total_where_nothing_can_change_and_half_where_it_hangs_on_a_coin() -> None:
    assert costs.agreement([quantity(machine__cli=1)], P4) == 1
    even = quantity(machine__cli=1) - Quantity(constant=60)
    assert costs.agreement([even], P4) == pytest.approx(0.5, abs=0.01)
    always, never = Quantity(constant=1), Quantity(constant=-1)
    assert costs.agreement([always, never], P4) == 1, "certain that they do not both hold"
    assert not costs.holds([always, never], P4) and costs.holds([always, never], P4, enough=1)


def test_the_decider_is_the_cost_that_flips_it_with_least_stretch_and_where() -> None:
    pair = {"insn.cli": 1.0, "insn.sti": 1.0}
    assert costs.decider([Quantity(costs=pair, constant=-60)], P4) is None, "either alone would have to be negative"
    found = costs.decider([Quantity(costs=pair, constant=-70)], P4)
    assert found is not None and found.figure.key == "insn.cli" and found.flips_at == pytest.approx(6)
    close = quantity(machine__cli=100) - quantity(bt__callout__cli=4)
    found = costs.decider([close], P4)
    assert found is not None
    at = {found.figure.key: found.flips_at}
    assert close.value(P4.with_values(at)) == pytest.approx(0, abs=1e-6)
    assert found.as_dict()["within_range"] == (found.figure.low <= found.flips_at <= found.figure.high)


def test_no_cost_decides_what_is_counted() -> None:
    assert costs.decider([Quantity(constant=5)], P4) is None


def test_where_one_of_two_is_enough_the_decider_must_flip_the_whole() -> None:
    sure, open_ = Quantity(constant=1), quantity(machine__cli=1) - Quantity(constant=59)
    assert costs.decider([sure, open_], P4, enough=1) is None
    both = costs.decider([sure, open_], P4)
    assert both is not None and both.figure.key == "insn.cli" and both.flips_at == pytest.approx(59)
