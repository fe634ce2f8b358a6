"""The same function in canonical weights: many models compute one function, and most measures of
sharpness tell them apart.

Dinh et al. 2017 (arXiv 1703.04933) make any minimum as sharp as they like by rescaling ReLU layers.
A gated transformer has such freedoms too: norm gains move into the next matrices, hidden units of
an MLP trade scale between ``up`` and ``down``, values trade any change of basis with the output
projection, queries and keys trade scale within a rotary frequency. Two models are compared fairly
once both are canonical.
"""

from __future__ import annotations

import copy

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.evaluation.losses import evaluating

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the families whose freedoms are known here."""

_NO_SCALE = (
    "silu",
    "swish",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "sigmoid",
    "tanh",
)  # activations without a scale of their own, unlike ReLU


def invariances() -> pd.DataFrame:
    """Function-identical rewrites of a Llama-like model: ``rewrite``, what :func:`canonicalise`
    does about it, and whether it changes curvature without it.

    ``curvature`` says whether the rewrite changes eigenvalues, trace, spectral density, gradient
    norm and the rise or fall within a Euclidean radius; ``relative_flatness`` whether it changes
    :func:`workbench.sharpness.trace.relative_flatness` of some layer; ``elementwise`` whether it
    changes adaptive measures whose step in a weight is proportional to it (ASAM).
    """
    rows = [
        ("order of hidden units or heads", "nothing to do", "no", "no", "no"),
        (
            "norm gain into the next matrices",
            "gains are 1; with a tied head the final gain stays",
            "yes",
            "yes",
            "no",
        ),
        ("scale of a hidden unit between up and down", "equal norms", "yes", "yes (down)", "no"),
        (
            "basis of the values of a key-value head between v and o",
            "equal singular values",
            "yes",
            "yes (o)",
            "yes",
        ),
        ("bias of v into the bias of o", "bias of v is 0", "yes", "yes (o)", "yes"),
        (
            "scale of a rotary frequency between q and k (qwen3: between the gains of their norms)",
            "equal norms",
            "yes",
            "no",
            "no",
        ),
        ("rotation within a rotary frequency (not qwen3)", "nothing to do", "no", "no", "yes"),
        (
            "one vector added to every row of an untied head",
            "left: the Hessian is the same there",
            "no",
            "no",
            "yes",
        ),
        (
            "scale of the whole residual stream (exact only without the epsilon of the norms)",
            "left",
            "yes",
            "no",
            "no",
        ),
        (
            "scale of a head's q or k before its norm (qwen3; exact only without the epsilon)",
            "left",
            "yes",
            "no",
            "no",
        ),
        (
            "rotation of the whole residual stream (all gains 1)",
            "left",
            "only with the gains among the parameters",
            "no",
            "yes",
        ),
    ]
    return pd.DataFrame(
        rows, columns=["rewrite", "canonicalise", "curvature", "relative_flatness", "elementwise"]
    )


@torch.no_grad()
def canonicalise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` that computes the same function with canonical weights; see
    :func:`invariances`.

    * Norm gains are multiplied into the matrices that read the norm. A head that is tied to the
      embedding cannot take the final gain, which then stays.
    * Hidden unit: ``|(up_j, b_j)| = |down_:j|``. Values: ``O V = U S W'`` per key-value head
      becomes ``V = S^1/2 W'``, ``O = U S^1/2`` (``O`` stacks the heads that share the values), with
      the largest entry of every row of ``V`` positive. Queries and keys: equal norm per key-value
      head and rotary frequency.

    The copy has float32 weights at least: in bfloat16 the rewritten weights would be rounded to
    another function. Logits of both are compared on random tokens.

    Raises:
        WorkbenchError: another architecture, or logits that do not agree.
    """
    _check(model)
    wide = all(
        parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters()
    )
    reference = model if wide else copy.deepcopy(model).float()
    twin = copy.deepcopy(reference)
    body, config = twin.model, twin.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm.weight, attention.q_proj, attention.k_proj, attention.v_proj)
        _fold(layer.post_attention_layernorm.weight, mlp.gate_proj, mlp.up_proj)
        _balance_units(mlp.up_proj, mlp.down_proj)
        _move_value_bias(attention.v_proj, attention.o_proj, size)
        for head in range(config.num_key_value_heads):
            _balance_values(
                attention.v_proj,
                attention.o_proj,
                head,
                size,
                config.num_attention_heads // config.num_key_value_heads,
            )
        if config.model_type == "qwen3":
            _balance_gains(attention.q_norm.weight, attention.k_norm.weight)
        else:
            _balance_rotary(attention.q_proj, attention.k_proj, size, config.num_key_value_heads)
    if twin.lm_head.weight is not body.embed_tokens.weight:
        _fold(body.norm.weight, twin.lm_head)
    _compare(reference, twin)
    twin.zero_grad(set_to_none=True)
    return twin


def _check(model: PreTrainedModel) -> None:
    kind = getattr(model.config, "model_type", "unknown")
    if kind not in FAMILIES or not hasattr(model, "lm_head"):
        raise WorkbenchError(
            f"the freedoms of {type(model).__name__} ({kind}) are not known here; canonicalise "
            f"knows causal language models of {', '.join(FAMILIES)}"
        )
    activation = getattr(model.config, "hidden_act", "")
    if activation not in _NO_SCALE:
        raise WorkbenchError(
            f"hidden_act is {activation!r}, which may have a scale of its own; canonicalise knows "
            f"{', '.join(_NO_SCALE)}"
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise WorkbenchError(
            "only a part of every head is rotary (partial_rotary_factor), and the rest has "
            "freedoms that are not handled here"
        )
    size = (
        getattr(model.config, "head_dim", None)
        or model.config.hidden_size // model.config.num_attention_heads
    )
    if size > model.config.hidden_size:
        raise WorkbenchError(
            f"a head is wider ({size}) than the residual stream ({model.config.hidden_size}), "
            "which leaves its values undetermined"
        )
    for name, module in model.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise WorkbenchError(
                f"{name} is a {type(module).__name__}, not a plain nn.Linear; merge adapters and "
                "dequantise first"
            )


def _scale(matrix: Tensor, factor: Tensor) -> None:
    """Multiply in place, computed in float64."""
    matrix.copy_(matrix.double() * factor)


def _fold(gain: Tensor, *readers: nn.Linear) -> None:
    for reader in readers:
        _scale(reader.weight, gain.double())
    gain.fill_(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """What the second norm is multiplied with, and the first divided by, to make them equal, from
    their squares; 1 where either is zero: a dead unit has no scale.
    """
    return torch.where(
        (numerator > 0) & (denominator > 0),
        (numerator / denominator.clamp(min=torch.finfo(torch.float64).tiny)) ** 0.25,
        1.0,
    )


def _balance_units(up: nn.Linear, down: nn.Linear) -> None:
    into = up.weight.double().square().sum(1)
    if up.bias is not None:
        into += up.bias.double().square()
    factor = _ratio(down.weight.double().square().sum(0), into)
    _scale(up.weight, factor[:, None])
    if up.bias is not None:
        _scale(up.bias, factor)
    _scale(down.weight, 1 / factor)


def _move_value_bias(value: nn.Linear, out: nn.Linear, size: int) -> None:
    """Attention weights sum to one, so a bias of the values is a constant of the output; where the
    output has a bias, that is its place.
    """
    if value.bias is None or out.bias is None:
        return
    groups = value.bias.double().view(-1, size)
    shared = groups.repeat_interleave(out.in_features // value.out_features, dim=0).reshape(-1)
    out.bias.copy_(out.bias.double() + out.weight.double() @ shared)
    value.bias.zero_()


def _balance_values(value: nn.Linear, out: nn.Linear, head: int, size: int, group: int) -> None:
    rows, columns = (
        slice(head * size, (head + 1) * size),
        slice(head * group * size, (head + 1) * group * size),
    )
    v = value.weight[rows].double()
    if value.bias is not None:
        v = torch.cat([v, value.bias[rows, None].double()], dim=1)
    o = out.weight[:, columns].double()
    stacked = (
        o.view(-1, group, size).transpose(0, 1).reshape(-1, size)
    )  # [group * width, size]: the heads that share these values, one under the other
    basis_o, small_o = torch.linalg.qr(stacked)
    basis_v, small_v = torch.linalg.qr(v.T)
    left, singular, right = torch.linalg.svd(small_o @ small_v.T)
    root = singular.sqrt()
    new_v = root[:, None] * (right @ basis_v.T)
    new_o = (basis_o @ left) * root
    signs = torch.sign(new_v.gather(1, new_v.abs().argmax(1, keepdim=True)))
    signs[signs == 0] = 1
    new_v, new_o = new_v * signs, new_o * signs.T
    if value.bias is not None:
        value.bias[rows] = new_v[:, -1].to(value.bias.dtype)
        new_v = new_v[:, :-1]
    value.weight[rows] = new_v.to(value.weight.dtype)
    out.weight[:, columns] = (
        new_o.view(group, -1, size).transpose(0, 1).reshape(o.shape).to(out.weight.dtype)
    )


def _per_frequency(linear: nn.Linear, kv_heads: int, size: int) -> Tensor:
    """``[kv head, frequency]`` squared norm of the rows (with bias) that one rotary frequency
    rotates; entry ``i`` of a head pairs with ``i + size / 2``.
    """
    rows = linear.weight.double().square().sum(1)
    if linear.bias is not None:
        rows = rows + linear.bias.double().square()
    return rows.view(kv_heads, -1, 2, size // 2).sum((1, 2))


def _balance_rotary(query: nn.Linear, key: nn.Linear, size: int, kv_heads: int) -> None:
    factor = _ratio(_per_frequency(key, kv_heads, size), _per_frequency(query, kv_heads, size))
    for linear, scale in ((query, factor), (key, 1 / factor)):
        heads = linear.out_features // size // kv_heads
        rows = scale.repeat_interleave(heads, dim=0).repeat(1, 2).reshape(-1)
        _scale(linear.weight, rows[:, None])
        if linear.bias is not None:
            _scale(linear.bias, rows)


def _balance_gains(query: Tensor, key: Tensor) -> None:
    factor = _ratio(
        key.double().square().view(2, -1).sum(0), query.double().square().view(2, -1).sum(0)
    ).repeat(2)
    _scale(query, factor)
    _scale(key, 1 / factor)


def _compare(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Both models on random tokens.

    Raises:
        WorkbenchError: the largest difference of the logits is above a thousandth of their spread.
    """
    tokens = torch.randint(
        model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)
    )
    with evaluating(model), evaluating(twin):
        logits, again = (
            compared_model(
                input_ids=tokens.to(compared_model.device), use_cache=False
            ).logits.double()
            for compared_model in (model, twin)
        )
    difference, spread = float((logits - again).abs().max()), float(logits.std())
    if not difference <= 1e-3 * spread:
        raise WorkbenchError(
            f"the canonical copy's logits differ by {difference:.2g} at a spread of {spread:.2g}; "
            f"the weights are too ill-conditioned for {logits.dtype}, or not finite"
        )
