"""Linear layers of the four families, from a bf16 input to a bf16 output, ours and the peers'."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import orbitdit
from benchmarks import peers
from benchmarks.measure import INPUTS, Candidate, Case, error_bound, relative_error
from benchmarks.peers import Forward, each
from orbitdit import Int4Linear, OrbitLinear, OrbitQuantConfig
from orbitdit.linear import share_inputs
from orbitdit.spec import INT4, LayerSpec, WeightCode
from orbitdit.tokens import Tokens

STORED_BITS = {"bf16": 16, "e4m3": 8, "int8": 8, "6": 6, "4": 4, "3": 3, "2": 2}
SAMPLE = 128
"""Rows at either end of the output that the gate compares."""


@dataclass(frozen=True)
class Provider:
    """Who competes: makes a forward pass out of linear layers that share an input.

    `weight` and `activation` name the formats, `peak` the arithmetic of the GEMM, `slack` how much worse than ideal
    the quantizers may be; `stored` is the format in memory where it is wider than the weight's.
    """

    make: Callable[[list[nn.Linear]], Forward]
    weight: str
    activation: str
    peak: str
    slack: float = 1.2
    stored: str | None = None


def ours(bits: str, grid: str = "e4m3", cache_decoded: bool = False, **options: Any) -> Provider:
    """Our layers with a configuration of these bits; of the paper's recipe unless `options` has another."""
    config = OrbitQuantConfig(bits, **{"recipe": "paper", **options})
    return Provider(
        lambda linears: our_layers(linears, config, grid, cache_decoded),
        str(config.weight_bits),
        str(config.activation_bits),
        "int8" if grid == "auto" else grid,
        stored=grid if cache_decoded else None,
    )


def our_layers(linears: list[nn.Linear], config: OrbitQuantConfig, grid: str, cache_decoded: bool) -> Forward:
    """Our layers; several of them get one value of `Tokens` a call, by which they share its encoding."""
    layers = [
        OrbitLinear.from_linear(linear, config.layer((linear.in_features, linear.out_features))) for linear in linears
    ]
    for layer in layers:
        orbitdit.set_grid_(layer, grid, cache_decoded=cache_decoded)
    if len(layers) == 1:
        return each(layers)
    share_inputs(layers)
    together = each(layers)
    return lambda x: together(Tokens(x))


def our_int4(linears: list[nn.Linear]) -> Forward:
    code = WeightCode(INT4, 4)
    specs = [LayerSpec(linear.in_features, linear.out_features, code, None, None) for linear in linears]
    return each([Int4Linear.from_linear(linear, spec) for linear, spec in zip(linears, specs, strict=True)])


ABSMAX = 2.0
"""Slack of quantizers that spend their range on the largest value."""

PROVIDERS = {
    "bf16": Provider(each, "bf16", "bf16", "bf16"),
    "W4A4": ours("w4a4"),
    "W3A3": ours("w3a3"),
    "W2A4": ours("w2a4"),
    "W2A3": ours("w2a3"),
    "W4A6": ours("w4a6"),
    "W2A4 trellis": ours("w2a4", codebook="trellis"),
    "W3A3 trellis": ours("w3a3", codebook="trellis"),
    "W4A4 int8": ours("w4a4", "int8"),
    "W2A4 int8": ours("w2a4", "int8"),
    "W2A4 trellis int8": ours("w2a4", "int8", codebook="trellis"),
    "W4A4 cached": ours("w4a4", cache_decoded=True),
    "orbitquant W4A4": Provider(lambda linears: peers.orbitquant(linears, "w4a4"), "4", "4", "int8"),
    "orbitquant W2A4": Provider(lambda linears: peers.orbitquant(linears, "w2a4"), "2", "4", "int8"),
    "torchao float8": Provider(peers.torchao_float8, "e4m3", "e4m3", "e4m3"),
    "torchao int8": Provider(peers.torchao_int8, "int8", "int8", "int8", ABSMAX),
    "comfy-kitchen W4A4": Provider(peers.comfy_w4a4, "4", "4", "int8", ABSMAX),
    "comfy-kitchen int8": Provider(peers.comfy_int8, "int8", "int8", "int8", ABSMAX),
    "sdnq int8": Provider(lambda linears: peers.sdnq(linears, "int8"), "int8", "int8", "int8", ABSMAX),
    "sdnq uint4": Provider(lambda linears: peers.sdnq(linears, "uint4"), "4", "int8", "int8", ABSMAX),
}
CPU_PROVIDERS = {
    "bf16": PROVIDERS["bf16"],
    **{bits.upper(): ours(bits, "auto") for bits in ("w4a4", "w3a3", "w2a4", "w2a3", "w4a6")},
    "W4A4 exact": ours("w4a4", "exact"),
}
MODULATION_PROVIDERS = {
    "bf16": Provider(each, "bf16", "bf16", "bf16"),
    "INT4": Provider(our_int4, "4", "bf16", "bf16"),
    "orbitquant INT4": Provider(peers.orbitquant_int4, "4", "bf16", "bf16"),
}
CENTRED_PROVIDERS = {
    "bf16": PROVIDERS["bf16"],
    "W2A4 centred": ours("w2a4", recipe="best"),
    "W2A4 uncentred": ours("w2a4", recipe="best", centred_bits=()),
}
"""The default recipe, and the same without centring."""
COMPETING = {"layer": PROVIDERS, "modulation": MODULATION_PROVIDERS, "centred tokens": CENTRED_PROVIDERS}
"""By the kind of a case."""


@dataclass(frozen=True)
class Layer:
    """`count` linear layers (width -> out) on one input of `tokens` rows.

    The input is (tokens, width); the layers of the kind "layer" have the paper's recipe, which centres no tokens.
    """

    tokens: int
    width: int
    out: int
    count: int = 1
    kind: str = "layer"

    @property
    def name(self) -> str:
        out = f"{self.count}x{self.out}" if self.count > 1 else str(self.out)
        return f"{self.kind} {self.tokens}, {self.width} to {out}"

    def inputs(self, device: str) -> list[Tensor]:
        """Random normal tokens. Those that are centred have half of their variance in common: without the product of
        their means the gate would be red."""
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        drawn = [torch.randn(self.tokens, self.width, **options) for _ in range(INPUTS)]
        if self.kind != "centred tokens":
            return drawn
        return [(x + torch.randn(self.width, **options)) / 2**0.5 for x in drawn]


LAYERS = (
    Layer(4608, 3072, 12288),
    Layer(4608, 3072, 3072),
    Layer(4608, 3072, 3072, count=3),
    Layer(4608, 12288, 3072),
    Layer(4608, 15360, 3072),
    Layer(32760, 5120, 13824),
    *(
        Layer(rows, width, out, kind="modulation")
        for width, out in ((3072, 18432), (3072, 9216), (256, 15360), (512, 18432))
        for rows in (1, 8)
    ),
    *(
        Layer(4608, width, out, count, kind="centred tokens")
        for width, out, count in (
            (3072, 12288, 1),
            (3072, 3072, 1),
            (3072, 3072, 3),
            (12288, 3072, 1),
            (15360, 3072, 1),
        )
    ),
    Layer(32760, 1536, 8960, kind="centred tokens"),
    Layer(4096, 3072, 9216),
    Layer(4096, 3840, 10240),
    Layer(32760, 1536, 8960),
    Layer(17776, 1920, 7680),
    Layer(512, 3072, 3072),
)
"""In the order of what must be known first: a deadline cuts off the end."""
CPU_LAYERS = (Layer(1024, 3072, 3072), Layer(4096, 3072, 3072), Layer(256, 3072, 3072))


@dataclass
class Workload:
    """The tensors of a layer's case: its inputs, and weights that keep their scale."""

    layer: Layer
    device: str

    def __post_init__(self) -> None:
        layer, options = self.layer, {"device": self.device, "dtype": torch.bfloat16}
        torch.manual_seed(0)
        self.inputs = layer.inputs(self.device)
        self.linears = [nn.Linear(layer.width, layer.out, **options) for _ in range(layer.count)]
        with torch.no_grad():
            for linear in self.linears:
                linear.weight.normal_(std=layer.width**-0.5)
                linear.requires_grad_(False)
        rows = range(layer.tokens)
        self.rows = sorted({*rows[:SAMPLE], *rows[-SAMPLE:]})
        sample = self.sampled(self.inputs[0]).float()
        self.reference = torch.cat(
            [sample @ linear.weight.float().T + linear.bias.float() for linear in self.linears], dim=-1
        )

    def sampled(self, x: Tensor) -> Tensor:
        """The rows (sample, channels) of `x` (..., tokens, channels) that the gate compares."""
        return x.flatten(0, -2)[self.rows]

    def candidate(self, provider: Provider) -> Candidate:
        forward = provider.make(self.linears)

        def error() -> float:
            outputs = torch.cat([self.sampled(y) for y in forward(self.inputs[0])], dim=-1)
            return relative_error(outputs, self.reference)

        bound = error_bound(provider.weight, provider.activation, provider.slack)
        return Candidate(lambda i: forward(self.inputs[i]), error, bound, self.facts(provider))

    def facts(self, provider: Provider) -> dict[str, float | str]:
        """Arithmetic, and the bytes that must be moved: input, weights as they are stored, outputs."""
        layer = self.layer
        weights = layer.width * layer.out * layer.count
        stored = weights * STORED_BITS[provider.stored or provider.weight] // 8
        moved = 2 * layer.tokens * (layer.width + layer.out * layer.count) + stored
        return {"flops": 2 * layer.tokens * weights, "bytes": moved, "peak": provider.peak}


def case_of(layer: Layer, device: str, providers: Mapping[str, Provider] | None = None) -> Case:
    """The case of a layer with its usual providers, or with others."""
    competing = providers or COMPETING[layer.kind]

    def opened() -> Mapping[str, Callable[[], Candidate]]:
        work = Workload(layer, device)
        return {name: lambda made=made: work.candidate(made) for name, made in competing.items()}

    return Case(layer.name, tuple(competing), opened)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [case_of(layer, device, CPU_PROVIDERS) for layer in CPU_LAYERS]
    return [case_of(layer, device) for layer in LAYERS]
