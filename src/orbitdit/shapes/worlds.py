"""The worlds as data: what their pictures may show, and how large and on which ground.

Everything else (prompts, scenes, detector) is the same code for all of them. The embedded model draws SHAPES;
GLYPHS is the world of two more models, used to check that what holds for the first is not an accident of it: other
shapes with thinner strokes, other colours, and a bright striped ground where SHAPES has a dark smooth one. The
worlds share no shape and no colour, so that a prompt belongs to one world alone.
"""

from dataclasses import dataclass

Rgb = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class World:
    """One world.

    `shapes` maps a name to its plural (how shapes look: `scenes.DISTANCES` and `detector.TEMPLATES`), `colours` a
    name to RGB in [0, 1]. `smallest` is the least radius of an object in pixels, `largest[n]` the greatest among n
    objects. The ground's two ends have grey levels within `ground`; it runs linearly from one to the other, or in
    `stripes` waves across the picture.
    """

    name: str
    shapes: dict[str, str]
    colours: dict[str, Rgb]
    smallest: float
    largest: tuple[float, ...]
    ground: tuple[float, float]
    stripes: int = 0


SHAPES = World(
    name="shapes",
    shapes={"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"},
    colours={
        "red": (0.90, 0.13, 0.13),
        "yellow": (0.96, 0.86, 0.12),
        "green": (0.12, 0.72, 0.20),
        "cyan": (0.10, 0.80, 0.88),
        "blue": (0.14, 0.24, 0.92),
        "purple": (0.80, 0.18, 0.82),
        "white": (0.98, 0.98, 0.98),
    },
    smallest=6.5,
    largest=(14.0, 14.0, 12.0, 10.5, 9.5),
    ground=(0.10, 0.38),
)
GLYPHS = World(
    name="glyphs",
    shapes={"ring": "rings", "diamond": "diamonds", "bowtie": "bowties", "frame": "frames"},
    colours={
        "black": (0.04, 0.04, 0.05),
        "navy": (0.08, 0.16, 0.64),
        "teal": (0.00, 0.52, 0.52),
        "lime": (0.40, 0.80, 0.05),
        "pink": (0.95, 0.25, 0.62),
        "gold": (0.93, 0.58, 0.05),
        "maroon": (0.50, 0.05, 0.12),
    },
    smallest=6.5,
    largest=(13.5, 13.5, 12.0, 10.5, 9.5),
    ground=(0.70, 0.95),
    stripes=5,
)
WORLDS = {world.name: world for world in (SHAPES, GLYPHS)}
