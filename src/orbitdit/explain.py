"""What runs for each layer of a quantized model, and why it is not more: kernels, fusion and sharing have quiet
fallbacks, which are right and slower.

    print(orbitdit.explain(pipe.transformer))                    # as it is, where it is
    print(orbitdit.explain(pipe.transformer, device="sm_90"))    # as it would run on an H100

Nothing is computed: the answer is read from the layers, from the modules in front of them and from what is known of the
model's family (see `families`), for the forward pass that diffusers has. A model that is not quantized is explained as
`quantize_` would make it, and may be on the meta device.
"""

import torch
from torch import nn

from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import ModelError
from orbitdit.explanation import Explanation
from orbitdit.fallbacks import Explainer, device_named
from orbitdit.fusion import connect
from orbitdit.model import empty_layer, linear_named, packed_layers, plan, replace_module


def explain(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: OrbitQuantConfig | None = None,
) -> Explanation:
    """How each linear layer of `model` runs for inputs in `dtype` on `device`.

    `dtype` is the model's own if left out. `device` may be an architecture that this machine lacks, such as "sm_90" or
    "cuda sm_86"; left out, it is where the weights are (name it for weights that are offloaded), or for weights on the
    meta device this machine's. A model that is not quantized is explained as `quantize_(model, config)` would make it;
    `config` is W4A4 if left out. The model is not changed.

    Raises ConfigError for a device that is unknown or not there, and ModelError for a model that is quantized where
    `config` is given, and as `orbitdit.plan` does.
    """
    quantized = isinstance(model, nn.Module) and next(packed_layers(model), None) is not None
    if quantized and config is not None:
        raise ModelError(f"{type(model).__name__} is quantized already: leave out config")
    target = None if device is None else device_named(device)
    if not quantized:
        config = config or OrbitQuantConfig()
        rows = plan(model, config).select("quantize", "int4")
        target = target or device_named(linear_named(model, rows[0].name).weight.device)
        twin = _skeleton(model)
        for row in rows:
            source = linear_named(model, row.name)
            shape = row.in_features, row.out_features, source.bias is not None
            empty = nn.Linear(*shape, device="meta", dtype=source.weight.dtype)
            replace_module(twin, row.name, empty_layer(empty, row))
        connect(twin)
        model = twin
    return Explainer(model, dtype, target).explanation()


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of the tree of modules, whose parameters and buffers are those of `module` itself: nothing may be written
    to them."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        twin.__dict__[name] = module.__dict__[name].copy()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _skeleton(child)
    return twin
