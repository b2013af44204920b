"""Published tables beside what the lab predicts, row by row: ``python -m vmlab.validation`` writes docs/validation.md and .json.

``published.yaml`` holds the rows as printed, with their source, and which of them set a cost (``calibrated``) or are no test for
another reason. ``table`` predicts each from the cells of its own experiment; ``document`` writes the result.
"""

from __future__ import annotations

from vmlab.validation.table import Row, predict, published, statistics

__all__ = ["Row", "predict", "published", "statistics"]
