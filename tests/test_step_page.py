"""Stepper pages: every scenario that can be recorded now, in a real browser, by keyboard, at three widths."""

from __future__ import annotations

import base64
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, Page, needs_chromium

from vmlab import costs
from vmlab.cli import step as verb
from vmlab.cli.main import main
from vmlab.experiment.cell import Run
from vmlab.report import steps
from vmlab.trace.align import groups, places
from vmlab.trace.listing import Listing, unfold
from vmlab.trace.recorder import Moment, Step
from vmlab.trace.scenarios import SCENARIOS
from vmlab.trace.words import eventful

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


def test_a_translator_that_reads_on_is_no_event() -> None:
    ruler = [step(a) for a in range(100)]
    ruler[20].events |= {"bt.callout.chain": 1, "bt.translate.unit": 1, "bt.translate.instruction": 5, "machine.alu": 1}
    ruler[60].events |= {"bt.callout.chain": 1, "emulate.cli": 1}
    assert not eventful(ruler[20]) and eventful(ruler[60]) and not eventful(ruler[0])
    assert [(g.start, g.end) for g in groups(ruler, [(ruler, list(range(100)))], 20)] == [(0, 60), (60, 61), (61, 100)]


def test_a_listing_is_a_path_through_distinct_instructions() -> None:
    listing = Listing()
    # Two instructions five times between others: the first straight run begins with them, the last one ends with them.
    path = listing.path([step(a) for a in (1, 2, *[10, 11] * 5, 3)])
    assert listing.rows == [["guest", hex(a), hex(a)] for a in (1, 2, 10, 11, 3)]
    assert path == [[0, 4], {"times": 3, "of": [[2, 2]]}, [2, 3]]
    # A loop around a loop.
    assert listing.path([step(a) for a in [*[11, 10] * 4, 1] * 3]) == [{"times": 3, "of": [[3, 1], {"times": 3, "of": [[2, 2]]}, [2, 1], [0, 1]]}]
    assert list(unfold([{"times": 2, "of": [[0, 2], [7, 1]]}])) == [0, 1, 7, 0, 1, 7]


@pytest.mark.parametrize("seed", range(20))
def test_a_listing_loses_nothing(seed: int) -> None:
    rng, listing = random.Random(seed), Listing()
    code: list[int] = []
    while len(code) < 400:
        body = [rng.randrange(40) for _ in range(rng.randint(1, 6))]
        code += body * rng.choice((1, 1, 2, 9, 30))
    for part in (code, code[::-1], []):
        path = listing.path([step(a) for a in part])
        assert [int(listing.rows[entry][1], 16) for entry in unfold(path)] == part


def covers(data: dict[str, Any]) -> None:
    """Every instruction of the bare machine is in a group, every step of a lane in a line or a fold of it."""
    at = 1
    for group in data["groups"]:
        assert group["first"] == at
        at += group["count"]
    assert at == data["instructions"] + 1
    for lane in data["lanes"]:
        for group in lane["groups"]:
            assert sum(line.get("skipped", 1) for line in group["lines"]) == group["steps"]
            for line in group["lines"]:
                if "path" in line:
                    assert len(list(unfold(line["path"]))) == line["skipped"] > 1
                    assert max(unfold(line["path"])) < len(data["codes"])


def test_pages_cover_all_that_was_recorded(recorded: dict[str, Any]) -> None:
    for data in recorded.values():
        covers(data)


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
@pytest.mark.parametrize("name", [QUICK[0], *(pytest.param(name, marks=pytest.mark.slow) for name in QUICK[1:])])
def test_every_step_is_reached_by_arrow_key(browser: Browser, urls: dict[str, str], recorded: dict[str, Any], name: str) -> None:
    every_step_by_keyboard(browser.open(urls[name], ready=READY), recorded[name])


@needs_chromium
def test_in_print_the_table_of_all_steps_opens(browser: Browser, urls: dict[str, str], recorded: dict[str, Any]) -> None:
    page = browser.open(urls["popf"], width=1050, ready=READY)
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("document.querySelector('#all').open && document.querySelector('#all table').getBoundingClientRect().width") <= 1050
    assert page.run("[...document.querySelectorAll('#bar .buttons, .hint, #stage nav')].every((e) => getComputedStyle(e).display === 'none')")
    assert page.run("document.querySelectorAll('#all tbody tr').length") == len(recorded["popf"]["groups"])
    assert base64.b64decode(page.call("Page.printToPDF", preferCSSPageSize=True)["data"]).startswith(b"%PDF")


@needs_chromium
def test_a_screen_reader_is_told_step_and_lane(browser: Browser, urls: dict[str, str]) -> None:
    page = browser.open(urls["cli"] + "#step=5", ready=READY)
    page.call("Accessibility.enable")
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault(node["role"]["value"], []).append(str(node.get("name", {}).get("value", "")))
    assert {"main", "navigation", "region", "status", "heading"} <= {*found}
    for role in ("button", "slider", "combobox", "link"):
        assert found[role] and all(found[role]), (role, found[role])
    assert len([name for name in found["listitem"] if name in ("native", "trap-and-emulate", "hardware-assisted")]) == 3
    assert page.run("document.querySelectorAll('#code [aria-current=step]').length") == 1


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
    covers(data)
    the_lane_is_the_run(name, data)
    verb.write(tmp_path / "page.html", data)
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    for width in (380, 900, 1600):
        page = browser.open((tmp_path / "page.html").as_uri(), width=width, ready=READY)
        assert page.complaints() == []
        assert page.run("document.documentElement.scrollWidth") <= width
        every_step_by_keyboard(page, data)
        assert page.complaints() == []


def the_lane_is_the_run(name: str, data: dict[str, Any]) -> None:
    """The groups of the bare machine's lane add up to its region of interest, which was run without a recorder."""
    scenario = SCENARIOS[name]
    lane = data["lanes"][0]
    run = Run("native", verb.checked("native", scenario.guest, scenario.workload, scenario.parameters), path="portable")
    run.go()
    region = run.marks["vmlab_roi_end"].minus(run.marks["vmlab_roi_begin"])
    assert abs(data["instructions"] - region.user - region.kernel) <= 4  # the markers' own
    added: Counter[str] = Counter()
    for group in lane["groups"]:
        added.update(group["events"])
    assert sum(abs(region.events.get(kind, 0) - added[kind]) for kind in {*region.events, *added}) <= 16


def every_step_by_keyboard(page: Page, data: dict[str, Any]) -> None:
    """From the first step to the last by arrow key; folds open and list the code of the bare machine."""
    page.press("Home")
    for number, group in enumerate(data["groups"], 1):
        said = page.run("document.getElementById('said').textContent")
        assert said.startswith(f"Step {number} of {len(data['groups'])}: the guest's {group['code']}"), said
        page.press("ArrowRight")
        if number % 150 == 0:
            time.sleep(11)  # Chromium lets a page change its fragment 200 times in ten seconds, and warns of more
    folds = [number for number, group in enumerate(data["groups"]) if group["count"] > 1]
    if folds:
        page.run(f"location.hash = '#step={folds[0] + 1}'")
        page.wait(f"document.getElementById('where').textContent.startsWith('{folds[0] + 1} of')")
        page.run("document.querySelector('.lane details.quiet summary').focus()")
        page.press("Enter")
        page.wait("document.querySelector('.lane .listing li') !== null")
        path = data["lanes"][0]["groups"][folds[0]]["lines"][0]["path"]
        first = data["codes"][next(unfold(path))]
        assert page.run("document.querySelector('.lane .listing li').textContent").split(maxsplit=1) == first[1:]
        assert page.run("document.getElementById('where').textContent").startswith(f"{folds[0] + 1} of"), "Enter opens, and does not step"
