"""What comes before the encoding inside the kernel of `rotate_encode`, run by the emulator."""

import ctypes

import pytest
import torch
from emulated import How, rotate_encode

from encoding_checks import defined, prologue_inputs, random, tokens
from orbitdit import TensorError
from orbitdit.codebooks.lloyd_max import on_grid
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.spec import Encoding

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prologue", "dim", "first", "batch"),
    [
        ("gelu", 64, 0, 1),
        ("gelu", 192, 64, 1),
        ("gelu", 1920, 384, 1),
        ("gelu", 3072, 0, 1),
        ("gelu", 12288, 0, 1),
        ("gelu", 15360, 3072, 1),
        ("layer_norm", 64, 0, 6),
        ("layer_norm", 1536, 0, 2),
        ("layer_norm", 1920, 0, 3),
        ("layer_norm", 3072, 0, 1),
        ("layer_norm", 5120, 0, 2),
        ("silu", 64, 0, 1),
        ("silu", 1536, 0, 1),
        ("silu", 1920, 0, 1),
        ("silu", 10240, 0, 1),
        ("rms_norm", 64, 0, 6),
        ("rms_norm", 960, 0, 0),
        ("rms_norm", 3072, 0, 2),
        ("rms_norm", 3840, 0, 1),
        ("rms_norm", 3840, 0, 3),
    ],
)
def test_what_comes_before_the_encoding(prologue, dim, first, batch, dtype):
    x, args = prologue_inputs(prologue, 6, dim, first, batch, dtype)
    values, scales = rotate_encode(x, 4, "e4m3", prologue, args)
    expected, expected_scales = defined(apply_prologue(x, prologue, args), 4, "e4m3")
    # what rounds differently to 16 bits moves a token a little
    torch.testing.assert_close(scales, expected_scales, rtol=1e-3, atol=0)
    levels = on_grid(dim, 4, "e4m3", True).values.float()
    code, expected_code = (torch.bucketize(v.float(), levels) for v in (values, expected))
    assert (code - expected_code).abs().max() <= 1
    assert (code != expected_code).sum() <= 3 + 2e-3 * code.numel()
    again = rotate_encode(x, 4, "e4m3", prologue, args, how=How(blocks=1, reverse=True))
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("prologue", ["gelu", "layer_norm"])
def test_what_precedes_the_encoding_is_read_as_what_it_is(prologue, monkeypatch):
    """Other dtypes (a modulation in fp32), other strides and parts of tensors: the kernel reads 16-bit rows."""
    x, read = tokens(6, 64), []
    args = [random(2, 200, seed=seed)[:, 1:65] for seed in (7, 8)] if prologue == "layer_norm" else [random(6, 16).T.T]

    def launch(x_at, values, scales, count, *more):
        places = [(x_at, 64, 6, 64)]
        if prologue == "layer_norm":
            places += [(at, more[2], 2, 64) for at in more[:2]]
        else:
            places += [(more[0], more[1], 6, 16)]
        for at, pitch, rows, width in places:
            memory = (ctypes.c_uint16 * (pitch * (rows - 1) + width)).from_address(at)
            words = [memory[pitch * row : pitch * row + width] for row in range(rows)]
            read.append(torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16))

    monkeypatch.setattr(rotate_encode_cuda, "_launcher", lambda *_: launch)
    rotate_encode_cuda.rotate_encode(x, Encoding(64 + 16 * (prologue == "gelu"), 4, "int8"), prologue, args)
    assert len(read) == 1 + len(args)
    assert all(torch.equal(found, t.bfloat16()) for found, t in zip(read, [x, *args], strict=True))


def test_channels_beside_gelu_that_no_vector_takes_are_refused():
    with pytest.raises(TensorError, match="a multiple of 8 channels beside those of GELU; got 12"):
        rotate_encode_cuda.rotate_encode(tokens(2, 52), Encoding(64, 4, "int8"), "gelu", [tokens(2, 12)])


@pytest.mark.parametrize("prologue", ["gelu", "layer_norm", "silu", "rms_norm"])
def test_spoilt_tokens_leave_the_others_alone_whatever_comes_before(prologue):
    x, args = prologue_inputs(prologue, 5, 1536)
    values, scales = rotate_encode(x, 4, "e4m3", prologue, args)
    x[1, 7], x[3, 900] = torch.nan, torch.inf
    spoilt, spoilt_scales = rotate_encode(x, 4, "e4m3", prologue, args)
    good = torch.tensor([0, 2, 4])
    assert torch.equal(spoilt[good].view(torch.uint8), values[good].view(torch.uint8))
    assert torch.equal(spoilt_scales[good], scales[good])
    assert not spoilt_scales[[1, 3]].isfinite().any()
