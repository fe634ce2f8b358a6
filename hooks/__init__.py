"""What flows through a model: tap it, count it. Knows PyTorch and transformers; knows nothing of unlearning."""

from hooks.capture import Capture, Consumer, Rows, gradients_only, tapped
from hooks.consumers import Collect, Moments, MomentsOf
from hooks.errors import CaptureError
from hooks.sites import Site, all_sites, layer_count, resolve

__all__ = [
    "Capture",
    "CaptureError",
    "Collect",
    "Consumer",
    "Moments",
    "MomentsOf",
    "Rows",
    "Site",
    "all_sites",
    "gradients_only",
    "layer_count",
    "resolve",
    "tapped",
]
