"""Profiles of the user's own: loaded by path; when broken, file and key are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vmlab import costs
from vmlab.costs.paths import PATHS_FILE, read_path_table
from vmlab.costs.profile import PROFILES
from vmlab.errors import ConfigError


@pytest.fixture
def data() -> Any:
    return yaml.safe_load((PROFILES / "penryn-2008.yaml").read_text(encoding="utf-8"))


def write(folder: Path, data: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def test_a_profile_of_ones_own_is_loaded_by_path(tmp_path: Path, data: Any) -> None:
    data["name"] = "my-machine"
    data["costs"]["insn.cli"] = {
        "value": 6, "low": 5, "high": 7, "provenance": "measured",
        "machine": "desk", "command": "bench cli", "date": "2014-05-01",
    }
    profile = costs.load(write(tmp_path, data))
    assert profile.name == "my-machine"
    figure = profile.figure("insn.cli")
    assert figure is not None
    assert figure.measured_on == ("desk", "bench cli", "2014-05-01")
    assert costs.unit_cost("machine.cli", profile) == 6
    assert "on desk by `bench cli`" in costs.explain_cost(profile, "insn.cli")


def change(figure: dict[str, Any], **fields: Any) -> dict[str, Any]:
    changed = {**figure, **fields}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(("key", "fields", "says"), [
    ("insn.cli", {"source": "nobody-1999"}, "nobody-1999"),
    ("insn.cli", {"source": None}, "needs 'source' and 'where'"),
    ("insn.cli", {"where": None}, "needs 'source' and 'where'"),
    ("insn.cli", {"value": "five"}, "'value' must be a positive number"),
    ("insn.cli", {"value": 0}, "'value' must be a positive number"),
    ("insn.cli", {"value": float("nan")}, "'value' must be a positive number"),
    ("insn.cli", {"high": 1}, "low <= value <= high"),
    ("insn.cli", {"provenance": "guessed"}, "cited, assumed or measured"),
    ("insn.cli", {"provenance": "measured"}, "'machine' must be text"),
    ("insn.cli", {"colour": "red"}, "unknown field 'colour'"),
    ("insn.iret", {"note": None}, "needs a 'note'"),
    ("insn.iret", {"high": 250}, "at least ×/÷ 2"),
    ("insn.iret", {"low": 200}, "at least ×/÷ 2"),
])
def test_a_broken_figure_names_file_and_key(tmp_path: Path, data: Any, key: str, fields: dict[str, Any], says: str) -> None:
    data["costs"][key] = change(data["costs"][key], **fields)
    with pytest.raises(ConfigError) as caught:
        costs.load(write(tmp_path, data))
    for part in ("mine.yaml", key, says):
        assert part in str(caught.value)


@pytest.mark.parametrize(("edit", "says"), [
    (lambda d: d.update(colour=1), "unknown key 'colour'"),
    (lambda d: d.update(provides=["x86", "vmxx"]), "'vmxx'"),
    (lambda d: d.update(year="old"), "'year' must be a positive number"),
    (lambda d: d.pop("words"), "'words' must be text"),
    (lambda d: d.pop("mhz"), "mhz"),
    (lambda d: d["costs"].pop("class.alu"), "'class.alu' is missing"),
    (lambda d: d["costs"].pop("entry"), "'entry' is missing"),
    (lambda d: d["costs"].update({"insn.clli": 3}), "nearest: 'insn.cli'"),
    (lambda d: d["costs"].update({"insn.cli": 3}), "must be a mapping"),
    (lambda d: d.update(costs=[1]), "costs: must be a mapping"),
])
def test_a_broken_profile_names_file_and_key(tmp_path: Path, data: Any, edit: Any, says: str) -> None:
    edit(data)
    with pytest.raises(ConfigError) as caught:
        costs.load(write(tmp_path, data))
    assert "mine.yaml" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("name: [", "not valid YAML"), ("- a\n", "must be a mapping"), ("name: a\nname: b\n", "twice"), ("", "must be a mapping"),
    ("x: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        costs.load(write(tmp_path, text))


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        costs.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="nearest: 'prescott-2005'"):
        costs.load("prescot-2005")


@pytest.mark.parametrize(("edit", "says"), [
    (lambda d: d["mix"].update(alu=0.5), "must sum to 1"),
    (lambda d: d["mix"].update(magic=0.1), "shares of the classes"),
    (lambda d: d["paths"]["decode"].pop("note"), "path.decode"),
    (lambda d: d.update(more=1), "unknown key 'more'"),
])
def test_a_broken_path_table_names_the_key(tmp_path: Path, edit: Any, says: str) -> None:
    table = yaml.safe_load(PATHS_FILE.read_text(encoding="utf-8"))
    edit(table)
    with pytest.raises(ConfigError, match=says):
        read_path_table(write(tmp_path, table))
