"""Build the wheel, install it into a fresh environment, and run the command line from outside the checkout.

    python -m scripts.check_wheel

First without extras, where each command must end in one line that says what to install, then with the extra
`diffusers`, where each must do its work. torch, which is gigabytes, is lent by the environment that runs this; all else
is installed by pip. Exit code 1, and what a command printed, when something is not as it should be. Nothing of the
checkout is written to.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "orbitdit"
INSTALL = "pip install 'orbitdit[diffusers]'"
TINY = ("--prompt", "a red circle", "--steps", "1", "--device", "cpu")
COMMANDS = {
    "plan": ("--bits", "w2a4"),
    "quantize": ("--out", "quantized"),
    "generate": (*TINY, "--bits", "w4a4"),
    "compare": (*TINY, "--bits", "w4a4"),
    "evaluate": (*TINY, "--bits", "w4a4", "--rotation-seed", "0"),
}
"""Command -> arguments with which it takes seconds."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="orbitdit-wheel-") as folder:
        check(Path(folder).resolve())


def check(folder: Path) -> None:
    """Everything, in the empty `folder`."""
    wheel = build(folder)
    check_contents(wheel)
    environment = Environment(folder / "environment", constraints(folder))
    environment.borrow("torch")
    environment.install(str(wheel))
    version, place = environment.run(
        "python", "-c", "import orbitdit as o; print(o.__version__, o.__file__)"
    ).stdout.split()
    expect(version == wheel.name.split("-")[1], f"the wheel is {wheel.name}, its __version__ {version}")
    expect(Path(place).is_relative_to(folder), f"{place} is imported, not the wheel")
    for command, arguments in COMMANDS.items():
        done = environment.run("orbitdit", command, *arguments, code=2)
        one_line = done.stdout == "" and len(done.stderr.splitlines()) == 1 and INSTALL in done.stderr
        expect(one_line, f"orbitdit {command} without extras printed\n{done.stdout}{done.stderr}")
        print(f"without extras: {done.stderr.strip()}", flush=True)
    environment.install(f"orbitdit[diffusers] @ {wheel.as_uri()}")
    for command, arguments in COMMANDS.items():
        done = environment.run("orbitdit", command, *arguments)
        print(f"with diffusers: orbitdit {command}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    written = {"quantized", "pictures", "comparison", "evaluation.jsonl"}
    expect({path.name for path in environment.outside.iterdir()} == written, f"{written} were to be written")


def build(folder: Path) -> Path:
    """The wheel, built from copies: in the checkout, setuptools would add what earlier builds left there."""
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds the package's files, all of them and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    wanted = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    expect(packed == wanted, f"these files are in the wheel or in the package only: {sorted(packed ^ wanted)}")
    print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)


def constraints(folder: Path) -> Path:
    """constraints.txt, with the torch of this environment."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("torch==")]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*lines, f"torch=={version('torch')}"]) + "\n", encoding="utf-8")
    return path


class Environment:
    """A fresh virtual environment, and an empty folder outside the checkout to run commands in."""

    def __init__(self, folder: Path, constraints: Path):
        self.bin, self.outside, self.constraints = folder / "bin", folder / "outside", constraints
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.outside.mkdir()
        (self.packages,) = folder.glob("lib/python*/site-packages")

    def borrow(self, name: str) -> None:
        """Link the files of a package that is installed here, and of all that it needs, into the environment."""
        todo, seen = [Requirement(name)], set()
        while todo:
            wanted = todo.pop()
            found, extras = distribution(wanted.name), ("", *sorted(wanted.extras))
            if (found.name, extras) in seen:
                continue
            seen.add((found.name, extras))
            needed = (Requirement(text) for text in found.requires or ())
            todo += (r for r in needed if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras))
            for file in found.files or ():
                link = self.packages / file
                if ".." not in file.parts and not link.exists():  # programs, such as torchrun, are not lent
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.locate())

    def install(self, requirement: str) -> None:
        """With this interpreter's pip. Bytecode is left to the imports, which make what they need."""
        where = ("--python", str(self.bin / "python"))
        pip(*where, "install", "--no-compile", "--constraint", str(self.constraints), requirement)

    def run(self, program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, offline, without the caller's PYTHON variables; it must end with `code`."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        variables |= {"HF_HUB_OFFLINE": "1"}
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, cwd=self.outside, env=variables, capture_output=True, text=True, timeout=300)
        told = f"{' '.join(command)} ended with {done.returncode}, not {code}\n{done.stdout}{done.stderr}"
        expect(done.returncode == code, told)
        return done


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        sys.exit(f"check_wheel: {otherwise}")


if __name__ == "__main__":
    main()
