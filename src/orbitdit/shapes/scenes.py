"""Scenes that keep a prompt, drawn in batches on any device: where the training data comes from.

A scene is a handful of numbers per object (shape, colour, centre, radius) and a background that runs
between two nearly grey colours. `sample` fills in what a prompt leaves open; `render` draws
with one signed distance per shape, anti-aliased over one pixel. Objects keep at least GAP pixels apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.shapes.prompts import RELATIONS, Prompt
from orbitdit.shapes.worlds import SHAPES, World

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


def prompt_table(prompts: Sequence[Prompt], device: str | torch.device = "cpu", world: World = SHAPES) -> PromptTable:
    """The objects of prompts of `world` as tensors on `device`; unused object slots hold shape 0, colour -1."""
    shapes, colours = list(world.shapes), list(world.colours)
    pad = [(shapes[0], None)] * MAX_OBJECTS
    rows = [(list(p.objects) + pad)[:MAX_OBJECTS] for p in prompts]
    shape = [[shapes.index(s) for s, _ in row] for row in rows]
    colour = [[-1 if c is None else colours.index(c) for _, c in row] for row in rows]
    relation = [RELATIONS[p.relation] if p.relation else (0, 0) for p in prompts]
    columns = ([len(p.objects) for p in prompts], shape, colour, relation)
    return PromptTable(*(torch.tensor(column, device=device) for column in columns))


def sample(table: PromptTable, generator: torch.Generator, world: World = SHAPES) -> tuple[Scenes, Tensor]:
    """One scene of `world` for each row of `table`, and a (B,) mask of those in which every object found its place.

    Objects are placed one after another at the first of TRIES random places that keeps clear of the earlier
    ones and, for the second object, keeps the relation (within 45 degrees of its axis).
    """
    device = table.number.device
    n = len(table.number)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=device)

    open_colour = (uniform(MAX_OBJECTS) * len(world.colours)).long()
    colour = torch.where(table.colour < 0, open_colour, table.colour)
    largest = torch.tensor(world.largest, device=device)[table.number]
    radius = world.smallest + (largest[:, None] - world.smallest) * uniform(MAX_OBJECTS)
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
    low, high = world.ground
    level = low + (high - low) * uniform(2, 1)
    background = level + 0.10 * (uniform(2, 3) - 0.5)
    angle = 2 * torch.pi * uniform()
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    return Scenes(table.number, table.shape, colour, centre, radius, background, direction), placed


def render(scenes: Scenes, world: World = SHAPES) -> Tensor:
    """Pictures (B, 3, 64, 64) of scenes of `world`, fp32 RGB in [0, 1]."""
    device = scenes.number.device
    axis = torch.arange(SIZE, device=device) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    along = ((grid / SIZE - 0.5) @ scenes.direction.T).permute(2, 0, 1)[:, None]
    ramp = 0.5 + 0.5 * (2 * torch.pi * world.stripes * along).sin() if world.stripes else along + 0.5
    start, end = scenes.background[:, :, :, None, None].unbind(1)
    picture = start + (end - start) * ramp.clamp(0, 1)
    palette = torch.tensor(list(world.colours.values()), device=device)
    for i in range(MAX_OBJECTS):
        radius = scenes.radius[:, i, None, None]
        x, y = (grid - scenes.centre[:, None, None, i]).unbind(-1)
        distance = torch.stack([DISTANCES[shape](x, y, radius) for shape in world.shapes], 1)
        chosen = scenes.shape[:, i, None, None, None].expand(-1, -1, SIZE, SIZE)
        coverage = (0.5 - distance.gather(1, chosen)).clamp(0, 1)
        coverage = coverage * (i < scenes.number)[:, None, None, None]
        picture = picture + (palette[scenes.colour[:, i], :, None, None] - picture) * coverage
    return picture


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    arm, x, y = 0.4 * radius, x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - radius, y - arm), torch.maximum(x - arm, y - radius))


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y, radius: torch.hypot(x, y) - radius,
    "square": lambda x, y, radius: torch.maximum(x.abs(), y.abs()) - radius,
    "triangle": lambda x, y, radius: torch.maximum((2 * x.abs() - y - radius) / 5**0.5, y - radius),
    "cross": _cross,
    "ring": lambda x, y, radius: (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius,
    "diamond": lambda x, y, radius: (x.abs() + y.abs() - radius) / 2**0.5,
    "bowtie": lambda x, y, radius: torch.maximum(
        (y.abs() - 0.8 * x.abs() - 0.2 * radius) / 1.64**0.5, x.abs() - radius
    ),
    "frame": lambda x, y, radius: (torch.maximum(x.abs(), y.abs()) - 0.78 * radius).abs() - 0.22 * radius,
}
"""Shape -> signed distance in pixels, negative inside, from offsets to its centre (x right, y down) and half-width."""
