"""The thin edge to Unicorn's C interface: raw calls and raw hooks, no binding wrapper in between.

The binding's ``reg_read``, ``hook_add`` and ``emu_start`` cost several microseconds a call; the raw
functions a tenth of that. Everything that the lab knows of Unicorn's C prototypes is in this file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from vmlab.errors import UnsupportedHost

_VOID, _U64, _U32, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int

#: Callback prototypes (unicorn.h: uc_cb_hookcode_t, uc_cb_hookintr_t, uc_cb_hookinsn_invalid_t,
#: uc_cb_insn_in_t, uc_cb_insn_out_t, uc_cb_insn_syscall_t, uc_cb_eventmem_t, uc_cb_mmio_read_t,
#: uc_cb_mmio_write_t, uc_hook_edge_gen_t).
CODE_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, _U64, _U32, _VOID)
INTR_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, _U32, _VOID)
INVALID_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, _VOID, _VOID)
IN_CALLBACK = ctypes.CFUNCTYPE(_U32, _VOID, _U32, _INT, _VOID)
OUT_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, _U32, _INT, _U32, _VOID)
SYSCALL_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, _VOID)
MEMORY_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, _VOID, _INT, _U64, _INT, ctypes.c_int64, _VOID)
DEVICE_READ_CALLBACK = ctypes.CFUNCTYPE(_U64, _VOID, _U64, _U32, _VOID)
DEVICE_WRITE_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, _U64, _U32, _U64, _VOID)
EDGE_CALLBACK = ctypes.CFUNCTYPE(None, _VOID, ctypes.POINTER(_U64), _VOID, _VOID)

_TLB_FLUSH = (uc_const.UC_CTL_IO_WRITE << 30) | uc_const.UC_CTL_TLB_FLUSH
_REMOVE_CACHE = (uc_const.UC_CTL_IO_WRITE << 30) | (2 << 26) | uc_const.UC_CTL_TB_REMOVE_CACHE


def library() -> ctypes.CDLL:
    """Unicorn's shared library, as the binding loaded it."""
    found: ctypes.CDLL = uclib
    return found


def _nobody() -> None:
    """Nobody counts flushes."""


class Engine:
    """One Unicorn engine, always opened in 64-bit mode.

    Only a 64-bit engine reaches R8–R15 and runs real, protected and long mode one after another.
    The model is AMD's EPYC: the one with both SVM and nested paging.
    """

    def __init__(self) -> None:
        if not unicorn.__version__.startswith("2.1."):
            raise UnsupportedHost(f"unicorn {unicorn.__version__} is not known to this lab; install unicorn>=2.1.4,<2.2")
        self.uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
        # No `until` address: a normal one that is unmapped clobbers CR2 and the error code at the end of a run.
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.handle = ctypes.c_void_p(self.uc._uch.value)
        self._kept: list[Any] = []
        #: Told of every flush that is asked for, by whomever (see accesses.py).
        self.on_flush: Callable[[], None] = _nobody
        self._value = _U64()
        self._value_at = ctypes.byref(self._value)

    def start(self, address: int) -> int:
        """Run from ``address`` until something stops the CPU; returns Unicorn's error number (0: none)."""
        return int(uclib.uc_emu_start(self.handle, _U64(address), _U64(0), _U64(0), ctypes.c_size_t(0)))

    def stop(self) -> None:
        """Ask the CPU to stop; precise only from block and exception hooks."""
        uclib.uc_emu_stop(self.handle)

    def read_register(self, register: int) -> int:
        """A register of at most 64 bits."""
        self._value.value = 0
        uclib.uc_reg_read(self.handle, register, self._value_at)
        return self._value.value

    def write_register(self, register: int, value: int) -> None:
        """Write a register of at most 64 bits; writing RIP inside a hook leaves the current block."""
        self._value.value = value
        uclib.uc_reg_write(self.handle, register, self._value_at)

    def flush_tlb(self) -> None:
        """Forget every cached translation of a virtual address."""
        uclib.uc_ctl(self.handle, _TLB_FLUSH)
        self.on_flush()

    def remove_blocks(self, start: int, end: int) -> None:
        """Forget translated code in the virtual addresses ``start <= address < end``."""
        uclib.uc_ctl(self.handle, _REMOVE_CACHE, _U64(start), _U64(end))

    def hook(self, kind: int, prototype: Any, function: Callable[..., Any] | int,
             begin: int = 1, end: int = 0, *, instruction: int | None = None, data: int | None = None) -> int:
        """Register a callback (a Python function or the address of native code); returns a handle for :meth:`unhook`."""
        callback = ctypes.c_void_p(function) if isinstance(function, int) else prototype(function)
        self._kept.append(callback)
        handle = ctypes.c_size_t()
        extra = () if instruction is None else (_INT(instruction),)
        error = uclib.uc_hook_add(self.handle, ctypes.byref(handle), _INT(kind), ctypes.cast(callback, _VOID),
                                  ctypes.c_void_p(data), _U64(begin), _U64(end), *extra)
        if error:
            raise UnsupportedHost(f"Unicorn refused a hook of kind {kind}: error {error}")
        return int(handle.value)

    def map_device(self, first: int, size: int, read: Callable[[int, int, int, int], int],
                   write: Callable[[int, int, int, int, int], None]) -> None:
        """Have ``read(engine, offset, size, 0)`` and ``write(engine, offset, size, value, 0)`` answer at physical addresses."""
        callbacks = DEVICE_READ_CALLBACK(read), DEVICE_WRITE_CALLBACK(write)
        self._kept.append(callbacks)
        error = uclib.uc_mmio_map(self.handle, _U64(first), ctypes.c_size_t(size), callbacks[0], _VOID(None), callbacks[1], _VOID(None))
        if error:
            raise UnsupportedHost(f"Unicorn refused a device at {first:#x}: error {error}")

    def unhook(self, handle: int) -> None:
        """Take a callback off again."""
        uclib.uc_hook_del(self.handle, ctypes.c_size_t(handle))

    @staticmethod
    def error_text(error: int) -> str:
        """Unicorn's words for its error number."""
        return str(unicorn.UcError(error))
