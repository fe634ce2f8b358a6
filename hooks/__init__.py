"""What flows through a model: tap it, count it, change it. Knows PyTorch, transformers and
TransformerLens; knows nothing of unlearning.
"""

from workbench.hooks.capture import Capture, Consumer, Rows
from workbench.hooks.consumers import Collect, Moments, MomentsOf
from workbench.hooks.edits import (
    ablate_to_mean,
    add_noise,
    edit,
    keep_only,
    patch,
    project_out,
    replace,
    steer,
)
from workbench.hooks.errors import CaptureError
from workbench.hooks.lens import as_bridge, as_cache
from workbench.hooks.passes import gradients_only, peek, tapped
from workbench.hooks.sites import Site, all_sites, layer_count, resolve
from workbench.hooks.store import Store, StoredRows
from workbench.hooks.tokens import (
    Positions,
    answer_tokens,
    character_span,
    custom,
    find_span,
    generated,
    last_token,
    predicting,
    real_tokens,
    without_bos,
    without_first,
)

__all__ = [
    "Capture",
    "CaptureError",
    "Collect",
    "Consumer",
    "Moments",
    "MomentsOf",
    "Positions",
    "Rows",
    "Site",
    "Store",
    "StoredRows",
    "ablate_to_mean",
    "add_noise",
    "all_sites",
    "answer_tokens",
    "as_bridge",
    "as_cache",
    "character_span",
    "custom",
    "edit",
    "find_span",
    "generated",
    "gradients_only",
    "keep_only",
    "last_token",
    "layer_count",
    "patch",
    "peek",
    "predicting",
    "project_out",
    "real_tokens",
    "replace",
    "resolve",
    "steer",
    "tapped",
    "without_bos",
    "without_first",
]
