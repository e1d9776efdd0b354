"""Every prompt of a world: GenEval's six categories over its shapes and colours.

A prompt is English words plus the objects that a right picture shows: nothing missing, nothing extra. An
object whose colour the prompt leaves open has colour None. `all_prompts` lists all of them in a fixed order;
`benchmark` draws the fixed, balanced list that models are scored on.
"""

from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from orbitdit.errors import PromptError
from orbitdit.shapes.worlds import SHAPES, WORLDS, World

NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> direction (x right, y down) from the second object to the first."""

CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")
MAX_WORDS = 8


class Prompt(NamedTuple):
    """A prompt and what it asks for: `objects` are (shape, colour or None); `relation` holds between the two."""

    text: str
    category: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None


@cache
def all_prompts(world: World = SHAPES) -> tuple[Prompt, ...]:
    """All prompts of `world`, category by category."""
    shapes, colours = world.shapes, world.colours
    pairs = list(permutations(shapes, 2))
    prompts = [Prompt(f"a {s}", "single", ((s, None),)) for s in shapes]
    prompts += [Prompt(f"a {s} and a {t}", "two", ((s, None), (t, None))) for s, t in pairs]
    prompts += [
        Prompt(f"{word} {plural}", "counting", ((s, None),) * n)
        for (n, word), (s, plural) in product(NUMBERS.items(), shapes.items())
    ]
    prompts += [Prompt(f"a {c} {s}", "colours", ((s, c),)) for c, s in product(colours, shapes)]
    prompts += [
        Prompt(f"a {s} {r} a {t}", "position", ((s, None), (t, None)), r) for r, (s, t) in product(RELATIONS, pairs)
    ]
    prompts += [
        Prompt(f"a {c} {s} and a {d} {t}", "attribution", ((s, c), (t, d)))
        for (c, d), (s, t) in product(permutations(colours, 2), pairs)
    ]
    return tuple(prompts)


@cache
def vocabulary(world: World = SHAPES) -> tuple[str, ...]:
    """All words of `world`'s prompts; index 0 is padding."""
    return ("", *sorted({word for prompt in all_prompts(world) for word in prompt.text.split()}))


def tokenize(text: str, world: World = SHAPES) -> list[int]:
    """Words of `text` as MAX_WORDS indices into `vocabulary(world)`, padded with 0; the empty text is all padding.

    Raises PromptError naming the first unknown word, or the text when it is too long.
    """
    words, known = text.lower().split(), vocabulary(world)
    unknown = next((w for w in words if w not in known), None)
    if unknown is not None:
        raise PromptError(f"prompt {text!r}: unknown word {unknown!r}; known are: {' '.join(known[1:])}")
    if len(words) > MAX_WORDS:
        raise PromptError(f"prompt {text!r} has {len(words)} words; at most {MAX_WORDS} are allowed")
    return [known.index(w) for w in words] + [0] * (MAX_WORDS - len(words))


def find_prompt(text: str, world: World | None = None) -> Prompt | None:
    """The prompt with this text in `world`, or in any world; None when there is none (no picture can be judged)."""
    text = " ".join(text.lower().split())
    worlds = WORLDS.values() if world is None else (world,)
    return next((p for w in worlds for p in all_prompts(w) if p.text == text), None)


def benchmark(per_category: int = 200, seed: int = 0, world: World = SHAPES) -> list[Prompt]:
    """`per_category` prompts of each category of `world`, categories interleaved, the same for ever for one seed.

    Within a category every prompt appears about equally often. Order: sorted by raw Philox words.
    """
    columns = []
    for k, category in enumerate(CATEGORIES):
        pool = [p for p in all_prompts(world) if p.category == category]
        words = np.random.Philox(key=[seed, k]).random_raw(-(-per_category // len(pool)) * len(pool))
        rounds = words.reshape(-1, len(pool)).argsort(axis=1, kind="stable")
        columns.append([pool[i] for i in rounds.ravel()[:per_category]])
    return [prompt for row in zip(*columns, strict=True) for prompt in row]
