"""Who may import whom, read from the syntax trees; and what a fresh process loads."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orbitdit
from orbitdit import errors

SOURCE = Path(orbitdit.__file__).parent
MAY_IMPORT = {
    "errors": "",
    "tables": "",
    "grids": "",
    "spec": "errors",
    "config": "errors spec",
    "rotation": "errors tables",
    "packing": "errors",
    "codebooks.lloyd_max": "errors grids packing spec tables",
    "codebooks.trellis": "config errors grids spec tables",
    "codebooks.uniform": "errors grids spec",
    "codebooks": "codebooks.lloyd_max codebooks.trellis grids spec tables",
    "families": "",
    "policy": "config errors families packing spec",
    "ops.nvrtc": "errors",
    "ops.operands": "errors",
    "ops.rotate_encode": "",
    "ops.rotate_encode.means": "codebooks.lloyd_max grids spec",
    "ops.rotate_encode.reference": "codebooks.lloyd_max grids ops.rotate_encode.means rotation spec tables",
    "ops.rotate_encode.cpu": "codebooks.lloyd_max grids ops.rotate_encode.means ops.rotate_encode.reference rotation "
    + "spec tables",
    "ops.rotate_encode.cuda": "codebooks.lloyd_max errors grids ops.nvrtc ops.rotate_encode.means "
    + "ops.rotate_encode.reference rotation spec",
    "ops.decode": "",
    "ops.decode.reference": "codebooks codebooks.lloyd_max ops.int4_linear.reference packing rotation spec",
    "ops.decode.cpu": "codebooks codebooks.lloyd_max packing spec tables",
    "ops.decode.cuda": "codebooks errors grids ops.nvrtc ops.operands spec",
    "ops.linear": "",
    "ops.linear.reference": "codebooks codebooks.lloyd_max grids ops.rotate_encode.reference packing rotation spec",
    "ops.linear.matmul": "ops.nvrtc",
    "ops.linear.cpu": "grids ops.decode.cpu ops.decode.reference ops.linear.reference ops.operands "
    + "ops.rotate_encode.cpu ops.rotate_encode.reference spec tables",
    "ops.linear.cuda": "grids ops.decode.cuda ops.linear.matmul ops.operands ops.rotate_encode.cuda spec",
    "ops.int4_linear": "",
    "ops.int4_linear.reference": "packing",
    "ops.int4_linear.cuda": "ops.int4_linear.reference ops.nvrtc",
    "ops.viterbi": "",
    "ops.viterbi.reference": "",
    "ops.viterbi.cuda": "errors ops.nvrtc",
    "ops": "grids ops.decode.cuda ops.decode.reference ops.int4_linear.cuda ops.int4_linear.reference ops.linear.cpu "
    + "ops.linear.cuda ops.linear.reference ops.operands ops.rotate_encode.cpu ops.rotate_encode.cuda "
    + "ops.viterbi.cuda ops.viterbi.reference spec",
    "quantize": "codebooks codebooks.lloyd_max config errors ops ops.decode.reference ops.rotate_encode.means packing "
    + "rotation spec",
    "weight": "errors",
    "tokens": "errors",
    "linear": "errors grids ops ops.int4_linear.reference ops.linear.reference quantize spec " + "tokens weight",
    "fusion": "families linear ops.rotate_encode.reference tokens",
    "model": "config errors fusion grids linear ops policy quantize",
    "explanation": "",
    "fallbacks": "errors explanation families fusion grids linear model ops ops.int4_linear.cuda ops.linear.matmul "
    + "ops.rotate_encode.cuda ops.rotate_encode.reference spec",
    "explain": "config errors explanation fallbacks fusion model",
    "atomic": "errors",
    "checkpoint": "errors manifest",
    "tensorfile": "checkpoint errors manifest",
    "convert": "checkpoint config errors fusion lines linear manifest model quantize spec tensorfile",
    "manifest": "codebooks codebooks.lloyd_max config errors ops.rotate_encode.means rotation spec",
    "verify": "checkpoint config errors manifest",
    "integrations": "integrations.diffusers integrations.saving integrations.single_file",
    "integrations.saving": "config errors integrations.diffusers manifest",
    "integrations.diffusers": "checkpoint config errors fusion linear manifest model policy quantize spec verify",
    "integrations.single_file": "atomic checkpoint config errors integrations.diffusers manifest verify",
    "files": "integrations.single_file",
    "integrations.folders": "checkpoint config errors integrations.diffusers integrations.single_file manifest "
    + "shapes.pipeline shapes.worlds verify",
    "integrations.layouts": "checkpoint errors tensorfile",
    "integrations.conversion": "atomic checkpoint config convert errors integrations.folders integrations.layouts "
    + "manifest verify",
    "metrics": "",
    "lines": "errors",
    "shapes": "",
    "shapes.worlds": "",
    "shapes.prompts": "errors shapes.worlds",
    "shapes.scenes": "shapes.prompts shapes.worlds",
    "shapes.detector": "shapes.prompts shapes.worlds",
    "shapes.pipeline": "errors shapes.prompts shapes.scenes shapes.worlds",
    "evaluate": "config errors integrations.folders metrics model policy shapes.detector shapes.prompts",
    "report": "atomic evaluate policy",
    "page": "errors evaluate metrics policy report",
    "cli": "atomic checkpoint config errors evaluate explain integrations.conversion integrations.folders "
    + "integrations.single_file lines model page report shapes shapes.prompts verify",
    "": "codebooks.lloyd_max config errors explain files integrations linear model policy rotation verify",
}
"""Module -> what it may import of the package; names are without "orbitdit.", which itself is the empty name. Calling
one of the package's ops through `torch.ops` counts as an import of `ops`, which registers them."""

MAY_IMPORT_OUTSIDE = {
    "diffusers": {
        *("integrations.diffusers", "integrations.folders", "integrations.layouts", "integrations.saving"),
        *("integrations.single_file", "shapes.pipeline", "cli"),
    },
    "accelerate": {"integrations.folders", "integrations.single_file"},
    "huggingface_hub": {"checkpoint", "convert"},
    "PIL": {"report", "page", "cli"},
    "rich": {"model", "integrations.conversion", "report", "page", "cli"},
    "typer": {"cli"},
}
"""Library -> the modules that may import it, at their top or where they use it."""
HEAVY = {"accelerate", "diffusers", "huggingface_hub", "PIL", "rich", "transformers", "triton", "typer"}
"""What `import orbitdit` does not load."""
NO_TORCH = {
    "",
    "errors",
    "lines",
    "spec",
    "config",
    "families",
    "policy",
    "explanation",
    "integrations",
    "shapes",
    "shapes.worlds",
    "shapes.prompts",
    "shapes.detector",
}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
FAMILY_MODULES = {name for name in TREES if name.startswith("families.")}
MAY_IMPORT |= dict.fromkeys(FAMILY_MODULES, "families")
NO_TORCH |= FAMILY_MODULES


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in `tree`, named in full by a string (for importlib), or called through
    torch's registry of ops."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layers"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("orbitdit.") in TREES}
            found |= modules if modules == whole else modules | {node.module}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"orbitdit(\.\w+)+", str(node.value)):
            found.add(node.value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.orbitdit":
            found.add("orbitdit.ops")
    return found


def packages(module: str, importer: str) -> set[str]:
    """The packages that are loaded before `module` is, but for those that `importer` itself is in."""
    parts = module.split(".")
    above = {".".join(parts[:length]) for length in range(1, len(parts))}
    return {name for name in above if not importer.startswith(f"{name}.")} - {importer}


@pytest.mark.parametrize("module", TREES)
def test_modules_import_only_what_is_below_them(module):
    own = {name.partition("orbitdit")[2].lstrip(".") for name in imported(TREES[module]) if name.startswith("orbitdit")}
    own -= {module}
    assert module in MAY_IMPORT, f"say in MAY_IMPORT what {module} may import"
    assert own <= set(MAY_IMPORT[module].split())


def test_the_table_has_no_cycles_and_no_stale_rows():
    assert set(MAY_IMPORT) == set(TREES)
    loads = {m: set(names.split()) for m, names in MAY_IMPORT.items()}
    loads = {m: names.union(*(packages(name, m) for name in names)) for m, names in loads.items()}
    below: set[str] = set()
    while len(below) < len(MAY_IMPORT):
        # registering needs the quantizer once diffusers is there: the one import that goes up, at run time
        ready = {m for m, names in loads.items() if m == "integrations" or names <= below}
        assert ready - below, f"a cycle among {set(MAY_IMPORT) - below}"
        below |= ready
    assert "cli" not in set().union(*loads.values())


def test_codebooks_call_no_ops():
    """Ops decode what codebooks define; the search for codes, which is an op, belongs to `quantize`."""
    for module, tree in TREES.items():
        if module.startswith("codebooks"):
            assert not {name for name in imported(tree) if name.startswith("orbitdit.ops")}
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "ops"]
    assert "orbitdit.ops" in imported(TREES["quantize"])
    assert imported(ast.parse("torch.ops.orbitdit.viterbi(z)")) == {"orbitdit.ops"}


@pytest.mark.parametrize("module", TREES)
def test_libraries_stay_where_they_belong(module):
    tops = {name.partition(".")[0] for name in imported(TREES[module])}
    assert not tops & {"triton", *UNSAFE}
    assert not tops & {library for library, users in MAY_IMPORT_OUTSIDE.items() if module not in users}
    assert module not in NO_TORCH or "torch" not in tops


@pytest.mark.parametrize("module", TREES)
def test_nothing_that_runs_code_from_files(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load")}
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
            assert "load" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "__import__"}
        assert not (isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"})


def test_public_names():
    assert orbitdit.__all__ == sorted(orbitdit.__all__)
    assert set(orbitdit.__all__) == {
        *("CheckpointError", "ConfigError", "DependencyError", "ModelError", "OrbitDiTError", "PromptError"),
        "TensorError",
        *("Codebook", "Int4Linear", "LayerPlan", "OrbitLinear", "OrbitQuantConfig", "Plan", "Rotation"),
        *("__version__", "dequantize_", "explain", "lloyd_max", "plan", "quantize_", "set_grid_"),
        *("load_file", "save_file", "unverified"),
    }
    imports = [node for node in TREES[""].body if isinstance(node, ast.ImportFrom)]
    here = {alias.name for node in imports for alias in node.names}
    assert here | {"__version__"} == {*orbitdit.__all__, "register_on_import"}
    assert all(hasattr(orbitdit, name) for name in orbitdit.__all__)
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(orbitdit.__all__)
    assert all(issubclass(getattr(errors, name), orbitdit.OrbitDiTError) for name in raised)


def test_the_version_is_the_changelogs_newest():
    """That it is the wheel's too, scripts/check_wheel.py sees."""
    text = (SOURCE.parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert released[0] == orbitdit.__version__
    assert released == sorted(released, key=lambda name: [int(part) for part in name.split(".")], reverse=True)


def fresh(code: str) -> list[str]:
    """What `code` prints in a new interpreter in which every warning is an error."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


REGISTERED = """
from diffusers.quantizers import auto
for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    print(table["orbitdit"].__name__, len([key for key in table if key == "orbitdit"]))
import sys, orbitdit
orbitdit.integrations.register_on_import()
import diffusers.loaders.single_file_model as single
print(single.FromOriginalModelMixin.from_single_file.__func__.of_diffusers.__func__.__module__)
print(sum(type(finder).__module__.startswith("orbitdit") for finder in sys.meta_path))
"""
REGISTRATIONS = ["OrbitQuantizer", "1", "OrbitQuantConfig", "1", "diffusers.loaders.single_file_model", "0"]


def test_importing_orbitdit_loads_no_heavy_library():
    """Beyond torch, which loads what it likes: its CUDA builds have triton beside them."""
    code = "import sys, torch\nthere = set(sys.modules)\nimport orbitdit\nprint(*set(sys.modules) - there)\n"
    loaded = fresh(code + "assert not torch.cuda.is_initialized()")
    assert "orbitdit.model" in loaded
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_orbitdit_registers_when_diffusers_comes():
    code = "import orbitdit, diffusers, sys\nprint('orbitdit.integrations.diffusers' in sys.modules)\n"
    assert fresh(code + REGISTERED)[1:] == REGISTRATIONS


@pytest.mark.parametrize(
    "first",
    [
        "import diffusers.quantizers.auto, orbitdit",
        "import orbitdit.shapes.pipeline",
        "import orbitdit.integrations.diffusers",
        "import orbitdit.evaluate",
    ],
)
def test_any_first_import_works_and_registers(first):
    assert fresh(first + REGISTERED) == REGISTRATIONS
