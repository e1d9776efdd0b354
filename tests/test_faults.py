"""A sample of the faults of `make faults`, done for real; no load may give another model, and `verify` finds them."""

import random
import shutil
import weakref

import pytest

from scripts import faults
from scripts.faults import KINDS, WEIGHTS, Subject, edit, flip, from_pretrained, memory, run, single, subject

pytestmark = pytest.mark.filterwarnings("ignore")
SUBJECTS = ("w4a4, folder", "w4a4, shards", "w4a4, one file", "w2a4, shards")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The subjects of `SUBJECTS`, and an unquantized one."""
    base = tmp_path_factory.mktemp("faults")
    found = [subject(base, "w4a4", "folder", "10GB"), subject(base, "w4a4", "shards", "50KB")]
    found += [single(base, "w4a4"), subject(base, "w2a4", "shards", "50KB"), subject(base, "", "folder", "10GB")]
    return {each.name: each for each in found}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_no_fault_is_silent(made, name, kind):
    line = run(made[name], kind, sample=6, seed=1)
    assert (line["silent"], line["missed by verify"]) == (0, 0), line["examples"]
    for way, counts in line["ways"].items():
        assert sum(counts.values()) == line["tried"], way
        if way == "own loader":
            assert not {"refused unclearly", "passed by"} & set(counts), line["examples"]


def test_the_judge_sees_what_is_silent(made):
    """In diffusers alone a flipped bit of a weight is: the suite can fail."""
    plain = made["unquantized, folder"]
    line = run(plain, "changed tensors", sample=12)
    assert line["silent"] > 0
    assert sum(line["ways"]["from_pretrained"].values()) == line["tried"] == 12


def test_a_renamed_quantization_config_passes_by_and_is_found(made, tmp_path):
    found = made["w4a4, folder"]
    folder = shutil.copytree(found.folder, tmp_path / "model")
    edit(folder, "config.json", ("quantization_config",), renamed="quantization_config_")
    assert faults.judge(found, from_pretrained, folder)[0] == "passed by"
    assert faults.judge(found, faults.own_loader, folder) == ("refused", "")
    assert faults.is_found(folder)
    assert not faults.is_found(found.folder)


def test_every_boundary_and_every_file_has_its_fault(made):
    """What the kinds say of themselves."""
    found, rng = made["w4a4, shards"], random.Random(0)
    told = [name for name, _ in KINDS["truncated files"](found, rng)]
    for file in found.folder.glob("*.safetensors"):
        for _, _, first, _ in faults.read_header(file).tensors.values():
            assert f"{file.name} cut to {first} bytes" in told
    flipped = [name for name, _ in KINDS["flipped bits"](found, rng)]
    assert all(any(file.name in name for name in flipped) for file in found.folder.iterdir())
    assert len(flipped) == faults.FLIPS
    edited = [name for name, _ in KINDS["edited config.json"](made["w4a4, folder"], rng)]
    for key in ("patch_size", "quantization_config.seed", "quantization_config.layers", "axes_dims_rope.2"):
        assert any(name.startswith(f"config.json: {key} = ") for name in edited)


def test_damage_is_done(made, tmp_path):
    folder = shutil.copytree(made["w4a4, folder"].folder, tmp_path / "model")
    before = (folder / WEIGHTS).read_bytes()
    flip(folder, WEIGHTS, 1000, 3)
    after = (folder / WEIGHTS).read_bytes()
    assert [(a, a ^ b) for a, (a_, b) in enumerate(zip(before, after, strict=True)) if a_ != b] == [
        (1000, 1000 ^ after[1000])
    ]
    assert before[1000] ^ after[1000] == 8


def test_models_are_freed_without_the_garbage_collector(made):
    """Nothing of loading or of the quantizer keeps them: no cycles, no threads."""
    found: Subject = made["w4a4, shards"]
    line = memory(found, forwards=20, loads=10)
    assert line["loads"]["count"] == 10
    faults.gc.disable()
    try:
        model = from_pretrained(found.folder)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        faults.gc.enable()
