"""The workloads of ``minios`` as the rest of the lab sees them; programs/init.c has the same names."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType

from vmlab.guests.image import Workload
from vmlab.parameters import Parameter

_TIMER = Parameter("nanoseconds of virtual time between two timer ticks; 0: no timer", 0, maximum=54_000_000)
_TICKING = Parameter("nanoseconds of virtual time between two timer ticks; 0: no timer", 1_000_000, maximum=54_000_000)
_PHASE = Parameter("nanoseconds between the timer's start and the first process", 0, maximum=100_000_000)
_SEED = Parameter("seed of the random generator", 1, minimum=1)
_BATCH = Parameter("page-table changes in one hypercall, at most (paravirtual)", 32, minimum=1, maximum=512)
_DISK = Parameter("how a paravirtual kernel reaches the block device", "ring", choices=("ring", "port"))
_SECTORS = Parameter("sectors of 512 bytes of the disk; 32 are used", 32, minimum=1, maximum=65536)


#: What a broken kernel does: programs/macro.c has the same names.
BAD = ("stack-overflow", "no-idt", "recursive-fault", "stray-pointer", "foreign-frame", "foreign-table", "foreign-dma")


def _iterations(default: int, maximum: int = 10_000_000) -> Parameter:
    return Parameter("iterations of the workload's loop", default, minimum=1, maximum=maximum)


def _pages(default: int, maximum: int = 3500) -> Parameter:
    return Parameter("pages of memory that each process has in use", default, minimum=1, maximum=maximum)


def _processes(default: int, maximum: int = 15) -> Parameter:
    return Parameter("processes at work at the same time", default, minimum=1, maximum=maximum)


def _nano(name: str, summary: str, iterations: int, maximum: int = 10_000_000, **more: Parameter) -> Workload:
    parameters = {"iterations": _iterations(iterations, maximum), **more, "batch": _BATCH, "timer": _TIMER, "phase": _PHASE}
    return Workload(name, summary, MappingProxyType(parameters))


def _macro(name: str, summary: str, iterations: int, *, disk: bool = False, **more: Parameter) -> Workload:
    parameters = {"iterations": _iterations(iterations), **more, "batch": _BATCH, "timer": _TICKING, "phase": _PHASE}
    if disk:
        parameters |= {"disk": _DISK, "sectors": _SECTORS}
    return Workload(name, summary, MappingProxyType(parameters), asynchronous=disk)


_ALL = (
    # Adams & Agesen, ASPLOS 2006
    _nano("syscall", "a system call that does nothing, by SYSENTER (32 bits) or SYSCALL (64)", 1000),
    _nano("in", "IN from port 0x80, in the kernel", 1000),
    _nano("cr8", "a write to the task priority: CR8, in 32 bits the local APIC's TPR", 1000),
    _nano("callret", "a call and a return, in the kernel", 10_000),
    _nano("pgfault", "a page fault in the kernel whose handler maps nothing and skips the instruction", 1000),
    _nano("divzero", "a divide error in the kernel whose handler skips the instruction", 1000),
    _nano("ptemod", "a present page-table entry is stored again as it was", 1000, 3500),
    _nano("ptemod_p_np", "a page-table entry in use becomes not present", 1000, 3500),
    _nano("ptemod_np_p", "a page-table entry becomes present", 1000, 3500),
    _nano("forkwait", "fork, a child that ends at once, wait", 100),
    # Barham et al., SOSP 2003 (lmbench)
    _nano("null_call", "a system call that does nothing, by INT 0x80", 1000),
    _nano("fork", "fork, exit and wait in a process with memory", 20, pages=_pages(200, 2000)),
    _nano("ctxsw", "a token between two processes through pipes: two switches (2p/0K)", 200),
    _nano("mmap", "map pages, touch every fourth, unmap them", 50, pages=_pages(64, 2000)),
    _nano("protfault", "a write to a page that may only be read, sent to the program's handler", 1000),
    _nano("pagefault", "the first touch of a page", 300, 3500),
    # loads like whole programs
    _macro("build", "compilations: fork, exec, fresh memory, computing, files, wait", 12, disk=True, pages=_pages(64, 1000), processes=_processes(2)),
    _macro("server", "requests through pipes: switches, system calls, a little computing, files", 200, disk=True, processes=_processes(4)),
    _macro("chase", "64 steps along pointers through pages in random order", 5000, pages=_pages(256), seed=_SEED),
    _macro("compute", "computing in user mode", 100),
    _macro("mixed", "all of it: calls, faults, fork, mappings, switches, files", 20, disk=True, pages=_pages(32, 1000)),
    _macro("io", "sectors written, read back and compared", 50, disk=True),
    _macro("random", "seeded random programs of fork, map, unmap, protect, read and write", 60,
           seeds=Parameter("random programs in one run, of seeds that follow each other", 20, minimum=1, maximum=100_000), seed=_SEED),
    _macro("idle", "nothing to do from tick to tick", 10),
    Workload("bad", "a kernel that breaks itself, and must end cleanly and with a reason", MappingProxyType({
        "bad": Parameter("what breaks, or what foreign memory the kernel reaches for", "stack-overflow", choices=BAD),
        "sectors": _SECTORS,
    }), asynchronous=True),
)

#: By name.
WORKLOADS: Mapping[str, Workload] = MappingProxyType({workload.name: workload for workload in _ALL})


def disk(values: Mapping[str, object]) -> bytes | None:
    """The disk that the workload in ``values`` finds, or None: every word tells its sector and its place."""
    parameters = WORKLOADS[str(values["workload"])].parameters
    if "sectors" not in parameters:
        return None
    sectors = parameters["sectors"].check("sectors", values.get("sectors", _SECTORS.default))
    return b"".join(struct.pack("<128I", *(sector << 16 | word for word in range(128))) for sector in range(int(sectors)))
