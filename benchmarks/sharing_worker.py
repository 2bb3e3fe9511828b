"""Forward and backward passes of sharing strategies, timed on request.

    python -m benchmarks.sharing_worker --strategies mmoe ple      # then a request a line:
    {"part": "equal", "name": "mmoe"}
    {"part": "compared", "name": "ple"}
    {"part": "experts", "number": 8, "way": "loop"}

``equal`` are all strategies at one number of parameters, ``compared`` those that other libraries have too, at the widths
given there, ``experts`` two layouts of a bank. All strategies are in training mode and given one context, with random
domains and a random prior; what they assign themselves (running moments, centres) goes into the next pass.
benchmarks/sharing_cost.py starts it and asks. Requests and answers are
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
NUM_DOMAINS, PRIOR = 3, 32
DOMAINS, OF_PRIOR = {"num_domains": NUM_DOMAINS}, {"prior_features": PRIOR}
EXPERTS_OF_MMOE = {"num_experts": NUM_EXPERTS, "expert_units": UNITS}

# Name -> class, and options whose widths are scaled together. An ``inner`` strategy is such a pair too.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_bottom": ("SharedBottom", {"units": UNITS}),
    "single_task": ("SingleTask", {"units": UNITS, "share_embeddings": True}),
    "soft_sharing": ("SoftSharing", {"units": UNITS}),
    "cross_stitch": ("CrossStitch", {"units": UNITS}),
    "sluice": ("Sluice", {"width": UNITS[0]}),
    "mtan": ("MTAN", {"units": UNITS}),
    "mmoe": ("MMoE", EXPERTS_OF_MMOE),
    "omoe": ("OMoE", EXPERTS_OF_MMOE),
    "dselect_k": ("DSelectK", EXPERTS_OF_MMOE),
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
    "ltb": ("LTB", {"units": UNITS}),
    "home": ("HoME", {"levels": LEVELS}),
    "aitm": ("AITM", {"units": UNITS}),
    "resflow": ("ResFlow", {"units": UNITS, "logits": False}),
    "stem": ("STEM", {"expert_units": UNITS}),
    "star": ("STAR", {"units": UNITS, "auxiliary_units": (16,), **DOMAINS}),
    "sar_net": ("SARNet", {"expert_width": 16, "units": UNITS, **DOMAINS}),
    "m2m": ("M2M", {"num_experts": 6, "expert_units": UNITS, **DOMAINS}),
    "adasparse": ("AdaSparse", {"units": UNITS, **DOMAINS}),
    "hamur": ("HAMUR", {"units": UNITS, "adapter_width": 32, "hyper_units": (64,), **DOMAINS}),
    "epnet": ("EPNet", {"inner": ("MMoE", EXPERTS_OF_MMOE), **DOMAINS}),
    "ppnet": ("PPNet", {"units": UNITS, **OF_PRIOR}),
    "pepnet": ("EPNet", {"inner": ("PPNet", {"units": UNITS}), **DOMAINS, **OF_PRIOR}),
    "adapt_dhm": ("AdaptDHM", {"units": UNITS}),
    "m3oe": ("M3oE", {"star_units": 64, "hidden_units": 64, "expert_units": UNITS, **DOMAINS}),
}
REFERENCE = "mmoe"
"""The strategy whose number of parameters the others get."""


PEERS = ("torch-rechub", "deepctr-torch")


class Compared(NamedTuple):
    """A model that other libraries have too: a strategy, or one with a link.

    Attributes:
      strategy: Its name in :data:`STRATEGIES`.
      sizes: How its sizes read.
      options: Widths and numbers that all competitors get.
      link: Class of the link behind the towers, along the order of :data:`TASKS`; None: the strategy's own, if any.
      peers: The libraries that have it.
    """

    strategy: str
    sizes: str
    options: dict[str, Any]
    link: str | None = None
    peers: tuple[str, ...] = PEERS

    @property
    def title(self) -> str:
        """Name of the model."""
        return self.link or STRATEGIES[self.strategy][0]

    @property
    def maker(self) -> str:
        """Name of the methods in benchmarks/sharing_torch.py that make it."""
        return self.strategy if self.link is None else self.link.lower()


COMPARED = {
    "shared_bottom": Compared("shared_bottom", "64-32", {"units": UNITS}),
    "mmoe": Compared("mmoe", "8 x 64-32", EXPERTS_OF_MMOE),
    "ple": Compared("ple", "6 x 64, 6 x 32", {"levels": LEVELS, **MODULES}),
    "ple_repeated": Compared("ple", "6 x 64-32, twice", {"levels": (UNITS, UNITS), **MODULES}),
    "esmm": Compared("single_task", "2 x 64-32", {"units": UNITS}, link="ESMM"),
    "aitm": Compared("aitm", "2 x 64-32", {"units": UNITS}, peers=PEERS[:1]),
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


def facts_of_rows(case: Case) -> dict[str, np.ndarray]:
    """What a context says of the rows of the batch: ``domain`` int32[B] and ``prior`` f32[B, P]."""
    generator = np.random.default_rng(1)
    domain = generator.integers(NUM_DOMAINS, size=case.batch_size, dtype=np.int32)
    return {"domain": domain, "prior": generator.standard_normal((case.batch_size, PRIOR)).astype(np.float32)}


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
        return self.passes_of(compared_constructor(name), COMPARED[name].link)

    def passes_of(
        self, strategy: functools.partial, link: str | None = None
    ) -> tuple[Callable[[], float], dict[str, Any]]:
        """The passes of a strategy with its towers and its link, or the given one; and facts."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtl_jax import sharing
        from mtl_jax.losses import bce
        from mtl_jax.nn import Context, State

        module = network(strategy, NUM_DENSE, TASKS, rngs=nnx.Rngs(0))
        graph, *parts = nnx.split(module, nnx.Param, State, ...)
        params, moved, rest = map(nnx.as_pure, parts)  # arrays: variables that are made here could not be assigned to
        tie = module["strategy"].link() if link is None else functools.partial(getattr(sharing, link), order=TASKS)
        tied = (tie or sharing.Link)(TASKS)
        x, labels = input_of(module["strategy"], self.batch["dense"]), self.batch["labels"]
        x, labels, rows = jax.device_put((x, labels, facts_of_rows(self.case)))

        def forward(params, moved, x, rows):
            found, _ = outputs(nnx.merge(graph, params, moved, rest), x, Context(**rows))
            return tied(found).logits

        def loss(params, moved, x, labels, rows, key):
            module = nnx.merge(graph, params, moved, rest)  # a copy of this pass, which it may assign to
            found, common = outputs(module, x, Context(train=True, rngs=key, **rows))
            found = tied(found)
            total = sum(jnp.mean(bce(found.logits[task], labels[:, k])) for k, task in enumerate(TASKS))
            total = sum(map(jnp.mean, found.aux.values()), total)
            penalty = module["strategy"].row_regulariser(common)
            total = total + module["strategy"].regulariser() + (0.0 if penalty is None else jnp.mean(penalty))
            return total, nnx.as_pure(nnx.state(module, State))

        arguments = (x, labels, rows, jax.random.key(0))
        both = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, moved, *arguments)
        facts = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "forward_flop": self._flop(jax.jit(forward).lower(params, moved, x, rows)),
            "flop": self._flop(both),
        }
        compiled = both.compile()

        def passes() -> float:
            nonlocal moved
            (value, moved), _ = jax.block_until_ready(compiled(params, moved, *arguments))
            return float(value)

        return passes, facts

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
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        return lambda: float(jax.block_until_ready(compiled(*arguments))[0]), {}


def constructor(kind: str, options: dict[str, Any]) -> functools.partial:
    """``(in_features, tasks, *, rngs) -> strategy`` without dropout."""
    from mtl_jax import sharing

    made = {name: constructor(*value) if name == "inner" else value for name, value in options.items()}
    return functools.partial(getattr(sharing, kind), dropout=0.0, **made)


def compared_constructor(name: str) -> functools.partial:
    """The strategy of a model in :data:`COMPARED`, at the sizes given there."""
    kind, options = STRATEGIES[COMPARED[name].strategy]
    return constructor(kind, options | COMPARED[name].options)


def widths_of(name: str, strategy: functools.partial) -> dict[str, Any]:
    """Of the layers that :data:`STRATEGIES` names."""

    def named(strategy: functools.partial, options: dict[str, Any]) -> dict[str, Any]:
        found = {option: strategy.keywords[option] for option in strategy.func.widths if option in options}
        inner = found.pop("inner", None)
        return found if inner is None else named(inner, options["inner"][1])

    return named(strategy, STRATEGIES[name][1])


def input_of(strategy: Any, dense: np.ndarray) -> np.ndarray:
    """What a strategy reads: f32[B, D], or f32[B, K, D] where it has an input for every set of tables."""
    if not strategy.private_tables:
        return dense
    return np.repeat(dense[:, None], len(TASKS) + strategy.shared_tables, axis=1)


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


if __name__ == "__main__":
    main()
