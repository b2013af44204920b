"""Techniques by name: described without their machine, found by entry point or file, and the manual's example works as printed."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab import strategies
from vmlab.errors import ConfigError
from vmlab.experiment.lab import Lab
from vmlab.strategies.base import Strategy
from vmlab.strategies.techniques import DESCRIBED, Technique

ROOT = Path(__file__).resolve().parent.parent
MANUAL = ROOT / "docs" / "writing-a-strategy.md"


def test_every_built_in_technique_is_described_and_its_class_inherits_the_description() -> None:
    assert list(DESCRIBED) == list(strategies.BUILT_IN)
    for name, described in DESCRIBED.items():
        found = strategies.load(name)
        assert issubclass(found, described) and issubclass(found, Strategy)
        for what in ("name", "summary", "parameters", "full_virtualization"):
            assert getattr(found, what) == getattr(described, what), (name, what)
        # Said in one place: the class that runs does not say it again.
        assert not {"name", "summary", "parameters", "full_virtualization", "platform", "unfaithful"} & set(vars(found)), name


def test_descriptions_import_no_machine() -> None:
    code = ("import sys\nfrom vmlab import strategies\n"
            "for name in strategies.BUILT_IN: strategies.describe(name)\n"
            "assert not {'unicorn', 'capstone', 'vmlab.machine', 'vmlab.vmm'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()


def example() -> str:
    """The first Python listing of the manual."""
    found = re.search(r"```python\n(.*?)```", MANUAL.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(example(), encoding="utf-8")
    return f"{file}:OwnVendor"


def test_the_manuals_example_is_short_and_runs_as_printed(mine: str) -> None:
    from vmlab.experiment.cell import run_cell

    assert len(example().splitlines()) < 40
    found = strategies.describe(mine)
    assert (found.name, found.summary) == ("own-vendor", "trap-and-emulate with a CPUID of its own")
    assert found.parameters == DESCRIBED["trap-and-emulate"].parameters
    cell = run_cell(mine, {"guest": "nano", "workload": "cpuid", "iterations": 20, "density": 100})
    assert cell["status"] == "ok" and cell["events"]["emulate.cpuid"] == cell["work"]["operations"]


def test_a_file_without_the_class_names_the_nearest(mine: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'OwnVendor'"):
        strategies.load(mine.replace("OwnVendor", "OwnVender"))
    with pytest.raises(ConfigError, match="no file"):
        strategies.load("absent.py:Thing")


@pytest.fixture
def _looked_through_anew() -> Iterator[None]:
    strategies._found.cache_clear()
    yield
    strategies._found.cache_clear()


@pytest.mark.usefixtures("_looked_through_anew")
def test_a_technique_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(example(), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("own-vendor", "elsewhere:OwnVendor", "vmlab.strategies")
    broken = importlib.metadata.EntryPoint("broken", "elsewhere_absent:Nothing", "vmlab.strategies")
    usual = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points",
                        lambda **wanted: [*usual(**wanted), point, broken] if wanted == {"group": "vmlab.strategies"} else usual(**wanted))
    assert strategies.names()[-2:] == ["broken", "own-vendor"]
    lab = Lab()
    assert issubclass(strategies.describe("own-vendor"), Technique)
    assert "sensitive" in lab.parameters("own-vendor")
    # One that cannot be loaded stops only those who name it; the hash of the counting code covers the other's file.
    assert "broken" not in lab.loadable() and "own-vendor" in lab.loadable()
    with pytest.raises(ConfigError, match="'broken' cannot be loaded"):
        lab.parameters("broken")
    before = lab.code()
    (tmp_path / "elsewhere.py").write_text(example() + "\n# changed\n", encoding="utf-8")
    assert lab.code() != before
