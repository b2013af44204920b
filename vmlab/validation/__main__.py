"""``python -m vmlab.validation [FOLDER]``: run what the rows need and write validation.md and validation.json (default: docs)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vmlab.cli.output import Progress
from vmlab.experiment import store
from vmlab.experiment.gather import Gatherer, Observer
from vmlab.experiment.lab import Lab
from vmlab.validation import document


def main() -> int:
    """Write both documents; see the module's head."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    progress = Progress(0)

    def starting(todo: int, _found: int) -> Observer:
        progress.total = todo
        return progress.finished

    predictions = document.gather(Gatherer(Lab(), "validation"), os.cpu_count() or 1, starting)
    progress.close()
    page, data = document.paths(folder)
    store.write(page, document.as_markdown(predictions))
    store.write(data, document.as_json(predictions))
    print(f"{page} and {data}: {sum(p.value is not None for p in predictions)} of {len(predictions)} rows predicted")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
