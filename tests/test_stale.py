"""Outputs are those of the codes, scales and bias that a layer has now, however they came there."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

from orbitdit import Int4Linear, ModelError, OrbitLinear, set_grid_
from orbitdit.linear import share_inputs
from orbitdit.tokens import Tokens
from specs import int4, orbit

MAKERS = {
    "w4a4": orbit,
    "w2a4": lambda li: orbit(li, 2, 4, scale="unbiased"),
    "trellis": lambda li: orbit(li, 2, 4, states=8, scale="unbiased"),
    "centred": lambda li: orbit(li, 3, 3, states=8, scale="unbiased", group_size=4),
    "w8a8": lambda li: orbit(li, 8, 8),
    "int4": int4,
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def new_block(make, seed):
    """Three layers that take the same tokens."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(make(nn.Linear(64, 32).bfloat16()) for _ in range(3))
    share_inputs([layer for layer in layers if isinstance(layer, OrbitLinear)])
    return layers


_block = functools.cache(new_block)


def block(make, seed=0):
    """As `new_block`, of layers that are quantized once for all tests."""
    return copy.deepcopy(_block(make, seed))


def fresh(layers):
    """Layers that nothing was ever done with, of the same codes, scales and biases."""
    made = []
    for layer in layers:
        twin = type(layer)(layer.spec, None if layer.bias is None else layer.bias.clone(), dtype=layer.dtype)
        twin.codes = nn.Parameter(layer.codes.clone(), requires_grad=False)
        twin.scales = nn.Parameter(layer.scales.clone(), requires_grad=False)
        if isinstance(layer, OrbitLinear):
            twin.set_grid(layer.grid, False)
        made.append(twin)
    return made


X = random(2, 5, 64, seed=9)


@torch.no_grad()
def outputs(layers):
    return [layer(X) for layer in layers]


@torch.no_grad()
def shared_outputs(layers):
    tokens = Tokens(X)
    return [layer(tokens) for layer in layers]


def in_place(layers, other):
    with torch.no_grad():
        for layer, its in zip(layers, other, strict=True):
            layer.codes.copy_(its.codes)
            layer.scales.copy_(its.scales)
            layer.bias.copy_(its.bias)


def one_row(layers, other):
    """Of one layer alone, a scale and a few codes."""
    with torch.no_grad():
        layers[1].scales[3].mul_(2)
        layers[1].codes[5, :4] ^= 255


def out_argument(layers, other):
    with torch.no_grad():
        torch.add(layers[2].scales, layers[2].scales, out=layers[2].scales)


def new_parameters(layers, other):
    for layer, its in zip(layers, other, strict=True):
        layer.codes = nn.Parameter(its.codes.clone(), requires_grad=False)
        layer.scales = nn.Parameter(its.scales.clone(), requires_grad=False)


def swapped(layers, other):
    for layer, its in zip(layers, other, strict=True):
        layer.codes, its.codes = its.codes, layer.codes


def one_by_one(layers, other):
    for layer, its in zip(layers, other, strict=True):
        layer.load_state_dict(its.state_dict())


def to_meta_and_back(layers, other):
    layers.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())


def loaded_file(layers, other):
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    layers.load_state_dict(torch.load(io.BytesIO(file.getvalue())))


def bias_alone(layers, other):
    with torch.no_grad():
        layers[0].bias.add_(1)
    layers[1].bias = nn.Parameter(torch.ones(32).bfloat16(), requires_grad=False)
    layers[2].bias = None


CHANGES = {
    "load_state_dict": lambda layers, other: layers.load_state_dict(other.state_dict()),
    "load_state_dict, assigned": lambda layers, other: layers.load_state_dict(
        copy.deepcopy(other.state_dict()), assign=True
    ),
    "load_state_dict, layer by layer": one_by_one,
    "load_state_dict of a file": loaded_file,
    "in place": in_place,
    "one row in place": one_row,
    "out": out_argument,
    "other parameters": new_parameters,
    "swapped parameters": swapped,
    "bias": bias_alone,
    "cast and load": lambda layers, other: layers.float().bfloat16().load_state_dict(other.state_dict()),
    "to meta and back": to_meta_and_back,
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
CACHES = {"plain": {}, "cached": {"cache_decoded": True}, "resident": {"resident": True}}
every_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@every_layer
@every_change
@every_cache
def test_changed_layers_compute_what_fresh_ones_do(make, change, cache):
    for grid in ("int8", "exact"):
        layers, other = block(make), block(make, seed=1)
        set_grid_(layers, grid, **cache)
        before = outputs(layers), shared_outputs(layers)
        change(layers, other)
        expected = outputs(fresh(layers))
        assert_same(outputs(layers), expected)
        assert_same(shared_outputs(layers), expected)
        assert not all(map(torch.equal, before[0], expected))


@every_layer
@every_cache
def test_copies_compute_what_they_hold(make, cache):
    layers = block(make)
    set_grid_(layers, "int8", **cache)
    before = outputs(layers)
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert_same(outputs(twin), before)
        in_place(twin, block(make, seed=1))
        assert_same(outputs(twin), outputs(fresh(twin)))
        assert_same(shared_outputs(twin), outputs(fresh(twin)))
        assert_same(outputs(layers), before)
        assert_same(shared_outputs(layers), before)


@pytest.mark.parametrize("make", [MAKERS[name] for name in ("w4a4", "trellis", "centred")])
@every_change
@every_cache
@torch.no_grad()
def test_siblings_that_change_between_their_calls_are_seen(make, change, cache):
    """The first has computed the outputs of all with the codes that they had then."""
    layers, other = block(make), block(make, seed=1)
    set_grid_(layers, "int8", **cache)
    tokens, first = Tokens(X), outputs(layers)[0]
    assert torch.equal(layers[0](tokens), first)
    change(layers, other)
    expected = outputs(fresh(layers))
    assert_same([layers[1](tokens), layers[2](tokens), layers[0](tokens)], [*expected[1:], expected[0]])


@torch.no_grad()
def test_siblings_that_do_not_change_are_computed_once(monkeypatch):
    layers, calls = block(orbit), []
    set_grid_(layers, "int8")
    original = torch.ops.orbitdit.linear
    monkeypatch.setattr("orbitdit.linear.run_linear", lambda *args: calls.append(args) or original(*args))
    shared_outputs(layers)
    assert len(calls) == 1


COMPILED_CHANGES = ("load_state_dict", "load_state_dict, assigned", "in place", "other parameters", "bias")


@pytest.mark.parametrize("make", [MAKERS[name] for name in ("w4a4", "trellis", "centred", "w8a8", "int4")])
@pytest.mark.parametrize("cache", [CACHES["plain"], CACHES["cached"]], ids=["plain", "cached"])
@torch.no_grad()
def test_compiled_blocks_compute_with_what_they_hold_now(make, cache):
    class Whole(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            tokens = Tokens(x)
            return [layer(tokens) for layer in self.layers]

    torch._dynamo.reset()
    whole = Whole(block(make))
    set_grid_(whole, "int8", **cache)
    assert_same(whole(X), outputs(fresh(whole.layers)))
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    for seed, name in enumerate(COMPILED_CHANGES):
        assert_same(compiled(X), outputs(fresh(whole.layers)))
        CHANGES[name](whole.layers, block(make, seed=seed + 1))
        assert_same(compiled(X), outputs(fresh(whole.layers)))
        assert_same(whole(X), outputs(fresh(whole.layers)))


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_a_pending_step_whose_input_is_written_to_says_so(fused, monkeypatch):
    monkeypatch.setattr("orbitdit.linear.fuses", lambda x: fused)
    layers, rows = block(orbit), random(2, 1, 64)
    set_grid_(layers, "int8")
    uses = [
        lambda tokens: layers[0](tokens),
        lambda tokens: tokens * rows,
        lambda tokens: tokens + 1,
        lambda tokens: tokens.to(torch.float32),
        lambda tokens: torch.cat([rows.expand_as(X), tokens], -1),
        lambda tokens: tokens.tensor(),
    ]
    for use in uses:
        for prologue in ("gelu", "layer_norm"):
            x = X.clone()
            tokens = Tokens(x, lambda x=x: x * 2, prologue)
            use(tokens)
            tokens = Tokens(x, lambda x=x: x * 2, prologue)
            x.mul_(2)
            with pytest.raises(ModelError, match="written to before") as caught:
                use(tokens)
            assert "\n" not in str(caught.value)
    x = X.clone()
    tokens = Tokens(x)
    layers[0](tokens)
    x.mul_(2)
    assert torch.equal(layers[1](tokens), layers[1](x))


# What torch does not count.


@pytest.mark.parametrize("make", [MAKERS[name] for name in ("w4a4", "trellis")])
@pytest.mark.parametrize("uncounted", ["data", "inference mode", "made in inference mode"])
def test_set_grid_makes_what_torch_does_not_count_right(make, uncounted):
    """As its docstring says; without a cache nothing can be stale."""
    assert "`.data`" in " ".join(set_grid_.__doc__.split())
    assert "inference mode" in " ".join(set_grid_.__doc__.split())
    for cached in (True, False):
        with torch.inference_mode(uncounted == "made in inference mode"):
            layers, other = new_block(make, 0), new_block(make, 1)
        set_grid_(layers, "int8", cache_decoded=cached)
        outputs(layers)
        with torch.inference_mode(uncounted != "data"):
            for layer, its in zip(layers, other, strict=True):
                for name in ("codes", "scales", "bias"):
                    target = getattr(layer, name)
                    (target.data if uncounted == "data" else target).copy_(getattr(its, name))
        if cached:
            set_grid_(layers, "int8", cache_decoded=True)
        assert_same(outputs(layers), outputs(fresh(layers)))


# The meta device.


@every_layer
@every_cache
def test_layers_on_the_meta_device_say_so_or_give_meta_outputs(make, cache):
    layers = block(make)
    set_grid_(layers, "exact", **cache)
    outputs(layers)
    for on_meta in (copy.deepcopy(layers).to("meta"), layers.to("meta")):
        for x in (X, X.float(), X[0, 0], X[:0]):
            for given in (x, Tokens(x)):
                with pytest.raises(ModelError, match="meta device") as caught:
                    on_meta[0](given)
                assert "\n" not in str(caught.value)
        for x in (X, X.float(), X[0, 0], X[:0]):
            for given in (x.to("meta"), Tokens(x.to("meta"))):
                y = on_meta[0](given)
                assert (y.device.type, y.shape, y.dtype) == ("meta", (*x.shape[:-1], 32), x.dtype)
        assert on_meta[0].weight.device.type == on_meta[0].weight.norm().device.type == "meta"


@torch.no_grad()
def test_a_sibling_on_the_meta_device_says_so():
    layers = block(orbit)
    set_grid_(layers, "int8")
    expected, _ = outputs(layers), layers[1].to("meta")
    tokens = Tokens(X)
    assert torch.equal(layers[0](tokens), expected[0])
    with pytest.raises(ModelError, match="meta device"):
        layers[1](tokens)
    assert torch.equal(layers[2](tokens), expected[2])


def test_a_shell_of_each_layer_says_so():
    for layer in (orbit(nn.Linear(64, 32)), int4(nn.Linear(64, 32))):
        shell = type(layer)(layer.spec, device="meta")
        assert isinstance(shell, (OrbitLinear, Int4Linear))
        with pytest.raises(ModelError, match="meta device"):
            shell(torch.ones(1, 64))
        with pytest.raises(ModelError, match="meta device"):
            shell(torch.ones(1, 64, requires_grad=True))
