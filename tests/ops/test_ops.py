"""The custom ops: what torch is told of them, layers under `torch.compile`, and devices without kernels."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from encoding_checks import packed, random, same
from orbitdit import OrbitLinear
from orbitdit import ops as dispatch
from orbitdit.codebooks import trellis
from orbitdit.grids import EXACT, GRIDS
from orbitdit.ops import choose, device_grids, has_kernel, ops
from orbitdit.ops.decode.reference import decode
from orbitdit.ops.linear import cpu as linear_cpu
from orbitdit.ops.linear import cuda as linear_cuda
from orbitdit.ops.linear import reference
from orbitdit.ops.rotate_encode.reference import rotate_encode
from orbitdit.spec import Encoding
from parameters import BACKENDS
from specs import int4, key_of, orbit, spec, tokens_key

BF16 = torch.bfloat16
LARGE = 2**64 - 1
"""A seed that takes all 64 bits."""


def plain_linear(dim=64, rows=48, bias=True, dtype=BF16):
    torch.manual_seed(0)
    return torch.nn.Linear(dim, rows, bias=bias).to(dtype)


def layer_on(grid, bits=(4, 4), **sizes):
    layer = orbit(plain_linear(**sizes), *bits, seed=2**63 + 5)
    layer.set_grid(grid, False)
    return layer.eval()


def cases():
    x, bias = random(5, 64).bfloat16(), random(48, seed=1).bfloat16()
    codes, scales = packed(32, 64, 3)
    first, second = spec(64, 32, 3, 4, LARGE), spec(64, 48, 4, 4, LARGE)
    centred = spec(64, 32, 3, 4, LARGE, scale="unbiased", group_size=2)
    trellis_codes = spec(64, 48, 3, states=12)
    decoded = decode(*packed(48, 64, 4), second, "int8")
    return {
        "rotate_encode": (x, tokens_key(64, 4, "int8", LARGE)),
        "decode": (*packed(48, 64, 3), key_of(spec(64, 48, 3), grid="int8")),
        "decode of a trellis": (*packed(48, 64, 3), key_of(trellis_codes, grid="int8")),
        "linear": (
            x.view(1, 5, 64),
            [],
            [codes, scales, None, *decoded, bias],
            key_of(first, second, grid="int8"),
        ),
        "linear of centred tokens": (x.view(1, 5, 64), [], [codes, scales, None], key_of(centred, grid="int8")),
        "encode_decode": (
            x[:, 16:],
            [x[:, :16]],
            [codes, scales, None, codes, scales, None],
            key_of(first, first, grid="int8", prologue="gelu"),
        ),
        "encode_decode with biases": (
            x,
            [],
            [codes, scales, bias[:32], codes, scales, bias[16:]],
            key_of(first, first, grid="e4m3"),
        ),
        "encode_decode of centred tokens": (
            x.view(1, 5, 64),
            [],
            [codes, scales, bias[:32]],
            key_of(centred, grid="int8"),
        ),
        "exact_linear": (x, *packed(48, 64, 6), bias, spec(64, 48, 6, 4, LARGE).key),
        "exact_linear of a trellis": (x, *packed(48, 64, 2), bias, spec(64, 48, 2, 4, LARGE, states=10).key),
        "viterbi": (random(3, 20), trellis.table(2, 8).float(), 2),
        "int4_linear": (x, packed(48, 64, 4)[0], random(48, 1).bfloat16(), bias),
    }


def op_named(name):
    return getattr(ops, name.partition(" ")[0])


@pytest.mark.parametrize("name", cases())
def test_the_registration_of_each_op(name):
    assert set(torch.library.opcheck(op_named(name).default, cases()[name]).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", cases())
def test_shapes_and_dtypes_are_known_without_values(name):
    arguments = cases()[name]
    results = op_named(name)(*arguments)
    on_meta = op_named(name)(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))
    for expected, found in zip(*map(torch.utils._pytree.tree_leaves, (results, on_meta)), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("grid", list(GRIDS))
def test_ops_are_the_definition(grid):
    x, (codes, scales), bias = random(9, 64).bfloat16(), packed(48, 64, 3), random(48, seed=1).bfloat16()
    layer = spec(64, 48, 3, 4, LARGE)
    encoded = ops.rotate_encode(x, key_of(layer, grid=grid))
    expected = rotate_encode(x, Encoding(64, 4, grid, LARGE))
    if grid == "e4m3":
        assert same(encoded[0], expected[0])
    torch.testing.assert_close(encoded[1], expected[1], rtol=1e-6, atol=0)
    weight = ops.decode(codes, scales, key_of(layer, grid=grid))
    assert all(map(same, weight, decode(codes, scales, layer, grid)))
    product = reference.matmul(encoded, weight, bias, torch.float32)
    operands = [codes, scales, bias, *weight, bias]
    packed_and_decoded = ops.linear(x.view(3, 3, 64), [], operands, key_of(layer, layer, grid=grid))
    assert packed_and_decoded.shape == (3, 3, 96)
    for y in packed_and_decoded.view(9, 96).split(48, dim=1):
        torch.testing.assert_close(y.float(), product, rtol=2**-8, atol=1e-5)


LAYERS = {
    "int8": lambda: layer_on("int8"),
    "e4m3": lambda: layer_on("e4m3", (2, 3)),
    "exact": lambda: layer_on(EXACT, (3, 6)),
    "A16": lambda: layer_on(None, (2, 16)),
    "INT4": lambda: int4(plain_linear()).eval(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own use of torch.jit
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_compiled_layers_give_the_same_for_any_number_of_tokens(name, backend):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for shape in ((5,), (7,), (63,), (137,), (2,), (199,)):
        x = random(*shape, 64).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 2
    x = random(2, 11, 64).bfloat16()
    assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_tokens(name):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for shape in ((0, 64), (2, 0, 64)):
            y = function(torch.empty(shape, dtype=BF16))
            assert (y.shape, y.dtype) == ((*shape[:-1], 48), BF16)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_exported_layers_give_the_same(name):
    layer, x = LAYERS[name](), random(6, 64).bfloat16()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},)).module()
    for given in (x, random(33, 64).bfloat16()):
        assert torch.equal(exported(given), layer(given))


@pytest.mark.parametrize("grid", [*GRIDS, EXACT])
def test_a_gradient_flows_whatever_the_grid(grid):
    layer, x = layer_on(grid, (4, 16)), random(3, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0


@pytest.fixture
def fresh_grids():
    dispatch._device_grids.cache_clear()
    yield
    dispatch._device_grids.cache_clear()


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize(
    ("capability", "grids"),
    [
        *((newer, ("e4m3", "int8", "exact")) for newer in ((8, 9), (9, 0), (10, 0), (12, 0))),
        *((older, ("int8", "exact")) for older in ((8, 0), (8, 6))),
    ],
)
def test_grids_by_compute_capability(capability, grids, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_grids(torch.device("cuda", 0)) == grids


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize(("device", "cuda"), [("cuda:0", "13.0"), ("cuda:0", None), ("xpu:0", None), ("mps:0", None)])
def test_devices_without_kernels_run_exactly_and_say_so_once(device, cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=device) as caught:
        assert device_grids(torch.device(device)) == ("exact",)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, torch.device(device), BF16) == EXACT


@pytest.mark.parametrize("op", ["exact_linear", "int4_linear", "viterbi"])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU"])
def test_the_ops_that_other_devices_need_are_there(op, key):
    name = f"orbitdit::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key) or torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeExplicitAutograd"
    )


@pytest.mark.usefixtures("fresh_grids")
def test_a_meta_device_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device_grids(torch.device("meta")) == ("exact",)


@pytest.mark.usefixtures("fresh_grids")
@pytest.mark.parametrize("exact_products", [True, False])
def test_the_grid_of_a_cpu_is_int8_where_it_multiplies_that(exact_products, monkeypatch):
    monkeypatch.setattr(linear_cpu, "multiplies_int8", lambda: exact_products)
    chosen = choose(None, torch.device("cpu"), BF16)
    assert chosen == ("int8" if exact_products else EXACT)
    assert set(device_grids(torch.device("cpu"))) == {*GRIDS, EXACT}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forced", [None, *GRIDS])
def test_wide_inputs_run_exactly(forced, dtype):
    assert choose(forced, torch.device("cpu"), dtype) == EXACT


@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        ((63, 64), (4, 4)),
        ((8192, 64), (4, 4)),
        ((64, 60), (4, 4)),
        ((64, 64), (8, 4)),
        ((64, 64), (4, 8)),
        ((64, 64), (4, 16)),
    ],
)
def test_what_no_kernel_takes(shape, bits):
    assert not has_kernel(spec(*shape, *bits))
    assert has_kernel(spec(64, 64))
    assert not OrbitLinear(spec(*shape, *bits)).has_kernel


@pytest.mark.parametrize("forced", [*GRIDS, EXACT])
def test_a_forced_grid_is_taken(forced):
    for dtype in (BF16, torch.float16):
        assert choose(forced, torch.device("cpu"), dtype) == forced


@pytest.mark.parametrize("group_size", [None, 2, 5])
@pytest.mark.parametrize(("count", "bias", "states"), [(1, True, None), (3, True, 12), (2, False, 8)])
def test_what_a_compiler_sees_of_a_product_on_e4m3(count, bias, states, group_size, monkeypatch):
    """One op that encodes and decodes, and the library's product: the shapes and dtypes that the op itself promises."""
    x = random(3, 5, 64).half()
    layer = spec(64, 48, 3, 4, LARGE, states=states, scale="unbiased", group_size=group_size)
    operands = [*packed(48, 64, 3), random(48).half() if bias else None] * count
    seen = {}

    def product(values, weight, token_scales, row_scales, bias=None, out_dtype=None, use_fast_accum=False):
        assert weight.stride() == (1, 64)
        names = ("values", "token_scales", "weight", "row_scales", "bias")
        tensors = (values, token_scales, weight.t(), row_scales, bias)
        seen.update(zip(names, tensors, strict=True))
        y = (values.float() @ weight.float()) * token_scales * row_scales
        return (y if bias is None else y + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    key = key_of(*[layer] * count, grid="e4m3")
    assert linear_cuda.scaled_together(x, operands, key)
    y = linear_cuda.linear_in_parts(ops.encode_decode, x, [], operands, key)
    expected = ops.linear(x, [], operands, key)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype) == ((3, 5, 48 * count), torch.float16)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=6e-2 if group_size else 2e-2)  # of two bf16 outputs
    assert {name: None if t is None else (t.shape, t.dtype) for name, t in seen.items()} == {
        "values": ((15, 64), torch.float8_e4m3fn),
        "token_scales": ((15, 1), torch.float32),
        "weight": ((48 * count, 64), torch.float8_e4m3fn),
        "row_scales": ((1, 48 * count), torch.float32),
        "bias": ((48 * count,), BF16) if bias else None,
    }


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_product_on_e4m3_is_traced_whole_for_any_number_of_tokens(group_size):
    """As `run_linear` runs it on CUDA under a compiler: no graph break, and the library's product in the graph."""
    key = key_of(spec(64, 48, 4, 4, LARGE, scale="unbiased", group_size=group_size), grid="e4m3")
    operands, graphs = [*packed(48, 64, 4), random(48).bfloat16()], []

    def run(x):
        assert linear_cuda.scaled_together(x, operands, key)
        return linear_cuda.linear_in_parts(ops.encode_decode, x, [], operands, key)

    def keep(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return lambda *args: (torch.empty(0),)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=keep, dynamic=True)
    for count in (33, 40, 96):
        compiled(random(3, count, 64).bfloat16())
    assert len(graphs) <= 2
    assert all({torch._scaled_mm, ops.encode_decode} <= targets for targets in graphs)
