"""Scenes that keep a prompt, drawn in batches on any device: where the training data comes from.

A scene is a handful of numbers per object (shape, colour, centre, radius) and a background that runs
linearly between two dim, nearly grey colours. `sample` fills in what a prompt leaves open; `render` draws
with one signed distance per shape, anti-aliased over one pixel. Objects keep at least GAP pixels apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.shapes.prompts import COLOURS, RELATIONS, SHAPES, Prompt

SIZE = 64
MAX_OBJECTS = 4
GAP = 3.0
TRIES = 96


class PromptTable(NamedTuple):
    """Prompts as integers, one row each: `number` (P,), `shape` and `colour` (P, 4; colour -1 is open), `relation`
    (P, 2; the direction from the second object to the first, zero for none)."""

    number: Tensor
    shape: Tensor
    colour: Tensor
    relation: Tensor


class Scenes(NamedTuple):
    """A batch of B scenes: `number` (B,) of objects; `shape`, `colour` (B, 4) int64; `centre` (B, 4, 2) as x, y in
    pixels; `radius` (B, 4); `background` (B, 2, 3) RGB at both ends; `direction` (B, 2) of its gradient."""

    number: Tensor
    shape: Tensor
    colour: Tensor
    centre: Tensor
    radius: Tensor
    background: Tensor
    direction: Tensor


def prompt_table(prompts: Sequence[Prompt], device: str | torch.device = "cpu") -> PromptTable:
    """The prompts' objects as tensors on `device`; unused object slots hold shape 0, colour -1."""
    colours = list(COLOURS)
    pad = [(SHAPES[0], None)] * MAX_OBJECTS
    rows = [(list(p.objects) + pad)[:MAX_OBJECTS] for p in prompts]
    shape = [[SHAPES.index(s) for s, _ in row] for row in rows]
    colour = [[-1 if c is None else colours.index(c) for _, c in row] for row in rows]
    relation = [RELATIONS[p.relation] if p.relation else (0, 0) for p in prompts]
    columns = ([len(p.objects) for p in prompts], shape, colour, relation)
    return PromptTable(*(torch.tensor(column, device=device) for column in columns))


def sample(table: PromptTable, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """One scene for each row of `table`, and a (B,) mask of the scenes in which every object found its place.

    Objects are placed one after another at the first of TRIES random places that keeps clear of the earlier
    ones and, for the second object, keeps the relation (within 45 degrees of its axis).
    """
    device = table.number.device
    n = len(table.number)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    open_colour = (uniform(MAX_OBJECTS) * len(COLOURS)).long()
    colour = torch.where(table.colour < 0, open_colour, table.colour)
    largest = torch.tensor([14.0, 14.0, 12.0, 10.5, 9.5], device=device)[table.number]
    radius = 6.5 + (largest[:, None] - 6.5) * uniform(MAX_OBJECTS)
    centre = torch.full((n, MAX_OBJECTS, 2), -100.0, device=device)
    placed = torch.ones(n, dtype=torch.bool, device=device)
    for i in range(MAX_OBJECTS):
        edge = radius[:, i, None, None] + 1.5
        places = edge + (SIZE - 2 * edge) * uniform(TRIES, 2)
        fits = torch.ones(n, TRIES, dtype=torch.bool, device=device)
        for j in range(i):
            distance = (places - centre[:, None, j]).abs().amax(-1)
            fits &= distance >= (radius[:, i] + radius[:, j] + GAP)[:, None]
        if i == 1:
            offset = centre[:, None, 0] - places
            along = (offset * table.relation[:, None]).sum(-1)
            fits &= (along >= offset.abs().amax(-1) - 1e-3) | (table.relation == 0).all(-1)[:, None]
        first = fits.to(torch.uint8).argmax(1)
        used = i < table.number
        placed &= fits.any(1) | ~used
        centre[:, i] = torch.where(used[:, None], places[torch.arange(n, device=device), first], centre[:, i])
    level = 0.10 + 0.28 * uniform(2, 1)
    background = level + 0.10 * (uniform(2, 3) - 0.5)
    angle = 2 * torch.pi * uniform()
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    return Scenes(table.number, table.shape, colour, centre, radius, background, direction), placed


def render(scenes: Scenes) -> Tensor:
    """Pictures (B, 3, 64, 64), fp32 RGB in [0, 1]."""
    device = scenes.number.device
    axis = torch.arange(SIZE, device=device) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    ramp = ((grid / SIZE - 0.5) @ scenes.direction.T).permute(2, 0, 1)[:, None] + 0.5
    start, end = scenes.background[:, :, :, None, None].unbind(1)
    picture = start + (end - start) * ramp.clamp(0, 1)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    for i in range(MAX_OBJECTS):
        radius = scenes.radius[:, i, None, None]
        distance = _distances(grid - scenes.centre[:, None, None, i], radius)
        chosen = scenes.shape[:, i, None, None, None].expand(-1, -1, SIZE, SIZE)
        coverage = (0.5 - distance.gather(1, chosen)).clamp(0, 1)
        coverage = coverage * (i < scenes.number)[:, None, None, None]
        picture = picture + (palette[scenes.colour[:, i], :, None, None] - picture) * coverage
    return picture


def _distances(offset: Tensor, radius: Tensor) -> Tensor:
    """Signed distances in pixels (B, len(SHAPES), 64, 64) to shapes of half-width `radius` at the origin."""
    x, y = offset.abs()[..., 0], offset[..., 1]
    circle = offset.norm(dim=-1) - radius
    square = torch.maximum(x, y.abs()) - radius
    triangle = torch.maximum((2 * x - y - radius) / 5**0.5, y - radius)
    arm = 0.4 * radius
    cross = torch.minimum(torch.maximum(x - radius, y.abs() - arm), torch.maximum(x - arm, y.abs() - radius))
    return torch.stack([circle, square, triangle, cross], 1)
