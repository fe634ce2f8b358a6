"""Metrics of the loss landscape: slices, balls, noise, spectra, paths; and what predicts
recovery.
"""

from __future__ import annotations

from workbench.metrics.declare import Metric, declared

SLICE_LOSS = Metric(
    "slice_loss",
    "loss along a line",
    "Loss at a point of a straight line through the model (arm: which line).",
    "nats per token",
    where=("position",),
)
WEIGHT_NORM = Metric("weight_norm", "length of the weights", "L2 norm of all weights.", "L2 norm")
TOP_EIGENVALUE = Metric(
    "top_eigenvalue",
    "top eigenvalue",
    "Largest eigenvalue of the loss's Hessian.",
    "nats",
    "sharper",
)
BOTTOM_EIGENVALUE = Metric(
    "bottom_eigenvalue",
    "bottom eigenvalue",
    "Smallest eigenvalue of the loss's Hessian.",
    "nats",
    "less of a saddle",
)
TOP_RESIDUAL = Metric(
    "top_residual",
    "residual of the top eigenvalue",
    "Residual norm of the Lanczos iteration at the top eigenvalue.",
    "nats",
    "less converged",
)
BOTTOM_RESIDUAL = Metric(
    "bottom_residual",
    "residual of the bottom eigenvalue",
    "Residual norm of the Lanczos iteration at the bottom eigenvalue.",
    "nats",
    "less converged",
)
GRADIENT_NORM = Metric(
    "gradient_norm",
    "gradient norm",
    "Length of the loss's gradient.",
    "nats",
    "farther from a minimum",
)
DROP = Metric(
    "drop",
    "largest fall of the loss in a ball",
    "Worst-case change of a loss in a ball around the model (arm: which ball and search).",
    "nats per token",
    where=("radius",),
)
NOISE_CHANGE = Metric(
    "noise_change",
    "change of the loss under noise",
    "Mean change of a loss under Gaussian noise of this length.",
    "nats per token",
    "sharper on average",
    where=("noise",),
)
BARRIER_TO_BASE = Metric(
    "barrier_to_base",
    "barrier to the base",
    "Largest rise of the loss above the straight line between its ends, on the way to the base.",
    "nats per token",
    "less connected",
    0.0,
)
MIDPOINT_TO_BASE = Metric(
    "midpoint_to_base",
    "loss at the midpoint",
    "Loss half-way to the base above the mean of both ends.",
    "nats per token",
    "less connected",
    0.0,
)
HALF_AT_TO_BASE = Metric(
    "half_at_to_base",
    "half of the way in loss",
    "Share of the way to the base at which half of the loss's change is made.",
    "share",
    "the base is reached later",
)
TRACE = Metric(
    "trace",
    "trace of the Hessian",
    "Hutchinson's estimate of the Hessian's trace.",
    "nats",
    "sharper",
)
TRACE_SE = Metric(
    "trace_se", "standard error of the trace", "Over random vectors.", "nats", "less certain"
)
RUNNING_TRACE = Metric(
    "running_trace",
    "running trace",
    "Estimate of the trace after so many random vectors.",
    "nats",
    where=("probes",),
)
MODULE_EIGENVALUE = Metric(
    "module_eigenvalue",
    "mean eigenvalue of a module",
    "Trace of the Hessian's block of a module over its weights (n).",
    "nats",
    "sharper",
)
DENSITY_NODE = Metric(
    "density_node",
    "node of the spectral density",
    "Weight of a quadrature node, of every random vector.",
    "share",
    where=(("eigenvalue", "probe"),),
)
DENSITY = Metric(
    "density",
    "spectral density",
    "Smoothed density of the Hessian's eigenvalues, with the range over random vectors.",
    "share per width",
    where=("eigenvalue",),
)
MOMENT_ERROR = Metric(
    "moment_error",
    "error of the moments",
    "Relative difference of the density's moments and those of the products.",
    "share",
    "less converged",
)
NEGATIVE_ENERGY = Metric(
    "negative_energy",
    "negative share of the spectrum",
    "Share of the absolute eigenvalues that is negative.",
    "share",
    "more directions go down",
)
RITZ = Metric(
    "ritz",
    "Ritz value",
    "Largest or smallest Ritz value (arm) after so many Lanczos steps.",
    "nats",
    where=("lanczos_step",),
)
PATH_LOSS = Metric(
    "path_loss",
    "loss along the attack",
    "Loss at every stop of the relearning attack.",
    "nats per token",
    where=("attack_step",),
)
PATH_DISTANCE = Metric(
    "path_distance",
    "distance from the start",
    "Length of the change by the attack so far.",
    "L2 norm",
    where=("attack_step",),
)
PATH_TRAVELLED = Metric(
    "path_travelled",
    "length of the way",
    "Sum of the lengths between stops of the attack.",
    "L2 norm",
    where=("attack_step",),
)
TRAJECTORY_SHARE = Metric(
    "trajectory_share",
    "share of a principal component of the path",
    "Variance of the attack's path along its principal components, beside a random walk's (arm).",
    "share",
    where=("component",),
)
PLANE_LOSS = Metric(
    "plane_loss",
    "loss in the plane",
    "Loss in the plane of unlearned, relearned and base model.",
    "nats per token",
    where=(("along_attack", "towards_base"),),
)
PLANE_ALONG = Metric(
    "plane_along",
    "along the attack",
    "First coordinate in that plane of a stop of the attack; 1 at its end.",
    "lengths of the attack",
    where=("attack_step",),
)
PLANE_TOWARDS = Metric(
    "plane_towards",
    "towards the base",
    "Second coordinate in that plane of a stop of the attack; 1 at the base.",
    "ways to the base",
    where=("attack_step",),
)
PLANE_OFF = Metric(
    "plane_off",
    "distance from the plane",
    "How far a stop of the attack is off that plane.",
    "lengths of the attack",
    "the loss drawn under it is less its own",
    where=("attack_step",),
)
PREDICTOR_VALUE = Metric(
    "predictor_value", "measure before the attack", "Value of a measure (arm) of one model."
)
OUTCOME = Metric(
    "outcome",
    "outcome of the attack",
    "Recall after the attack, or what it won back (arm).",
    "share",
)
_CORRELATED = "Spearman's correlation of a measure (arm) with the outcome (split)"
RECOVERY_CORRELATION = Metric(
    "recovery_correlation",
    "rank correlation with recovery",
    f"{_CORRELATED}, methods resampled.",
    "correlation",
)
RECOVERY_CORRELATION_FAMILIES = Metric(
    "recovery_correlation_families",
    "rank correlation with recovery, families",
    f"{_CORRELATED}, families of methods resampled.",
    "correlation",
)
RECOVERY_WITHIN_SEED = Metric(
    "recovery_within_seed",
    "rank correlation with recovery within seeds",
    f"{_CORRELATED}, mean over seeds.",
    "correlation",
)
RECOVERY_PARTIAL = Metric(
    "recovery_partial",
    "partial rank correlation with recovery",
    f"{_CORRELATED}, given recall before the attack.",
    "correlation",
)
RECOVERY_PARTIAL_FAMILIES = Metric(
    "recovery_partial_families",
    "partial rank correlation with recovery, families",
    f"{_CORRELATED}, given recall before the attack, families resampled.",
    "correlation",
)

DECLARED = declared(vars())
