"""A quantized model as one file, without importing diffusers before it is needed."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def save_file(model: "nn.Module", path: str | os.PathLike[str]) -> None:
    """Write a quantized diffusers model to the safetensors file `path`, which replaces one that is there.

    The file says all of itself (docs/format.md), and appears when it is complete. Raises ModelError for other models,
    CheckpointError where the file cannot be written, and ImportError without diffusers.
    """
    from orbitdit.integrations import single_file

    single_file.save_file(model, path)


def load_file(path: str | os.PathLike[str], dtype: "torch.dtype | None" = None, device: Any = "cpu") -> "nn.Module":
    """The quantized model in a file that `save_file` wrote, checked, in `dtype` or as it is stored, on `device`.

    Raises CheckpointError for a file that is damaged, incomplete, or no such file.
    """
    from orbitdit.integrations import single_file

    return single_file.load_file(path, dtype, device)
