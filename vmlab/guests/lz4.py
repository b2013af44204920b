"""LZ4 as Linux packs its kernel: the legacy frame, blocks of at most 8 MiB each.

Source: LZ4 Frame Format 1.6 ("Legacy frame"), LZ4 Block Format. Unpacking 50 MB takes this some seconds.
"""

from __future__ import annotations

import struct

MAGIC = b"\x02\x21\x4c\x18"
_BLOCK = 8 << 20


def unpack_legacy(data: bytes) -> bytes:
    """All blocks of a legacy frame. Raises :class:`ValueError` where it is damaged."""
    if data[:4] != MAGIC:
        raise ValueError("no legacy LZ4 frame")
    out, at = bytearray(), 4
    while at + 4 <= len(data):
        size, = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            break                       # Linux appends the unpacked size, which is no block
        block = _unpack_block(data[at:at + size])
        out += block
        at += size
        if len(block) < _BLOCK:
            break                       # only the last may be shorter
    return bytes(out)


def _unpack_block(data: bytes) -> bytearray:
    """Sequences of literals and of copies from what is already there."""
    out = bytearray()
    at, end = 0, len(data)
    try:
        while at < end:
            token = data[at]
            at += 1
            length = token >> 4
            if length == 15:
                while True:
                    more = data[at]
                    at += 1
                    length += more
                    if more != 255:
                        break
            if length:
                if at + length > end:
                    raise ValueError("literals reach beyond the block")
                out += data[at:at + length]
                at += length
            if at == end:
                break                   # the last sequence has literals only
            offset = data[at] | data[at + 1] << 8
            at += 2
            length = token & 15
            if length == 15:
                while True:
                    more = data[at]
                    at += 1
                    length += more
                    if more != 255:
                        break
            length += 4
            begin = len(out) - offset
            if begin < 0 or not offset:
                raise ValueError("a copy from before the beginning")
            if offset >= length:
                out += out[begin:begin + length]
            else:                       # overlapping: the bytes just written repeat
                piece = bytes(out[begin:])
                out += (piece * (length // offset + 1))[:length]
            if len(out) > _BLOCK:
                raise ValueError("a block of more than 8 MiB")
    except IndexError:
        raise ValueError("the block ends in the middle of a sequence") from None
    return out
