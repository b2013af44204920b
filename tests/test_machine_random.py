"""RDRAND: numbers that look random and are the same in every run, on every path and under every technique."""

from __future__ import annotations

import pytest
from longlab import long_kernel
from machinelab import DEBUG_EXIT, PATHS, Bench, kernel, long_bench
from paginglab import SCHEMES, boot

from vmlab.machine.instructions import _mixed
from vmlab.machine.pc import Stop, StopReason
from vmlab.machine.state import RAX, RBX, RCX
from vmlab.strategies.native import Native

END = "xor eax, eax;" + DEBUG_EXIT


def test_the_sequence_is_splitmix64() -> None:
    """The first outputs for seed 0, as published with the reference implementation."""
    assert [_mixed(n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("path", PATHS)
def test_destination_sizes_and_flags(path: str) -> None:
    bench = long_bench("stc; mov rcx, -1; xor eax, eax; .byte 0x48, 0x0f, 0xc7, 0xf0; setc dl; .byte 0x0f, 0xc7, 0xf3; .byte 0x66, 0x0f, 0xc7, 0xf1;"
                       "pushfq; pop rsi; hlt", path, {})
    bench.run()
    bench.cpu.load()
    assert bench.cpu.gpr(RAX) == _mixed(1) and bench.cpu.gpr(RBX) == _mixed(2) & 0xFFFFFFFF
    assert bench.cpu.gpr(RCX) == (1 << 64) - (1 << 16) | _mixed(3) & 0xFFFF
    assert bench.cpu.gpr(6) & 0x8D5 == 1 and bench.cpu.gpr(2) & 1      # CF alone
    counted = bench.counts()
    assert counted.kernel == counted.machine and counted.events["machine.hlt"] == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", PATHS)
def test_every_technique_draws_the_same_numbers(scheme: str, path: str) -> None:
    kind, parameters = SCHEMES[scheme]
    draws = "; ".join(f".byte 0x0f, 0xc7, {0xF0 | r:#x}; xor eax, ecx" for r in (1, 3, 6, 7))
    narrow = kernel(f"mov ebp, 3; l: {draws}; cpuid; dec ebp; jnz l; mov ebx, eax; {END}")
    wide = long_kernel(f"mov ebp, 3; l: {draws}; dec ebp; jnz l; mov rbx, rax; {END}", {})
    for image in (narrow, wide):
        native, here = boot(Native, image), boot(kind, image, parameters, path)
        assert native.run(100_000) == here.run(100_000) == Stop(StopReason.EXIT, 0)
        assert here.guest_state().gpr == native.guest_state().gpr


def test_two_machines_draw_alike() -> None:
    values = []
    for _ in range(2):
        bench = Bench(bytes.fromhex("0fc7f0 f4"))
        bench.run()
        bench.cpu.load()
        values.append(bench.cpu.gpr(RAX))
    assert values[0] == values[1] == _mixed(1) & 0xFFFFFFFF
