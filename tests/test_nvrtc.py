"""What can be tested of the launcher without a GPU: where libraries are sought, and what is said if one is missing."""

import ctypes
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from orbitdit import DependencyError
from orbitdit.ops import nvrtc

FOLDER = Path(nvrtc.__file__).parent
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.cu"))


def test_a_missing_library_is_named():
    with pytest.raises(DependencyError, match=r"libnothing\.so is missing .*reinstall torch"):
        nvrtc._library("libnothing.so")


def test_libraries_of_wheels_are_found_beside_torch(tmp_path, monkeypatch):
    """As in site-packages: torch/__init__.py, and nvidia/cu13/lib/libfound.so."""
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    (folder / "libfound.so").touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    asked = []

    def load(name):
        asked.append(name)
        if not Path(name).is_absolute():
            raise OSError("not on the path")
        return name

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    assert nvrtc._library("libfound.so") == str(folder / "libfound.so")
    assert asked == ["libfound.so", str(folder / "libfound.so")]


@pytest.mark.parametrize("name", FILES)
def test_sources_are_part_of_the_package_and_plain(name):
    text = nvrtc.source(name)
    assert text.isascii()
    assert "#include" not in text
    assert max(map(len, text.splitlines())) <= 120


class Driver:
    """Stands in for libcuda: remembers calls, and refuses launches from a thread without a context as it does."""

    def __init__(self):
        self.calls, self.bound, self.status = [], False, 0

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == "cuCtxSetCurrent":
                self.bound = True
            if name == "cuLaunchKernel":
                if not self.bound:
                    return 201
                packed = arguments[-1]._obj
                size = ctypes.c_size_t.from_address(packed.size).value
                at = ctypes.c_void_p.from_buffer(packed, type(packed).buffer.offset)
                self.packed = ctypes.string_at(at, size)
                return self.status
            return 0

        return call


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(nvrtc, "_driver", lambda: found)
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: b"")
    monkeypatch.setattr(nvrtc, "_arch", lambda _: "sm_90")
    monkeypatch.setattr(nvrtc, "_primary_context", lambda _: ctypes.c_void_p(1))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    return found


def test_launching_packs_the_arguments_and_binds_the_context_where_none_is(driver):
    kernel = nvrtc.Kernel("decode/decode.cu", "decode", (), "PPiif", 0)
    kernel.launch(3, 64, 0, 1 << 40, 2, -3, 4, 0.5)
    assert driver.packed == struct.pack("PPiif", 1 << 40, 2, -3, 4, 0.5)
    driver.bound, before = False, driver.calls.count("cuLaunchKernel")
    kernel.launch(1, 64, 0, 1, 2, 3, 4, 1.0)
    assert driver.calls.count("cuLaunchKernel") == before + 2
    assert driver.bound


def test_shared_memory_is_asked_for_once(driver):
    kernel = nvrtc.Kernel("decode/decode.cu", "decode", (), "P", 0)
    for shared in (1000, 60_000, 50_000, 60_000):
        kernel.launch(1, 64, shared, 0)
    assert driver.calls.count("cuFuncSetAttribute") == 1


def test_a_failed_launch_is_said(driver):
    kernel = nvrtc.Kernel("decode/decode.cu", "decode", (), "P", 0)
    driver.status = 1
    with pytest.raises(RuntimeError, match="CUDA driver error 1"):
        kernel.launch(1, 64, 0, 0)
