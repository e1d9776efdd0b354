"""Blocks of diffusers' models whose norms and activations run inside the encoding of the layer that follows.

A norm with AdaLN's modulation, and the GELU or gated SiLU of a feed-forward, directly precede a quantized layer; the
kernel that encodes its tokens can compute them on the way, and what lies between is never written to memory. A block
that can is given a class of the same name with a forward pass of its own, which falls back to the original's where it
must: on devices without kernels, where tokens are centred (their means are of what is encoded), for gradients, adapters
and hooks, for attention processors that are not the model's own.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from orbitdit.kernels import EXACT
from orbitdit.kernels.reference import NORM_EPSILONS
from orbitdit.linear import OrbitLinear, SharedInput, is_hooked


def fuse_blocks(model: nn.Module) -> None:
    """Give the blocks of `model` that `FUSED` names their fused forward pass, if diffusers' own takes what is known."""
    for block in model.modules():
        base: Any = type(block)
        if not hasattr(base, "unfused") and _forward_for(base) is not None:
            block.__class__ = _fused(base)


def unfuse_blocks(model: nn.Module) -> None:
    """Undo `fuse_blocks`."""
    for block in model.modules():
        base = getattr(type(block), "unfused", None)
        if base is None:
            continue
        for name in ("forward", "_old_forward"):  # where accelerate's hooks leave a bound method behind
            if getattr(block.__dict__.get(name), "__func__", None) is type(block).forward:
                setattr(block, name, base.forward.__get__(block))
        block.__class__ = base


def _forward_for(base: Any) -> Callable | None:
    """The fused forward pass for diffusers' class of this name whose own takes the same parameters."""
    for forward in FUSED.get(base.__name__, ()):
        if list(inspect.signature(base.forward).parameters) == list(inspect.signature(forward).parameters):
            return forward
    return None


@cache
def _fused(base: Any) -> type[nn.Module]:
    """A subclass with the name of `base`, by which diffusers and torch.compile find repeated blocks."""

    def reduce(block: nn.Module, protocol: int) -> tuple:
        return _revive, (base,), block.__dict__

    own = {"forward": _forward_for(base), "unfused": base, "unfused_forward": base.forward}
    return type(base.__name__, (base,), {**own, "__reduce_ex__": reduce, "__module__": base.__module__})


def _revive(base: Any) -> nn.Module:
    """An empty block to fill, for copies and pickles."""
    return _fused(base).__new__(_fused(base))


def _ready(x: Tensor, layers: Iterable[nn.Module], bypassed: Iterable[nn.Module] = ()) -> bool:
    """Whether kernels run all of `layers` on what is like `x`, nobody watches them or the modules that are `bypassed`,
    and nobody asks for gradients: of `x`, of the text or of the modulation, which kernels would cut off."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    for layer in layers:
        if type(layer) is not OrbitLinear or layer.grid_for(x) == EXACT:
            return False
        if layer.mean_tokens:  # means are of what is encoded
            return False
    for module in (*layers, *bypassed):
        if is_hooked(module) or module._forward_pre_hooks or module._forward_hooks:
            return False
    return True


def _plain_norm(norm: Any) -> bool:
    known = type(norm) is nn.LayerNorm or type(norm).__name__ == "FP32LayerNorm"
    return known and not norm.elementwise_affine and norm.eps == NORM_EPSILONS["layer_norm"]


def _plain_rms_norm(norm: Any, x: Tensor) -> bool:
    """Whether this is diffusers' RMSNorm without a bias, and its weight is like `x` and at hand."""
    known = type(norm).__name__ == "RMSNorm" and norm.weight is not None and getattr(norm, "bias", None) is None
    alike = known and norm.weight.dtype == x.dtype and norm.weight.device == x.device
    return alike and norm.eps == NORM_EPSILONS["rms_norm"]


def _has_gelu(feed_forward: Any) -> bool:
    """Whether this is diffusers' feed-forward with the tanh approximation of GELU, and nothing drops out."""
    gelu, dropout = feed_forward.net[0], feed_forward.net[1]
    known = type(gelu).__name__ == "GELU" and gelu.approximate == "tanh" and type(dropout) is nn.Dropout
    return known and (dropout.p == 0 or not feed_forward.training)


def _feed_forward(feed_forward: Any, x: Tensor, before: str = "", *extras: Tensor) -> Tensor:
    y = feed_forward.net[2].after("gelu", feed_forward.net[0].proj.after(before, x, *extras))
    for module in feed_forward.net[3:]:
        y = module(y)
    return y


def feed_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' FeedForward: GELU inside the encoding of the second layer."""
    usual = _has_gelu(self) and not args and not kwargs
    if not (usual and _ready(hidden_states, (self.net[0].proj, self.net[2]), (self.net[0], self.net[1]))):
        return self.unfused_forward(hidden_states, *args, **kwargs)
    return _feed_forward(self, hidden_states)


def _has_silu(feed_forward: Any) -> bool:
    """Whether this is Z-Image's feed-forward: others of its name and parameters may have another activation."""
    return hasattr(feed_forward, "_forward_silu_gating")


def _gated_feed_forward(feed_forward: Any, x: Tensor) -> Tensor:
    return feed_forward.w2.after("silu", feed_forward.w1(x), feed_forward.w3(x))


def gated_feed_forward(self: Any, x: Tensor) -> Tensor:
    """Z-Image's FeedForward: SiLU and the gate inside the encoding of the last layer."""
    if not (_has_silu(self) and _ready(x, (self.w1, self.w3, self.w2))):
        return self.unfused_forward(x)
    return _gated_feed_forward(self, x)


def _known_attention(attention: Any, processor: str) -> bool:
    """Whether attention projects the very tensors that it is given, once each, as diffusers' own `processor` does."""
    return type(attention.processor).__name__ == processor and not attention.fused_projections


def _shared(layers: tuple[OrbitLinear, ...]) -> SharedInput | None:
    """What `layers` share, if it is all of them and no others."""
    shared = layers[0].shared_input
    if shared is None or len(shared.members) != len(layers):
        return None
    for layer in layers:
        if layer.shared_input is not shared or shared.members[layer.shared_place] is not layer:
            return None
    return shared


def _clip(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def flux_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FLUX's single-stream block: the norm inside the encoding for q, k, v and MLP, GELU inside that of `proj_out`."""
    attention, norm, gelu = self.attn, self.norm, self.act_mlp
    members = attention.to_q, attention.to_k, attention.to_v, self.proj_mlp
    usual = (
        _known_attention(attention, "FluxAttnProcessor")
        and _plain_norm(norm.norm)
        and type(gelu) is nn.GELU
        and gelu.approximate == "tanh"
    )
    ready = usual and _ready(hidden_states, (*members, self.proj_out), (norm, norm.norm, gelu))
    shared = _shared(members) if ready else None
    if shared is None:
        given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        return self.unfused_forward(*given)
    text = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
    shared.hold(hidden_states, "layer_norm", scale, shift)
    mlp = self.proj_mlp(hidden_states)
    attended = attention(hidden_states, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    hidden_states = _clip(hidden_states + gate[:, None] * self.proj_out.after("gelu", mlp, attended))
    return hidden_states[:, :text], hidden_states[:, text:]


def flux_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """FLUX's double-stream block: every norm and every GELU inside an encoding."""
    attention, streams = self.attn, (self.ff, self.ff_context)
    members = attention.to_q, attention.to_k, attention.to_v
    context_members = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    norms = self.norm1.norm, self.norm1_context.norm, self.norm2, self.norm2_context
    known = _known_attention(attention, "FluxAttnProcessor")
    usual = known and all(map(_plain_norm, norms)) and all(map(_has_gelu, streams))
    layers = (*members, *context_members, *(layer for ff in streams for layer in (ff.net[0].proj, ff.net[2])))
    bypassed = (*norms, self.norm1, self.norm1_context, *(m for ff in streams for m in (ff, ff.net[0], ff.net[1])))
    usual = usual and self.norm1.emb is None and self.norm1_context.emb is None
    ready = usual and _ready(hidden_states, layers, bypassed)
    shared, context_shared = (_shared(members), _shared(context_members)) if ready else (None, None)
    if shared is None or context_shared is None:
        given = hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        return self.unfused_forward(*given)
    gates = []
    for norm, part, tokens in (
        (self.norm1, shared, hidden_states),
        (self.norm1_context, context_shared, encoder_hidden_states),
    ):
        shift, scale, *rest = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        part.hold(tokens, "layer_norm", scale, shift)
        gates.append(rest)
    attended = attention(
        hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    outputs = []
    for x, y, (gate, shift, scale, ff_gate), ff in zip(
        (hidden_states, encoder_hidden_states), attended, gates, streams, strict=True
    ):
        x = x + gate[:, None] * y
        outputs.append(x + ff_gate[:, None] * _feed_forward(ff, x, "layer_norm", scale, shift))
    return _clip(outputs[1]), outputs[0]


def _add_gated(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    return x + (y if gate is None else gate.tanh()[:, None] * y)


def z_image_block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """Z-Image's block, with modulation of all tokens alike or without any: what precedes q, k, v and the layers of the
    feed-forward inside an encoding."""
    attention, ff, norms = self.attention, self.feed_forward, (self.attention_norm1, self.ffn_norm1)
    members, gated = (attention.to_q, attention.to_k, attention.to_v), (ff.w1, ff.w3)
    known = _known_attention(attention, "ZSingleStreamAttnProcessor") and _has_silu(ff)
    known = known and all(_plain_rms_norm(norm, x) for norm in norms)
    alike = noise_mask is None and (not self.modulation or (adaln_input is not None and adaln_input.dtype == x.dtype))
    ready = known and alike and _ready(x, (*members, *gated, ff.w2), (*norms, ff))
    shared, gated_shared = (_shared(members), _shared(gated)) if ready else (None, None)
    if shared is None or gated_shared is None:
        given = x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean
        return self.unfused_forward(*given)
    parts = self.adaLN_modulation(adaln_input).chunk(4, dim=1) if self.modulation else ()
    shared.hold(x, "rms_norm", norms[0].weight, *parts[:1])
    attended = attention(x, attention_mask=attn_mask, freqs_cis=freqs_cis)
    x = _add_gated(x, self.attention_norm2(attended), *parts[1:2])
    gated_shared.hold(x, "rms_norm", norms[1].weight, *parts[2:3])
    return _add_gated(x, self.ffn_norm2(_gated_feed_forward(ff, x)), *parts[3:])


def wan_block(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    """Wan's block: the two modulated norms and GELU inside an encoding. Scale and shift, which Wan has in fp32, are
    rounded to the dtype of the tokens, as the tokens are themselves."""
    attention, ff = self.attn1, self.ffn
    members = attention.to_q, attention.to_k, attention.to_v
    known = _known_attention(attention, "WanAttnProcessor") and _has_gelu(ff) and temb.ndim == 3
    usual = known and _plain_norm(self.norm1) and _plain_norm(self.norm3)
    bypassed = self.norm1, self.norm3, ff, ff.net[0], ff.net[1]
    ready = usual and _ready(hidden_states, (*members, ff.net[0].proj, ff.net[2]), bypassed)
    shared = _shared(members) if ready else None
    if shared is None:
        return self.unfused_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
    x, parts = hidden_states, self.scale_shift_table + temb.float()
    gate, ff_gate = parts[:, 2:3], parts[:, 5:]
    shift, scale, _, ff_shift, ff_scale, _ = parts.to(x.dtype).unbind(1)
    shared.hold(x, "layer_norm", scale, shift)
    x = (x.float() + attention(x, None, None, rotary_emb) * gate).type_as(x)
    x = x + self.attn2(self.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    return (x.float() + _feed_forward(ff, x, "layer_norm", ff_scale, ff_shift).float() * ff_gate).type_as(x)


FUSED: dict[str, tuple[Callable, ...]] = {
    "FeedForward": (feed_forward, gated_feed_forward),
    "FluxSingleTransformerBlock": (flux_single_block,),
    "FluxTransformerBlock": (flux_block,),
    "WanTransformerBlock": (wan_block,),
    "ZImageTransformerBlock": (z_image_block,),
}
"""Forward passes by the name of diffusers' class, told apart by their parameters."""
