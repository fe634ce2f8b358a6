"""The parts of an experiment beside the plain step: principal components, collapsed updates,
smoothing, slices, curvature.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from capture import Case
from sklearn.decomposition import IncrementalPCA
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import cross_entropy, token_nll
from workbench.hooks import Moments
from workbench.sharpness.curvature import extremes
from workbench.sharpness.slices import loss_slice, mean_loss, random_direction
from workbench.subspaces.collapse import find_collapse, only_tokens
from workbench.subspaces.subspace import principal_subspace
from workbench.unlearning.objectives import (
    Objective,
    Pair,
    npo,
    reference_nll,
    retain_cross_entropy,
)
from workbench.unlearning.smoothing import plain, sam


def _model() -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(shape).eval()


def _batch(rows: int, length: int, seed: int) -> Batch:
    ids = torch.randint(3, 2048, (rows, length), generator=torch.Generator().manual_seed(seed))
    ones, none = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    target = ones.bool().clone()
    target[:, 0] = False
    return Batch(ids, ones, none, none, target, tuple(map(str, range(rows))))


def method_cases() -> dict[str, Case]:
    """Each case beside its floor: the exact covariance, or a plain step of the same model."""
    model, batch = _model(), _batch(8, 128, 0)
    other = _batch(8, 128, 1)
    paths = [
        f"model.layers.{layer}.mlp.{name}_proj"
        for layer in range(6)
        for name in ("gate", "up", "down")
    ]

    def step() -> None:
        model.zero_grad()
        cross_entropy(model, batch).backward()

    rows = torch.randn(8192, 2048)

    def covariance_pca() -> None:
        torch.linalg.eigh(torch.cov(rows.T))

    def streaming_pca() -> None:
        moments = Moments()
        for chunk in rows.split(1024):
            moments.update(chunk)
        principal_subspace(moments, 64)

    def incremental_pca() -> None:
        finder = IncrementalPCA(n_components=64)
        for chunk in rows.split(1024):
            finder.partial_fit(chunk.numpy())

    objective, reference = Objective(npo(0.1), retain_cross_entropy), copy.deepcopy(model)
    pair = Pair(batch, other)

    def plain_step() -> None:
        model.zero_grad()
        plain(model, objective, pair, reference)

    known = Pair(replace(batch, before=reference_nll(reference, batch)), other)

    def known_step() -> None:
        model.zero_grad()
        plain(model, objective, known, reference)

    # questions of 11 tokens, whose one-word answer stands two before the end
    questions = _batch(64, 11, 2)
    questions = replace(questions, target_mask=torch.arange(11).expand(64, 11) == 8)

    @torch.no_grad()
    def whole_pass() -> None:
        token_nll(model, questions)

    @torch.no_grad()
    def ended_pass() -> None:
        token_nll(model, questions, whole=False)

    def sam_step() -> None:
        model.zero_grad()
        sam(0.01)(model, objective, pair, reference)

    collapse = find_collapse(
        model,
        paths,
        lambda b: cross_entropy(model, b),
        [batch],
        activation_components=24,
        gradient_components=36,
    )
    parameters = dict(model.named_parameters())

    def collapsed_step() -> None:
        model.zero_grad()
        with only_tokens(model, paths, batch.content_mask):
            cross_entropy(model, batch).backward()
        for name, change in collapse.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.copy_(change(gradient))

    direction = random_direction(model, 0)

    return {
        "pca-2048": Case(
            streaming_pca, covariance_pca, 5, {"scikit-learn IncrementalPCA": incremental_pca}
        ),
        "cir-step": Case(collapsed_step, step, 15),
        "sam-step": Case(sam_step, plain_step, 9),
        "known-reference-step": Case(known_step, plain_step, 15),
        "ended-pass": Case(ended_pass, whole_pass, 31),
        "slice-point": Case(
            lambda: loss_slice(model, direction, [0.01], {"loss": [batch]}),
            lambda: mean_loss(model, [batch]),
            21,
        ),
        "top-eigenvalue": Case(lambda: extremes(model, [batch], tolerance=0.05), step, 3),
    }
