"""``vmlab new strategy``: the file runs, is right and wrong where it says, and is finished by what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab import guests, strategies
from vmlab.cli import main as cli
from vmlab.cli import new
from vmlab.experiment.cell import run_cell
from vmlab.strategies.trap_and_emulate import SENSITIVE

WORKLOADS = list(guests.workloads("nano"))


def right(technique: str, workload: str) -> bool:
    """As the conformance suite judges: it ends well and as the bare machine does, or says that it does not."""
    parameters = {"guest": "nano", "workload": workload, "iterations": 3 if workload == "compute" else 12, "density": 100}
    native, cell = run_cell("native", parameters), run_cell(technique, parameters)
    assert native["status"] == "ok", native["error"]
    return cell["status"] == "ok" and cell["fidelity"]["outcome"] == native["fidelity"]["outcome"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_new_file_fails_just_where_it_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", "strategy", "my-own"]) == 0
    said = capsys.readouterr().out
    wrong = [workload for workload in WORKLOADS if not right("my-own.py:MyOwnStrategy", workload)]
    assert wrong and len(wrong) < len(WORKLOADS)
    assert wrong == [workload for workload in WORKLOADS if workload in new.missing()]
    right_line = next(line for line in said.splitlines() if line.startswith("Right already:"))
    text = (here / "my-own.py").read_text("utf-8")
    for workload in WORKLOADS:
        assert (f"  {workload}: " in said) == (workload in wrong) == (f'    "{workload}": ' in text)
        assert (workload in right_line.replace(".", ",").replace(",", " ").split()) == (workload not in wrong)


@pytest.mark.parametrize("trapping", [["pushf", "popf", "iret"], sorted(SENSITIVE)])
def test_what_it_asks_for_finishes_it(trapping: list[str], here: Path) -> None:
    text = new.text("done")
    assert text.count("= frozenset()") == 1
    Path("done.py").write_text(text.replace("= frozenset()", f"= frozenset({trapping!r})"), "utf-8")
    assert [workload for workload in WORKLOADS if not right("done.py:DoneStrategy", workload)] == []


def test_a_file_that_exists_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("precious", "utf-8")
    assert cli.main(["new", "strategy", "mine"]) == 2
    assert "mine.py exists" in capsys.readouterr().err
    assert Path("mine.py").read_text("utf-8") == "precious"


@pytest.mark.parametrize(("arguments", "says"), [
    (["strategy", "../mine"], "'../mine' is not a name"),
    (["strategy", "9lives"], "'9lives' is not a name"),
    (["strategy", "x" * 42], "is not a name"),
    (["strategy", "trap_and_emulate"], "'trap-and-emulate' is a technique already"),
    (["strategy", "mine", "--dir", "nowhere"], "there is no folder 'nowhere'"),
    (["guest", "mine"], "invalid choice: 'guest'"),
])
def test_wrong_usage_is_status_2_and_writes_nothing(arguments: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["none", "class", "strategy", "instruction", "a_b-C"])
def test_any_name_gives_a_class_that_loads(name: str, here: Path) -> None:
    assert cli.main(["new", "strategy", name, "--dir", str(here)]) == 0
    assert strategies.load(f"{name}.py:{new.class_name(name)}").name == name.lower().replace("_", "-")
