"""Reading experiment files: plain values with line numbers, and nothing that a hostile file could do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.errors import ConfigError
from vmlab.experiment import yamlfile


def test_values_and_their_lines() -> None:
    document = yamlfile.parse("name: x\nmatrix:\n  - technique: native\n    density: [1, 10]\n", "f.yaml")
    assert document.data == {"name": "x", "matrix": [{"technique": "native", "density": [1, 10]}]}
    assert document.lines[("matrix",)] == 2
    assert document.lines[("matrix", 0, "density", 1)] == 4


def test_an_error_names_file_line_and_key() -> None:
    document = yamlfile.parse("a: 1\nb:\n  c: 2\n", "f.yaml")
    assert str(document.error(("b", "c"), "wrong")) == "f.yaml:3: b.c: wrong"
    assert str(document.error(("b", "missing", 0), "wrong")) == "f.yaml:2: b.missing[0]: wrong"


@pytest.mark.parametrize(("text", "says"), [
    ("", "empty"),
    ("a: [1, 2", "f.yaml:1: not valid YAML"),
    ("a: 1\na: 2\n", "f.yaml:2: a: the key is there twice"),
    ("b: &x {c: 1}\na:\n  <<: *x\n", "f.yaml:3: merge keys"),
    ("a: !!python/object/apply:os.system [id]\n", "not allowed"),
    ("a: !!set {x}\n", "not allowed"),
    ("a: 2005-01-01\n", "quote dates"),
    ("[1]: 2\n", "a key must be a word"),
    ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ("a: &x [*x]\n", "nested too deeply"),
    ("a: " + "[" * 400 + "]" * 400, "nested too deeply"),
    ("a: " + "[" * 20000, "f.yaml"),
    ("a: \x00", "not valid YAML"),
    ("a: " + "9" * 5000, "is no int"),
])
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml") as caught:
        yamlfile.parse(text, "f.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_of_aliases_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="more than 20000 values"):
        yamlfile.parse("\n".join(lines), "f.yaml")


def test_a_large_file_is_refused_without_being_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"a: " + b"x" * yamlfile.MAX_BYTES)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        yamlfile.read(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        yamlfile.read(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        yamlfile.read(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8"):
        yamlfile.read(latin)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        yamlfile.parse(text, "f.yaml")
    except ConfigError as error:
        assert str(error).startswith("f.yaml")
