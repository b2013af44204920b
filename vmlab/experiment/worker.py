"""What runs inside a worker process: read a cell, run it, write its record, until stdin ends.

Protocol: one JSON document a line in each direction. The first line says which function to call. The
answers go through a private copy of stdout, and stdout itself is pointed at stderr, so that nothing
that a library prints can be taken for an answer.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.errors import UnsupportedByStrategy, VmlabError

if TYPE_CHECKING:
    from vmlab.experiment.boots import Boots

Record = dict[str, Any]
CellFunction = Callable[[str, dict[str, Any]], Record]


def run_one(function: CellFunction, technique: str, parameters: dict[str, Any]) -> Record:
    """Call ``function``; an error becomes a record that says so in one sentence."""
    started = time.perf_counter()
    try:
        record = function(technique, parameters)
    except UnsupportedByStrategy as error:
        record = {"status": "unsupported", "error": str(error)}
    except VmlabError as error:
        record = {"status": "failed", "error": str(error)}
    except Exception as error:  # noqa: BLE001
        # A mistake of ours must not take the other cells along; say enough to find it.
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        traceback.print_exc()
        record = {"status": "failed", "error": f"internal error: {type(error).__name__}: {error} ({place})"}
    record.setdefault("host_seconds", round(time.perf_counter() - started, 6))
    return record


def _boots(hello: dict[str, Any]) -> Boots | None:
    """Boots that cells share, where that was asked for and processes can be forked."""
    wanted = hello.get("boots", "never")
    if wanted == "never" or not hasattr(os, "fork"):
        return None
    from vmlab.experiment.boots import Boots

    return Boots(everything=wanted == "always")


def main() -> None:
    """Serve until the parent closes the pipe."""
    # Ctrl-C reaches the whole foreground group; the parent decides what ends and when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    hello = json.loads(sys.stdin.readline())
    module, _, name = hello["function"].partition(":")
    function: CellFunction | None = None
    boots = None
    for line in sys.stdin:
        job = json.loads(line)
        if function is None:
            # Imported with the first cell, so that an import that fails is that cell's failure.
            try:
                function = getattr(importlib.import_module(module), name)
                boots = _boots(hello)
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                record: Record = {"status": "failed", "error": f"the machine cannot be loaded: {type(error).__name__}: {error}"}
                answers.write(json.dumps(record) + "\n")
                answers.flush()
                continue
        assert function is not None
        found = boots.run(job["technique"], job["parameters"]) if boots is not None else None
        answers.write(json.dumps(found or run_one(function, job["technique"], job["parameters"])) + "\n")
        answers.flush()
