"""The devices of this PC, one noun a file. Each has ``read``, ``write``, ``state`` and ``from_state``.

A device knows neither bus nor host: it is given an interrupt line (called with its level), a :class:`~vmlab.machine.timeline.Timeline`
where it acts by itself, and what else it touches, by whoever wires it (``machine/pc.py``, ``vmm/platform.py``). The guest is not
trusted: every access is defined for every offset, size and value.
"""
