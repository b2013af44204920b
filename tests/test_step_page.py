"""Stepper pages: every scenario that can be recorded now, in a real browser, by keyboard, at three widths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, needs_chromium

from vmlab import costs
from vmlab.cli import step as verb
from vmlab.cli.main import main
from vmlab.report import steps
from vmlab.trace.align import groups, places
from vmlab.trace.recorder import Moment, Step
from vmlab.trace.scenarios import SCENARIOS

READY = "document.documentElement?.dataset.ready === 'yes'"
QUICK = ["cli", "popf", "port-io", "interrupt"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return {name: verb.recorded(name) for name in QUICK}


@pytest.fixture(scope="module")
def urls(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("steps")
    for name, data in recorded.items():
        verb.write(folder / f"{name}.html", data)
    return {name: (folder / f"{name}.html").as_uri() for name in recorded}


def test_the_cli_is_a_trap_a_store_a_mask_and_a_cli(recorded: dict[str, Any]) -> None:
    data = recorded["cli"]
    number = [i for i, group in enumerate(data["groups"]) if group["code"] == "cli"][-1]
    lines = {lane["technique"]: lane["groups"][number]["lines"] for lane in data["lanes"]}
    assert [line["code"] for line in lines["native"]] == ["cli"] == [line["code"] for line in lines["hardware-assisted"]]
    assert lines["trap-and-emulate"][0]["kind"] == "trap"
    assert [(line["where"], line["code"][:12]) for line in lines["binary-translation"]] == [("cache", "mov byte ptr")]
    assert len(lines["paravirtualization"]) == 1 and lines["paravirtualization"][0]["code"].startswith("mov byte ptr")


def test_lanes_show_the_same_guest_instruction(recorded: dict[str, Any]) -> None:
    """In step: where a lane of full virtualization shows a step at all, it shows the ruler's own instruction."""
    for name in ("cli", "popf"):
        data = recorded[name]
        for lane in data["lanes"]:
            if lane["technique"] in ("trap-and-emulate", "hardware-assisted"):
                for group, mine in zip(data["groups"], lane["groups"], strict=True):
                    assert [line["code"] for line in mine["lines"]] == [group["code"]], (name, lane["technique"])


def step(address: int, done: int = 1) -> Step:
    moment = Moment({}, 0, True, True, ())
    return Step(0, address, "guest", hex(address), "", address, "", "", moment, moment, {}, done)


def test_alignment_by_hand() -> None:
    ruler = [step(a) for a in (1, 2, 3, 4, 5, 2, 3, 4, 6)]
    same = places(ruler, ruler)
    assert same == list(range(9))
    # Two machine steps for the instruction at 2, extra code (90, 91) after 3.
    lane = [step(1), step(2, 0), step(2), step(3), step(90), step(91), step(4), step(5), step(2), step(3), step(4), step(6)]
    assert places(ruler, lane) == [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    # A lane without the instructions at 4 and 5 the first time.
    assert places(ruler, [step(a) for a in (1, 2, 3, 2, 3, 4, 6)]) == [0, 1, 2, 5, 6, 7, 8]


def test_long_windows_run_quiet_stretches_together() -> None:
    ruler = [step(a) for a in range(100)]
    ruler[40].events["trap.gp"] = 1
    made = groups(ruler, [(ruler, list(range(100)))], 20)
    assert [(g.start, g.end) for g in made] == [(0, 40), (40, 41), (41, 100)]


def test_a_scenario_that_does_not_exist_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "clii"]) == 2
    assert "'cli'" in capsys.readouterr().err
    assert main(["step"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in SCENARIOS)


@needs_chromium
@pytest.mark.parametrize("width", [380, 900, 1600])
@pytest.mark.parametrize("name", QUICK)
def test_pages_are_whole_at_every_width(browser: Browser, urls: dict[str, str], name: str, width: int) -> None:
    page = browser.open(urls[name], width=width, ready=READY)
    assert page.complaints() == []
    assert page.run("document.querySelectorAll('.lane').length") == len(SCENARIOS[name].lanes)
    assert page.run("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_arrow_keys_step_and_choose_and_the_link_comes_back(browser: Browser, urls: dict[str, str], recorded: dict[str, Any]) -> None:
    page = browser.open(urls["cli"], ready=READY)
    page.press("ArrowRight", 10)
    page.press("ArrowDown", 2)
    assert page.run("location.hash") == "#technique=binary-translation&step=11"
    assert recorded["cli"]["groups"][10]["code"] in page.run("document.getElementById('said').textContent")
    page.press("ArrowLeft")
    assert page.run("document.querySelector('#code .now').textContent").endswith(recorded["cli"]["groups"][9]["code"])
    page.press("End")
    assert page.run("document.getElementById('forward').disabled")
    again = browser.open(urls["cli"] + "#technique=paravirtualization&step=7", ready=READY)
    assert again.run("document.querySelector('.lane.chosen h3').textContent") == "paravirtualization"
    assert again.run("document.getElementById('where').textContent").startswith("7 of")
    assert page.complaints() == [] == again.complaints()


@needs_chromium
def test_cycles_are_pythons(browser: Browser, urls: dict[str, str], recorded: dict[str, Any]) -> None:
    page = browser.open(urls["cli"] + "#step=11&cpu=penryn-2008", ready=READY)
    shown = page.run("[...document.querySelectorAll('.lane')].map((lane) => [...lane.querySelectorAll('dd')].slice(-1)[0].textContent)")
    for lane, text in zip(recorded["cli"]["lanes"], shown, strict=True):
        total = 0.0
        for group in lane["groups"][:11]:
            found = costs.nominal(group["events"], costs.load("penryn-2008"), lane["platform"])
            assert isinstance(found, float)
            total += found
        assert float(text.replace(",", "")) == pytest.approx(total, abs=0.51)


@needs_chromium
def test_hostile_names_run_nothing(browser: Browser, recorded: dict[str, Any], tmp_path: Any) -> None:
    hostile = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    data = json.loads(json.dumps(recorded["cli"]))
    data["title"] = data["look"] = data["groups"][0]["code"] = data["groups"][0]["symbol"] = hostile
    data["lanes"][1]["label"] = hostile
    data["lanes"][2]["groups"][0]["lines"][0]["code"] = hostile
    file = tmp_path / "hostile.html"
    file.write_text(steps.page(data), encoding="utf-8")
    page = browser.open(file.as_uri(), ready=READY)
    assert page.run("window.owned === undefined") and page.complaints() == []


def test_without_scripts_the_table_has_everything(recorded: dict[str, Any]) -> None:
    text = steps.page(recorded["popf"])
    assert text.count("<tr>") == len(recorded["popf"]["groups"]) + 1
    assert "virtual IF 0" in text and not re.findall(r"(?:src|href)=[\"'](?!#)", text)


def test_a_page_opens_with_a_cpu_that_could_have_run_every_lane(recorded: dict[str, Any]) -> None:
    assert steps._first_cpu(recorded["cli"]) == "prescott-2005"
    nested = json.loads(json.dumps(recorded["cli"]))
    nested["lanes"][4]["platform"] = "svm-npt"
    assert costs.supports(costs.load(steps._first_cpu(nested)), "svm-npt")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in QUICK])
def test_the_other_scenarios_are_recorded_and_whole(browser: Browser, tmp_path: Any, name: str) -> None:
    data = verb.recorded(name)
    assert len([lane for lane in data["lanes"] if not lane["reason"]]) >= 5, [lane["reason"] for lane in data["lanes"]]
    assert len(data["groups"]) > 10
    verb.write(tmp_path / "page.html", data)
    for width in (380, 1600):
        page = browser.open((tmp_path / "page.html").as_uri(), width=width, ready=READY)
        assert page.complaints() == []
        assert page.run("document.documentElement.scrollWidth") <= width
