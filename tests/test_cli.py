"""The command line, run in process: what it prints and writes, and that every error is one line and exit code 2."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from families import FAMILIES, every_family
from orbitdit import ConfigError, OrbitQuantConfig, cli, explain, plan, quantize_
from orbitdit import save_file as save_one
from orbitdit.checkpoint import read_json
from orbitdit.integrations.folders import load_model, skeleton
from orbitdit.shapes import MODEL_DIR
from orbitdit.verify import LISTING

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAST = "single_transformer_blocks.1.proj_out.weight"


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    """No network, no settings of the caller's terminal, and an empty current folder."""

    def refuse(*args, **kwargs):
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `orbitdit` with these arguments; exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["orbitdit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A quantized Flux, as a folder and as one file."""
    base = tmp_path_factory.mktemp("packed")
    model = FAMILIES["flux"].build()
    quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
    model.save_pretrained(base / "folder")
    save_one(model, base / "one.safetensors")
    return base


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_verify_and_info(run, packed, tmp_path, name):
    fingerprint = read_json(packed / "folder" / "config.json")["quantization_config"]["fingerprint"]
    code, out, err = run("verify", packed / name)
    assert (code, err) == (0, "")
    assert out == f"ok     {packed / name}: 188 tensors, configuration; fingerprint {fingerprint}\n"
    code, out, err = run("info", packed / name)
    assert (code, err) == (0, "")
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["model"] == "FluxTransformer2DModel"
    assert told["fingerprint"] == fingerprint
    assert told["layers"] == "6 x int4 a16, 34 x scalar4.unbiased a4"
    assert "MB in 1 files" in told["size"]


def test_verify_names_what_is_wrong_and_fails(run, packed, tmp_path):
    folder = shutil.copytree(packed / "folder", tmp_path / "damaged")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    code, out, err = run("verify", folder)
    assert (code, err) == (1, "")
    assert re.fullmatch(rf"WRONG  {folder / WEIGHTS}: the tensor '\S+' is not what was saved .*\n", out)
    for command in ("verify", "info"):
        code, out, err = run(command, tmp_path / "gone")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path / "gone") in err


def test_pack_writes_one_file(run, packed, tmp_path):
    code, out, err = run("pack", packed / "folder", "--out", tmp_path / "x.safetensors")
    assert (code, out, err) == (0, f"{tmp_path / 'x.safetensors'}: 0.4 MB\n", "")
    assert (tmp_path / "x.safetensors").read_bytes() == (packed / "one.safetensors").read_bytes()
    for target in ("x.safetensors", "x.bin"):
        code, out, err = run("pack", packed / "folder", "--out", tmp_path / target)
        assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny Flux folders: whole, with a NaN in the last layer, with a tensor or setting that does not fit."""
    base = tmp_path_factory.mktemp("models")
    FAMILIES["flux"].build().save_pretrained(base / "flux")
    for name in ("nan", "narrow", "two", "truncated"):
        shutil.copytree(base / "flux", base / name)
    tensors = load_file(base / "flux" / WEIGHTS)
    narrow = {**tensors, "proj_out.weight": tensors["proj_out.weight"][:-1].contiguous()}
    save_file(narrow, base / "narrow" / WEIGHTS, metadata={"format": "pt"})
    tensors[LAST][-1, -1] = float("nan")
    save_file(tensors, base / "nan" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((base / "flux" / "config.json").read_text())
    (base / "two" / "config.json").write_text(json.dumps({**config, "num_layers": "two"}))
    (base / "truncated" / WEIGHTS).write_bytes((base / "flux" / WEIGHTS).read_bytes()[:-9])
    return base


def embedded_transformer():
    return skeleton(MODEL_DIR / "transformer")


def assert_one_line(result, *culprits):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("orbitdit: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    for culprit in culprits:
        assert culprit in err


def test_plan_of_the_embedded_model(run):
    code, out, err = run("plan")
    expected = plan(embedded_transformer(), OrbitQuantConfig())
    quantized, int4, kept = expected.counts
    assert (code, err) == (0, "")
    assert expected.counts == (76, 14, 8)
    assert "FluxTransformer2DModel at W4A4" in out
    assert f"{quantized} layers quantized, {int4} INT4, {kept} kept." in out
    assert f"{expected.bytes_before / 1e6:,.1f} -> {expected.bytes_after / 1e6:,.1f} MB" in out
    assert f"{expected.effective_bits:.3f} stored bits per quantized weight" in out
    for pattern, *_ in expected.groups():
        assert pattern in out
    assert os.listdir() == []


def test_plan_says_how_weights_are_coded(run):
    rule = ("--rule", "*.ff.*=w6a6")
    assert "W2A4: trellis 2^12, unbiased, centred by 16; W6A6: scalar, unbiased.\n" in squeezed(
        run("plan", "--bits", "w2a4", *rule)
    )
    assert "W2A4: scalar, norm.\n" in squeezed(run("plan", "--bits", "w2a4", "--recipe", "paper"))
    assert "W4A4: scalar, unbiased.\n" in squeezed(run("plan", "--recipe", "best"))


def squeezed(result):
    """Printed lines without the spaces that centre them."""
    return "".join(f"{line.strip()}\n" for line in result[1].splitlines())


def test_plan_explains_what_would_run(run):
    config = OrbitQuantConfig("w2a4", rules=(("*.ff.*", "w4a4"),))
    code, out, err = run("plan", "--explain", "--device", "sm_90", "--bits", "w2a4", "--rule", "*.ff.*=w4a4")
    assert (code, err) == (0, "")
    assert out == f"{explain(embedded_transformer(), device='sm_90', config=config)}\n"
    assert "FluxTransformer2DModel: bf16 inputs on cuda sm_90" in out
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert run("plan", "--explain")[1] == run("plan", "--explain", "--device", here)[1] != out


def test_plan_keeps_names_whole_on_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("plan")
    rows = [line.split() for line in out.splitlines()]
    assert ["single_transformer_blocks.*.attn.to_q", "8", "W4A4", "256", "x", "256", "0.3"] in rows
    assert ["time_text_embed.timestep_embedder.linear_1", "1", "kept", "256", "x", "256", "0.1"] in rows


def test_no_arguments_show_the_help(run):
    code, out, err = run()
    assert (code or 0, err) == (0, "")
    assert out.startswith("Usage:")
    assert all(f"  {command} " in out for command in ("plan", "quantize", "generate", "compare", "evaluate"))


def test_options_without_effect_are_refused(run):
    for option in (("--rule", "*=keep"), ("--rotation-seed", 3), ("--recipe", "paper")):
        assert_one_line(run("generate", "--prompt", "a circle", *option), "--bits")
    assert_one_line(run("plan", "--device", "cpu"), "--explain")
    assert_one_line(run("plan", "--rule", "nomatch.*=w6a6"), "nomatch.*")


def test_plan_writes_json(run, tmp_path):
    path = tmp_path / "plan.json"
    arguments = ("--bits", "w2a16", "--seed", 7, "--rule", "*.to_q=w8a8", "--rule", "*=keep", "--out", path)
    assert run("plan", *arguments)[::2] == (0, "")
    (found,) = json.loads(path.read_text())["plans"]
    config = OrbitQuantConfig("w2a16", seed=7, rules=(("*.to_q", "w8a8"), ("*", "keep")))
    expected = plan(embedded_transformer(), config)
    assert OrbitQuantConfig.from_dict(found["config"]) == config
    assert found["model"] == "FluxTransformer2DModel"
    assert [row["name"] for row in found["layers"]] == [row.name for row in expected.layers]
    for row, planned in zip(found["layers"], expected.layers, strict=True):
        for name in ("in_features", "out_features", "action", "block_size", "reason", "bytes_before", "bytes_after"):
            assert row[name] == getattr(planned, name)
    coded = ("weight_bits", "activation_bits", "codebook", "log2_states", "scale", "group_size")
    assert {tuple(row[name] for name in coded) for row in found["layers"] if row["action"] == "quantize"} == {
        (8, 8, "scalar", None, "unbiased", None)
    }
    assert {tuple(row[name] for name in coded) for row in found["layers"] if row["action"] == "keep"} == {
        (16, 16, None, None, None, None)
    }
    assert found["totals"] == {
        "quantized": 11,
        "int4": 0,
        "kept": 87,
        "effective_bits": expected.effective_bits,
        "bytes_before": expected.bytes_before,
        "bytes_after": expected.bytes_after,
    }


def test_a_layer_of_a_plan_in_json(run, tmp_path):
    assert run("plan", "--bits", "w2a4", "--out", tmp_path / "plan.json")[::2] == (0, "")
    rows = {row["name"]: row for row in json.loads((tmp_path / "plan.json").read_text())["plans"][0]["layers"]}
    assert rows["transformer_blocks.0.attn.to_q"] == {
        "name": "transformer_blocks.0.attn.to_q",
        "in_features": 256,
        "out_features": 256,
        "action": "quantize",
        "weight_bits": 2,
        "activation_bits": 4,
        "codebook": "trellis",
        "log2_states": 12,
        "scale": "unbiased",
        "group_size": 16,
        "block_size": 256,
        "reason": "block",
        "bytes_before": 2 * (256 * 256 + 256),
        "bytes_after": 256 * 256 // 4 + 256 * 4,
    }
    modulation = rows["transformer_blocks.0.norm1.linear"]
    assert [modulation[name] for name in ("action", "weight_bits", "activation_bits", "codebook", "scale")] == [
        *("int4", 4, 16, "int4", None)
    ]


@every_family
def test_plan_needs_the_configuration_alone(run, tmp_path, family):
    family.build().save_config(tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["config.json"]
    code, out, err = run("plan", tmp_path / "model", "--out", "plan.json")
    quantized, int4, kept = family.counts
    assert (code, err) == (0, "")
    assert f"{quantized} layers quantized, {int4} INT4, {kept} kept." in out
    totals = json.loads((tmp_path / "cwd" / "plan.json").read_text())["plans"][0]["totals"]
    assert (totals["quantized"], totals["int4"], totals["kept"]) == family.counts


def test_plan_of_a_pipeline_has_a_table_for_each_transformer(run, tmp_path, models):
    index = {name: ["diffusers", "FluxTransformer2DModel"] for name in ("transformer", "transformer_2")}
    for name in index:
        shutil.copytree(models / "flux", tmp_path / "pipe" / name)
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "Any", **index}))
    assert run("plan", tmp_path / "pipe", "--explain")[1].count("FluxTransformer2DModel: bf16 inputs on ") == 2
    code, out, _ = run("plan", tmp_path / "pipe")
    assert (code, out.count("34 layers quantized, 6 INT4, 8 kept.")) == (0, 2)


def test_plan_of_a_hub_id_fetches_the_configuration_alone(run, models, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or models / "flux")
    code, out, err = run("plan", "org/name")
    assert (code, err) == (0, "")
    assert "34 layers" in out
    ((name, options),) = asked
    assert (name, options["allow_patterns"]) == (("org/name",), ["*.json"])


def test_hub_failures_are_one_line(run):
    assert_one_line(run("plan", "org/name"), "org/name", "the network was used")
    assert_one_line(run("quantize", "org/name"), "org/name", "the network was used")


def test_quantize_the_embedded_pipeline(run):
    code, out, _ = run("quantize", "--bits", "w2a4", "--recipe", "paper", "--seed", 3, "--rule", "*.to_v=int4")
    assert code == 0
    target = Path("quantized")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert out == f"quantized: {size / 1e6:,.1f} MB\n"
    assert size < sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) / 4
    files = sorted(str(path.relative_to(MODEL_DIR)) for path in MODEL_DIR.rglob("*"))
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == sorted([*files, LISTING])
    for name in files:
        if (target / name).is_file() and not name.startswith("transformer"):
            assert (target / name).read_bytes() == (MODEL_DIR / name).read_bytes()
    assert_one_line(run("quantize"), "quantized exists")
    assert_one_line(run("quantize", "quantized", "--out", "again"), "quantized already")
    assert os.listdir() == ["quantized"]
    config = OrbitQuantConfig("w2a4", "paper", seed=3, rules=(("*.to_v", "int4"),))
    assert OrbitQuantConfig.from_dict(load_config(target / "transformer")["quantization_config"]) == config
    model = load_model(target / "transformer")
    expected = load_model(MODEL_DIR / "transformer", config).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def load_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_quantize_a_model_folder(run, models, tmp_path):
    code, out, _ = run("quantize", models / "flux", "--out", tmp_path / "a" / "out")
    assert (code, out.split(":")[0]) == (0, str(tmp_path / "a" / "out"))
    assert load_config(tmp_path / "a" / "out")["quantization_config"]["weight_bits"] == 4


@pytest.mark.parametrize("command", ["quantize", "generate", "compare", "evaluate"])
def test_weights_are_quantized_on_the_device_that_is_asked_for(run, monkeypatch, command):
    """A search for trellis codes takes seconds on a GPU, and hours for a large model on a CPU."""
    asked = []

    def load(path, config=None, dtype=None, device=None):
        asked.append(device)
        raise ConfigError("seen")

    monkeypatch.setattr(
        "orbitdit.integrations.conversion.convert", lambda job, folder, device, *_: load(None, device=device)
    )
    monkeypatch.setattr("orbitdit.integrations.folders.load_model", load)
    monkeypatch.setattr("orbitdit.evaluate.load_model", load)
    prompt = () if command == "quantize" else ("--prompt", "a red circle", "--steps", 1)
    assert run(command, "--bits", "w2a4", "--device", "cpu", *prompt)[::2] == (2, "orbitdit: seen\n")
    assert asked == ["cpu"]


def test_generate_reports_what_it_wrote(run):
    code, out, _ = run("generate", "--prompt", "a red circle", "--bits", "w4a4", "--steps", 1, "--device", "cpu")
    assert code == 0
    assert out.startswith("pictures: 1 pictures in ")
    assert os.listdir("pictures") == ["000.png"]


def test_compare_with_weight_only_layers_alone(run):
    """No quantized layer is left to count stored bits of: those of the INT4 layers count."""
    arguments = ("--bits", "w4a4", "--rule", "*=int4", "--prompt", "a circle", "--steps", 1, "--guidance", 1)
    code, _, _ = run("compare", *arguments, "--device", "cpu")
    assert code == 0
    full, int4 = json.loads(Path("comparison/results.json").read_text())["results"]
    assert full["effective_bits"] == 16
    assert 4.25 <= int4["effective_bits"] < 4.26  # groups of 64 with a bf16 scale, one group of 48 in x_embedder


def test_an_interrupted_run_leaves_nothing(run, models, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("orbitdit.integrations.conversion.convert", interrupt)
    code, out, err = run("quantize", models / "flux")
    assert code == 130
    assert "Traceback" not in out + err
    assert os.listdir() == []


BAD = {
    "unknown command": (["nope"], "nope"),
    "unknown option": (["plan", "--nope"], "--nope"),
    "option of another command": (["quantize", "--steps", "3"], "--steps"),
    "value missing": (["plan", "--bits"], "--bits"),
    "two models": (["plan", "a", "b"], "b"),
    "bits": (["plan", "--bits", "w5a4"], "weight_bits=5"),
    "bits of quantize": (["quantize", "--bits", "w4a2"], "activation_bits=2"),
    "bits of generate": (["generate", "--prompt", "a circle", "--bits", "4"], "'4'"),
    "bits of compare": (["compare", "--bits", "w4a4", "--bits", "fp4"], "'fp4'"),
    "empty bits": (["plan", "--bits", ""], "''"),
    "recipe": (["plan", "--recipe", "fast"], "recipe='fast'"),
    "recipe of compare": (["compare", "--recipe", "scalar"], "recipe='scalar'"),
    "rule": (["plan", "--rule", "*.ff.*"], "GLOB=ACTION"),
    "rule action": (["quantize", "--rule", "*.ff.*=zero"], "'zero'"),
    "nothing left": (["plan", "--rule", "*=keep"], "nothing to quantize"),
    "negative rotation seed": (["quantize", "--seed", "-1"], "seed=-1"),
    "huge rotation seed": (["plan", "--seed", str(2**64)], str(2**64)),
    "seed": (["plan", "--seed", "one"], "--seed"),
    "negative noise seed": (["generate", "--prompt", "a circle", "--seed", "-1"], "--seed"),
    "steps": (["generate", "--prompt", "a circle", "--steps", "0"], "--steps"),
    "per category": (["compare", "--per-category", "0"], "--per-category"),
    "device to explain": (["plan", "--explain", "--device", "tpu9"], "sm_90"),
    "device": (["generate", "--prompt", "a circle", "--device", "tpu"], "tpu"),
    "no prompt": (["generate"], "--prompt"),
    "no prompt for another model": (["compare", "{models}/flux"], "prompt"),
    "unknown word": (["generate", "--prompt", "a dog"], "'dog'"),
    "unknown word to compare": (["compare", "--prompt", "a dog", "--steps", "1"], "'dog'"),
    "no folder": (["plan", "/no/such/folder"], "/no/such/folder"),
    "no folder of that name": (["quantize", "missing"], "missing"),
    "no folder to generate from": (["generate", "missing", "--prompt", "a circle"], "missing"),
    "no figure": (["compare", "--figure", "none.png"], "none.png"),
    "no folder to compare": (["compare", "missing", "--prompt", "a circle"], "missing"),
    "empty folder": (["plan", "."], "config.json"),
    "a file": (["plan", "{models}/flux/config.json"], "config.json"),
    "no pipeline": (["generate", "{models}/flux", "--prompt", "a circle"], "model_index.json"),
    "no pipeline to compare": (["compare", "{models}/flux", "--prompt", "a circle"], "model_index.json"),
    "truncated": (["quantize", "{models}/truncated"], f"truncated/{WEIGHTS}"),
    "NaN": (["quantize", "{models}/nan"], LAST),
    "tensor that does not fit": (["quantize", "{models}/narrow"], "proj_out.weight"),
    "configuration that does not fit": (["plan", "{models}/two"], "two"),
    "output in use": (["quantize", "{models}/flux", "--out", "{models}"], "choose another output folder"),
    "output is a file": (["quantize", "{models}/flux", "--out", "{models}/flux/config.json"], "config.json"),
    "plan into no folder": (["plan", "{models}/flux", "--out", "no/plan.json"], "no/plan.json"),
    "plan onto a folder": (["plan", "{models}/flux", "--out", "{models}"], "--out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_line_and_writes_nothing(run, models, tmp_path, case):
    arguments, culprit = BAD[case]
    before = sorted(models.rglob("*"))
    assert_one_line(run(*(a.format(models=models) for a in arguments)), culprit)
    assert [path.name for path in tmp_path.rglob("*")] == ["cwd"]
    assert sorted(models.rglob("*")) == before


def test_cuda_without_cuda(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["generate", "--prompt", "a circle"], ["compare", "--prompt", "a circle"], ["plan", "--explain"]):
        assert_one_line(run(*command, "--device", "cuda"), "no CUDA device")
    assert os.listdir() == []


EXAMPLES = {
    "plan": (),
    "quantize": (),
    "pack": (".", "--out", "x.safetensors"),
    "generate": ("--prompt", "a circle"),
    "compare": ("--prompt", "a circle"),
    "evaluate": ("--prompt", "a circle"),
}
"""Command -> the arguments that it needs."""


@pytest.mark.parametrize("command", EXAMPLES)
def test_what_is_not_installed_is_named_with_its_install_line(run, monkeypatch, command):
    """scripts/check_wheel.py sees it in an environment that has none of them."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert_one_line(run(command, *EXAMPLES[command]), "diffusers is not installed", "pip install 'orbitdit[diffusers]'")
    assert os.listdir() == []


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(("module", "package"), cli.EXTRA.items())
def test_modules_are_named_by_their_packages(run, monkeypatch, module, package):
    monkeypatch.setattr(cli, "_find", failing(ModuleNotFoundError("at length", name=f"{module}.part")))
    assert_one_line(run("plan"), f"{package} is not installed", "pip install 'orbitdit[diffusers]'")


def test_any_other_missing_module_is_an_error_of_the_program(run, monkeypatch):
    monkeypatch.setattr(cli, "_find", failing(ModuleNotFoundError("No module named 'other'", name="other")))
    with pytest.raises(ModuleNotFoundError, match="other"):
        run("plan")


COMMANDS = typer.main.get_command(cli.app).commands


def test_commands_and_help(run):
    assert set(COMMANDS) == {*EXAMPLES, "verify", "info"}  # these two need no diffusers
    for name, command in COMMANDS.items():
        code, out, err = run(name, "--help")
        assert (code, err) == (0, "")
        assert command.help
        assert command.help.split(".")[0] in " ".join(out.split())
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_help(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name
