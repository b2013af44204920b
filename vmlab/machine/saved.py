"""The whole state of a machine that stands between two blocks, as plain values, and a machine that goes on from it.

What is there: the CPU with its hidden registers, devices, what is due when, what was counted. RAM is left to the caller, who can store it
better (:meth:`~vmlab.machine.memory.Ram.pages_in_use`). What is not there follows from it: decoded and translated code is met anew, and
Unicorn's TLB is empty, as it may be at any moment.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vmlab.errors import UnsupportedByStrategy
from vmlab.ledger import Snapshot
from vmlab.machine.devices.pit import Pit
from vmlab.machine.pc import Machine
from vmlab.machine.state import CS
from vmlab.machine.timeline import Timeline

_DR7, _BREAKPOINTS = 7, slice(8, 12)    # 64-bit words from DR0: breakpoints that are armed are pointers there (QEMU: cpu_breakpoint)
_ARMED = 0xFF
#: What devices ask for once, and keep as their one request to the timeline.
_ASKED_FOR = ("_edge", "_fire", "_done", "_finish")

State = dict[str, Any]


def state(machine: Machine) -> State:
    """What :func:`restore` needs. The machine has stopped of its own accord, between two blocks.

    :raises UnsupportedByStrategy: this moment cannot be saved, and why.
    """
    if machine.accesses is not None:
        raise UnsupportedByStrategy("a run that models the TLB cannot be saved")
    machine.cpu.load()
    counted, time = machine.counter.snapshot(), machine.time
    _settle(machine, counted)
    interrupts, msrs = machine.interrupts, machine.instructions.msrs
    return {
        "cpu": _cpu(machine), "nested_root": machine.cpu.nested_root, "msrs": dict(msrs.kept), "tsc_aux": msrs.tsc_aux,
        "drawn": machine.instructions.drawn,
        "time": time, "idle_time": machine.idle_time, "tsc": (machine.tsc_offset, machine.tsc_adjustment),
        "counted": _snapshot(counted.plus(machine.earlier)), "events": dict(machine.events),
        "ring": (machine.counter.cpl, machine.counter.user, machine.counter.user_from),
        "console": bytes(machine.console), "device_log": [list(entry) for entry in machine.device_log],
        "interrupts": interrupts.state(),
        "devices": [device.state() for device in _devices(machine)],
        "unanswered": dict(machine.ports.unanswered),
        "due": due(machine.timeline, owners(_devices(machine))),
    }


def restore(machine: Machine, saved: State) -> None:
    """Make ``machine``, which is wired as the saved one was and has its RAM already, go on where that one stood.

    :raises KeyError, TypeError, ValueError: this is no such state.
    """
    machine.cpu.load()
    window = machine.cpu.window
    if len(saved["cpu"]) != window.size:
        raise ValueError("the CPU's state has another size")
    ctypes.memmove(window.address, bytes(saved["cpu"]), window.size)
    window.store()
    machine.cpu.nested_root = saved["nested_root"]
    machine.engine.flush_tlb()
    machine.instructions.msrs.kept, machine.instructions.msrs.tsc_aux = dict(saved["msrs"]), saved["tsc_aux"]
    machine.instructions.drawn = saved["drawn"]
    machine.counter.drop(0)
    machine.counter.time, machine.idle_time = saved["time"], saved["idle_time"]
    machine.tsc_offset, machine.tsc_adjustment = saved["tsc"]
    # What this machine has counted while it was set up is in what the other one counted too.
    machine.earlier = Snapshot(*saved["counted"]).minus(machine.counter.snapshot())
    machine.events.clear()
    machine.events.update(saved["events"])
    machine.counter.cpl, machine.counter.user, machine.counter.user_from = saved["ring"]
    machine.console[:] = saved["console"]
    machine.device_log[:] = [(port, size, value) for port, size, value in saved["device_log"]]
    for device, of_device in zip(_devices(machine), saved["devices"], strict=True):
        device.from_state(of_device)
    machine.ports.unanswered = dict(saved["unanswered"])
    machine.interrupts.from_state(saved["interrupts"])
    arrange(machine.timeline, owners(_devices(machine)), saved["due"])


def _cpu(machine: Machine) -> bytes:
    window = machine.cpu.window
    raw = window.raw()
    registers = window.u64[machine.cpu.layout.debug_registers // 8:]
    if registers[_DR7] & _ARMED or any(registers[_BREAKPOINTS]):
        raise UnsupportedByStrategy("the guest has armed breakpoints in its debug registers; it cannot be saved now")
    return raw


def _settle(machine: Machine, counted: Snapshot) -> None:
    """The block that ran last is over, but what it led to would have been seen at the next block's start: a jump that was taken."""
    block = machine.left_off
    cpu = machine.cpu
    at = (cpu.rip + cpu.segment(CS).base) & (0xFFFFFFFFFFFFFFFF if cpu.long_mode else 0xFFFFFFFF)
    if block is None or block.end == at or not block.instructions:
        return
    last = block.instructions[-1]
    if block.rep and at == block.end - last.size:
        raise UnsupportedByStrategy("the guest is in the middle of a string instruction; it cannot be saved now")
    if last.kind == "jcc" and not last.op:      # as code.py: total
        for kind, n in (("machine.branch", 1), ("machine.alu", -1)):
            counted.events[kind] = counted.events.get(kind, 0) + n


def _snapshot(counted: Snapshot) -> tuple[dict[str, int], int, int, int]:
    return counted.events, counted.user, counted.kernel, counted.machine


def _devices(machine: Machine) -> Iterator[Any]:
    """Every device once, in an order of their wiring; interrupt controllers last, since the others pull at their lines."""
    last = [machine.ioapic, machine.lapic, machine.pic]
    seen = {id(device) for device in (*last, machine.pic.master, machine.pic.slave)}
    for device in machine.ports.devices():
        if id(device) not in seen:
            seen.add(id(device))
            yield device
    yield from last


def owners(devices: Iterable[object]) -> dict[str, Any]:
    """Names for devices and their parts that ask a timeline for something, the same in every machine that is wired alike."""
    found: dict[str, Any] = {}
    for number, device in enumerate(devices):
        found[f"device {number}"] = device
        if isinstance(device, Pit):
            found.update((f"channel {channel} of device {number}", part) for channel, part in enumerate(device.channels))
    return found


def due(timeline: Timeline, owners: Mapping[str, Any]) -> list[tuple[int, str]]:
    """What is due when, in the order in which it will run, each named by its owner and its method.

    :raises UnsupportedByStrategy: something is due that no device can ask for again.
    """
    by_identity = {id(owner): name for name, owner in owners.items()}
    found = []
    for handle in timeline.pending():
        label = _label(handle.callback, by_identity)
        if label is None:
            raise UnsupportedByStrategy("a request to a device is under way that cannot be saved; stop the guest a little later")
        found.append((handle.due, label))
    return found


def arrange(timeline: Timeline, owners: Mapping[str, Any], saved: list[tuple[int, str]]) -> None:
    """Devices have asked again for what is due. One that looks ahead only has forgotten what is due already: it gets that back; and what is due at
    the same time comes in the order in which it was.

    :raises ValueError: other things are due than were.
    """
    by_identity = {id(owner): name for name, owner in owners.items()}
    left = [(handle, _label(handle.callback, by_identity)) for handle in timeline.pending()]
    ordered = []
    for when, label in saved:
        found = next((item for item in left if item[1] == label), None)
        if found is not None:
            left.remove(found)
            handle = found[0]
            handle.due = when
        else:
            name, _, method = label.partition(": ")
            owner = owners[name]
            if method not in _ASKED_FOR:
                raise ValueError(f"{name} never asks for {method}")
            handle = owner._handle = timeline.at(when, getattr(owner, method))
        ordered.append(handle)
    if left:
        raise ValueError(f"{left[0][1]} is due at {left[0][0].due}")
    timeline.reorder(ordered)


def _label(callback: object, owners: Mapping[int, str]) -> str | None:
    if isinstance(callback, functools.partial):
        inner = _label(callback.func, owners)
        return None if inner is None else f"{inner}{callback.args}"
    owner = owners.get(id(getattr(callback, "__self__", None)))
    return None if owner is None else f"{owner}: {getattr(callback, '__name__', '')}"
