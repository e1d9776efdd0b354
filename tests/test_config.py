"""The configuration: what it accepts, how it travels through JSON, and what each refusal says."""

import copy
import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import pytest

from orbitdit import ConfigError, OrbitDiTError, OrbitQuantConfig
from orbitdit.config import ACTIVATION_BITS, FORMAT_VERSION, MIGRATIONS, WEIGHT_BITS, QuantMethod, parse_bits
from orbitdit.policy import Layer, as_stored, build_plan

WIDTHS = list(itertools.product(WEIGHT_BITS, ACTIVATION_BITS))
GOLDEN = sorted((Path(__file__).parent / "golden").iterdir())

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
    "format_version": 5,
    "weight_bits": 2,
    "activation_bits": 16,
    "modulation_bits": 16,
    "scale": "norm",
    "trellis_bits": [2, 4],
    "trellis_states": 10,
    "centred_bits": [3, "w2a4"],
    "scalar_codebook": "scalar",
    "seed": 18446744073709551615,
    "rules": [["*.ff.*", "w6a8"], ["proj_out", "int4"], ["a[!b]?", "keep"]],
}
DEFAULT_DICT = {
    "quant_method": "orbitdit",
    "format_version": 5,
    "weight_bits": 4,
    "activation_bits": 4,
    "modulation_bits": 4,
    "scale": "unbiased",
    "trellis_bits": [2, 3],
    "trellis_states": 12,
    "centred_bits": [3, "w2a4"],
    "scalar_codebook": "scalar",
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
    assert FORMAT_VERSION == 5


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


@pytest.mark.parametrize("version", [6, 99])
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
        "weight_bits, activation_bits, modulation_bits, scale, trellis_bits, trellis_states, centred_bits, "
        "scalar_codebook, seed" in message
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


def states(config):
    """By the bits of a layer's weights."""
    return [config.layer((64, 16), (bits, 4)).weight.log2_states for bits in WEIGHT_BITS]


def centred(config):
    """The widths of layers whose tokens are centred."""
    groups = {bits: config.layer((64, 16), bits).tokens for bits in WIDTHS if bits[1] != 16}
    assert {tokens.group_size for tokens in groups.values()} <= {None, 16}
    return {f"w{w}a{a}" for (w, a), tokens in groups.items() if tokens.group_size}


@pytest.mark.parametrize("bits", ["w2a4", "w3a3", "w4a4", "w6a6", "w8a8"])
def test_recipes(bits):
    best, paper = OrbitQuantConfig(bits, recipe="best"), OrbitQuantConfig(bits, recipe="paper")
    assert best == OrbitQuantConfig(bits) != paper
    assert (best.scale, paper.scale) == ("unbiased", "norm")
    assert states(best) == [12, 12, None, None, None]
    assert states(paper) == states(dataclasses.replace(paper, weight_bits=2)) == [None] * 5
    assert paper == OrbitQuantConfig.from_dict(paper.to_dict())


def test_what_is_given_overrides_the_recipe():
    paper = OrbitQuantConfig("w2a4", recipe="paper", codebook="trellis")
    assert OrbitQuantConfig("w2a4", scale="norm", centred_bits=()) == paper
    centred = OrbitQuantConfig("w2a4", "paper", scale="unbiased", centred_bits=["W2A4", 3, "w2a4"])
    assert OrbitQuantConfig("w2a4", codebook="scalar") == centred
    small = OrbitQuantConfig("w2a4", trellis_states=8)
    assert states(small) == [8, 8, None, None, None]
    four = OrbitQuantConfig("w4a4", codebook="trellis")
    assert states(four) == [12, 12, 12, None, None]
    assert four == OrbitQuantConfig("w4a4", trellis_bits=(4, 3, 2, 3)) == OrbitQuantConfig.from_dict(four.to_dict())


def test_a_layer_of_this_configuration():
    """All of what it says about one layer; 16 activation bits are no code, and have no means."""
    config = OrbitQuantConfig("w2a4", seed=5)
    layer = config.layer((3072, 12288))
    assert layer == config.layer((3072, 12288), (2, 4))
    assert layer.key == "3072x12288 trellis2.12.unbiased a4g16 s5"
    assert config.layer((64, 16), (4, 16)).key == "64x16 scalar4.unbiased a16 s5"
    assert OrbitQuantConfig("w2a3", "paper").layer((64, 16)).key == "64x16 scalar2.norm a3 s0"


@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_the_recipe_goes_by_each_layers_own_bits(recipe):
    """Whichever configuration a layer is in: a rule "w2a4" gives what a configuration "w2a4" does."""
    configs = [OrbitQuantConfig(f"w{w}a{a}", recipe) for w, a in WIDTHS]
    for config in configs:
        for bits, own in zip(WIDTHS, configs, strict=True):
            assert config.layer((96, 32), bits) == own.layer((96, 32))


def test_tokens_are_centred_where_it_pays():
    assert centred(OrbitQuantConfig("w4a4")) == {"w2a4", *(f"w{bits}a3" for bits in WEIGHT_BITS)}
    assert centred(OrbitQuantConfig("w4a4", "paper")) == set()
    assert centred(OrbitQuantConfig("w4a4", centred_bits=["w4a4"])) == {"w4a4"}
    assert centred(OrbitQuantConfig("w4a4", centred_bits=[4])) == {f"w{bits}a4" for bits in WEIGHT_BITS}
    assert OrbitQuantConfig(centred_bits=("W2A4", 4, 3, "w2a4", 3)).centred_bits == (3, 4, "w2a4")


def test_models_of_version_1_are_the_papers():
    config = OrbitQuantConfig.from_dict(VERSION_1_DICT)
    rules = [("*.ff.*", "w3a8")]
    assert config == OrbitQuantConfig("w2a3", "paper", modulation_bits=16, seed=7, rules=rules)
    assert config.to_dict()["format_version"] == 5
    assert OrbitQuantConfig.from_dict({"format_version": 1}) == OrbitQuantConfig(recipe="paper")


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


@pytest.mark.parametrize(("weight_bits", "expected"), [(2, (3, 4)), (3, (3,)), (4, (3,))])
def test_models_of_version_4_centre_by_activation_bits_alone(weight_bits, expected):
    """Which ones was said by the weight bits of the whole model, where it was not given."""
    older = {"format_version": 4, "weight_bits": weight_bits}
    assert OrbitQuantConfig.from_dict(older).centred_bits == expected
    assert OrbitQuantConfig.from_dict({**older, "centred_bits": [4]}).centred_bits == (4,)


def test_each_version_but_the_last_has_a_migration_to_the_next():
    """They leave what they are given alone, and keys that they do not know of."""
    assert sorted(MIGRATIONS) == list(range(1, FORMAT_VERSION))
    for migrate in MIGRATIONS.values():
        for given in ({}, {"weight_bits": 2, "seed": 3, "unknown": [1]}, DEFAULT_DICT):
            before = copy.deepcopy(given)
            migrated = migrate(given)
            assert given == before
            assert {key: migrated[key] for key in given if key != "scale"} == {
                key: value for key, value in given.items() if key != "scale"
            }


def test_a_record_of_layers_travels_and_changes_nothing_else():
    """A quantized model has it; the configuration means the same with it and without."""
    record = {"b.0.to_q": "64x16 scalar4.unbiased a4 s0", "b.0.mod": "64x128 int4 a16"}
    config = OrbitQuantConfig("w4a4", layers=record)
    assert config.layers == tuple(record.items())
    assert OrbitQuantConfig("w4a4", layers=list(record.items())).layers == config.layers
    assert config == OrbitQuantConfig("w4a4")
    assert (hash(config), repr(config)) == (hash(OrbitQuantConfig("w4a4")), repr(OrbitQuantConfig("w4a4")))
    assert config.to_dict() == {**DEFAULT_DICT, "layers": record}
    assert OrbitQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))).layers == config.layers
    assert dataclasses.replace(config, seed=1).layers == config.layers
    record.clear()
    assert len(config.layers) == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (5, "layers=5 is no record of layers: the configuration is damaged"),
        ("a", "layers='a' is no record of layers"),
        (["a"], "'a' is no record of a layer: the configuration is damaged"),
        ([("a", "64x16 scalar4.norm a4 s0", 1)], "is no record of a layer"),
        ({"a": None}, "('a', None) is no record of a layer"),
        ({"a": "W4A4"}, "'W4A4' describes no layer"),
    ],
)
def test_damaged_records_are_refused(layers, message):
    assert message in refusal(OrbitQuantConfig, layers=layers)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_saved_models_have_the_plans_they_always_had(folder):
    """What `save_pretrained` of each version wrote, and the plan that it had carried out, in the words of today."""
    saved = json.loads((folder / "config.json").read_text())
    expected = json.loads((folder / "plan.json").read_text())
    assert f"version-{saved['quantization_config']['format_version']}-" in folder.name
    shapes = {name: row.partition(" ")[0].split("x") for name, row in expected.items()}
    layers = [Layer(name, int(dim), int(rows), bias=True) for name, (dim, rows) in shapes.items()]
    config = OrbitQuantConfig.from_dict(saved["quantization_config"])
    stored = {name: " int4 " in row for name, row in expected.items() if not row.endswith(" kept")}
    plan = as_stored(build_plan(saved["_class_name"], layers, config), stored)
    found = {r.name: r.spec.key if r.spec else f"{r.in_features}x{r.out_features} kept" for r in plan.layers}
    assert found == expected
    again = OrbitQuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert as_stored(build_plan(saved["_class_name"], layers, again), stored) == plan


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
        ({"codebook": "uniform", "scalar_codebook": "scalar"}, "codebook='uniform' and scalar_codebook='scalar': give"),
        ({"codebook": "scalar", "scalar_codebook": "uniform"}, "codebook='scalar' and scalar_codebook='uniform': give"),
        ({"scalar_codebook": "trellis"}, "scalar_codebook='trellis' is not supported; choose one of scalar"),
        ({"trellis_states": 11}, "trellis_states=11 is not supported; choose one of 8, 10, 12"),
        ({"trellis_states": 12.0}, "trellis_states=12.0 is not supported; choose one of 8, 10, 12"),
        ({"trellis_states": 0}, "trellis_states=0 is not supported; choose one of 8, 10, 12"),
        ({"trellis_bits": (2, 6)}, "trellis_bits=6 is not supported; choose one of 2, 3, 4"),
        ({"centred_bits": (6,)}, "centred_bits=6 is not supported; choose one of 3, 4"),
        ({"centred_bits": ("w2a6",)}, "centred_bits=6 is not supported; choose one of 3, 4"),
        ({"centred_bits": ("w5a4",)}, "weight_bits=5 is not supported; choose one of 2, 3, 4, 6, 8"),
        ({"centred_bits": ("4",)}, "bits '4' are not understood"),
        ({"centred_bits": (True,)}, "centred_bits=True is not supported; choose one of 3, 4"),
        ({"centred_bits": 4}, "centred_bits=4 is not a list of bits"),
        ({"centred_bits": "w2a4"}, "centred_bits='w2a4' is not a list of bits"),
        ({"trellis_bits": 2}, "trellis_bits=2 is not a list of bits"),
        ({"trellis_bits": "23"}, "trellis_bits='23' is not a list of bits"),
    ],
)
def test_recipes_that_do_not_exist(options, message):
    assert message in refusal(OrbitQuantConfig, **options)


@pytest.mark.parametrize(("codebook", "scalar"), [("uniform", "uniform"), ("scalar", "scalar"), ("trellis", "uniform")])
def test_a_codebook_and_that_of_scalar_codes_may_agree(codebook, scalar):
    """Beside trellis codes there are others: those of layers with other bits."""
    config = OrbitQuantConfig("w2a4", codebook=codebook, scalar_codebook=scalar)
    assert config.scalar_codebook == scalar
    assert (2 in config.trellis_bits) == (codebook == "trellis")
