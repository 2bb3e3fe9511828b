"""Train steps under balancers, and their solvers, timed on request.

    python -m benchmarks.balancing_worker --tasks 2 --encoder 64 32 --methods equal pcgrad    # then a request a line:
    {"method": "pcgrad", "scope": "encoder"}
    {"method": "pcgrad", "solver": 8}

benchmarks/balancing_cost.py starts a fresh process of it for every model and asks. Requests and answers are JSON, one a
line. Imports the standard library and NumPy only; jax and mtl_jax when it runs.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.machine import versions
from benchmarks.vectorised_worker import allow_missing_polars

METHODS = (
    "equal", "fixed", "uncertainty", "imtl_l", "dwa", "geometric", "scale_invariant", "random", "stch", "cosmos", "pbi",
    "famo", "go4align", "ldc_mtl", "ple_schedule",
    "mgda", "pcgrad", "gradvac", "cagrad", "imtl_g", "imtl", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad", "dual_proj",
    "config", "gradnorm", "ntkmtl", "pe_ltr", "krum", "cr_mogm", "modo", "sdmgrad",
    "graddrop", "moco", "db_mtl", "excess_mtl", "metabalance", "trimmed_mean", "m_config",
    "samo", "auto_lambda", "moml", "forum", "ntkmtl_sr",
)  # fmt: skip
NUM_DENSE = 191
LEARNING_RATE = 1e-3
NUM_BATCHES = 8
"""Of the data, from which every step gathers one."""
WARM_UP = 2
"""Untimed steps before each measurement, since another process has worked meanwhile."""
NUM_GRAMIANS = 32
SOLVER_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """A shared MLP with a linear head for each of some binary tasks.

    Attributes:
      tasks: How many.
      units: Widths of the shared layers, on an input of ``NUM_DENSE`` numbers.
      batch_size: Rows of a step.
      steps: Of a measurement.
      row_stride: Gradients are compared on every n-th row, by methods from the Gramian of one batch (ours only).
      update_every: Steps from one comparison to the next, of the same methods (ours only).
    """

    tasks: int
    units: tuple[int, ...]
    batch_size: int
    steps: int
    row_stride: int = 1
    update_every: int = 1

    @classmethod
    def parse(cls, description: str | None, arguments: Sequence[str] | None = None) -> tuple["Case", list[str]]:
        """The case on the command line of a worker, and the methods."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--tasks", type=int, default=2)
        parser.add_argument("--encoder", type=int, nargs="+", default=[64, 32])
        parser.add_argument("--batch-size", type=int, default=2048)
        parser.add_argument("--steps", type=int, default=32)
        parser.add_argument("--row-stride", type=int, default=1)
        parser.add_argument("--update-every", type=int, default=1)
        parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
        options = parser.parse_args(arguments)
        numbers = options.batch_size, options.steps, options.row_stride, options.update_every
        return cls(options.tasks, tuple(options.encoder), *numbers), options.methods

    def arguments(self, methods: Sequence[str]) -> list[str]:
        """What :meth:`parse` reads."""
        numbers = {"--tasks": self.tasks, "--batch-size": self.batch_size, "--steps": self.steps}
        numbers |= {"--row-stride": self.row_stride, "--update-every": self.update_every}
        flags = [str(part) for pair in numbers.items() for part in pair]
        return [*flags, "--encoder", *map(str, self.units), "--methods", *methods]

    @property
    def name(self) -> str:
        """Of the shared layers, with the input."""
        return "-".join(map(str, (NUM_DENSE, *self.units)))


def generate(case: Case) -> dict[str, np.ndarray]:
    """``dense`` f32[N, D] and ``labels`` f32[N, T], which the numbers explain in part, each task in its own way."""
    generator, num_rows = np.random.default_rng(0), NUM_BATCHES * case.batch_size
    dense = generator.standard_normal((num_rows, NUM_DENSE)).astype(np.float32)
    slopes = generator.standard_normal((NUM_DENSE, case.tasks)) / np.sqrt(NUM_DENSE)
    labels = dense @ slopes + generator.logistic(size=(num_rows, case.tasks)) > 0
    return {"dense": dense, "labels": labels.astype(np.float32)}


def orders(case: Case, number: int) -> np.ndarray:
    """Row numbers int32[step, batch], drawn like those of an epoch."""
    generator, num_rows = np.random.default_rng(number), NUM_BATCHES * case.batch_size
    epochs = [generator.permutation(num_rows) for _ in range(-(-case.steps // NUM_BATCHES))]
    return np.concatenate(epochs).reshape(-1, case.batch_size)[: case.steps].astype(np.int32)


def serve(facts: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Writes the facts, then the answer to every line of standard input; all else that is printed goes elsewhere."""
    with os.fdopen(os.dup(1), "w", buffering=1) as channel:
        os.dup2(2, 1)  # solvers in other languages print too
        print(json.dumps(facts), file=channel)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=channel)


def main() -> None:
    case, methods = Case.parse(__doc__)
    allow_missing_polars()
    import jax

    steps = Steps(case)
    entries = [entry for name in methods for entry in entries_of(name, case.tasks)]
    device = jax.devices()[0]
    facts = {
        "entries": entries,
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions("jax", "jaxlib", "flax", "optax", "numpy"),
    }
    serve(facts, lambda request: {"seconds": solve(**request) if "solver" in request else steps.measure(**request)})


def balancer(name: str) -> Any:
    """A method with its defaults, or with what it cannot do without."""
    from mtl_jax import balancing, train

    needed = {"fixed": {"weights": 1.0}}
    if name in ("cr_mogm", "samo"):
        needed[name] = {"base": balancing.mgda()}
    room = balancing if hasattr(balancing, name) else train  # those of train/ own the step
    return getattr(room, name)(**needed.get(name, {}))


def entries_of(name: str, num_tasks: int) -> list[dict[str, Any]]:
    """A method in each scope where its cost differs: none of few tasks, one without a scope of those that weigh losses."""
    method = balancer(name)
    if num_tasks < method.min_tasks:
        return []
    scopes = ["representation", "encoder"]
    if method.needs == "losses":
        scopes = [""]
    elif method.needs == "jacobian" or method.num_batches > 1:
        scopes = ["encoder"]
    allowed = scopes if method.scopes is None else [scope for scope in scopes if scope in method.scopes]
    facts = {"needs": method.needs, "batches": method.num_batches, "owns_step": method.owns_step}
    return [{"method": name, "scope": scope, **facts} for scope in allowed]


class Steps:
    """Compiled train steps of one model; what trains in a measurement goes on from the one before."""

    def __init__(self, case: Case):
        from mtl_jax.data import Encoded, Numeric, Schema
        from mtl_jax.data.batching import as_batch
        from mtl_jax.tasks import Task

        self.case, self.asked = case, 0
        arrays, names = generate(case), [f"task_{k}" for k in range(case.tasks)]
        rows = len(arrays["dense"])
        self.schema = Schema(
            features=tuple(Numeric(f"dense_{k}") for k in range(NUM_DENSE)),
            vocabularies=(),
            tasks=tuple(Task(name, "binary") for name in names),
        )
        self.data = as_batch(
            Encoded(
                ids=np.zeros((rows, 0), np.int32),
                dense=arrays["dense"],
                bags={},
                sequences={},
                labels={name: np.ascontiguousarray(arrays["labels"][:, k]) for k, name in enumerate(names)},
                mask=dict.fromkeys(names, np.ones(rows, bool)),
                task_weight={},
                weight=np.ones(rows, np.float32),
            )
        )
        self.programs: dict[tuple[str, str], tuple] = {}

    def measure(self, method: str, scope: str = "") -> float:
        """Seconds of a step, of as many as the case says in one compiled call."""
        import jax

        if (method, scope) not in self.programs:
            self.programs[method, scope] = self._compiled(method, scope)
        program, state, numbers = self.programs[method, scope]
        self.asked += 1
        order, made = self._order(balancer(method).num_batches), []
        for count in (min(WARM_UP, self.case.steps), self.case.steps):
            start = time.perf_counter()
            state, sums = program(state, self.data, order, np.int32(count), numbers)
            made.append((count, int(jax.device_get(sums.steps))))
            seconds = time.perf_counter() - start
        self.programs[method, scope] = program, state, numbers
        for asked, done in made:
            if done != asked:
                raise RuntimeError(
                    f"'{method}' made {done} of {asked} steps; expected all, with finite numbers. Leave it out"
                )
        return seconds / self.case.steps

    def _order(self, num_batches: int) -> Any:
        import jax.numpy as jnp

        padding = -self.case.batch_size % num_batches
        return jnp.pad(orders(self.case, self.asked), ((0, 0), (0, padding)), constant_values=-1)

    def _compiled(self, method: str, scope: str) -> tuple:
        import jax
        from flax import nnx

        from mtl_jax import MultiTaskModel
        from mtl_jax.nn import Tower
        from mtl_jax.sharing import SharedBottom
        from mtl_jax.train import BalancingOptions, Optimizer, Step, compile_step
        from mtl_jax.train.loop import run_steps

        model = MultiTaskModel(
            self.schema,
            sharing=functools.partial(SharedBottom, units=self.case.units, dropout=0.0),
            towers=functools.partial(Tower, units=(), dropout=0.0),
            rngs=nnx.Rngs(0),
        )
        used = balancer(method)
        options = {"scope": scope} if scope else {}
        if used.needs == "gramian" and used.num_batches == 1 and not used.owns_step:
            options |= {"row_stride": self.case.row_stride, "update_every": self.case.update_every}
        step, state = Step.of(
            model,
            self.schema.tasks,
            key=jax.random.key(0),
            balancer=used,
            options=BalancingOptions(**options),
            optimizer=Optimizer(learning_rate=LEARNING_RATE),
        )
        numbers, order = step.numbers(), self._order(step.balancer.num_batches)
        lowered = compile_step(run_steps(step)).lower(state, self.data, order, np.int32(0), numbers)
        return lowered.compile(), state, numbers


def solve(method: str, solver: int) -> float:
    """Seconds of the weights alone, for ``solver`` tasks: a loop within a compiled call over random Gramians."""
    import jax

    run, arguments, count = _solver(method, solver)
    run(*arguments, WARM_UP)
    start = time.perf_counter()
    total = jax.device_get(run(*arguments, count))
    seconds = (time.perf_counter() - start) / count
    if not np.isfinite(total).all():
        raise RuntimeError(f"'{method}' gives weights for {solver} tasks that are not finite; expected finite ones")
    return seconds


@functools.cache
def _solver(method: str, num_tasks: int) -> tuple:
    """A compiled loop, its arguments, and a number of turns that lasts long enough to be timed."""
    import jax
    import jax.numpy as jnp

    from mtl_jax.tasks import Task

    balancing = balancer(method).for_tasks([Task(f"task_{k}", "binary") for k in range(num_tasks)])
    active = jnp.ones(num_tasks, bool)

    @jax.jit
    def run(gramians, losses, state, key, count):
        def turn(index, carry):
            state, total = carry
            at = index % NUM_GRAMIANS
            drawn = jax.random.fold_in(key, index) if balancing.stochastic else None
            weights, state = balancing.weigh(gramians[at], losses[at], state, drawn, active=active)
            return state, total + weights

        return jax.lax.fori_loop(0, count, turn, (state, jnp.zeros(num_tasks)))[1]

    arguments = (*gramians(num_tasks), balancing.init(num_tasks), jax.random.key(0))
    count = NUM_GRAMIANS
    run(*arguments, count).block_until_ready()
    while True:
        seconds = []
        for _ in range(3):  # the least of them, lest a disturbed one end the search
            start = time.perf_counter()
            run(*arguments, count).block_until_ready()
            seconds.append(time.perf_counter() - start)
        if min(seconds) >= SOLVER_SECONDS / 2:
            return run, arguments, count
        count *= 2


def gramians(num_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Gramians f32[n, T, T] of gradients that conflict and whose lengths differ by some ten times; losses f32[n, T]."""
    generator = np.random.default_rng(num_tasks)
    rows = generator.standard_normal((NUM_GRAMIANS, num_tasks, 4 * num_tasks))
    rows *= np.exp(generator.standard_normal((NUM_GRAMIANS, num_tasks, 1)))
    losses = 0.5 + generator.random((NUM_GRAMIANS, num_tasks))
    return (rows @ rows.swapaxes(1, 2)).astype(np.float32), losses.astype(np.float32)


if __name__ == "__main__":
    main()
