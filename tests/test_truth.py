"""What a quantized layer says of itself is true: its weight when it is read, its dtype, and its codes after casts."""

import copy
import gc
import io
import pickle

import diffusers
import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

import orbitdit
from families import FAMILIES
from orbitdit import ModelError, OrbitQuantConfig
from orbitdit.tokens import Tokens
from specs import int4, orbit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAKERS = {
    "w4a4": lambda li: orbit(li),
    "w2a16": lambda li: orbit(li, 2, 16, 5, scale="unbiased"),
    "w8a8": lambda li: orbit(li, 8, 8),
    "trellis": lambda li: orbit(li, 2, 4, states=8, scale="unbiased", group_size=16),
    "int4": int4,
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def plain_linear(dim=64, rows=32, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(dim, rows, bias).to(dtype)


def quantized(name, bits="w4a4", dtype=torch.float32, **settings):
    model = FAMILIES[name].build().to(dtype)
    orbitdit.quantize_(model, OrbitQuantConfig(bits, trellis_states=8, **settings), progress=False)
    return model


def one_line(error):
    return "\n" not in str(error.value)


def saved_and_loaded(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    return torch.load(io.BytesIO(file.getvalue()))


READS = {
    "float": lambda w: w.float(),
    "norm": lambda w: w.norm(dim=1),
    "linalg": lambda w: torch.linalg.norm(w, dim=1, keepdim=True),
    "T": lambda w: w.T,
    "index": lambda w: w[3],
    "slices": lambda w: w[3:5, ::7].T[1:].reshape(-1),
    "mask": lambda w: w[w > 0],
    "rows": lambda w: torch.stack(list(w)),
    "chunk": lambda w: w.chunk(3)[1],
    "view": lambda w: w.view(-1, 4),
    "bits": lambda w: w.view(torch.uint8),
    "linear": lambda w: linear(torch.ones(3, 64, dtype=w.dtype), w),
    "matmul": lambda w: torch.ones(2, 64, dtype=w.dtype) @ w.T,
    "tokens": lambda w: linear(Tokens(torch.ones(3, 64, dtype=w.dtype)), w),
    "cpu": lambda w: w.cpu(),
    "half": lambda w: w.to(torch.float16),
    "double": lambda w: w.double(),
    "numpy": lambda w: torch.from_numpy(w.float().numpy()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w.float())),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "item": lambda w: torch.tensor(w[1, 2].item()),
    "dlpack": lambda w: torch.from_dlpack(w),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "data": lambda w: w.data,
    "data of data": lambda w: w.data.data,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.data.clone(),
    "contiguous": lambda w: w.contiguous(),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "save": saved_and_loaded,
    "cat": lambda w: torch.cat([w, w]),
    "copy into": lambda w: torch.empty(32, 64).copy_(w),
    "assigned": lambda w: assigned(w),
    "requires no grad": lambda w: w.requires_grad_(False),
    "autocast": lambda w: autocast_sum(w),
}


def assigned(weight):
    whole = torch.zeros(64, 64, dtype=weight.dtype)
    whole[32:] = weight
    whole[:32].grad = weight
    return whole


def autocast_sum(weight):
    with torch.autocast("cpu", torch.bfloat16):
        return weight * 2


@every_layer
@every_dtype
def test_a_weight_that_is_read_is_what_the_codes_stand_for(make, dtype):
    layer = make(plain_linear(dtype=dtype))
    values = layer.dequantize().to(dtype)
    assert values.isfinite().all()
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == ((32, 64), dtype, layer.codes.device)
    for name, read in READS.items():
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                found, expected = read(layer.weight), read(values)
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
    assert repr(values) in repr(layer.weight)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(3, -1), rtol=0.02, atol=0.05)


WRITES = {
    "in place": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__((0, 1), 0.0),
    "copy": lambda w: w.copy_(torch.zeros(32, 64)),
    "data": lambda w: setattr(w, "data", torch.zeros(32, 64)),
    "data in place": lambda w: w.data.add_(1),
    "data item": lambda w: w.data.__setitem__(0, 1),
    "detached": lambda w: w.detach().zero_(),
    "row": lambda w: w[0].zero_(),
    "view": lambda w: w.view(-1).fill_(1),
    "transposed": lambda w: w.T.mul_(2),
    "item of a view": lambda w: w.T[1:].__setitem__(0, 1.0),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "out": lambda w: torch.add(torch.ones(32, 64, dtype=w.dtype), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "apply": lambda w: w.apply_(lambda value: 0),
    "set": lambda w: w.set_(torch.zeros(32, 64, dtype=w.dtype)),
    "resize": lambda w: w.resize_(4),
    "gradient": lambda w: w.requires_grad_(),
    "gradient asked for": lambda w: setattr(w, "requires_grad", True),
    "gradient given": lambda w: setattr(w, "grad", torch.zeros(32, 64, dtype=w.dtype)),
    "parameter": lambda w: nn.Parameter(w),
    "normal": nn.init.normal_,
    "uniform": lambda w: nn.init.uniform_(w),
    "constant": lambda w: nn.init.constant_(w, 1.0),
    "zeros": nn.init.zeros_,
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_normal_,
    "truncated": nn.init.trunc_normal_,
    "eye": nn.init.eye_,
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "address": lambda w: w.data_ptr(),
}
REPLACEMENTS = {
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(32, 64))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(32, 64)),
    "None": lambda layer: setattr(layer, "weight", None),
    "delete": lambda layer: delattr(layer, "weight"),
    "register": lambda layer: layer.register_parameter("weight", None),
    "reset": lambda layer: layer.reset_parameters(),
}


@every_layer
@every_dtype
def test_a_weight_cannot_be_written_to(make, dtype):
    layer = make(plain_linear(dtype=dtype))
    state = copy.deepcopy(layer.state_dict())
    for name, write in WRITES.items():
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(ModelError, match="packed") as caught:
                write(layer.weight)
            assert one_line(caught), name
    for name, replace in REPLACEMENTS.items():
        with pytest.raises(ModelError, match="packed") as caught:
            replace(layer)
        assert one_line(caught), name
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())


@every_layer
def test_a_weight_takes_no_memory(make):
    layer = make(plain_linear())
    kept = [layer.weight, layer.weight.T, layer.weight[1]]
    for weight in kept:
        weight.norm()
    gc.collect()
    large = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (32, 64) and t.is_floating_point()]
    assert not large


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_code_reads_the_same_weight_in_one_graph(make, grad):
    layer, x = make(plain_linear()), torch.randn(3, 64, requires_grad=grad)

    def run(x):
        weight = layer.weight
        return linear(x, weight), weight.data.T.float().norm(dim=0), weight.new_zeros(weight.shape[0])

    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert all(map(torch.equal, found, run(x)))


# Adapters.


@pytest.mark.parametrize(("name", "bits"), [("wan", "w8a8"), ("wan", "w2a4"), ("z-image", "w4a4"), ("flux", "w4a4")])
def test_dora_starts_as_the_model_and_compiles(name, bits):
    family, model = FAMILIES[name], quantized(name, bits)
    before = family.run(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_out.0", "norm1.linear", "proj_mlp"], use_dora=True))
    for module in model.modules():
        if hasattr(module, "lora_magnitude_vector"):
            norms = module.base_layer.dequantize().norm(dim=1)
            torch.testing.assert_close(module.lora_magnitude_vector["default"].weight.data, norms)
            module.lora_B["default"].weight.data.normal_(std=0.1)
    adapted = family.run(model)
    assert adapted.isfinite().all()
    assert not torch.equal(adapted, before)
    block = next(m for m in model.children() if isinstance(m, nn.ModuleList))[0]
    torch._dynamo.reset()
    block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(family.run(model), adapted)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", "mica", "lora_ga", True])
def test_adapters_of_any_start_that_leaves_the_weight_alone(start):
    family, model = FAMILIES["wan"], quantized("wan")
    before = family.run(model)
    settings = {"eva_config": EvaConfig()} if start == "eva" else {}
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start, **settings))
    torch.testing.assert_close(family.run(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_would_change_the_weight_say_so(start, dora):
    family, model = FAMILIES["wan"], quantized("wan")
    before = family.run(model)
    with pytest.raises(ModelError, match="packed and cannot be written to") as caught:
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start, use_dora=dora))
    assert one_line(caught)
    assert torch.equal(family.run(model), before)


def test_adapters_are_not_merged_by_peft():
    linears = nn.ModuleDict({name.replace(".", "_"): plain_linear(64, 64) for name in ("to_q", "to_v")})
    model = nn.ModuleDict({"blocks": nn.ModuleList([linears, copy.deepcopy(linears)])})
    orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    state = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, lambda: adapted.merge_and_unload(safe_merge=True)):
        with pytest.raises(ModelError, match="packed and cannot be written to") as caught:
            merge()
        assert one_line(caught)
    found = {key: value for key, value in adapted.unload().state_dict().items() if "lora" not in key}
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"lora_scale": 0.5}, {"safe_fusing": True}], ids=str)
def test_a_lora_is_not_fused_and_nothing_changes(options, settings):
    """Not even layers that are not quantized, which come first."""
    family, model = FAMILIES["flux"], quantized("flux")
    targets = ["x_embedder", "to_q", "norm1.linear", "proj_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings))
    before, state = family.run(model), copy.deepcopy(model.state_dict())
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ModelError, match="packed and cannot be written to") as caught:
            each.fuse_lora(**options)
        assert one_line(caught)
        assert torch.equal(family.run(each), before)
        assert all(torch.equal(each.state_dict()[key], value) for key, value in state.items())


def test_a_lora_is_fused_into_a_dequantized_model():
    family, model = FAMILIES["flux"], quantized("flux")
    model = orbitdit.dequantize_(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["x_embedder", "to_q"], init_lora_weights=False))
    adapted = family.run(model)
    model.fuse_lora()
    torch.testing.assert_close(family.run(model), adapted, rtol=1e-4, atol=1e-4)


def test_a_pipeline_says_so_too(tmp_path):
    family = FAMILIES["flux"]
    quantized("flux").save_pretrained(tmp_path)
    transformer = family.cls.from_pretrained(tmp_path)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["x_embedder", "to_q"], init_lora_weights=False))
    before = family.run(transformer)
    with pytest.raises(ModelError, match="packed and cannot be written to"):
        pipe.fuse_lora(components=["transformer"], lora_scale=0.7)
    assert torch.equal(family.run(transformer), before)
