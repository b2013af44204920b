"""What was measured and what could not be, and the cost profile that comes of it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from vmlab import costs
from vmlab.costs.figures import ASSUMED_FACTOR
from vmlab.measure import kvm, native
from vmlab.measure.native import CannotMeasure, Spread

NAME = "this-machine"
COMMAND = "vmlab measure"
#: Vendor as CPUID gives it -> vendor of profiles, and the profile that figures are assumed from.
BASES = {"GenuineIntel": ("Intel", "skylake-2015"), "AuthenticAMD": ("AMD", "zen3-2020")}
#: What stands for what: measured row -> profile's cost keys, and what to say of it there.
_INTERCEPTED = "Measured inside a virtual machine, whose hypervisor intercepts it: an exit's cost is in it."
_KVM = "KVM's own code is included, so this bounds the hardware's cost from above"


@dataclass
class Measured:
    """Rows in core cycles by name, and what could not be measured with the reason."""

    host: native.Host | None
    mhz: float | None = None
    rows: dict[str, Spread] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """For a program."""
        return {
            "schema_version": 1, "unit": "core cycles", "cpu": self.host.words if self.host else None,
            "vendor": self.host.vendor if self.host else None, "hypervisor": self.host.hypervisor if self.host else None,
            "mhz": self.mhz,
            "rows": [{"name": name, "value": s.value, "low": s.low, "high": s.high} for name, s in self.rows.items()],
            "not_measured": [{"name": name, "reason": reason} for name, reason in self.cannot.items()],
        }


def measure(with_kvm: bool = True) -> Measured:
    """Measure what this host lets us measure."""
    try:
        page = native.Page()
    except CannotMeasure as why:
        return Measured(None, cannot={"everything": str(why)})
    clock = native.Clock(page)
    result = Measured(native.host(page), float(f"{clock.mhz():.4g}"))

    def row(name: str, how: Callable[[], Spread]) -> None:
        try:
            result.rows[name] = how()
        except CannotMeasure as why:
            result.cannot[name] = str(why)

    for key, body in native.INSTRUCTIONS.items():
        row(key, lambda body=body: native.measure(page, clock, body))  # type: ignore[misc]
    row("pushf+popf", lambda: native.measure(page, clock, native.PAIR))
    row("system call", lambda: native.system_call(page, clock))
    row("signal round trip", lambda: native.signal_round_trip(page, clock))
    hypercall = "vmmcall" if result.host and result.host.vendor == "AuthenticAMD" else "vmcall"
    for reason in ("cpuid", hypercall):
        row(f"kvm {reason}", lambda reason=reason: _kvm(with_kvm, reason))  # type: ignore[misc]
    for reason in kvm.OUTSIDE:
        row(f"kvm {reason}, to the caller", lambda reason=reason: _kvm(with_kvm, reason))  # type: ignore[misc]
    result.cannot["cli, sti, iret, lgdt, mov to cr, …"] = "privileged: user mode may not run them, and a guest's run is not the host's"
    result.cannot["page-fault and EPT exits"] = "the guest of a few bytes runs unpaged in memory that stays mapped"
    if result.host and result.host.hypervisor:
        result.cannot["bare hardware"] = (
            f"this is a virtual machine ({result.host.hypervisor}): CPUID and whatever else its hypervisor intercepts cost an exit, "
            "and exits under KVM here are exits of a nested hypervisor")
    return result


def _kvm(allowed: bool, reason: str) -> Spread:
    if not allowed:
        raise CannotMeasure("not asked for (--no-kvm)")
    return kvm.measured(reason)


def profile_text(measured: Measured, today: datetime.date | None = None) -> str:
    """The cost profile as YAML: measured figures, all others assumed from a built-in profile of the same maker.

    :raises CannotMeasure: nothing was measured, or no profile is like this CPU.
    """
    if measured.host is None or measured.mhz is None:
        raise CannotMeasure("; ".join(measured.cannot.values()))
    if measured.host.vendor not in BASES:
        raise CannotMeasure(f"no profile is like a CPU of {measured.host.vendor!r}")
    vendor, base_name = BASES[measured.host.vendor]
    date = today or datetime.date.today()
    base = costs.load(base_name)
    rows = {key: _assumed(figure, base_name) for key, figure in base.costs.items() if key != "mhz"}
    words = f"{measured.host.words}" + (f" inside a virtual machine ({measured.host.hypervisor})" if measured.host.hypervisor else "")

    def put(key: str, spread: Spread, note: str = "") -> None:
        rows[key] = {
            "value": spread.value, "low": spread.low, "high": spread.high, "provenance": "measured", "machine": words,
            "command": COMMAND, "date": date.isoformat(), **({"note": note} if note else {}),
        }

    for key in native.INSTRUCTIONS:
        if key in measured.rows:
            put(key, measured.rows[key], _INTERCEPTED if key == "insn.cpuid" and measured.host.hypervisor else "")
    if {"pushf+popf", "insn.pushf"} <= set(measured.rows):
        put("insn.popf", _less(measured.rows["pushf+popf"], measured.rows["insn.pushf"]), "The pair less PUSHF.")
    if "system call" in measured.rows:
        half = _times(measured.rows["system call"], 0.5)
        for key in ("insn.syscall", "insn.sysret"):
            put(key, half, "Half of a getppid, the kernel's entry and exit code included.")
    _exits(measured, put)
    head = {
        "name": NAME, "words": f"this machine: {words}", "vendor": vendor, "year": date.year,
        "provides": sorted(base.provides),
        "mhz": {"value": measured.mhz, "low": measured.mhz, "high": measured.mhz, "provenance": "measured", "machine": words,
                "command": COMMAND, "date": date.isoformat()},
        "costs": rows,
    }
    comment = [f"# Made by `{COMMAND}` on {date.isoformat()}. Not measured here, and why:"]
    comment += [f"#   {name}: {reason}" for name, reason in measured.cannot.items()]
    if "signal round trip" in measured.rows:
        cycles = measured.rows["signal round trip"].value
        comment.append(f"# A signal's round trip (INT3, the kernel's signal code, a handler of one RET): {cycles:g} cycles.")
    return "\n".join(comment) + "\n" + yaml.safe_dump(head, sort_keys=False, width=140, allow_unicode=True)


def _exits(measured: Measured, put: Callable[[str, Spread, str], None]) -> None:
    """Round trips under KVM: the shortest one's half is called the entry, the rest of each the exit."""
    trips = {name.split()[1].rstrip(","): spread for name, spread in measured.rows.items() if name.startswith("kvm ")}
    inside = {name: trips[name] for name in ("cpuid", "vmcall", "vmmcall") if name in trips}
    if not inside:
        return
    entry = _times(min(inside.values(), key=lambda spread: spread.value), 0.5)
    put("entry", entry, f"Half of the shortest round trip; {_KVM}.")
    for name, spread in inside.items():
        put({"cpuid": "exit.cpuid"}.get(name, "exit.vmmcall"), _less(spread, entry), f"A round trip less the entry; {_KVM}.")


def _assumed(figure: costs.Figure, base: str) -> dict[str, object]:
    """A figure of another CPU: assumed here, whatever it was there."""
    return {
        "value": figure.value, "low": min(figure.low, figure.value / ASSUMED_FACTOR), "high": max(figure.high, figure.value * ASSUMED_FACTOR),
        "provenance": "assumed", "note": f"Not measured here; taken from {base}.",
    }


def _times(spread: Spread, factor: float) -> Spread:
    return Spread(*(float(f"{value * factor:.4g}") for value in (spread.value, spread.low, spread.high)))


def _less(spread: Spread, other: Spread) -> Spread:
    """A difference of two measured figures, with the widest range that they allow."""
    low, value, high = spread.low - other.high, spread.value - other.value, spread.high - other.low
    value = max(value, 0.01)
    return Spread(*(float(f"{x:.4g}") for x in (value, min(max(low, 0.01), value), max(high, value))))
