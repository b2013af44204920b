"""``python -m vmlab.coursework``: write each folder's README.md and notebook anew from its course.yaml."""

from __future__ import annotations

from vmlab.coursework import document
from vmlab.coursework.course import load
from vmlab.coursework.folders import names


def main() -> int:
    """Write them; a test tells when this was forgotten."""
    for name in names():
        for path, text in document.files(load(name)).items():
            path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(names())} folders written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
