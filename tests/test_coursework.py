"""The coursework: text, configurations and notebooks are one, right answers are right and wrong ones wrong, and it all runs from a wheel."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmlab import claims, coursework
from vmlab.cli.main import VERBS, main
from vmlab.coursework import course as courses
from vmlab.coursework import document, folders
from vmlab.errors import ConfigError

ROOT = Path(__file__).parents[1]
FOLDERS = ["trapping", "cli", "translation", "memory", "paravirtual", "hosted", "generations", "verdicts"]
TEXTS = sorted(ROOT.glob("experiments/**/README.md"))
COMMANDS = sorted({(text.parent.name, line.strip()) for text in TEXTS for line in text.read_text("utf-8").splitlines()
                   if line.strip().startswith("vmlab ")})

#: What is right, by hand: counted on paper where the exercise allows it, else as the profile's figures give it.
ANSWERS: dict[str, dict[str, Any]] = {
    "trapping": {"lose-a-flag": "PUSHF", "lose-an-interrupt": 1, "write-a-strategy": "mine.py:MineStrategy"},
    # 60 and 64 cycles; two traps at 564 + 325 + 150 instructions of entry, 200 of decoding and 200 of emulation, 1.89 cycles each.
    "cli": {"price-natively": 60 + 64, "price-trapped": 2 * (564 + 325 + 550 * 1.89), "where-it-stops": "penryn-2008"},
    "translation": {"clean": 0, "unchained": 2, "callout": 1273 / 117},
    "memory": {"trace-once": 1, "nested": 0, "switches": "tracing", "nobody": 0},
    # 300 over 8 is 37.5: each of the 38 batches, and one more that ends early.
    "paravirtual": {"batch-8": 39, "not-divided": 301, "ring": 7},
    "hosted": {"switches": 2, "factor": 3.528},
    # Table 4.3: (2333 + 1630) over (402 + 344). Nested tables came with AMD's K10.
    "generations": {"exit-cost": (2333 + 1630) / (402 + 344), "crossover": "k10-2007", "memory-share": 1},
    "verdicts": {"flip": 570, "far": 31.23, "whose": "cited"},
}
WRONG: dict[str, dict[str, Any]] = {
    "trapping": {"lose-a-flag": "POPF", "lose-an-interrupt": 200},
    "cli": {"price-natively": 60, "price-trapped": 3000, "where-it-stops": "prescott-2005"},
    "paravirtual": {"batch-8": 75, "not-divided": 39},
    "verdicts": {"flip": 500, "far": 60, "whose": "assumed"},
}


def parse(command: str) -> argparse.Namespace:
    words = shlex.split(command)
    assert words[1] in VERBS
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"vmlab.cli.{words[1]}").configure(parser)
    return parser.parse_args(words[2:])


# --- one text ----------------------------------------------------------------------------------------------


def test_the_folders_are_on_the_teachers_page_with_their_claims() -> None:
    page = (ROOT / "experiments/README.md").read_text("utf-8")
    assert coursework.names() == FOLDERS
    for name in FOLDERS:
        row, = [line for line in page.splitlines() if line.startswith(f"| [{name}]({name}/README.md)")]
        course = coursework.load(name)
        assert [f"`{claim}`" for claim in course.claims] == row.split("|")[3].strip().split(", ") and course.takes in row


def test_every_claim_has_a_folder() -> None:
    assert sorted({claim for name in FOLDERS for claim in coursework.load(name).claims}) == claims.names()
    for name in FOLDERS:
        course = coursework.load(name)
        judged = yaml.safe_load(course.configuration.read_text("utf-8"))
        assert judged["name"] == f"course_{name}" and set(judged["expect"]) == set(judged["claims"])
        assert set(judged["claims"]) <= {*course.claims, "fidelity-all"}


@pytest.mark.parametrize("name", FOLDERS)
def test_text_and_notebook_are_the_generated_ones(name: str) -> None:
    """`python -m vmlab.coursework` brings them up to date."""
    for path, text in document.files(coursework.load(name)).items():
        assert path.read_text("utf-8") == text


@pytest.mark.parametrize(("folder", "command"), COMMANDS)
def test_a_command_in_the_text_is_one(folder: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "experiments" / (folder if folder in FOLDERS else ""))
    parsed = parse(command)
    if command.startswith("vmlab experiment "):
        assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    if command.startswith("vmlab answer "):
        course, _, exercise = parsed.exercise.partition("/")
        assert course == folder and coursework.load(course).exercise(exercise)


def test_every_exercise_has_an_answer_here() -> None:
    assert {name: list(answers) for name, answers in ANSWERS.items()} == {
        name: [exercise.id for exercise in coursework.load(name).exercises] for name in FOLDERS}


# --- answers -----------------------------------------------------------------------------------------------


def finish(folder: Path) -> None:
    """The strategy of the exercise, written and mended in the one line that it names."""
    assert main(["new", "strategy", "mine", "--dir", str(folder)]) == 0
    file = folder / "mine.py"
    text = file.read_text("utf-8")
    empty = "TRAPPING: frozenset[str] = frozenset()"
    assert text.count(empty) == 1
    file.write_text(text.replace(empty, 'TRAPPING: frozenset[str] = frozenset({"pushf", "popf", "iret"})'), "utf-8")


@pytest.mark.parametrize("name", WRONG)
def test_right_answers_are_right_and_wrong_ones_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    course = coursework.load(name)
    for exercise, wrong in WRONG[name].items():
        assert course.answer(exercise, ANSWERS[name][exercise]).right is True, exercise
        said = course.answer(exercise, wrong)
        assert said.right is False and said.words.startswith("Not yet. ") and "Hint: " in said.words
        assert course.answer(exercise).right is None
        assert course.solution(exercise).words


def test_a_strategy_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    course = coursework.load("trapping")
    assert main(["new", "strategy", "raw"]) == 0
    said = course.answer("write-a-strategy", "raw.py:RawStrategy")
    assert said.right is False and "pushf_popf" in said.words and "cli_sti" not in said.words
    finish(tmp_path)
    assert course.answer("write-a-strategy", "mine.py:MineStrategy").right is True


def test_answers_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for words, says in (
        (["cli/price-natively", "many"], "a number is asked for"), (["cli/price-natively", "nan"], "a number is asked for"),
        (["cli/where-it-stops", "penryn"], "did you mean 'penryn-2008'"), (["cli/price"], "did you mean 'price-trapped'"),
        (["clii/price-natively"], "did you mean 'cli'"), (["cli"], "FOLDER/EXERCISE"), (["trapping/write-a-strategy", "mine"], "FILE.py:CLASS"),
        (["trapping/write-a-strategy", "mine.py:Mine"], "no file 'mine.py'"),
    ):
        assert main(["answer", *words]) == 2
        assert says in capsys.readouterr().err, words


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["answer"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}/{exercise}" in listed for name, answers in ANSWERS.items() for exercise in answers)
    assert main(["answer", "generations/exit-cost"]) == 0 and "a number (times)" in capsys.readouterr().out
    assert main(["answer", "generations/exit-cost", "5.3"]) == 0 and capsys.readouterr().out.startswith("Right. ")
    assert main(["answer", "generations/exit-cost", "4"]) == 1 and "too few" in capsys.readouterr().out
    assert main(["answer", "generations/exit-cost", "--solution"]) == 0 and "5.31" in capsys.readouterr().out


# --- folders -----------------------------------------------------------------------------------------------


def test_the_folders_are_copied_out_and_an_edited_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "coursework"]) == 0
    assert "cd coursework/trapping" in capsys.readouterr().out.replace("\\", "/")
    assert (tmp_path / "coursework/README.md").is_file()
    for name in FOLDERS:
        assert {path.name for path in (tmp_path / "coursework" / name).iterdir()} == {"course.yaml", "README.md", f"{name}.yaml", f"{name}.ipynb"}
    assert main(["new", "coursework"]) == 2 and "not empty" in capsys.readouterr().err
    own = tmp_path / "coursework/generations/course.yaml"
    own.write_text(own.read_text("utf-8").replace("over_profile: westmere-2010", "over_profile: haswell-2013"), "utf-8")
    assert main(["answer", "coursework/generations/exit-cost", "6.94"]) == 0  # (2333 + 1630) over (318 + 253)
    assert main(["answer", "generations/exit-cost", "6.94"]) == 1


def test_what_a_broken_folder_says(tmp_path: Path) -> None:
    text = (ROOT / "experiments/cli/course.yaml").read_text("utf-8")
    for old, new, says in (("order:", "ordr:", "did you mean 'order'"), ("kind: number", "kind: nunber", "did you mean 'number'"),
                           ("    hint: two", "    hnt: two", "hnt"), ("takes: about 4 s\n", "", "lacks takes")):
        assert old in text
        (tmp_path / "course.yaml").write_text(text.replace(old, new, 1), "utf-8")
        with pytest.raises(ConfigError, match=says):
            coursework.load(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder"):
        coursework.load(tmp_path / "none")
    (tmp_path / "course.yaml").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="one configuration"):
        assert courses.load(tmp_path).configuration


def test_a_run_beside_the_folders_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for name in ("one/results/x.yaml", "one/course.yaml", "README.md", "two/loose.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x", "utf-8")
    monkeypatch.setattr(folders, "root", lambda: source)
    assert {path.name for path in folders.copy(tmp_path / "to")} == {"course.yaml", "README.md"}
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        folders.copy(tmp_path / "file" / "below")


# --- notebooks ---------------------------------------------------------------------------------------------


def run_notebook(python: str, folder: Path, answers: dict[str, Any], env: dict[str, str]) -> dict[str, str]:
    """Run the folder's notebook with these answers; what each cell said."""
    done = subprocess.run([python, str(ROOT / "tests/run_notebook.py"), str(folder / f"{folder.name}.ipynb"), json.dumps(answers)],
                          env=env, cwd=folder.parent, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str] = json.loads(done.stdout)
    return said


def test_a_notebook_runs_with_right_answers_and_with_none(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folders.copy(tmp_path / "work")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    said = run_notebook(sys.executable, tmp_path / "work/cli", {"price-natively": 124, "where-it-stops": "haswell-2013"}, env)
    assert said["price-natively-answer"].startswith("Right. ") and said["where-it-stops-answer"].startswith("Right. ")
    assert said["price-trapped-answer"].startswith("Not answered yet. ") and "UNDECIDED" not in said["where-it-stops-try"]
    assert "trap-and-emulate" in said["run"] and "holds      cli-native-slow" in said["run"]


def outside(home: Path) -> dict[str, str]:
    """This process's environment without the checkout in Python's path."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"IPYTHONDIR": str(home / "ipython")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment that has vmlab's wheel, and this environment's other packages."""
    base = tmp_path_factory.mktemp("installed")
    pip, env = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"], outside(base)
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(base)], check=True, timeout=300, env=env)
    wheel, = base.glob("vmlab-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")], check=True, timeout=120)
    python = base / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=120, env=env)
    # The other packages, by path: a .pth file below that path (an editable vmlab's) is not read.
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, capture_output=True, text=True, check=True, env=env)
    Path(site.stdout.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_notebook_and_configuration_run_from_an_installed_wheel(name: str, installed: Path, tmp_path: Path) -> None:
    env = outside(tmp_path)
    vmlab = [str(installed), "-m", "vmlab"]
    subprocess.run([*vmlab, "new", "coursework", "work"], cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True)
    folder = tmp_path / "work" / name
    if name == "trapping":
        finish(folder)
    said = run_notebook(str(installed), folder, ANSWERS[name], env)
    assert str(ROOT) not in said["last"] and "site-packages" in said["last"]
    for exercise in ANSWERS[name]:
        assert said[f"{exercise}-answer"].startswith("Right. "), (exercise, said[f"{exercise}-answer"])
    subprocess.run([*vmlab, "experiment", f"{name}.yaml", "--dry-run"], cwd=folder, env=env, check=True, timeout=60, capture_output=True)
