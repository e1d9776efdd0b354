"""Fixtures of several test files."""

import pytest
import torch

from orbitdit.kernels import device_grids


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
