"""Files and folders, good and bad: reading them, quantizing them, and leaving nothing behind on failure."""

import json
import os
import shutil
import socket

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from families import FAMILIES
from orbitdit import (
    CheckpointError,
    DependencyError,
    ModelError,
    OrbitQuantConfig,
    TensorError,
    plan,
    quantize_,
)
from orbitdit.atomic import new_folder
from orbitdit.checkpoint import (
    check_file,
    check_folder,
    find_model,
    packed_layers_in,
    read_json,
    stored_dtype,
)
from orbitdit.integrations.conversion import quantize_folder
from orbitdit.integrations.folders import load_model, load_pipeline, skeleton, transformers_in
from orbitdit.manifest import ENTRY, read_header
from orbitdit.shapes import MODEL_DIR
from orbitdit.verify import LISTING

FLUX = FAMILIES["flux"]
W4A4 = OrbitQuantConfig("w4a4")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network was used\nand a long explanation")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Flux as it is, in shards, and quantized."""
    base = tmp_path_factory.mktemp("saved")
    model = nn.Module.to(FLUX.build(), torch.bfloat16)
    model.save_pretrained(base / "plain")
    model.save_pretrained(base / "sharded", max_shard_size="200KB")
    quantize_(model, W4A4, progress=False)
    model.save_pretrained(base / "quantized")
    return base


@pytest.fixture
def copy_of(saved, tmp_path):
    return lambda kind: shutil.copytree(saved / kind, tmp_path / kind)


@pytest.fixture
def pipeline(saved, tmp_path):
    """A pipeline folder with two transformers and components of every kind."""
    folder = tmp_path / "pipeline"
    shutil.copytree(saved / "plain", folder / "transformer")
    shutil.copytree(saved / "sharded", folder / "transformer_2")
    names = ("transformer", "transformer_2", "transformer_3", "vae", "tokenizer")
    parts = {name: ["diffusers", "Any"] for name in names}
    (folder / "vae" / "deep").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "vae" / "config.json").write_text('{"a":  1}')
    save_file({"x": torch.ones(3)}, folder / "vae" / "deep" / "weights.safetensors")
    (folder / "tokenizer" / "merges.txt").write_bytes("é\r\n".encode())
    (folder / "README.md").write_text("hello")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    return folder


def refusal(kind, function, *args) -> str:
    """The one-line message of the error that the call raises."""
    with pytest.raises(kind) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_model(folder, other):
    """File by file; only the configuration and the manifest may also say where the model came from."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other)) == ["config.json", WEIGHTS]
    headers = [read_header(path / WEIGHTS) for path in (folder, other)]
    data = [(path / WEIGHTS).read_bytes()[-data_size(read_header(path / WEIGHTS)) :] for path in (folder, other)]
    assert data[0] == data[1]
    assert places_in(headers[0]) == places_in(headers[1])
    manifests = [json.loads(header.metadata[ENTRY]) for header in headers]
    for manifest in manifests:
        del manifest["source"], manifest["fingerprint"]
    assert manifests[0] == manifests[1]
    configs = [read_json(path / "config.json") for path in (folder, other)]
    for config in configs:
        del config["quantization_config"]["fingerprint"]
    assert [{k: v for k, v in config.items() if k != "_name_or_path"} for config in configs] == [configs[1]] * 2


def places_in(header):
    begin = header.end - data_size(header)
    return {name: (dtype, shape, first - begin) for name, (dtype, shape, first, _) in header.tensors.items()}


def data_size(header):
    return header.end - min(first for _, _, first, _ in header.tensors.values())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def change(folder, name, spoiled):
    """Replace a tensor in `folder`, or drop it. Quantized models become what version 4 wrote: without a manifest."""
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if not key.endswith(".spec")}
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        del config["quantization_config"]["layers"], config["quantization_config"]["fingerprint"]
        config["quantization_config"]["format_version"] = 4
        (folder / "config.json").write_text(json.dumps(config))
    tensor = tensors.pop(name)
    if spoiled is not None:
        tensors[name] = spoiled(tensor).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def same(model, other):
    left, right = model.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_complete_files_and_folders_pass(saved):
    check_file(saved / "plain" / WEIGHTS)
    assert check_folder(saved / "plain") == [saved / "plain" / WEIGHTS]
    shards = check_folder(str(saved / "sharded"))
    assert shards == sorted((saved / "sharded").glob("*.safetensors"))
    assert len(shards) > 3


@pytest.mark.parametrize("damage", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"<html>" * 99)])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_damaged_files_are_named(copy_of, kind, damage):
    folder = copy_of(kind)
    victim = sorted(folder.glob("*.safetensors"))[-1]
    damage(victim)
    for function, *arguments in ((check_file, victim), (check_folder, folder), (load_model, folder, W4A4)):
        message = refusal(CheckpointError, function, *arguments)
        assert message.startswith(f"{victim} is truncated or damaged")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    for function, *arguments in ((check_file, tmp_path / name), (check_folder, tmp_path), (load_model, tmp_path, W4A4)):
        message = refusal(CheckpointError, function, *arguments)
        assert message.startswith(f"{tmp_path / name} is a pickle")
        assert "convert it to safetensors" in message


def test_a_pickle_beside_safetensors_is_not_read(copy_of):
    folder = copy_of("plain")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert check_folder(folder) == [folder / WEIGHTS]
    assert isinstance(load_model(folder, W4A4), FLUX.cls)


def test_a_shard_that_the_index_names_must_be_there(copy_of):
    folder = copy_of("sharded")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    assert refusal(CheckpointError, check_folder, folder).startswith(f"{victim} is missing")
    assert refusal(CheckpointError, load_model, folder).startswith(f"{victim} is missing")


@pytest.mark.parametrize(
    ("index", "culprit"),
    [
        ("{", f"{INDEX} is not valid JSON"),
        ("[1]", f"{INDEX} does not hold a JSON object"),
        ("{}", f"{INDEX} has no weight_map"),
        ('{"weight_map": ["a"]}', f"{INDEX} has no weight_map"),
        ('{"weight_map": {"a": 5}}', INDEX),
        ('{"weight_map": {"a": null, "b": "c.safetensors"}}', INDEX),
        ('{"weight_map": {"a": "evil.bin"}}', "evil.bin is a pickle"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
    ],
)
def test_damaged_indices_are_named(copy_of, index, culprit):
    folder = copy_of("sharded")
    (folder / INDEX).write_text(index)
    assert refusal(CheckpointError, check_folder, folder).startswith(f"{folder / culprit}")


def test_folders_without_weights(tmp_path):
    assert "no safetensors file" in refusal(CheckpointError, check_folder, tmp_path)
    assert str(tmp_path / "gone") in refusal(CheckpointError, check_folder, tmp_path / "gone")
    (tmp_path / "file").write_text("")
    assert "is no folder" in refusal(CheckpointError, check_folder, tmp_path / "file")
    (tmp_path / "x.safetensors").mkdir()
    assert "x.safetensors is missing" in refusal(CheckpointError, check_file, tmp_path / "x.safetensors")


def test_packed_layers_are_told_by_their_scales(saved, tmp_path):
    """Over all files; INT4 has scales of groups."""
    load_model(saved / "quantized").save_pretrained(tmp_path, max_shard_size="50KB")
    kinds = {row.name: row.action == "int4" for row in plan(FLUX.build(), W4A4).select("quantize", "int4")}
    for folder in (saved / "quantized", tmp_path):
        assert packed_layers_in(check_folder(folder)) == kinds
    assert len(check_folder(tmp_path)) > 1
    assert packed_layers_in(check_folder(saved / "plain")) == {}


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    assert refusal(CheckpointError, read_json, path).startswith(f"{path} is missing")
    for text, reason in ((b"{", "is not valid JSON"), (b"\xff\xfe{}", "is not valid JSON"), (b"3", "JSON object")):
        path.write_bytes(text)
        message = refusal(CheckpointError, read_json, path)
        assert message.startswith(str(path))
        assert reason in message
    path.write_text('{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("bfloat16 bfloat16 float32", torch.bfloat16),
        ("float32 float32 float16", torch.float32),
        ("float16 uint8 uint8", torch.float16),
        ("uint8", torch.float32),
    ],
)
def test_the_stored_dtype_is_that_of_most_tensors(tmp_path, dtypes, expected):
    for i, name in enumerate(dtypes.split()):
        save_file({"x": torch.zeros(2, dtype=getattr(torch, name))}, tmp_path / f"{i}.safetensors")
    assert stored_dtype(tmp_path) == expected


def test_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with new_folder(target) as scratch:
        (scratch / "x").write_text("1")
        assert not target.exists()
        assert scratch.parent == target.parent
    assert contents(tmp_path) == {"a/b/out/x": b"1"}
    assert os.listdir(target.parent) == ["out"]
    (tmp_path / "empty").mkdir()
    with new_folder(str(tmp_path / "empty")) as scratch:
        (scratch / "y").write_text("2")
    assert (tmp_path / "empty" / "y").read_text() == "2"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("target", ["out", "a/b/out"])
def test_new_folder_vanishes_when_the_block_fails(saved, tmp_path, target, error):
    def fail():
        with new_folder(tmp_path / target) as scratch:
            shutil.copytree(saved / "plain", scratch / "deep")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["full", "file", "file/out", "dangling", "."])
def test_targets_in_use_are_refused_at_once(tmp_path, monkeypatch, target):
    """A link to nowhere and the current folder, though empty, cannot be replaced by a rename either."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    path = target if target == "." else tmp_path / target
    entered = []
    with pytest.raises(CheckpointError, match="choose another output folder"), new_folder(path):
        entered.append(path)
    assert entered == []
    assert contents(tmp_path) == {"full/x": b"mine", "file": b"mine"}


def test_find_model_on_this_machine(tmp_path, monkeypatch):
    assert find_model(None, tmp_path / "default") == tmp_path / "default"
    assert find_model(str(tmp_path), tmp_path / "default") == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name", tmp_path).samefile(tmp_path / "org" / "name")
    for name in ("gone", "/gone/away", "a/b/c", "https://huggingface.co/a/b"):
        assert "no hub id" in refusal(CheckpointError, find_model, name, tmp_path)


@pytest.mark.parametrize("weights", [True, False])
def test_find_model_on_the_hub_never_asks_for_pickles(tmp_path, monkeypatch, weights):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert find_model("org/some.name-1", tmp_path / "default", weights) == tmp_path
    ((name,), options), *rest = asked
    assert (name, rest, list(options)) == ("org/some.name-1", [], ["allow_patterns", "ignore_patterns"])
    files = {
        "model_index.json": True,
        "transformer/config.json": True,
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": weights,
        "text_encoder/model.safetensors": weights,
        "tokenizer/merges.txt": weights,
        "diffusion_pytorch_model.safetensors": weights,
        "flux1-dev.safetensors": False,
        "text_encoder/model.fp16.safetensors": False,
        "text_encoder/pytorch_model.bin": False,
        "pipeline.py": False,
    }
    fetched = set(huggingface_hub.utils.filter_repo_objects(list(files), **options))
    assert fetched == {file for file, wanted in files.items() if wanted}


def test_hub_failures_are_one_line(tmp_path):
    message = refusal(CheckpointError, find_model, "org/name", tmp_path)
    assert message == "org/name is no folder, and cannot be fetched from the hub: the network was used"


def test_skeletons_have_names_and_shapes_but_no_weights(saved, tmp_path):
    shutil.copy(saved / "plain" / "config.json", tmp_path)
    model = skeleton(tmp_path)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert plan(model, W4A4) == plan(load_model(saved / "plain"), W4A4)
    assert "quantized already" in refusal(ModelError, skeleton, saved / "quantized")
    assert "config.json is missing" in refusal(CheckpointError, skeleton, tmp_path / "gone")


@pytest.mark.parametrize("name", ["NoSuchModel", None, 5, "DDIMScheduler", "__version__", "utils", "ModelMixin"])
def test_unknown_classes(copy_of, name):
    """What diffusers has by that name must also be a model."""
    folder = copy_of("plain")
    (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), "_class_name": name}))
    for function in (skeleton, load_model):
        message = refusal(CheckpointError, function, folder)
        assert message.startswith(str(folder))
        assert repr(name) in message


def test_a_class_that_needs_a_missing_package_says_so(tmp_path, monkeypatch):
    """diffusers has stand-ins for pipelines whose text encoders need transformers, when that is not installed."""
    stand_in = type("Needy", (), {"_backends": ["torch", "no_such_package"]})
    monkeypatch.setattr(diffusers, "Needy", stand_in, raising=False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Needy", "transformer": ["diffusers", "X"]}')
    shutil.copytree(MODEL_DIR / "transformer", tmp_path / "transformer")
    with pytest.raises(DependencyError, match=r"^Needy needs no_such_package: run pip install no_such_package$"):
        load_pipeline(tmp_path, torch.float32)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_damaged_configurations(copy_of, tmp_path, text):
    folder = copy_of("plain")
    (folder / "config.json").write_text(text)
    for function, *more in ((skeleton,), (load_model,), (load_model, W4A4), (transformers_in,)):
        assert str(folder / "config.json") in refusal(CheckpointError, function, folder, *more)
    refusal(CheckpointError, quantize_folder, folder, tmp_path / "out", W4A4)
    assert os.listdir(tmp_path) == ["plain"]


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_loading_quantizes_as_quantize_does(saved, kind):
    model = load_model(saved / kind)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    quantize_(model, W4A4, progress=False)
    assert same(load_model(saved / kind, W4A4), model)
    placed = load_model(saved / kind, W4A4, device="cpu")
    assert same(placed, model)
    assert placed.hf_device_map == {"": torch.device("cpu")}
    assert same(load_model(saved / "quantized"), model)
    assert load_model(saved / "plain", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_quantizing_a_model_folder(saved, tmp_path, kind):
    before = contents(saved / kind)
    quantize_folder(saved / kind, tmp_path / "out", W4A4)
    assert contents(saved / kind) == before
    assert os.listdir(tmp_path) == ["out"]
    assert_same_model(tmp_path / "out", saved / "quantized")


def test_quantized_folders_are_refused(saved, tmp_path):
    for function, *more in ((load_model, W4A4), (quantize_folder, tmp_path / "out", W4A4)):
        assert "quantized already" in refusal(ModelError, function, saved / "quantized", *more)
    assert os.listdir(tmp_path) == []


def test_pipelines_keep_everything_else_byte_for_byte(pipeline, saved, tmp_path):
    assert transformers_in(pipeline) == {name: pipeline / name for name in ("transformer", "transformer_2")}
    before = contents(pipeline)
    quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert contents(pipeline) == before
    after = contents(tmp_path / "out")
    others = {name: data for name, data in before.items() if not name.startswith("transformer")}
    assert len(others) == 5
    del after[LISTING]
    assert {name: data for name, data in after.items() if not name.startswith("transformer")} == others
    for name in ("transformer", "transformer_2"):
        assert_same_model(tmp_path / "out" / name, saved / "quantized")


def test_pipelines_without_transformers(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": [1, 2], "transformer": [1, 2]}')
    assert "has no transformer folder" in refusal(CheckpointError, transformers_in, tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / WEIGHTS).write_bytes(b"")
    assert WEIGHTS in refusal(CheckpointError, load_pipeline, tmp_path, torch.float32)


@pytest.mark.parametrize("target", ["out", "a/b/out"])
def test_a_failure_half_way_leaves_nothing_behind(pipeline, saved, tmp_path, target):
    """The first transformer is written by then."""
    last = "single_transformer_blocks.1.proj_out.weight"
    shutil.rmtree(pipeline / "transformer_2")
    change(shutil.copytree(saved / "plain", pipeline / "transformer_2"), last, lambda t: t * float("nan"))
    before = contents(tmp_path)
    assert refusal(TensorError, quantize_folder, pipeline, tmp_path / target, W4A4).startswith(f"{last} holds NaN")
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["pipeline"]


def test_a_target_inside_the_source_is_not_copied_into_itself(pipeline):
    before = os.listdir(pipeline)
    assert "lies inside" in refusal(CheckpointError, quantize_folder, pipeline, pipeline / "out", W4A4)
    assert os.listdir(pipeline) == before


def test_weights_beside_the_components_are_not_copied(pipeline, tmp_path):
    (pipeline / "flux1-dev.safetensors").write_bytes(b"24 GB")
    (pipeline / "LICENSE.md").write_text("a licence")
    quantize_folder(pipeline, tmp_path / "out", W4A4)
    assert not (tmp_path / "out" / "flux1-dev.safetensors").exists()
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "a licence"


Q = "transformer_blocks.1.attn.to_q"
BAD_TENSORS = [
    ("quantized", f"{Q}.codes", lambda t: t[:, :-1], TensorError, " has shape (64, 31)"),
    ("quantized", f"{Q}.codes", lambda t: t[:-1], TensorError, " has shape (63, 32)"),
    ("quantized", f"{Q}.scales", lambda t: t[:-1], TensorError, " has shape (63,)"),
    ("quantized", f"{Q}.codes", lambda t: t.view(torch.int8), TensorError, " has dtype torch.int8"),
    ("quantized", f"{Q}.scales", lambda t: t.float(), TensorError, " has dtype torch.float32"),
    ("quantized", f"{Q}.codes", None, CheckpointError, ""),
    ("quantized", f"{Q}.scales", None, CheckpointError, ""),
    ("quantized", f"{Q}.bias", None, CheckpointError, ""),
    ("quantized", "proj_out.weight", None, CheckpointError, ""),
    ("plain", f"{Q}.weight", lambda t: t[:-1], CheckpointError, " expected shape"),
    ("plain", f"{Q}.weight", None, CheckpointError, ""),
    ("plain", f"{Q}.bias", None, CheckpointError, ""),
    ("plain", "proj_out.weight", None, CheckpointError, ""),
    ("plain", "proj_out.weight", lambda t: t[:-1], CheckpointError, " expected shape"),
]


@pytest.mark.parametrize(("kind", "name", "spoiled", "error", "reason"), BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(copy_of, kind, name, spoiled, error, reason):
    """Also those of kept layers: random values in their place would be written to the quantized model."""
    folder = copy_of(kind)
    change(folder, name, spoiled)
    assert f"{name}{reason}" in refusal(error, load_model, folder, W4A4 if kind == "plain" else None).replace("'", "")
