"""``hog``: a kernel that switches interrupts off and keeps the CPU, with a device's interrupt waiting. Written for the claim on
resource control: what does its monitor see of that interrupt, and when does the guest?"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vmlab.guests.image import Workload

#: By name.
WORKLOADS: Mapping[str, Workload] = MappingProxyType({
    "cli_loop": Workload("cli_loop", "CLI, a UART interrupt that waits, 400 000 instructions, STI", MappingProxyType({}), asynchronous=True),
})
