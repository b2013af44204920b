"""``vmlab run IMAGE``: a guest of our own from a file, its console, a dialogue with it, and how the run ends."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machinelab import asm

from vmlab.cli import live
from vmlab.cli.main import main as vm
from vmlab.errors import ConfigError
from vmlab.experiment import dialogue

if sys.platform != "win32":
    import pty
    import termios

AT = 0x100000
#: Says "> ", then echoes each character; '!' ends the run with code 0, '?' with code 3.
ECHO = """
mov dx, 0x3f8; mov al, 0x3e; out dx, al; mov al, 0x20; out dx, al;
next: mov dx, 0x3fd; in al, dx; test al, 1; jz next;
mov dx, 0x3f8; in al, dx; cmp al, 0x21; je good; cmp al, 0x3f; je bad; out dx, al; jmp next;
bad: mov eax, 3; jmp end; good: xor eax, eax; end: mov dx, 0xf4; out dx, eax; hlt
"""


def elf(source: str) -> bytes:
    """An ELF32 i386 kernel with a Multiboot header, at 1 MiB."""
    header = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    code = header + asm(source, AT + 12)
    head = struct.pack("<4s5B7xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 0, 0, 2, 3, 1, AT + 12, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return head + struct.pack("<8I", 1, 84, AT, AT, len(code), len(code), 7, 4) + code


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("guest") / "echo.elf"
    path.write_bytes(elf(ECHO))
    return str(path)


TECHNIQUES = [["native"], ["trap-and-emulate"], ["binary-translation"], ["hardware-assisted", "--set", "memory=nested"]]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_dialogue_ends_when_the_text_came(image: str, technique: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", image, "--technique", *technique, "--expect", "> ", "--send", "hello, guest\\n", "--expect", "guest\\n"]) == 0
    out = capsys.readouterr().out
    assert "> hello, guest" in out
    assert "guest instructions:" in out


@pytest.mark.parametrize(("steps", "said"), [
    (["--expect", "> ", "--send", "x!", "--expect", "never"], "ended its run before it said 'never'"),
    (["--expect", "never", "--budget", "20000"], "budget of 20000 guest instructions was spent"),
    (["--expect", "> ", "--send", "?"], "ended with exit code 3"),
])
def test_a_run_that_ends_before_is_status_1_and_one_sentence(image: str, steps: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", image, "--technique", "native", *steps]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_json_leaves_stdout_to_the_cell(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", image, "--technique", "native", "--expect", "> ", "--json", "--profile", "haswell-2013"]) == 0
    captured = capsys.readouterr()
    cell = json.loads(captured.out)
    assert (cell["status"], cell["console"], list(cell["cycles"])) == ("ok", "> ", ["haswell-2013"])
    assert captured.err.startswith("> ")


def test_the_same_dialogue_has_the_same_ledger_on_both_ways_into_the_machine(image: str, capsys: pytest.CaptureFixture[str],
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    for path in ("portable", "auto"):
        monkeypatch.setenv("VMLAB_MACHINE", path)
        assert vm(["run", image, "--technique", "hardware-assisted", "--set", "memory=nested", "--expect", "> ", "--send", "abc", "--expect", "c",
                   "--json"]) == 0
        events.append(json.loads(capsys.readouterr().out)["events"])
    assert events[0] == events[1]


@pytest.mark.parametrize(("arguments", "said"), [
    (["/nowhere/kernel.elf"], "no guest image at '/nowhere/kernel.elf'"),
    (["$VMLAB_GUEST_NOWHERE/kernel"], "set VMLAB_GUEST_NOWHERE"),
    (["IMAGE", "--initrd", "/nowhere/initrd"], "no initrd at '/nowhere/initrd'"),
    (["IMAGE", "--disk", "/nowhere/disk"], "no disk image at"),
    (["IMAGE", "--ram", "4"], "ram: 4 is outside 8..896"),
    (["IMAGE", "--expect", ""], "an empty text"),
    (["IMAGE", "--set", "protocol=pvh"], "no PVH entry"),
    (["IMAGE", "--set", "protocol=phv"], "did you mean 'pvh'"),
])
def test_what_is_wrong_is_said_with_status_2(image: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", *(image if word == "IMAGE" else word for word in arguments), "--technique", "native"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_truncated_image_and_another_machines(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(image).read_bytes()
    for name, content, said in (("short.elf", data[:100], "truncated"), ("arm.elf", data[:18] + b"\x28\0" + data[20:], "EM_ARM"),
                                ("text.bin", b"hello", "no bzImage")):
        (tmp_path / name).write_bytes(content)
        assert vm(["run", str(tmp_path / name), "--technique", "native"]) == 2
        assert said in capsys.readouterr().err


def test_a_technique_that_cannot_carry_an_image_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk.img").write_bytes(b"\xf4".ljust(510, b"\0") + b"\x55\xaa")
    assert vm(["run", str(tmp_path / "disk.img"), "--technique", "paravirtualization"]) == 0
    assert "unsupported" in capsys.readouterr().err
    # What was expected did not come.
    assert vm(["run", str(tmp_path / "disk.img"), "--technique", "paravirtualization", "--expect", "x"]) == 1


def test_a_script_is_read_as_it_is_written() -> None:
    steps = dialogue.parse(r'''expect "$ " send 'ls\n' expect "it's \x1b[m"''')
    assert steps == [("expect", "$ "), ("send", "ls\n"), ("expect", "it's \x1b[m")]
    assert dialogue.parse(dialogue.script_of(steps)) == steps
    for wrong in ("expect", "wait x", "expect 'x", 'send ""'):
        with pytest.raises(ConfigError, match="script"):
            dialogue.parse(wrong)


def test_an_image_is_told_from_a_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not live.is_image("cli_sti")
    assert not live.is_image(None)
    assert all(live.is_image(text) for text in ("./kernel", "$X/kernel", "a.elf", "disk.img"))
    (tmp_path / "vmlinuz").touch()
    assert live.is_image("vmlinuz")


#: The live line, which comes between the guest's characters.
TITLE = re.compile(rb"\x1b]2;[^\x07]*\x07")
pseudo_terminals = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


def at_terminal(image: str, act: Callable[[bytes, int, subprocess.Popen[bytes]], object], *options: str) -> tuple[int, bytes, bool]:
    """Runs the image at a pseudo-terminal: its status, what was seen there, and whether the terminal is as it was before.

    :param act: called with what was seen of the guest so far, the other end of the terminal, and the process, until that has ended.
    """
    controller, terminal = pty.openpty()
    try:
        before = termios.tcgetattr(terminal)
        command = [sys.executable, "-m", "vmlab", "run", image, "--technique", "native", "--profile", "haswell-2013", *options]
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
        seen, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if select.select([controller], [], [], 0.2)[0]:
                seen += os.read(controller, 4096)
            act(TITLE.sub(b"", seen), controller, process)
        try:
            status = process.wait(20)
        finally:
            process.kill()
        while select.select([controller], [], [], 0.2)[0]:
            seen += os.read(controller, 4096)
        return status, seen, termios.tcgetattr(terminal) == before
    finally:
        os.close(controller)
        os.close(terminal)


class Once:
    """Writes ``text`` when ``cue`` was seen, once."""

    def __init__(self, cue: bytes, text: bytes) -> None:
        self.cue, self.text, self.done = cue, text, False

    def __call__(self, seen: bytes, controller: int, process: subprocess.Popen[bytes]) -> None:
        if self.cue in seen and not self.done:
            self.done = True
            os.write(controller, self.text)


@pseudo_terminals
def test_at_a_terminal_the_console_is_yours(image: str) -> None:
    """Keys go to the guest one by one, Ctrl-] ends the run, and the terminal is as it was before."""
    typed, escape = Once(b"> ", b"typed"), Once(b"> typed", bytes((live.ESCAPE,)))
    status, seen, as_before = at_terminal(image, lambda *at: (typed(*at), escape(*at)))
    assert (status, as_before) == (0, True)
    assert b"Ctrl-] ends the run" in seen
    assert b"guest instructions:" in seen
    assert b"instructions, 0 exits" in seen     # the live line, in the terminal's title


@pseudo_terminals
@pytest.mark.parametrize(("key", "status", "said"), [(b"!", 0, b"guest instructions:"), (b"?", 1, b"ended with exit code 3")])
def test_the_terminal_is_given_back_when_the_guest_ends(image: str, key: bytes, status: int, said: bytes) -> None:
    found, seen, as_before = at_terminal(image, Once(b"> ", key))
    assert (found, as_before) == (status, True)
    assert said in seen


@pseudo_terminals
def test_control_c_is_the_guests_and_a_signal_ends_the_run(image: str) -> None:
    """Ctrl-C goes through to the guest, which echoes it; SIGINT from elsewhere ends the run with status 130, and the terminal is given back."""
    typed, signalled = Once(b"> ", b"a\x03b"), list[int]()

    def act(seen: bytes, controller: int, process: subprocess.Popen[bytes]) -> None:
        typed(seen, controller, process)
        if b"a\x03b" in seen and not signalled:
            signalled.append(1)
            process.send_signal(signal.SIGINT)

    status, seen, as_before = at_terminal(image, act)
    assert (status, as_before) == (130, True)
    assert b"vmlab: interrupted" in seen
    assert b"Traceback" not in seen


@pseudo_terminals
def test_an_error_gives_the_terminal_back(image: str) -> None:
    """The budget's end is an error of the run: it is said behind the guest's last line, on a terminal that shows it."""
    status, seen, as_before = at_terminal(image, lambda *at: None, "--budget", "3000000")
    assert (status, as_before) == (1, True)
    assert b"budget of 3000000 guest instructions was spent" in seen


def test_without_a_terminal_one_is_pointed_to_the_dialogue(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm(["run", image, "--technique", "native", "--budget", "20000"]) == 1
    assert "no terminal to type at; talk to the guest by --expect TEXT and --send TEXT" in capsys.readouterr().err


def test_a_system_without_such_terminals_says_so(image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "termios", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert vm(["run", image, "--technique", "native"]) == 2
    assert "talk to the guest by --expect TEXT and --send TEXT" in capsys.readouterr().err
