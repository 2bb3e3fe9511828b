"""Forward and backward passes of sharing strategies, timed on request.

    python -m benchmarks.sharing_worker --strategies mmoe ple      # then a request a line:
    {"part": "equal", "name": "mmoe"}
    {"part": "compared", "name": "ple"}
    {"part": "experts", "number": 8, "way": "loop"}

``equal`` are all strategies at one number of parameters, ``compared`` those that other libraries have too, at the widths
given there, ``experts`` two layouts of a bank. benchmarks/sharing_cost.py starts it and asks. Requests and answers are
JSON, one a line. Imports the standard library and NumPy only; jax and mtl_jax when it runs.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import balancing_worker, worker
from benchmarks.balancing_worker import NUM_DENSE, WARM_UP, serve
from benchmarks.machine import versions
from benchmarks.vectorised_worker import allow_missing_polars

TASKS = ("task_0", "task_1")
UNITS, NUM_EXPERTS, TOWER_UNITS = worker.EXPERT_UNITS, worker.NUM_EXPERTS, worker.TOWER_UNITS
LEVELS = tuple((width,) for width in UNITS)
MODULES = {"num_specific": 2, "num_shared": 2}

# Name -> class, and options whose widths are scaled together.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_bottom": ("SharedBottom", {"units": UNITS}),
    "single_task": ("SingleTask", {"units": UNITS, "share_embeddings": True}),
    "soft_sharing": ("SoftSharing", {"units": UNITS}),
    "cross_stitch": ("CrossStitch", {"units": UNITS}),
    "sluice": ("Sluice", {"width": UNITS[0]}),
    "mtan": ("MTAN", {"units": UNITS}),
    "mmoe": ("MMoE", {"num_experts": NUM_EXPERTS, "expert_units": UNITS}),
    "omoe": ("OMoE", {"num_experts": NUM_EXPERTS, "expert_units": UNITS}),
    "dselect_k": ("DSelectK", {"num_experts": NUM_EXPERTS, "expert_units": UNITS}),
    "cgc": ("CGC", {"expert_units": UNITS, **MODULES}),
    "ple": ("PLE", {"levels": LEVELS, **MODULES}),
    "adatt": ("AdaTT", {"levels": LEVELS, **MODULES}),
    "adatt_sp": ("AdaTTSp", {"levels": LEVELS, "num_specific": 2}),
    "snr_trans": ("SNRTrans", {"units": (*UNITS, UNITS[-1])}),
    "snr_aver": ("SNRAver", {"units": (UNITS[-1],) * 3}),
    "dbmtl": (
        "DBMTL",
        {"bottom": UNITS, "units": UNITS[-1:], "relation_units": UNITS[-1:], "parents": {TASKS[1]: TASKS[:1]}},
    ),
}
REFERENCE = "mmoe"
"""The strategy whose number of parameters the others get."""


class Compared(NamedTuple):
    """A strategy that other libraries have too.

    Attributes:
      strategy: Its name in :data:`STRATEGIES`, and of the methods in benchmarks/sharing_torch.py that make it.
      sizes: How its sizes read.
      options: Widths and numbers that all competitors get.
    """

    strategy: str
    sizes: str
    options: dict[str, Any]


COMPARED = {
    "shared_bottom": Compared("shared_bottom", "64-32", {"units": UNITS}),
    "mmoe": Compared("mmoe", "8 x 64-32", {"num_experts": NUM_EXPERTS, "expert_units": UNITS}),
    "ple": Compared("ple", "6 x 64, 6 x 32", {"levels": LEVELS, **MODULES}),
    "ple_repeated": Compared("ple", "6 x 64-32, twice", {"levels": (UNITS, UNITS), **MODULES}),
}
EXPERTS, WAYS = [4, 8, 16], ("stacked", "loop")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a worker measures.

    Attributes:
      strategies: Names in :data:`STRATEGIES`.
      parameters: Number that all strategies get, towers included; None: that of :data:`REFERENCE`.
      batch_size: Rows.
      steps: Passes of a measurement.
    """

    strategies: tuple[str, ...]
    parameters: int | None
    batch_size: int
    steps: int

    @classmethod
    def parse(cls, description: str | None, arguments: Sequence[str] | None = None) -> "Case":
        """The case on the command line of a worker."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
        parser.add_argument("--parameters", type=int)
        parser.add_argument("--batch-size", type=int, default=2048)
        parser.add_argument("--steps", type=int, default=32)
        options = parser.parse_args(arguments)
        return cls(tuple(options.strategies), options.parameters, options.batch_size, options.steps)

    def arguments(self) -> list[str]:
        """What :meth:`parse` reads."""
        numbers = {"--batch-size": self.batch_size, "--steps": self.steps, "--parameters": self.parameters}
        flags = [str(part) for flag, number in numbers.items() if number is not None for part in (flag, number)]
        return [*flags, "--strategies", *self.strategies]

    def compared(self) -> dict[str, Compared]:
        """Those of :data:`COMPARED` whose strategy is asked for."""
        return {name: entry for name, entry in COMPARED.items() if entry.strategy in self.strategies}


def generate(case: Case) -> dict[str, np.ndarray]:
    """One batch: ``dense`` f32[B, D] and ``labels`` f32[B, T]."""
    of_balancing = balancing_worker.Case(
        tasks=len(TASKS), units=(), batch_size=case.batch_size, steps=balancing_worker.NUM_BATCHES
    )
    return {name: array[: case.batch_size].copy() for name, array in balancing_worker.generate(of_balancing).items()}


def seconds_of(passes: Callable[[], float], steps: int) -> float:
    """Seconds of a pass, which returns its loss when all of its gradients are there; the first ones are not timed."""
    for _ in range(WARM_UP):
        passes()
    start = time.perf_counter()
    losses = [passes() for _ in range(steps)]
    seconds = (time.perf_counter() - start) / steps
    if not np.isfinite(losses).all():
        raise RuntimeError("a loss is not finite; expected finite ones. Leave the strategy out")
    return seconds


def main() -> None:
    case = Case.parse(__doc__)
    allow_missing_polars()
    import jax

    passes = Passes(case)
    device = jax.devices()[0]
    facts = {
        "target": passes.target,
        "equal": {name: widths_of(name, strategy) for name, strategy in passes.strategies.items()},
        "unmatched": passes.unmatched,
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions("jax", "jaxlib", "flax", "numpy"),
    }
    serve(facts, lambda request: passes.measure(**request))


class Passes:
    """Compiled passes on one batch.

    Attributes:
      target: The number of parameters, towers included.
      strategies: Name -> constructor at about that number, for those of the case.
      unmatched: Name -> why there is none.
    """

    def __init__(self, case: Case):
        from mtl_jax.errors import ConfigError
        from mtl_jax.sharing import match_parameters

        self.case, self.batch = case, generate(case)
        self.target = case.parameters or number_of(constructor(*STRATEGIES[REFERENCE]))
        self.strategies, self.unmatched = {}, {}
        for name in case.strategies:
            try:
                self.strategies[name] = match_parameters(constructor(*STRATEGIES[name]), self.target, number_of)
            except ConfigError as error:
                self.unmatched[name] = str(error)
        self.programs: dict[tuple, tuple[Callable[[], float], dict[str, Any]]] = {}

    def measure(self, part: str, **request: Any) -> dict[str, Any]:
        """Seconds of a pass, and facts about what is passed."""
        key = (part, *request.values())
        if key not in self.programs:
            self.programs[key] = getattr(self, part)(**request)
        passes, facts = self.programs[key]
        return {"seconds": seconds_of(passes, self.case.steps), **facts}

    def equal(self, name: str) -> tuple[Callable[[], float], dict[str, Any]]:
        """The passes of a strategy at the target, and facts."""
        return self.passes_of(self.strategies[name])

    def compared(self, name: str) -> tuple[Callable[[], float], dict[str, Any]]:
        """The passes of a strategy at the sizes of :data:`COMPARED`, and facts."""
        entry = COMPARED[name]
        return self.passes_of(constructor(STRATEGIES[entry.strategy][0], entry.options))

    def passes_of(self, strategy: functools.partial) -> tuple[Callable[[], float], dict[str, Any]]:
        """The passes of a strategy with its towers, and facts."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtl_jax.losses import bce
        from mtl_jax.nn import Context

        module = network(strategy, NUM_DENSE, TASKS, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        x, labels = self.batch["dense"], self.batch["labels"]

        def forward(params, x):
            return outputs(nnx.merge(graph, params, rest), x, Context())[0]

        def loss(params, x, labels, key):
            module = nnx.merge(graph, params, rest)
            found, common = outputs(module, x, Context(train=True, rngs=key))
            total = sum(jnp.mean(bce(found[task], labels[:, k])) for k, task in enumerate(TASKS))
            rows = module["strategy"].row_regulariser(common)
            return total + module["strategy"].regulariser() + (0.0 if rows is None else jnp.mean(rows))

        arguments = (params, *jax.device_put((x, labels)), jax.random.key(0))
        both = jax.jit(jax.value_and_grad(loss)).lower(*arguments)
        facts = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "forward_flop": self._flop(jax.jit(forward).lower(params, x)),
            "flop": self._flop(both),
        }
        return _runner(both.compile(), arguments), facts

    def _flop(self, lowered: Any) -> float:
        """Of an example, as the compiler counts them."""
        return lowered.cost_analysis()["flops"] / self.case.batch_size

    def experts(self, number: int, way: str) -> tuple[Callable[[], float], dict[str, Any]]:
        """The passes of a bank of experts, mixed with given weights, in one of :data:`WAYS`; and no facts."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtl_jax.nn import MLP, Experts, mix

        bank = Experts(NUM_DENSE, UNITS, num_experts=number, rngs=nnx.Rngs(0))
        if way == "loop":
            stacked, bank = bank, nnx.List([MLP(NUM_DENSE, UNITS, rngs=nnx.Rngs(0)) for _ in range(number)])
            for index, expert in enumerate(bank):
                for layer, source in zip(expert.layers, stacked.layers, strict=True):
                    layer.kernel[...], layer.bias[...] = source.kernel[index], source.bias[index]
        graph, params = nnx.split(bank)

        def loss(params, x, weights):
            bank = nnx.merge(graph, params)
            if way == "stacked":
                mixed = mix(weights, bank(x))
            else:
                mixed = sum(weights[:, index, None] * expert(x) for index, expert in enumerate(bank))
            return jnp.mean(jnp.square(mixed))

        weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (self.case.batch_size, number)))
        arguments = (params, jax.device_put(self.batch["dense"]), weights)
        return _runner(jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(), arguments), {}


def constructor(kind: str, options: dict[str, Any]) -> functools.partial:
    """``(in_features, tasks, *, rngs) -> strategy`` without dropout."""
    from mtl_jax import sharing

    return functools.partial(getattr(sharing, kind), dropout=0.0, **options)


def widths_of(name: str, strategy: functools.partial) -> dict[str, Any]:
    """Of the layers that :data:`STRATEGIES` names."""
    _, options = STRATEGIES[name]
    return {option: strategy.keywords[option] for option in strategy.func.widths if option in options}


def network(strategy: Callable[..., Any], in_features: int, tasks: Sequence[str], *, rngs: Any) -> Any:
    """A strategy with a tower a task."""
    from flax import nnx

    from mtl_jax.nn import Tower

    shared = strategy(in_features, tasks, rngs=rngs)
    towers = {task: Tower(shared.out_features, units=TOWER_UNITS, dropout=0.0, rngs=rngs) for task in tasks}
    return nnx.Dict(strategy=shared, towers=nnx.Dict(towers))


def outputs(module: Any, x: Any, context: Any) -> tuple[dict[str, Any], Any]:
    """Logits of the tasks, and the cut."""
    strategy = module["strategy"]
    common = strategy.common(x, context)
    return {task: module["towers"][task](strategy.head(task, common), context) for task in TASKS}, common


def number_of(strategy: Callable[..., Any]) -> int:
    """Parameters of a strategy and its towers."""
    from mtl_jax.sharing.match import number_of_parameters

    return number_of_parameters(functools.partial(network, strategy), NUM_DENSE, TASKS)


def _runner(compiled: Callable[..., Any], arguments: tuple) -> Callable[[], float]:
    import jax

    def passes() -> float:
        value, _ = jax.block_until_ready(compiled(*arguments))
        return float(value)

    return passes


if __name__ == "__main__":
    main()
