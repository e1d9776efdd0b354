"""CUDA kernels from source, compiled at run time by NVRTC and launched through the driver.

NVRTC and the driver come with every CUDA build of torch, on Linux and on Windows: no compiler on the user's machine,
no wheel that breaks with the next torch, and kernels may use tensor-core fragments and byte permutations, which
Triton does not offer. A kernel is compiled when it is first launched (about a second each).
"""

import ctypes
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orbitdit.errors import DependencyError

Defines = tuple[tuple[str, int], ...]
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_FREE_SHARED_BYTES = 48 << 10
"""What a kernel may take without asking."""


def source(name: str) -> str:
    """The text of kernel file `name` (a path below this folder, such as "decode/decode.cu"), without the prelude."""
    return Path(__file__).parent.joinpath(name).read_text(encoding="utf-8")


class _Arguments(ctypes.Structure):
    """How the driver is told of packed arguments: pairs of a tag and a pointer, and an end."""

    _fields_ = (
        ("buffer_tag", ctypes.c_void_p),
        ("buffer", ctypes.c_char_p),
        ("size_tag", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    )


class Kernel:
    """One kernel on one device. `signature` is a format of `struct` for its arguments: P a pointer, i and f 32 bits."""

    def __init__(self, file: str, name: str, defines: Defines, signature: str, device: int):
        with _context(device):
            module = ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), _compile(file, defines, _arch(device))))
            self._function = ctypes.c_void_p()
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        packer = struct.Struct(signature)
        self._pack, self._size = packer.pack, ctypes.c_size_t(packer.size)
        self._size_at = ctypes.addressof(self._size)
        self._launch = _driver().cuLaunchKernel
        self._device = device
        self._shared = _FREE_SHARED_BYTES

    def blocks_per_processor(self, block: int, shared: int) -> int:
        """How many blocks of `block` threads with `shared` bytes of dynamic shared memory run at a time."""
        found = ctypes.c_int()
        with _context(self._device):
            self._allow(shared)
            _check(
                _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    ctypes.byref(found), self._function, ctypes.c_int(block), ctypes.c_size_t(shared)
                )
            )
        return found.value

    def launch(self, grid: int, block: int, shared: int, *arguments: int | float) -> None:
        """Launch `grid` blocks of `block` threads on the current stream of the kernel's device; pointers are ints.

        Every microsecond here is one of the host's for each layer of a model, so the arguments go packed, in one piece.
        Raises RuntimeError with the driver's message.
        """
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        packed = _Arguments(1, self._pack(*arguments), 2, self._size_at, None)
        launch = self._function, grid, 1, 1, block, 1, 1, shared, stream, None, ctypes.byref(packed)
        if shared <= self._shared and torch.cuda.current_device() == self._device:
            status = self._launch(*launch)
            if status != _INVALID_CONTEXT:  # so in a thread that has not used the GPU yet
                return _check(status)
        with _context(self._device):
            self._allow(shared)
            return _check(self._launch(*launch))

    def _allow(self, shared: int) -> None:
        if shared > self._shared:
            _check(_driver().cuFuncSetAttribute(self._function, _SHARED_BYTES, shared))
            self._shared = shared


@cache
def kernel(file: str, name: str, defines: Defines, signature: str, device: int) -> Kernel:
    """The shared `Kernel`."""
    return Kernel(file, name, defines, signature, device)


@cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def upload(array: np.ndarray, device: int) -> int:
    """The address of a constant copy of `array` on the device, for the life of the process.

    Outside of torch's allocator: a table that is made while CUDA graphs are being prepared must not lie in a pool that
    belongs to a graph.
    """
    array = np.ascontiguousarray(array)
    pointer = ctypes.c_void_p()
    with _context(device):
        _check(_driver().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(array.nbytes)))
        _check(_driver().cuMemcpyHtoD_v2(pointer, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)))
        _check(_driver().cuCtxSynchronize())  # the copy may still be under way, and streams do not wait for it
    assert pointer.value is not None
    return pointer.value


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy of it if it is not contiguous or does not begin where vectors of 16 bytes may."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@contextmanager
def _context(device: int) -> Iterator[None]:
    """The device, with its primary context bound to this thread, as the driver's own calls need it."""
    with torch.cuda.device(device):
        _check(_driver().cuCtxSetCurrent(_primary_context(device)))
        yield


@cache
def _primary_context(device: int) -> ctypes.c_void_p:
    torch.cuda.current_stream(device)  # initializes torch's side
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device)))
    return context


@cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory that a block may have."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _compile(file: str, defines: Defines, arch: str) -> bytes:
    return compile_with_log(file, defines, arch)[0]


def compile_with_log(file: str, defines: Defines, arch: str, *more_options: str) -> tuple[bytes, str]:
    """The machine code of prelude and `file` for an architecture such as "sm_90", and the compiler's log.

    This needs NVRTC, but no GPU and no CUDA build of torch. Raises RuntimeError with the log if `file` does not
    compile, DependencyError where NVRTC is missing.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    text = (source("prelude.cu") + source(file)).encode()
    constants = (f"-D{name}={value}" for name, value in defines)
    options = [f"--gpu-architecture={arch}", "--std=c++17", *constants, *more_options]
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None):
        raise RuntimeError(f"NVRTC cannot take {file}")
    try:
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, buffer)
        log = buffer.value.decode(errors="replace")
        if failed:
            raise RuntimeError(f"NVRTC cannot compile {file} for {arch}: {log}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        if nvrtc.nvrtcGetCUBIN(program, code):
            raise RuntimeError(f"NVRTC gives no machine code of {file} for {arch}")
        return code.raw, log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compiler_version() -> str:
    """NVRTC's version, such as "13.0". Raises DependencyError where it is missing."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of the CUDA that torch was built with; beside a CPU build of torch, CUDA 13's."""
    major = (torch.version.cuda or "13").partition(".")[0]
    if sys.platform == "win32":
        return _library(f"nvrtc64_{major}0_0.dll")
    for builtins in _in_wheels("libnvrtc-builtins.so.*"):  # NVRTC looks for it by name alone, not beside itself
        ctypes.CDLL(str(builtins))
    return _library(f"libnvrtc.so.{major}")


@cache
def _driver() -> ctypes.CDLL:
    return _library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _library(name: str) -> ctypes.CDLL:
    """A shared library by name, or from the packages that torch's wheels bring along. Raises DependencyError."""
    for place in (name, *_in_wheels(name)):
        try:
            return ctypes.CDLL(str(place))
        except OSError as error:
            problem = error
    raise DependencyError(f"{name} is missing ({problem}): reinstall torch with CUDA")


def _in_wheels(pattern: str) -> list[Path]:
    """Files in the library folders of NVIDIA's packages beside torch."""
    return sorted(Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{pattern}"))


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver error {status}: {(text.value or b'unknown').decode()}")
