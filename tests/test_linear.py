"""The two layers against the oracle, and everything a pipeline may feed them or do to them."""

import copy
import itertools
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from orbitdit import CheckpointError, ConfigError, ModelError, OrbitLinear, TensorError
from orbitdit.codebooks import token_gain, trellis
from orbitdit.grids import EXACT
from orbitdit.linear import share_inputs
from orbitdit.ops import device_grids
from orbitdit.ops.decode import reference as decode
from orbitdit.ops.linear import reference
from orbitdit.ops.rotate_encode.reference import encode_tokens, rotate_encode
from orbitdit.spec import Encoding, LayerSpec
from orbitdit.tokens import Tokens
from specs import int4, orbit, spec

DIMS = (256, 960, 1536, 1920, 3072)
SETTINGS = [(4, 4), (3, 3), (2, 4), (2, 3), (4, 6), (4, 16), (2, 16), (8, 8)]
NARROW = (torch.float16, torch.bfloat16)


def plain_linear(dim, rows=11, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(dim, rows, bias=bias).to(dtype)


def tokens(*shape, seed=0, outliers=True):
    """Normal tokens with a few channels 30 times as large, as in a DiT."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[..., :: max(1, shape[-1] // 5)] *= 30
    return x


def fp64(tensor):
    return tensor.detach().double().numpy()


def expected_output(linear, x, weight_bits, activation_bits, seed=0, token_codes=None):
    bias = 0.0 if linear.bias is None else fp64(linear.bias)
    return oracle.layer(fp64(linear.weight), bias, fp64(x), weight_bits, activation_bits, seed, token_codes)


def exact(layer, x):
    """The definition of `layer` for `x`."""
    return reference.exact_linear(x, layer.codes, layer.scales, layer.bias, layer.spec)


def relative(got, expected):
    return np.linalg.norm(fp64(got) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), SETTINGS)
@pytest.mark.parametrize("dim", DIMS)
def test_outputs_are_the_definitions(dim, weight_bits, activation_bits):
    """fp32 may put a value that lies on a boundary on its other side: given the layer's own codes nothing differs."""
    linear, x = plain_linear(dim, seed=dim), tokens(6, dim, seed=weight_bits)
    layer = orbit(linear, weight_bits, activation_bits, seed=1)
    own = None if activation_bits == 16 else encode_tokens(x, activation_bits, 1)[0].numpy()
    got = layer(x)
    assert got.dtype == torch.float32
    assert got.shape == (6, 11)
    assert relative(got, expected_output(linear, x, weight_bits, activation_bits, 1, own)) < 2e-6


@pytest.mark.parametrize("dim", DIMS)
def test_outputs_need_no_allowance_where_fp32_and_fp64_choose_the_same_codes(dim):
    """Ten seeds a dim; a flipped code changes an output by 1e-3, so most must agree to 1e-5 with no help."""
    agree = 0
    for seed in range(10):
        linear, x = plain_linear(dim, rows=4, seed=seed), tokens(3, dim, seed=seed)
        got = orbit(linear, 4, 4, seed=1)(x)
        agree += relative(got, expected_output(linear, x, 4, 4, 1)) < 1e-5
    assert agree >= 9


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("dim", [1, 2, 63, 137, *DIMS])
def test_token_codes_differ_from_exhaustive_search_at_boundaries_only(dim, bits):
    """Measured: about 4 codes in a million at 8 bits, each within fp32 rounding of a boundary."""
    if dim == 1:
        codes, norms = encode_tokens(torch.tensor([[2.0], [-3.0]]), bits, 1)
        signs = oracle.permutation_and_signs(1, 1)[1]
        assert codes.flatten().tolist() == ([2**bits - 1, 0] if signs[0] > 0 else [0, 2**bits - 1])
        assert norms.tolist() == [[2.0], [3.0]]
        return
    x = tokens(16, dim, seed=bits)
    codes, norms = encode_tokens(x, bits, 1)
    unit, lengths = oracle.normalized_tokens(fp64(x), 1)
    centroids = oracle.codebook(dim, bits)
    exact = oracle.nearest(unit, centroids)
    assert codes.dtype == torch.uint8
    assert norms.dtype == torch.float32
    np.testing.assert_allclose(fp64(norms), lengths, rtol=1e-6)
    flipped = codes.numpy() != exact
    assert flipped.mean() <= 1e-4
    between = (centroids[codes.numpy()[flipped]] + centroids[exact[flipped]]) / 2
    np.testing.assert_allclose(unit[flipped], between, rtol=0, atol=2e-6 / np.sqrt(dim) * 30)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (2, 3), (4, 16)])
def test_narrow_dtypes_round_each_factor_and_the_result_once(dtype, weight_bits, activation_bits):
    """Norms and codes come from fp32, so three roundings of at most eps/2 remain; together half an eps was measured."""
    linear = plain_linear(1536, rows=64, dtype=dtype)
    x = tokens(5, 1536).to(dtype)
    layer = orbit(linear, weight_bits, activation_bits)
    layer.set_grid(EXACT, False)
    got, defined = layer(x), exact(layer, x)
    own = None if activation_bits == 16 else encode_tokens(x, activation_bits, 0)[0].numpy()
    assert got.dtype == defined.dtype == dtype
    expected = expected_output(linear, x, weight_bits, activation_bits, 0, own)
    assert relative(defined, expected) < 0.75 * torch.finfo(dtype).eps
    assert relative(got, expected) < 0.01  # a CPU takes the other code of a boundary now and then


@pytest.mark.parametrize("grid", ["e4m3", "int8", None])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 3), (4, 6)])
def test_narrow_dtypes_on_a_grid(bits, dtype, grid):
    """The codes are those of the grid's own boundaries; what is left is how far its points lie from the centroids."""
    linear, x = plain_linear(1536, rows=64, dtype=dtype), tokens(40, 1536).to(dtype)
    layer = orbit(linear, *bits, seed=3)
    layer.set_grid(grid, False)
    if grid is None and device_grids(x.device)[0] == EXACT:
        pytest.skip("this CPU has no grid of its own")
    name = grid or "int8"
    encoded = rotate_encode(x, Encoding(1536, bits[1], name, seed=3))
    weight = decode.decode(layer.codes, layer.scales, layer.spec, name)
    expected = fp64(reference.matmul(encoded, weight, layer.bias, torch.float32))
    got = layer(x)
    assert got.dtype == dtype
    assert relative(got, expected) < (torch.finfo(dtype).eps / 2 if name == "e4m3" else 0.01)
    # the distance from the layer that was not quantized is that of the definition, and a little more
    plain = fp64(linear(x))
    defined = relative(torch.from_numpy(expected_output(linear, x, *bits, 3)), plain)
    assert relative(got, plain) < (1.06 if name == "e4m3" else 1.01) * defined


@pytest.mark.parametrize("grid", [EXACT, "int8", "e4m3"])
@pytest.mark.parametrize("activation_bits", [4, 16])
@pytest.mark.parametrize("magnitude", [6e-8, 3e-5, 2e4, 6e4])
def test_fp16_tokens_whose_norms_fp16_cannot_hold(magnitude, activation_bits, grid):
    """Norms of 1e-6 and 1e6; the weight brings the output back to where fp16 has all its digits."""
    linear = plain_linear(256, rows=16, bias=False)
    linear.weight.data /= magnitude * linear.weight.data.norm(dim=1, keepdim=True)
    x = (magnitude * (0.75 + 0.25 * tokens(4, 256, outliers=False).clamp(-1, 1))).half()
    layer = orbit(linear, 4, activation_bits)
    layer.set_grid(grid, False)
    # a grid's own boundaries put a few of these tokens' 1024 values into the neighbouring cell
    tolerance = 2e-3 if grid == EXACT or activation_bits == 16 else 0.06
    assert relative(layer(x), expected_output(linear, x, 4, activation_bits)) < tolerance


def test_fp64_input_gives_fp64_output():
    linear, x = plain_linear(96), tokens(4, 96)
    got = orbit(linear, 4, 4)(x.double())
    assert got.dtype == torch.float64
    assert relative(got, expected_output(linear, x, 4, 4)) < 1e-5


@pytest.mark.parametrize("activation_bits", [4, 16])
@pytest.mark.parametrize("dim", [2, 3, 63, 137, 199])
def test_awkward_widths_and_no_bias(dim, activation_bits):
    linear, x = plain_linear(dim, rows=1, bias=False), tokens(2, dim)
    got = orbit(linear, 3, activation_bits, seed=8)(x)
    assert relative(got, expected_output(linear, x, 3, activation_bits, 8)) < 1e-5


def test_one_dimension_is_exact():
    layer = orbit(linear := plain_linear(1, rows=3, dtype=torch.bfloat16), 2, 3, seed=5)
    torch.testing.assert_close(layer(torch.tensor([[4.0], [-0.5]])), linear.float()(torch.tensor([[4.0], [-0.5]])))


@pytest.mark.parametrize("activation_bits", [4, 16])
def test_leading_dims_strides_and_empty_batches(activation_bits):
    layer = orbit(plain_linear(192), 3, activation_bits)
    x = tokens(24, 192)
    flat = layer(x)
    variants = {
        "one token": (x[5], flat[5]),
        "leading dims": (x.view(2, 3, 4, 192), flat.view(2, 3, 4, 11)),
        "transposed storage": (x.T.contiguous().T, flat),
        "every third token": (x[::3], flat[::3]),
        "columns of a wider tensor": (torch.cat([x, x], dim=1)[:, 192:], flat),
        "swapped leading dims": (x.view(4, 6, 192).transpose(0, 1), flat.view(4, 6, 11).transpose(0, 1)),
        "expanded": (x[:1].expand(5, 192), flat[:1].expand(5, 11)),
    }
    for name, (given, expected) in variants.items():
        before = given.clone()
        torch.testing.assert_close(layer(given), expected, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(given, before), name
    for shape in ((0, 192), (2, 0, 192)):
        for dtype in (torch.float32, torch.bfloat16):
            empty = layer(torch.zeros(shape, dtype=dtype))
            assert empty.shape == (*shape[:-1], 11)
            assert empty.dtype == dtype


@pytest.mark.parametrize(("make", "shape"), [((4, 4), (5000, 64)), ((2, 16), (5000, 64)), ((3, 3), (70, 4096))])
def test_many_tokens_at_once(make, shape):
    """More than 2^18 activations, so that a layer that works in blocks meets the seam and a shorter last block."""
    linear, x = plain_linear(shape[1], rows=5), tokens(*shape)
    layer = orbit(linear, *make)
    got = layer(x)
    pieces = torch.cat([layer(piece) for piece in x.split([1, 60, len(x) - 61])])
    torch.testing.assert_close(got, pieces, rtol=1e-5, atol=1e-5)
    seam = 2**18 // shape[1]
    picked = [0, 1, seam - 1, seam, seam + 1, len(x) - 1]
    own = None if make[1] == 16 else encode_tokens(x[picked], make[1])[0].numpy()
    assert relative(got[picked], expected_output(linear, x[picked], *make, 0, own)) < 2e-6


@pytest.mark.parametrize("make", [orbit, int4])
def test_a_token_of_zeros_gives_the_bias(make):
    linear, x = plain_linear(96), tokens(3, 96)
    x[1] = 0
    assert torch.equal(make(linear)(x)[1], linear.bias.detach())
    bare = make(plain_linear(96, bias=False))(x)
    assert torch.equal(bare[1], torch.zeros(11))


@pytest.mark.parametrize("activation_bits", [3, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_spoilt_token_shows_and_leaves_the_others_alone(value, activation_bits):
    layer, x = orbit(plain_linear(160), 4, activation_bits), tokens(5, 160)
    clean = layer(x)
    x[2, 7] = value
    got = layer(x)
    assert not got[2].isfinite().any()
    torch.testing.assert_close(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation_bits", [4, 16])
@pytest.mark.parametrize("norm", [1e-20, 1e-12, 1e-10, 1e-9, 1e-6, 1e6, 1e30])
def test_tokens_of_any_norm(norm, activation_bits):
    """At 1e-10 the 1e-10 of the definition halves a token before it is coded; at both ends squares leave fp32."""
    linear, x = plain_linear(256, bias=False), tokens(4, 256)
    x = x / x.norm(dim=1, keepdim=True) * norm
    got = orbit(linear, 4, activation_bits)(x)
    assert relative(got, expected_output(linear, x, 4, activation_bits)) < 1e-5


@pytest.mark.parametrize("make", [orbit, int4])
@pytest.mark.parametrize("x", [torch.zeros(2, 95), torch.zeros(97), torch.zeros(2, 96).long(), torch.tensor(1.0)])
def test_unusable_inputs_are_refused(x, make):
    with pytest.raises(TensorError, match="96"):
        make(plain_linear(96))(x)


def test_unusable_layers_are_refused_by_name():
    linear = plain_linear(96)
    linear.weight.data[3, 4] = float("nan")
    with pytest.raises(TensorError, match=r"blocks\.0\.ff"):
        orbit(linear, 4, 4, name="blocks.0.ff")
    with pytest.raises(TensorError, match=r"blocks\.0\.ff"):
        int4(linear, name="blocks.0.ff")
    for weight_bits in (0, 1, 5, 16):
        with pytest.raises(ConfigError, match=str(weight_bits)):
            orbit(plain_linear(96), weight_bits, 4)


@pytest.mark.parametrize("activation_bits", [0, 5, 9])
def test_unknown_activation_bits_are_refused_when_the_layer_is_made(activation_bits):
    with pytest.raises(ConfigError, match=str(activation_bits)):
        orbit(plain_linear(96), 4, activation_bits)


MAKE = pytest.mark.parametrize("make", [lambda li: orbit(li, 3, 4, seed=6), int4], ids=["orbit", "int4"])


@MAKE
def test_state_is_codes_scales_bias_and_spec_and_comes_back_bit_exact(make):
    layer, x = make(plain_linear(200)), tokens(5, 200)
    state = layer.state_dict()

    def shell():
        return type(layer)(layer.spec, torch.zeros(11))

    assert sorted(state) == ["bias", "codes", "scales", "spec"]
    assert sorted(make(plain_linear(200, bias=False)).state_dict()) == ["codes", "scales", "spec"]
    assert bytes(state["spec"]).decode() == layer.spec.key.ljust(64)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert state["codes"].dtype == torch.uint8
    assert state["scales"].dtype == torch.bfloat16
    for assign in (False, True):
        other = shell()
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert all(torch.equal(other.state_dict()[key], state[key]) for key in state)
        assert torch.equal(other(x), layer(x))
        assert not any(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(RuntimeError, match="codes"):
        shell().load_state_dict({key: value for key, value in state.items() if key != "codes"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        shell().load_state_dict({**state, "codes": state["codes"][:, :-1]})


SPECS = ["200x11 scalar4.norm a4 s0", "200x11 scalar4.norm a4 s1", "200x11 scalar4.unbiased a4 s0"]
SPECS += ["200x11 uniform4.norm a4 s0", "200x11 trellis4.12.norm a4 s0", "200x11 trellis4.8.norm a4 s0"]
SPECS += ["200x11 scalar4.norm a3 s0", "200x11 scalar4.norm a4g16 s0", "200x11 scalar4.norm a16 s0"]


@pytest.mark.parametrize("saved", SPECS)
def test_codes_of_another_spec_are_refused(saved):
    """Of another seed, codebook, scale or token code: all of the same shape. The layer keeps what it has."""
    spec, linear = LayerSpec.parse(saved), plain_linear(200)
    state = {f"up.{key}": value for key, value in OrbitLinear.from_linear(linear, spec).state_dict().items()}
    for strict, assign, key in itertools.product((False, True), (False, True), SPECS):
        model = nn.ModuleDict({"up": OrbitLinear.from_linear(linear, LayerSpec.parse(key))})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if key == saved:
            assert str(model.load_state_dict(state, strict, assign)) == "<All keys matched successfully>"
            continue
        with pytest.raises(CheckpointError) as caught:
            model.load_state_dict(state, strict, assign)
        assert str(caught.value).startswith(f"the stored codes of up are {saved!r}, the model's layer is {key!r}")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@MAKE
def test_states_without_specs_load(make):
    """They were made before there were any."""
    layer = make(plain_linear(200))
    state = layer.state_dict()
    del state["spec"]
    other = type(layer)(layer.spec, torch.zeros(11))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())


@MAKE
def test_layers_without_values_have_no_spec_in_their_state(make):
    """Loaders that fill a model on the meta device know its state by parameters and buffers alone."""
    layer = make(plain_linear(200))
    assert sorted(type(layer)(layer.spec, device="meta").state_dict()) == ["codes", "scales"]


@MAKE
def test_a_copy_stands_alone(make):
    layer, x = make(plain_linear(200)), tokens(5, 200)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    twin.scales.data.zero_()
    assert torch.equal(layer(x), before)


@MAKE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_reads_as_what_the_codes_stand_for(make, bias, dtype):
    layer = make(plain_linear(200, bias=bias, dtype=torch.bfloat16)).to(dtype)
    weight, values = layer.weight, layer.dequantize().to(dtype)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (200, 11)
    assert (weight.shape, weight.dtype, weight.device) == ((11, 200), dtype, layer.codes.device)
    assert not weight.requires_grad
    reads = [
        lambda w: w + 0,
        lambda w: w.T,
        lambda w: w[3:5, ::7],
        lambda w: w.detach().clone(),
        lambda w: w.data.double(),
        lambda w: torch.cat([w, w]),
        lambda w: torch.linalg.norm(w, dim=1),
        lambda w: nn.functional.linear(torch.ones(2, 200, dtype=dtype), w),
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
    ]
    for read in reads:
        got = read(weight)
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, read(values))
    assert layer.to("meta").weight.device.type == "meta"


@MAKE
def test_weight_cannot_be_written_to(make):
    layer = make(plain_linear(200))
    state = copy.deepcopy(layer.state_dict())
    writes = [
        lambda: layer.weight.copy_(torch.zeros(11, 200)),
        lambda: layer.weight.data.add_(1),
        lambda: layer.weight.__setitem__(0, 1.0),
        lambda: torch._foreach_add_([layer.weight], 1.0),
        lambda: nn.init.zeros_(layer.weight),
        lambda: torch.add(torch.ones(11, 200), 1, out=layer.weight),
        lambda: setattr(layer.weight, "data", torch.zeros(11, 200)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(11, 200))),
        lambda: setattr(layer, "weight", torch.zeros(11, 200)),
        layer.reset_parameters,
    ]
    for write in writes:
        with pytest.raises(ModelError, match="packed and cannot be"):
            write()
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("activation_bits", [4, 16])
def test_dequantized_and_plain_linear(activation_bits):
    """Sixteen-bit activations are rotated and no more, so the plain layer with the same weight gives the same."""
    linear, x = plain_linear(200), tokens(5, 200)
    layer = orbit(linear, 3, activation_bits, seed=6)
    weight = oracle.rotated_weight(fp64(linear.weight), 3, 6) @ oracle.rotation_matrix(200, 6)
    assert layer.dequantize().dtype == torch.float32
    assert relative(layer.dequantize(), weight) < 1e-6
    plain = layer.to_linear(torch.float32)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight.detach(), layer.dequantize())
    assert torch.equal(plain.bias.detach(), linear.bias.detach())
    assert relative(plain(x), fp64(x) @ weight.T + fp64(linear.bias)) < 1e-6
    assert (relative(layer(x), fp64(plain(x))) < 1e-5) == (activation_bits == 16)
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16
    assert orbit(plain_linear(96, bias=False), 4, 4).to_linear(torch.float32).bias is None


@pytest.mark.parametrize("dim", [63, 64, 137, 1536])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_int4_against_the_oracle(dim, dtype, tolerance):
    linear, x = plain_linear(dim, dtype=dtype), tokens(2, 3, dim, outliers=False).to(dtype)
    layer = int4(linear)
    weight = oracle.int4_weight(*oracle.int4(fp64(linear.weight)))
    got = layer(x)
    assert got.dtype == dtype
    assert relative(got, fp64(x) @ weight.T + fp64(linear.bias)) < tolerance
    np.testing.assert_array_equal(fp64(layer.dequantize()), weight)
    np.testing.assert_array_equal(fp64(layer.to_linear(torch.float32).weight), weight)


def test_layers_with_the_same_input_can_share_its_codes():
    """Rotation and codebook depend on width and seed alone: encode_tokens is all a layer does to its input."""
    linear, x = plain_linear(192), tokens(4, 192)
    codes, norms = encode_tokens(x.view(2, 2, 192), 3, 2)
    assert codes.shape == (2, 2, 192)
    assert norms.shape == (2, 2, 1)
    assert torch.equal(encode_tokens(x, 3)[0], encode_tokens(x, 3, 0)[0])
    left = oracle.rotated_weight(fp64(linear.weight), 4, 2)
    right = oracle.codebook(192, 3)[codes.view(4, 192).numpy()] * fp64(norms).reshape(4, 1)
    assert relative(orbit(linear, 4, 3, seed=2)(x), right @ left.T + fp64(linear.bias)) < 1e-6


def test_tables_made_inside_a_mode_serve_everybody_afterwards():
    """Tables are shared between calls; each width here is one that no other test has put into the caches."""

    def build(width):
        return orbit(nn.Linear(width, 8, device="cpu"), 3, 3)

    with torch.inference_mode():
        build(352)(torch.ones(1, 352))
    x = torch.ones(1, 352, requires_grad=True)
    build(352)(x).sum().backward()
    assert x.grad.isfinite().all()
    layer = build(416)
    torch.export.export(layer, (torch.ones(2, 416),))
    assert type(layer(torch.ones(2, 416))) is torch.Tensor
    with torch.device("meta"):
        assert build(448)(torch.ones(2, 448, device="cpu")).device.type == "cpu"


@pytest.mark.parametrize("autocast", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("grid", ["int8", "e4m3", "exact"])
def test_autocast_changes_nothing(grid, dtype, autocast):
    layer, modulation = orbit(nn.Linear(256, 16)), int4(nn.Linear(256, 16))
    layer.set_grid(grid, False)
    x = torch.randn(20, 256).to(dtype)
    with torch.no_grad():
        expected = layer(x), modulation(x)
        with torch.autocast("cpu", autocast):
            found = layer(x), modulation(x)
    for ours, other in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("weight_bits", "states"), [(2, 8), (3, 10), (4, 8), (2, 12)])
@pytest.mark.parametrize("dim", [64, 137, 192])
def test_trellis_layers_multiply_the_points_that_their_codes_name(dim, weight_bits, states):
    linear, x = plain_linear(dim, rows=16, seed=dim), tokens(9, dim)
    layer = orbit(linear, weight_bits, 4, 1, states=states, scale="unbiased")
    codes = torch.from_numpy(oracle.unpack(layer.codes.numpy(), weight_bits, dim))
    points = trellis.table(weight_bits, states)[trellis.windows(codes, weight_bits, states)].numpy()
    weight = points * fp64(layer.scales)[:, None] / np.sqrt(dim)
    own = encode_tokens(x, 4, 1)[0].numpy()
    expected = oracle.rotated_tokens(fp64(x), 4, 1, own) @ weight.T + fp64(linear.bias)
    assert relative(layer(x), expected) < 2e-6
    gain = token_gain(layer.spec)
    assert relative(layer.dequantize() * gain, weight @ oracle.rotation_matrix(dim, 1)) < 1e-6
    assert relative(layer(x.clone().requires_grad_()), expected) < 2e-6
    assert f"W{weight_bits}A4, trellis{weight_bits}.{states}.unbiased" in repr(layer)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("states", [8, 12])
def test_trellis_layers_are_the_same_on_every_grid(states, dtype):
    """Their points are exact on all of them: only the tokens' codebook differs, and is the same for a scalar layer."""
    linear, x = plain_linear(192, rows=16, dtype=dtype), tokens(40, 192).to(dtype)
    layer = orbit(linear, 2, 4, states=states)
    plain = orbit(linear, 2, 4)
    defined = fp64(exact(layer, x.float()))
    for grid in ("e4m3", "int8", EXACT):
        for cached in (False, True):
            layer.set_grid(grid, cached)
            plain.set_grid(grid, False)
            off = relative(layer(x), defined)
            base = relative(plain(x), fp64(exact(plain, x.float())))
            assert off < base + 0.004


@pytest.mark.parametrize(("weight_bits", "states"), [(2, 12), (4, None)])
@pytest.mark.parametrize(("scale", "share"), [("unbiased", 1), ("unbiased-rows", 1 - 0.0345)])
def test_what_unbiased_layers_keep(weight_bits, states, scale, share):
    """Of the product <y, x w> over <x w, x w>: all, or what tokens of 3 bits keep; the weight alone keeps all."""
    linear, x = plain_linear(512, rows=256, seed=1), tokens(256, 512, outliers=False)
    linear.bias = None
    layer = orbit(linear, weight_bits, 3, 1, states=states, scale=scale)
    product = linear(x).detach()
    assert float((layer(x) * product).sum() / product.square().sum()) == pytest.approx(share, abs=0.005)
    weight = linear.weight.detach()
    assert float((layer.dequantize() * weight).sum() / weight.square().sum()) == pytest.approx(1, abs=0.002)


def test_layers_with_unknown_scales_are_refused():
    with pytest.raises(ConfigError, match="scale='mean' is not supported"):
        OrbitLinear(spec(64, 16, scale="mean"))


def test_layers_with_trellises_that_do_not_exist_are_refused():
    for bits, states in ((6, 12), (2, 9)):
        with pytest.raises(ConfigError, match="trellis"):
            OrbitLinear(spec(64, 16, bits, states=states))


class Calls(TorchDispatchMode):
    """The names of the package's ops that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        self.names += [name] if namespace == "orbitdit" else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("grid", ["int8", "e4m3"])
def test_decoded_weights_are_kept_until_the_codes_or_scales_change(grid, states):
    layer = orbit(plain_linear(192, rows=16, dtype=torch.bfloat16), 2, 4, states=states)
    x = tokens(20, 192).bfloat16()
    layer.set_grid(grid, False)
    expected = layer(x)
    state = layer.state_dict()
    layer.set_grid(grid, True)

    def run(layer):
        with Calls() as calls:
            output = layer(x)
        return output, calls.names

    first, again = run(layer), run(layer)
    assert (first[1], again[1]) == (["decode", "linear"], ["linear"])
    for output, _ in (first, again):
        assert relative(output, fp64(expected)) < 1e-5
    assert layer.state_dict().keys() == state.keys()
    assert list(layer.buffers()) == []
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.float32)]
    for twin in twins:  # what is decoded does not travel
        output, names = run(twin)
        assert names == ["decode", "linear"]
        assert torch.equal(output, again[0])
    changes = [
        lambda: layer.scales.mul_(2),
        lambda: layer.codes.bitwise_not_(),
        lambda: setattr(layer, "scales", nn.Parameter(layer.scales * 2, requires_grad=False)),
        lambda: layer.load_state_dict({**layer.state_dict(), "scales": layer.scales / 2}),
        lambda: layer.load_state_dict({**layer.state_dict(), "scales": layer.scales * 8}, assign=True),
    ]
    for change in changes:
        before, _ = run(layer)
        change()
        output, names = run(layer)
        assert names == ["decode", "linear"]
        fresh = copy.deepcopy(layer)
        fresh.set_grid(grid, False)
        assert relative(output, fp64(fresh(x))) < 1e-5
        assert not torch.equal(output, before)
    layer.set_grid(grid, False)
    assert run(layer)[1] == ["linear"]


@MAKE
def test_layers_without_weights_say_so(make):
    layer = make(plain_linear(200)).to("meta")
    assert layer(torch.ones(3, 200, device="meta")).shape == (3, 11)
    with pytest.raises(ModelError, match="has no weights"):
        layer(torch.ones(3, 200))


def test_siblings_share_what_comes_as_tokens_and_nothing_else():
    """What siblings share lives in `Tokens`: after a call nothing of it is left in a layer."""
    layers = [orbit(plain_linear(192, rows=16, seed=seed)) for seed in range(3)]
    share_inputs(layers)
    x = tokens(4, 192).bfloat16()
    for layer in layers:
        layer.set_grid("int8", False)
    held = weakref.ref(x)
    with Calls() as calls:
        outputs = [layer(x) for layer in layers]
    assert calls.names == ["linear"] * 3
    with Calls() as calls:
        shared = Tokens(x)
        together = [layer(shared) for layer in layers]
    assert calls.names == ["linear"]
    assert all(torch.equal(one, other) for one, other in zip(outputs, together, strict=True))
    del x, shared, calls
    assert held() is None
