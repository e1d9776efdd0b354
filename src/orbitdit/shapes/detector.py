"""An exact judge: reads the objects back from the pixels and compares them with the prompt.

Each pixel goes to the nearest palette colour if it is close enough, else to the background; each connected
component of one colour is one object; its shape is the template with the largest overlap, or None when no
template fits (a malformed object still counts as something extra). Specks below MIN_PIXELS are ignored.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from orbitdit.shapes.prompts import COLOURS, RELATIONS, SHAPES, Prompt

COLOUR_DISTANCE = 0.30
MIN_PIXELS = 12
MIN_OVERLAP = 0.65
MAX_ASPECT = 1.35

_PALETTE = np.array(list(COLOURS.values()))


class Detection(NamedTuple):
    """One object: `shape` (None if malformed), `colour`, centre `x`, `y` in pixels, `pixels` covered."""

    shape: str | None
    colour: str
    x: float
    y: float
    pixels: int


def detect(picture: np.ndarray) -> list[Detection]:
    """Objects in one picture of shape (H, W, 3), uint8 or floating point in [0, 1], in a fixed order."""
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"picture has shape {picture.shape}; expected (height, width, 3)")
    rgb = picture / 255.0 if picture.dtype == np.uint8 else picture.astype(np.float64)
    distance = np.linalg.norm(rgb[:, :, None] - _PALETTE, axis=-1)
    label = np.where(distance.min(-1) <= COLOUR_DISTANCE, distance.argmin(-1), -1)
    found = []
    for k, colour in enumerate(COLOURS):
        components, _ = ndimage.label(label == k)
        for i, box in enumerate(ndimage.find_objects(components), start=1):
            mask = components[box] == i
            if mask.sum() >= MIN_PIXELS:
                y, x = ((side.start + side.stop) / 2 for side in box)
                found.append(Detection(_shape(mask), colour, x, y, int(mask.sum())))
    return found


def _shape(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    v, u = ((np.arange(n) + 0.5) * 2 / n - 1 for n in (height, width))
    v, u = v[:, None], u[None, :]
    templates = {
        "circle": u**2 + v**2 <= 1,
        "square": np.ones_like(mask),
        "triangle": 2 * np.abs(u) <= v + 1,
        "cross": (np.abs(u) <= 0.45) | (np.abs(v) <= 0.45),
    }
    overlap = {name: (mask & t).sum() / (mask | t).sum() for name, t in templates.items()}
    best = max(SHAPES, key=overlap.__getitem__)
    return best if overlap[best] >= MIN_OVERLAP else None


def keeps(prompt: Prompt, found: list[Detection]) -> bool:
    """Whether the objects found are those the prompt asks for: nothing missing, nothing extra.

    A relation holds when the first object lies within 60 degrees of the named direction from the second.
    """
    if Counter(d.shape for d in found) != Counter(s for s, _ in prompt.objects):
        return False
    by_shape = {d.shape: d for d in found}
    if any(c is not None and by_shape[s].colour != c for s, c in prompt.objects):
        return False
    if prompt.relation is None:
        return True
    first, second = (by_shape[s] for s, _ in prompt.objects)
    offset = np.array([first.x - second.x, first.y - second.y])
    return bool(offset @ RELATIONS[prompt.relation] >= 0.5 * np.linalg.norm(offset))
