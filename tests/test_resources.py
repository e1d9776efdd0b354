"""Every kernel compiles for every architecture, and a block of it fits. NVRTC tells this without a GPU."""

import sys
from pathlib import Path

import pytest
import torch

from orbitdit import DependencyError
from orbitdit.ops import nvrtc

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import resources  # noqa: E402

ARCHITECTURES = {arch.name: arch for arch in resources.ARCHITECTURES}
LAUNCHES = {name: {launch.key: launch for launch in resources.launches(arch)} for name, arch in ARCHITECTURES.items()}
LINES = resources.read()
SOME = (
    ("rotate_encode", "1536 inputs, centred, 2 to 4 bits", "bf16"),  # copied while the token before is worked on
    ("rotate_encode", "3840 inputs, rms norm, 2 to 4 bits", "bf16"),
    ("rotate_encode", "15360 inputs, gelu, beside 3072, 2 to 4 bits", "bf16"),  # butterflies; spills
    ("rotate_encode", "24064 inputs, 6 bits", "fp16"),  # the most shared memory
    ("decode", "4 bits, scalar", "1 weights"),
    ("decode", "2 bits, 2^12 states", "4 weights and biases"),
    ("viterbi", "3 bits, 2^8 states", "fp32"),
    ("int4_linear", "3072 inputs", "bf16, copied by threads"),
    ("int4_linear", "3072 inputs", "bf16, copied in bulk"),
    ("rotate_encode", "3072 inputs, layer norm, means", "bf16"),
    ("scale", "sums in int32", "to bfloat16, bias bfloat16"),
)
"""Launches that every run of the tests compiles; `python -m benchmarks.resources` compiles all."""


MORE_SPILLED = 64
"""Bytes that a compiler of another version may spill more: NVRTC 12.9 spills up to 32 more."""


@pytest.fixture(scope="session")
def version():
    """NVRTC's version; without one that knows all architectures the test is skipped."""
    try:
        found = nvrtc.compiler_version()
    except DependencyError as error:
        pytest.skip(str(error))
    if tuple(map(int, found.split("."))) < (12, 8):
        pytest.skip(f"NVRTC {found} does not know sm_100 and sm_120")
    return found


@pytest.mark.parametrize("key", SOME, ids=" ".join)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_take_what_is_recorded(arch, key, version):
    """Exactly that with the compiler of the records; with others a block fits and little more is spilled."""
    if key not in LAUNCHES[arch]:
        assert "bulk" in key[2]
        assert arch in ("sm_80", "sm_86", "sm_89")
        return
    found, recorded = resources.resources(LAUNCHES[arch][key], ARCHITECTURES[arch]), LINES[key][arch]
    assert found["blocks"] >= 1
    if version == LINES[key]["nvrtc"]:
        assert found == recorded, resources.RERUN
    else:
        assert found["spills"][0] <= recorded["spills"][0] + MORE_SPILLED


def test_what_is_launched_is_recorded():
    recorded = {name: {key for key, line in LINES.items() if name in line} for name in ARCHITECTURES}
    assert {name: set(of_arch) for name, of_arch in LAUNCHES.items()} == recorded, resources.RERUN
    threads = {launch.key: launch.threads for of_arch in LAUNCHES.values() for launch in of_arch.values()}
    assert threads == {key: line["threads"] for key, line in LINES.items()}, resources.RERUN


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_recorded_block_fits(arch):
    """Counted a second way: a block that fits has registers for whole warps in four equal parts of the processor."""
    for key, launch in LAUNCHES[arch.name].items():
        found = LINES[key][arch.name]
        assert found["registers"] <= 255
        assert launch.shared <= found["shared"] <= arch.block_shared
        warps_of_a_part = -(-launch.threads // 128)
        assert -(-found["registers"] // 8) * 8 * 32 * warps_of_a_part <= 16384, key
        assert 1 <= found["blocks"] <= arch.threads // launch.threads
        assert found["blocks"] * (found["shared"] + 1024) <= arch.shared


def test_the_page_is_up_to_date():
    assert resources.PAGE.read_text() == resources.page(list(LINES.values())), resources.RERUN


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (128, 416, 0, 1),  # 13 warps, of which a part of the processor takes four
        (129, 416, 0, 0),
        (72, 416, 79392, 2),
        (72, 416, 116 << 10, 1),
        (32, 64, 0, 32),
        (32, 512, 0, 4),
        (255, 32, 227 << 10, 1),
        (255, 32, (227 << 10) + 1, 0),
        (256, 32, 0, 0),
    ],
)
def test_blocks_that_run_at_a_time(registers, threads, shared, blocks):
    assert ARCHITECTURES["sm_90"].blocks_at_a_time(registers, threads, shared) == blocks


def test_cells_have_the_worst_of_the_variants():
    one = {"registers": 80, "spills": [0, 0], "blocks": 3}
    assert resources._cell([]) == "-"
    assert resources._cell([one, one | {"registers": 72, "blocks": 2}]) == "80 / 2"
    assert resources._cell([one, one | {"spills": [44, 100]}]) == "80 / 3 / 44 B"


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(("arch", "known"), [("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_120", True)])
def test_instructions_for_e4m3_would_not_compile_below_sm_89(arch, known, monkeypatch):
    """So kernels that compile there have none."""
    convert = 'asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(r) : "f"(x));'
    text = f'extern "C" __global__ void k(float x, short* y) {{ short r; {convert} *y = r; }}'
    monkeypatch.setattr(nvrtc, "source", lambda name: text if name == "k.cu" else "")
    if known:
        code, _ = nvrtc.compile_with_log("k.cu", (), arch)
        assert code.startswith(b"\x7fELF")
        return
    with pytest.raises(RuntimeError, match=rf"cannot compile k\.cu for {arch}: .*e4m3x2"):
        nvrtc.compile_with_log("k.cu", (), arch)


@pytest.mark.parametrize(("cuda", "name"), [(None, "13"), ("13.0", "13"), ("12.8", "12")])
@pytest.mark.parametrize(("platform", "pattern"), [("linux", "libnvrtc.so.{}"), ("win32", "nvrtc64_{}0_0.dll")])
def test_the_compiler_is_that_of_torch(cuda, name, platform, pattern, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc.sys, "platform", platform)
    monkeypatch.setattr(nvrtc, "_library", lambda name: name)
    monkeypatch.setattr(nvrtc, "_in_wheels", lambda pattern: [])
    assert nvrtc._nvrtc.__wrapped__() == pattern.format(name)
