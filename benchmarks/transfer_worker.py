"""Steps of gradient-based transfer and of MAML, timed on request.

    python -m benchmarks.transfer_worker            # then a request a line:
    {"part": "step", "mode": "constrained", "tasks": 2, "encoder": [64, 32]}
    {"part": "maml", "inner_steps": 5}
    {"part": "train", "strategy": "maml", "tasks": 2, "encoder": [64, 32]}

benchmarks/transfer_cost.py starts it and asks. Requests and answers are JSON, one a line.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.balancing_worker import NUM_DENSE, Case, Steps, orders, serve
from benchmarks.machine import versions
from benchmarks.vectorised_worker import allow_missing_polars

MODES = ("constrained", "first_order", "joint", "implicit", "update")
PLAIN = "plain"
STRATEGIES = ("l2_sp", "distill", "lora", "constrained", "first_order", "maml", "fomaml", "mldg", "reptile")
DOMAINS = 4
BATCH, STEPS, RATE = 2048, 32, 1e-3
IMPLICIT = {"num_steps": 4, "num_cg_steps": 4}
SINES, SHOTS, UNITS, INNER_RATE = 40, 10, (40, 40), 0.01
"""Inner tasks of a step of MAML on sine waves, points of each side, widths, and the inner rate (Finn et al., 2017)."""
WARM_UP = 2


def sines(number: int) -> dict[str, np.ndarray]:
    """``x`` and ``y`` f32[step, side, task, shot, 1] of waves with amplitudes in [.1, 5] and phases in [0, pi]."""
    generator = np.random.default_rng(number)
    shape = (STEPS, 1, SINES, 1, 1)
    amplitude, phase = generator.uniform(0.1, 5.0, shape), generator.uniform(0.0, np.pi, shape)
    x = generator.uniform(-5.0, 5.0, (STEPS, 2, SINES, SHOTS, 1))
    return {"x": x.astype(np.float32), "y": (amplitude * np.sin(x - phase)).astype(np.float32)}


def layers(widths: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Glorot-uniform kernels and zero biases of a network, by name."""
    generator = np.random.default_rng(seed)
    found = {}
    for index, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        bound = np.sqrt(6 / (i + o))
        found[f"kernel_{index}"] = generator.uniform(-bound, bound, (i, o)).astype(np.float32)
        found[f"bias_{index}"] = np.zeros(o, np.float32)
    return found


def main() -> None:
    allow_missing_polars()
    import jax

    device = jax.devices()[0]
    facts = {
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions("jax", "jaxlib", "optax", "numpy"),
    }
    serve(facts, answer)


def answer(request: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step."""
    if request["part"] == "maml":
        return {"seconds": measured(maml(request["inner_steps"]))}
    if request["part"] == "train":
        return {"seconds": measured(train(request["strategy"], request["tasks"], tuple(request["encoder"])))}
    return {"seconds": measured(transfer(request["mode"], request["tasks"], tuple(request["encoder"])))}


def measured(run: Callable[[int], None]) -> float:
    """Seconds of a step, of as many as a measurement has; some go before it."""
    run(WARM_UP)
    start = time.perf_counter()
    run(STEPS)
    return (time.perf_counter() - start) / STEPS


def _network(params, x, depth):
    import jax

    for index in range(depth):
        x = x @ params[f"kernel_{index}"] + params[f"bias_{index}"]
        x = jax.nn.relu(x) if index < depth - 1 else x
    return x


def _repeated(step, state, batches) -> Callable[[int], None]:
    """A call that makes some of the steps, in one compiled loop, and goes on from where it was."""
    import jax

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(state, batches, count):
        return jax.lax.fori_loop(0, count, lambda i, s: step(s, jax.tree.map(lambda leaf: leaf[i], batches)), state)

    kept = [state]

    def run(count: int) -> None:
        kept[0] = jax.block_until_ready(loop(kept[0], batches, count))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept[0])):
            raise RuntimeError("a step gave numbers that are not finite; expected finite ones")

    return run


@functools.cache
def transfer(mode: str, tasks: int, units: tuple[int, ...]) -> Callable[[int], None]:
    """Steps of a shared network with one output a task: of the target alone (``plain``), or with a source beside it."""
    import jax
    import jax.numpy as jnp
    import optax

    from mtl_jax.transfer import gradient_transfer

    generator, depth = np.random.default_rng(0), len(units) + 1
    params = {name: jnp.asarray(array) for name, array in layers((NUM_DENSE, *units, tasks)).items()}
    x = generator.standard_normal((2, 8 * BATCH, NUM_DENSE)).astype(np.float32)
    labels = (generator.random((2, 8 * BATCH, tasks)) < 0.5).astype(np.float32)
    order = np.stack([generator.permutation(8 * BATCH)[:BATCH] for _ in range(STEPS)])
    optimizer = optax.adam(RATE)

    def loss(side: int, rows):
        def of(params):
            return (
                optax.sigmoid_binary_cross_entropy(_network(params, x_of[side][rows], depth), y_of[side][rows])
                .mean(0)
                .sum()
            )

        return of

    x_of, y_of = jnp.asarray(x), jnp.asarray(labels)
    options = IMPLICIT if mode == "implicit" else {}
    pair = mode == "joint"

    def step(state, rows):
        params, moments = state
        source, target = loss(0, rows), loss(1, rows)
        if mode == PLAIN:
            gradient = jax.grad(target)(params)
        else:
            gradient = gradient_transfer(source, target, params, step_size=0.01, mode=mode, **options)[1]
        if mode == "update":
            moved = gradient_transfer(source, target, params, step_size=0.01, mode=mode)[2]
            return moved, moments
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    start = (params, jax.tree.map(jnp.copy, params)) if pair else params
    return _repeated(step, (start, optimizer.init(start)), jnp.asarray(order))


def _adaptation(name: str) -> Any:
    from mtl_jax import transfer

    made = {
        "l2_sp": transfer.L2SP,
        "distill": transfer.Distill,
        "lora": transfer.LoRA,
        "constrained": transfer.GradientTransfer,
        "first_order": functools.partial(transfer.GradientTransfer, mode="first_order"),
        "maml": functools.partial(transfer.MAML, DOMAINS),
        "fomaml": functools.partial(transfer.MAML, DOMAINS, first_order=True),
        "mldg": functools.partial(transfer.MLDG, DOMAINS),
        "reptile": functools.partial(transfer.Reptile, DOMAINS, num_steps=2),
    }
    return made[name]()


@functools.cache
def train(strategy: str, tasks: int, units: tuple[int, ...]) -> Callable[[int], None]:
    """Whole train steps with a strategy, or without one (``plain``), as ``fit`` makes them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mtl_jax import MultiTaskModel
    from mtl_jax.balancing import equal
    from mtl_jax.nn import Tower
    from mtl_jax.sharing import SharedBottom
    from mtl_jax.train import Optimizer, Step, compile_step
    from mtl_jax.train.loop import run_steps

    case = Case(tasks, units, BATCH, STEPS)
    rows, adaptation = Steps(case), None if strategy == PLAIN else _adaptation(strategy)
    model = MultiTaskModel(
        rows.schema,
        sharing=functools.partial(SharedBottom, units=units, dropout=0.0),
        towers=functools.partial(Tower, units=(), dropout=0.0),
        rngs=nnx.Rngs(0),
    )
    options = {"trainable": adaptation.phases()[0]} if adaptation else {}
    step, state = Step.of(
        model,
        rows.schema.tasks,
        key=jax.random.key(0),
        balancer=equal(),
        optimizer=Optimizer(learning_rate=RATE),
        adaptation=adaptation,
        **options,
    )
    beside = adaptation.batches_beside if adaptation else 0
    order = jnp.asarray(np.concatenate([orders(case, number) for number in range(1 + beside)], axis=1))
    program, numbers, kept = compile_step(run_steps(step)), step.numbers(), [state]

    def run(count: int) -> None:
        kept[0], sums = program(kept[0], rows.data, order, np.int32(count), numbers)
        if (made := int(jax.device_get(sums.steps))) != count:
            raise RuntimeError(f"'{strategy}' made {made} of {count} steps; expected all, with finite numbers")

    return run


@functools.cache
def maml(inner_steps: int) -> Callable[[int], None]:
    """Steps over 40 sine waves: as many inner steps on each, the mean loss on other points of it, Adam."""
    import jax
    import jax.numpy as jnp
    import optax

    from mtl_jax.transfer import gradient_transfer

    depth = len(UNITS) + 1
    params = {name: jnp.asarray(array) for name, array in layers((1, *UNITS, 1)).items()}
    optimizer = optax.adam(RATE)

    def loss(x, y):
        return lambda params: jnp.mean((_network(params, x, depth) - y) ** 2)

    def step(state, batch):
        params, moments = state

        def of_wave(x, y):
            return gradient_transfer(
                loss(x[0], y[0]), loss(x[1], y[1]), params, step_size=INNER_RATE, num_steps=inner_steps
            )[1]

        gradients = jax.vmap(of_wave, in_axes=1)(batch["x"], batch["y"])
        updates, moments = optimizer.update(jax.tree.map(lambda leaf: leaf.mean(0), gradients), moments)
        return optax.apply_updates(params, updates), moments

    return _repeated(step, (params, optimizer.init(params)), jax.tree.map(jnp.asarray, sines(0)))


if __name__ == "__main__":
    main()
