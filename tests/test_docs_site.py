"""docs/build.py: every page is there, every link leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from browser import Browser, needs_chromium

pytest.importorskip("markdown_it", reason="markdown-it-py is not installed (extra: docs)")
ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    assert len(load().build(out)) > 15
    return out


def test_every_link_leads_somewhere(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"(?:href|src)=\"([^\"]+)\"", text):
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"https?:", path):
                assert "src=" + '"' + link not in text
                continue
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), (page.name, link)
            if anchor and there.suffix == ".html":
                assert f'id="{anchor}"' in there.read_text(encoding="utf-8"), (page.name, link)
            seen += 1
    assert seen > 200


def test_a_dead_link_and_a_menu_of_lost_pages_fail_the_build(tmp_path: Path) -> None:
    module = load()
    source = ROOT / "docs" / "tour.md"
    with pytest.raises(SystemExit, match="leads nowhere"):
        module._link("nothing.md", source, tmp_path / "x.html", tmp_path)
    menu = module.MENU
    module.MENU = menu | {"More": ["lost.md"]}
    with pytest.raises(SystemExit, match=r"names lost\.md"):
        module.build(tmp_path)
    module.MENU = menu | {"Begin": [name for name in menu["Begin"] if name != "tour.md"]}
    with pytest.raises(SystemExit, match=r"tour\.md: not in the menu"):
        module.build(tmp_path)


def test_every_page_is_in_the_menu_once(site: Path) -> None:
    """A page that docs/build.py's MENU does not name fails the build, here and in the fixture."""
    named = [name for names in load().MENU.values() for name in names]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    menu = (site / "index.html").read_text(encoding="utf-8")
    for source in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "adr").glob("*.md")]:
        assert source.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in menu, source.name


@needs_chromium
@pytest.mark.parametrize("width", [380, 1600])
def test_pages_open_from_disk(site: Path, width: int) -> None:
    with Browser() as browser:
        for name in ("index.html", "gallery.html", "report.html", "validation.html", "adr/0012-page-traces-site.html"):
            page = browser.open((site / name).as_uri(), width=width)
            page.wait("getComputedStyle(document.querySelector('nav')).padding !== '0px'")
            assert page.complaints() == [], name
            assert page.run("document.documentElement.scrollWidth") <= width, name
            assert page.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0)"), name
