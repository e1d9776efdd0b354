"""Fixtures of several test files, and what makes tests the same on every machine."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch comes: one thread each, for the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from orbitdit.ops import device_grids

for setting in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
    os.environ.pop(setting, None)  # they change the width and the colours of what the command line prints


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests that are not marked `gpu`, with their fixtures, run as on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(params=["e4m3", "int8"])
def grid(request):
    """Each number grid that the CUDA device multiplies."""
    if request.param not in device_grids(torch.device("cuda", 0)):
        pytest.skip(f"{torch.cuda.get_device_name()} does not multiply {request.param}")
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a tiny pipeline of each world, named as the world; not to be written to."""
    from tiny import tiny_pipeline  # most tests do without diffusers' pipelines

    base = tmp_path_factory.mktemp("pipelines")
    for world in ("shapes", "glyphs"):
        tiny_pipeline(world).save_pretrained(base / world)
    return base
