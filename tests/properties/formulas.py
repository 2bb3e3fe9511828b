"""Every balancer once more: NumPy loops in float64 on explicit gradients, written from the formulas.

A reference is a factory with the options of its method. It returns ``step(rows [T, P], losses [T], tasks, draws)``, which
keeps its state from call to call and returns the terms [n, P] that add up to the direction. All rows that it is given
are active, and the same tasks in every call; ``tasks`` are their numbers, for options, ``draws`` the random numbers.
"""

import itertools
import types

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

# Shared parts


def lengths(rows):
    return np.linalg.norm(rows, axis=1)


def unit_rows(rows):
    return rows / lengths(rows)[:, None]


def pseudo_inverse(matrix):
    """By singular values; the cases have either independent rows or ranks that are exact to rounding."""
    return np.linalg.pinv(matrix, rcond=1e-9)


def adam(learning_rate):
    """Adam of a vector, as ``update(value, gradient)``."""
    state = types.SimpleNamespace(mean=0.0, square=0.0, count=0)

    def update(value, gradient):
        state.count += 1
        state.mean = 0.9 * state.mean + 0.1 * gradient
        state.square = 0.999 * state.square + 0.001 * gradient**2
        mean = state.mean / (1 - 0.9**state.count)
        return value - learning_rate * mean / (np.sqrt(state.square / (1 - 0.999**state.count)) + 1e-8)

    return update


def on_simplex(point, total=1.0):
    """The nearest point with entries >= 0 that sum to ``total``: the root of a decreasing function of one shift."""
    low, high = point.min() - total, point.max()
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if np.maximum(point - shift, 0).sum() > total else (low, shift)
    support = point > low
    return np.where(support, point - (point[support].sum() - total) / support.sum(), 0)


def supports(size):
    for count in range(1, size + 1):
        yield from map(list, itertools.combinations(range(size), count))


def shortest_mixture(rows):
    """Weights on the simplex of the shortest combination, by trying all supports."""
    best, shortest = None, np.inf
    for support in supports(len(rows)):
        first, *others = support
        shares = np.linalg.lstsq((rows[others] - rows[first]).T, -rows[first], rcond=None)[0] if others else np.zeros(0)
        shares = np.array([1 - shares.sum(), *shares])
        if shares.min() > -1e-12 and np.linalg.norm(shares @ rows[support]) < shortest:
            weights = np.zeros(len(rows))
            weights[support] = shares
            best, shortest = weights, np.linalg.norm(shares @ rows[support])
    return best


def without_conflict(rows, vector):
    """Weights to add to ``vector`` for the nearest direction that conflicts with no row."""
    norms = lengths(rows)
    return scipy.optimize.nnls((rows / norms[:, None]).T, -vector, maxiter=1000)[0] / norms


def fair_weights(products, alpha):
    """The root of ``products @ w = w**(-1 / alpha)``: damped Newton on the convex function it is the slope of."""

    def value(weights):
        if weights.min() <= 0:
            return np.inf
        utility = np.log(weights) if alpha == 1 else weights ** (1 - 1 / alpha) / (1 - 1 / alpha)
        return weights @ products @ weights / 2 - utility.sum()

    weights, step = np.diagonal(products) ** (-alpha / (1 + alpha)), np.inf
    while np.max(np.abs(step) / weights) > 1e-7:
        slope = products @ weights - weights ** (-1 / alpha)
        step = np.linalg.solve(products + np.diag(weights ** (-1 / alpha - 1) / alpha), -slope)
        size = 1.0
        while size > 1e-3 and value(weights + size * step) > value(weights) + 0.1 * size * (slope @ step):
            size /= 2
        weights = weights + size * step
    return weights


def stationarity(rows):
    """How far the unit gradients are from a combination that vanishes: 0 where some trade-off is Pareto-stationary."""
    directions = unit_rows(rows)
    return np.linalg.norm(shortest_mixture(directions) @ directions)


def independence(rows):
    """Smallest singular value of the unit gradients, of those that are not 0, and whether the rows are independent."""
    values = np.linalg.svd(unit_rows(rows), compute_uv=False)
    rank = np.sum(values > 1e-9)
    return values[rank - 1], rank == len(rows)


# Losses


def equal(reduction="sum"):
    return lambda rows, losses, tasks, draws: rows / (1 if reduction == "sum" else len(rows))


def fixed(weights):
    return lambda rows, losses, tasks, draws: weights[tasks, None] * rows


def uncertainty(initial, weight_lr, factor=0.5):
    state = types.SimpleNamespace(logs=None, update=adam(weight_lr))

    def step(rows, losses, tasks, draws):
        logs = initial[tasks] if state.logs is None else state.logs
        weights = factor * np.exp(-logs)
        state.logs = np.clip(state.update(logs, 0.5 - weights * losses), -10, 10)
        return weights[:, None] * rows

    return step


def learned_scales(weight_lr):
    """(losses) -> the logs of the scales that make losses alike, before their step."""
    state = types.SimpleNamespace(logs=0.0, update=adam(weight_lr))

    def follow(losses):
        logs = state.logs + np.zeros_like(losses)
        state.logs = np.clip(state.update(logs, np.exp(logs) * losses - 1), -10, 10)
        return logs

    return follow


def imtl_l(weight_lr):
    follow = learned_scales(weight_lr)
    return lambda rows, losses, tasks, draws: np.exp(follow(losses))[:, None] * rows


def dwa(temperature):
    """Periods of one step."""
    history = []

    def step(rows, losses, tasks, draws):
        rates = np.clip(history[-1] / history[-2], 1e-3, 1e3) / temperature if len(history) > 1 else 0 * losses
        history.append(losses)
        return len(rows) * scipy.special.softmax(rates)[:, None] * rows

    return step


def geometric():
    def step(rows, losses, tasks, draws):
        safe = losses + 1e-12 * losses.max()
        return (np.prod(safe) ** (1 / len(safe)) / len(safe) / safe)[:, None] * rows

    return step


def scale_invariant():
    return lambda rows, losses, tasks, draws: rows / (losses + 1e-12 * losses.max())[:, None]


def random():
    return lambda rows, losses, tasks, draws: scipy.special.softmax(draws[tasks])[:, None] * rows


def stch(mu, preference=None, reference=0.0):
    def step(rows, losses, tasks, draws):
        shares = np.full(len(rows), 1 / len(rows)) if preference is None else preference[tasks]
        return (shares * scipy.special.softmax(shares * (losses - reference) / mu))[:, None] * rows

    return step


def stch_log_nadir(mu, warmup):
    """Periods of one step."""
    history = []

    def step(rows, losses, tasks, draws):
        history.append(losses)
        if len(history) <= warmup:
            return rows / losses[:, None]
        ratios = np.log(losses / history[warmup - 1])
        return (len(rows) * scipy.special.softmax(ratios / mu) / losses)[:, None] * rows

    return step


def cosmos(lambda_):
    def step(rows, losses, tasks, draws):
        preference = np.full(len(rows), 1 / len(rows))
        unit, norm = preference / np.linalg.norm(preference), np.linalg.norm(losses)
        cosine = unit @ losses / norm
        return (preference - lambda_ / norm * (unit - cosine * losses / norm))[:, None] * rows

    return step


def pbi(theta):
    def step(rows, losses, tasks, draws):
        ray = np.full(len(rows), len(rows) ** -0.5)
        across = losses - losses @ ray * ray
        smooth = np.hypot(np.linalg.norm(across), 1e-6 * np.linalg.norm(losses))
        return (ray + theta * across / smooth)[:, None] * rows

    return step


def famo(weight_lr, weight_decay, bound=0.0):
    state = types.SimpleNamespace(logits=0.0, update=adam(weight_lr))

    def step(rows, losses, tasks, draws):
        state.floor = 1e-8 * np.max(losses - bound)
        state.before = losses - bound + state.floor
        weights = scipy.special.softmax(state.logits + np.zeros_like(losses)) / state.before
        return (weights / weights.sum())[:, None] * rows

    def observe(after):
        gains = np.log(state.before / (after - bound + state.floor))
        logits = state.logits + np.zeros_like(after)
        shares = scipy.special.softmax(logits)
        state.logits = state.update(logits, shares * (gains - shares @ gains) + weight_decay * logits)

    step.observe = observe
    return step


def go4align(num_groups, eta):
    state = types.SimpleNamespace(shares=1.0)

    def step(rows, losses, tasks, draws):
        shares = state.shares * np.exp(-eta * losses)
        state.shares = shares / shares.sum()
        ratios = state.shares * losses.sum() / losses
        order = np.argsort(ratios)
        partitions = (
            np.split(order, cuts)
            for count in range(min(num_groups, len(rows)))
            for cuts in itertools.combinations(range(1, len(rows)), count)
        )
        best = min(partitions, key=lambda groups: sum(len(group) * np.var(ratios[group]) for group in groups))
        weights = np.zeros(len(rows))
        for group in best:
            weights[group] = ratios[group].mean()
        return weights[:, None] * rows

    return step


def ldc_mtl(lambda_, weight_lr):
    """With losses relative to the first ones."""
    state = types.SimpleNamespace(logits=1.0, factors=None, update=adam(weight_lr))

    def step(rows, losses, tasks, draws):
        state.factors = losses.min() / losses if state.factors is None else state.factors
        logits = state.logits + np.zeros_like(losses)
        gates = scipy.special.expit(logits)
        alike = losses * state.factors
        differences = np.diff(gates * alike)
        signs = np.where(np.abs(differences) > 1e-12 * losses.max(), -np.sign(differences), 0)
        pull = 1 / gates.sum() + lambda_ * np.diff(signs, prepend=0, append=0)
        state.logits = state.update(logits, alike * pull * gates * (1 - gates))
        return (state.factors * gates * pull)[:, None] * rows

    return step


def ple_schedule(initial, decay):
    """Periods of one step."""
    ended = itertools.count()
    return lambda rows, losses, tasks, draws: (initial * decay ** next(ended))[tasks, None] * rows


# Gradients


def gradnorm(alpha, weight_lr):
    state = types.SimpleNamespace(weights=None, first=None, update=adam(weight_lr))

    def step(rows, losses, tasks, draws):
        state.first = losses if state.first is None else state.first
        weights = np.ones(len(rows)) if state.weights is None else state.weights
        norms = lengths(rows)
        speeds = losses / state.first
        mean = np.mean(weights * norms)
        targets = mean * (speeds / speeds.mean()) ** alpha
        new = np.maximum(state.update(weights, np.sign(weights * norms - targets) * norms / mean), 1e-3)
        state.weights = len(rows) * new / new.sum()
        return weights[:, None] * rows

    return step


def mgda(normalize="none"):
    def step(rows, losses, tasks, draws):
        divisors = {"none": 1, "l2": lengths(rows), "loss": losses, "loss+": lengths(rows) * losses}[normalize]
        return shortest_mixture(rows / np.broadcast_to(divisors, len(rows))[:, None])[:, None] * rows

    return step


def pcgrad():
    def step(rows, losses, tasks, draws):
        position = {task: number for number, task in enumerate(tasks)}
        projected = rows.copy()
        for task in tasks:
            mine = projected[position[task]]
            for other in draws[task]:
                if other in position and other != task:
                    row = rows[position[other]]
                    mine -= min(mine @ row, 0) / (row @ row) * row
        return np.array([*rows, *(projected - rows)])

    return step


def gradvac(beta):
    usual = {}

    def step(rows, losses, tasks, draws):
        position = {task: number for number, task in enumerate(tasks)}
        edited = rows.copy()
        for task in tasks:
            mine = edited[position[task]]
            start = np.linalg.norm(mine)
            for other in draws[task]:
                if other not in position or other == task:
                    continue
                row = rows[position[other]]
                length, norm = np.linalg.norm(mine), np.linalg.norm(row)
                if length == 0:
                    continue
                cosine = np.clip(mine @ row / (length * norm), -1, 1)
                target = np.clip(usual.get((task, other), 0.0), -1 + 1e-6, 1 - 1e-6)
                sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
                if cosine < target:
                    mine += length * (target * sine - cosine * target_sine) / (norm * target_sine) * row
                if length >= 1e-3 * start:  # else it is what rounding left of it
                    usual[task, other] = (1 - beta) * usual.get((task, other), 0.0) + beta * cosine
        return np.array([*rows, *(edited - rows)])

    return step


def cagrad(c):
    """Among the directions that solve the problem for some support, the one with the largest smallest gain."""

    def step(rows, losses, tasks, draws):
        mean = rows.mean(axis=0)
        radius = c * np.linalg.norm(mean)
        best, gain = None, -np.inf
        for support in supports(len(rows)):
            inverse = pseudo_inverse(unit_rows(rows[support])) / lengths(rows[support])
            spread, part = inverse.sum(axis=1), inverse @ (rows[support] @ mean)
            # All gains are the same number m on the support: |m * spread - part| is the radius.
            middle = spread @ part / (spread @ spread)
            square = middle**2 - (part @ part - radius**2) / (spread @ spread)
            for level in (middle - square**0.5, middle + square**0.5) if square >= 0 else ():
                toward = level * spread - part
                direction = mean + radius * toward / np.linalg.norm(toward)
                if np.min(rows @ direction) > gain:
                    best, gain = toward / np.linalg.norm(toward), np.min(rows @ direction)
        return np.array([mean, radius * best])

    return step


def impartial_weights(rows):
    inverse = pseudo_inverse(rows)
    weights = inverse.T @ (inverse @ lengths(rows))
    total, size = abs(weights.sum()), np.abs(weights).sum()
    return weights / (size if total < 1e-3 * size else total)


def imtl_g():
    return lambda rows, losses, tasks, draws: impartial_weights(rows)[:, None] * rows


def imtl(weight_lr):
    follow = learned_scales(weight_lr)

    def step(rows, losses, tasks, draws):
        scaled = np.exp(follow(losses))[:, None] * rows
        return impartial_weights(scaled)[:, None] * scaled

    return step


def graddrop(leak):
    def step(rows, losses, tasks, draws):
        terms = np.zeros_like(rows)
        for column, uniform in enumerate(draws[: rows.shape[1]]):
            entries = rows[:, column]
            if np.any(entries):
                purity = (1 + entries.sum() / np.abs(entries).sum()) / 2
                kept = entries > 0 if purity > uniform else entries < 0
                terms[:, column] = np.where(kept, 1.0, leak[tasks]) * entries
        return terms

    return step


def fair(alpha, reg_eps=0.0):
    def weights(rows):
        norms = lengths(rows)
        return fair_weights(rows @ rows.T + reg_eps * np.diag(norms**2), alpha)

    return weights


def nash_mtl(reg_eps, max_norm):
    weights = fair(1.0, reg_eps)

    def step(rows, losses, tasks, draws):
        terms = weights(rows)[:, None] * rows
        return terms * max_norm / max(max_norm, np.linalg.norm(terms.sum(axis=0)))

    return step


def fairgrad(alpha, reg_eps):
    weights = fair(alpha, reg_eps)
    return lambda rows, losses, tasks, draws: weights(rows)[:, None] * rows


def aligned_mtl():
    """With the smallest singular value for scale."""

    def step(rows, losses, tasks, draws):
        left, values, _ = np.linalg.svd(rows, full_matrices=False)
        rank = np.sum(np.linalg.svd(unit_rows(rows), compute_uv=False) > 1e-9)
        left, values = left[:, :rank], values[:rank]
        return (left @ (values[-1] / values * left.sum(axis=0)))[:, None] * rows

    return step


def moco(beta, beta_sigma, gamma, gamma_sigma, rho):
    state = types.SimpleNamespace(average=0.0, mixture=None, count=0)

    def step(rows, losses, tasks, draws):
        state.count += 1
        mixture = np.full(len(rows), 1 / len(rows)) if state.mixture is None else state.mixture
        state.average = state.average - beta / state.count**beta_sigma * (state.average - rows)
        slope = state.average @ (state.average.T @ mixture) + rho * mixture
        state.mixture = on_simplex(mixture - gamma / state.count**gamma_sigma * slope)
        return state.mixture[:, None] * state.average

    return step


def modo(gamma, rho):
    """``rows`` are those of three batches."""
    state = types.SimpleNamespace(mixture=None)

    def step(rows, losses, tasks, draws):
        first, second, last = rows
        mixture = np.full(len(last), 1 / len(last)) if state.mixture is None else state.mixture
        state.mixture = on_simplex(mixture - gamma * (first @ (second.T @ mixture) + rho * mixture))
        return state.mixture[:, None] * last

    return step


def sdmgrad(lambda_, inner_lr, momentum, num_iterations):
    """``rows`` are those of three batches."""
    state = types.SimpleNamespace(mixture=None)

    def step(rows, losses, tasks, draws):
        first, second, last = rows
        preference = np.full(len(last), 1 / len(last))
        mixture = preference if state.mixture is None else state.mixture
        products = first @ second.T
        scale = np.mean(np.sqrt(np.maximum(np.diagonal(products), 0))) ** 2
        velocity = np.zeros(len(last))
        for _ in range(num_iterations if scale > 1e-12 * np.abs(products).max() else 0):
            velocity = momentum * velocity + products @ (mixture + lambda_ * preference) / scale
            mixture = on_simplex(mixture - inner_lr * velocity)
        state.mixture = mixture
        return ((mixture + lambda_ * preference) / (1 + lambda_))[:, None] * last

    return step


def db_mtl(beta, sigma):
    state = types.SimpleNamespace(average=0.0, count=0)

    def step(rows, losses, tasks, draws):
        state.count += 1
        stays = beta / state.count**sigma
        state.average = stays * state.average + (1 - stays) * rows / (losses + 1e-8)[:, None]
        return lengths(state.average).max() * unit_rows(state.average)

    return step


def excess_mtl(eta, num_warmup):
    state = types.SimpleNamespace(squares=0.0, logs=0.0, early=[])

    def step(rows, losses, tasks, draws):
        state.squares = state.squares + rows**2
        excess = np.sum(rows**2 / np.sqrt(np.where(state.squares > 0, state.squares, 1)), axis=1)
        if len(state.early) < num_warmup:
            state.early.append(excess)
            return rows / len(rows)
        state.logs = state.logs + eta * excess / np.mean(state.early, axis=0)
        return scipy.special.softmax(state.logs)[:, None] * rows

    return step


def upgrad(preference=None):
    def step(rows, losses, tasks, draws):
        shares = np.full(len(rows), 1 / len(rows)) if preference is None else preference[tasks]
        weights = shares.copy()
        for row, share in zip(rows, shares, strict=True):
            weights += without_conflict(rows, share * row)
        return weights[:, None] * rows

    return step


def dual_proj(preference=None):
    def step(rows, losses, tasks, draws):
        shares = np.full(len(rows), 1 / len(rows)) if preference is None else preference[tasks]
        return (shares + without_conflict(rows, shares @ rows))[:, None] * rows

    return step


def conflict_free(rows, preference):
    """Terms of ConFIG's direction."""
    directions = unit_rows(rows)
    inverse = pseudo_inverse(directions)
    mixed = inverse @ preference
    norm = np.linalg.norm(mixed)
    if norm < 1e-10:
        return np.zeros_like(rows)
    weights = inverse.T @ mixed
    return (np.sum(rows @ mixed) / norm**2 * weights)[:, None] * directions


def config(preference=1.0):
    return lambda rows, losses, tasks, draws: conflict_free(rows, np.broadcast_to(preference, 8)[tasks])


def m_config(beta_1, beta_2, tasks_per_call):
    state = types.SimpleNamespace(turn=0, count=0, fake=0.0, squares=0.0)

    def step(rows, losses, tasks, draws):
        if state.turn == 0:
            state.means, state.counts = np.zeros_like(rows), np.zeros(len(rows))
        for _ in range(min(tasks_per_call, len(rows))):
            task = state.turn % len(rows)
            state.means[task] = beta_1 * state.means[task] + (1 - beta_1) * rows[task]
            state.counts[task] += 1
            state.turn += 1
        if state.turn < len(rows):
            return np.zeros_like(rows)
        state.count += 1
        direction = conflict_free(state.means / (1 - beta_1 ** state.counts[:, None]), np.ones(len(rows))).sum(axis=0)
        fake = (1 - beta_1**state.count) * direction
        gradient = (fake - beta_1 * state.fake) / (1 - beta_1)
        state.fake, state.squares = fake, beta_2 * state.squares + (1 - beta_2) * gradient**2
        root = np.sqrt(state.squares / (1 - beta_2**state.count))
        return (direction / np.where(root > 0, root + 1e-8 * root.max(), 1))[None]

    return step


def metabalance(relax, beta, main=0):
    """The parameters are one tensor."""
    state = types.SimpleNamespace(usual=0.0)

    def step(rows, losses, tasks, draws):
        state.usual = beta * state.usual + (1 - beta) * lengths(rows)
        if main not in tasks:
            return rows
        ratios = state.usual[list(tasks).index(main)] / state.usual
        return (relax * ratios + 1 - relax)[:, None] * rows

    return step


def krum(num_byzantine, num_selected):
    def step(rows, losses, tasks, draws):
        if len(rows) < num_byzantine + 3:
            return rows / len(rows)
        distances = np.sum((rows[:, None] - rows) ** 2, axis=-1)
        num_near = len(rows) - num_byzantine - 2
        scores = [np.sort(np.delete(distances[row], row))[:num_near].sum() for row in range(len(rows))]
        return rows[np.argsort(scores, kind="stable")[:num_selected]] / num_selected

    return step


def trimmed_mean(trim):
    def step(rows, losses, tasks, draws):
        cut = min(trim, (len(rows) - 1) // 2)
        kept = np.sort(rows, axis=0)[cut : len(rows) - cut]
        return kept / len(kept)

    return step


def cr_mogm(base, alpha):
    """``base`` gives weights: (rows) -> [T]."""
    state = types.SimpleNamespace(weights=None)

    def step(rows, losses, tasks, draws):
        new = base(rows)
        state.weights = new if state.weights is None else alpha * state.weights + (1 - alpha) * new
        return state.weights[:, None] * rows

    return step


def pe_ltr(min_weight):
    def step(rows, losses, tasks, draws):
        bounds = np.broadcast_to(min_weight, 8)[tasks]
        total = 1 - bounds.sum()
        start, free = np.full(len(rows), total / len(rows)), scipy.linalg.null_space(np.ones((1, len(rows))))
        slopes = rows.T @ free
        slopes = np.where(
            np.abs(slopes) > 1e-12 * np.abs(rows).max(), slopes, 0
        )  # between equal gradients there is none
        moves = np.linalg.lstsq(slopes, -(start + bounds) @ rows, rcond=1e-10)[0]
        return (on_simplex(start + free @ moves, total) + bounds)[:, None] * rows

    return step


def ntkmtl(exponent):
    def step(rows, losses, tasks, draws):
        kernels = lengths(rows) ** 2
        return ((kernels.sum() / kernels) ** exponent)[:, None] * rows

    return step
