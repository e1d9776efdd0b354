"""A module in several places of a model is quantized once and stays one module, whichever way it goes."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_model, save_file, save_model
from torch import nn

import orbitdit
from encoding_checks import counted
from families import FAMILIES
from orbitdit import OrbitLinear, OrbitQuantConfig, dequantize_, quantize
from orbitdit.fusion import disconnect
from orbitdit.manifest import ENTRY, dumps, make, read_header, tensor_hash
from orbitdit.model import packed_layers, set_grid_

W4A4 = OrbitQuantConfig("w4a4")


class Block(nn.Module):
    """A layer of its own and one that may be of all blocks, a norm, and modulation."""

    def __init__(self, shared=None, norm=None, modulation=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(64)
        self.own, self.shared = nn.Linear(64, 64), shared or nn.Linear(64, 64)
        self.modulation = modulation or nn.Linear(64, 128)

    def forward(self, x):
        scale, shift = self.modulation(x[:, :1]).chunk(2, -1)
        return x + self.shared(torch.relu(self.own(self.norm(x) * (1 + scale) + shift)))


class Tied(ModelMixin, ConfigMixin):
    """Blocks that share a layer, the same block twice, or a list of blocks in two places."""

    @register_to_config
    def __init__(self, tied="layer"):
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 128)
        if tied == "layer":
            self.blocks = nn.ModuleList(Block(*shared) for _ in range(3))
        elif tied == "block":
            twice = Block()
            self.blocks = nn.ModuleList([twice, Block(), twice])
        else:
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.again = self.blocks if tied == "list" else nn.ModuleList(reversed(self.blocks))

    def forward(self, x):
        for block in (*self.blocks, *getattr(self, "again", ())):
            x = block(x)
        return x


class Plain(nn.Module):
    """The same as a model of no library."""

    def __init__(self, tied="layer"):
        super().__init__()
        inner = Tied(tied)
        for name, child in inner.named_children():
            setattr(self, name, child)
        if tied == "list":
            self.again = self.blocks

    forward = Tied.forward


LAYERS = {"layer": 5, "block": 6, "list": 6, "list of the same blocks": 6}
"""How many linear layers each has."""
every_tie = pytest.mark.parametrize("tied", LAYERS)
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model):
    return model(X)


def linears(model):
    """Every place of a linear layer, and the layers themselves."""
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    return {name: model.get_submodule(name) for name in names}


def same_places(model, other):
    """Whether the layers of two models are shared alike."""

    def first_names(layers):
        first = {id(layer): name for name, layer in reversed(layers.items())}
        return {name: first[id(layer)] for name, layer in layers.items()}

    return first_names(linears(model)) == first_names(linears(other))


@every_tie
@pytest.mark.parametrize("cls", [Tied, Plain])
def test_shared_modules_are_quantized_once_and_stay_shared(cls, tied, monkeypatch):
    model, calls = cls(tied), []
    plain, original = copy.deepcopy(model), quantize.quantize_weight
    monkeypatch.setattr("orbitdit.linear.quantize_weight", lambda *args: calls.append(args) or original(*args))
    plan = orbitdit.quantize_(model, W4A4, progress=False)
    assert sum(plan.counts) == len(calls) == LAYERS[tied]
    assert same_places(model, plain)
    assert len(dict(packed_layers(model))) == LAYERS[tied]
    assert {type(layer).__name__ for layer in linears(model).values()} == {"OrbitLinear", "Int4Linear"}
    before = run(model)
    assert 0 < (before - run(plain)).norm() < 0.5 * before.norm()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_places(twin, plain)
        assert torch.equal(run(twin), before)
    dequantize_(model)
    assert same_places(model, plain)
    assert {type(layer) for layer in linears(model).values()} == {nn.Linear}


@every_tie
@pytest.mark.parametrize("cls", [Tied, Plain])
def test_states_of_models_with_shared_modules_are_loaded(cls, tied, tmp_path):
    model, other = cls(tied), cls(tied)
    for each, seed in ((model, 0), (other, 1)):
        with torch.no_grad():
            [parameter.add_(seed) for parameter in each.parameters()]
        orbitdit.quantize_(each, W4A4, progress=False)
    save_model(model, tmp_path / "model.safetensors")
    for load in (
        lambda: other.load_state_dict(model.state_dict()),
        lambda: other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda: load_model(other, tmp_path / "model.safetensors"),
    ):
        with torch.no_grad():
            [parameter.zero_() for parameter in other.parameters()]
        load()
        assert torch.equal(run(other), run(model))


def write(model, folder, kept):
    """A folder of `model` with all names of its tensors, or the first or last of each."""
    tensors = {}
    for name, tensor in sorted(model.state_dict().items(), reverse=kept == "last"):
        if kept == "all" or tensor.data_ptr() not in {t.data_ptr() for t in tensors.values()}:
            tensors[name] = tensor
    config, metadata = json.loads(model.to_json_string()), {"format": "pt"}
    if "quantization_config" in config:
        manifest = make(config, {name: tensor_hash(tensor) for name, tensor in tensors.items()})
        config["quantization_config"]["fingerprint"] = manifest["fingerprint"]
        metadata[ENTRY] = dumps(manifest)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps(config))


@every_tie
@pytest.mark.parametrize("kept", ["all", "first", "last"])
@pytest.mark.parametrize("source", ["full", "quantized"])
def test_folders_of_models_with_shared_modules_are_loaded(tied, kept, source, tmp_path):
    full = Tied(tied)
    model = copy.deepcopy(full)
    orbitdit.quantize_(model, W4A4, progress=False)
    write(full if source == "full" else model, tmp_path, kept)
    options = {"quantization_config": W4A4} if source == "full" else {}
    loaded = Tied.from_pretrained(tmp_path, **options)
    assert same_places(loaded, full)
    assert len(dict(packed_layers(loaded))) == LAYERS[tied]
    assert torch.equal(run(loaded), run(model))


@every_tie
def test_models_with_shared_modules_are_saved(tied, tmp_path):
    """Each tensor once, though safetensors takes no tensor under two names and diffusers gives it all."""
    model = Tied(tied)
    orbitdit.quantize_(model, W4A4, progress=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded = Tied.from_pretrained(tmp_path)
    assert same_places(loaded, model)
    assert torch.equal(run(loaded), run(model))
    names = {name for file in tmp_path.glob("*.safetensors") for name in read_header(file).tensors}
    assert len([name for name in names if name.endswith(".codes")]) == LAYERS[tied]


@pytest.mark.parametrize("ties", [
    {"0.attn.to_v": "0.attn.to_k"}, {"1.attn.to_v": "0.attn.to_v"}, {"1.attn.to_q": "0.attn.to_k"},
    {"1.norm1.linear": "0.norm1.linear", "1.norm2": "0.norm2"}, {"1.attn": "0.attn"}, {"1": "0"},
    {"1.ff": "0.ff_context", "0.ff": "0.ff_context"},
])  # fmt: skip
@pytest.mark.parametrize("fused", [True, False])
def test_layers_that_share_inputs_may_be_shared_themselves(ties, fused, monkeypatch):
    family = FAMILIES["flux"]
    model = family.build().bfloat16()
    for place, source in ties.items():
        parent, _, name = f"transformer_blocks.{place}".rpartition(".")
        setattr(model.get_submodule(parent), name, model.get_submodule(f"transformer_blocks.{source}"))
    plain = copy.deepcopy(model)
    orbitdit.quantize_(model, OrbitQuantConfig("w4a6", trellis_states=8), progress=False)
    assert same_places(model, plain)
    alone = copy.deepcopy(set_grid_(model, "int8"))
    disconnect(alone)
    monkeypatch.setattr("orbitdit.linear.fuses", lambda x: fused)
    found, number = counted(lambda: family.run(model))
    expected, most = counted(lambda: family.run(alone))
    assert number < most
    assert torch.equal(found, expected) or (fused and (found - expected).norm() < 0.03 * expected.norm())


def test_a_layer_is_released_when_it_is_quantized(monkeypatch):
    """The full-precision weights of a model are never all there beside the quantized ones."""
    import weakref

    model, alive = Tied("layer"), []
    references = [weakref.ref(layer) for layer in linears(model).values()]
    original = quantize.quantize_weight

    def watch(*args):
        alive.append(sum(reference() is not None for reference in references))
        return original(*args)

    monkeypatch.setattr("orbitdit.linear.quantize_weight", watch)
    orbitdit.quantize_(model, W4A4, progress=False)
    assert isinstance(model.blocks[0].own, OrbitLinear)
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] < alive[0]
    assert not any(reference() is not None for reference in references)
