"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--technique", action="append", default=[], metavar="NAME|FILE.py:CLASS",
                     help="run the conformance suite on this technique instead of the built-in ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "technique" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_conformance"):
        from vmlab.strategies import BUILT_IN

        metafunc.parametrize("technique", metafunc.config.getoption("--technique") or list(BUILT_IN))
