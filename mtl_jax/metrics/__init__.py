"""Metrics: NumPy float64 functions of whole arrays, never averaged over batches. Nothing here imports JAX."""

from mtl_jax.metrics import baselines
from mtl_jax.metrics.amounts import mean_amounts, outputs_of_mean, poisson_deviance
from mtl_jax.metrics.binary import (
    auc,
    auc_binned,
    ece_mass_20,
    ece_width_10,
    gauc,
    logloss,
    logloss_of_probabilities,
    ne,
    pcoc,
    pr_auc,
    reliability_table,
    sigmoid,
)
from mtl_jax.metrics.kinds import METRICS
from mtl_jax.metrics.multiclass import accuracy, class_logloss, macro_f1
from mtl_jax.metrics.multitask import delta_m, delta_m_c, mean_gain, mean_rank
from mtl_jax.metrics.ordinal import cumulative_logits, ordinal_classes, ordinal_logloss, qwk
from mtl_jax.metrics.regression import from_original, mae, mae_clip, rmse, rmse_clip, to_original
from mtl_jax.metrics.tasks import evaluate, evaluate_slices, evaluate_task

__all__ = [
    "METRICS",
    "accuracy",
    "auc",
    "auc_binned",
    "baselines",
    "class_logloss",
    "cumulative_logits",
    "delta_m",
    "delta_m_c",
    "ece_mass_20",
    "ece_width_10",
    "evaluate",
    "evaluate_slices",
    "evaluate_task",
    "from_original",
    "gauc",
    "logloss",
    "logloss_of_probabilities",
    "macro_f1",
    "mae",
    "mae_clip",
    "mean_amounts",
    "mean_gain",
    "mean_rank",
    "ne",
    "ordinal_classes",
    "ordinal_logloss",
    "outputs_of_mean",
    "pcoc",
    "poisson_deviance",
    "pr_auc",
    "qwk",
    "reliability_table",
    "rmse",
    "rmse_clip",
    "sigmoid",
    "to_original",
]
