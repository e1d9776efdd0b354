"""Tensors that are made once and kept: rotations and codebooks, by value of what they depend on."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

Arguments = ParamSpec("Arguments")
Built = TypeVar("Built")


def constant(build: Callable[Arguments, Built]) -> Callable[Arguments, Built]:
    """Keep what `build` makes, by its (hashable) arguments; treat the result as constant.

    It is built outside of any mode that the caller is in, such as inference_mode, export, or another default
    device: what one caller causes to be made serves all the others.
    """

    @lru_cache(maxsize=256)
    @wraps(build)
    def kept(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Built:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch.device("cpu"):
            return build(*args, **kwargs)

    return cast("Callable[Arguments, Built]", wraps(build)(kept))
