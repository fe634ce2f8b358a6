"""One smoothed step of NPO beside one plain step: a Llama of a million parameters, 8 texts of 64
tokens in the forget and in the retain batch.

Measured by ``run.py`` where it lists these cases, or alone: ``python
tests/benchmarks/smoothing.py``.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from capture import Case
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.data.batches import Batch
from workbench.unlearning.objectives import Objective, Pair, npo, retain_cross_entropy
from workbench.unlearning.smoothing import (
    Averager,
    StepRule,
    asam,
    curvature_regularisation,
    gradient_penalty,
    plain,
    randomised_smoothing,
    sam,
)

RULES: dict[str, StepRule] = {
    "npo-sam-step": sam(0.01),
    "npo-asam-step": asam(0.1),
    "npo-rs-step": randomised_smoothing(1e-3, 3, 0),
    "npo-gp-step": gradient_penalty(0.01),
    "npo-gp-difference-step": gradient_penalty(0.01, exact=False),
    "npo-cr-step": curvature_regularisation(0.1, 0.01),
}
"""The sizes do not change the cost; the number of samples does."""


def _model(dtype: torch.dtype) -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(shape).to(dtype).eval()


def _batch(rows: int, length: int, seed: int) -> Batch:
    ids = torch.randint(3, 1024, (rows, length), generator=torch.Generator().manual_seed(seed))
    ones, none = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    target = ones.bool().clone()
    target[:, 0] = False
    return Batch(ids, ones, none, none, target, tuple(map(str, range(rows))))


def smoothing_cases(rounds: int = 15, dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    """Every rule beside the plain step, and the update of a weight average beside it."""
    model = _model(dtype)
    reference, averager = copy.deepcopy(model), Averager(1, 1)
    objective, pair = (
        Objective(npo(0.1), retain_cross_entropy),
        Pair(_batch(8, 64, 0), _batch(8, 64, 1)),
    )

    def step(rule: StepRule) -> None:
        model.zero_grad()
        rule(model, objective, pair, reference)

    floor = partial(step, plain)
    cases = {name: Case(partial(step, rule), floor, rounds) for name, rule in RULES.items()}
    return {**cases, "weight-average": Case(partial(averager.update, model), floor, rounds)}


if __name__ == "__main__":
    from run import _median, _times

    torch.set_num_threads(1)
    for name, case in smoothing_cases().items():
        times = _times(case, "cpu")
        ratio, low, high = _median(times["ours"] / times["floor"])
        print(f"{name:24s}{ratio:6.2f} plain steps [{low:.2f}, {high:.2f}], n = {case.rounds}")
