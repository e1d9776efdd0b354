"""Feed what reads files with damaged ones, guided by coverage (needs `pip install atheris`, Python 3.12 or older).

    python -m scripts.fuzz FOLDER -max_total_time=1200

FOLDER holds the inputs found so far; it is made and seeded if it is not there. The first byte of an input says what
reads the rest. Anything but an error of orbitdit in one line ends the run, with the input in a file "crash-...".
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["orbitdit"]):
    from orbitdit import OrbitDiTError, OrbitQuantConfig, manifest, plan
    from orbitdit.checkpoint import check_folder, read_json
    from orbitdit.integrations.folders import components_in, model_of, world_of
    from orbitdit.integrations.layouts import file_sources, flux_config, in_layout_of
    from orbitdit.spec import LayerSpec
    from orbitdit.verify import verify

import torch
from safetensors.torch import save

from scripts.faults import flux

WORK = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
FILE, CONFIG, INDEX = "diffusion_pytorch_model.safetensors", "config.json", "model_index.json"


def put(name: str, data: bytes) -> Path:
    (WORK / name).write_bytes(data)
    return WORK / name


def configuration(data: bytes) -> None:
    OrbitQuantConfig.from_dict(read_json(put("x.json", data)))


def spec(data: bytes) -> None:
    LayerSpec.parse(data.decode("latin1"))


def header(data: bytes) -> None:
    for source in file_sources(put("x.safetensors", data)).values():
        source.read(0, min(source.rows, 3))


def layout(data: bytes) -> None:
    path = put("x.safetensors", data)
    sources = file_sources(path)
    flux_config(sources)
    in_layout_of(MODEL, sources, path)


def a_manifest(data: bytes) -> None:
    manifest.loads(data.decode("latin1"), "x")


def saved(data: bytes) -> None:
    config, _, file = data.partition(b"\0\0\0\0\n")
    put(CONFIG, config)
    put(FILE, file)
    list(verify(WORK))
    check_folder(WORK)


def model(data: bytes) -> None:
    config = read_json(put("x.json", data))
    if not any(type(value) is int and value > 10**4 for value in config.values()):  # large models take their time
        plan(model_of(config, WORK), OrbitQuantConfig())


def index(data: bytes) -> None:
    put(INDEX, data)
    world_of(WORK)
    components_in(WORK)


READERS: list[Callable[[bytes], None]] = [configuration, spec, header, layout, a_manifest, saved, model, index]
MODEL = flux(0)


def test_one_input(data: bytes) -> None:
    """Give the input to its reader."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except OrbitDiTError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
    finally:
        for path in WORK.iterdir():
            path.unlink()


def seeds() -> list[bytes]:
    """Valid inputs of every reader."""
    config = json.dumps(OrbitQuantConfig("w2a4", rules=[("*.ff.*", "w6a6")]).to_dict()).encode()
    file = save({"a.weight": torch.ones(2, 3), "a.scale_weight": torch.ones(()), "a.codes": torch.ones(2).byte()})
    bfl = save({"double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2), "vector_in.in_layer.weight": torch.ones(2, 2)})
    described = json.dumps({**MODEL.config, "_class_name": "FluxTransformer2DModel"}, default=str).encode()
    made = manifest.dumps(manifest.make({"quantization_config": {"layers": {}}}, {"a": "0" * 32})).encode()
    listed = json.dumps(
        {"_class_name": "ShapesPipeline", "world": "shapes", "transformer": ["diffusers", "X"]}
    ).encode()
    both = described + b"\0\0\0\0\n" + file
    inputs = [config, b"3072x3072 trellis2.12.unbiased a4g16 s0", file, bfl, made, both, described, listed]
    return [bytes([number]) + data for number, data in enumerate(inputs)]


def main() -> None:
    """Seed the folder and run."""
    folder = Path(sys.argv[1])
    if not folder.exists():
        folder.mkdir(parents=True)
        for number, data in enumerate(seeds()):
            (folder / f"seed-{number}").write_bytes(data)
    logging.disable(logging.CRITICAL)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
