"""``hog``: the image is that of its source, and its interrupt comes after STI under every technique that can run it."""

from __future__ import annotations

import hashlib
import json

import pytest

import vmlab
from vmlab import guests
from vmlab.guests.hog import build
from vmlab.guests.nano.build import tools

LOCK = json.loads((build.HERE / build.LOCK).read_text(encoding="utf-8"))


def test_the_image_is_the_locked_one_and_the_source_too() -> None:
    assert hashlib.sha256((build.HERE / build.IMAGE).read_bytes()).hexdigest() == LOCK["image_sha256"] == guests.load("hog").sha256
    assert hashlib.sha256(build.source()).hexdigest() == LOCK["source_sha256"]


@pytest.mark.skipif(tools() != LOCK["tools"], reason="other versions of as and ld than the lock's")
def test_a_rebuild_is_the_same_bit_for_bit() -> None:
    assert build.build() == (build.HERE / build.IMAGE).read_bytes()


@pytest.mark.parametrize("technique", ["native", "trap-and-emulate", "binary-translation", "hardware-assisted"])
def test_the_interrupt_waits_for_sti(technique: str) -> None:
    cell = vmlab.run(technique, "cli_loop", guest="hog", profiles=[])
    assert (cell["status"], cell["exit_code"], cell["fidelity"]["matches_native"]) == ("ok", 0, True)
    # By hand: RET of the marker, CLI, two moves, OUT, one move, 200 000 turns of two, CALL of the next marker.
    assert sum(cell["instructions"]["guest"].values()) == 400_007
    assert cell["events"].get("interrupt.injected", 0) == 0
    assert cell["events"].get("interrupt.delivered", 0) == (0 if technique == "native" else 1)


def test_it_has_no_paravirtual_half() -> None:
    assert vmlab.run("paravirtualization", "cli_loop", guest="hog", profiles=[])["status"] == "unsupported"
