"""Deltas and the line search on a model whose weights are sharded over two processes: the same
numbers as in one process, and the same in both.
"""

from __future__ import annotations

import copy
import datetime
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.data.batches import Batch
from workbench.evaluation.losses import mean_kl, next_token_logits
from workbench.unlearning.budget import match_budget
from workbench.unlearning.deltas import apply_delta, delta_between, norm_of, snapshot

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

PROCESSES = 2
VOCABULARY = 51  # odd: the two shards of the embedding differ in size
ALPHAS = (0.125, 0.3, 1.0)
LATE = ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight")
RESHARD = {"default": None, "resharded": True}
"""What becomes of the root's weights after a forward pass: by FSDP's default they stay whole, else
every weight is a shard again.
"""


def _model() -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(shape).eval()


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with noise on every weight but those of the first block's MLP, which unlearning left
    as they were.
    """
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if "layers.0.mlp" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return moved


def _late(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which only the last row of three parameters differs: all of it lies in the last
    process's shard.
    """
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name in LATE:
            moved.get_parameter(name)[-1] += 0.25
    return moved


def _texts() -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (4, 10), generator=generator)
    ids[:, 0] = 1
    real = torch.arange(10)[None] < torch.tensor([10, 7, 4, 9])[:, None]
    target = real.clone()
    target[:, 0] = False
    none = torch.zeros_like(real)
    return Batch(ids, real.long(), none, none, target, ("a", "b", "c", "d"))


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _is_sharded(model: PreTrainedModel) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def _measured(
    base: PreTrainedModel,
    budget: float,
    shard: Callable[[PreTrainedModel], PreTrainedModel],
    note: dict[str, Any],
) -> None:
    """Fill ``note`` with everything that unlearning asks of deltas and of the budget; ``shard`` is
    applied to every model first.
    """
    batch = _texts()
    with torch.no_grad():
        reference = [next_token_logits(base, batch)]
    model = shard(copy.deepcopy(base))
    start = snapshot(model)
    note["late"] = list(delta_between(shard(_late(base)), start))
    note["late norm"] = norm_of(delta_between(shard(_late(base)), start))
    note["unchanged"] = list(delta_between(shard(copy.deepcopy(base)), start))
    delta = delta_between(shard(_moved(base)), start)
    note["names"], note["norm"], note["start norm"] = list(delta), norm_of(delta), norm_of(start)
    note["delta"] = {name: _whole(value) for name, value in delta.items()}
    note["sharded"] = _is_sharded(model)

    def at(alpha: float) -> float:
        apply_delta(model, start, delta, alpha)
        return mean_kl(model, [batch], reference)

    note["disruption"] = [at(alpha) for alpha in ALPHAS]
    match = match_budget(at, budget)
    note["match"] = astuple(match)
    apply_delta(model, start, delta, match.alpha)
    note["weights"] = {name: _whole(value) for name, value in model.named_parameters()}
    note["logits"] = _logits(model, batch)
    # Asked again after the forward passes: unlearning goes on from here.
    note["norm after"] = norm_of(delta_between(model, start))
    apply_delta(model, start, delta, 0.0)
    note["restored"] = {name: _whole(value) for name, value in model.named_parameters()}


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return next_token_logits(model, batch)


def _noisy(offset: float) -> Callable[[float], float]:
    """A disruption that grows with alpha and meets 0.5 at 0.5, seen with a small error."""
    return lambda alpha: alpha + offset


def _steep(offset: float) -> Callable[[float], float]:
    """Close to the budget of 0.5 from alpha 0.2 on, so that an error decides every step of the
    search.
    """
    return lambda alpha: 0.5 + 1e-10 * (alpha - 0.7) + offset if alpha > 0.2 else alpha


def _broken(offset: float) -> Callable[[float], float]:
    """Not a number in the process with the positive error."""
    return lambda alpha: math.nan if offset > 0 and alpha > 0.3 else alpha


SEEN = {"noisy": _noisy, "steep": _steep, "broken": _broken}
ERROR = 1e-9


def _searched(offset: float, note: dict[str, Any]) -> None:
    """Fill ``note`` with the line search on every disruption of ``SEEN`` as this process sees it,
    once this error, once the opposite one.
    """
    for name, seen in SEEN.items():
        for sign in (1, -1):
            note[name, sign] = astuple(match_budget(seen(sign * offset), 0.5))


def _process(rank: int, folder: str, budget: float) -> None:
    """One of the processes, from its first meeting with the other to the file of what it found."""
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    notes: dict[str, dict[str, Any]] = {}

    def tell(name: str, fill: Callable[[dict[str, Any]], None]) -> None:
        notes[name] = {}
        try:
            fill(notes[name])
        except Exception:
            notes[name]["error"] = traceback.format_exc()

    for name, reshard in RESHARD.items():

        def shard(model: PreTrainedModel, reshard: bool | None = reshard) -> PreTrainedModel:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            return model

        tell(name, lambda note, shard=shard: _measured(_model(), budget, shard, note))
    tell("search", lambda note: _searched(ERROR if rank == 0 else -ERROR, note))
    torch.save(notes, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds on the whole model, at three tenths of the disruption of the trained
    delta.
    """
    note: dict[str, Any] = {}
    base, batch = _model(), _texts()
    note["budget"] = 0.3 * mean_kl(_moved(base), [batch], [_logits(base, batch)])
    _measured(base, note["budget"], lambda model: model, note)
    return note


@pytest.fixture(scope="module")
def processes(
    alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of the two processes found. They run this file: a spawned function would have to be
    importable, and a test module need not be.
    """
    folder, root = tmp_path_factory.mktemp("sharded"), str(Path(__file__).resolve().parents[3])
    commands = [
        [sys.executable, __file__, str(rank), str(folder), repr(alone["budget"])]
        for rank in range(PROCESSES)
    ]
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * PROCESSES, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(params=RESHARD)
def sharded(
    request: pytest.FixtureRequest, processes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same on sharded weights, process by process."""
    return [notes[request.param] for notes in processes]


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def test_the_search_in_one_process_ends_inside(alone: dict[str, Any]) -> None:
    # What the sharded one is held against must have had something to find.
    alpha, disruption, reached, tried = alone["match"]
    assert reached and 0.1 < alpha < 0.9 and len(tried) > 5
    assert 0.98 * alone["budget"] <= disruption <= alone["budget"]
    assert "sharded" in alone and not alone["sharded"]
    assert (
        not [name for name in alone["names"] if "layers.0.mlp" in name] and len(alone["names"]) > 10
    )


def test_a_delta_of_shards_has_the_names_the_values_and_the_length_of_the_whole(
    alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    for note in sharded:
        assert note["sharded"]
        assert note["names"] == alone["names"] and note["unchanged"] == []
        assert _same(note["delta"], alone["delta"])
        assert note["norm"] == pytest.approx(alone["norm"], rel=1e-12)
        assert note["start norm"] == pytest.approx(alone["start norm"], rel=1e-12)


def test_a_change_in_one_processs_shard_alone_is_named_by_both(
    sharded: list[dict[str, Any]],
) -> None:
    for note in sharded:
        assert sorted(note["late"]) == sorted(LATE)
        # 24 entries of a row of down_proj, one of the norm, 16 of a row of lm_head
        assert note["late norm"] == pytest.approx(0.25 * math.sqrt(24 + 1 + 16), rel=1e-6)


def test_a_sharded_model_costs_what_the_whole_one_costs(
    alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    for note in sharded:
        assert "disruption" in note, note["error"]
        assert note["disruption"] == pytest.approx(alone["disruption"], rel=1e-6)


def test_the_line_search_on_shards_ends_where_it_ends_on_the_whole(
    alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    for note in sharded:
        assert "match" in note, note["error"]
        alpha, disruption, reached, tried = note["match"]
        assert alpha == alone["match"][0] and reached
        assert disruption == pytest.approx(alone["match"][1], rel=1e-6)
        assert [point for point, _ in tried] == [point for point, _ in alone["match"][3]]
    assert sharded[0]["match"] == sharded[1]["match"]


def test_a_scaled_delta_gives_the_same_weights_and_zero_restores_every_bit(
    alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    base = {name: value.detach() for name, value in _model().named_parameters()}
    for note in sharded:
        assert "error" not in note, note["error"]
        assert _same(note["weights"], alone["weights"])
        torch.testing.assert_close(note["logits"], alone["logits"], rtol=1e-6, atol=1e-6)
        assert note["norm after"] == pytest.approx(alone["norm after"], rel=1e-12)
        assert _same(note["restored"], base)


# --- processes that see different last bits -------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", SEEN)
def test_processes_that_see_different_numbers_go_by_the_first(
    name: str, sign: int, processes: list[dict[str, Any]]
) -> None:
    first, second = (notes["search"] for notes in processes)
    assert "error" not in first and "error" not in second
    expected, other = (
        repr(astuple(match_budget(SEEN[name](error), 0.5)))
        for error in (sign * ERROR, -sign * ERROR)
    )
    # As text, which tells numbers apart bit by bit and knows NaN from a number and not from itself.
    assert repr(first[name, sign]) == repr(second[name, sign]) == expected
    assert expected != other  # each by itself, they would have gone different ways


def test_one_process_alone_needs_no_group() -> None:
    assert not dist.is_initialized()
    match = match_budget(_noisy(0.0), 0.5)
    assert match.alpha == 0.5 and match.reached


if __name__ == "__main__":
    _process(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
