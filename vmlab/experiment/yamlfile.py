"""Reads YAML that may come from anywhere: no objects, no surprises, and a line number for every value.

PyYAML's composer is used and its constructor is not: the composed tree is walked here, so that a value is
only ever text, number, truth value, nothing, list or mapping. Refused, with file and line: custom tags,
repeated keys, merge keys, keys that are no text, files above :data:`MAX_BYTES`, and trees that grow above
:data:`MAX_VALUES` when their aliases are written out ("billion laughs").
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vmlab.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 32

#: Where a value is in the document: keys and indices from the top.
Where = tuple[str | int, ...]


def spell(where: Where) -> str:
    """``("matrix", 0, "technique")`` as ``matrix[0].technique``."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text


@dataclass
class Document:
    """A read file: its plain ``data``, and the line on which each value stands."""

    name: str
    data: Any
    lines: dict[Where, int] = field(default_factory=dict)

    def error(self, where: Where, message: str) -> ConfigError:
        """The error ``file:line: key: message``; a missing value is shown at the line of what should hold it."""
        if not self.lines:  # not from a file: the values were given one by one
            return ConfigError(f"{where[-1]}: {message}" if where else message)
        at = where
        while at and at not in self.lines:
            at = at[:-1]
        place = f"{self.name}:{self.lines.get(at, 1)}"
        return ConfigError(f"{place}: {spell(where)}: {message}" if where else f"{place}: {message}")


def read(path: Path, name: str | None = None) -> Document:
    """Read the file at ``path``.

    :param name: how messages call it; the path itself when not given.
    :raises ConfigError: it cannot be read, or is not plain YAML within the limits.
    """
    shown = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{shown}: larger than {MAX_BYTES // 1024} KiB; that is no experiment")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: not UTF-8 text") from error
    return parse(text, shown)


def parse(text: str, name: str) -> Document:
    """Parse ``text``; ``name`` is what messages call it."""
    try:
        root = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error
    if root is None:
        raise ConfigError(f"{name}: the file is empty")
    document = Document(name, None)
    document.data = _Walk(document).value(root, ())
    return document


def _compose(text: str) -> yaml.Node | None:
    """The document's tree. By libyaml where PyYAML was built with it, several times quicker; what that refuses is read again in
    Python, so that an error has the same words and line on every host (libyaml stops at a depth of 1000, Python at its recursion limit).
    """
    quick = getattr(yaml, "CSafeLoader", None)
    if quick is not None:
        with contextlib.suppress(yaml.YAMLError):
            return yaml.compose(text, Loader=quick)
    return yaml.compose(text, Loader=yaml.SafeLoader)


class _Walk:
    """Turns the composed tree into plain values, counting as it goes."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, where: Where) -> Any:
        self.document.lines.setdefault(where, node.start_mark.line + 1)
        self.values += 1
        # Aliases are walked each time they appear, so this bounds what a bomb of aliases can become,
        # and the depth bounds one that contains itself.
        if self.values > MAX_VALUES:
            raise self.document.error((), f"more than {MAX_VALUES} values (aliases written out)")
        if len(where) > MAX_DEPTH:
            raise self.document.error(where[:4], "nested too deeply, or an alias of itself")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*where, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, where)
        raise self.document.error(where, f"tag {node.tag} is not allowed: plain values only")

    def mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.document.name}:{line}: a key must be a word")
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{self.document.name}:{line}: merge keys (<<) are not allowed: write the keys out")
            if key in result:
                raise ConfigError(f"{self.document.name}:{line}: {spell((*where, key))}: the key is there twice")
            # A key's line is better to show than its value's, which may begin a line below.
            self.document.lines[(*where, key)] = line
            result[key] = self.value(value_node, (*where, key))
        return result

    def scalar(self, node: yaml.ScalarNode, where: Where) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        try:
            if kind == "str":
                return node.value
            if kind == "null":
                return None
            if kind == "bool":
                return self.scalars.construct_yaml_bool(node)
            if kind == "int":
                return self.scalars.construct_yaml_int(node)
            if kind == "float":
                return self.scalars.construct_yaml_float(node)
        except (ValueError, KeyError) as error:
            raise self.document.error(where, f"{node.value[:40]!r} is no {kind}") from error
        raise self.document.error(where, f"tag {node.tag} is not allowed: plain values only (quote dates)")
