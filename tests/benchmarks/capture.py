"""The capture layer beside the plain pass and beside its peers, all doing the same work on models
with the same weights.

The work: (1) the residual stream after every block, kept for every position, forward only; (2) the
inputs and the output gradients of every linear layer of every MLP, in one forward and backward. A
peer that is not installed is left out (``pip install -e '.[peers]'``).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.hooks import (
    Capture,
    Collect,
    MomentsOf,
    as_bridge,
    gradients_only,
    real_tokens,
    resolve,
)
from workbench.subspaces.finders import EachSite, SketchPCA

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One comparison: ours against the floor, and against each peer."""

    ours: Work
    floor: Work
    rounds: int
    peers: dict[str, Work] = field(default_factory=dict)


SIZES = {
    "16M": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def llama(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random Llama of one of ``SIZES``."""
    torch.manual_seed(0)
    return (
        LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=False))
        .to(device=device, dtype=dtype)
        .eval()
    )


def capture_cases(
    size: str = "16M",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    length: int = 256,
) -> dict[str, Case]:
    """The cases of the module docstring."""
    model = llama(size, device, dtype)
    layers = SIZES[size]["num_hidden_layers"]
    ids = torch.randint(
        3, SIZES[size]["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    residual = resolve(model, "blocks.*.hook_resid_post")
    linears = resolve(
        model,
        [
            f"model.layers.*.mlp.{name}_proj:{side}"
            for name in ("gate", "up", "down")
            for side in ("in", "grad_out")
        ],
    )

    @torch.no_grad()
    def forward() -> None:
        model(**inputs, use_cache=False)

    def captured_forward() -> None:
        with torch.no_grad(), Capture(model, residual, Collect(device=device), at=real_tokens):
            model(**inputs, use_cache=False)

    def step() -> None:
        model.zero_grad()
        model(**inputs, labels=ids, use_cache=False).loss.backward()

    def captured_step() -> None:
        model.zero_grad()
        with Capture(model, linears, Collect(device=device), at=real_tokens):
            model(**inputs, labels=ids, use_cache=False).loss.backward()

    def light_step() -> None:
        with (
            gradients_only(model),
            Capture(model, linears, lambda site, rows: None, at=real_tokens),
        ):
            model(**inputs, labels=ids, use_cache=False).loss.backward()

    def factors_step() -> None:
        model.zero_grad()
        with Capture(model, linears, MomentsOf(), at=real_tokens):
            model(**inputs, labels=ids, use_cache=False).loss.backward()

    def sketched_step() -> None:
        model.zero_grad()
        with Capture(model, linears, EachSite(lambda: SketchPCA(32)), at=real_tokens):
            model(**inputs, labels=ids, use_cache=False).loss.backward()

    peers = _Peers(model, inputs, layers)
    return {
        "capture-residual-forward": Case(captured_forward, forward, 21, peers.forward()),
        "capture-mlp-forward-backward": Case(captured_step, step, 15, peers.step()),
        "gradients-only": Case(light_step, step, 9),
        "moments-mlp-forward-backward": Case(factors_step, step, 5),
        "sketch-mlp-forward-backward": Case(sketched_step, step, 5),
    }


class _Peers:
    """The same work in TransformerLens, nnsight and pyvene, each on its own copy (a bridge and
    pyvene change what they wrap).
    """

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], layers: int
    ) -> None:
        self.model, self.inputs, self.layers = model, inputs, layers
        logging.getLogger("nnsight").setLevel(logging.ERROR)

    def forward(self) -> dict[str, Work]:
        inputs, layers = self.inputs, self.layers
        found: dict[str, Work] = {
            "transformers output_hidden_states": torch.no_grad()(
                lambda: self.model(**inputs, use_cache=False, output_hidden_states=True)
            )
        }
        bridge = as_bridge(self.model)
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        found["transformer-lens run_with_cache"] = torch.no_grad()(
            lambda: bridge.run_with_cache(
                inputs["input_ids"], names_filter=lambda name: name in names
            )
        )
        with (
            contextlib.suppress(ImportError),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            import pyvene

            width, length = self.model.config.hidden_size, inputs["input_ids"].shape[1]
            plan = [
                {
                    "layer": layer,
                    "component": "block_output",
                    "unit": "pos",
                    "intervention": pyvene.CollectIntervention(embed_dim=width, keep_last_dim=True),
                }
                for layer in range(layers)
            ]
            intervenable = pyvene.IntervenableModel(
                pyvene.IntervenableConfig(plan), model=copy.deepcopy(self.model)
            )
            intervenable.set_device(self.model.device)
            places = {"base": [[list(range(length))] * inputs["input_ids"].shape[0]] * layers}
            found["pyvene CollectIntervention"] = torch.no_grad()(
                lambda: intervenable(base=inputs, unit_locations=places)
            )
        with contextlib.suppress(ImportError):
            found["nnsight trace"] = self._nnsight_forward()
        return found

    def _nnsight_forward(self) -> Work:
        import nnsight

        traced, inputs = nnsight.NNsight(copy.deepcopy(self.model)), self.inputs

        @torch.no_grad()
        def run() -> object:
            with traced.trace(**inputs, use_cache=False):
                kept = nnsight.save([layer.output for layer in traced.model.layers])
            return kept  # noqa: RET504 - the body of a trace runs elsewhere, where nothing can be returned

        return run

    def step(self) -> dict[str, Work]:
        inputs, ids = self.inputs, self.inputs["input_ids"]
        bridge = as_bridge(self.model)
        ends = tuple(
            f"mlp.{name}.hook_{side}" for name in ("gate", "in", "out") for side in ("in", "out")
        )

        def bridged() -> None:
            bridge.zero_grad()
            bridge.run_with_cache(
                ids,
                return_type="loss",
                incl_bwd=True,
                names_filter=lambda name: name.removesuffix("_grad").endswith(ends),
            )

        found: dict[str, Work] = {"transformer-lens run_with_cache": bridged}
        with contextlib.suppress(ImportError):
            import nnsight

            twin = copy.deepcopy(self.model)
            traced = nnsight.NNsight(twin)

            def run() -> object:
                twin.zero_grad()
                with traced.trace(**inputs, labels=ids, use_cache=False):
                    kept = nnsight.save([])
                    outputs = []
                    for layer in traced.model.layers:
                        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                            kept.append(linear.input)
                            outputs.append(linear.output)
                    with traced.output.loss.backward():
                        for output in reversed(outputs):
                            kept.append(output.grad)
                return kept

            found["nnsight trace"] = run
        return found
