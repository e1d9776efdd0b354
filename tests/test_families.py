"""Families: found by themselves, plain data, and right for every class that they name."""

from fnmatch import fnmatchcase

import pytest
import torch

from encoding_checks import counted
from families import FAMILIES as TINY
from further_families import FURTHER
from orbitdit import OrbitLinear, OrbitQuantConfig, quantize_
from orbitdit.families import FAMILIES, Family
from orbitdit.model import packed_layers, set_grid_
from orbitdit.policy import Layer, build_plan

EVERY = {**TINY, **FURTHER}


def test_every_class_of_every_family_has_a_row():
    assert {row.cls.__name__ for row in EVERY.values()} == set(FAMILIES)
    assert all(isinstance(family, Family) and name in family.models for name, family in FAMILIES.items())


def test_what_no_rule_of_a_family_names_is_kept():
    names = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", "another.0.proj", "proj_out"
    found = build_plan("FluxTransformer2DModel", [Layer(name, 64, 64, True) for name in names], OrbitQuantConfig())
    assert [row.label for row in found.layers] == ["W4A4", "INT4", "kept", "kept"]


@pytest.mark.parametrize(
    "family", {family.models[0]: family for family in FAMILIES.values()}.values(), ids=lambda family: family.models[0]
)
def test_names_of_a_family_are_names_of_layers(family):
    """Every rule matches layers of some tiny model, and every name in `shared` is one, in a single tuple."""
    models = [row.build() for row in EVERY.values() if row.cls.__name__ in family.models]
    names = [name for model in models for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for glob, *_ in family.rules:
        assert any(fnmatchcase(name, glob) for name in names), glob
    parts = [part for together in family.shared for part in together]
    assert len(parts) == len(set(parts))
    for part in parts:
        assert any(name.endswith(f".{part}") for name in names), part


@pytest.mark.parametrize("name", FURTHER)
@torch.no_grad()
def test_further_classes_are_quantized_and_share(name):
    family = FURTHER[name]
    model = family.build().to(torch.bfloat16)
    for parameter in model.parameters():  # a ControlNet's last layers begin as zeros
        parameter.normal_(std=0.1) if not parameter.any() else None
    expected = family.run(model)
    assert quantize_(model, OrbitQuantConfig("w4a4"), progress=False).counts == family.counts
    set_grid_(model, "int8")
    output, number = counted(lambda: family.run(model))
    assert number == family.encodings
    assert 0 < (output - expected).norm() <= 0.3 * expected.norm()
    layers = [layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear)]
    together = {layer.siblings for layer in layers} - {None}
    for layer in layers:
        layer.siblings = None
    alone, number = counted(lambda: family.run(model))
    assert number == family.encodings + sum(len(siblings.layers()) - 1 for siblings in together)
    assert torch.equal(alone, output)
