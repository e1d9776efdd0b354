"""Runs the CUDA kernels of `orbitdit.ops` on the CPU, thread by thread: the very source, compiled by g++.

tests/cuda/emulator.h stands in for prelude.cu and CUDA; it says what the emulation shows and what it cannot.
Tensors are passed as copies that end at a page without access, and are copied back afterwards: reading or writing past
a tensor's end, or writing before it, raises; reading before it gives poison.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

OPS = Path(__file__).parents[1] / "src" / "orbitdit" / "ops"
HEADER = Path(__file__).parent / "cuda" / "emulator.h"
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-w")
POISON = 0xCD


class EmulationError(RuntimeError):
    """The kernel does not compile, or it deadlocked or left its memory."""


class Launch(NamedTuple):
    """`grid` blocks of `block` threads, each with `shared_bytes` of dynamic shared memory; `reverse` runs the threads
    of a block in the opposite order."""

    grid: tuple[int, int, int] = (1, 1, 1)
    block: int = 32
    shared_bytes: int = 0
    reverse: bool = False


def launch(file: str | Path, name: str, how: Launch, args: list, defines: dict[str, int | str] | None = None) -> None:
    """Run kernel `name` of `file` (below the folder of ops, or a path).

    `args` are contiguous CPU tensors (passed as pointers, changed in place), None (a null pointer), ints (32 bits),
    floats (32 bits), or ctypes values. Raises EmulationError, with a message that names the block and the thread;
    skips the test where g++ is missing.
    """
    text = (OPS / file).read_text()
    entry = _compile(text, name, tuple(sorted((defines or {}).items())))
    copies = {i: _Guarded(arg) for i, arg in enumerate(args) if isinstance(arg, Tensor)}
    values = [copies[i].pointer if i in copies else _value(arg) for i, arg in enumerate(args)]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
    sizes = (ctypes.c_int * max(1, len(values)))(*(ctypes.sizeof(v) for v in values))
    grid = (ctypes.c_int * 3)(*how.grid)
    wrong = entry(grid, how.block, how.shared_bytes, how.reverse, pointers, sizes, len(values))
    if wrong:
        raise EmulationError(f"{name}: {wrong.decode()}")
    for i, copy in copies.items():
        copy.give_back(f"{name}: argument {i}")


class _Guarded:
    """A copy of a tensor, aligned to 16 bytes as it is, between poison and a page that may not be touched."""

    def __init__(self, tensor: Tensor):
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError("the emulator takes contiguous CPU tensors")
        page = mmap.PAGESIZE
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        end = page + -(-(self.size + 16) // page) * page
        memory = mmap.mmap(-1, end + page)
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8)[:end].fill_(POISON)
        address = self.buffer.data_ptr()
        _mprotect(ctypes.c_void_p(address + end), page, 0)
        self.start = end - self.size
        self.start -= (self.start - tensor.data_ptr()) % 16
        self.data = self.buffer[self.start : self.start + self.size]
        if self.size:
            self.data.copy_(_bytes(tensor))
        self.pointer = ctypes.c_void_p(address + self.start)

    def give_back(self, what: str) -> None:
        if self.size:
            _bytes(self.tensor).copy_(self.data)
        self.data.fill_(POISON)
        touched = (self.buffer != POISON).nonzero().flatten()
        if len(touched):
            offset = int(touched[0]) - self.start
            raise EmulationError(f"{what}: a write outside of its {self.size} bytes, at byte {offset}")


def _mprotect(address: ctypes.c_void_p, size: int, protection: int) -> None:
    if ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(size), protection):
        raise EmulationError("a guard page could not be set up")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _value(arg):
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return arg


@functools.cache
def _compile(text: str, name: str, defines: tuple[tuple[str, int | str], ...]):
    """The entry of the kernel's shared object, which is kept in a folder of this user's for the next run."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to run CUDA kernels on the CPU")
    source = f'#include "{HEADER}"\n#line 1 "{name}"\n{text}\nEMULATED_ENTRY({name})\n'
    flags = [*FLAGS, *(f"-D{key}={value}" for key, value in defines)]
    key = hashlib.sha256("\0".join([source, HEADER.read_text(), *flags]).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"orbitdit-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise EmulationError(f"{folder} belongs to somebody else")
    library = folder / f"{key}.so"
    if not library.exists():
        part = folder / f"{key}.{os.getpid()}.part"
        result = subprocess.run(
            ["g++", *flags, "-x", "c++", "-", "-o", str(part)], input=source, capture_output=True, text=True
        )
        if result.returncode:
            raise EmulationError(f"{name} does not compile:\n{result.stderr}")
        part.replace(library)
    entry = ctypes.CDLL(str(library)).emulated_launch
    entry.restype = ctypes.c_char_p
    return entry
