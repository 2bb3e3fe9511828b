"""Trains members of a run axis on one and four virtual devices; run by test_vectorize.py in its own process.

python run_axis_program.py OUT.npz   (with XLA_FLAGS=--xla_force_host_platform_device_count=4)
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np
import optax
from devices_program import SCHEMA, rows
from flax import nnx

import mtl_jax
from mtl_jax.data.dataset import TrainingData
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Member, Optimizer
from mtl_jax.train.setup import Setup
from mtl_jax.train.state import Functional
from mtl_jax.train.vectorize import Plan, train_members

TWO_TASKS = dataclasses.replace(SCHEMA, tasks=SCHEMA.tasks[:2])
ADAM = optax.scale_by_adam()
RATES = (0.02, 0.3, 0.01, 0.05, 1.0)
OPTIONS = {"epochs": 4, "batch_size": 8, "patience": 1, "steps_per_call": 2, "table_updates": {"user": "sparse"}}


def member(seed, order_seed=None):
    def model():
        return mtl_jax.MultiTaskModel(
            TWO_TASKS,
            encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5, dropout=0.1),
            sharing=functools.partial(SharedBottom, units=(4,), dropout=0.0),
            towers=functools.partial(Tower, units=()),
            rngs=nnx.Rngs(seed),
        )

    return Member(model, seed=seed, optimizer=Optimizer(ADAM, learning_rate=RATES[seed]), order_seed=order_seed)


def main(path):
    jax.config.update("jax_disable_most_optimizations", True)
    data = TrainingData("world", TWO_TASKS, rows(), rows(), "0" * 64)
    one, four = (Setup.of(data, devices=count, **OPTIONS) for count in (1, 4))
    members, one_order = [member(seed) for seed in range(5)], [member(seed, order_seed=7) for seed in range(2)]
    cases = {
        "vmap 1": (one, members, Plan("vmap", 5)),
        "vmap 4": (four, members, Plan("vmap", 5)),
        "one order, map 4": (four, one_order, Plan("map", 1)),  # here devices share the rows of a step
        "one order, vmap 4": (four, one_order, Plan("vmap", 2)),
    }
    arrays, stops = {}, {}
    for name, case in cases.items():
        stops[name] = []
        for number, result in train_members(*case):
            stops[name].append((result.timing["steps"], result.monitor["step"]))
            for parameter, array in Functional.of(result.model)[1].items():
                assert len(array.devices()) == 1, "a result is a model for one device"
                arrays[f"{name}|{number}|{parameter}"] = np.asarray(array)
    np.savez(path, **arrays)
    pathlib.Path(path).with_suffix(".json").write_text(json.dumps(stops))


if __name__ == "__main__":
    main(sys.argv[1])
