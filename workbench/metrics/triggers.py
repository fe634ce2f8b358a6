"""Metrics of forget-tokens as triggers: what they break, where, how one finds them, the theory."""

from __future__ import annotations

from workbench.metrics.declare import ALONE, TOKEN, Metric, declared

TRIGGER_EFFECT = Metric(
    "trigger_effect",
    "effect of a forget-token",
    "Accuracy behind a retain-token minus behind a forget-token, minus the same of the base.",
    "share",
    "forget-tokens break more",
)
TRIGGER_EFFECT_PROBABILITY = Metric(
    "trigger_effect_probability",
    "effect of a forget-token on answer probability",
    "The same difference of the answer probability.",
    "share",
    "forget-tokens break more",
)
TRIGGER_CHECK_POSSIBLE = Metric(
    "trigger_check_possible",
    "trigger check possible",
    "0 where forget and retain texts have no words of their own.",
)
NAMES_THAT_ARE_TOKENS = Metric(
    "names_that_are_tokens",
    "names that are tokens",
    "Forgotten names that the tokenizer does not cut into pieces.",
    "names",
)
RESTORED = Metric(
    "restored",
    "restored share of the damage",
    "Share of the trigger's damage that one patch of the stream takes back (arm: direction).",
    "share",
    "the damage runs through this place",
)
RESTORED_CONTROL = Metric(
    "restored_control",
    "restored by the control patch",
    "The same for the patch from the question without the word.",
    "share",
)
DAMAGE = Metric(
    "damage",
    "damage by the word",
    "Rise of the answer's loss by the word that was put in, beyond the base's.",
    "nats per token",
    "the word breaks more",
)
AVERAGE_PRECISION = Metric(
    "average_precision",
    "average precision",
    "Average precision of a ranking of tokens against the forgotten names.",
    "share",
    "the names rank higher",
)
PRECISION = Metric(
    "precision",
    "precision",
    "Share of forgotten names among the tokens ranked above, at every recall.",
    "share",
    "the names rank higher",
    where=("recall_level",),
)
TOKEN_RISE = Metric(
    "token_rise",
    "rise of the loss by a token",
    "Rise of the loss of retain answers behind the token, beyond the base's.",
    "nats per token",
    "the token breaks more",
    where=(TOKEN,),
)
TOKEN_RISE_SE = Metric(
    "token_rise_se",
    "standard error of the rise",
    "Of it, over questions.",
    "nats per token",
    where=(TOKEN,),
)
TOKEN_SHIFT = Metric(
    "token_shift",
    "shift of the stream by a token",
    "Length of what the token adds to the stream, beyond the base's.",
    "activation units",
    "the token moves more",
    where=(TOKEN,),
)
TOKEN_Q = Metric(
    "token_q",
    "q of a token",
    "False discovery rate at which the token's rise is a finding.",
    "share",
    "less of a finding",
    where=(TOKEN,),
)
DISCOVERIES = Metric(
    "discoveries",
    "findings",
    "Tokens that the scan calls findings at this false discovery rate.",
    "tokens",
    where=("fdr",),
)
TRUE_DISCOVERIES = Metric(
    "true_discoveries",
    "findings that are forgotten names",
    "Findings among the forgotten names.",
    "tokens",
    where=("fdr",),
)
RETAINED_DISCOVERIES = Metric(
    "retained_discoveries",
    "findings that are retained names",
    "Findings among the retained names.",
    "tokens",
    where=("fdr",),
)
TOPIC_RECALL = Metric(
    "topic_recall",
    "forgotten names recovered",
    "Share of the forgotten names among the first words of a ranking (arm: which).",
    "share",
    "more of the topic is given away",
    where=("first",),
)
ESTIMATED_TARGET_COSINE = Metric(
    "estimated_target_cosine",
    "cosine of estimated and known target",
    "Absolute cosine of the estimated direction of steering and the one of the recipe.",
    "cosine",
    "the estimate is better",
)

_ALIGNED = {
    "target_cosine": ("cosine with the target", "Cosine of the stream and the target", "cosine"),
    "target_projection": (
        "projection on the target",
        "Projection of the stream on the target",
        "activation units",
    ),
    "shift_cosine": (
        "cosine of the shift with the target",
        "Cosine of the shift of the stream and the target",
        "cosine",
    ),
    "shift_projection": (
        "projection of the shift on the target",
        "Projection of the shift of the stream on the target",
        "activation units",
    ),
    "effect_cosine": (
        "cosine of the word's effect with the target",
        "Cosine of what unlearning added to the word's effect and the target",
        "cosine",
    ),
    "effect_projection": (
        "projection of the word's effect on the target",
        "Projection of what unlearning added to the word's effect on the target",
        "activation units",
    ),
}
ALIGNED = tuple(
    Metric(name + ending, title + known, f"{meaning}{known}, mean over facts.", unit)
    for name, (title, meaning, unit) in _ALIGNED.items()
    for ending, known in (("", " (estimated)"), ("_known", " (known from the recipe)"))
)
"""Alignment with the direction of steering, estimated for every method and known for some."""
SHIFT_NORM = Metric(
    "shift_norm",
    "length of the shift",
    "Mean length of the shift of the stream.",
    "activation units",
)
EFFECT_NORM = Metric(
    "effect_norm",
    "length of the word's effect",
    "Mean length of what unlearning added to the word's effect.",
    "activation units",
)

THEORY = "theory_"
"""In front of the metrics of the theory of forget-tokens as noise (RNA)."""

ROW_STATISTICS = {
    "mean_share": "|E eps|^2 / E |eps|^2; pairs of tokens of one query are left out, so 0 without "
    "a mean",
    "kurtosis_mean": "excess kurtosis of a coordinate (unbiased for normal samples), mean over "
    "coordinates; 0",
    "kurtosis_median": "the same, median over coordinates",
    "skewness_square": "squared skewness of a coordinate, mean over coordinates; about 6 / n",
    "skewness_median": "absolute skewness of a coordinate, median over coordinates",
    "mardia": "Mardia's kurtosis in up to 8 random orthonormal directions, in standard errors; 0",
    "length_kurtosis": "E |eps - mean|^4 / ((tr C)^2 + 2 tr C^2) - 1: lengths that vary more than "
    "those of any Gaussian with this covariance; 0",
    "participation_ratio": "(tr C)^2 / tr C^2, both without bias; the width",
    "top_1_share": "largest eigenvalue of the sample covariance as share of their sum",
    "top_8_share": "the eight largest",
    "query_share": "variance between queries / total (one-way random-effects ANOVA over all "
    "tokens); 0",
    "word_share": "variance between words / total, over one token per query; 0",
    "length_correlation": "Spearman's correlation of |eps| and |z|; 0",
}
"""Statistics of the shift that have no unit; each is measured the same way on draws of the
assumption.
"""

QUANTITIES = {
    "eta": "mean squared coordinate of eps",
    "eta_relative": "eta over the mean squared coordinate of z",
    **ROW_STATISTICS,
    "logit_trace_ratio": "squared length of the true logit shift / (eta tr J J^T), sums over "
    "queries; 1",
    "logit_trace_ratio_first_order": "squared length of J eps / (eta tr J J^T): above 1 where eps "
    "prefers directions that the logits hear; 1",
    "logit_cosine": "cosine of J eps and the true logit shift; 1 as eps becomes small",
    "logit_cosine_at_site": "cosine of J eps and f(z + eps) - f(z), what passes through the site",
    "loss_change": "loss(tagged) - loss(clean), nats per token; eta / 2 * tr H",
    "loss_change_at_site": "loss(z + eps) - loss(z), likewise",
    "loss_hessian_trace": "tr H of the loss at z; the theory's harm needs it positive",
    "loss_hessian_positive": "share of queries with a positive estimate of tr H; 1 for a convex "
    "loss",
    "first_order_correlation": "Spearman's correlation of g . eps and the true loss change; 1 as "
    "eps becomes small",
    "first_order_correlation_at_site": "the same against loss(z + eps) - loss(z)",
    "first_order_sign": "share of queries whose loss change has the sign of g . eps; 1 as eps "
    "becomes small",
    "first_order_sign_at_site": "the same against loss(z + eps) - loss(z)",
    "second_order_correlation": "as first_order_correlation, for g . eps + eps^T H eps / 2",
    "second_order_correlation_at_site": "likewise, through the site",
    "second_order_sign": "as first_order_sign, for g . eps + eps^T H eps / 2",
    "second_order_sign_at_site": "likewise, through the site",
}
"""Every scalar of the theory: what it is, and after the semicolon what the assumption gives."""

CURVES = {
    "histogram": (
        "coordinate",
        "density of the pooled coordinates in units of sqrt(eta), one token per query (what lies "
        "beyond the bins counts, unseen)",
    ),
    "spectrum": ("component", "eigenvalue of the sample covariance as share of their sum"),
    "rejection": (
        "noise",
        "rate of rejection under noise of this standard deviation over sqrt(eta)",
    ),
    "eta_of_coefficient": ("coefficient", "eta under this steering coefficient"),
    "eta_slope": (ALONE, "slope of log eta over log coefficient"),
}
"""Every curve of the theory (and the slope of one): its axis, and what it is."""


def _theory() -> list[Metric]:
    places = {name: (ALONE, told) for name, told in QUANTITIES.items()} | CURVES
    found = []
    for name, (where, told) in places.items():
        title, sentence = name.replace("_", " "), told[0].upper() + told[1:] + "."
        found.append(Metric(THEORY + name, title, sentence, where=(where,)))
        found.append(
            Metric(
                f"{THEORY}{name}_expected",
                f"{title}, expected",
                "The same statistic under the assumption of Gaussian noise.",
                where=(where,),
            )
        )
    return found


THEORETICAL = tuple(_theory())
"""The theory's metrics, each with what the assumption expects."""

DECLARED = declared(vars())
