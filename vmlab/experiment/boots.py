"""Boots that are done once: a process has booted a guest and waits at the end of the boot; each cell is a fork of it.

A guest from a file has booted when it has said the first text that its script waits for; one of the lab's own, where it is about to read its
command line. Until there it does the same whatever it is told then, so that cells of one technique, guest and machine share all of it: CPU,
memory, devices, the VMM, translated and decoded code, and what was counted. The fork goes on in the middle of the same callback, with the rest of
its own script, or with its own command line where the loader had put another one: its ledger is that of a run from reset. Nothing is
written down, so no part of the state can be forgotten.

Only where a process can be forked, by a worker of one thread (:mod:`vmlab.experiment.worker`), and under techniques that come with the lab: one
from elsewhere may look at any parameter from the start. All else runs from reset (docs/adr/0019-shared-boots.md).
"""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import time
from collections.abc import Mapping
from typing import IO

from vmlab import guests, strategies
from vmlab.experiment import dialogue
from vmlab.experiment.cell import DEFAULT_BUDGET, Run, run_cell
from vmlab.experiment.worker import Record, run_one
from vmlab.experiment.workers import exit_words
from vmlab.parameters import Value

#: Booted guests that a worker keeps, each a process with all of its guest's memory.
MOST = 4
_Key = tuple[tuple[str, Value], ...]


class Boots:
    """The booted guests of one worker."""

    def __init__(self, everything: bool = False) -> None:
        """:param everything: the lab's own guests too, most of which boot in less time than a fork costs."""
        self._everything = everything
        self._booted: collections.OrderedDict[_Key, _Booted | None] = collections.OrderedDict()

    def run(self, technique: str, parameters: Mapping[str, Value]) -> Record | None:
        """The record of a cell that began where a boot ended; None where it has to run from reset."""
        key = _key(technique, parameters)
        if key is None or not (self._everything or guests.from_file(str(parameters.get("guest", "nano")))):
            return None
        if key not in self._booted:
            if len(self._booted) >= MOST:
                _, oldest = self._booted.popitem(last=False)
                if oldest is not None:
                    oldest.close()
            self._booted[key], ended = _Booted.start(technique, parameters)
            if ended is not None:
                return ended
        self._booted.move_to_end(key)
        booted = self._booted[key]
        if booted is None or int(parameters.get("budget", DEFAULT_BUDGET)) < booted.instructions:
            return None
        record = booted.run(parameters)
        if booted.gone:
            self._booted[key] = None
        return record

    def close(self) -> None:
        """End them all."""
        for booted in self._booted.values():
            if booted is not None:
                booted.close()


def _key(technique: str, parameters: Mapping[str, Value]) -> _Key | None:
    """What a boot depends on; None where it is not known to depend on nothing else."""
    guest = str(parameters.get("guest", "nano"))
    if technique not in strategies.BUILT_IN:
        return None
    if guests.from_file(guest):
        boot, rest = dialogue.split(str(parameters.get("script", "")))
        told, more = {"script", "budget"}, [("script", boot)]
        if not rest:
            return None     # there is nothing to share it with
    else:
        workload = guests.workloads(guest).get(str(parameters.get("workload", "")))
        if workload is None or guests.told_at(guest, technique) is None:
            return None
        told = {"workload", "budget", *workload.parameters} - {"sectors"}       # the disk is the machine's
        more = [("disk", str("sectors" in workload.parameters))]
    return (("technique", technique), *more, *sorted((k, v) for k, v in parameters.items() if k not in told))


class _Booted:
    """One process, seen from the worker. It answers a line with the parameters of a cell by the cell's record, and then by how the fork ended."""

    def __init__(self, process: int, ask: IO[bytes], answers: IO[bytes]) -> None:
        self._process, self._ask, self._answers = process, ask, answers
        self.gone, self._status = False, 0
        #: Guest instructions of the boot.
        self.instructions = 0

    @classmethod
    def start(cls, technique: str, parameters: Mapping[str, Value]) -> tuple[_Booted | None, Record | None]:
        """Boot in a process of its own. A guest that does not come to the end of its boot has run all of this cell: its record."""
        started = time.perf_counter()
        jobs, ask = os.pipe()
        answers, answer = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                _keep_only(jobs, answer)
                _serve(technique, dict(parameters), os.fdopen(jobs, "rb"), answer)
            finally:
                os._exit(1)     # nothing of the worker's is to be cleaned up here
        os.close(jobs)
        os.close(answer)
        booted = cls(process, os.fdopen(ask, "wb"), os.fdopen(answers, "rb"))
        line = booted._answers.readline()
        if line.startswith(b"booted "):
            booted.instructions = int(line.split()[1])
            return booted, None
        status = booted.close()
        record: Record = json.loads(line) if line.endswith(b"\n") else {"status": "failed", "error": _died(status)}
        return None, record | {"host_seconds": round(time.perf_counter() - started, 6)}

    def run(self, parameters: Mapping[str, Value]) -> Record:
        """One cell. A fork that dies has failed; :attr:`gone` says that the process itself did."""
        started = time.perf_counter()
        try:
            self._ask.write(json.dumps(dict(parameters)).encode() + b"\n")
            self._ask.flush()
        except BrokenPipeError:
            pass        # there will be no answer either
        record: Record | None = None
        line = self._answers.readline()
        if line.startswith(b"{"):
            record = json.loads(line)
            line = self._answers.readline()
        if not line:
            self.gone = True
            self._status = self.close()
        if record is None:
            record = {"status": "failed", "error": _died(int(line) if line else self._status)}
        record["host_seconds"] = round(time.perf_counter() - started, 6)
        return record

    def close(self) -> int:
        """End the process, which sees the end of its jobs; its status as ``waitpid`` has it."""
        with contextlib.suppress(BrokenPipeError):      # a job that it did not live to read
            self._ask.close()
        self._answers.close()
        return os.waitpid(self._process, 0)[1]


def _died(status: int) -> str:
    return f"the worker died ({exit_words(os.waitstatus_to_exitcode(status))})"


def _keep_only(*descriptors: int) -> None:
    """Let go of the worker's other descriptors: who waits for the end of a pipe is to see it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    first = 3
    for last in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
        os.closerange(first, last)
        first = last + 1


def _serve(technique: str, parameters: dict[str, Value], jobs: IO[bytes], answer: int) -> None:
    """In the process that boots: run the guest up to its point, then fork for each job. Comes back in a fork only, with the cell done."""
    def attach(run: Run) -> None:
        reached = False

        def at_end_of_boot(_address: int = 0) -> None:
            nonlocal reached
            if not reached:     # else a fork passes here again
                reached = True
                _wait_for_jobs(run, parameters, jobs, answer)

        if run.dialogue is not None:
            run.dialogue.on_first = at_end_of_boot
        else:
            run.strategy.watch(run.image.symbol(str(guests.told_at(run.guest, technique))), at_end_of_boot)

    record = run_one(lambda technique, parameters: run_cell(technique, parameters, attach), technique, parameters)
    _write(answer, json.dumps(record).encode() + b"\n")
    os._exit(0)


def _wait_for_jobs(run: Run, parameters: dict[str, Value], jobs: IO[bytes], answer: int) -> None:
    """Returns in a fork, which is to go on as the cell that was asked for. ``parameters``: the object that the whole run looks at."""
    _write(answer, b"booted %d\n" % (run.machine.time - run.machine.idle_time))
    gc.freeze()     # a collection in a fork would write to, and so copy, every page of objects
    for line in iter(jobs.readline, b""):
        process = os.fork()
        if process == 0:
            jobs.close()
            parameters.clear()
            parameters.update(json.loads(line))
            run.become(parameters)
            return
        _, status = os.waitpid(process, 0)
        _write(answer, b"%d\n" % status)
    os._exit(0)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data):]
