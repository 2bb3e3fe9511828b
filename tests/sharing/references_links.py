"""Plain NumPy float64 references of the task links, one row and one step at a time, with products of probabilities.

Logits and labels are `[B]` or `[B, 1]`, moderate in size (no care is taken for |logit| above a few hundred).
"""

import numpy as np


def sigmoid(v):
    return 1.0 / (1.0 + np.exp(-v))


def cross_entropy(label, p, q):
    """Binary cross-entropy of one row, given the probabilities p of a one and q of a zero."""
    return -(label * np.log(p) + (1.0 - label) * np.log(q))


def weighted_mean(elements, weight):
    """Sum of weight times element over the sum of weights; 0 without any weight."""
    top, bottom = 0.0, 0.0
    for element, share in zip(elements, weight, strict=True):
        top += share * element
        bottom += share
    return top / bottom if bottom > 0 else 0.0


def _flat(v):
    return np.asarray(v, dtype=np.float64).reshape(-1)


def _weight(weight, rows):
    return np.ones(rows) if weight is None else _flat(weight)


def chain_probabilities(logits):
    """`(p, q)` of a chain of steps in one row: p of taking all of them, q of stopping at one of them."""
    p, q = 1.0, 0.0
    for logit in logits:
        q = q + p * sigmoid(-logit)
        p = p * sigmoid(logit)
    return p, q


def chain(a, b):
    """Logit of sigmoid(a) * sigmoid(b), element by element, in the shape of a."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    result = np.zeros(a.size)
    for i, (first, second) in enumerate(zip(a.reshape(-1), b.reshape(-1), strict=True)):
        p, q = chain_probabilities([first, second])
        result[i] = np.log(p) - np.log(q)
    return result.reshape(a.shape)


def esmm(logits, labels, order, weight=None):
    """ESMM (Ma et al., 2018) for any chain of at least two steps; returns `(logits, elements, losses)`, dicts by step.

    `logits` and `labels`: dict step -> `[B]`, each given the step before it. `order`: the steps' names. Step j of the
    result has the logit and the label of taking all steps up to j: the product of the probabilities, the product of
    the labels. Labels after a first 0 are not read. `elements` are the losses per row, `losses` their weighted means.
    """
    if len(order) < 2:
        raise ValueError("a chain needs at least two steps")
    rows = len(_flat(logits[order[0]]))
    weight = _weight(weight, rows)
    chained, elements, losses = {}, {}, {}
    for last, step in enumerate(order):
        chained[step], elements[step] = np.zeros(rows), np.zeros(rows)
        for i in range(rows):
            p, q = chain_probabilities([_flat(logits[name])[i] for name in order[: last + 1]])
            label = 1.0
            for name in order[: last + 1]:
                if label != 0.0:
                    label = label * _flat(labels[name])[i]
            chained[step][i] = np.log(p) - np.log(q)
            elements[step][i] = cross_entropy(label, p, q)
        losses[step] = weighted_mean(elements[step], weight)
    return chained, elements, losses


def escm2(click_logit, conversion_logit, imputation_logit, click, conversion, weight, floor, factor_c, factor_g):
    """Losses of ESCM2 (Wang et al., 2022): inverse propensity without, doubly robust with an imputation logit.

    Returns `(losses, factors, elements)`, dicts over `ctr`, `cvr_click` (R) and `ctcvr`: means over the impressions of
    positive weight (clicked or not), the factors 1, `factor_c`, `factor_g` and the losses per row. The training loss is
    the sum of factor times loss. The propensity is the click probability, at least `floor`; the imputed error is
    softplus of its logit. The conversion label of a row without click is not read.
    """
    a, b = _flat(click_logit), _flat(conversion_logit)
    click, conversion = _flat(click), _flat(conversion)
    rows = len(a)
    weight = _weight(weight, rows)
    elements = {"ctr": np.zeros(rows), "cvr_click": np.zeros(rows), "ctcvr": np.zeros(rows)}
    for i in range(rows):
        elements["ctr"][i] = cross_entropy(click[i], sigmoid(a[i]), sigmoid(-a[i]))

        both = click[i] * conversion[i] if click[i] != 0 else 0.0
        elements["ctcvr"][i] = cross_entropy(both, *chain_probabilities([a[i], b[i]]))

        propensity = max(sigmoid(a[i]), floor)
        error = cross_entropy(conversion[i], sigmoid(b[i]), sigmoid(-b[i])) if click[i] != 0 else 0.0
        inverse = click[i] / propensity
        if imputation_logit is None:
            elements["cvr_click"][i] = inverse * error
        else:
            imputed = np.log(1.0 + np.exp(_flat(imputation_logit)[i]))
            corrected = imputed + inverse * (error - imputed)
            elements["cvr_click"][i] = corrected + inverse * (error - imputed) ** 2
    losses = {name: weighted_mean(values, weight) for name, values in elements.items()}
    factors = {"ctr": 1.0, "cvr_click": factor_c, "ctcvr": factor_g}
    return losses, factors, elements


def escm2_ips(click_logit, conversion_logit, click, conversion, weight=None, floor=0.01, factor_c=0.1, factor_g=1.0):
    """Inverse propensity losses of ESCM2, see `escm2`."""
    return escm2(click_logit, conversion_logit, None, click, conversion, weight, floor, factor_c, factor_g)


def escm2_dr(
    click_logit,
    conversion_logit,
    imputation_logit,
    click,
    conversion,
    weight=None,
    floor=0.01,
    factor_c=0.1,
    factor_g=1.0,
):
    """Doubly robust losses of ESCM2 with the squared error of the imputation added, see `escm2`."""
    return escm2(click_logit, conversion_logit, imputation_logit, click, conversion, weight, floor, factor_c, factor_g)


def logit_residual(logits, order):
    """Logits summed along `order` (Fu et al., 2024): step j becomes the sum of the given logits of steps 1 to j.

    `logits`: dict task -> array; tasks outside `order` pass unchanged.
    """
    result = {task: np.array(value, dtype=np.float64) for task, value in logits.items()}
    for last, task in enumerate(order):
        total = np.zeros_like(result[task])
        for name in order[: last + 1]:
            total = total + np.asarray(logits[name], dtype=np.float64)
        result[task] = total
    return result
