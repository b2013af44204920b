"""The data of the costs room: every figure has its provenance, every event kind its rule or its reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vmlab import costs
from vmlab.costs.figures import ASSUMED_FACTOR, Figure
from vmlab.costs.model import CostModel
from vmlab.ledger import EVENTS

PROFILES = costs.names()


def all_figures() -> list[tuple[str, Figure]]:
    table = costs.path_table()
    rows = [("paths", figure) for figure in (*table.paths.values(), *table.shared.values())]
    return rows + [(name, figure) for name in PROFILES for figure in costs.load(name).costs.values()]


def test_every_event_kind_has_a_rule_or_a_reason_and_not_both() -> None:
    assert set(costs.RULES) | set(costs.NOT_PRICED) == set(EVENTS)
    assert not set(costs.RULES) & set(costs.NOT_PRICED)
    assert all(len(reason.split()) >= 3 for reason in costs.NOT_PRICED.values())


def test_rules_have_terms_and_a_known_cause() -> None:
    assert {rule.cause for rule in costs.RULES.values()} <= set(costs.CAUSES)
    assert all(rule.terms for rule in costs.RULES.values())
    assert all(factor > 0 for rule in costs.RULES.values() for factor, _ in rule.terms)


def test_every_path_length_and_shared_figure_is_used_by_a_rule() -> None:
    used = {key for rule in costs.RULES.values() for _, key in rule.terms}
    table = costs.path_table()
    assert {*table.paths, *table.shared} <= used


@pytest.mark.parametrize("name", PROFILES)
def test_no_event_is_free_on_a_profile_that_can_run_it(name: str) -> None:
    profile = costs.load(name)
    assisted = bool(profile.provides & {"vmx", "svm"})
    for kind in costs.RULES:
        cost = costs.unit_cost(kind, profile)
        if not assisted and kind.split(".")[0] in ("entry", "exit", "vmcb"):
            assert isinstance(cost, costs.Unsupported)
        else:
            assert isinstance(cost, float), (kind, cost)
            assert cost > 0, kind


@pytest.mark.parametrize(("owner", "figure"), all_figures(), ids=lambda item: getattr(item, "key", item))
def test_every_figure_says_where_it_comes_from(owner: str, figure: Figure) -> None:
    assert all(source in costs.bibliography() for source in figure.sources)
    assert 0 < figure.low <= figure.value <= figure.high
    if figure.provenance == "cited":
        assert figure.sources
        assert figure.where
    if figure.provenance == "assumed":
        assert figure.note
        assert figure.low * ASSUMED_FACTOR <= figure.value * 1.000001
        assert figure.value * ASSUMED_FACTOR <= figure.high * 1.000001


@pytest.mark.parametrize("name", PROFILES)
def test_profile_says_who_and_when(name: str) -> None:
    profile = costs.load(name)
    assert profile.name == name
    assert name.endswith(f"-{profile.year}")
    assert profile.vendor in ("Intel", "AMD")
    assert profile.words


def test_names_are_oldest_first() -> None:
    assert [costs.load(name).year for name in PROFILES] == sorted(costs.load(name).year for name in PROFILES)
    assert {"prescott-2005", "penryn-2008", "haswell-2013", "k8-2005"} <= set(PROFILES)


# The published numbers themselves, so that a slip of the hand in a profile is noticed (Bugnion et al. 2017, table 4.3).
@pytest.mark.parametrize(("name", "row"), [
    ("prescott-2005", (2333, 1630, 1599, 1926, 1942, 178, 171)),
    ("merom-2006", (944, 727, 764, 1156, 858, 53, 43)),
    ("penryn-2008", (643, 638, 611, 858, 708, 26, 26)),
    ("westmere-2010", (402, 344, 389, 569, 427, 6, 5)),
    ("sandybridge-2011", (460, 365, 434, 507, 472, 5, 4)),
    ("ivybridge-2012", (452, 334, 398, 466, 436, 4, 3)),
    ("haswell-2013", (318, 253, 327, 512, 383, 5, 4)),
    ("broadwell-2014", (348, 265, 332, 531, 397, 5, 4)),
])
def test_exit_costs_are_the_published_ones(name: str, row: tuple[int, ...]) -> None:
    keys = ("entry", "exit.vmmcall", "exit.cpuid", "exit.page_fault", "exit.io", "vmread", "vmwrite")
    table = costs.load(name).costs
    assert tuple(table[key].value for key in keys) == row
    assert all(table[key].provenance == "cited" for key in keys)


@pytest.mark.parametrize(("name", "row"), [  # PUSHF, POPF, CPUID leaf 0, RDTSC (Fog 2021; InstLatx64)
    ("northwood-2002", (10, 52, 266, 80)), ("k8-2005", (2, 10, 48, 7)), ("merom-2006", (7, 20, 180, 64)),
    ("k10-2007", (3, 11, 54, 67)), ("penryn-2008", (7, 20, 197, 32)), ("nehalem-2009", (1, 14, 84, 24)),
    ("sandybridge-2011", (1, 18, 96, 28)), ("ivybridge-2012", (1, 18, 101, 27)), ("haswell-2013", (1, 18, 99, 24)),
    ("broadwell-2014", (1, 18, 99, 24)), ("skylake-2015", (1, 20, 101, 25)), ("icelake-2019", (1, 21, 104, 27)),
    ("zen1-2017", (4, 13, 125, 37)), ("zen2-2019", (4, 13, 131, 37)), ("zen3-2020", (4, 13, 128, 36)),
])
def test_instruction_costs_are_the_published_ones(name: str, row: tuple[int, ...]) -> None:
    table = costs.load(name).costs
    assert tuple(table[f"insn.{op}"].value for op in ("pushf", "popf", "cpuid", "rdtsc")) == row
    assert all(table[f"insn.{op}"].provenance == "cited" for op in ("pushf", "popf", "cpuid", "rdtsc"))


def test_nehalems_round_trip_is_the_published_one_although_its_parts_are_not_known() -> None:
    table = costs.load("nehalem-2009").costs
    assert table["entry"].value + table["exit.vmmcall"].value == 1009
    assert {table[key].provenance for key in ("entry", "exit.vmmcall")} == {"assumed"}


def test_hardware_costs_that_nobody_published_are_assumed() -> None:
    """AMD's exits, and Intel's after Broadwell: no bare-hardware figure was found."""
    for name in ("k10-2007", "zen1-2017", "zen2-2019", "zen3-2020", "skylake-2015", "icelake-2019"):
        table = costs.load(name).costs
        assert {f.provenance for k, f in table.items() if k.split(".")[0] in ("entry", "exit", "vmread", "vmwrite")} == {"assumed"}


def test_nested_paging_is_priced_only_where_the_cpu_had_it() -> None:
    able = {name for name in PROFILES if costs.supports(costs.load(name), "svm-npt")}
    assert {"northwood-2002", "k8-2005", "prescott-2005", "merom-2006", "penryn-2008"}.isdisjoint(able)
    assert {"k10-2007", "nehalem-2009", "westmere-2010", "haswell-2013", "zen2-2019"} <= able


def test_only_the_oldest_cpu_has_no_long_mode() -> None:
    assert [name for name in PROFILES if not costs.supports(costs.load(name), "x86-64")] == ["northwood-2002"]


def test_path_lengths_reproduce_the_totals_that_calibrated_them() -> None:
    """Adams & Agesen 2006, section 3.3: RDTSC on a Pentium 4 by trap 2030 and by callout 1254; 2300 to translate."""
    profile = costs.load("prescott-2005")

    def total(*kinds: str) -> float:
        cycles = costs.nominal(dict.fromkeys(kinds, 1), profile, "x86")
        assert isinstance(cycles, float)
        return cycles

    assert total("trap.gp", "vmm.decode", "emulate.rdtsc") == pytest.approx(2030, rel=0.01)
    assert total("bt.callout.rdtsc", "emulate.rdtsc") == pytest.approx(1254, rel=0.01)
    assert total("bt.translate.instruction") == pytest.approx(2300, rel=0.01)
    assert total("machine.in") == pytest.approx(3209, rel=0.01)
    for key in ("path.trap", "path.decode", "path.emulate", "path.callout"):
        assert "trap-vs-callout-vs-incache" in costs.path_table().paths[key].calibrates


def test_bibtex_of_every_reference_is_well_formed() -> None:
    for key, reference in costs.bibliography().items():
        entry = costs.bibtex(key)
        assert entry.startswith(f"@{reference.type}{{{key},\n")
        assert entry.count("{") == entry.count("}")
        assert all(f"{field} = {{" in entry for field in ("author", "title", "year"))


def test_explanations_name_source_range_and_default() -> None:
    profile = costs.load("prescott-2005")
    cli = costs.explain_cost(profile, "insn.cli")
    assert "60 cycles (52 to 66), cited" in cli
    assert "Adams" in cli
    assert "calibrates cli-native-slow" in cli
    assert "insn.lgdt has no figure of its own" in costs.explain_cost(profile, "insn.lgdt")
    assert "path.trap" in costs.explain_event(profile, "trap.gp")
    assert "not priced" in costs.explain_event(profile, "machine.int")
    assert "no price on k8-2005" in costs.explain_event(costs.load("k8-2005"), "entry")


def test_pricing_needs_nothing_compiled() -> None:
    """The costs room can price results where the machine cannot run (a browser, say)."""
    script = (
        "import sys; from vmlab import costs;"
        "costs.price({'machine.cli': 1}, costs.load('prescott-2005'), 'x86');"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'unicorn', 'capstone', 'numpy', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_costs_used_resolves_defaults_classes_and_clock() -> None:
    profile = costs.load("prescott-2005")
    used = costs.costs_used({"machine.lgdt": 1, "machine.in": 2, "vmm.decode": 1, "retired.cli": 5}, profile)
    assert {"insn.default", "insn.in", "shared.port_latency_ns", "mhz", "path.decode", "class.alu"} <= set(used)
    assert "insn.cli" not in used
    assert "adams-agesen-2006" in {r.key for r in costs.references_used({"machine.cli": 1}, profile)}
    assert CostModel.of(profile) is CostModel.of(profile)
