"""Metrics of activations and subspaces: the residual stream, lenses, probes, principal angles."""

from __future__ import annotations

from workbench.metrics.declare import ALONE, Metric, declared

VARIANCE_SHARE = Metric(
    "variance_share",
    "share of variance",
    "Eigenvalue of a principal component over the total variance at a site.",
    "share",
    where=("component",),
)
TIER_VARIANCE_SHARE = Metric(
    "tier_variance_share",
    "share of variance in a tier",
    "Variance of the principal components up to this one, from the last tier's end on.",
    "share",
    where=("component",),
)
SUBSPACE_OVERLAP = Metric(
    "subspace_overlap",
    "subspace overlap",
    "Mean squared cosine of the principal angles between two subspaces.",
    "share",
    "more directions are shared",
    1.0,
    (ALONE, "rank"),
)
SET_OVERLAP = Metric(
    "set_overlap",
    "overlap of two sets of texts",
    "Subspace overlap of two sets' top components, observed and under a permutation of texts.",
    "share",
    "more directions are shared",
    where=("rank",),
)
SET_OVERLAP_P = Metric(
    "set_overlap_p",
    "p of the overlap",
    "Share of permutations whose overlap is at most the observed one.",
    "probability",
    where=("rank",),
)
ENERGY_IN_RETAIN_SUBSPACE = Metric(
    "energy_in_retain_subspace",
    "energy in the retain subspace",
    "Share of a change's squared length that acts on the top retain directions.",
    "share",
    "more disturbs common directions",
    where=("rank",),
)
ENERGY_OF_RANDOM_DELTA = Metric(
    "energy_of_random_delta",
    "energy of a random change",
    "The same share for a random change: rank over width.",
    "share",
    where=("rank",),
)
RELATIVE_SHIFT = Metric(
    "relative_shift",
    "relative shift",
    "Length of the shift of the residual stream over the stream's length.",
    "share",
    "the stream moved farther",
    0.0,
)
COSINE = Metric(
    "cosine",
    "cosine",
    "Cosine of the streams of two models.",
    "cosine",
    "the stream is as before",
    1.0,
)
NORM_RATIO = Metric(
    "norm_ratio",
    "ratio of lengths",
    "Length of the stream over that of the base.",
    "ratio",
    "",
    1.0,
)
CKA = Metric(
    "cka",
    "debiased CKA",
    "Centred kernel alignment of the streams of two models, without its bias.",
    "share",
    "the geometry is as before",
    1.0,
)
RETURNED = Metric(
    "returned",
    "share of the shift taken back",
    "Projection of the attack's shift of the stream on the way back to the base.",
    "share",
    "the stream returns to the base's",
    where=("attack_step",),
)
BESIDE = Metric(
    "beside",
    "shift elsewhere",
    "Length of the attack's shift orthogonal to the way back, over that way.",
    "ratio",
    "the attack moves elsewhere",
    where=("attack_step",),
)
LENS_PROBABILITY = Metric(
    "lens_probability",
    "lens probability of the answer",
    "Probability of the answer's first token decoded from a block's stream.",
    "share",
    "the answer can be read",
)
LENS_LOG_PROBABILITY = Metric(
    "lens_log_probability",
    "lens log-probability",
    "Its logarithm.",
    "nats",
    "the answer can be read",
)
LENS_RANK = Metric(
    "lens_rank", "lens rank of the answer", "Rank of the answer's first token, from 1.", "rank"
)
LENS_FOIL = Metric(
    "lens_foil",
    "lens probability of a wrong answer",
    "Mean probability of the other answers of the same kind.",
    "share",
)
LENS_ENTROPY = Metric(
    "lens_entropy", "lens entropy", "Entropy of the decoded distribution.", "nats"
)
LENS_KL = Metric(
    "lens_kl", "lens KL to the output", "KL from the model's output to the decoded one.", "nats"
)
PROBE_ACCURACY = Metric(
    "probe_accuracy",
    "probe accuracy",
    "Share of answers that a linear probe reads on held-out subjects, mean over subjects.",
    "share",
    "the answer can be read",
)
PROBE_SELECTIVITY = Metric(
    "probe_selectivity",
    "probe selectivity",
    "Accuracy of the probe minus that on a control task, paired by subject.",
    "share",
    "the answer can be read",
)
PROBES_POSSIBLE = Metric(
    "probes_possible", "probes possible", "0 where answers do not repeat: nothing to classify."
)
SMALLEST_COSINE = Metric(
    "smallest_cosine",
    "cosine of the largest angle",
    "Cosine of the largest principal angle.",
    "cosine",
    "more directions are shared",
    1.0,
)
RANDOM_OVERLAP = Metric(
    "random_overlap", "overlap of random subspaces", "Rank over width.", "share"
)
PC1_COSINE = Metric(
    "pc1_cosine",
    "cosine of the first components",
    "Cosine of the first components.",
    "cosine",
    "",
    1.0,
)
PC1_GAP = Metric(
    "pc1_gap",
    "gap of the first component",
    "1 minus the second eigenvalue over the first, of the base.",
    "share",
    "the first component is better defined",
)
PC1_SHIFT = Metric(
    "pc1_shift",
    "shift along the first component",
    "Shift of the mean along the base's first component.",
    "standard deviations",
    "",
    0.0,
)
PC2_SHIFT = Metric(
    "pc2_shift",
    "shift along the second component",
    "Shift of the mean along the base's second component.",
    "standard deviations",
    "",
    0.0,
)
SHIFT_RANK = Metric(
    "shift_rank",
    "directions of the shift",
    "Participation ratio of the eigenvalues of the shift.",
    "directions",
    "the shift has more directions",
)
RANDOM_RANK = Metric(
    "random_rank",
    "directions of a random shift",
    "Participation ratio of an isotropic Gaussian shift of the same shape.",
    "directions",
)
LEADING_SHARE = Metric(
    "leading_share",
    "share of the leading direction",
    "Largest eigenvalue of the shift over their sum.",
    "share",
    "the shift is one direction",
)
RANDOM_SHARE = Metric(
    "random_share",
    "leading share of a random shift",
    "The same of an isotropic Gaussian shift of the same shape (Tracy-Widom law).",
    "share",
)
COMMON_SHARE = Metric(
    "common_share",
    "share of the mean shift",
    "Part of the shift that is one vector added to every token.",
    "share",
    "all tokens move alike",
)
NORM = Metric(
    "norm", "length of a token's vector", "Mean length of the stream.", "activation units"
)
NORM_HIGH = Metric(
    "norm_high",
    "97.5 % quantile of the length",
    "97.5 % quantile over tokens of the stream's length.",
    "activation units",
)
ERASED = Metric(
    "erased",
    "share of the answer that is erased",
    "Rise of the answer's loss when a block reads the other model's stream, over the whole rise.",
    "share",
    "more is lost before this block",
)

DECLARED = declared(vars())
