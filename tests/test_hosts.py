"""The same experiment on hosts that lack things: no compiler, no live state, no fork, no POSIX modules, no UTF-8, no checkout.

Only Linux can be run here; what other hosts lack is taken away by hosts/sitecustomize.py and the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machinelab import PATHS

from vmlab.experiment import schema, yamlfile
from vmlab.experiment.cell import run_cell
from vmlab.experiment.lab import Lab

ROOT = Path(__file__).resolve().parent.parent
DENY = Path(__file__).resolve().parent / "hosts"
#: Variables that a bare host does not have, or that would lead back to this one.
PRIVATE = ("PYTHONPATH", "PYTHONUTF8", "PYTHONIOENCODING", "LANG", "LC_ALL", "VMLAB_MACHINE", "CC", "XDG_CACHE_HOME", "HOME")


def environment(home: Path, *path: Path, **more: str) -> dict[str, str]:
    """This process's environment with ``path`` for Python and a home that is empty."""
    kept = {key: value for key, value in os.environ.items() if key not in PRIVATE}
    return {**kept, "HOME": str(home), "PYTHONPATH": os.pathsep.join(map(str, path)), **more}


def bare(home: Path, *path: Path) -> dict[str, str]:
    """No compiler and no library built earlier, no live state, no fork, no POSIX modules, a console of cp1252."""
    return environment(home / "bare", DENY, *path, PATH=str(home), PYTHONUTF8="0", PYTHONIOENCODING="cp1252", LC_ALL="C")


def experiment(cwd: Path, env: dict[str, str], out: str, *arguments: str, name: str = "cli_heavy") -> dict[str, Any]:
    """Run an experiment in a process of its own; what two hosts must agree in, the verdicts, and the ways into the machine."""
    done = subprocess.run(
        [sys.executable, "-m", "vmlab", "experiment", name, "--strict", "--jobs", "2", "--out", out, *arguments],
        cwd=cwd, env=env, capture_output=True, check=False, timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    if "PYTHONIOENCODING" in env:
        (done.stdout + done.stderr).decode(env["PYTHONIOENCODING"])
    results = json.loads((cwd / out / "results.json").read_text(encoding="utf-8"))
    paths = {cell.pop("machine_path") for cell in results["cells"]}
    for cell in results["cells"]:
        del cell["host_seconds"]
    assert (cwd / out / "report.html").is_file()
    return {"results": results, "paths": paths}


def test_what_is_taken_away_is_away(tmp_path: Path) -> None:
    code = ("import os, sys\n"
            "assert not hasattr(os, 'fork') and sys.stdout.encoding == 'cp1252'\n"
            "try: import fcntl\nexcept ImportError: pass\nelse: raise SystemExit('fcntl')\n"
            "from vmlab.machine.pc import Machine\nfrom vmlab.machine import fast\n"
            "assert 'compiler' in fast.why_not() or not fast.why_not(), fast.why_not()\n"
            "from vmlab.machine import state\nassert state.live_address(None, None) is None\n"
            "assert Machine(1 << 20, 'portable').path == 'portable'\n")
    done = subprocess.run([sys.executable, "-c", code], env=bare(tmp_path, ROOT), cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


SMALL = """\
name: small
matrix:
  technique: [native, trap-and-emulate, binary-translation, paravirtualization, hardware-assisted]
  workload: [mixed]
  sensitive: trap
  iterations: 10
  density: 100
profiles: [haswell-2013]
claims: [fidelity-all]
expect: {fidelity-all: holds}
"""


def test_a_small_experiment_agrees_on_a_bare_host(tmp_path: Path) -> None:
    """A cell of each technique; the whole of cli_heavy is the slow test below."""
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    here = experiment(tmp_path, environment(tmp_path, ROOT), "usual", name="small.yaml")
    there = experiment(tmp_path, bare(tmp_path, ROOT), "bare", name="small.yaml")
    assert len(here["results"]["cells"]) == 5
    assert here["results"] == there["results"]


@pytest.mark.slow
def test_the_whole_of_cli_heavy_agrees_on_every_host(tmp_path: Path) -> None:
    """Fast and portable in a checkout; then from an installed wheel, away from any checkout, on a host that lacks everything."""
    portable = experiment(tmp_path, environment(tmp_path, ROOT, VMLAB_MACHINE="portable"), "portable", "--quick")
    auto = experiment(tmp_path, environment(tmp_path, ROOT), "auto", "--quick")
    assert portable["paths"] == {"portable"}
    assert auto["results"] == portable["results"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Without a compiler the wheel has no library in it.
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(wheels)], check=True, timeout=300, env={**os.environ, "CC": "/nonexistent/cc"})
    wheel, = wheels.glob("vmlab-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=120)
    assert not [path for path in site.rglob("*") if path.suffix in (".so", ".dylib", ".dll")]
    installed = experiment(tmp_path, bare(tmp_path, site), "installed", "--quick")
    assert installed["paths"] == {"portable"}
    assert installed["results"] == portable["results"]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_every_cell_of_the_densest_column_does_a_hundred_thousand_operations(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_MACHINE", path)
    cells = schema.load(yamlfile.read(schema.find("cli_heavy")), Lab()).cells
    column = [cell for cell in cells if cell.parameters["workload"] == "cli_sti" and cell.parameters["density"] == 500]
    assert len(column) == 7
    for cell in column:
        record = run_cell(cell.technique, cell.parameters)
        assert (record["status"], record["machine_path"]) == ("ok", path)
        assert record["work"]["operations"] >= 100_000, cell.id
