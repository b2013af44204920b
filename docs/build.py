"""Builds docs/ as a static site that opens from disk: ``python docs/build.py [--out site] [--steps]``.

Every Markdown page becomes HTML beside a menu; links between pages follow, links to source files point into the checkout.
``--steps`` records the stepper pages anew (about a minute) and puts them into the site. Needs vmlab and markdown-it-py
(``pip install -e '.[docs]'``); nothing in the site is loaded from elsewhere, and no page of it but the steppers has a script.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from html import escape
from pathlib import Path
from string import Template

from vmlab.report.document import document

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

#: The menu, in reading order; every page of docs/ is named here. The decision records follow by themselves.
MENU = {
    "Begin": ["tour.md", "gallery.md", "report.md", "tracing.md"],
    "How it works": ["techniques.md", "machine.md", "memory.md", "binary-translation.md", "paravirtualization.md", "hardware-assistance.md",
                     "type2.md", "minios.md", "probe.md"],
    "Use": ["experiments.md", "claims.md", "cost-profiles.md", "validation.md", "performance.md", "foreign-guests.md"],
    "Extend": ["writing-a-strategy.md", "writing-a-guest.md"],
}

_BODY = Template("""<a class="skip" href="#content">To the text</a>
<nav aria-label="Pages"><p class="home"><a href="${up}index.html">vmlab</a></p>$menu</nav>
<main id="content">$body</main>""")

_STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: #1a1a1a; margin: 0;
  display: grid; grid-template-columns: 15rem minmax(0, 1fr); }
nav { padding: 1rem; background: #f3f4f6; min-height: 100vh; font-size: .93rem; }
nav h2 { font-size: .85rem; color: #555; margin: 1rem 0 .2rem; font-weight: 600; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li { padding: .12rem 0; }
nav a[aria-current] { font-weight: 700; color: #1a1a1a; }
.home { font-weight: 700; font-size: 1.15rem; margin: 0; }
main { padding: 1rem 2rem 4rem; max-width: 60rem; min-width: 0; }
a { color: #0a3070; }
:focus-visible { outline: 3px solid #1b6ac9; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 2rem; }
img { max-width: 100%; height: auto; border: 1px solid #d0d0d0; }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: .87rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9em; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d0d0d0; }
.right { text-align: right; } .center { text-align: center; }
@media (max-width: 50rem) { body { grid-template-columns: minmax(0, 1fr); } nav { min-height: 0; } main { padding: 1rem; } }
@media print { nav, .skip { display: none; } body { display: block; } main { max-width: none; padding: 0; } }
"""


def build(out: Path, *, steps: bool = False) -> list[Path]:
    """Write the site; the pages written. A link that leads nowhere, or a menu that does not name just the pages that are there, is a SystemExit."""
    pages, records = sorted(DOCS.glob("*.md")), sorted((DOCS / "adr").glob("*.md"))
    known = {name for names in MENU.values() for name in names}
    if gone := sorted(known - {page.name for page in pages}):
        raise SystemExit(f"docs/build.py: the menu names {', '.join(gone)}, which does not exist")
    if lacking := sorted({page.name for page in pages} - known):
        raise SystemExit(f"docs/build.py: {', '.join(lacking)}: not in the menu (MENU in docs/build.py)")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(DOCS / "img", out / "img", dirs_exist_ok=True)
    shutil.rmtree(out / "steps", ignore_errors=True)
    made = _steps(out) if steps else []
    made.append(_write(out, out / "index.html", ROOT / "README.md"))
    return made + [_write(out, out / path.relative_to(DOCS).with_suffix(".html"), path) for path in (*pages, *records)]


def title_of(path: Path) -> str:
    """A page's first heading."""
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip() if found else path.stem


def _write(out: Path, target: Path, source: Path) -> Path:
    up = os.path.relpath(out, target.parent).replace(os.sep, "/") + "/"
    up = "" if up == "./" else up
    target.parent.mkdir(parents=True, exist_ok=True)
    body = _BODY.substitute(up=up, menu=_menu(out, target), body=_html(source, target, out))
    target.write_text(document(title_of(source), body, style=_STYLE, images="'self' data: file:"), encoding="utf-8")
    return target


def _html(source: Path, target: Path, out: Path) -> str:
    """The page's text as HTML, its links made to work from where the page is going."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(source.read_text(encoding="utf-8"))
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", tokens[i + 1].content.lower()).strip().replace(" ", "-")
            seen[slug] = seen.get(slug, -1) + 1
            token.attrSet("id", slug if not seen[slug] else f"{slug}-{seen[slug]}")
        for child in token.children or []:
            for name in ("href", "src"):
                value = child.attrGet(name)
                if isinstance(value, str):
                    child.attrSet(name, _link(value, source, target, out))
    text: str = parser.renderer.render(tokens, parser.options, {})
    text = re.sub(r' style="text-align:(left|right|center)"', r' class="\1"', text)  # the policy allows the page's one style alone
    return text.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def _link(link: str, source: Path, target: Path, out: Path) -> str:
    path, hash_sign, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    there = (source.parent / path).resolve()
    if not there.exists():
        raise SystemExit(f"docs/build.py: {source.relative_to(ROOT)}: the link to {path} leads nowhere")
    if there == DOCS / "adr":
        there = out / "adr" / "0001-shape.html"
    elif there.is_relative_to(DOCS):
        there = out / there.relative_to(DOCS).with_suffix(".html" if there.suffix == ".md" else there.suffix)
    elif there == ROOT / "README.md":
        there = out / "index.html"
    return os.path.relpath(there, target.parent).replace(os.sep, "/") + hash_sign + anchor


def _menu(out: Path, target: Path) -> str:
    parts = []
    groups = {title: [DOCS / name for name in names] for title, names in MENU.items()}
    groups["Decision records"] = sorted((DOCS / "adr").glob("*.md"))
    for title, pages in groups.items():
        rows = []
        for page in pages:
            there = out / page.relative_to(DOCS).with_suffix(".html")
            current = ' aria-current="page"' if there == target else ""
            rows.append(f'<li><a href="{os.path.relpath(there, target.parent).replace(os.sep, "/")}"{current}>{escape(title_of(page))}</a></li>')
        parts.append(f"<h2>{escape(title)}</h2><ul>{''.join(rows)}</ul>")
    if steppers := sorted((out / "steps").glob("*.html")):
        rows = [f'<li><a href="{os.path.relpath(page, target.parent).replace(os.sep, "/")}">{escape(page.stem.replace("-", " "))}</a></li>'
                for page in steppers]
        parts.insert(1, f"<h2>Step through</h2><ul>{''.join(rows)}</ul>")
    return "".join(parts)


def _steps(out: Path) -> list[Path]:
    """The stepper pages, recorded now."""
    from vmlab.cli import step
    from vmlab.trace.scenarios import SCENARIOS

    made = []
    for name in SCENARIOS:
        file = out / "steps" / f"{name}.html"
        step.write(file, step.recorded(name))
        made.append(file)
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Build docs/ as a site that opens from disk.")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="where it goes (default: site/)")
    parser.add_argument("--steps", action="store_true", help="record the stepper pages and put them in")
    arguments = parser.parse_args()
    made = build(arguments.out.resolve(), steps=arguments.steps)
    print(f"{len(made)} pages; open {arguments.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
