"""The machine with counting off: a guest runs as it does with counting on, and what is counted is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machinelab import CODE, PAGES, Bench
from test_machine_new_code import FIRST, SECOND, WINDOW, paging_on, spaces

from vmlab.errors import ConfigError, GuestBudget
from vmlab.experiment.cell import Run
from vmlab.machine import fast
from vmlab.machine.pc import Machine, StopReason
from vmlab.machine.state import RAX, RBX, RCX, RDX

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(bool(fast.why_not()), reason=f"no C library here: {fast.why_not()}")


@pytest.mark.parametrize(("guest", "workload"), [("minios", "fork"), ("minios", "syscall"), ("minios64", "ctxsw"), ("nano", "cli_sti")])
def test_a_guest_does_what_it_does_with_counting_on(guest: str, workload: str) -> None:
    parameters = {"guest": guest, "workload": workload}
    on, off = Run("native", parameters), Run("native", parameters, path="uncounted")
    stops = [run.go() for run in (on, off)]
    assert stops[0] == stops[1]
    assert on.machine.console == off.machine.console
    assert on.marks.keys() == off.marks.keys()
    counted = off.strategy.snapshot()
    assert (counted.machine, counted.user, counted.kernel) == (0, 0, 0)
    assert not any(kind.startswith(("machine.", "retired.")) for kind in counted.events)
    assert 0.3 < off.machine.time / on.machine.time < 3, "the guess is about right"


def test_instructions_that_unicorn_leaves_out_are_the_machines() -> None:
    bench = Bench("mov ecx, 0x10; mov eax, 77; xor edx, edx; wrmsr; rdtsc; mov ebx, eax; mov ecx, 0x1b; rdmsr; hlt", path="uncounted")
    assert bench.run().reason is StopReason.HALTED
    assert 77 <= bench.cpu.gpr(RBX) < 200                               # the time stamp counter that was set, not the host's
    assert bench.cpu.gpr(RAX) == 0xFEE00900 and not bench.cpu.gpr(RDX)  # IA32_APIC_BASE


def test_an_instruction_in_one_space_only() -> None:
    bench = Bench(paging_on() + f"mov ecx, 4; xor ebp, ebp; l: mov ebx, {PAGES:#x}; mov cr3, ebx; call {WINDOW:#x}; mov ebx, {PAGES + 0x2000:#x};"
                  f"mov cr3, ebx; call {WINDOW:#x}; dec ecx; jnz l; hlt", path="uncounted")
    spaces(bench, (FIRST,), (SECOND,))
    bench.machine.ram.write(FIRST, b"\x0f\x31\xc3")         # rdtsc; ret
    bench.machine.ram.write(SECOND, b"\x45\x90\xc3")        # inc ebp; nop; ret
    assert bench.run().reason is StopReason.HALTED
    assert bench.cpu.gpr(5) == 4 and bench.cpu.gpr(RCX) == 0 and bench.cpu.gpr(RAX) < 1000


def test_code_that_is_written_anew() -> None:
    f = CODE + 0x1000
    bench = Bench(f"mov ebp, 3; l: call {f:#x}; mov byte ptr [{f + 1:#x}], 0x31; dec ebp; jnz l; hlt", path="uncounted")
    bench.machine.ram.write(f, b"\x0f\xa2\xc3")             # cpuid, then rdtsc
    assert bench.run().reason is StopReason.HALTED
    assert bench.cpu.gpr(RAX) < 1000


def test_a_budget_ends_it() -> None:
    with pytest.raises(GuestBudget, match="by the guess"):
        Bench("l: jmp l", path="uncounted").run(1000)


def test_no_user_comes_here_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_MACHINE", "uncounted")
    with pytest.raises(ConfigError, match="not one of portable, fast, auto"):
        Machine(1 << 20)


def test_the_benchmark_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "linux.py")], env={**os.environ, "VMLAB_GUEST_LINUX": str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "VMLAB_GUEST_LINUX" in done.stderr
