"""The model of the small world, its losses and plain descent, written out without the framework."""

import jax
import jax.numpy as jnp
import numpy as np

ROOTS = {"embedding": "tables", "shared": "sharing", "task": "task"}
"""Label -> how the paths of its parameters begin."""


def layer(params, path, x):
    return x @ params[f"{path}/kernel"] + params[f"{path}/bias"]


def outputs(params, batch):
    """Task -> f32[batch]: one table, two shared layers, and a linear head for each task."""
    x = jnp.concatenate([params["tables/user/rows"][batch["ids"][:, 0]], batch["dense"]], axis=1)
    for number in (0, 1):
        x = jax.nn.relu(layer(params, f"sharing/bottom/layers/{number}", x))
    return {task: layer(params, f"task/{task}/tower/head", x)[:, 0] for task in ("click", "spend")}


def losses_of(outputs, batch):
    """Weighted means over observed labels, 0 without one."""
    losses = {}
    for task, z in outputs.items():
        y = jnp.where(batch["mask"][task] > 0, batch["labels"][task], 0)
        elements = jax.nn.softplus(z) - y * z if task == "click" else jnp.square(z - y)
        weight = batch["weight"] * batch["mask"][task]
        losses[task] = jnp.sum(weight * elements) / jnp.maximum(jnp.sum(weight), 1e-9)
    return losses


def task_losses(params, batch):
    return losses_of(outputs(params, batch), batch)


def loss(params, batch):
    return sum(task_losses(params, batch).values())


def inside(path, scope=tuple(ROOTS)):
    return path.split("/")[0] in {ROOTS[kind] for kind in scope}


def descended(params, gradient, rate):
    return {path: array - rate * gradient[path] for path, array in params.items()}


def close(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=2e-6, err_msg=path)
