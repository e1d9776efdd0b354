"""Streaming conversion: single files and fp8 as sources, the same bytes after a stop, hostile folders."""

import json
import os
import shutil
import time

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from families import FAMILIES
from orbitdit import CheckpointError, ConfigError, OrbitQuantConfig, TensorError, convert, quantize_
from orbitdit.integrations import conversion
from orbitdit.integrations.conversion import quantize_folder
from orbitdit.integrations.folders import load_model, load_pipeline, skeleton
from orbitdit.integrations.layouts import file_sources, flux_config, folder_sources, in_layout_of
from orbitdit.shapes import MODEL_DIR
from orbitdit.verify import LISTING, verify

FLUX, W4A4 = FAMILIES["flux"], OrbitQuantConfig("w4a4")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Q = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny FLUX in bf16."""
    folder = tmp_path_factory.mktemp("source") / "flux"
    nn.Module.to(FLUX.build(), torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "out"
    quantize_folder(source, folder, W4A4)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state_of(folder):
    return dict(load_model(folder).state_dict())


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edited(folder, target, **tensors):
    """A copy of `folder` with these tensors in place of its own; None drops one."""
    shutil.copytree(folder, target)
    state = {**load_file(target / WEIGHTS), **tensors}
    save_file({name: t for name, t in state.items() if t is not None}, target / WEIGHTS, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(("recipe", "elements"), [("w4a4", 1 << 20), ("w4a4", 1500), ("w2a4", 3000)])
def test_codes_are_those_of_quantizing_in_place(source, tmp_path, monkeypatch, recipe, elements):
    monkeypatch.setattr("orbitdit.quantize._BLOCK_ELEMENTS", elements)
    config = OrbitQuantConfig(recipe)
    quantize_folder(source, tmp_path / "out", config)
    model = load_model(source)
    quantize_(model, config, progress=False)
    assert same(state_of(tmp_path / "out"), dict(model.state_dict()))


def test_shards_are_those_of_save_pretrained(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_SIZE", "30KB")
    quantize_folder(source, tmp_path / "out", W4A4)
    model = load_model(source, W4A4)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    names = sorted(os.listdir(tmp_path / "saved"))
    assert len(names) > 5
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "saved"))
    index = f"{WEIGHTS}.index.json"
    maps = [json.loads((tmp_path / kind / index).read_text())["weight_map"] for kind in ("out", "saved")]
    assert maps[0] == maps[1]


BFL = {
    **{f"{part}.{layer}.weight": (24, 5) for part in ("time_in", "guidance_in") for layer in ("in_layer", "out_layer")},
    **{f"vector_in.{layer}.weight": (24, 7) for layer in ("in_layer", "out_layer")},
    "txt_in.weight": (24, 9),
    "img_in.weight": (3072, 8),
    "final_layer.linear.weight": (8, 2),
    "final_layer.adaLN_modulation.1.weight": (10, 2),
    **{f"double_blocks.0.{s}_mod.lin.weight": (36, 2) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_attn.qkv.weight": (36, 2) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_attn.proj.weight": (12, 2) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_mlp.{i}.weight": (12, 2) for s in ("img", "txt") for i in (0, 2)},
    "single_blocks.0.linear1.weight": (21504, 2),
    "single_blocks.0.linear2.weight": (12, 3),
    "single_blocks.0.modulation.lin.weight": (36, 2),
}
"""A FLUX of its makers with one block of each kind: rows as diffusers' converter needs them, few columns."""
NORMS = [f"double_blocks.0.{s}_attn.norm.{qk}_norm.scale" for s in ("img", "txt") for qk in ("query", "key")]
NORMS += [f"single_blocks.0.norm.{qk}_norm.scale" for qk in ("query", "key")]


def bfl_checkpoint():
    generator = torch.Generator().manual_seed(0)
    shapes = BFL | {name.replace(".weight", ".bias"): shape[:1] for name, shape in BFL.items()}
    shapes |= dict.fromkeys(NORMS, (128,))
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_layout_of_flux_is_followed_as_diffusers_does(tmp_path, prefix):
    """Also where the file of ComfyUI has text encoders beside."""
    state = {prefix + name: tensor for name, tensor in bfl_checkpoint().items()}
    others = {"text_encoders.t5.weight": torch.ones(3), "vae.x": torch.ones(2)} if prefix else {}
    save_file(state | others, tmp_path / "flux.safetensors")
    model = FLUX.build()
    found = in_layout_of(model, file_sources(tmp_path / "flux.safetensors"), tmp_path / "flux.safetensors")
    converter = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]["checkpoint_mapping_fn"]
    right = converter(checkpoint=bfl_checkpoint())
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(found[name].read(0, found[name].rows), tensor), name
        assert found[name].shape == tuple(tensor.shape)
    q, mlp = found["single_transformer_blocks.0.attn.to_k.weight"], found["norm_out.linear.weight"]
    assert torch.equal(q.read(5, 9), right["single_transformer_blocks.0.attn.to_k.weight"][5:9])
    assert torch.equal(mlp.read(3, 8), right["norm_out.linear.weight"][3:8])  # over the seam of two halves


def test_what_flux_a_file_holds_is_told_by_its_shapes(tmp_path):
    save_file(bfl_checkpoint(), tmp_path / "flux.safetensors")
    assert flux_config(file_sources(tmp_path / "flux.safetensors")) == {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": None,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 9,
        "pooled_projection_dim": 7,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }


@pytest.mark.parametrize("change", ["foreign", "missing", "not rows"])
def test_layouts_that_do_not_fit(tmp_path, monkeypatch, change):
    state = bfl_checkpoint()
    if change == "foreign":
        state["double_blocks.0.extra.weight"] = torch.ones(2, 2)
    elif change == "missing":
        del state["single_blocks.0.linear2.bias"]
    else:
        converters = {"FluxTransformer2DModel": {"checkpoint_mapping_fn": lambda checkpoint, config: {"x": 1.5}}}
        monkeypatch.setattr("orbitdit.integrations.layouts.SINGLE_FILE_LOADABLE_CLASSES", converters)
    save_file(state, tmp_path / "flux.safetensors")
    reason = {"foreign": "extra", "missing": "no layout that diffusers knows", "not rows": "cannot be followed"}[change]
    with pytest.raises(CheckpointError, match=reason):
        in_layout_of(FLUX.build(), file_sources(tmp_path / "flux.safetensors"), tmp_path / "flux.safetensors")


def test_a_single_file_is_the_same_as_its_folder(source, expected, tmp_path):
    """In diffusers' layout, which does not say of which model it is."""
    shutil.copy(source / WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not say what model it is: name a folder with"):
        quantize_folder(tmp_path / "model.safetensors", tmp_path / "out", W4A4)
    quantize_folder(tmp_path / "model.safetensors", tmp_path / "out", W4A4, layout=source)
    assert same(state_of(tmp_path / "out"), state_of(expected))
    with pytest.raises(ConfigError, match="--config has no effect"):
        quantize_folder(source, tmp_path / "again", W4A4, layout=source)


def in_fp8(state, scaled):
    """The linear weights of blocks in fp8, with scales in one of three ways, or without."""
    found = dict(state)
    for i, (name, tensor) in enumerate(state.items()):
        if tensor.dim() != 2 or "blocks" not in name:
            continue
        scale = tensor.float().abs().amax() / 400 if scaled else torch.tensor(1.0)
        if scaled and i % 3 == 0:
            scale = tensor.float().abs().amax(1, keepdim=True) / 400
        found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        if scaled:
            suffix = "scale_weight" if i % 2 else "weight_scale"
            found[name.replace(".weight", f".{suffix}")] = scale
            found[name.replace(".weight", ".scale_input")] = torch.ones(())
    return found | ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {})


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_weights_count_times_their_scales(source, tmp_path, scaled):
    """Codes are those of the numbers that the file stands for, which fp32 holds here nearly and fp64 exactly."""
    state = in_fp8(load_file(source / WEIGHTS), scaled)
    shutil.copytree(source, tmp_path / "fp8")
    save_file(state, tmp_path / "fp8" / WEIGHTS, metadata={"format": "pt"})
    quantize_folder(tmp_path / "fp8", tmp_path / "out", W4A4)
    model = load_model(source)
    for name, parameter in model.named_parameters():
        stored = state[name].double()
        for suffix in ("scale_weight", "weight_scale"):
            stored = stored * state.get(name.replace(".weight", f".{suffix}"), torch.tensor(1.0)).double()
        parameter.data = stored if state[name].element_size() == 1 else state[name]
    quantize_(model, W4A4, progress=False)
    assert same(state_of(tmp_path / "out"), dict(model.state_dict()))


def test_fp8_folders_load_through_diffusers_too(source, tmp_path):
    state = in_fp8(load_file(source / WEIGHTS), False)
    shutil.copytree(source, tmp_path / "fp8")
    save_file(state, tmp_path / "fp8" / WEIGHTS, metadata={"format": "pt"})
    quantize_folder(tmp_path / "fp8", tmp_path / "out", W4A4)
    assert same(state_of(tmp_path / "out"), dict(load_model(tmp_path / "fp8", W4A4).state_dict()))


SCALE = Q.replace(".weight", ".scale_weight")
BAD_SCALES = {
    "NaN": ({SCALE: torch.tensor(float("nan"))}, "is NaN, Inf or not positive"),
    "negative": ({SCALE: torch.tensor(-1.0)}, "is NaN, Inf or not positive"),
    "of blocks": ({SCALE: torch.ones(4, 4)}, "a scale has one number, or one a row"),
    "integer": ({SCALE: torch.ones((), dtype=torch.int32)}, "a scale has one number, or one a row"),
    "of no weight": ({"gone.scale_weight": torch.tensor(1.0)}, "has a scale of 'gone.weight', which is not there"),
    "of four bits": (
        {Q.replace(".weight", ".comfy_quant"): torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
        "is quantized to nvfp4",
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_are_none(source, tmp_path, case):
    tensors, reason = BAD_SCALES[case]
    folder = edited(source, tmp_path / "bad", **tensors)
    with pytest.raises(CheckpointError, match=reason):
        quantize_folder(folder, tmp_path / "out", W4A4)
    assert os.listdir(tmp_path) == ["bad"]


BAD = {
    "missing": ({Q: None}, CheckpointError, f"has no tensor '{Q}'"),
    "foreign": ({"x": torch.ones(2)}, CheckpointError, "has the tensor 'x', and its configuration has no place for it"),
    "of another shape": ({"proj_out.bias": torch.ones(2)}, CheckpointError, "'proj_out.bias' has shape"),
    "of integers": ({Q: torch.ones(64, 64, dtype=torch.int8)}, TensorError, f"{Q}: a floating-point matrix is needed"),
    "NaN": ({Q: torch.full((64, 64), torch.nan)}, TensorError, f"{Q} holds NaN or Inf"),
    "NaN, kept": ({"x_embedder.bias": torch.full((64,), torch.inf)}, TensorError, "x_embedder.bias holds NaN or Inf"),
    "overflowing": ({Q: torch.full((64, 64), 3e38)}, TensorError, f"{Q} has rows that are too large or too small"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_cannot_be_converted_are_named(source, tmp_path, case):
    tensors, error, reason = BAD[case]
    folder = edited(source, tmp_path / "bad", **tensors)
    with pytest.raises(error) as caught:
        quantize_folder(folder, tmp_path / "out", W4A4)
    assert reason in str(caught.value)
    assert os.listdir(tmp_path) == ["bad"]


def stopped(monkeypatch, source, target, share, resume=True):
    """Convert, stopped once this share of the source's bytes is done."""
    done, after = 0, share * (source / WEIGHTS).stat().st_size

    def count(n):
        nonlocal done
        done += n
        if done > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = conversion.convert
        patch.setattr(
            conversion, "convert", lambda job, folder, device, _, journal: real(job, folder, device, count, journal)
        )
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(source, target, W4A4, resume=resume)


@pytest.mark.parametrize("share", [0, 0.4, 0.9])
def test_resuming_gives_the_same_bytes_with_what_is_left_to_do(source, expected, tmp_path, monkeypatch, share):
    stopped(monkeypatch, source, tmp_path / "out", share)
    assert sorted(os.listdir(tmp_path)) == [".out.orbitdit-lock", ".out.orbitdit-partial"]
    encoded = []
    real = convert.encoder
    monkeypatch.setattr(convert, "encoder", lambda spec, *rest: encoded.append(spec) or real(spec, *rest))
    quantize_folder(source, tmp_path / "out", W4A4, resume=True)
    assert contents(tmp_path / "out") == contents(expected)
    assert os.listdir(tmp_path) == ["out"]
    total = len(load_model(expected).config.quantization_config.layers)
    assert len(encoded) == total if share == 0 else len(encoded) < total


def test_what_was_damaged_since_is_made_again(source, expected, tmp_path, monkeypatch):
    """As after a loss of power: the journal was written, and what it speaks of was not."""
    stopped(monkeypatch, source, tmp_path / "out", 0.9)
    file = tmp_path / ".out.orbitdit-partial" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    quantize_folder(source, tmp_path / "out", W4A4, resume=True)
    assert contents(tmp_path / "out") == contents(expected)


def test_another_source_or_configuration_is_not_resumed(source, expected, tmp_path, monkeypatch):
    copy = shutil.copytree(source, tmp_path / "flux")
    stopped(monkeypatch, copy, tmp_path / "out", 0.4)
    with pytest.raises(CheckpointError, match="run without --resume"):
        quantize_folder(copy, tmp_path / "out", OrbitQuantConfig("w3a3"), resume=True)
    os.utime(copy / WEIGHTS, (time.time() + 9, time.time() + 9))
    with pytest.raises(CheckpointError, match="run without --resume"):
        quantize_folder(copy, tmp_path / "out", W4A4, resume=True)
    quantize_folder(copy, tmp_path / "out", W4A4)
    assert contents(tmp_path / "out") == contents(expected)
    assert sorted(os.listdir(tmp_path)) == ["flux", "out"]


def test_progress_counts_all_bytes(source, tmp_path, monkeypatch):
    told = []
    real = conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda j, f, d, _, journal: real(j, f, d, told.append, journal))
    quantize_folder(source, tmp_path / "out", W4A4)
    assert sum(told) == sum(found.nbytes for found in folder_sources(source).values())


def test_too_little_space_is_said_before_anything_is_made(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"takes 0\.\d MB, and the disk has 0\.0 MB: free some space"):
        quantize_folder(source, tmp_path / "out", W4A4)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipe"
    shutil.copytree(MODEL_DIR, folder)
    return folder


def test_a_pipeline_without_text_encoders(pipeline, tmp_path):
    """As ComfyUI's users have it: the index names one, and its folder is not there."""
    shutil.rmtree(pipeline / "text_encoder")
    quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "model_index.json",
        LISTING,
        "scheduler",
        "transformer",
    ]


def test_what_is_copied(pipeline, tmp_path):
    for name in (".git/config", "scheduler/evil.py", "scheduler/.hidden.json", "text_encoder/old.bin", "assets/a.txt"):
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_text("x")
    for name in ("LICENSE", "evil.py", "weights.safetensors", "run.sh", ".env"):
        (pipeline / name).write_text("x")
    os.mkfifo(pipeline / "scheduler" / "pipe.json")
    quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert sorted(contents(tmp_path / "out")) == sorted({*contents(MODEL_DIR), "LICENSE", LISTING})


@pytest.mark.parametrize("name", ["/etc", "..", "../pipe2", "a/b", "a\\b", "C:x", "", ".", "a\0b", "x" * 300, "a\nb"])
def test_names_of_components_are_no_paths(pipeline, tmp_path, name):
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "X"]}))
    with pytest.raises(CheckpointError, match="which is no plain name"):
        quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "a\0.safetensors", "x" * 300])
def test_names_of_shards_are_no_paths(source, tmp_path, shard):
    shutil.copytree(source, tmp_path / "flux")
    (tmp_path / "secret.safetensors").write_bytes((source / WEIGHTS).read_bytes())
    (tmp_path / "flux" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="which is no plain name"):
        quantize_folder(tmp_path / "flux", tmp_path / "out", W4A4)


LINKS = {
    "a file outside": ("text_encoder/secret.json", "../../secret.json", "leads out of"),
    "a folder outside": ("text_encoder/more", "../../outside", "leads out of"),
    "weights outside": (f"transformer/{WEIGHTS}", "../../secret.safetensors", "leads out of"),
    "a loop": ("text_encoder/loop.json", "loop.json", "leads nowhere"),
    "nothing": ("text_encoder/gone.json", "nowhere", "leads nowhere"),
    "a folder inside": ("text_encoder/scheduler", "../scheduler", "is a link to a folder"),
    "the top": ("secret.json", "../secret.json", "leads out of"),
    "a configuration": ("transformer/config.json", "../../secret.json", "leads out of"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_out_of_the_folder_are_refused(pipeline, tmp_path, case):
    link, goal, reason = LINKS[case]
    (tmp_path / "outside").mkdir()
    shutil.copy(pipeline / "transformer" / "config.json", tmp_path / "secret.json")
    shutil.copy(pipeline / "transformer" / WEIGHTS, tmp_path / "secret.safetensors")
    (pipeline / link).unlink(missing_ok=True)
    (pipeline / link).symlink_to(goal)
    with pytest.raises(CheckpointError, match=reason):
        quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(pipeline, tmp_path):
    """snapshots/REVISION/FILE -> ../../blobs/HASH, and nowhere else."""
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = shutil.copytree(pipeline, repository / "snapshots" / "0123")
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(i), path.parent))
    quantize_folder(snapshot, tmp_path / "out", W4A4)
    assert not any(finding.problem for finding in verify(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == sorted({*contents(MODEL_DIR), LISTING})
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    shutil.copy(repository / "blobs" / "0", tmp_path / "secret.md")
    (snapshot / "secret.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(CheckpointError, match="leads out of"):
        quantize_folder(snapshot, tmp_path / "again", W4A4)


def test_components_whose_weights_are_pickles(pipeline, tmp_path):
    weights = pipeline / "text_encoder" / WEIGHTS
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        quantize_folder(pipeline, tmp_path / "out", W4A4)


def test_too_many_layers_are_refused_at_once(source, tmp_path):
    shutil.copytree(source, tmp_path / "flux")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "flux" / "config.json").write_text(json.dumps({**config, "num_layers": 10**5}))
    made = 0

    def count(*_):
        nonlocal made
        made += 1

    handle = register_module_parameter_registration_hook(count)
    for function in (skeleton, load_model):
        with pytest.raises(CheckpointError, match="more than 10,000 tensors"):
            function(tmp_path / "flux")
    handle.remove()
    assert made < 2 * 10_002  # of three million


@pytest.mark.parametrize("library", ["evil", "os", 5, {}])
def test_no_code_of_a_folder_is_imported(pipeline, tmp_path, monkeypatch, library):
    """diffusers imports the library that the index names, whatever it is."""
    (tmp_path / "evil.py").write_text("raise SystemExit('evil code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "scheduler": [library, "Scheduler"]}))
    with pytest.raises(CheckpointError, match="is of the library"):
        load_pipeline(pipeline, torch.float32)


@pytest.mark.parametrize("value", [[], ["x"], {}, 5, None])
@pytest.mark.parametrize("key", ["_class_name", "world"])
def test_lists_where_strings_belong(pipeline, key, value):
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(CheckpointError):
        load_pipeline(pipeline, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_make_no_sense_are_refused_when_loading(expected, value):
    """Those of a state that says nothing of itself; in files the hash finds them first."""
    model = load_model(expected)
    name = "transformer_blocks.0.attn.to_q.scales"
    state = dict(model.state_dict())
    state[name] = state[name].clone()
    state[name][3] = value
    with pytest.raises(TensorError, match=f"^{name} holds scales that are NaN, Inf or negative"):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ["x_embedder.weight", "transformer_blocks.0.attn.to_q.bias"])
def test_what_is_kept_is_finite_when_quantizing_while_loading(source, tmp_path, name):
    spoiled = load_file(source / WEIGHTS)[name]
    spoiled.view(-1)[0] = float("nan")
    folder = edited(source, tmp_path / "bad", **{name: spoiled})
    with pytest.raises(TensorError, match=f"^{name} holds NaN or Inf"):
        load_model(folder, W4A4)
