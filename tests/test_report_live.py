"""The page's script prices and judges as Python does: run under node on a made-up run, every profile that ships."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import made_up_run
import pytest

from vmlab import claims, costs
from vmlab.report import live, page

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed; the page's script runs under it here")


def node(program: str, *files: Path) -> Any:
    """What ``program`` returns, as JSON; ``load(name)`` gives it an asset's exports and ``read(i)`` the i-th file as JSON."""
    head = (f"const ASSETS = {json.dumps(str(live.ASSETS))}; const FILES = {json.dumps([str(f) for f in files])};"
            "const load = (name) => require(ASSETS + '/' + name);"
            "const read = (i) => JSON.parse(require('fs').readFileSync(FILES[i], 'utf8'));"
            "Object.assign(globalThis, load('pricing.js'));")
    done = subprocess.run([str(NODE), "-e", f"{head} console.log(JSON.stringify((() => {{ {program} }})()))"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    cells = made_up_run.cells(densities=(10, 1000))
    cells = [{**cell, "cycles": {}, "slowdown": {}} for cell in cells]
    made_up_run.price(cells, costs.names())
    ids = [name for name in claims.names() if name not in ("popek-goldberg", "ring-visible")]
    return {"cells": cells, "claims": claims.evaluate(ids, cells, costs.names())}


@pytest.fixture(scope="module")
def data(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("live") / "data.json"
    file.write_text(live.embed(page.data(results)), encoding="utf-8")
    return file


PRICE_ALL = """
  const data = read(0), override = OVERRIDE, made = [];
  for (const profile of data.order) {
    const model = new CostModel(data, profile, override);
    for (const cell of data.cells) {
      const native = data.cells.find((c) => c.technique === "native" && c.parameters.workload === cell.parameters.workload
        && c.parameters.density === cell.parameters.density);
      const counts = pricedCounts(data, cell.events), base = pricedCounts(data, native.events);
      made.push([profile, model.price(counts, cell.platform), model.slowdown(counts, cell.platform, base, native.platform)]);
    }
  }
  return made;
"""


@pytest.mark.parametrize("override", [{}, {"insn.cli": 3.0, "path.trap": 900.0}, {"insn.default": 7.0, "class.load": 0.5, "mhz": 1000.0}])
def test_prices_and_slowdowns_are_pythons_on_every_profile(results: dict[str, Any], data: Path, override: dict[str, float]) -> None:
    made = iter(node(PRICE_ALL.replace("OVERRIDE", json.dumps(override)), data))
    compared = 0
    for profile in json.loads(data.read_text(encoding="utf-8"))["order"]:
        natives = {(c["parameters"]["workload"], c["parameters"]["density"]): c for c in results["cells"] if c["technique"] == "native"}
        for cell in results["cells"]:
            name, price, slower = next(made)
            assert name == profile
            native = natives[cell["parameters"]["workload"], cell["parameters"]["density"]]
            ours = costs.price(cell["events"], costs.load(profile), cell["platform"], override=override)
            ratio = costs.slowdown(cell["events"], native["events"], costs.load(profile), cell["platform"], override=override)
            if isinstance(ours, costs.Unsupported) or isinstance(ratio, costs.Unsupported):
                assert price is None and slower is None, cell["id"]
                continue
            for field in ("total", "low", "high"):
                assert price[field] == pytest.approx(getattr(ours, field), rel=1e-9), (cell["id"], profile, field)
            assert price["breakdown"] == pytest.approx(dict(ours.breakdown), rel=1e-9)
            for field in ("value", "low", "high"):
                assert slower[field] == pytest.approx(getattr(ratio, field), rel=1e-9), (cell["id"], profile, field)
            compared += 1
    assert compared > 100


def test_random_numbers_are_pythons(tmp_path: Path) -> None:
    seed = live._seed("prescott-2005", "insn.cli")
    file = tmp_path / "seed.json"
    file.write_text(json.dumps(seed), encoding="utf-8")
    made = node("""const bytes = Uint8Array.from(atob(read(0)), (c) => c.charCodeAt(0)), words = [];
        for (let end = bytes.length; end > 0; end -= 4) {
          let w = 0;
          for (let i = Math.max(0, end - 4); i < end; i++) w = w * 256 + bytes[i];
          words.push(w);
        }
        const random = mersenne(words); return Array.from({length: 2000}, random);""", file)
    rng = random.Random(f"{costs.SEED}/prescott-2005/insn.cli")
    assert made == [rng.random() for _ in range(2000)]


JUDGE_ALL = """
  Object.assign(globalThis, load('claims.js'));
  const data = read(0), moved = OVERRIDE, models = {};
  const of = (name) => models[name] || (models[name] = new CostModel(data, name, moved[name]));
  return data.claims.map((claim) => [claim.id, judge(claim, of)]);
"""


@pytest.mark.parametrize("override", [
    {}, {"insn.cli": 2.0, "insn.sti": 2.0}, {"exception.delivery": 20.0, "insn.iret": 20.0, "path.trap": 20.0},
    {"entry": 10.0, "exit.vmmcall": 10.0}])
def test_verdicts_are_pythons_at_moved_costs(results: dict[str, Any], data: Path, override: dict[str, float]) -> None:
    # A cost that a profile lacks altogether cannot be moved there; in the page there is no slider for it either.
    possible = {name: {k: v for k, v in override.items() if costs.load(name).figure(k) is not None} for name in costs.names()}
    book = {name: costs.load(name).with_values(moved) for name, moved in possible.items()}
    ids = [claim["id"] for claim in results["claims"]]
    ours = {claim["id"]: claim for claim in claims.evaluate(ids, results["cells"], costs.names(), costbook=book)}
    followed = 0
    for name, found in node(JUDGE_ALL.replace("OVERRIDE", json.dumps(possible)), data):
        if found is None:
            assert ours[name]["verdict"] == next(c["verdict"] for c in results["claims"] if c["id"] == name)
            continue
        followed += 1
        assert found["verdict"] == ours[name]["verdict"], (name, found)
        assert found["byProfile"] == ours[name]["by_profile"], name
    assert followed >= 4


def test_hostile_strings_cannot_leave_the_data() -> None:
    text = live.embed({"x": "</script><script>alert(1)</script><!--\u2028"})
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text)["x"].startswith("</script>")
