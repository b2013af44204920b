"""A guest of a few bytes under KVM that leaves for one reason over and over: what an exit and its return cost here.

The guest runs in real mode at address 0x1000 and repeats one instruction. Exits that KVM answers itself (CPUID, hypercall) are
timed by the guest's own RDTSC; those that end KVM_RUN (OUT, HLT) by a loop of machine code that calls KVM_RUN again. Both are
round trips with KVM's own code in them (Documentation/virt/kvm/api.rst), so they bound the hardware's part from above.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vmlab.measure.native import CannotMeasure, Clock, Page, Spread, loop, spread

# include/uapi/linux/kvm.h, x86-64.
_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
_SET_MEMORY, _CREATE_VCPU, _RUN = 0x4020AE46, 0xAE41, 0xAE80
_SET_REGS, _GET_SREGS, _SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
_API_VERSION = 12
_EXIT_IO, _EXIT_HLT = 2, 5
_EXIT_REASON = 8                    # struct kvm_run: exit_reason
_ENTRY, _MEMORY = 0x1000, 1 << 16
_EXCEPTION = 0x3000                 # where all exceptions lead
_RESULT = 0x4000                    # where the guest leaves its ticks
DEVICE = "/dev/kvm"
SECONDS = 30.0                      # a guest that has not ended by then hangs
ROUNDS, SAMPLES = 400, 21

#: Reason -> instruction, for those that KVM answers itself.
INSIDE = {"cpuid": b"\x0f\xa2", "vmcall": b"\x0f\x01\xc1", "vmmcall": b"\x0f\x01\xd9"}
#: Reason -> instruction and exit reason, for those that end KVM_RUN.
OUTSIDE = {"io": (b"\xe6\x80", _EXIT_IO), "hlt": (b"\xf4", _EXIT_HLT)}


class Guest:
    """One VM with one vCPU in real mode and 64 KiB of memory."""

    def __init__(self, code: bytes) -> None:
        try:
            import fcntl
        except ImportError:
            raise CannotMeasure("KVM is a part of Linux, and this is another system") from None
        self._ioctl = fcntl.ioctl
        self._descriptors: list[int] = []
        try:
            system = self._keep(_open())
            version = self._ioctl(system, _GET_API_VERSION, 0)
            if version != _API_VERSION:
                raise CannotMeasure(f"{DEVICE} speaks version {version} of its interface, and this speaks {_API_VERSION}")
            vm = self._keep(self._ioctl(system, _CREATE_VM, 0))
            self.memory = mmap.mmap(-1, _MEMORY)
            self.memory[_ENTRY:_ENTRY + len(code)] = code
            # Whatever exception comes leads to an OUT, so that a guest that cannot go on ends KVM_RUN.
            self.memory[0:4 * 256] = struct.pack("<HH", _EXCEPTION, 0) * 256
            self.memory[_EXCEPTION:_EXCEPTION + 4] = b"\xe6\x80\xeb\xfc"
            at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            self._ioctl(vm, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, at))
            self.vcpu = self._keep(self._ioctl(vm, _CREATE_VCPU, 0))
            self.run_area = mmap.mmap(self.vcpu, self._ioctl(system, _GET_VCPU_MMAP_SIZE, 0))
            sregs = bytearray(312)
            self._ioctl(self.vcpu, _GET_SREGS, sregs)
            sregs[0:8] = bytes(8)       # CS base 0
            sregs[12:14] = bytes(2)     # and selector 0
            self._ioctl(self.vcpu, _SET_SREGS, bytes(sregs))
            # RAX … R15, RIP, RFLAGS; RSP (index 6) below the code.
            self._ioctl(self.vcpu, _SET_REGS, struct.pack("<18Q", *([0] * 6), 0x800, *([0] * 9), _ENTRY, 2))
        except CannotMeasure:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise CannotMeasure(_refused(error)) from error

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def run(self) -> int:
        """KVM_RUN once; the exit reason."""
        try:
            self._ioctl(self.vcpu, _RUN, 0)
        except OSError as error:
            raise CannotMeasure(f"KVM_RUN: {error.strerror or error}") from error
        reason: int = struct.unpack_from("<I", self.run_area, _EXIT_REASON)[0]
        return reason

    def close(self) -> None:
        """Give everything back."""
        for descriptor in reversed(self._descriptors):
            os.close(descriptor)
        self._descriptors.clear()


def _open() -> int:
    """A descriptor of the device. :raises CannotMeasure: it cannot be had; says what would help."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CannotMeasure(
            f"there is no {DEVICE}: the module kvm_intel or kvm_amd is not loaded, virtualization is off in the firmware, or this is a virtual "
            "machine or container that was given none") from None
    except PermissionError:
        raise CannotMeasure(f"{DEVICE} may not be opened by this user (usually: be in the group 'kvm')") from None


def _refused(error: OSError) -> str:
    """Why KVM would not make the guest, in words."""
    if error.errno == errno.ENOTTY:
        return f"{DEVICE} is no KVM device"
    if error.errno == errno.EBUSY:
        return "KVM is busy: another hypervisor holds the CPU's virtualization"
    return f"KVM refuses: {error.strerror or error}"


@contextmanager
def guest(code: bytes) -> Iterator[Guest]:
    """A guest that is closed behind the block."""
    made = Guest(code)
    try:
        yield made
    finally:
        made.close()


def inside(reason: str, clock: Clock) -> Spread:
    """Core cycles of one round trip that KVM answers itself.

    :raises CannotMeasure: no usable KVM here, or the guest does not come back as expected.
    """
    # Twice the same loop, the second time with nothing in it; the difference is the instruction. 16-bit code:
    # rdtsc; mov esi,eax; mov bp,ROUNDS; again: mov eax,0; <insn>; dec bp; jnz again; rdtsc; sub eax,esi; mov [at],eax
    def timed(instruction: bytes, at: int) -> bytes:
        body = bytes.fromhex("66b800000000") + instruction + b"\x4d"
        return (bytes.fromhex("0f31 6689c6 bd") + struct.pack("<H", ROUNDS) + body + b"\x75" + struct.pack("<b", -(len(body) + 2))
                + bytes.fromhex("0f31 6629f0 66a3") + struct.pack("<H", at))

    code = timed(INSIDE[reason], _RESULT) + timed(b"", _RESULT + 4) + b"\xf4"
    code += b"\xe9" + struct.pack("<h", -(len(code) + 3))   # jmp to the beginning, for the next sample
    times: list[tuple[int, int]] = []
    with guest(code) as made:
        for _ in range(SAMPLES):
            if (ended := made.run()) != _EXIT_HLT:
                raise CannotMeasure("the guest took an exception: this KVM does not let it run the instruction" if ended == _EXIT_IO
                                    else f"the guest ended with KVM exit reason {ended} instead of HLT")
            times.append(struct.unpack_from("<II", made.memory, _RESULT))
    nothing = min(empty for _, empty in times)
    return spread([(full - nothing) * clock.ratio() / ROUNDS for full, _ in times])


def outside(reason: str, page: Page, clock: Clock) -> Spread:
    """Core cycles of one KVM_RUN: system call, entry, exit, and KVM's way back to its caller.

    :raises CannotMeasure: no usable KVM here, or the guest does not come back as expected.
    """
    instruction, expected = OUTSIDE[reason]
    with guest(instruction + b"\xeb" + struct.pack("<b", -(len(instruction) + 2))) as made:
        if (ended := made.run()) != expected:
            raise CannotMeasure(f"the guest ended with KVM exit reason {ended} instead of {expected}")
        # mov r10,rdi; mov eax,16 (ioctl); mov edi,fd; mov esi,KVM_RUN; xor edx,edx; syscall; mov rdi,r10
        body = (bytes.fromhex("4989fa b810000000 bf") + struct.pack("<I", made.vcpu) + b"\xbe" + struct.pack("<I", _RUN)
                + bytes.fromhex("31d2 0f05 4c89d7"))
        run = page.function(loop(body))
        run(ROUNDS)
        samples = [run(ROUNDS) * clock.ratio() / ROUNDS for _ in range(SAMPLES)]
        if struct.unpack_from("<I", made.run_area, _EXIT_REASON)[0] != expected:
            raise CannotMeasure("the guest stopped exiting for the reason that is measured")
    return spread(samples)


_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vmlab.measure.kvm import child; child(sys.argv[2])"


def measured(reason: str) -> Spread:
    """:func:`inside` or :func:`outside` in a process of its own, which can be ended when the guest hangs.

    :raises CannotMeasure: as there, or no answer within :data:`SECONDS`.
    """
    command = [sys.executable, "-P", "-X", "utf8", "-c", _CHILD, json.dumps(sys.path), reason]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotMeasure(f"the guest had not ended after {SECONDS:.0f} s") from error
    if done.returncode:
        raise CannotMeasure(f"the process that measured ended with status {done.returncode}")
    answer = json.loads(done.stdout)
    if "cannot" in answer:
        raise CannotMeasure(answer["cannot"])
    return Spread(*answer["spread"])


def child(reason: str) -> None:
    """What that process does: measure, and answer on stdout."""
    try:
        page = Page()
        clock = Clock(page)
        found = inside(reason, clock) if reason in INSIDE else outside(reason, page, clock)
        print(json.dumps({"spread": [found.value, found.low, found.high]}))
    except CannotMeasure as why:
        print(json.dumps({"cannot": str(why)}))
