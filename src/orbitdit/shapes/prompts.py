"""Every prompt of the world, as data: GenEval's six categories over four shapes and seven colours.

A prompt is English words plus the objects that a right picture shows: nothing missing, nothing extra. An
object whose colour the prompt leaves open has colour None. `PROMPTS` lists all of them in a fixed order;
`benchmark` draws the fixed, balanced list that models are scored on.
"""

from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from orbitdit.errors import PromptError

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = ("circles", "squares", "triangles", "crosses")
COLOURS = {
    "red": (0.90, 0.13, 0.13),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.12, 0.72, 0.20),
    "cyan": (0.10, 0.80, 0.88),
    "blue": (0.14, 0.24, 0.92),
    "purple": (0.80, 0.18, 0.82),
    "white": (0.98, 0.98, 0.98),
}
"""Colour name -> RGB in [0, 1]."""

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


def _all_prompts() -> tuple[Prompt, ...]:
    pairs = list(permutations(SHAPES, 2))
    prompts = [Prompt(f"a {s}", "single", ((s, None),)) for s in SHAPES]
    prompts += [Prompt(f"a {s} and a {t}", "two", ((s, None), (t, None))) for s, t in pairs]
    prompts += [
        Prompt(f"{word} {plural}", "counting", ((s, None),) * n)
        for (n, word), (s, plural) in product(NUMBERS.items(), zip(SHAPES, PLURALS, strict=True))
    ]
    prompts += [Prompt(f"a {c} {s}", "colours", ((s, c),)) for c, s in product(COLOURS, SHAPES)]
    prompts += [
        Prompt(f"a {s} {r} a {t}", "position", ((s, None), (t, None)), r) for r, (s, t) in product(RELATIONS, pairs)
    ]
    prompts += [
        Prompt(f"a {c} {s} and a {d} {t}", "attribution", ((s, c), (t, d)))
        for (c, d), (s, t) in product(permutations(COLOURS, 2), pairs)
    ]
    return tuple(prompts)


PROMPTS = _all_prompts()
VOCABULARY = ("", *sorted({word for prompt in PROMPTS for word in prompt.text.split()}))
"""All words; index 0 is padding."""


def tokenize(text: str) -> list[int]:
    """Words of `text` as MAX_WORDS indices into VOCABULARY, padded with 0; the empty text is all padding.

    Raises PromptError naming the first unknown word, or the text when it is too long.
    """
    words = text.lower().split()
    unknown = next((w for w in words if w not in VOCABULARY), None)
    if unknown is not None:
        raise PromptError(f"prompt {text!r}: unknown word {unknown!r}; known are: {' '.join(VOCABULARY[1:])}")
    if len(words) > MAX_WORDS:
        raise PromptError(f"prompt {text!r} has {len(words)} words; at most {MAX_WORDS} are allowed")
    return [VOCABULARY.index(w) for w in words] + [0] * (MAX_WORDS - len(words))


def find_prompt(text: str) -> Prompt | None:
    """The prompt with this text, or None when the world has no such prompt (its pictures cannot be judged)."""
    return next((p for p in PROMPTS if p.text == " ".join(text.lower().split())), None)


def benchmark(per_category: int = 200, seed: int = 0) -> list[Prompt]:
    """`per_category` prompts of each category, categories interleaved, the same for ever for one seed.

    Within a category every prompt appears about equally often. Order: sorted by raw Philox words.
    """
    columns = []
    for k, category in enumerate(CATEGORIES):
        pool = [p for p in PROMPTS if p.category == category]
        words = np.random.Philox(key=[seed, k]).random_raw(-(-per_category // len(pool)) * len(pool))
        rounds = words.reshape(-1, len(pool)).argsort(axis=1, kind="stable")
        columns.append([pool[i] for i in rounds.ravel()[:per_category]])
    return [prompt for row in zip(*columns, strict=True) for prompt in row]
