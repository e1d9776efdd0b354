"""The tensors of a stored full-precision model under diffusers' names: folders, single files, and fp8 with scales.

Single files in another layout (FLUX as its makers and ComfyUI store it) go through diffusers' own converters. They
rename tensors, split them by rows and swap halves; so they are given the numbers of rows in place of the rows, and what
they make of those says which rows of which stored tensor a tensor of diffusers' consists of. Nothing is loaded.
"""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from orbitdit.checkpoint import check_folder
from orbitdit.errors import CheckpointError
from orbitdit.tensorfile import Source, TensorFile, whole

PREFIX = "model.diffusion_model."
"""What ComfyUI puts before the names of a transformer, where one file holds text encoders and VAE too."""
MAX_ROWS = 1 << 27
"""Rows of all tensors together; FLUX has 2.9 million."""
SCALES, OTHER_SCALES = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
"""How scales of fp8 weights end, and those of the inputs that some inference programs use."""


def folder_sources(folder: Path) -> dict[str, Source]:
    """All tensors in the safetensors files of a model folder. Raises CheckpointError as `check_folder` does, and for a
    tensor that two files have."""
    found: dict[str, Source] = {}
    for path in check_folder(folder):
        sources = file_sources(path)
        twice = sorted(found.keys() & sources)
        if twice:
            raise CheckpointError(f"{folder} has the tensor {twice[0]!r} in two files: remove those of another save")
        found |= sources
    return found


def file_sources(path: Path) -> dict[str, Source]:
    """The tensors of a safetensors file; fp8 weights that have a scale are taken times it."""
    file = TensorFile(path)
    names = [name for name in file.tensors if name.startswith(PREFIX)] or list(file.tensors)
    scales = _scales(file, names)
    used = {name for name in names if not name.endswith((*SCALES, *OTHER_SCALES, ".comfy_quant", "scaled_fp8"))}
    for weight in sorted(scales.keys() - used):
        raise CheckpointError(f"{path} has a scale of {weight!r}, which is not there: download or copy it again")
    return {name.removeprefix(PREFIX): whole(file, name, scales.get(name)) for name in names if name in used}


def _scales(file: TensorFile, names: list[str]) -> dict[str, Tensor]:
    """Weight -> its scale: one number, or one a row. Raises CheckpointError for scales of blocks, and for numbers that
    are no scales."""
    found = {}
    for name in names:
        dtype, shape = file.tensors[name]
        if name.endswith(".comfy_quant"):
            _check_quant(file, name)
        if not name.endswith(SCALES):
            continue
        weight = name.rpartition(".")[0] + ".weight"
        rows = file.tensors.get(weight, (dtype, ()))[1][:1]
        if shape not in ((), (1,), rows, (*rows, 1)) or not dtype.is_floating_point:
            raise CheckpointError(f"{file.path}: {name!r} has shape {shape}, a scale has one number, or one a row")
        scale = file.read(name, 0, shape[0] if shape else 1).flatten().double()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise CheckpointError(f"{file.path}: {name!r} is NaN, Inf or not positive: download or copy it again")
        found[weight] = scale
    return found


def _check_quant(file: TensorFile, name: str) -> None:
    """Raise CheckpointError for a weight that ComfyUI has quantized to anything but fp8."""
    length = sum(file.tensors[name][1])
    try:
        text = bytes(file.read(name, 0, length).tolist()) if length < 10_000 else b""
        kind = json.loads(text).get("format")
    except (AttributeError, ValueError, RecursionError):
        kind = None
    if not isinstance(kind, str) or not kind.startswith("float8"):
        weight = name.removesuffix(".comfy_quant")
        raise CheckpointError(f"{file.path}: {weight!r} is quantized to {kind}: name the full-precision model instead")


def in_layout_of(model: nn.Module, sources: dict[str, Source], path: Path) -> dict[str, Source]:
    """`sources` of the file `path` under the names of `model`, a model of diffusers, which converts them where needed.

    Raises CheckpointError when that file is in no layout that diffusers knows for this class.
    """
    if model.state_dict().keys() <= sources.keys():
        return sources
    name = type(model).__name__
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(name, {}).get("checkpoint_mapping_fn")
    numbers: dict[str, Tensor] = {}
    starts, first = [], 0
    for key, source in sources.items():
        starts.append(first)
        first += source.rows + 1  # so that no run of numbers goes on from one tensor to the next
        if first > MAX_ROWS:
            raise CheckpointError(f"{path} has more than {MAX_ROWS:,} rows: it is damaged or hostile")
        rows = torch.arange(starts[-1], starts[-1] + source.rows)
        numbers[key] = rows if len(source.shape) < 2 else rows[:, None]
    try:
        converted = dict(convert(checkpoint=numbers, config=getattr(model, "config", {})))
    except Exception as error:  # converters meet names and shapes that they do not expect
        raise CheckpointError(f"{path} is in no layout that diffusers knows for {name}: name a model folder") from error
    stored, beginnings, found = list(sources.values()), torch.tensor(starts), {}
    for key, value in converted.items():
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.numel() != len(value):
            raise CheckpointError(f"{path}: {key!r} is made from stored tensors in a way that cannot be followed")
        found[key] = _from_rows(value.flatten(), stored, beginnings)
    lost = sorted(n for n in numbers if n in sources and n not in converted)
    if lost:
        raise CheckpointError(f"{path} has the tensor {lost[0]!r}, and {name} has no place for it")
    return found


def _from_rows(numbers: Tensor, sources: list[Source], beginnings: Tensor) -> Source:
    """The tensor that has these rows, numbered over all `sources`; `beginnings` are their first rows' numbers."""
    cuts = [0, *(torch.nonzero(numbers.diff() != 1).flatten() + 1).tolist(), len(numbers)]
    made_of, pieces = [], []
    for start, stop in pairwise(cuts):
        at = int(torch.searchsorted(beginnings, numbers[start], right=True)) - 1
        source, first = sources[at], int(numbers[start] - beginnings[at])
        (piece,) = source.pieces
        made_of.append(source)
        pieces.append(piece._replace(start=first, stop=first + stop - start))
    (_, *inner), dtype = made_of[0].shape or (1,), made_of[0].dtype
    shape = (len(numbers), *inner) if made_of[0].shape else ()
    if any(source.shape[1:] != shape[1:] or source.dtype != dtype for source in made_of):
        raise CheckpointError(f"{pieces[0].file.path} has tensors of several shapes or dtypes that belong together")
    return Source(shape, dtype, tuple(pieces))


def flux_config(sources: Mapping[str, Source]) -> dict[str, Any] | None:
    """The configuration of a FLUX transformer as its makers store it, from the shapes of its tensors; None for any
    other model."""
    if "double_blocks.0.img_attn.qkv.weight" not in sources or "vector_in.in_layer.weight" not in sources:
        return None
    try:
        width, channels = sources["img_in.weight"].shape
        head = sources["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
        out = sources["final_layer.linear.weight"].shape[0]
        text, pooled = (sources[f"{name}.weight"].shape[1] for name in ("txt_in", "vector_in.in_layer"))
    except (KeyError, IndexError, ValueError):
        return None
    config: dict[str, Any] = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(sources, "double_blocks"),
        "num_single_layers": _count(sources, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in sources,
    }
    if head != 128:  # the axes of rotary embeddings are in no tensor
        return None
    return config | {"axes_dims_rope": [16, 56, 56]}


def _count(sources: Mapping[str, Source], blocks: str) -> int:
    return len({found[1] for name in sources if (found := re.match(rf"{blocks}\.(\d+)\.", name))})
