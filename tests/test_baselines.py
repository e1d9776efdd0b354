"""The baselines against small calculations of their own, in fp64 numpy where they are easy to follow."""

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

import baselines
from baselines import METHODS, Statistics, calibrate
from baselines.layer import FakeQuantLinear, block_hadamard, regular_hadamard
from baselines.methods import ALPHAS, GELU_LEAST
from baselines.uniform import SHRINK, Activation, decode, encode, gptq, grid_of
from orbitdit import Int4Linear, OrbitQuantConfig, evaluate, plan, quantize_
from orbitdit.errors import ConfigError, ModelError, TensorError
from orbitdit.shapes.prompts import benchmark
from parameters import AWKWARD
from tiny import tiny_pipeline


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(tokens, groups=1):
    x = tokens.double()
    absmax = torch.stack([part.abs().amax(0) for part in tokens.chunk(groups)])
    return Statistics(absmax, tokens.amin(0), x.mean(0).float(), (x.T @ x / len(x)).float(), tokens)


def outliers(rows, dim, seed=0):
    """Tokens with a few large channels, as a DiT's are."""
    x = draw(rows, dim, seed=seed)
    x[:, :: max(1, dim // 3)] *= 12
    return x


def bf16(x):
    return torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16).double().numpy()


def min_max(w, bits):
    """Rows of `w` rounded between their least and largest values, with a bf16 scale."""
    low, high = np.minimum(w.min(1), 0)[:, None], np.maximum(w.max(1), 0)[:, None]
    scale = bf16((high - low) / (2**bits - 1))
    zero = np.round(-low / scale)
    return (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero) * scale


def symmetric(w, bits, ratio=1.0):
    most = 2 ** (bits - 1) - 1
    scale = bf16(ratio * np.abs(w).max(1)[:, None] / most)
    return np.clip(np.round(w / scale), -most - 1, most) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", AWKWARD)
def test_rtn_is_min_max_rounding(bits, dim):
    weight, x = draw(5, dim), draw(7, dim, seed=1)
    layer = METHODS["rtn"].make(weight, statistics_of(x), (bits, 4), 0)
    np.testing.assert_allclose(layer.weight.double().numpy(), min_max(weight.double().numpy(), bits), atol=1e-6)
    expected = x.double().numpy()
    low, high = np.minimum(expected.min(1), 0)[:, None], np.maximum(expected.max(1), 0)[:, None]
    scale = (high - low) / 15
    zero = np.round(low / scale)
    rounded = (np.clip(np.round(expected / scale) - zero, 0, 15) + zero) * scale
    np.testing.assert_allclose(layer(x).double().numpy(), rounded @ layer.weight.double().numpy().T, atol=1e-4)


def test_activations_on_symmetric_grids():
    x = torch.tensor([[-4.0, 1.0, 3.9, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert Activation(3, clip=0.9)(x).tolist()[0] == pytest.approx([-3.6, 1.2, 3.6, 0.0])
    halves = Activation(3, 2, unsigned=torch.tensor([False, True]))(x)
    assert halves[0].tolist() == pytest.approx([-4.0, 4 / 3, 3.9, 3.9 / 7])
    assert not halves[1].any()
    assert not Activation(4, symmetric=False)(x)[1].any()
    assert Activation(16)(x) is x
    assert Activation(4)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_the_clipping_search_takes_the_least_error_of_each_group(is_symmetric):
    weight = draw(3, 12)
    weight[:, 0] *= 6
    found = grid_of(weight, 3, 4, is_symmetric, search=True)
    groups = weight.double().numpy().reshape(9, 4)
    candidates = [symmetric(groups, 3, r) if is_symmetric else None for r in SHRINK]
    error = (decode(encode(weight, found), found) - weight).double().numpy().reshape(9, 4)
    plain = grid_of(weight, 3, 4, is_symmetric)
    before = (decode(encode(weight, plain), plain) - weight).double().numpy().reshape(9, 4)
    assert ((error**2).sum(1) <= (before**2).sum(1) + 1e-12).all()
    assert (error**2).sum() < 0.95 * (before**2).sum()
    if is_symmetric:
        least = np.min([((c - groups) ** 2).sum(1) for c in candidates], axis=0)
        np.testing.assert_allclose((error**2).sum(1), least, rtol=1e-4, atol=1e-9)


def gptq_by_least_squares(w, h, scale, zero, levels):
    """Column after column: round it, then let the others be what is best given those rounded so far."""
    best, rounded = w.copy(), np.zeros_like(w)
    for j in range(w.shape[1]):
        rounded[:, j] = (np.clip(np.round(best[:, j] / scale[:, j]) + zero[:, j], 0, levels) - zero[:, j]) * scale[:, j]
        done, left = slice(0, j + 1), slice(j + 1, None)
        if j + 1 < w.shape[1]:
            moved = np.linalg.solve(h[left, left], h[left, done] @ (rounded[:, done] - w[:, done]).T)
            best[:, left] = w[:, left] - moved.T
    return rounded


@pytest.mark.parametrize(("dim", "group", "block"), [(1, 1, 128), (6, 3, 128), (63, 63, 16), (63, 21, 128)])
def test_gptq_is_least_squares_column_by_column(dim, group, block):
    weight, x = draw(4, dim), draw(200, dim, seed=1) @ draw(dim, dim, seed=2)
    hessian = x.T @ x / len(x)
    grid = grid_of(weight, 3, group, symmetric=True)
    codes = gptq(weight, hessian, grid, block=block)
    h = hessian.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(dim)
    scale, zero = (t.double().repeat_interleave(group, 1).numpy() for t in grid[:2])
    expected = gptq_by_least_squares(weight.double().numpy(), h, scale, zero, 7)
    found = decode(codes, grid).double().numpy()
    assert (np.abs(found - expected) < 1e-5).mean() > 0.99  # ties of rounding errors aside
    plain = decode(encode(weight, grid), grid).double().numpy()
    loss = [np.trace((q - weight.double().numpy()) @ h @ (q - weight.double().numpy()).T) for q in (found, plain)]
    assert loss[0] <= loss[1] * (1 + 1e-6)


def test_gptq_with_unused_inputs():
    weight, hessian = draw(3, 8), torch.zeros(8, 8)
    grid = grid_of(weight, 4, 8, symmetric=True)
    assert torch.equal(gptq(weight, hessian, grid), encode(weight, grid))


def test_smoothquant_moves_the_best_share_of_outliers():
    weight, x = draw(16, 24), outliers(300, 24, seed=1)
    layer = METHODS["smoothquant"].make(weight, statistics_of(x), (4, 4), 0)
    w, tokens = weight.double().numpy(), x.double().numpy()
    candidates = [np.ones(24)]
    candidates += [bf16(np.abs(tokens).max(0) ** a / np.abs(w).max(0) ** (1 - a)) for a in ALPHAS]
    errors = []
    for s in candidates:
        output = min_max_tokens(tokens / s, 4) @ min_max(w * s, 4).T
        errors.append(((output - tokens @ w.T) ** 2).sum())
    best = candidates[int(np.argmin(errors))]
    np.testing.assert_allclose(1 / layer.inverse.double().numpy(), best, rtol=1e-5)
    assert min(errors) < 0.8 * errors[0]
    assert layer.stored == 16 * 24 // 2 + 16 * (2 + 1) + 24 * 2


def min_max_tokens(x, bits):
    low, high = np.minimum(x.min(1), 0)[:, None], np.maximum(x.max(1), 0)[:, None]
    scale = (high - low) / (2**bits - 1)
    zero = np.round(low / scale)
    return (np.clip(np.round(x / scale) - zero, 0, 2**bits - 1) + zero) * scale


def test_quarot_rounds_behind_signs_and_hadamard_blocks():
    weight, x = draw(6, 24), outliers(64, 24)
    layer = METHODS["quarot"].make(weight, statistics_of(x), (4, 4), 3)
    signs = layer.rotation.signs.double().numpy()
    assert set(signs) == {-1.0, 1.0}
    matrix = np.kron(np.eye(3), hadamard(8) / 8**0.5) * signs
    rotated = weight.double().numpy() @ matrix.T
    least = np.min([((symmetric(rotated, 4, r) - rotated) ** 2).sum(1) for r in SHRINK], axis=0)
    error = ((layer.weight.double().numpy() - rotated) ** 2).sum(1)
    np.testing.assert_allclose(error, least, rtol=1e-3)
    tokens = x.double().numpy() @ matrix.T
    scale = 0.9 * np.abs(tokens).max(1)[:, None] / 7
    output = np.clip(np.round(tokens / scale), -8, 7) * scale @ layer.weight.double().numpy().T
    np.testing.assert_allclose(layer(x).double().numpy(), output, rtol=1e-3, atol=1e-3)
    assert not torch.equal(signs_of(0), signs_of(1))
    assert torch.equal(signs_of(1), signs_of(1))


def signs_of(seed):
    return block_hadamard(64, seed, torch.device("cpu")).signs


def test_gptq_helps_quarot_where_inputs_are_correlated():
    weight, x = draw(32, 64), draw(2000, 64, seed=1) @ (draw(64, 64, seed=2) * torch.logspace(0, -2, 64))
    held = draw(500, 64, seed=3) @ (draw(64, 64, seed=2) * torch.logspace(0, -2, 64))
    losses = [loss(METHODS[name].make(weight, statistics_of(x), (2, 16), 0), held, weight) for name in QUAROTS]
    assert losses[1] < 0.8 * losses[0]


QUAROTS = ("quarot", "quarot-gptq")


def loss(layer, x, weight):
    target = x @ weight.T
    return float((layer(x) - target).square().sum() / target.square().sum())


def test_vidit_q_smooths_by_one_group_of_timesteps_and_rotates():
    weight, x = draw(16, 32), outliers(300, 32, seed=1)
    x[:100, 5] *= 30
    statistics = statistics_of(x, groups=3)
    layer = METHODS["vidit-q"].make(weight, statistics, (4, 4), 0)
    smooth = 1 / layer.inverse.double().numpy()
    of_weight = weight.double().abs().amax(0).numpy()
    candidates = [np.ones(32)] + [
        bf16(m.double().numpy() ** a / of_weight ** (1 - a)) for m in statistics.absmax for a in ALPHAS
    ]
    assert min(np.abs(smooth / c - 1).max() for c in candidates) < 1e-5
    matrix = hadamard(32) / 32**0.5 * layer.rotation.signs.double().numpy()
    rotated = weight.double().numpy() * smooth @ matrix.T
    np.testing.assert_allclose(layer.weight.double().numpy(), min_max(rotated, 4), atol=0.02 * np.abs(rotated).max())
    outputs = [
        min_max_tokens(x.double().numpy() / c @ matrix.T, 4) @ min_max(weight.double().numpy() * c @ matrix.T, 4).T
        for c in candidates
    ]
    target = x.double().numpy() @ weight.double().numpy().T
    errors = [((output - target) ** 2).sum() for output in outputs]
    assert ((layer(x).double().numpy() - target) ** 2).sum() <= 1.02 * min(errors)


def test_svdquant_keeps_the_largest_singular_vectors_in_bf16():
    weight, x = draw(48, 128), draw(400, 128, seed=1)
    layer = METHODS["svdquant"].make(weight, statistics_of(x), (4, 4), 0)
    rows, dim, rank, group = 48, 128, 32, 64
    factors = 2 * rank * (rows + dim)
    assert layer.stored == rows * dim // 2 + 2 * rows * dim // group + factors + 2 * dim
    assert layer.down.shape == (rank, dim)
    assert torch.equal(layer.down, layer.down.bfloat16().float())
    smoothed = (weight / layer.inverse).double().numpy()
    values = np.linalg.svd(smoothed, compute_uv=False)
    rest = smoothed - (layer.up @ layer.down).double().numpy()
    ideal = (values[rank:] ** 2).sum()
    assert ideal <= (rest**2).sum() < 1.1 * ideal  # a branch that also takes up errors of the codes is near it
    rounding = np.abs((layer.weight.double().numpy() - rest).reshape(rows, 2, group)).max(2)
    assert (rounding < 0.6 * np.abs(rest.reshape(rows, 2, group)).max(2)).all()
    assert loss(layer, x, weight) < 0.5 * loss(METHODS["rtn"].make(weight, statistics_of(x), (4, 4), 0), x, weight)


def test_svdquant_after_gelu_uses_unsigned_codes():
    weight = draw(64, 128)
    x = torch.cat([nn.functional.gelu(draw(500, 64, seed=1)), draw(500, 64, seed=2)], 1)
    layer = METHODS["svdquant-scaled"].make(weight, statistics_of(x), (8, 4), 0)
    assert layer.activation.unsigned.tolist() == [True, False]
    assert layer.shift[[0, 127]].tolist() == pytest.approx([GELU_LEAST, 0])
    assert layer.down.shape[0] == 1
    finished = layer.finish(torch.ones(64), torch.float32)
    shifted = METHODS["svdquant-scaled"].make(weight, statistics_of(x - 1), (8, 4), 0).finish(None, torch.float32)
    assert shifted.shift is None
    assert loss(finished, x, weight) < 1
    exact = (x @ weight.T + 1 - finished(x)).square().mean() / (x @ weight.T).square().mean()
    assert exact < 0.01


def test_convrot_is_a_regular_hadamard_matrix_on_groups():
    weight, x = draw(6, 192), outliers(30, 192)
    layer = METHODS["convrot"].make(weight, statistics_of(x), (4, 4), 0)
    matrix = layer.rotation.matrix.double().numpy()
    assert matrix.shape == (64, 64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), 1 / 8, atol=1e-7)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    rotated = (weight.double().numpy().reshape(6, 3, 64) @ matrix).reshape(6, 192)
    np.testing.assert_allclose(layer.weight.double().numpy(), symmetric(rotated, 4), atol=1e-5)
    assert len(regular_hadamard(4096, torch.device("cpu")).matrix) == 256


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dim", [64, 192])
def test_with_many_bits_every_method_is_the_layer_itself(name, dim):
    linear = nn.Linear(dim, 96)
    x = outliers(400, dim)
    layer = METHODS[name].make(linear.weight.detach(), statistics_of(x, 3), (8, 8), 1)
    layer = layer.finish(linear.bias, torch.float32)
    target = linear(x).detach()
    assert float((layer(x) - target).norm() / target.norm()) < 0.05  # QuaRot's clipping
    assert layer(x.bfloat16()).dtype == torch.float32
    assert layer.weight.shape == (96, dim)
    effective = layer.effective() * (1 if layer.inverse is None else layer.inverse)
    weight = linear.weight.detach()
    assert float((effective - weight).norm() / weight.norm()) < 0.02


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline("shapes")


@pytest.fixture(scope="module")
def statistics(pipeline):
    return calibrate(pipeline, ["transformer"], [p.text for p in benchmark(1, 1)], 3, 10)["transformer"]


def test_calibration_is_of_all_inputs(pipeline, statistics):
    name, seen = "single_transformer_blocks.0.proj_out", []
    hook = pipeline.transformer.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    prompts = [p.text for p in benchmark(1, 1)]
    pipeline(prompts, latents=pipeline.initial_noise(range(10, 16)), num_inference_steps=3, output_type="np")
    hook.remove()
    found, x = statistics[name], [t.flatten(0, 1).double() for t in seen]
    assert set(statistics) == {r.name for r in plan(pipeline.transformer, OrbitQuantConfig("w4a4")).select("quantize")}
    assert len(x) == 3  # the steps, which are three groups here
    torch.testing.assert_close(found.absmax.double(), torch.stack([t.abs().amax(0) for t in x]))
    every = torch.cat(x)
    torch.testing.assert_close(found.least.double(), every.amin(0))
    torch.testing.assert_close(found.mean.double(), every.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.hessian.double(), every.T @ every / len(every), rtol=1e-4, atol=1e-5)
    rows = {tuple(row) for row in every.float().tolist()}
    assert all(tuple(row) in rows for row in found.tokens[::97].tolist())
    assert len(found.tokens) == 3 * 683
    assert not any(m._forward_pre_hooks for m in pipeline.transformer.modules())


def test_tokens_do_not_grow_with_the_prompts(pipeline, monkeypatch):
    monkeypatch.setitem(evaluate.BATCH, "cpu", 2)
    prompts = [p.text for p in benchmark(1, 1)]
    found = calibrate(pipeline, ["transformer"], prompts, 2, 10)["transformer"]
    assert {len(s.tokens) for s in found.values()} == {2 * 3 * 342}  # the least number of each call that makes TOKENS


def test_statistics_of_shifted_inputs():
    x, shift = draw(100, 8), torch.tensor([0.3, 0, 0, 2, 0, 0, 1, 0.0])
    moved, expected = statistics_of(x).shifted(shift), statistics_of(x + shift)
    for name in ("least", "mean", "hessian", "tokens"):
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert (moved.absmax >= expected.absmax - 1e-6).all()


@pytest.mark.parametrize("world", ["shapes", "glyphs"])
@pytest.mark.parametrize("name", ["quarot", "svdquant"])
def test_the_same_layers_as_orbitdit_and_real_bytes(world, name):
    pipeline = tiny_pipeline(world)
    texts = [p.text for p in benchmark(1, 1, pipeline.world)]
    found = calibrate(pipeline, ["transformer"], texts, 1, 10)["transformer"]
    model, ours = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    rows = baselines.quantize_(model, name, "w2a4", found)
    quantize_(ours, OrbitQuantConfig("w2a4"), progress=False)
    for row in rows.layers:
        made, kept = model.get_submodule(row.name), ours.get_submodule(row.name)
        kinds = {"quantize": FakeQuantLinear, "int4": Int4Linear, "keep": nn.Linear}
        assert type(made) is kinds[row.action]
        if row.action == "int4":
            assert torch.equal(made.codes, kept.codes)
    weights = sum(r.weights for r in rows.select("quantize"))
    outputs = sum(r.out_features for r in rows.select("quantize"))
    inputs = sum(r.in_features for r in rows.select("quantize"))
    if name == "quarot":
        assert baselines.stored_bits(model) == pytest.approx(2 + 16 * outputs / weights)
    else:
        assert baselines.stored_bits(model) == pytest.approx(
            2 + 16 / 64 + 16 * (32 * (outputs + inputs) + inputs) / weights
        )
    assert baselines.stored_bits(ours) == pytest.approx(plan(pipeline.transformer, rows.config).effective_bits)
    assert baselines.stored_bytes(ours) == plan(pipeline.transformer, rows.config).bytes_after
    pipeline.register_modules(transformer=model)
    pictures = pipeline(texts[:2], num_inference_steps=1, output_type="np").images
    assert np.isfinite(pictures).all()


def test_what_a_method_cannot_do_is_one_line_with_the_layer(pipeline, statistics):
    class Blocks(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(dim, 40)}) for _ in range(2))

    def attempt(dim, name):
        model = Blocks(dim)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = {f"blocks.{i}.proj": statistics_of(draw(20, dim)) for i in range(2)}
        with pytest.raises(ConfigError, match=r"blocks\.0\.proj") as caught:
            baselines.quantize_(model, name, "w4a4", found)
        assert "\n" not in str(caught.value)
        assert METHODS[name].title in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    for name in ("quarot", "quarot-gptq", "vidit-q", "convrot", "svdquant"):
        attempt(63, name)
    attempt(62, "convrot")
    attempt(32, "svdquant")
    with pytest.raises(ConfigError, match="'awq' is unknown; choose one of rtn"):
        baselines.quantize_(pipeline.transformer, "awq", "w4a4", statistics)
    with pytest.raises(ConfigError, match="proj has no calibration statistics"):
        baselines.quantize_(Blocks(8), "rtn", "w4a4", {})
    broken = Blocks(8)
    broken.blocks[1]["proj"].weight.data[0, 0] = torch.nan
    with pytest.raises(TensorError, match=r"blocks\.1\.proj\.weight holds NaN"):
        baselines.quantize_(broken, "rtn", "w4a4", {f"blocks.{i}.proj": statistics_of(draw(9, 8)) for i in range(2)})


def test_a_model_that_hides_its_timestep_cannot_be_calibrated():
    clock = baselines.calibration._Steps(2)
    with pytest.raises(ModelError, match="Linear is called without a timestep"):
        clock(nn.Linear(1, 1), (), {})
    for time, step in ((1.0, 0), (1.0, 0), (0.5, 1), (1.0, 0)):
        clock(nn.Linear(1, 1), (), {"t": torch.tensor([time])})
        assert clock.step == step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_same_layers(name):
    weight, x = draw(96, 192), outliers(500, 192, seed=1)
    there = Statistics(*(t.cuda() for t in statistics_of(x, 3)))
    layers = [
        METHODS[name].make(weight, statistics_of(x, 3), (3, 4), 1),
        METHODS[name].make(weight.cuda(), there, (3, 4), 1),
    ]
    outputs = [layers[0](x), layers[1](x.cuda()).cpu()]
    errors = [loss(lambda _, y=y: y, x, weight) for y in outputs]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert layers[0].stored == layers[1].stored
    half = layers[1].finish(None, torch.bfloat16)(x.cuda().bfloat16()).float().cpu()
    assert loss(lambda _: half, x, weight) < 1.2 * errors[0]
