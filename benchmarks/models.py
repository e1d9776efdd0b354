"""One denoising step of the four families' transformers, with random weights, in bf16 at batch 1.

Every provider gets a model of its own, built from one seed. Its first step is timed with compilation in it, and its
output must be near that of the bf16 model. The providers share one attention backend. What else is measured of a step,
on a GPU alone, is in `steps`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.families import MODELS, Model
from benchmarks.measure import Limits, one_line, relative_error
from benchmarks.records import Recorder
from benchmarks.steps import attempt, free, graph_facts, kernel_facts, peak_gb, step, step_times, timed
from orbitdit import OrbitQuantConfig, plan, quantize_, set_grid_


@dataclass(frozen=True)
class Provider:
    """`prepare` changes a bf16 model in place; `bound` is how far its output may be from bf16's, relatively.

    The bounds are loose, for errors add up over some fifty blocks. An unrelated output is at 1.41; a FLUX of all 57
    blocks but a twelfth of the width is at 0.26 with W4A4 and at 0.60 with W2A4.
    """

    prepare: Callable[[nn.Module], None]
    bound: float
    peak: str
    compiled: bool


def unchanged(model: nn.Module) -> None:
    """bf16."""


def ours(bits: str, grid: str = "auto", **options: Any) -> Callable[[nn.Module], None]:
    def prepare(model: nn.Module) -> None:
        quantize_(model, OrbitQuantConfig(bits, **options), progress=False)
        if grid != "auto":
            set_grid_(model, grid)

    return prepare


def torchao_float8(model: nn.Module) -> None:
    """The layers that we quantize too, in float8 with a scale per row; modulation stays bf16."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization import quantize_ as torchao_quantize_

    names = {row.name for row in plan(model, OrbitQuantConfig("w4a4")).select("quantize")}
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    torchao_quantize_(model, config, filter_fn=lambda module, name: name in names)


def orbitquant(model: nn.Module) -> None:
    from orbitquant import quantize_model, recipe
    from orbitquant.kernels.native_packed_matmul import load_native_packed_matmul_kernel

    load_native_packed_matmul_kernel()  # raises when its kernels are not built
    quantize_model(model, recipe("w4a4", target_policy="auto"))


PROVIDERS = {
    "bf16": Provider(unchanged, 0.02, "bf16", compiled=False),
    "bf16 compiled": Provider(unchanged, 0.1, "bf16", compiled=True),
    "W4A4 compiled": Provider(ours("w4a4"), 0.6, "e4m3", compiled=True),
    "torchao float8 compiled": Provider(torchao_float8, 0.3, "e4m3", compiled=True),
    "W4A4": Provider(ours("w4a4"), 0.6, "e4m3", compiled=False),
    "W4A4 int8 compiled": Provider(ours("w4a4", grid="int8"), 0.6, "int8", compiled=True),
    "W2A4 trellis compiled": Provider(ours("w2a4"), 1.0, "e4m3", compiled=True),
    "W2A4 trellis uncentred compiled": Provider(ours("w2a4", centred_bits=()), 1.0, "e4m3", compiled=True),
    "W2A3 trellis compiled": Provider(ours("w2a3"), 1.0, "e4m3", compiled=True),
    "W3A3 trellis compiled": Provider(ours("w3a3"), 1.0, "e4m3", compiled=True),
    "W2A6 trellis compiled": Provider(ours("w2a6"), 1.0, "e4m3", compiled=True),
    "W2A4 trellis 2^10": Provider(ours("w2a4", trellis_states=10), 1.0, "e4m3", compiled=False),
    "W2A4 trellis 2^8": Provider(ours("w2a4", trellis_states=8), 1.0, "e4m3", compiled=False),
    "orbitquant W4A4": Provider(orbitquant, 0.6, "int8", compiled=False),
}
"""In the order of what must be known first; "int8" is the grid of GPUs without FP8 (compute capability 8.0 and 8.6)."""


@dataclass(frozen=True)
class Work:
    """What all providers of a case are given; `reference` is the bf16 model's output in fp32."""

    case: Model
    inputs: dict[str, Any]
    reference: Tensor
    device: str
    attention: str


def run_suite(device: str, recorder: Recorder, limits: Limits, attention: str) -> None:
    """Every model with every selected provider, in order; the deadline is looked at before each."""
    for case in MODELS:
        chosen = {name: made for name, made in PROVIDERS.items() if limits.selects(case.name, name)}
        try:
            with torch.no_grad():
                run_model(case, chosen, device, recorder, limits, attention)
        except Exception as problem:  # out of memory, say: the other models still run
            for name in chosen:
                recorder.write("models", case.name, name, "failed", note=one_line(problem))


def run_model(
    case: Model, providers: dict[str, Provider], device: str, recorder: Recorder, limits: Limits, attention: str
) -> None:
    if not providers or time.monotonic() > limits.deadline:
        for name in providers:
            recorder.write("models", case.name, name, "skipped", note="deadline")
        return
    inputs = case.inputs(device)
    model = build(case, device, attention)
    flops, reference = count_flops(model, inputs)
    del model
    work = Work(case, inputs, reference, device, attention)
    for name, provider in providers.items():
        free(device)
        if time.monotonic() > limits.deadline:
            recorder.write("models", case.name, name, "skipped", note="deadline")
            continue
        try:
            status, facts = run_provider(work, provider)
        except Exception as problem:  # whatever a peer raises is its result
            recorder.write("models", case.name, name, "failed", note=one_line(problem))
            continue
        recorder.write("models", case.name, name, status, peak=provider.peak, attention=attention, **facts, **flops)
    free(device)


def run_provider(work: Work, provider: Provider) -> tuple[str, dict[str, Any]]:
    """Status and facts of one provider: build, quantize, first step, gate, timed steps."""
    device, inputs = work.device, work.inputs
    model = build(work.case, device, work.attention)
    _, quantize_s = timed(device, lambda: provider.prepare(model))
    free(device)

    def first_step() -> Tensor:
        if provider.compiled:
            compile_blocks(work.case, model)
        return step(model, inputs)

    output, first_s = timed(device, first_step)
    error = relative_error(output, work.reference)
    graphs = graph_count()
    facts = {
        "error": round(error, 4),
        "bound": provider.bound,
        "quantize_s": round(quantize_s, 2),
        "first_step_s": round(first_s, 2),
        "model_gb": round(model_bytes(model) / 1e9, 3),
        "graphs": graphs,
    }
    del output
    if not error <= provider.bound:
        return "refused", {"note": "the correctness gate is red", **facts}
    facts |= step_facts(device, lambda: step(model, inputs), provider.compiled)
    return "ok", {**facts, "graphs_later": graph_count() - graphs}


def step_facts(device: str, call: Callable[[], Tensor], compiled: bool) -> dict[str, Any]:
    """Times and peak memory of steps; on a GPU their kernels, and if they are compiled a CUDA graph of them too."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    facts = {**step_times(device, call).facts(device), "peak_gb": peak_gb(device)}
    if device == "cuda":
        if compiled:
            facts |= attempt("graph", lambda: graph_facts(call))
        facts |= attempt("gpu", lambda: kernel_facts(call))
    return facts


def compile_blocks(case: Model, model: nn.Module, **options: Any) -> None:
    """Compile what the model repeats, each kind of block into one graph; `options` are torch.compile's."""
    case.mark_blocks(model)
    model.compile_repeated_blocks(fullgraph=True, **options)  # type: ignore[operator]


def build(case: Model, device: str, attention: str) -> nn.Module:
    """The model in bf16, its linear and convolution weights normal with the scale that keeps the input's."""
    torch.manual_seed(0)
    with torch.device(device):
        model = case.make().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules or ())
        parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)  # as from_pretrained does
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    model.set_attention_backend(attention)
    return model


def count_flops(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, int], Tensor]:
    """Arithmetic of one step in products and in attention, and the step's output in fp32: the reference.

    These models have no batched products outside attention, which torch may run as such.
    """
    with FlopCounterMode(display=False) as counter:
        output = step(model, inputs)
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(flops for op, flops in by_op.items() if "attention" in str(op) or "bmm" in str(op))
    return {"flops": sum(by_op.values()) - attention, "attention_flops": attention}, output.float()


def model_bytes(model: nn.Module) -> int:
    """What the parameters and buffers occupy; tensor subclasses are counted by what they hold."""
    return sum(tensor_bytes(t) for t in (*model.parameters(), *model.buffers()))


def tensor_bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def graph_count() -> int:
    """How many graphs torch.compile has made since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
