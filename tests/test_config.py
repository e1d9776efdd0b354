"""The configuration: what it accepts, how it travels through JSON, and what each refusal says."""

import copy
import dataclasses
import json
import pickle

import pytest

from orbitdit import ConfigError, OrbitDiTError, OrbitQuantConfig
from orbitdit.config import ACTIVATION_BITS, FORMAT_VERSION, WEIGHT_BITS, QuantMethod, parse_bits

FULL = OrbitQuantConfig(
    "w2a16",
    modulation_bits=16,
    scale="norm",
    trellis_bits=[4, 2],
    trellis_states=10,
    seed=2**64 - 1,
    rules=[("*.ff.*", "w6a8"), ["proj_out", "int4"], ("a[!b]?", "keep")],
)
FULL_DICT = {
    "quant_method": "orbitdit",
    "format_version": 4,
    "weight_bits": 2,
    "activation_bits": 16,
    "modulation_bits": 16,
    "scale": "norm",
    "trellis_bits": [2, 4],
    "trellis_states": 10,
    "centred_bits": [3, 4],
    "seed": 18446744073709551615,
    "rules": [["*.ff.*", "w6a8"], ["proj_out", "int4"], ["a[!b]?", "keep"]],
}
DEFAULT_DICT = {
    "quant_method": "orbitdit",
    "format_version": 4,
    "weight_bits": 4,
    "activation_bits": 4,
    "modulation_bits": 4,
    "scale": "unbiased",
    "trellis_bits": [2, 3],
    "trellis_states": 12,
    "centred_bits": [3],
    "seed": 0,
    "rules": [],
}
VERSION_1_DICT = {
    "quant_method": "orbitdit",
    "format_version": 1,
    "weight_bits": 2,
    "activation_bits": 3,
    "modulation_bits": 16,
    "seed": 7,
    "rules": [["*.ff.*", "w3a8"]],
}


def refusal(function, *args, **kwargs) -> str:
    """The message of the ConfigError that the call raises."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_defaults():
    config = OrbitQuantConfig()
    assert (config.weight_bits, config.activation_bits, config.modulation_bits) == (4, 4, 4)
    assert (config.seed, config.rules) == (0, ())
    assert config == OrbitQuantConfig("w4a4") == OrbitQuantConfig(weight_bits=4) == OrbitQuantConfig(activation_bits=4)


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
def test_shorthand_and_keywords_say_the_same(weight_bits, activation_bits):
    short = OrbitQuantConfig(f"w{weight_bits}a{activation_bits}")
    assert (short.weight_bits, short.activation_bits) == (weight_bits, activation_bits)
    assert short == OrbitQuantConfig(weight_bits=weight_bits, activation_bits=activation_bits)
    assert short == OrbitQuantConfig(f"W{weight_bits}A{activation_bits}")
    assert short.label == f"W{weight_bits}A{activation_bits}"
    assert parse_bits(short.label) == (weight_bits, activation_bits)


def test_supported_bits():
    assert WEIGHT_BITS == (2, 3, 4, 6, 8)
    assert ACTIVATION_BITS == (3, 4, 6, 8, 16)


def test_one_width_alone_leaves_the_other_at_its_default():
    assert OrbitQuantConfig(weight_bits=2).label == "W2A4"
    assert OrbitQuantConfig(activation_bits=16).label == "W4A16"


@pytest.mark.parametrize(("config", "expected"), [(OrbitQuantConfig(), DEFAULT_DICT), (FULL, FULL_DICT)])
def test_dictionaries_hold_exactly_this(config, expected):
    assert config.to_dict() == expected
    assert config.to_diff_dict() == expected
    assert json.loads(json.dumps(config.to_dict())) == expected


@pytest.mark.parametrize("config", [OrbitQuantConfig(), FULL, OrbitQuantConfig("w8a3", seed=5)])
def test_round_trips(config):
    values = config.to_dict()
    before = copy.deepcopy(values)
    assert OrbitQuantConfig.from_dict(values) == config
    assert values == before
    assert OrbitQuantConfig.from_dict(json.loads(json.dumps(values))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, seed=9) == OrbitQuantConfig.from_dict({**values, "seed": 9})


def test_missing_keys_take_their_defaults():
    assert OrbitQuantConfig.from_dict({}) == OrbitQuantConfig()
    assert OrbitQuantConfig.from_dict({"quant_method": "orbitdit", "weight_bits": 3}).label == "W3A4"
    assert OrbitQuantConfig.from_dict({"quant_method": QuantMethod.ORBITDIT}) == OrbitQuantConfig()


def test_the_method_has_the_name_that_diffusers_looks_up():
    assert OrbitQuantConfig().quant_method is QuantMethod.ORBITDIT
    assert QuantMethod.ORBITDIT.value == "orbitdit"
    assert QuantMethod.ORBITDIT == "orbitdit"
    assert FORMAT_VERSION == 4


def test_frozen():
    for field in dataclasses.fields(OrbitQuantConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(FULL, field.name, 4)
    assert FULL.to_dict() == FULL_DICT


def test_hashable():
    twin = OrbitQuantConfig.from_dict(FULL_DICT)
    assert hash(twin) == hash(FULL)
    assert {FULL: "found"}[twin] == "found"
    assert len({FULL, twin, OrbitQuantConfig(), OrbitQuantConfig(seed=1), OrbitQuantConfig("w4a4")}) == 3


def test_rules_become_tuples_and_do_not_follow_the_callers_list():
    rules = [["*.ff.*", "int4"]]
    config = OrbitQuantConfig(rules=rules)
    rules[0][1] = "keep"
    rules.append(["*", "keep"])
    assert config.rules == (("*.ff.*", "int4"),)
    config.to_dict()["rules"].append("x")
    assert config.rules == (("*.ff.*", "int4"),)


@pytest.mark.parametrize("action", ["quantize", "int4", "keep", "w6a6", "w2a16", "W8A8"])
def test_known_actions(action):
    assert OrbitQuantConfig(rules=(("*", action),)).rules == (("*", action),)


@pytest.mark.parametrize(
    "bits", ["", "w4", "a4", "4", "w4a4 ", "w4a4\n", "w-4a4", "w4.0a4", "w4a4x", "fp4", 44, b"w4a4"]
)
def test_bits_that_are_not_understood(bits):
    message = refusal(OrbitQuantConfig, bits)
    assert repr(bits) in message
    assert "'w4a4'" in message
    assert refusal(parse_bits, bits) == message


@pytest.mark.parametrize(
    ("bits", "culprit"),
    [
        ("w1a4", "weight_bits=1"),
        ("w5a4", "weight_bits=5"),
        ("w7a16", "weight_bits=7"),
        ("w16a16", "weight_bits=16"),
        ("w0a4", "weight_bits=0"),
        ("w4a2", "activation_bits=2"),
        ("w4a5", "activation_bits=5"),
        ("w4a32", "activation_bits=32"),
        ("w4a0", "activation_bits=0"),
    ],
)
def test_widths_that_do_not_exist(bits, culprit):
    name, value = culprit.split("=")
    allowed = "2, 3, 4, 6, 8" if name == "weight_bits" else "3, 4, 6, 8, 16"
    for message in (refusal(OrbitQuantConfig, bits), refusal(OrbitQuantConfig, **{name: int(value)})):
        assert message.startswith(culprit)
        assert message.endswith(allowed)


@pytest.mark.parametrize("value", [True, "4", 4.0, 4.5, [4], -4])
@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "modulation_bits"])
def test_widths_that_are_no_integers(name, value):
    """4.0 would pass through JSON and become the label "W4.0A4"."""
    assert f"{name}={value!r}" in refusal(OrbitQuantConfig, **{name: value})


@pytest.mark.parametrize("value", [0, 2, 8, 32, None])
def test_modulation_is_4_or_16_bits(value):
    message = refusal(OrbitQuantConfig, modulation_bits=value)
    assert f"modulation_bits={value!r}" in message
    assert "4, 16" in message


@pytest.mark.parametrize(
    "widths", [{"weight_bits": 4}, {"activation_bits": 4}, {"weight_bits": 2, "activation_bits": 4}]
)
def test_shorthand_and_keywords_exclude_each_other(widths):
    message = refusal(OrbitQuantConfig, "w4a4", **widths)
    assert "not both" in message
    assert "weight_bits" in message


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, 1.5, "0", None, True, float("nan")])
def test_seeds_out_of_range(seed):
    assert f"seed={seed!r}" in refusal(OrbitQuantConfig, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_seeds_in_range(seed):
    config = OrbitQuantConfig(seed=seed)
    assert OrbitQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))).seed == seed


@pytest.mark.parametrize("action", ["", "skip", "INT4", "Keep", "w5a4", "w4a2", "w4", "quantize "])
def test_unknown_actions(action):
    message = refusal(OrbitQuantConfig, rules=(("ok", "keep"), ("blocks.0.*", action)))
    assert "'blocks.0.*'" in message
    assert repr(action) in message
    assert "quantize, int4, keep" in message


@pytest.mark.parametrize(
    "rule", ["*=keep", ("*",), ("*", "keep", "x"), ("*", 4), (None, "keep"), ("*", None), [], 5, None, "ab"]
)
def test_rules_that_are_no_pairs(rule):
    message = refusal(OrbitQuantConfig, rules=(("ok", "keep"), rule))
    assert repr(rule) in message
    assert "(glob, action)" in message


@pytest.mark.parametrize("rules", [None, 5, "*=keep", ("*", "keep"), {"*": "keep"}])
def test_rules_that_are_no_sequence_of_pairs(rules):
    assert "rule" in refusal(OrbitQuantConfig, rules=rules)
    assert "rule" in refusal(OrbitQuantConfig.from_dict, {"rules": rules})


@pytest.mark.parametrize("version", [0, -1, "2", 1.5, None, True])
def test_a_format_version_that_is_none_is_damage(version):
    message = refusal(OrbitQuantConfig.from_dict, {"format_version": version})
    assert f"format_version={version!r}" in message
    assert "damaged" in message


@pytest.mark.parametrize("version", [5, 99])
def test_a_newer_format_asks_for_an_upgrade(version):
    """Before anything else: keys of a newer format are unknown to this one."""
    message = refusal(OrbitQuantConfig.from_dict, {"format_version": version, "brand_new_key": 1, "weight_bits": 1})
    assert f"format_version={version!r}" in message
    assert "upgrade orbitdit" in message


@pytest.mark.parametrize("method", ["orbitquant", "torchao", "ORBITDIT", "", None])
def test_other_methods_are_refused(method):
    message = refusal(OrbitQuantConfig.from_dict, {"quant_method": method, "format_version": 99})
    assert f"quant_method={method!r}" in message


@pytest.mark.parametrize("key", ["weightbits", "bits", "label", "weight_bits ", "group_size", "recipe", "codebook"])
def test_unknown_keys_are_named(key):
    message = refusal(OrbitQuantConfig.from_dict, {**DEFAULT_DICT, key: 4})
    assert f"unknown configuration key {key!r}" in message
    assert (
        "weight_bits, activation_bits, modulation_bits, scale, trellis_bits, trellis_states, centred_bits, seed"
        in message
    )


@pytest.mark.parametrize("key", ["weight_bits", "activation_bits", "modulation_bits", "seed"])
def test_values_from_dictionaries_are_checked_too(key):
    assert f"{key}=-5" in refusal(OrbitQuantConfig.from_dict, {**DEFAULT_DICT, key: -5})


def test_unknown_keyword_arguments_are_pythons_to_refuse():
    with pytest.raises(TypeError, match="group_size"):
        OrbitQuantConfig(group_size=64)


def test_config_errors_can_be_caught_as_value_errors_and_as_orbitdits():
    for kind in (ValueError, OrbitDiTError):
        with pytest.raises(kind, match="weight_bits=5"):
            OrbitQuantConfig("w5a4")


@pytest.mark.parametrize("bits", ["w2a4", "w3a3", "w4a4", "w6a6", "w8a8"])
def test_recipes(bits):
    best, paper = OrbitQuantConfig(bits, recipe="best"), OrbitQuantConfig(bits, recipe="paper")
    assert best == OrbitQuantConfig(bits) != paper
    assert (best.scale, paper.scale) == ("unbiased", "norm")
    assert [best.states(n) for n in WEIGHT_BITS] == [12, 12, 0, 0, 0]
    assert [paper.states(n) for n in WEIGHT_BITS] == [0] * 5
    assert paper == OrbitQuantConfig.from_dict(paper.to_dict())
    assert dataclasses.replace(paper, weight_bits=2).states(2) == 0


def test_what_is_given_overrides_the_recipe():
    paper = OrbitQuantConfig("w2a4", recipe="paper", codebook="trellis")
    assert OrbitQuantConfig("w2a4", scale="norm", centred_bits=()) == paper
    centred = OrbitQuantConfig("w2a4", "paper", scale="unbiased", centred_bits=[4, 3, 4])
    assert OrbitQuantConfig("w2a4", codebook="scalar") == centred
    small = OrbitQuantConfig("w2a4", trellis_states=8)
    assert [small.states(n) for n in WEIGHT_BITS] == [8, 8, 0, 0, 0]
    four = OrbitQuantConfig("w4a4", codebook="trellis")
    assert [four.states(n) for n in WEIGHT_BITS] == [12, 12, 12, 0, 0]
    assert four == OrbitQuantConfig("w4a4", trellis_bits=(4, 3, 2, 3)) == OrbitQuantConfig.from_dict(four.to_dict())


def test_models_of_version_1_are_the_papers():
    config = OrbitQuantConfig.from_dict(VERSION_1_DICT)
    rules = [("*.ff.*", "w3a8")]
    assert config == OrbitQuantConfig("w2a3", "paper", modulation_bits=16, seed=7, rules=rules)
    assert config.to_dict()["format_version"] == 4
    assert OrbitQuantConfig.from_dict({"format_version": 1}) == OrbitQuantConfig(recipe="paper")


def test_tokens_are_centred_where_it_pays():
    given = [(bits, OrbitQuantConfig(bits).centred_bits) for bits in ("w4a4", "w3a3", "w2a4", "w2a3", "w2a6")]
    assert given == [("w4a4", (3,)), ("w3a3", (3,)), ("w2a4", (3, 4)), ("w2a3", (3, 4)), ("w2a6", (3, 4))]
    config = OrbitQuantConfig("w2a4")
    assert [config.mean_tokens(n) for n in ACTIVATION_BITS] == [16, 16, 0, 0, 0]
    assert OrbitQuantConfig("w2a3", "paper").mean_tokens(3) == 0


@pytest.mark.parametrize("version", [2, 3])
def test_older_models_have_no_tokens_centred(version):
    older = OrbitQuantConfig("w2a3", "paper").to_dict() | {"format_version": version}
    del older["centred_bits"]
    assert OrbitQuantConfig.from_dict(older) == OrbitQuantConfig("w2a3", "paper")


def test_models_of_version_2_have_scales_that_are_unbiased_for_rows_alone():
    rows = OrbitQuantConfig("w3a4", scale="unbiased-rows")
    older = rows.to_dict() | {"format_version": 2, "scale": "unbiased"}
    assert OrbitQuantConfig.from_dict(older) == rows
    del older["scale"]
    assert OrbitQuantConfig.from_dict(older) == rows
    paper = OrbitQuantConfig("w3a4", "paper")
    assert OrbitQuantConfig.from_dict(paper.to_dict() | {"format_version": 2}) == paper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "fast"}, "recipe='fast' is not supported; choose one of best, paper"),
        ({"recipe": ""}, "recipe='' is not supported; choose one of best, paper"),
        ({"scale": "mean"}, "scale='mean' is not supported; choose one of unbiased, unbiased-rows, norm"),
        ({"codebook": "lattice"}, "codebook='lattice' is not supported; choose one of trellis, scalar"),
        ({"weight_bits": 6, "codebook": "trellis"}, "codebook='trellis' takes weights of 2, 3, 4 bits, not 6"),
        ({"weight_bits": 8, "codebook": "trellis"}, "codebook='trellis' takes weights of 2, 3, 4 bits, not 8"),
        ({"codebook": "trellis", "trellis_bits": (2,)}, "either codebook"),
        ({"trellis_states": 11}, "trellis_states=11 is not supported; choose one of 8, 10, 12"),
        ({"trellis_states": 12.0}, "trellis_states=12.0 is not supported; choose one of 8, 10, 12"),
        ({"trellis_states": 0}, "trellis_states=0 is not supported; choose one of 8, 10, 12"),
        ({"trellis_bits": (2, 6)}, "trellis_bits=6 is not supported; choose one of 2, 3, 4"),
        ({"centred_bits": (6,)}, "centred_bits=6 is not supported; choose one of 3, 4"),
        ({"centred_bits": 4}, "centred_bits=4 is not a list of bits"),
        ({"trellis_bits": 2}, "trellis_bits=2 is not a list of bits"),
        ({"trellis_bits": "23"}, "trellis_bits='23' is not a list of bits"),
    ],
)
def test_recipes_that_do_not_exist(options, message):
    assert message in refusal(OrbitQuantConfig, **options)
