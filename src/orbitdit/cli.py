"""The command line: `orbitdit plan | quantize | verify | info | pack | generate | compare | evaluate`.

Each command takes a model folder in diffusers' layout, a hub id, or nothing for the embedded model. Bad use
ends with exit code 2 and one line on standard error.
"""

import io
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orbitdit.atomic import new_folder
from orbitdit.checkpoint import find_model
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError, ConfigError, OrbitDiTError, PromptError
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.prompts import benchmark

app = typer.Typer(
    help="Quantize diffusion transformers to 2-4 bits, generate with them and compare.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


EXTRA = {"accelerate": "accelerate", "diffusers": "diffusers", "huggingface_hub": "huggingface-hub", "PIL": "pillow"}
"""Modules that the extra `diffusers` brings -> the packages they come in."""


class Device(str, Enum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Model = Annotated[str | None, typer.Argument(help="Model folder or hub id; the embedded model if left out.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, such as w4a4, w2a4 or w4a16.")]
RotationSeed = Annotated[int, typer.Option("--seed", help="Seed of the rotations.")]
Recipe = Annotated[str | None, typer.Option(help="How weights become codes: best (if left out) or paper.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="GLOB=ACTION over layer names; quantize, int4, keep, or bits. Repeatable."),
]
Saved = Annotated[Path, typer.Argument(help="Folder or safetensors file of a quantized model, or a pipeline's folder.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's own number if left out.")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels; the pipeline's own if left out.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels; the pipeline's own if left out.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a video; the pipeline's own if left out.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own if left out.")]
On = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU when there is one.")]


def _text(prompts: list[str] | None) -> list[str] | None:
    """The prompts, if they can be written as UTF-8. Raises PromptError for bytes of a terminal that are no text."""
    for prompt in prompts or []:
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise PromptError(f"the prompt {prompt!r} is no text: write it in UTF-8")
    return prompts


Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt. Repeatable.", callback=_text)]
NoiseSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the initial noise; picture i uses seed + i.")]


@app.command()
def plan(  # noqa: PLR0913  # a parameter for each option
    model: Model = None,
    bits: Bits = "w4a4",
    recipe: Recipe = None,
    seed: RotationSeed = 0,
    rule: Rules = None,
    out: Annotated[Path | None, typer.Option(help="Also write the plan, layer by layer, to this JSON file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what would run for each layer, and why not more, in bf16.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="With --explain: cpu, cuda, or an architecture such as sm_90; this machine's.")
    ] = None,
) -> None:
    """Show what would happen to each linear layer; needs the model's config.json only."""
    from orbitdit.explain import explain as explain_model
    from orbitdit.integrations.folders import skeleton, transformers_in
    from orbitdit.model import plan as plan_model
    from orbitdit.report import plan_dict, plan_table, write_json

    if device is not None and not explain:
        raise ConfigError("--device has no effect without --explain: give --explain too")
    config = _config(bits, seed, rule, recipe)
    models = [skeleton(path) for path in transformers_in(_find(model, weights=False)).values()]
    plans = [plan_model(found, config) for found in models]
    explanations = [explain_model(found, device=device, config=config) for found in models] if explain else []
    if out is not None and out.exists():
        raise CheckpointError(f"--out {out} exists: choose another file")
    if out is not None:
        write_json({"plans": [plan_dict(found) for found in plans]}, out)
    if explain:
        print("\n\n".join(map(str, explanations)))
    console = Console()
    for found in [] if explain else plans:
        console.print(plan_table(found, wide=console.width >= 110))


@app.command()
def quantize(  # noqa: PLR0913  # a parameter for each option
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, safetensors file or hub id; the embedded model if left out."),
    ] = None,
    bits: Bits = "w4a4",
    recipe: Recipe = None,
    seed: RotationSeed = 0,
    rule: Rules = None,
    config: Annotated[
        Path | None, typer.Option(help="For a file that does not say what model it is: a folder with its config.json.")
    ] = None,
    device: On = Device.AUTO,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what was stopped, and keep what is done if stopped again.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")] = Path("quantized"),
) -> None:
    """Write a quantized copy of a model or a whole pipeline, with memory that does not grow with the model."""
    from orbitdit.integrations.conversion import quantize_folder

    settings = _config(bits, seed, rule, recipe)
    source = Path(model) if model is not None and os.path.isfile(model) else _find(model)
    quantize_folder(source, out, settings, _device(device), config, resume)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:,.1f} MB")


@app.command()
def verify(path: Saved) -> None:
    """Compare a quantized model or pipeline with what was saved: every tensor and configuration, by hashes."""
    from orbitdit.verify import verify as findings

    wrong = 0
    for finding in findings(path):
        wrong += bool(finding.problem)
        print(f"WRONG  {finding.problem}" if finding.problem else f"ok     {finding.where}: {finding.note}", flush=True)
    if wrong:
        sys.exit(1)


@app.command()
def info(path: Saved) -> None:
    """Show what a quantized model or pipeline is: layers, bits, sizes, where it came from, fingerprint."""
    from orbitdit.verify import describe

    for number, found in enumerate(describe(path)):
        if number:
            print()
        for key, value in found.items():
            print(f"{key:15} {value}")


@app.command()
def pack(
    path: Saved, out: Annotated[Path, typer.Option(help="The safetensors file to write; it must not exist.")]
) -> None:
    """Write a quantized model's folder as one safetensors file, which holds its configuration too."""
    from orbitdit.integrations.folders import load_model
    from orbitdit.integrations.single_file import save_file

    if out.exists() or out.suffix != ".safetensors":
        raise CheckpointError(f"--out {out} exists or does not end in .safetensors: choose another file")
    save_file(load_model(_find(str(path))), out)
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")


@app.command()
def generate(  # noqa: PLR0913  # a parameter for each option
    model: Model = None,
    prompt: Prompts = None,
    bits: Annotated[
        str | None, typer.Option(help="Quantize while loading, such as w4a4; as stored if left out.")
    ] = None,
    recipe: Recipe = None,
    seed: NoiseSeed = 0,
    rotation_seed: Annotated[int, typer.Option(help="Seed of the rotations.")] = 0,
    rule: Rules = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    device: On = Device.AUTO,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")] = Path("pictures"),
) -> None:
    """Generate a picture for each prompt."""
    from PIL import Image

    from orbitdit import evaluate
    from orbitdit.integrations.folders import load_model, load_pipeline, transformers_in

    if not prompt:
        raise ConfigError("there is nothing to generate: give at least one --prompt")
    if bits is None and (rule or rotation_seed or recipe):
        raise ConfigError("--recipe, --rule and --rotation-seed have no effect without --bits: give --bits too")
    config = _config(bits, rotation_seed, rule, recipe) if bits is not None else None
    folder, where = _find(model), _device(device)
    with new_folder(out) as scratch:
        dtype = evaluate.compute_dtype(where)
        pipeline = load_pipeline(folder, dtype)
        for name, path in transformers_in(folder).items() if config else []:
            pipeline.register_modules(**{name: load_model(path, config, dtype, where)})
        pipeline.to(where)
        pictures, seconds = evaluate.generate(
            pipeline, prompt, seed, **_options(steps, guidance, height, width, frames)
        )
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(scratch / f"{i:03d}.png")
    print(f"{out}: {len(pictures)} pictures in {seconds:.1f} s")


@app.command()
def compare(  # noqa: PLR0913  # a parameter for each option
    model: Model = None,
    bits: Annotated[list[str] | None, typer.Option(help="A setting to compare. Repeatable; w4a4 and w2a4.")] = None,
    recipe: Recipe = None,
    prompt: Prompts = None,
    per_category: Annotated[
        int, typer.Option(min=1, help="Without --prompt: prompts of each of the six categories (models of a world).")
    ] = 4,
    seed: NoiseSeed = 0,
    rotation_seed: Annotated[int, typer.Option(help="Seed of the rotations.")] = 0,
    rule: Rules = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    figure: Annotated[
        list[Path] | None, typer.Option(help="A PNG or SVG file to show on the page. Repeatable.")
    ] = None,
    device: On = Device.AUTO,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")] = Path("comparison"),
) -> None:
    """Generate the same prompts from the same noise at full precision and at each setting; page, grid, table, JSON."""
    from orbitdit import evaluate
    from orbitdit.integrations.folders import skeleton, transformers_in, world_of
    from orbitdit.model import plan as plan_model
    from orbitdit.page import comparison_page, read_figure
    from orbitdit.report import picture_grid, results_dict, results_table, write_json

    figures = [read_figure(path) for path in figure or []]
    configs, where = [_config(b, rotation_seed, rule, recipe) for b in bits or ["w4a4", "w2a4"]], _device(device)
    options = _options(steps, guidance, height, width, frames)
    with new_folder(out) as scratch:
        folder = _find(model)
        world = world_of(folder)
        prompts = prompt or ([p.text for p in benchmark(per_category, world=world)] if world else [])
        results = evaluate.compare(folder, configs, prompts, seed, where, **options)
        picture_grid(results, prompts).save(scratch / "grid.png", optimize=True)
        settings = {"model": model or "embedded", "device": where, "seed": seed, "rotation_seed": rotation_seed}
        settings |= {"recipe": recipe or "best", "rules": rule or [], **options}
        record = results_dict(results, prompts, **settings)
        write_json(record, scratch / "results.json")
        plans = [plan_model(skeleton(path), config) for config in configs for path in transformers_in(folder).values()]
        page = comparison_page(results, prompts, plans, record, figures)
        (scratch / "index.html").write_text(page, encoding="utf-8")
    Console().print(results_table(results, prompts))
    print(f"page: {out / 'index.html'}   pictures: {out / 'grid.png'}   figures: {out / 'results.json'}")


@app.command()
def evaluate(  # noqa: PLR0913  # a parameter for each option
    model: Model = None,
    bits: Annotated[list[str] | None, typer.Option(help="A setting to measure. Repeatable; the paper's five.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe to measure: best or paper. Repeatable; best.")
    ] = None,
    rotation_seed: Annotated[
        list[int] | None, typer.Option(help="Seed of the rotations. Repeatable; 0, 1 and 2.")
    ] = None,
    rule: Rules = None,
    prompt: Prompts = None,
    per_category: Annotated[
        int, typer.Option(min=1, help="Without --prompt: prompts of each of the six categories (models of a world).")
    ] = 200,
    seed: NoiseSeed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    device: On = Device.AUTO,
    out: Annotated[
        Path,
        typer.Option(help="JSON lines, added to as they are measured; what is there already is not measured again."),
    ] = Path("evaluation.jsonl"),
) -> None:
    """Measure scores, PSNR and SSIM at each setting and rotation seed on the fixed benchmark; JSON lines, resumable."""
    from orbitdit import evaluate
    from orbitdit.integrations.folders import world_of
    from orbitdit.lines import append_line, resume_lines
    from orbitdit.report import environment, figures

    settings = [(b, r) for b in bits or ["w4a6", "w4a4", "w3a3", "w2a4", "w2a3"] for r in recipe or ["best"]]
    configs = [_config(b, s, rule, r) for s in rotation_seed or [0, 1, 2] for b, r in settings]
    folder, where, options = _find(model), _device(device), _options(steps, guidance, None, None, None)
    world = world_of(folder)
    prompts = prompt or ([p.text for p in benchmark(per_category, world=world)] if world else [])
    asked = prompt or f"benchmark({per_category})"
    run = {"model": model or "embedded", "prompts": asked, "seed": seed, **options}
    rows, repaired = resume_lines(out)
    if repaired:
        print(f"orbitdit: {repaired}", file=sys.stderr)
    there = [(row.get("settings"), row.get("config")) for row in rows]
    todo = [c for c in configs if (run, c.to_dict()) not in there]
    print(f"{len(configs) - len(todo)} of {len(configs)} are in {out} already", flush=True)
    if not todo:
        return
    measured = evaluate.results(folder, todo, prompts, seed, where, **options)
    for config, result in zip([None, *todo], measured, strict=True):
        line = figures(result, prompts) | {"config": config and config.to_dict(), "settings": run}
        line["environment"] = environment()
        if config is not None or (run, None) not in there:
            append_line(out, line)
        score, distance = result.scores(prompts).get("overall"), result.psnr
        told = [] if score is None else [f"score {score:.3f}"]
        told += [] if distance is None else [f"{distance:.1f} dB"]
        told.append(f"{result.seconds:.1f} s")
        print(f"{result.label}, rotation seed {config.seed if config else '-'}: {', '.join(told)}", flush=True)


def main() -> None:
    """Run the command line; every error is one line on standard error."""
    for name in ("SIGTERM", "SIGHUP"):  # so that half-written folders are removed
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:
        _fail(error.format_message())
    except OrbitDiTError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA:
            raise
        _fail(f"{EXTRA[module]} is not installed: run pip install 'orbitdit[diffusers]'")
    except typer.Abort:
        _fail("interrupted")
    except OSError as error:
        _fail(f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error})")
    except MemoryError:
        _fail("there is not enough memory: choose a smaller model or picture")


def _fail(message: str) -> None:
    print(f"orbitdit: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _config(bits: str, seed: int, rules: list[str] | None, recipe: str | None) -> OrbitQuantConfig:
    pairs = []
    for rule in rules or []:
        glob, separator, action = rule.partition("=")
        if not separator:
            raise ConfigError(f"--rule {rule!r} is not GLOB=ACTION, such as '*.ff.*=w6a6'")
        pairs.append((glob, action))
    return OrbitQuantConfig(bits, recipe, seed=seed, rules=tuple(pairs))


def _find(model: str | None, weights: bool = True) -> Path:
    import diffusers

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
    return find_model(model, MODEL_DIR, weights)


def _device(device: Device) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ConfigError("--device cuda: no CUDA device is available; use --device cpu")
    return "cuda" if available and device is not Device.CPU else "cpu"


def _options(
    steps: int | None, guidance: float | None, height: int | None, width: int | None, frames: int | None
) -> dict[str, Any]:
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    given |= {"height": height, "width": width, "num_frames": frames}
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
