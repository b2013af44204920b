"""Figures for papers and slides: size, embedded fonts, same bytes, legible type, palette; the commands that write them."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import made_up_run
import pytest

from vmlab import report
from vmlab.cli.main import main
from vmlab.cli.plot import inches
from vmlab.errors import ConfigError
from vmlab.report.canvas import STYLES, Layout, drawn_for, fit, our_settings
from vmlab.report.charts import CHARTS, drawable
from vmlab.report.style import CAUSES, INK, LOOKS, lightness
from vmlab.report.view import View

ASSETS = Path(report.__file__).with_name("assets")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_up_run.results()


@pytest.fixture(scope="module")
def run_dir(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    (directory / "results.json").write_text(json.dumps({"schema_version": 1, "experiment": "made_up"} | results), encoding="utf-8")
    (directory / "config.yaml").write_text("title: The title\nquestion: Why?\ncharts: [slowdown]\n", encoding="utf-8")
    return directory


def test_a_png_has_the_width_that_was_asked_for(results: dict[str, Any]) -> None:
    data = report.figure(View(results), "slowdown", "png", 3.33, "paper").data
    assert struct.unpack(">I", data[16:20])[0] == round(3.33 * 300)


def test_an_svg_and_a_pdf_have_it_too(results: dict[str, Any]) -> None:
    svg = report.figure(View(results), "causes", "svg", 3.33, "paper").data.decode()
    found = re.search(r'width="([\d.]+)pt"', svg)
    assert found and float(found[1]) == pytest.approx(3.33 * 72, abs=0.1)
    pdf = report.figure(View(results), "causes", "pdf", 3.33, "paper").data
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
    assert box and float(box[1]) == pytest.approx(3.33 * 72, abs=0.1)


def test_fonts_are_embedded_and_bytes_are_the_same_again(results: dict[str, Any]) -> None:
    view = View(results)
    for form in ("pdf", "svg", "png"):
        first, second = (report.figure(view, "causes", form, 3.33, "paper").data for _ in range(2))
        assert first == second, form
    pdf = report.figure(view, "causes", "pdf", 3.33, "paper").data
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert b"<text" not in report.figure(view, "causes", "svg", 3.33, "paper").data, "glyphs are shapes"


@pytest.mark.parametrize(("style", "width", "least"), [("paper", 3.33, 5.9), ("paper", 7.0, 5.9), ("slide", 10.0, 13.0), ("slide", 12.5, 13.0)])
def test_type_is_legible_and_nothing_covers_anything(results: dict[str, Any], style: str, width: float, least: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    view, layout = View(results), Layout(width, STYLES[style], plain=style == "paper")
    for name in drawable(view):
        with our_settings(), drawn_for(layout):
            figure = fit(CHARTS[name](view), layout)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
        assert figure.get_size_inches()[0] == pytest.approx(width)
        texts = [t for t in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")) if getattr(t, "get_text", str)()]
        assert min(text.get_fontsize() for text in texts) >= least, name
        panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
        legends = [legend.get_window_extent(renderer) for legend in figure.legends]
        for box in (*panels, *legends):
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, (name, box)
        assert not any(one.overlaps(other) for one, other in combinations(panels, 2)), name
        assert not any(legend.overlaps(panel) for legend in legends for panel in panels), name


def test_csv_has_a_row_a_point(results: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(report.figure(View(results), "slowdown", "csv", 3.33, "paper").data.decode())))
    priced = [ratio for cell in results["cells"] if cell["technique"] != "native" for ratio in cell["slowdown"].values() if "value" in ratio]
    assert len(rows) == len(priced)
    assert {float(row["slowdown"]) for row in rows} == {ratio["value"] for ratio in priced}
    causes = list(csv.DictReader(io.StringIO(report.figure(View(results), "causes", "csv", 3.33, "paper").data.decode())))
    assert {row["cause"] for row in causes} >= {"traps", "VMM emulation"}


# --- colours -------------------------------------------------------------------------------------------------

#: How colours look without one kind of cone, on linear RGB (Machado, Oliveira & Fernandes, IEEE TVCG 15(6), 2009, severity 1.0).
BLINDNESS = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour: str) -> list[float]:
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    """CIE L*a*b* (D65) of linear RGB."""
    r, g, b = (min(max(c, 0.0), 1.0) for c in rgb)
    x, y, z = 0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b, 0.0193 * r + 0.1192 * g + 0.9505 * b

    def f(t: float) -> float:
        return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116

    fx, fy, fz = f(x / 0.9505), f(y), f(z / 1.089)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def difference(one: str, other: str, kind: str | None) -> float:
    """CIE76 colour difference as somebody with this colour vision sees it."""
    seen = []
    for colour in (one, other):
        rgb = linear(colour)
        if kind is not None:
            rgb = [sum(weight * channel for weight, channel in zip(row, rgb, strict=True)) for row in BLINDNESS[kind]]
        seen.append(lab(rgb))
    return sum((a - b) ** 2 for a, b in zip(*seen, strict=True)) ** 0.5


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_techniques_are_told_apart_with_any_colour_vision(kind: str | None) -> None:
    for one, other in combinations(LOOKS.values(), 2):
        assert difference(one.colour, other.colour, kind) > 20, (one.short, other.short)
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)


def test_techniques_are_told_apart_in_grey() -> None:
    for one, other in combinations(LOOKS.values(), 2):
        assert abs(lightness(one.colour) - lightness(other.colour)) >= 12, (one.short, other.short)


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_neighbours_in_a_stack_are_told_apart(kind: str | None) -> None:
    """Segments touch in the order of the causes; a white line stands between them, and the colours differ too."""
    colours = list(CAUSES.values())
    for one, other in pairwise(colours):
        assert difference(one, other, kind) > 10, (one, other)


def contrast(text: str, ground: str) -> float:
    """WCAG 2.2 contrast ratio."""
    def luminance(colour: str) -> float:
        r, g, b = linear(colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(text), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def wide(colour: str) -> str:
    return colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])


@pytest.mark.parametrize("sheet", ["page.css", "step.css"])
def test_text_keeps_wcag_aa_contrast(sheet: str) -> None:
    text = (ASSETS / sheet).read_text(encoding="utf-8")
    names = {name: wide(value) for name, value in re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", text)}
    grounds = ["#ffffff", names["band"]]
    inks = {wide(c) for c in re.findall(r"[;{ ]color: (#[0-9a-f]{3,6})\b", text)}
    inks |= {names[n] for n in re.findall(r"[;{ ]color: var\(--([a-z]+)\)", text)}
    on_dark = {"#ffffff", "#dddddd"}  # the tooltip's own, on ink
    assert len(inks) > 2
    for ink in inks - on_dark:
        for ground in grounds:
            assert contrast(ink, ground) >= 4.5, (sheet, ink, ground)
    for ink in inks & on_dark:
        assert contrast(ink, names["ink"]) >= 4.5
    assert contrast(INK, "#ffffff") >= 4.5
    if "now" in names:
        assert contrast(names["ink"], names["now"]) >= 4.5


# --- commands ------------------------------------------------------------------------------------------------


def test_plot_writes_what_was_asked_for(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "f.pdf"
    assert main(["plot", str(run_dir), "--chart", "causes", "--format", "pdf", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF") and "cycles" in capsys.readouterr().out
    assert main(["plot", str(run_dir), "--list"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["slowdown", "causes"]


@pytest.mark.parametrize(("more", "said"), [
    (["--chart", "slowdwn"], "slowdown"), (["--format", "gif"], "--format"), (["--style", "paperr"], "paper"), (["--width", "3"], "3.33in"),
    (["--width", "900in"], "40")])
def test_plot_says_what_is_wrong(run_dir: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert main(["plot", str(run_dir), *more]) == 2
    assert said in capsys.readouterr().err


def test_widths_in_every_unit() -> None:
    assert inches("5.08cm") == pytest.approx(2.0) == inches("50.8mm")
    assert inches("240pt") == pytest.approx(3.32, abs=0.01)
    with pytest.raises(ConfigError):
        inches("wide")


def test_a_report_is_made_anew(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--out", str(tmp_path / "again")]) == 0
    html = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert "The title" in html and (tmp_path / "again" / "plots" / "slowdown.svg").exists()
    assert not (run_dir / "report.html").exists()
    assert main(["report", str(run_dir), "--text"]) == 0
    assert "slowdown against native" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 2
