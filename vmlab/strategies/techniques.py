"""What each technique is, said without its machine: name, summary, parameters, platform, known infidelities.

``vmlab list``, ``validate`` and ``--dry-run`` read these and nothing more; the class that runs the technique (its module is
in :data:`vmlab.strategies.BUILT_IN`) inherits its description from here. A new parameter, or a new choice of one, is one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vmlab.parameters import Parameter, Value

_MEMORY = "how guest memory is virtualized: static = page tables of the VMM's that never change"
_SHADOWED = f"{_MEMORY}; tracing, lazy = shadow page tables"
_HYPERVISOR = Parameter("where the VMM stands: on the machine (type1), or beside a host that owns the devices (type2)", "type1",
                        ("type1", "type2"))


#: What every technique gives its guest where nothing else is said: 32 MiB of RAM from guest-physical address 0.
GUEST_MEMORY = 32 << 20
#: Machine memory beside the guest's: the VMM's, and an open end.
BESIDE_GUEST = 32 << 20
#: What a cell may say of it.
RAM = Parameter("RAM that the guest has, in MiB", GUEST_MEMORY >> 20, minimum=8, maximum=896)


def machine_memory(parameters: Mapping[str, Value]) -> int:
    """Bytes of machine memory for a guest with these parameters. Raises ConfigError."""
    return (int(RAM.check("ram", parameters.get("ram", RAM.default))) << 20) + BESIDE_GUEST


class Technique:
    """A description. :class:`vmlab.strategies.base.Strategy` is one too, so a technique from elsewhere needs no second class."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: What can be chosen about it, beside the guest's own parameters.
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    #: Whether the whole guest state, not only its outcome, must equal the bare machine's.
    full_virtualization: ClassVar[bool] = True

    @classmethod
    def platform(cls, parameters: Mapping[str, Value]) -> str:
        """What a CPU must offer to run this: "x86", "svm" for hardware assistance, "svm-npt" for nested paging as well."""
        return "x86"

    @classmethod
    def unfaithful(cls, workload: str, parameters: Mapping[str, Value]) -> str | None:
        """Why this technique is known to change this workload's outcome, or None."""
        return None


class NativeTechnique(Technique):
    name = "native"
    summary = "the guest at CPL 0 on the bare machine: the baseline and the oracle"


class TrapAndEmulateTechnique(Technique):
    name = "trap-and-emulate"
    summary = "guest kernel at CPL 1; each privileged instruction traps and is emulated"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "memory": Parameter(f"{_SHADOWED}; none = shadow page tables that nobody keeps in step", "static", ("static", "tracing", "lazy", "none")),
        "hypervisor": _HYPERVISOR,
        "sensitive": Parameter("do sensitive instructions trap (a hypothetical x86) or not (classical x86)", "silent", ("silent", "trap")),
    }

    #: By guest: workloads whose outcome classical x86 changes, and by which instruction.
    SILENT_DAMAGE: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "nano": {
            "pushf_popf": "PUSHF shows the real IF and POPF silently leaves it alone",
            "interrupt": "IRET from the handler silently drops IF, so interrupts stay off",
            "mixed": "POPF and IRET silently drop IF",
        },
        "minios": {"idle": "IRET to a program silently drops IF, so no tick comes while it runs"},
    }

    @classmethod
    def unfaithful(cls, workload: str, parameters: Mapping[str, Value]) -> str | None:
        if parameters.get("memory") == "none" and parameters.get("guest", "nano") != "nano":
            return "nobody keeps the shadow page tables in step, so the guest's changes of its own are not seen"
        if parameters.get("sensitive", "silent") == "trap":
            return None
        return cls.SILENT_DAMAGE.get(str(parameters.get("guest", "nano")), {}).get(workload)


class BinaryTranslationTechnique(Technique):
    name = "binary-translation"
    summary = "guest kernel translated into a cache, CLI becomes a store; user code runs directly"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "memory": Parameter(_SHADOWED, "static", ("static", "tracing", "lazy")),
        "hypervisor": _HYPERVISOR,
        "emulation": Parameter("sensitive instructions inside the cache, or each by a callout", "in-cache", ("in-cache", "callout")),
        "lookup": Parameter("targets of returns and indirect jumps looked up inside the cache, or each by a callout", "in-cache",
                            ("in-cache", "callout")),
        "adaptation": Parameter("accesses that keep faulting on memory that the VMM watches: simulated in the cache where that is sound, "
                                "called out, or left to fault", "simulate", ("simulate", "callout", "off")),
        "guilty": Parameter("faults after which an access is adapted", 8, minimum=1, maximum=1000),
        "chaining": Parameter("exits patched to lead straight to translated targets", "on", ("on", "off")),
        "cache": Parameter("bytes of the translation cache", 1 << 20, minimum=16 << 10, maximum=1 << 20),
        "unit": Parameter("guest instructions of a translation unit, at most", 12, minimum=1, maximum=12),
    }


class ParavirtualizationTechnique(Technique):
    name = "paravirtualization"
    summary = "the kernel makes hypercalls; its interrupt flag is a byte in shared memory"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "memory": Parameter(f"{_MEMORY}, direct = the guest's own, checked", "static", ("static", "direct")),
        "hypervisor": _HYPERVISOR,
        "services": Parameter("how the guest is served: direct = system calls, returns and rings without the VMM where they can, "
                              "hypercall = every service through the VMM, as a microkernel's", "direct", ("direct", "hypercall")),
    }
    full_virtualization = False


class HardwareAssistedTechnique(Technique):
    name = "hardware-assisted"
    summary = "the guest at CPL 0 in guest mode: VMCB, VMRUN, intercepts, event injection"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "memory": Parameter(f"{_SHADOWED}; nested = nested page tables", "static", ("static", "tracing", "lazy", "nested")),
        "hypervisor": _HYPERVISOR,
        "nested_page": Parameter("size of the pages in nested tables", "4k", ("4k", "2m")),
    }

    @classmethod
    def platform(cls, parameters: Mapping[str, Value]) -> str:
        return "svm-npt" if parameters.get("memory") == "nested" else "svm"


#: The built-in techniques' descriptions by name.
DESCRIBED: Mapping[str, type[Technique]] = {
    described.name: described for described in (
        NativeTechnique, TrapAndEmulateTechnique, BinaryTranslationTechnique, ParavirtualizationTechnique, HardwareAssistedTechnique)
}
