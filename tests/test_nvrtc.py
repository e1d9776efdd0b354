"""What can be tested of the launcher without a GPU: where libraries are sought, and what is said if one is missing."""

from pathlib import Path

import pytest
import torch

from orbitdit import DependencyError
from orbitdit.kernels import nvrtc


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


@pytest.mark.parametrize("name", sorted(p.name for p in Path(nvrtc.__file__).parent.glob("*.cu")))
def test_sources_are_part_of_the_package_and_plain(name):
    text = nvrtc.source(name)
    assert text.isascii()
    assert "#include" not in text
    assert max(map(len, text.splitlines())) <= 120
