"""Experiments: schema, matrix, workers, results on disk.

``yamlfile`` reads YAML safely, with line numbers; ``schema`` turns it into an :class:`Experiment`;
``matrix`` makes cells of it; ``workers`` runs them, one process each at a time; ``store`` keeps them on
disk; ``pricing`` completes what was counted with cycles, slowdown and fidelity; ``runner`` is the
table of contents. ``cell`` (what a worker runs) is the only module that reaches the machine.
"""
