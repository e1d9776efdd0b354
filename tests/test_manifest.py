"""The manifest: hashes that say dtype, shape and bytes, and a reader that takes nothing but what was written."""

import copy
import json
import os

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from orbitdit import CheckpointError, OrbitQuantConfig, lloyd_max
from orbitdit.manifest import (
    DTYPES,
    ENTRY,
    UNKNOWN,
    check_config,
    check_hash,
    check_names,
    checksums,
    dumps,
    file_hashes,
    fingerprint,
    hasher,
    loads,
    make,
    read_header,
    replace_metadata,
    source_of,
    tensor_hash,
)
from orbitdit.rotation import rotation
from orbitdit.spec import LayerSpec

CONFIG = {
    "_class_name": "Model",
    "_diffusers_version": "0.42.1",
    "_name_or_path": "/home/somebody/model",
    "heads": 3,
    "axes": (4, 6),
    "quantization_config": OrbitQuantConfig(
        "w2a4", layers={"a": "96x64 trellis2.12.unbiased a4g16 s3", "b": "96x64 int4 a16"}
    ),
}
TENSORS = {
    "a.codes": torch.arange(64 * 24, dtype=torch.uint8).view(64, 24),
    "a.scales": torch.linspace(-1, 1, 64, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
}


def manifest_of(tensors=TENSORS, config=CONFIG):
    return make(config, {name: tensor_hash(tensor) for name, tensor in tensors.items()})


def refusal(function, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", ENTRY: dumps(manifest_of())})
    return path


@pytest.mark.parametrize("name", DTYPES)
def test_a_tensors_hash_is_xxh3_of_dtype_shape_and_bytes(name):
    raw = bytes(range(48)) if name != "BOOL" else bytes([0, 1, 1] * 16)
    dtype = DTYPES[name]
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(2, -1)
    shape = f"{tensor.shape[0]}x{tensor.shape[1]}"
    assert tensor_hash(tensor) == xxhash.xxh3_128(f"{name} {shape}\n".encode() + raw).hexdigest()
    assert tensor_hash(tensor.T) == tensor_hash(tensor.T.contiguous()) != tensor_hash(tensor)
    assert tensor_hash(tensor[0, ::2]) == tensor_hash(tensor[0, ::2].clone())
    in_blocks = hasher(name, tensor.shape)
    for byte in raw:
        in_blocks.update(bytes([byte]))
    assert in_blocks.hexdigest() == tensor_hash(tensor)


def test_hashes_tell_dtypes_shapes_and_bits_apart():
    x = torch.arange(12, dtype=torch.int32)
    flipped = x.clone()
    flipped[7] ^= 1 << 30
    kinds = [x, x.view(3, 4), x.view(4, 3), x.view(torch.float32), flipped, x[:11], torch.empty(0), torch.empty(0, 1)]
    assert len({tensor_hash(kind) for kind in kinds}) == len(kinds)


def test_tensors_without_values_have_no_hash():
    assert "meta" in refusal(tensor_hash, torch.empty(3, device="meta"))
    assert "complex64" in refusal(tensor_hash, torch.empty(3, dtype=torch.complex64))


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_files_are_hashed_as_their_tensors_are(saved, block):
    found = dict(file_hashes(saved, block))
    assert found == {name: tensor_hash(tensor) for name, tensor in TENSORS.items()} == manifest_of()["tensors"]


def test_what_is_written_is_read_back(saved):
    header = read_header(saved)
    found = loads(header.metadata[ENTRY], str(saved))
    assert found == manifest_of()
    assert found["config"]["quantization_config"]["layers"] == dict(CONFIG["quantization_config"].layers)
    assert found["config"]["axes"] == [4, 6]
    assert "somebody" not in dumps(found)
    assert {name: (d, s) for name, (d, s, _, _) in header.tensors.items()} == {
        "a.codes": ("U8", (64, 24)),
        "a.scales": ("BF16", (64,)),
        "empty": ("F32", (0, 3)),
        "scalar": ("F32", ()),
    }
    assert header.end == os.path.getsize(saved)


def test_checksums_are_of_what_the_codes_are_read_with():
    found = checksums([LayerSpec.parse("96x64 scalar4.norm a3g16 s3"), LayerSpec.parse("96x64 int4 a16")])
    drawn = rotation(96, 3)
    assert found["rotations"] == {"96 s3": f"{tensor_hash(drawn.permutation)} {tensor_hash(drawn.signs)}"}
    assert list(found["tables"]) == ["96 scalar4", "96 scalar3", "96 scalar6"]
    for bits in (3, 4, 6):
        points = lloyd_max(96, bits).centroids
        for noise in (0, 1e-13):  # of another machine's library
            rounded = (points * (1 + noise) * 96**0.5 * 2**20).round().int()
            assert found["tables"][f"96 scalar{bits}"] == tensor_hash(rounded)
    trellis = checksums([LayerSpec.parse("96x64 trellis2.12.unbiased a16 s3")])
    assert list(trellis["tables"]) == ["96 trellis2.12"]


def test_golden_checksums():
    """They are part of the format: what another machine or version computes must be the same."""
    assert checksums([LayerSpec.parse("96x64 trellis2.12.unbiased a4g16 s3")]) == {
        "rotations": {"96 s3": "7b71b54a5b9680362b29a0c62e2f28da ec25c0ed013cca23fffcec827695a063"},
        "tables": {
            "96 trellis2.12": "cd031fc3584127241da165bb8a60e990",
            "96 scalar4": "689e9b51be56c9166a7f48cfff3ffa0a",
            "96 scalar6": "ca6672d6805e35c4cf81d4e26d33c0dd",
        },
    }


def test_every_edit_of_the_manifest_is_found():
    text = dumps(manifest_of())
    for at in range(0, len(text), 3):
        for bit in (0, 3, 6):
            spoiled = text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]
            assert refusal(loads, spoiled, "file").startswith("file")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"format_version": "5"}', "[" * 100_000, '{"format_version":5}']
)
def test_other_texts_are_no_manifests(text):
    assert "manifest" in refusal(loads, text, "file")


def resealed(change):
    manifest = copy.deepcopy(manifest_of())
    change(manifest)
    return dumps({**manifest, "fingerprint": fingerprint(manifest)})


def test_a_newer_format_asks_for_an_upgrade():
    assert "upgrade orbitdit" in refusal(loads, resealed(lambda m: m.update(format_version=6)), "file")


@pytest.mark.parametrize(("kind", "name"), [("rotations", "96 s3"), ("tables", "96 trellis2.12")])
def test_other_rotations_and_tables_are_named(kind, name):
    message = refusal(loads, resealed(lambda m: m[kind].update({name: UNKNOWN})), "file")
    assert f"{kind} for {name!r}" in message
    assert "quantize the model again" in message
    assert name in refusal(loads, resealed(lambda m: m[kind].pop(name)), "file")
    assert "'7 s7'" in refusal(loads, resealed(lambda m: m[kind].update({"7 s7": UNKNOWN})), "file")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(heads=4), "heads is 4, and was 3"),
        (lambda c: c.update(heads=3.0), "heads is 3.0, and was 3"),
        (lambda c: c.update(axes=[4, 7]), "axes is [4, 7], and was [4, 6]"),
        (lambda c: c.pop("heads"), "heads is null, and was 3"),
        (lambda c: c.update(more=1), "more is 1, and was null"),
        (lambda c: c["quantization_config"].update(seed=1), "quantization_config.seed is 1, and was 0"),
        (lambda c: c["quantization_config"]["layers"].pop("b"), "quantization_config.layers.b is null, and was"),
        (lambda c: c.pop("quantization_config"), "quantization_config is null, and was"),
    ],
)
def test_configurations_are_compared_both_ways(change, told):
    manifest = manifest_of()
    given = copy.deepcopy(manifest["config"])
    check_config(manifest, {**given, "_name_or_path": "x", "_diffusers_version": "9"}, "config.json")
    change(given)
    assert f"config.json: {told}" in refusal(check_config, manifest, given, "config.json")


def test_tensors_are_compared_both_ways():
    manifest = manifest_of()
    names = list(TENSORS)
    check_names(manifest, names, "folder")
    assert "lacks the tensor 'empty'" in refusal(check_names, manifest, [n for n in names if n != "empty"], "folder")
    assert "foreign tensor 'b.codes'" in refusal(check_names, manifest, [*names, "b.codes"], "folder")
    assert "'scalar' twice" in refusal(check_names, manifest, [*names, "scalar"], "folder")
    check_hash(manifest, "scalar", tensor_hash(TENSORS["scalar"]), "folder")
    assert "'scalar'" in refusal(check_hash, manifest, "scalar", tensor_hash(torch.tensor(2.0)), "folder")


def test_a_manifest_can_be_written_before_the_hashes_are_known(tmp_path):
    """By a writer of shards, who learns them, and with them the fingerprint, at the end."""
    path = tmp_path / "model.safetensors"
    unknown = make(CONFIG, dict.fromkeys(TENSORS, UNKNOWN))
    tensors = {**TENSORS, "é": torch.ones(2)}
    save_file(tensors, path, metadata={"format": "pt", ENTRY: dumps(unknown)})
    size = path.stat().st_size
    replace_metadata(path, **{ENTRY: dumps(manifest_of())})
    assert path.stat().st_size == size
    assert loads(read_header(path).metadata[ENTRY], "file") == manifest_of()
    assert read_header(path).metadata["format"] == "pt"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert "would take" in refusal(lambda: replace_metadata(path, **{ENTRY: dumps(manifest_of()) + " " * 99}))


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_files_have_no_header(saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[:kept])
    assert str(saved) in refusal(read_header, saved)
    saved.write_bytes(data + b"0")
    assert str(saved) in refusal(read_header, saved)


@pytest.mark.parametrize(
    "header",
    [
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}},
        {"__metadata__": {"a": 3}},
        {"__metadata__": 3},
        [],
    ],
)
def test_damaged_headers(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert str(tmp_path / "x") in refusal(read_header, tmp_path / "x")


@pytest.mark.parametrize(
    ("path", "model", "revision"),
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev", None),
        ("/home/me/models/flux", "flux", None),
        ("/c/models--org--name/snapshots/0123abc/transformer/x.safetensors", "org/name", "0123abc"),
        ("/x/snapshots/y/z", "z", None),
        (None, None, None),
        ("", None, None),
    ],
)
def test_where_a_model_came_from(path, model, revision):
    assert source_of(path) == {"model": model, "revision": revision}
