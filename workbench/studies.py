"""Two checkpoints and two text files, looked at from all sides in a line or two each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from workbench import figures, metrics
from workbench.attacks.relearn import at_steps
from workbench.data.records import Example, one_per_item
from workbench.diagnostics.depth import patching_depth
from workbench.diagnostics.scan import TriggerScan, scan_triggers
from workbench.experiments.investigate import attack_rate
from workbench.hooks import Capture, Collect, layer_count
from workbench.hooks.brief import brief
from workbench.progress import ProgressCallback, bar
from workbench.runs import landscape, stages
from workbench.runs.checkpoints import FilesConfig, opened_of, resolved, sealed
from workbench.runs.models import files_setup
from workbench.runs.setup import Setup
from workbench.subspaces.compare import angle_null
from workbench.subspaces.finders import StreamingPCA
from workbench.subspaces.subspace import Subspace
from workbench.tables import RESULT_COLUMNS, Table, join, summarise

BASE, UNLEARNED = "base", "unlearned"


@dataclass(frozen=True, repr=False)
class StudyResult:
    """What was measured; a notebook shows the table.

    Attributes:
        table: what people read.
        results: tidy rows, as :func:`workbench.runs.folder.read_results` gives them of a run.
        draw: makes the figure.
    """

    table: pd.DataFrame
    results: pd.DataFrame
    draw: Callable[[], Figure]

    def __repr__(self) -> str:
        return f"StudyResult({len(self.results):,} rows; .table, .results, .draw())"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, escape=True))


@brief
@dataclass(frozen=True)
class Study:
    """Two checkpoints with the texts that one of them was to forget.

    Attributes:
        setup: the base, its tokenizer, forget and retain set.
        models: ``base`` and ``unlearned``.
    """

    setup: Setup
    models: Mapping[str, PreTrainedModel]

    def _rows(self, site: str, texts: Sequence[Example]) -> dict[str, tuple[Tensor, Tensor]]:
        """Model -> its activations ``[token, width]`` and which text each is of."""
        rows = {}
        for name, model in self.models.items():
            collected, encoded = Collect(), self.setup.encode(one_per_item(texts))
            with Capture(model, site, collected) as capture:
                for batch in encoded:
                    capture.at(batch.content)
                    capture.forward(batch.inputs)
                (place,) = capture.sites
            counts = torch.cat([batch.content_mask.sum(1) for batch in encoded]).cpu()
            which = torch.arange(len(counts)).repeat_interleave(counts)
            rows[name] = collected[place.name].float().cpu(), which
        return rows

    def _site(self, site: str | None) -> str:
        return site or f"blocks.{layer_count(self.setup.base) // 2}.hook_resid_post"

    def subspaces(self, rank: int = 16, *, site: str | None = None) -> dict[str, Subspace]:
        """The principal subspaces of both models' activations on the forget texts.

        Args:
            rank: directions kept.
            site: where; default the residual stream behind the middle block.

        Returns:
            ``base`` and ``unlearned``, each with an orthonormal basis ``[width, rank]``.
        """
        place = self._site(site)
        rows = self._rows(place, self.setup.record.forget)
        source = "on forget texts"
        return {
            name: StreamingPCA(rank).fit(values).subspace(site=place, source=f"{name} {source}")
            for name, (values, _) in rows.items()
        }

    def angles(self, rank: int = 16, *, site: str | None = None, draws: int = 200) -> pd.DataFrame:
        """Principal angles between the two models' subspaces, beside a null that deals whole texts
        anew.

        Args:
            rank: of both subspaces.
            site: where; default the residual stream behind the middle block.
            draws: permutations of the null.

        Returns:
            See :func:`workbench.subspaces.compare.angle_null`.
        """
        rows = self._rows(self._site(site), self.setup.record.forget)
        (first, groups), (second, others) = rows[BASE], rows[UNLEARNED]
        return angle_null(
            first, second, rank, first_groups=groups, second_groups=others, draws=draws
        )

    def relearn(
        self,
        *,
        steps: int = 30,
        lr: float | None = None,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> StudyResult:
        """Fine-tune both models on half of the forget texts, and on null texts, and follow the
        other half.

        Args:
            steps: of the attack.
            lr: of AdamW; default 2e-4 below 100 million parameters, 1e-5 above.
            seed: of the order of the texts.
            progress: default a bar.
        """
        rate = attack_rate(self.setup.base.num_parameters()) if lr is None else lr
        attack = at_steps(steps, rate)
        tables = []
        for name, model in self.models.items():
            table = self._table("relearn", name, seed)
            stages.attack(
                model,
                self.setup,
                attack,
                seed=seed,
                table=table,
                null_pool=self.setup.null_pool,
                matched=True,
                progress=progress or bar(f"relearning, {name}"),
            )
            tables.append(table)
        results = _joined(tables)
        over = metrics.RECALL.rows(results, seed=None)
        curve = over[over["split"] == "forget-heldout"]
        columns = curve[["method", "arm", "x", "value", "low", "high"]]
        return StudyResult(columns, results, lambda: figures.recovery(results))

    def scan(self, *, queries: int = 32, progress: ProgressCallback | None = None) -> TriggerScan:
        """Put every token in front of retain texts: which break the unlearned model, and not the
        base?

        Args:
            queries: retain texts, at most.
            progress: default a bar.
        """
        texts = one_per_item(self.setup.record.retain_all)
        return scan_triggers(
            self.setup.base,
            self.models[UNLEARNED],
            self.setup.tokenizer,
            texts[:: max(1, len(texts) // queries)][:queries],
            progress=progress or bar("scanning tokens"),
        )

    def slices(self, *, points: int = 13, reach: float = 0.05, seed: int = 0) -> StudyResult:
        """The loss along straight lines through both models: the attacker's direction, a random
        one, the way to the base.

        Args:
            points: along every line.
            reach: half-width, as a share of the weights' norm.
            seed: of the random direction.
        """
        losses, tables = landscape.losses_of(self.setup), []
        for name, model in self.models.items():
            table = self._table("sharpness", name, seed)
            landscape.add_slices(
                model, self.setup, losses, table, points=points, reach=reach, seed=seed
            )
            tables.append(table)
        results = _joined(tables)
        rows = metrics.SLICE_LOSS.rows(results)
        columns = rows[["method", "split", "arm", "x", "value"]]
        return StudyResult(columns, results, lambda: figures.slices(results))

    def patch(self, progress: ProgressCallback | None = None) -> pd.DataFrame:
        """The residual stream of one model put into the other, block by block: where is the answer
        lost?

        Returns:
            See :func:`workbench.diagnostics.depth.patching_depth`.
        """
        questions = self.setup.encode(one_per_item(self.setup.record.forget_heldout))
        model = self.models[UNLEARNED]
        return patching_depth(
            self.setup.base, model, questions, progress=progress or bar("patching")
        )

    def _table(self, stage: str, name: str, seed: int) -> Table:
        common = {"run": "study", "stage": stage, "model": name, "method": name, "seed": seed}
        return Table(common)


def study(
    base: str | Path,
    unlearned: str | Path,
    forget: str | Path,
    retain: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Study:
    """Open two checkpoints and two files of texts.

    Args:
        base: folder or hub id of the model before unlearning.
        unlearned: folder or hub id of the model after it.
        forget: texts that were to be forgotten; half of them are the attacker's, half are measured.
        retain: texts that were to be kept.
        columns: see :func:`workbench.data.readers.read_examples`.
        chat: likewise.

    Raises:
        WorkbenchError: a model or a file is wrong, or the checkpoints do not fit each other.

    Example:
        >>> study("base", "unlearned", "forget.txt", "retain.txt").angles(16)  # doctest: +SKIP
    """
    files_config = FilesConfig(
        base=str(base), forget=str(forget), retain=str(retain), columns=columns, chat=chat
    )
    files, opened = sealed(files_config, {UNLEARNED: str(unlearned)})
    setup = files_setup(files, opened)
    model = opened_of(files, resolved(str(unlearned))).model
    return Study(setup, {BASE: setup.base, UNLEARNED: model})


def _joined(tables: Sequence[Table]) -> pd.DataFrame:
    items = pd.concat([table.item_frame() for table in tables], ignore_index=True)
    rows = [table.frame() for table in tables]
    return join([*rows, summarise(items, "study")] if len(items) else rows, RESULT_COLUMNS)
