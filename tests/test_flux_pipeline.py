"""A tiny random FluxPipeline with all its parts takes the same path through the command line as the embedded model."""

import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from families import FAMILIES
from orbitdit.cli import main

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "circle", "photo", "of")
SHARED = ("--steps", "2", "--height", "32", "--width", "64", "--device", "cpu")


def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    small = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    clip = CLIPTextConfig(hidden_size=32, intermediate_size=64, eos_token_id=1, pad_token_id=0, bos_token_id=2, **small)
    t5 = T5Config(vocab_size=len(WORDS), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=2,
        layers_per_block=1,
        shift_factor=0.1,
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer(),
        transformer=FAMILIES["flux"].build(),
    )
    path = tmp_path_factory.mktemp("flux") / "pipeline"
    pipeline.save_pretrained(path)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["orbitdit", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_compare_measures_without_a_judge(folder, monkeypatch, capsys, tmp_path):
    prompts = ("--prompt", "a red circle", "--prompt", "a photo of a circle")
    assert not run(monkeypatch, "compare", folder, *prompts, "--bits", "w2a4", *SHARED, "--out", tmp_path)
    figures = json.loads((tmp_path / "results.json").read_text())
    full, w2a4 = figures["results"]
    assert full["scores"] == w2a4["scores"] == {}
    assert full["right"] == [None, None]
    assert 10 < w2a4["psnr_db"] < 90
    assert "right pictures" not in capsys.readouterr().out


def test_a_quantized_copy_generates_what_quantizing_on_load_does(folder, monkeypatch, tmp_path):
    assert not run(monkeypatch, "quantize", folder, "--bits", "w3a3", "--out", tmp_path / "model")
    parts = {path.name for path in folder.iterdir()} | {"orbitdit-files.json"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == parts
    same = ("--prompt", "a red circle", *SHARED)
    assert not run(monkeypatch, "generate", tmp_path / "model", *same, "--out", tmp_path / "stored")
    assert not run(monkeypatch, "generate", folder, "--bits", "w3a3", *same, "--out", tmp_path / "loaded")
    assert not run(monkeypatch, "generate", folder, *same, "--out", tmp_path / "full")
    pictures = []
    for name in ("stored", "loaded", "full"):
        with Image.open(tmp_path / name / "000.png") as picture:
            pictures.append(np.asarray(picture).astype(int))
    stored, loaded, full = pictures
    assert stored.shape == (32, 64, 3)
    assert np.abs(stored - loaded).max() <= 8
    assert np.abs(stored - full).max() > 0


def test_an_option_that_the_pipeline_does_not_take_is_named(folder, monkeypatch, capsys, tmp_path):
    wrong = ("--prompt", "a red circle", "--frames", "5", *SHARED)
    assert run(monkeypatch, "generate", folder, *wrong, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("orbitdit: FluxPipeline takes no option 'num_frames': leave it out\n")
    assert not (tmp_path / "out").exists()
