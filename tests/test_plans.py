"""Every transformer and ControlNet of diffusers: its plan is that of docs/plans.md; structure agrees with families."""

import functools

import diffusers
import pytest
import torch

from encoding_checks import relative
from families import FAMILIES as TINY
from orbitdit import OrbitQuantConfig, plan, quantize_
from orbitdit.families import FAMILIES
from orbitdit.policy import Layer, build_plan
from scripts import plans

PAGE = plans.PAGE.read_text()
MODELS = list(plans.models())
same_diffusers = pytest.mark.skipif(
    plans.INTRODUCTION.splitlines()[2] not in PAGE, reason="docs/plans.md is of another diffusers"
)


@functools.cache
def built(index):
    return plan(plans.build(*MODELS[index]), plans.CONFIG)


@same_diffusers
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[plans.title(*model) for model in MODELS])
def test_the_page_says_what_the_plan_decides(index):
    assert f"\n{plans.section(*MODELS[index], built(index))}" in PAGE


@same_diffusers
def test_the_page_has_nothing_else():
    titles = [plans.title(*model) for model in MODELS]
    assert [line for line in PAGE.splitlines() if line.startswith("### ")] == titles
    assert PAGE.startswith(plans.INTRODUCTION)


OF_FAMILIES = [index for index, (name, _) in enumerate(MODELS) if name in FAMILIES]


@pytest.mark.parametrize("index", OF_FAMILIES, ids=[plans.title(*MODELS[index]) for index in OF_FAMILIES])
def test_structure_decides_as_the_family_does(index):
    rows = built(index).layers
    layers = [Layer(row.name, row.in_features, row.out_features, True) for row in rows]
    structural = build_plan("a class of no family", layers, plans.CONFIG).layers
    assert [row.label for row in structural] == [row.label for row in rows]


class OfNoFamily(diffusers.ChromaTransformer2DModel):
    """Chroma by another name."""


@pytest.mark.parametrize("cls", [diffusers.ChromaTransformer2DModel, OfNoFamily])
def test_what_makes_the_modulation_of_chroma_is_not_quantized(cls):
    """It costs less than INT4 would, which costs less than W4A4 would."""
    size = {
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    }
    depth = {"num_layers": 2, "num_single_layers": 2, "approximator_layers": 5, "in_channels": 16}
    family = TINY["chroma"]._replace(
        cls=cls,
        config={**size, **depth, "approximator_num_channels": 64, "approximator_hidden_dim": 256},
        inputs=lambda: {
            "hidden_states": (4, 64, 16),
            "encoder_hidden_states": (4, 7, 32),
            "timestep": torch.full((4,), 0.5),
            "img_ids": torch.zeros(64, 3),
            "txt_ids": torch.zeros(7, 3),
        },
    )
    full = family.run(family.build())
    errors = []
    for rules in (
        (),
        (("distilled_guidance_layer.layers.*", "int4"),),
        (("distilled_guidance_layer.layers.*", "w4a4"),),
    ):
        model = family.build()
        quantize_(model, OrbitQuantConfig("w4a4", rules=rules), progress=False)
        errors.append(relative(family.run(model), full))
    assert errors[0] < 0.9 * errors[1] < 0.9 * errors[2]
