"""Fixtures of the tests on a CUDA device."""

import pytest
import torch

from orbitdit.kernels import device_grids


@pytest.fixture(params=["e4m3", "int8"])
def grid(request):
    """Each number grid that the CUDA device multiplies."""
    if request.param not in device_grids(torch.device("cuda", 0)):
        pytest.skip(f"{torch.cuda.get_device_name()} does not multiply {request.param}")
    return request.param
