"""From a file to cells: sweeps, pairs, exclusions, defaults, collapse, baselines, and every refusal."""

from __future__ import annotations

import textwrap

import pytest
import yaml
from fake_lab import FakeLab

from vmlab.errors import ConfigError
from vmlab.experiment import matrix, schema, yamlfile
from vmlab.experiment.schema import Experiment


def load(text: str, *sets: str, quick: bool = False) -> Experiment:
    document = yamlfile.parse(textwrap.dedent(text), "f.yaml")
    return schema.load(document, FakeLab(), [schema.parse_set(s) for s in sets], quick)


def ids(experiment: Experiment) -> list[str]:
    return [cell.id for cell in experiment.cells]


SWEEP = """\
name: sweep
matrix:
  - technique: [native, trap-and-emulate]
    workload: cli_sti
    sensitive: [silent, trap]
    zip:
      density: [1, 500]
      iterations: [10, 5000]
profiles: [old-cpu]
claims: [sky-is-blue]
expect: {sky-is-blue: holds}
quick:
  divide: {iterations: 100}
  set: {density: 500}
"""


def test_a_sweep_with_pairs_drops_what_a_technique_does_not_declare_and_collapses() -> None:
    assert ids(load(SWEEP)) == [
        "native/density=1,guest=nano,iterations=10,workload=cli_sti",
        "native/density=500,guest=nano,iterations=5000,workload=cli_sti",
        "trap-and-emulate/density=1,guest=nano,iterations=10,sensitive=silent,workload=cli_sti",
        "trap-and-emulate/density=500,guest=nano,iterations=5000,sensitive=silent,workload=cli_sti",
        "trap-and-emulate/density=1,guest=nano,iterations=10,sensitive=trap,workload=cli_sti",
        "trap-and-emulate/density=500,guest=nano,iterations=5000,sensitive=trap,workload=cli_sti",
    ]


def test_missing_baselines_are_added_once() -> None:
    experiment = load("""\
        name: x
        matrix: {technique: trap-and-emulate, workload: cli_sti, sensitive: [silent, trap], density: 7}
        """)
    assert [(c.technique, c.added) for c in experiment.cells] == [
        ("trap-and-emulate", False), ("trap-and-emulate", False), ("native", True)]
    assert experiment.cells[2].id == experiment.cells[0].baseline


def test_a_parameter_that_a_workload_lacks_is_dropped_for_it() -> None:
    assert ids(load("name: x\nmatrix: {technique: native, workload: [compute, popf], density: [1, 2]}")) == [
        "native/guest=nano,iterations=1000,workload=compute",
        "native/density=1,guest=nano,iterations=1000,workload=popf", "native/density=2,guest=nano,iterations=1000,workload=popf"]
    with pytest.raises(ConfigError, match="no technique or workload of this block has the parameter 'density'"):
        load("name: x\nmatrix: {technique: native, workload: compute, density: [1, 2]}")


def test_experiment_parameters_are_shared_and_a_block_may_replace_them() -> None:
    experiment = load("""\
        name: x
        parameters: {iterations: 5, density: 3}
        matrix:
          - {technique: native, workload: cli_sti}
          - {technique: native, workload: popf, density: 4}
        """)
    assert ids(experiment) == [
        "native/density=3,guest=nano,iterations=5,workload=cli_sti", "native/density=4,guest=nano,iterations=5,workload=popf"]


def test_exclusions() -> None:
    rule = "    exclude:\n      - {technique: trap-and-emulate, sensitive: trap, density: [1]}\n"
    text = SWEEP.replace("profiles:", rule + "profiles:")
    assert len(load(text).cells) == 5
    with pytest.raises(ConfigError, match=r"f\.yaml:10: matrix\[0\]\.exclude\[0\]: .*matches no combination"):
        load(text.replace("density: [1]}", "density: [77]}"))


def test_set_narrows_a_sweep_or_replaces_it() -> None:
    assert [c.parameters["iterations"] for c in load(SWEEP, "density=500", "technique=native").cells] == [5000]
    assert [c.parameters["density"] for c in load(SWEEP, "density=42", "technique=native").cells] == [42, 42]
    both = load(SWEEP, "technique=binary-translation", "emulation=in-cache,callout", "density=1").cells
    assert [c.parameters.get("emulation") for c in both] == ["in-cache", "callout", None]


def test_quick_divides_and_sets() -> None:
    assert {(c.parameters["density"], c.parameters["iterations"]) for c in load(SWEEP, quick=True).cells} == {(500, 50)}


def test_the_resolved_configuration_is_the_same_experiment() -> None:
    experiment = load(SWEEP)
    again = schema.load(yamlfile.parse(yaml.safe_dump(experiment.resolved()), "resolved"), FakeLab())
    assert ids(again) == ids(experiment)
    assert again.hash() == experiment.hash()
    assert load(SWEEP, "density=1").hash() != experiment.hash()


@pytest.mark.parametrize(("change", "says"), [
    (("name: sweep", "name: Sweep Me"), "f.yaml:1: name: a name of a-z"),
    (("name: sweep", "name: ../up"), "f.yaml:1: name: a name of a-z"),
    (("profiles:", "profils:"), "f.yaml:9: profils: unknown key; did you mean 'profiles'?"),
    (("old-cpu", "older-cpu"), "f.yaml:9: profiles[0]: 'older-cpu' is not a profile; did you mean 'old-cpu'?"),
    (("claims: [sky-is-blue]", "claims: [sky-is-blu]"), "claims[0]: 'sky-is-blu' is not a claim; did you mean 'sky-is-blue'?"),
    (("holds", "hold"), "expect.sky-is-blue: 'hold' is no verdict; did you mean 'holds'?"),
    (("{sky-is-blue: holds}", "{breaks: holds}"), "expect.breaks: 'breaks' is not among this experiment's claims"),
    (("trap-and-emulate]", "trap-and-emulat]"),
     "f.yaml:3: matrix[0].technique[1]: 'trap-and-emulat' is not a technique; did you mean 'trap-and-emulate'?"),
    (("sensitive: [", "sensitiv: ["), "f.yaml:5: matrix[0].sensitiv: unknown key; did you mean 'sensitive'?"),
    (("sensitive: [silent, trap]", "emulation: callout"), "no technique or workload of this block has the parameter 'emulation'"),
    (("[silent, trap]", "[silent, tarp]"),
     "f.yaml:5: matrix[0].sensitive: sensitive: 'tarp' is not allowed; did you mean 'trap'?"),
    (("[silent, trap]", "[]"), "matrix[0].sensitive: the list is empty"),
    (("[silent, trap]", "{a: 1}"), "matrix[0].sensitive: a word or a whole number is needed"),
    (("cli_sti", "cli_stl"), "f.yaml:4: matrix[0].workload: 'cli_stl' is not a workload of nano; did you mean 'cli_sti'?"),
    (("[1, 500]", "[1, 5000]"), "density: 5000 is outside 1..1000"),
    (("[1, 500]", "[1, 1.5]"), "matrix[0].zip.density[1]: a word or a whole number is needed, not 1.5"),
    (("[1, 500]", "[1, many]"), "density: a whole number is needed, not 'many'"),
    (("[1, 500]", "[1, 2, 3]"), "zip needs two or more lists of the same length (got density: 3, iterations: 2)"),
    (("    zip:", "    density: 3\n    zip:"), "'density' is given twice in this block"),
    (("{iterations: 100}", "{iterations: 0}"), "quick.divide.iterations: a whole number from 1"),
    (("{density: 500}", "{densty: 500}"), "quick.set.densty: unknown key; did you mean 'density'?"),
    (("    workload: cli_sti\n", ""), "matrix[0]: no workload is named"),
    (("  - technique: [native, trap-and-emulate]\n    workload", "  - workload"), "matrix[0]: no technique is named"),
    (("profiles: [old-cpu]", "profiles: old-cpu"), "profiles: a list of profiles is needed, not text"),
    (("name: sweep", "name: sweep\ntitle: [x]"), "title: text is needed, not a list"),
    (("workload: cli_sti", "workload: cli_sti\n    guest: absent.elf"), "matrix[0].guest: absent.elf: no such image"),
])
def test_bad_files(change: tuple[str, str], says: str) -> None:
    assert change[0] in SWEEP
    with pytest.raises(ConfigError) as caught:
        load(SWEEP.replace(*change, 1))
    assert says in str(caught.value)
    assert str(caught.value).startswith("f.yaml:")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("name: x\nmatrix: []\n", "f.yaml:2: matrix: the matrix is empty"),
    ("name: x\n", "f.yaml:1: the matrix is missing"),
    ("name: x\nmatrix:\n", "f.yaml:2: matrix: the matrix is empty"),
    ("- a\n", "f.yaml:1: a mapping"),
    ("name: x\nmatrix:\n  technique: native\n  workload: cli_sti\n  exclude: [{technique: native}]\n", "nothing is left to run"),
    ("name: x\nmatrix: {technique: native, workload: popf, iterations: ["
     + ",".join(map(str, range(1, 300))) + "], density: [" + ",".join(map(str, range(1, 300))) + "]}", "89401 combinations"),
])
def test_empty_and_oversized(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert says in str(caught.value)


def test_a_technique_that_cannot_be_loaded_stops_only_those_who_name_it() -> None:
    class Broken(FakeLab):
        def techniques(self) -> list[str]:
            return [*super().techniques(), "broken"]

    document = yamlfile.parse("name: x\nmatrix: {technique: [native, broken], workload: compute}", "f.yaml")
    assert len(schema.load(document, Broken(), [schema.parse_set("technique=native")]).cells) == 1
    with pytest.raises(ConfigError, match="no technique 'broken'"):
        schema.load(document, Broken())


@pytest.mark.parametrize(("text", "says"), [
    ("density", "write key=value"), ("=3", "write key=value"), ("density=1,,2", "write key=value"),
    ("densty=3", "--set densty: unknown key; did you mean 'density'?"),
    ("technique=natve", "'natve' is not a technique; did you mean 'native'?"),
    ("density=lots", "density: a whole number is needed, not 'lots'"),
])
def test_bad_set(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SWEEP, text)
    assert says in str(caught.value)


def test_a_label_names_what_varies_and_no_two_cells_alike() -> None:
    cells = load(SWEEP).cells
    found = matrix.labels(cells)
    assert len(set(found.values())) == len(cells)
    constant = {key for key in cells[0].parameters if len({cell.parameters[key] for cell in cells if key in cell.parameters}) == 1}
    assert constant and all(f" {key}=" not in label for label in found.values() for key in constant)
    assert matrix.labels(cells[:1]) == {cells[0].id: cells[0].technique}


def test_cells_that_a_label_does_not_tell_apart_keep_their_ids() -> None:
    cells = [matrix.Cell("native", {"a": 1}), matrix.Cell("native", {"a": 1, "b": 2})]
    assert matrix.labels(cells) == {cell.id: cell.id for cell in cells}
