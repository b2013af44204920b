"""Persistent worker processes, one cell in flight each.

A process per cell would start Unicorn again for each; a pool of the standard library loses every cell
in flight when one worker calls abort(). So each worker here is a fresh interpreter with one pipe in and
one out, fed by one thread: when it dies, its one cell fails and the next cell gets a new worker. Nothing is
inherited (no fork) and the parent's ``__main__`` is not imported again, so this works the same on
Linux, macOS and Windows, in a notebook, and in a script without an ``if __name__`` guard.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from vmlab.errors import ExperimentError
from vmlab.experiment.matrix import Cell
from vmlab.experiment.worker import Record

#: A cell that takes longer than this has hung inside the CPU: budgets end every guest long before.
HUNG_SECONDS = 600.0
#: A worker leads a group of its own, so that its forks end with it.
_GROUP: dict[str, Any] = {"process_group": 0} if hasattr(os, "killpg") else {}
BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vmlab.experiment.worker import main; main()"


class Worker:
    """One child process that runs cells, started when it is first needed."""

    def __init__(self, function: str, environment: Mapping[str, str] | None = None, *, boots: str = "never") -> None:
        self.function, self.boots = function, boots
        self.environment = dict(environment or {})
        self.closing = threading.Event()
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[bytes] | None = None
        self.timed_out = False

    def start(self) -> subprocess.Popen[str]:
        """Start the process and tell it what to call."""
        try:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", "-c", BOOTSTRAP, json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, encoding="utf-8",
                env={**os.environ, **self.environment}, **_GROUP,
            )
        except OSError as error:
            raise ExperimentError(f"a worker process cannot be started: {error.strerror or error}") from error
        if self.closing.is_set():  # whoever closes the pool may have looked before there was a process
            self.process.kill()
        self.timed_out = False
        return self.process

    def run(self, cell: Cell, seconds: float = HUNG_SECONDS) -> Record:
        """Run ``cell``; a worker that dies or hangs gives a failed record and is replaced next time."""
        fresh = self.process is None
        process = self.process or self.start()
        assert process.stdout is not None
        watch = threading.Timer(seconds, self._hung, (process,))
        watch.start()
        try:
            if fresh:
                self._send({"function": self.function, "boots": self.boots})
            self._send({"technique": cell.technique, "parameters": dict(cell.parameters)})
            answer = process.stdout.readline()
            record: Record | None = json.loads(answer) if answer.endswith("\n") else None
        except OSError:  # the pipe broke: it died before or while it was asked
            record = None
        finally:
            watch.cancel()
        if record is not None:
            return record
        return {"status": "failed", "error": self._obituary(seconds)}

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self.process = self.process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was still buffered for a process that is gone
                    stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _hung(self, process: subprocess.Popen[str]) -> None:
        self.timed_out = True
        _kill(process)

    def _obituary(self, seconds: float) -> str:
        assert self.process is not None and self.errors is not None
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        self.stop()
        if self.timed_out:
            return f"the worker was stopped: no answer for {seconds:.0f} s"
        return f"the worker died ({exit_words(status)})" + (f": {said[-1][:200]}" if said else "")


def _kill(process: subprocess.Popen[str]) -> None:
    """End a worker, and what it has forked: that would end by itself, but only when its cell has."""
    if _GROUP and process.returncode is None:       # nobody has the number before it is waited for
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def exit_words(status: int) -> str:
    """A process's exit status in words: ``signal SIGABRT`` or ``exit status 3``."""
    if status < 0:
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"
    return f"exit status {status:#x}" if status > 255 else f"exit status {status}"


class Pool:
    """``jobs`` workers over a list of cells. Leave it as a context: no process outlives it."""

    def __init__(
        self, function: str, jobs: int, environment: Mapping[str, str] | None = None, seconds: float = HUNG_SECONDS, *, boots: str = "never",
    ) -> None:
        """:param boots: whether cells share boots (:mod:`vmlab.experiment.boots`): "never", "auto" (of guests from files), "always"."""
        self.seconds = seconds
        self.workers = [Worker(function, environment, boots=boots) for _ in range(max(1, jobs))]
        self.closing = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for worker in self.workers:
            worker.closing.set()
            process = worker.process
            if process is not None:
                _kill(process)  # a thread that waits for its answer sees the pipe end
        for thread in self.threads:
            thread.join()
        for worker in self.workers:
            worker.stop()

    def run(self, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Record]]:
        """Each cell with its record, in the order in which they finish."""
        waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        total = 0
        for cell in cells:
            waiting.put(cell)
            total += 1
        finished: queue.SimpleQueue[tuple[Cell, Record] | BaseException] = queue.SimpleQueue()

        def serve(worker: Worker) -> None:
            try:
                while not self.closing.is_set():
                    cell = waiting.get_nowait()
                    finished.put((cell, worker.run(cell, self.seconds)))
            except queue.Empty:
                return
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, see below
                finished.put(error)

        for worker in self.workers[:total]:
            thread = threading.Thread(target=serve, args=(worker,), name="vmlab-worker", daemon=True)
            self.threads.append(thread)
            thread.start()
        while total:
            try:
                # Waiting in short turns: on Windows a wait without end cannot be interrupted by Ctrl-C.
                item = finished.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            total -= 1
            yield item
