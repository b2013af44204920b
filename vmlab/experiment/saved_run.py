"""A run on disk, to go on another time: ``vmlab run IMAGE --save FILE``, ``vmlab run --from FILE``.

The file holds all that the run depends on: what was run, the state of machine and VMM, the pages of memory that are not all zero, what was
counted so far, the image's symbols and the disks' content. The image itself is not needed any more. It holds plain values only; it is read
whole or not at all, and only by the code that counts as the code did that wrote it: what would follow elsewhere is no continuation.

    vmlab saved run 1\\n      the format
    32 bytes                  SHA-256 of the rest
    zlib                      8 bytes: length of the JSON text; the text; the pages that it names, 4 KiB each
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmlab.errors import ConfigError, ExperimentError

_MAGIC = b"vmlab saved run "
_VERSION = 1
_HEAD = _MAGIC + b"%d\n" % _VERSION
_PAGE, _MOST = 4096, 1 << 30
_LEVEL = 1          # memory of a guest is large, and mostly code and zeros


@dataclass(frozen=True)
class Saved:
    """What a file holds: ``values`` by name, and pages of memory by number."""

    values: Mapping[str, Any]
    pages: Mapping[int, memoryview]


def write(path: Path, values: Mapping[str, Any], pages: Iterable[tuple[int, bytes]]) -> None:
    """Write the file, all of it or nothing. ``pages``: offset and content of each, which is not kept.

    :raises ExperimentError: it cannot be written: disk full, no permission, no such place.
    """
    kept = list(pages)
    text = json.dumps(_plain({"values": dict(values), "pages": [offset // _PAGE for offset, _ in kept]})).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_HEAD + bytes(32))
            digest = hashlib.sha256()
            for piece in _compressed(text, kept):
                digest.update(piece)
                file.write(piece)
            file.seek(len(_HEAD))
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):      # the place itself is the trouble, and that is reported below
            temporary.unlink(missing_ok=True)
        raise ExperimentError(f"{path} cannot be written: {error.strerror or error}; nothing was saved") from error


def _compressed(text: bytes, pages: list[tuple[int, bytes]]) -> Iterator[bytes]:
    packer = zlib.compressobj(_LEVEL)
    yield packer.compress(len(text).to_bytes(8, "little") + text)
    for _, content in pages:
        yield packer.compress(content)
    yield packer.flush()


def read(path: Path, code: str) -> Saved:
    """What :func:`write` wrote.

    :param code: hash of the code that counts, here; the file's must be the same.
    :raises ConfigError: the file cannot be read, is none of these, is damaged, or comes from other code.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not raw.startswith(_MAGIC):
        raise ConfigError(f"{path}: no saved run; 'vmlab run IMAGE … --save FILE' makes one")
    if not raw.startswith(_HEAD):
        raise ConfigError(f"{path}: a saved run of another version of vmlab; run the guest again with --save")
    rest = memoryview(raw)[len(_HEAD) + 32:]
    if hashlib.sha256(rest).digest() != raw[len(_HEAD):len(_HEAD) + 32]:
        raise ConfigError(f"{path}: damaged (its checksum is wrong); run the guest again with --save")
    try:
        unpacker = zlib.decompressobj()
        data = memoryview(unpacker.decompress(rest, _MOST))
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("it does not end where it should")
        size = int.from_bytes(data[:8], "little")
        value = _unplain(json.loads(bytes(data[8:8 + size])))
        content = data[8 + size:]
        if len(content) != _PAGE * len(value["pages"]):
            raise ValueError("pages are missing")
        pages = {int(number): content[at * _PAGE:(at + 1) * _PAGE] for at, number in enumerate(value["pages"])}
        values = value["values"]
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({type(error).__name__}); run the guest again with --save") from error
    if values.get("code") != code:
        raise ConfigError(f"{path}: saved by code that counts otherwise ({values.get('code')}, here {code}); run the guest again with --save")
    return Saved(values, pages)


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: what JSON lacks is a mapping with one key that says what it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(key), _plain(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [_unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "tuple":
        return tuple(_unplain(item) for item in content)
    if kind == "mapping":
        return {_unplain(key): _unplain(item) for key, item in content}
    raise ValueError(f"{kind!r} is no kind of value")
