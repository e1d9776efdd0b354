"""Tensors that are made once and shared: rotations and codebooks, by value of what they depend on."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Built = TypeVar("Built")


def shared(build: Callable[..., Built]) -> Callable[..., Built]:
    """Cache what `build` makes, by its (hashable, positional) arguments; treat the result as constant.

    It is built outside of any mode that the caller is in, such as inference_mode, export, or another default
    device: what one caller caches must serve all the others.
    """

    @lru_cache(maxsize=256)
    @wraps(build)
    def cached(*arguments):
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch.device("cpu"):
            return build(*arguments)

    return wraps(build)(cached)
