"""The embedded world: prompts, scenes, the exact judge on ground truth, and the pipeline's parts."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
import torch

from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.detector import Detection, detect, keeps
from orbitdit.shapes.pipeline import (
    CHANNELS,
    GRID,
    ShapesPipeline,
    WordEncoder,
    initial_noise,
    patchify,
    position_ids,
    unpatchify,
)
from orbitdit.shapes.prompts import CATEGORIES, MAX_WORDS, all_prompts, benchmark, find_prompt, tokenize, vocabulary
from orbitdit.shapes.scenes import DISTANCES, GAP, SIZE, prompt_table, render, sample
from orbitdit.shapes.worlds import GLYPHS, SHAPES, WORLDS

every_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def scenes_for(prompts, seed=0, world=SHAPES):
    return sample(prompt_table(prompts, world=world), torch.Generator().manual_seed(seed), world)


def pixels(pictures):
    return (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


@every_world
def test_a_world_has_the_promised_size(world):
    prompts = all_prompts(world)
    assert (len(world.shapes), len(world.colours)) == (4, 7)
    assert Counter(p.category for p in prompts) == {
        "single": 4,
        "two": 12,
        "counting": 12,
        "colours": 28,
        "position": 48,
        "attribution": 504,
    }
    assert len({p.text for p in prompts}) == len(prompts)
    assert max(len(p.objects) for p in prompts) == len(world.largest) - 1


def test_a_prompt_belongs_to_one_world():
    assert not set(all_prompts(SHAPES)) & set(all_prompts(GLYPHS))
    text = "a navy ring and a black bowtie"
    assert find_prompt(text) is find_prompt(text, GLYPHS)
    assert find_prompt(text, GLYPHS).objects == (("ring", "navy"), ("bowtie", "black"))
    assert find_prompt(text, SHAPES) is None
    assert [p.text for p in benchmark(1, world=GLYPHS)][2] == "three bowties"
    with pytest.raises(ValueError, match="unknown word 'ring'; known are: a above and below blue circle"):
        tokenize("a ring", SHAPES)


@pytest.mark.parametrize(("world", "each", "at_least"), [(SHAPES, 950, 5000), (GLYPHS, 300, 1600)], ids=WORLDS)
def test_the_detector_agrees_with_ground_truth_on_every_scene(world, each, at_least):
    prompts = benchmark(each, seed=7, world=world)
    scenes, placed = scenes_for(prompts, world=world)
    batches = zip(*(part.split(256) for part in scenes), strict=True)  # all at once would not fit the cache
    pictures = np.concatenate([pixels(render(type(scenes)(*batch), world)) for batch in batches])
    shapes, colours = list(world.shapes), list(world.colours)
    judged = 0
    for i in placed.nonzero().flatten().tolist():
        found = detect(pictures[i], world)
        number = int(scenes.number[i])
        names = zip(scenes.shape[i, :number].tolist(), scenes.colour[i, :number].tolist(), strict=True)
        truth = Counter((shapes[s], colours[c]) for s, c in names)
        assert Counter((d.shape, d.colour) for d in found) == truth, (i, prompts[i].text)
        assert keeps(prompts[i], found), (i, prompts[i].text)
        for d in found:
            offset = scenes.centre[i, :number] - torch.tensor([d.x, d.y])
            assert offset.abs().amax(-1).min() <= 1.5  # anti-aliasing takes the tip of a triangle
        judged += 1
    assert judged >= at_least


@every_world
def test_the_ground_is_told_from_every_colour(world):
    """A picture without objects, at both ends of the ground's levels, with the strongest tint."""
    scenes, _ = scenes_for(benchmark(1, world=world), world=world)
    for level in world.ground:
        for tint in (-0.05, 0.05):
            ground = torch.full_like(scenes.background, level) + tint * torch.tensor([1.0, -1.0, 1.0])
            empty = scenes._replace(number=torch.zeros_like(scenes.number), background=ground)
            assert not any(detect(p, world) for p in pixels(render(empty, world)))


def test_stripes_run_across_the_ground_and_a_ramp_does_not_return():
    scenes, _ = scenes_for(benchmark(1))
    turned = scenes._replace(number=torch.zeros_like(scenes.number), direction=torch.tensor([[1.0, 0.0]] * 6))
    ramp, waves = (render(turned, world)[:, 0, 0] for world in (SHAPES, GLYPHS))
    steps = ramp.diff(dim=-1).sign()
    assert (steps == steps[:, :1]).all()
    assert (torch.fft.rfft(waves).abs()[:, 1:].argmax(-1) + 1 == GLYPHS.stripes).all()


@pytest.mark.parametrize("shape", DISTANCES)
def test_the_distance_to_a_shape_never_grows_faster_than_the_way(shape):
    """So an edge is anti-aliased over one pixel at least; and a shape fills its box, within it."""
    axis = torch.arange(-12.0, 12.01, 0.25)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    distance = DISTANCES[shape](x, y, torch.tensor(8.0))
    for dim in (0, 1):
        assert distance.diff(dim=dim).abs().max() <= 0.25 + 1e-4
    for side in (x, y):
        assert side[distance <= 1e-4].min() == -8
        assert side[distance <= 1e-4].max() == 8


@every_world
def test_objects_keep_apart_and_inside_and_take_their_relation(world):
    prompts = [p for p in all_prompts(world) if p.category in ("counting", "position")] * 8
    scenes, placed = scenes_for(prompts, seed=3, world=world)
    table = prompt_table(prompts, world=world)
    for i in placed.nonzero().flatten().tolist():
        n = int(scenes.number[i])
        centre, radius = scenes.centre[i, :n], scenes.radius[i, :n]
        assert ((centre - radius[:, None] >= 1) & (centre + radius[:, None] <= SIZE - 1)).all()
        for a in range(n):
            for b in range(a):
                gap = (centre[a] - centre[b]).abs().max() - radius[a] - radius[b]
                assert gap >= GAP - 1e-4
        if table.relation[i].any():
            offset = centre[0] - centre[1]
            assert offset @ table.relation[i].float() >= offset.abs().max() - 2e-3


def prompt(text):
    found = find_prompt(text)
    assert found is not None
    return found


CIRCLE = Detection("circle", "red", 10.0, 10.0, 100)
SQUARE = Detection("square", "blue", 40.0, 10.0, 100)


@pytest.mark.parametrize(
    ("text", "found", "right"),
    [
        ("a circle", [CIRCLE], True),
        ("a circle", [CIRCLE, SQUARE], False),
        ("a circle", [], False),
        ("a circle", [CIRCLE._replace(shape=None)], False),
        ("a red circle", [CIRCLE], True),
        ("a blue circle", [CIRCLE], False),
        ("two circles", [CIRCLE, CIRCLE], True),
        ("two circles", [CIRCLE], False),
        ("three circles", [CIRCLE] * 4, False),
        ("a circle and a square", [SQUARE, CIRCLE], True),
        ("a red circle and a blue square", [CIRCLE, SQUARE], True),
        ("a blue circle and a red square", [CIRCLE, SQUARE], False),
        ("a circle left of a square", [CIRCLE, SQUARE], True),
        ("a circle right of a square", [CIRCLE, SQUARE], False),
        ("a square right of a circle", [CIRCLE, SQUARE], True),
        ("a circle above a square", [CIRCLE, SQUARE], False),
        ("a circle above a square", [CIRCLE, SQUARE._replace(x=12.0, y=40.0)], True),
        ("a circle below a square", [CIRCLE, SQUARE._replace(x=12.0, y=40.0)], False),
    ],
)
def test_the_judge_wants_nothing_missing_and_nothing_extra(text, found, right):
    assert keeps(prompt(text), found) is right


def test_the_judge_sees_an_extra_object_in_pixels():
    wanted = prompt("a red circle")
    scenes, placed = scenes_for([prompt("a red circle and a blue square")] * 8)
    pictures = pixels(render(scenes))[placed.numpy()]
    assert len(pictures) >= 6
    assert not any(keeps(wanted, detect(p)) for p in pictures)


def test_floating_point_pictures_are_judged_as_bytes_are():
    scenes, _ = scenes_for(benchmark(2))
    pictures = render(scenes)
    for exact, rounded in zip(pictures.permute(0, 2, 3, 1).numpy(), pixels(pictures), strict=True):
        assert [d[:2] for d in detect(exact)] == [d[:2] for d in detect(rounded)]


def test_a_picture_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        detect(np.zeros((64, 64)))


def test_the_benchmark_is_fixed_and_balanced():
    prompts = benchmark(200)
    assert len(prompts) == 1200
    assert Counter(p.category for p in prompts) == dict.fromkeys(CATEGORIES, 200)
    singles = Counter(p.text for p in prompts if p.category == "single")
    assert set(singles.values()) == {50}
    assert [p.text for p in benchmark(1)] == [
        "a circle",
        "a square and a cross",
        "three triangles",
        "a yellow square",
        "a square below a triangle",
        "a white triangle and a cyan square",
    ]
    assert benchmark(1, seed=1) != benchmark(1)
    assert benchmark(5) == benchmark(9)[:30]


def test_words_become_numbers_and_unknown_words_are_named():
    assert tokenize("") == [0] * MAX_WORDS
    assert [vocabulary()[i] for i in tokenize("A red  circle")[:3]] == ["a", "red", "circle"]
    assert all(len(tokenize(p.text)) == MAX_WORDS for p in all_prompts())
    with pytest.raises(ValueError, match="unknown word 'dog'"):
        tokenize("a red dog")
    with pytest.raises(ValueError, match="9 words"):
        tokenize("a a a a a a a a a")
    assert find_prompt("a RED circle") is not None
    assert find_prompt("circle red") is None


def test_patches_are_pixels_in_order_and_come_back():
    pictures = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    tokens = patchify(pictures)
    assert tokens.shape == (2, GRID * GRID, CHANNELS)
    corner = pictures[1, :, 4:8, 12:16].flatten() * 2 - 1
    torch.testing.assert_close(tokens[1, GRID + 3], corner)
    torch.testing.assert_close(unpatchify(tokens), pictures)


def test_position_ids_count_rows_and_columns():
    picture, text = position_ids("cpu")
    assert picture[GRID + 3].tolist() == [0, 1, 3]
    assert text.shape == (MAX_WORDS, 3)
    assert not text.any()


def test_noise_is_pinned_and_normal():
    noise = initial_noise([0, 1, 2**40])
    assert noise.shape == (3, GRID * GRID, CHANNELS)
    expected = torch.tensor([GOLDEN_NOISE])
    torch.testing.assert_close(noise[:1, 0, :4], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(initial_noise([1])[0], noise[1])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


GOLDEN_NOISE = [-2.2718842, -0.7013279, -1.2189802, 0.1621716]


def test_the_word_table_tells_swapped_colours_apart():
    torch.manual_seed(0)
    encoder = WordEncoder()
    texts = ["a red circle and a blue square", "a blue circle and a red square"]
    with torch.no_grad():
        rows, pooled = encoder(torch.tensor([tokenize(t) for t in texts]))
    assert rows.shape == (2, MAX_WORDS, 256)
    assert (pooled[0] - pooled[1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def pipeline():
    pipeline = ShapesPipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_embedded_pipeline_draws_what_is_asked(pipeline):
    texts = ["a green cross", "a purple circle and a white square"]
    pictures = pipeline(texts, latents=initial_noise([5, 6]), output_type="np", num_inference_steps=8).images
    assert pictures.shape == (2, SIZE, SIZE, 3)
    assert all(keeps(prompt(t), detect(p)) for t, p in zip(texts, pictures, strict=True))


def test_output_types_and_guidance_agree(pipeline):
    noise, options = initial_noise([3]), {"num_inference_steps": 1, "guidance_scale": 1.0}
    pt = pipeline("a circle", latents=noise, output_type="pt", **options).images
    array = pipeline(["a circle"], latents=noise, output_type="np", **options, return_dict=False)[0]
    image = pipeline("a circle", latents=noise, **options).images[0]
    np.testing.assert_array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.asarray(image), np.rint(array[0] * 255).astype(np.uint8))
    drawn = pipeline("a circle", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
    again = pipeline("a circle", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
    assert torch.equal(drawn, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(1, 2, 3)}, "latents have shape"),
        ({"output_type": "latent"}, "output_type 'latent'"),
    ],
)
def test_the_pipeline_refuses_bad_arguments(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline("a circle", **arguments)


def test_the_model_card_names_the_files_that_are_there():
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"`(\w+/[\w.]+safetensors)` \| `([0-9a-f]{64})`", card))
    files = {str(p.relative_to(MODEL_DIR)): p for p in MODEL_DIR.rglob("*.safetensors")}
    assert named == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) <= 32e6
