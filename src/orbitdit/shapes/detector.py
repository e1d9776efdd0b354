"""An exact judge: reads the objects back from the pixels and compares them with the prompt.

Each pixel goes to the nearest palette colour if it is close enough, else to the background; each connected
component of one colour is one object; its shape is the template with the largest overlap, or None when no
template fits (a malformed object still counts as something extra). Specks below MIN_PIXELS are ignored.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from orbitdit.shapes.prompts import RELATIONS, Prompt
from orbitdit.shapes.worlds import SHAPES, World

COLOUR_DISTANCE = 0.30
MIN_PIXELS = 12
MIN_OVERLAP = 0.65
MAX_ASPECT = 1.35

TEMPLATES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 1,
    "triangle": lambda u, v: 2 * np.abs(u) <= v + 1,
    "cross": lambda u, v: np.minimum(np.abs(u), np.abs(v)) <= 0.45,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.5**2),
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "bowtie": lambda u, v: np.abs(v) <= 0.2 + 0.8 * np.abs(u),
    "frame": lambda u, v: np.maximum(np.abs(u), np.abs(v)) >= 0.56,
}
"""Shape -> where it is, from places in its bounding box: u rightwards and v downwards in [-1, 1]."""


class Detection(NamedTuple):
    """One object: `shape` (None if malformed), `colour`, centre `x`, `y` in pixels, `pixels` covered."""

    shape: str | None
    colour: str
    x: float
    y: float
    pixels: int


def detect(picture: np.ndarray, world: World = SHAPES) -> list[Detection]:
    """Objects of `world` in one picture (H, W, 3), uint8 or floating point in [0, 1], in a fixed order."""
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"picture has shape {picture.shape}; expected (height, width, 3)")
    rgb = picture / 255.0 if picture.dtype == np.uint8 else picture.astype(np.float64)
    distance = np.linalg.norm(rgb[:, :, None] - np.array(list(world.colours.values())), axis=-1)
    label = np.where(distance.min(-1) <= COLOUR_DISTANCE, distance.argmin(-1), -1)
    found = []
    for k, colour in enumerate(world.colours):
        if not (label == k).any():
            continue
        components, _ = ndimage.label(label == k)
        for i, box in enumerate(ndimage.find_objects(components), start=1):
            mask = components[box] == i
            if mask.sum() >= MIN_PIXELS:
                y, x = ((side.start + side.stop) / 2 for side in box)
                found.append(Detection(_shape(mask, world), colour, x, y, int(mask.sum())))
    return found


def _shape(mask: np.ndarray, world: World) -> str | None:
    height, width = mask.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    v, u = ((np.arange(n) + 0.5) * 2 / n - 1 for n in (height, width))
    templates = {name: TEMPLATES[name](u[None, :], v[:, None]) for name in world.shapes}
    overlap = {name: (mask & t).sum() / (mask | t).sum() for name, t in templates.items()}
    best = max(overlap, key=overlap.__getitem__)
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
