"""What the calibrated methods know of a model's activations, from one pass over prompts.

Forward hooks reduce the inputs of each layer as they come, so that memory does not grow with the prompts: for each
layer (dim, dim) for the second moments, a few vectors, and TOKENS tokens drawn at random.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orbitdit import OrbitQuantConfig, plan
from orbitdit.errors import ModelError
from orbitdit.evaluate import batch_of, generate

GROUPS = 3
"""Groups of timesteps, from noise to picture, that magnitudes are kept apart for."""
TOKENS = 2048


class Statistics(NamedTuple):
    """Of the inputs x (tokens, dim) of one layer, all fp32 on the model's device: `absmax` (GROUPS, dim), max|x| of
    each channel in each group of timesteps; `least` (dim,), min x; `mean` (dim,); `hessian` (dim, dim), the mean of
    x x^T; `tokens` (about TOKENS, dim), a sample."""

    absmax: Tensor
    least: Tensor
    mean: Tensor
    hessian: Tensor
    tokens: Tensor

    def shifted(self, shift: Tensor) -> "Statistics":
        """Of x + `shift`; magnitudes are bounds where signs differ."""
        cross = shift[:, None] * self.mean
        hessian = self.hessian + cross + cross.T + shift[:, None] * shift
        return Statistics(self.absmax + shift, self.least + shift, self.mean + shift, hessian, self.tokens + shift)


class _Steps:
    """Numbers the denoising steps of one generation, by changes of the timestep that the model is called with."""

    def __init__(self, total: int):
        self.total, self.step, self.last = total, -1, None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        time = kwargs.get("timestep", kwargs.get("t"))
        if time is None:
            raise ModelError(
                f"{type(module).__name__} is called without a timestep or t by name: it cannot be calibrated"
            )
        value = float(torch.as_tensor(time).flatten()[0])
        if value != self.last:
            self.step, self.last = (self.step + 1) % self.total, value

    @property
    def group(self) -> int:
        return self.step * GROUPS // self.total


class _Collector:
    """The running statistics of one layer; a forward pre-hook."""

    def __init__(self, dim: int, device: torch.device, steps: _Steps, per_call: int, seed: int):
        self.steps, self.per_call, self.count = steps, per_call, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.absmax = torch.zeros(GROUPS, dim, device=device)
        self.least = torch.full((dim,), torch.inf, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.moments = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.tokens: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        group = self.absmax[self.steps.group]
        torch.maximum(group, x.abs().amax(0), out=group)
        torch.minimum(self.least, x.amin(0), out=self.least)
        self.total += x.sum(0)
        self.moments += x.T @ x
        chosen = torch.randint(len(x), (self.per_call,), generator=self.generator)
        self.tokens.append(x[chosen.to(x.device)])
        self.count += len(x)

    def statistics(self, name: str) -> Statistics:
        if not self.count:
            raise ModelError(f"{name} was never called while calibrating: its statistics are unknown")
        mean, hessian = (self.total / self.count).float(), (self.moments / self.count).float()
        return Statistics(self.absmax, self.least, mean, hessian, torch.cat(self.tokens))


@torch.no_grad()
def calibrate(
    pipeline: Any, components: Sequence[str], prompts: Sequence[str], steps: int, seed: int, **options: Any
) -> dict[str, dict[str, Statistics]]:
    """Statistics of every layer that `orbitdit.plan` quantizes in the named components (transformers) of `pipeline`.

    `prompts` are generated from the noise of seeds `seed`, `seed` + 1, ... in `steps` steps, in full precision;
    `options` go to the pipeline's call. Which layers are chosen does not depend on bits. Raises ModelError for a layer
    that is never called, or a model that is not told the timestep by name.
    """
    hooks, found = [], {}
    for component in components:
        model = getattr(pipeline, component)
        clock = _Steps(steps)
        per_call = -(-TOKENS // max(1, steps * -(-len(prompts) // batch_of(pipeline))))
        hooks.append(model.register_forward_pre_hook(clock, with_kwargs=True))
        for number, row in enumerate(plan(model, OrbitQuantConfig("w4a4")).select("quantize")):
            module = model.get_submodule(row.name)
            collector = _Collector(row.in_features, module.weight.device, clock, per_call, number)
            hooks.append(module.register_forward_pre_hook(collector))
            found[component, row.name] = collector
    try:
        generate(pipeline, prompts, seed, "calibrating", num_inference_steps=steps, **options)
    finally:
        for hook in hooks:
            hook.remove()
    result: dict[str, dict[str, Statistics]] = {component: {} for component in components}
    for (component, name), collector in found.items():
        result[component][name] = collector.statistics(name)
    return result


AllStatistics = Mapping[str, Mapping[str, Statistics]]
