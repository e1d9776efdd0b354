"""Saved models are loaded as they were or not at all, in every way there is, and `verify` says what is wrong."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

import orbitdit
from families import FAMILIES
from orbitdit import CheckpointError, ConfigError, ModelError, OrbitQuantConfig, TensorError
from orbitdit.integrations.conversion import quantize_folder
from orbitdit.integrations.diffusers import check_complete
from orbitdit.integrations.folders import load_model, load_pipeline
from orbitdit.integrations.single_file import load_file, save_file
from orbitdit.manifest import ENTRY, loads, read_header
from orbitdit.model import packed_layers
from orbitdit.shapes import MODEL_DIR
from orbitdit.verify import LISTING, check_listing, describe, verify, write_listing

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of diffusers, with disable_mmap
FLUX = FAMILIES["flux"]
W4A4 = OrbitQuantConfig("w4a4")
WEIGHTS = "diffusion_pytorch_model.safetensors"
BF16 = {"dtype": torch.bfloat16}


def quantized(config=W4A4):
    model = nn.Module.to(FLUX.build(), torch.bfloat16)
    orbitdit.quantize_(model, config, progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    return quantized()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A quantized FLUX in a folder, in shards, as a variant, as one file, and with other rotations."""
    base = tmp_path_factory.mktemp("saved")
    model.save_pretrained(base / "folder")
    model.save_pretrained(base / "shards", max_shard_size="50KB")
    model.save_pretrained(base / "variant", max_shard_size="50KB", variant="fp16")
    quantized(OrbitQuantConfig("w4a4", seed=1)).save_pretrained(base / "reseeded", max_shard_size="50KB")
    (base / "file").mkdir()
    save_file(model, base / "file" / WEIGHTS)
    return base


def in_threads(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
        return FLUX.cls.from_pretrained(folder, **BF16)


WAYS = {
    "from_pretrained": ("folder", lambda f: FLUX.cls.from_pretrained(f, **BF16)),
    "sharded": ("shards", lambda f: FLUX.cls.from_pretrained(f, **BF16)),
    "copied": ("shards", lambda f: FLUX.cls.from_pretrained(f, disable_mmap=True, **BF16)),
    "in threads": ("shards", in_threads),
    "variant": ("variant", lambda f: FLUX.cls.from_pretrained(f, variant="fp16", **BF16)),
    "AutoModel": ("shards", lambda f: diffusers.AutoModel.from_pretrained(str(f), **BF16)),
    "device_map": ("shards", lambda f: FLUX.cls.from_pretrained(f, device_map="cpu", **BF16)),
    "from_single_file": ("file", lambda f: FLUX.cls.from_single_file(str(f / WEIGHTS), **BF16)),
    "from_single_file of a folder's": ("folder", lambda f: FLUX.cls.from_single_file(f / WEIGHTS, **BF16)),
    "load_file": ("file", lambda f: load_file(f / WEIGHTS)),
    "load_file, copied": ("file", lambda f: load_file(f / WEIGHTS, disable_mmap=True)),
    "load_model": ("shards", load_model),
    "load_model of a file": ("file", lambda f: load_model(f / WEIGHTS)),
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def copy_of(saved, tmp_path):
    return lambda kind: Path(shutil.copytree(saved / kind, tmp_path / kind))


def refusal(function, *args, kind=CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def problems(path):
    found = [finding.problem for finding in verify(path) if finding.problem]
    assert all("\n" not in problem for problem in found)
    return found


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@every_way
def test_models_are_loaded_as_they_were(model, saved, way):
    kind, load = WAYS[way]
    loaded = load(saved / kind)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in state)
    assert torch.equal(FLUX.run(loaded), FLUX.run(model))
    assert not loaded.training
    assert problems(saved / kind if kind != "file" else saved / kind / WEIGHTS) == []


@every_way
@pytest.mark.parametrize("part", ["codes", "scales", "bias", "proj_out.weight"])
def test_a_flipped_bit_of_any_tensor_is_refused(copy_of, way, part):
    """Of codes, scales and biases, and of layers that are kept."""
    kind, load = WAYS[way]
    folder = copy_of(kind)
    file, name, at = next(
        (file, name, last - 1)
        for file in sorted(folder.glob("*.safetensors"))
        for name, (_, _, _, last) in read_header(file).tensors.items()
        if name.endswith(part)
    )
    flip(file, at)
    assert f"the tensor {name!r} is not what was saved" in refusal(load, folder)
    (problem,) = problems(folder if kind != "file" else folder / WEIGHTS)
    assert problem.startswith(f"{file}: the tensor {name!r}")


@every_way
def test_the_check_of_tensors_can_be_left_out(copy_of, way):
    """By name; configurations and names of tensors are compared all the same."""
    kind, load = WAYS[way]
    folder = copy_of(kind)
    file = sorted(folder.glob("*.safetensors"))[0]
    flip(file, read_header(file).end - 1)
    with orbitdit.unverified():
        load(folder)
    refusal(load, folder)
    if (folder / "config.json").exists() and "from_single_file" not in way:
        edit(folder / "config.json", lambda c: c.update(guidance_embeds=not c["guidance_embeds"]))
        with orbitdit.unverified():
            assert "guidance_embeds" in refusal(load, folder)


@pytest.mark.parametrize("load", [FLUX.cls.from_pretrained, load_model, problems])
@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_shard_of_another_save_is_refused(copy_of, saved, load, number):
    """Of the same model with other rotations: same names, shapes and sizes."""
    folder = copy_of("shards")
    name = sorted(path.name for path in folder.glob("*.safetensors"))[number]
    assert (folder / name).stat().st_size == (saved / "reseeded" / name).stat().st_size
    shutil.copy(saved / "reseeded" / name, folder / name)
    message = problems(folder)[0] if load is problems else refusal(load, folder)
    assert "belongs to another save" in message


@pytest.mark.parametrize("load", [FLUX.cls.from_pretrained, load_model, problems])
def test_a_whole_file_of_another_model_is_refused(copy_of, model, load, tmp_path):
    """It is sound in itself; config.json has the fingerprint of the one that was saved."""
    folder, other = copy_of("folder"), copy.deepcopy(model)
    with torch.no_grad():
        other.proj_out.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    message = problems(folder)[0] if load is problems else refusal(load, folder)
    assert "config.json belongs to another save" in message


def test_a_save_that_stopped_after_the_configuration_is_refused(copy_of, monkeypatch):
    folder, other = copy_of("shards"), quantized(OrbitQuantConfig("w4a4"))
    with torch.no_grad():
        other.proj_out.weight[0, 0] += 1

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(folder, max_shard_size="50KB")
    refusal(FLUX.cls.from_pretrained, folder)
    assert other.hf_quantizer.prepared is None
    assert other.config["quantization_config"].fingerprint == ""


def rewrite(folder, change, keep_metadata=True):
    """Write the file anew with other tensors, perhaps without the manifest."""
    metadata = read_header(folder / WEIGHTS).metadata
    tensors = {name: tensor.clone() for name, tensor in load_tensors(folder / WEIGHTS).items()}
    change(tensors)
    save_tensors(tensors, folder / WEIGHTS, metadata if keep_metadata else {"format": "pt"})


TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("load", [FLUX.cls.from_pretrained, load_model, lambda f: load_file(f / WEIGHTS)])
@pytest.mark.parametrize(
    ("change", "told", "kind"),
    [
        (lambda t: t.pop("proj_out.bias"), "lacks the tensor 'proj_out.bias'", CheckpointError),
        (lambda t: t.pop(f"{TO_Q}.spec"), f"lacks the tensor '{TO_Q}.spec'", CheckpointError),
        (
            lambda t: t.update({"x_embedder.codes": torch.zeros(3)}),
            "foreign tensor 'x_embedder.codes'",
            CheckpointError,
        ),
        (
            lambda t: t.update({"proj_out.bias": t["proj_out.bias"][None]}),
            "proj_out.bias has shape (1, 8)",
            TensorError,
        ),
        (lambda t: t.update({"proj_out.bias": t["proj_out.bias"].half()}), "'proj_out.bias' is not", CheckpointError),
        (lambda t: t[f"{TO_Q}.spec"].fill_(32), f"'{TO_Q}.spec' is not", CheckpointError),
    ],
)
def test_other_tensors_are_named(copy_of, load, change, told, kind):
    folder = copy_of("folder")
    rewrite(folder, change)
    assert told in refusal(load, folder, kind=kind)
    assert len(problems(folder)) == 1


def test_an_index_that_diffusers_cannot_read_is_found(copy_of):
    folder = copy_of("shards")
    edit(folder / f"{WEIGHTS}.index.json", lambda values: values.pop("metadata"))
    assert "has no metadata" in refusal(load_model, folder)
    assert "has no metadata" in problems(folder)[0]


@pytest.mark.parametrize("load", [FLUX.cls.from_pretrained, load_model, lambda f: load_file(f / WEIGHTS)])
def test_files_of_version_5_without_a_manifest_are_refused(copy_of, load):
    folder = copy_of("folder")
    rewrite(folder, lambda t: None, keep_metadata=False)
    assert "has no manifest" in refusal(load, folder)
    assert "has no manifest" in problems(folder)[0]
    assert "has no manifest" in refusal(FLUX.cls.from_single_file, folder / WEIGHTS)


def test_a_shard_that_lacks_what_the_index_names_is_refused(saved, tmp_path):
    """Without manifests: full-precision models that are quantized while they are loaded."""
    FLUX.build().save_pretrained(tmp_path, max_shard_size="200KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_tensors(file)
    name = sorted(tensors)[0]
    save_tensors({key: t for key, t in tensors.items() if key != name}, file, {"format": "pt"})
    message = refusal(lambda: FLUX.cls.from_pretrained(tmp_path, quantization_config=W4A4))
    assert f"lacks the tensor {name!r} that its index names" in message


def test_no_tensor_stays_without_values(model):
    check_complete(model)
    broken = copy.deepcopy(model)
    broken.proj_out.bias = nn.Parameter(torch.empty(8, device="meta"))
    assert "'proj_out.bias'" in refusal(check_complete, broken)


def test_every_key_of_the_configuration_is_compared(copy_of):
    folder = copy_of("folder")
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    for key, value in config.items():
        if key in ("_class_name", "_diffusers_version", "quantization_config"):
            continue
        other = not value if isinstance(value, bool) else [2, 2, 12] if isinstance(value, list) else (value or 1) + 1
        (folder / "config.json").write_text(json.dumps({**config, key: other}))
        with pytest.raises((CheckpointError, ConfigError, TensorError)):
            FLUX.cls.from_pretrained(folder)
        assert f"config.json: {key} is" in refusal(load_model, folder)
    for key in config["quantization_config"]:
        spoiled = {name: v for name, v in config["quantization_config"].items() if name != key}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": spoiled}))
        assert len(problems(folder)) == 1
    (folder / "config.json").write_text(text)
    assert problems(folder) == []


def test_a_newer_format_asks_for_an_upgrade(copy_of):
    folder = copy_of("folder")
    edit(folder / "config.json", lambda c: c["quantization_config"].update(format_version=6))
    assert "upgrade orbitdit" in refusal(FLUX.cls.from_pretrained, folder, kind=ConfigError)


def test_copies_are_saved_as_what_they_are(model, tmp_path):
    """A copy's quantizer belongs to the copy: its configuration is saved, not that of the original."""
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        twin.register_to_config(_name_or_path=f"org/twin{number}")
        twin.save_pretrained(tmp_path / str(number))
        manifest = loads(read_header(tmp_path / str(number) / WEIGHTS).metadata[ENTRY], "")
        assert manifest["source"] == {"model": f"org/twin{number}", "revision": None}
        assert problems(tmp_path / str(number)) == []


def test_where_a_model_came_from_travels_on(model, tmp_path):
    first = copy.deepcopy(model)
    first.register_to_config(_name_or_path="/cache/models--org--name/snapshots/0123abc/transformer")
    first.save_pretrained(tmp_path / "a")
    FLUX.cls.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    (told,) = describe(tmp_path / "b")
    assert told["source"] == "org/name @ 0123abc"


def test_pickles_and_other_models_are_not_saved(model, tmp_path):
    refusal(lambda: model.save_pretrained(tmp_path / "new", safe_serialization=False))
    assert not (tmp_path / "new").exists()
    refusal(save_file, FLUX.build(), tmp_path / "x.safetensors", kind=ModelError)
    refusal(save_file, model, tmp_path / "gone" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_not_saved_with_their_model(saved, tmp_path):
    """Of a model that was loaded, and of one that was quantized in place."""
    config = LoraConfig(r=2, target_modules=["to_q"])
    loaded, own = FLUX.cls.from_pretrained(saved / "folder"), FLUX.build()
    orbitdit.quantize_(own, OrbitQuantConfig("w4a4"), progress=False)
    for adapted in (loaded, own):
        adapted.add_adapter(config)
        assert "adapters" in refusal(lambda model=adapted: model.save_pretrained(tmp_path / "new"))
        assert "adapters" in refusal(save_file, adapted, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_one_file_is_the_same_as_a_folders(saved, tmp_path):
    assert (saved / "file" / WEIGHTS).read_bytes() == (saved / "folder" / WEIGHTS).read_bytes()
    again = load_file(saved / "file" / WEIGHTS, torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32, torch.bfloat16, torch.uint8}
    save_file(load_file(saved / "file" / WEIGHTS), tmp_path / WEIGHTS)
    assert (tmp_path / WEIGHTS).read_bytes() == (saved / "file" / WEIGHTS).read_bytes()


def test_from_single_file_says_what_a_file_is(saved, copy_of):
    file = saved / "file" / WEIGHTS
    message = refusal(diffusers.SD3Transformer2DModel.from_single_file, file)
    assert "FluxTransformer2DModel, not a SD3Transformer2DModel" in message
    assert "original_config" in refusal(lambda: FLUX.cls.from_single_file(file, original_config={"a": 1}))
    with pytest.warns(UserWarning, match="quantized already"):
        FLUX.cls.from_single_file(file, quantization_config=W4A4)
    shard = sorted((saved / "shards").glob("*.safetensors"))[0]
    assert "lacks the tensor" in refusal(FLUX.cls.from_single_file, shard)


def test_older_models_load_and_are_told_apart(copy_of, model):
    folder = copy_of("folder")
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith(".spec")], keep_metadata=False)

    def older(config):
        del config["quantization_config"]["layers"], config["quantization_config"]["fingerprint"]
        config["quantization_config"]["format_version"] = 4

    edit(folder / "config.json", older)
    loaded = load_model(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    (finding,) = verify(folder)
    assert finding.problem == ""
    assert "format version 4 has no hashes" in finding.note


def test_the_golden_model_of_version_5_loads():
    """A file that this version wrote: its hashes, codes and fingerprint are the format's."""
    folder = Path(__file__).parent / "golden" / "version-5-w2a4"
    loaded = FLUX.cls.from_pretrained(folder, **BF16)
    expected = json.loads((folder / "plan.json").read_text())
    assert {name: layer.spec.key for name, layer in packed_layers(loaded)} == {
        name: key for name, key in expected.items() if "kept" not in key
    }
    (finding,) = verify(folder)
    assert finding.note.endswith("fingerprint 42ac764f2febb8fc883acb988f032933")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "quantized"
    quantize_folder(MODEL_DIR, folder, W4A4)
    return folder


def test_pipelines_have_a_listing_of_their_other_files(pipeline):
    assert problems(pipeline) == []
    files = json.loads((pipeline / LISTING).read_text())["files"]
    assert {"model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"} <= set(files)
    assert f"transformer/{WEIGHTS}" not in files
    assert "README.md" not in files
    load_pipeline(pipeline, torch.float32)


def damage_scheduler(folder):
    edit(folder / "scheduler" / "scheduler_config.json", lambda c: c.update(shift=7.0))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_scheduler, "scheduler_config.json is not what was saved"),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), "text_encoder/config.json is missing"),
        (lambda f: (f / "scheduler" / "more.json").write_text("{}"), "more.json is foreign"),
        (lambda f: edit(f / LISTING, lambda v: v["files"].pop("model_index.json")), f"{LISTING} is damaged"),
        (lambda f: edit(f / LISTING, lambda v: v.update(format_version=6)), "upgrade orbitdit"),
        (lambda f: flip(f / "transformer" / WEIGHTS, -1), "is not what was saved"),
    ],
)
def test_damaged_pipelines_are_refused_by_the_own_loader(pipeline, tmp_path, damage, told):
    folder = Path(shutil.copytree(pipeline, tmp_path / "damaged"))
    damage(folder)
    assert told in refusal(load_pipeline, folder, torch.float32)
    assert any(told in problem for problem in problems(folder))


def test_texts_for_people_may_change(pipeline, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "edited"))
    (folder / "README.md").write_text("a new card")
    (folder / ".gitattributes").write_text("x")
    assert problems(folder) == []
    write_listing(folder)
    assert check_listing(folder) > 3


def test_nothing_to_verify(tmp_path):
    assert "does not exist" in refusal(lambda: list(verify(tmp_path / "gone")))
    FLUX.build().save_pretrained(tmp_path / "plain")
    assert "nothing to verify" in refusal(lambda: list(verify(tmp_path / "plain")))
    assert "no model that orbitdit quantized" in refusal(lambda: list(describe(tmp_path / "plain")))


def test_what_is_inside(saved):
    for path in (saved / "shards", saved / "file" / WEIGHTS):
        (told,) = describe(path)
        assert told["layers"] == "6 x int4 a16, 34 x scalar4.unbiased a4"
        assert told["format version"] == 5
        assert len(told["fingerprint"]) == 32
