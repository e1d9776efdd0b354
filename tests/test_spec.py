"""What a layer is, as a value and as the text that crosses the schemas of ops."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbitdit import ConfigError
from orbitdit.codebooks import CODEBOOKS
from orbitdit.config import ACTIVATION_BITS, SCALES, TRELLIS_STATES, WEIGHT_BITS
from orbitdit.config import CODEBOOKS as NAMES
from orbitdit.grids import EXACT, GRIDS
from orbitdit.spec import Encoding, LayerSpec, Projection, TokenCode, WeightCode
from specs import int4_spec, key_of, spec

KEYS = {
    "3072x12288 trellis2.12.unbiased a4g16 s0": LayerSpec(
        3072, 12288, WeightCode("trellis", 2, "unbiased", log2_states=12), TokenCode(4, group_size=16), seed=0
    ),
    "64x11 scalar4.norm a4 s18446744073709551615": spec(64, 11, seed=2**64 - 1),
    "1x1 scalar8.unbiased-rows a16 s7": spec(1, 1, 8, 16, 7, scale="unbiased-rows"),
    "256x1536 int4 a16": int4_spec(256, 1536),
}
SIZES = st.integers(1, 10**9 - 1)
codes = st.builds(WeightCode, st.just("scalar"), st.sampled_from(WEIGHT_BITS), st.sampled_from(SCALES))
trellises = st.builds(
    WeightCode, st.just("trellis"), st.integers(2, 4), st.sampled_from(SCALES), st.sampled_from(TRELLIS_STATES)
)
tokens = st.builds(TokenCode, st.sampled_from(ACTIVATION_BITS[:-1]), st.none() | st.integers(1, 10**6 - 1))
layers = st.builds(LayerSpec, SIZES, SIZES, codes | trellises, st.none() | tokens, st.integers(0, 2**64 - 1))
layers |= st.builds(int4_spec, SIZES, SIZES)


@pytest.mark.parametrize("key", KEYS)
def test_keys_read_like_this(key):
    assert KEYS[key].key == key
    assert LayerSpec.parse(key) == KEYS[key]


@given(layers)
def test_every_layer_comes_back_from_its_key(layer):
    assert LayerSpec.parse(layer.key) == layer
    assert hash(LayerSpec.parse(layer.key)) == hash(layer)


@given(layers, layers)
def test_different_layers_have_different_keys(layer, other):
    assert (layer.key == other.key) == (layer == other)


@given(st.lists(layers, min_size=1, max_size=4), st.sampled_from([EXACT, *GRIDS]), st.sampled_from(["", "layer_norm"]))
def test_every_projection_comes_back_from_its_key(members, grid, prologue):
    assert Projection.parse(key_of(*members, grid=grid, prologue=prologue)) == Projection(
        tuple(members), grid, prologue
    )


def test_specs_are_values():
    layer = spec(64, 16)
    for value in (layer, layer.weight, layer.tokens, Encoding(64, 4, "int8")):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, 1)
    assert len({layer, spec(64, 16), spec(64, 32), spec(64, 16, seed=1)}) == 3


@pytest.mark.parametrize(
    ("layer", "label"), [(spec(64, 16), "W4A4"), (spec(64, 16, 2, 16), "W2A16"), (int4_spec(64, 16), "INT4")]
)
def test_labels(layer, label):
    assert layer.label == label


@pytest.mark.parametrize(
    "key",
    [
        "",
        "64x16",
        "64x16 scalar4.norm",
        "64x16 scalar4.norm a4 s0 ",
        " 64x16 scalar4.norm a4 s0",
        "64x16 scalar4.norm a4 s-1",
        "0x16 scalar4.norm a4 s0",
        "064x16 scalar4.norm a4 s0",
        "64 x 16 scalar4.norm a4 s0",
        "64x16 scalar.norm a4 s0",
        "64x16 scalar4 a4 s0",
        "64x16 scalar4.norm a4g s0",
        "64x16 scalar4.norm a4 s0\n",
    ],
)
def test_other_text_describes_no_layer(key):
    for parse in (LayerSpec.parse, lambda text: Projection.parse(f"int8||{text}")):
        with pytest.raises(ConfigError, match="describes no layer: it should read like") as caught:
            parse(key)
        assert repr(key) in str(caught.value)


@pytest.mark.parametrize("key", ["", "64x16 scalar4.norm a4 s0", "int8|64x16 scalar4.norm a4 s0", "a|b|c|d"])
def test_other_text_describes_no_projection(key):
    with pytest.raises(ConfigError, match="describes no projection") as caught:
        Projection.parse(key)
    assert repr(key) in str(caught.value)


def test_what_layers_share_their_encoding_by():
    layer = spec(64, 16, 4, 4, 3, scale="unbiased", group_size=16)
    alike = [spec(64, 48, 2, 4, 3, states=12, scale="unbiased", group_size=16)]
    unlike = [
        spec(96, 16, 4, 4, 3, scale="unbiased", group_size=16),
        spec(64, 16, 4, 3, 3, scale="unbiased", group_size=16),
        spec(64, 16, 4, 4, 4, scale="unbiased", group_size=16),
        spec(64, 16, 4, 4, 3, scale="norm", group_size=16),
        spec(64, 16, 4, 4, 3, scale="unbiased"),
    ]
    assert all(other.encoding == layer.encoding for other in alike)
    assert not any(other.encoding == layer.encoding for other in unlike)


def test_projections():
    found = Projection.parse(key_of(spec(64, 16, seed=3), spec(64, 48, seed=3), grid="int8", prologue="gelu"))
    assert (found.first.out_features, found.out_features, found.prologue) == (16, 64, "gelu")
    assert found.tokens == Encoding(64, 4, "int8", seed=3)
    assert found.decodes_together
    assert not Projection((spec(64, 16), spec(64, 16, 2)), "int8").decodes_together


def test_the_configuration_names_the_codebooks_that_there_are():
    """They are named twice: the configuration is read without torch."""
    assert sorted(NAMES) == sorted(CODEBOOKS)
