"""Plain NumPy float64 references of the multi-domain strategies, one row, task, domain and expert at a time.

A linear layer is `(kernel [in, out], bias [out])`, an MLP a list of such layers with a ReLU after every one of them,
a gate a kernel `[in, n]` without bias. `domain` is int `[B]`; per-domain parameters are lists indexed by domain id.
"""

import numpy as np

EPSILON = 1e-5


def relu(v):
    return np.maximum(v, 0.0)


def leaky_relu(v, slope):
    return np.where(v > 0.0, v, slope * v)


def sigmoid(v):
    return 1.0 / (1.0 + np.exp(-v))


def softmax(v):
    shifted = np.exp(v - np.max(v))
    return shifted / np.sum(shifted)


def linear(v, layer):
    kernel, bias = layer
    return v @ kernel + bias


def mlp(v, layers):
    """One row through the layers, each followed by a ReLU, the last one included."""
    for layer in layers:
        v = relu(linear(v, layer))
    return v


def layer_norm(v, gain, bias, epsilon):
    """One row brought to mean 0 and (biased) variance 1, then scaled and shifted."""
    mean = np.sum(v) / len(v)
    variance = np.sum((v - mean) ** 2) / len(v)
    return gain * (v - mean) / np.sqrt(variance + epsilon) + bias


def gate_nu(v, gate, gamma=2.0):
    """GateNU of one row; `gate` is `{"hidden": (kernel, bias), "output": (kernel, bias)}`."""
    return gamma * sigmoid(linear(relu(linear(v, gate["hidden"])), gate["output"]))


def same_for_all(tasks, rows):
    """The same representation for every task."""
    return {task: np.array(rows, dtype=np.float64) for task in tasks}


def _partitioned_row(params, v, m, mean, variance, epsilon):
    gain = params["gain"] * params["domain_gain"][m]
    bias = params["bias"] + params["domain_bias"][m]
    return gain * (v - mean) / np.sqrt(variance + epsilon) + bias


def partitioned_norm_evaluate(params, moments, x, domain, epsilon=EPSILON):
    """Partitioned normalisation with stored moments (Sheng et al., 2021); returns `[B, D]`.

    `params`: `gain [D]`, `bias [D]`, `domain_gain` and `domain_bias` lists of `[D]`.
    `moments`: `mean` and `variance`, lists of `[D]`.
    """
    rows = []
    for i in range(len(x)):
        m = int(domain[i])
        rows.append(_partitioned_row(params, x[i], m, moments["mean"][m], moments["variance"][m], epsilon))
    return np.array(rows)


def partitioned_norm_train(params, moments, x, domain, weight=None, momentum=0.99, epsilon=EPSILON):
    """Partitioned normalisation of a training batch; returns `(y [B, D], new moments)`.

    `params` and `moments` as in `partitioned_norm_evaluate`. The moments of a domain are the weighted mean and the
    weighted biased variance of its rows; rows of weight 0 are normalised but do not count. The stored moments move to
    `momentum * old + (1 - momentum) * batch`. A domain with fewer than two rows of positive weight uses and keeps its
    stored moments.
    """
    if weight is None:
        weight = np.ones(len(x))
    used_mean, used_variance, new_mean, new_variance = [], [], [], []
    for m in range(len(params["domain_gain"])):
        old_mean, old_variance = moments["mean"][m], moments["variance"][m]
        members = [i for i in range(len(x)) if int(domain[i]) == m and weight[i] > 0]
        if len(members) < 2:
            used_mean.append(old_mean)
            used_variance.append(old_variance)
            new_mean.append(old_mean)
            new_variance.append(old_variance)
            continue
        total = 0.0
        mean = np.zeros_like(x[0])
        for i in members:
            total += weight[i]
            mean = mean + weight[i] * x[i]
        mean = mean / total
        variance = np.zeros_like(x[0])
        for i in members:
            variance = variance + weight[i] * (x[i] - mean) ** 2
        variance = variance / total
        used_mean.append(mean)
        used_variance.append(variance)
        new_mean.append(momentum * old_mean + (1.0 - momentum) * mean)
        new_variance.append(momentum * old_variance + (1.0 - momentum) * variance)
    y = partitioned_norm_evaluate(params, {"mean": used_mean, "variance": used_variance}, x, domain, epsilon)
    return y, {"mean": new_mean, "variance": new_variance}


def star_layers(layers, v, m):
    """One row through star layers with the partition `m`, a ReLU after every layer.

    `layers`: list of dicts with `kernel [in, out]`, `bias [out]`, `domain_kernel` and `domain_bias` (lists).
    """
    for layer in layers:
        kernel = layer["kernel"] * layer["domain_kernel"][m]
        bias = layer["bias"] + layer["domain_bias"][m]
        v = relu(v @ kernel + bias)
    return v


def star(params, moments, x, domain, tasks, epsilon=EPSILON):
    """STAR in evaluation (Sheng et al., 2021): z = [star network; auxiliary network].

    `params`: `norm` (see `partitioned_norm_evaluate`), `layers` (see `star_layers`), `domain_embedding` (list of
    `[d]`), `auxiliary` (MLP on `[x; e]`). `moments`: those of the norm. The auxiliary network reads x before the norm
    and its last layer is activated as in every MLP.
    """
    normed = partitioned_norm_evaluate(params["norm"], moments, x, domain, epsilon)
    rows = []
    for i in range(len(x)):
        m = int(domain[i])
        main = star_layers(params["layers"], normed[i], m)
        auxiliary = mlp(np.concatenate([x[i], params["domain_embedding"][m]]), params["auxiliary"])
        rows.append(np.concatenate([main, auxiliary]))
    return same_for_all(tasks, rows)


def sar_net(params, x, domain, tasks, epsilon=EPSILON):
    """SAR-Net on tabular inputs in evaluation (Shen et al., 2021).

    `params`: `scale` and `shift` (lists of `[D]`), `shared` (list of experts), `specific` (per domain a list of
    experts), `gates` (per domain a kernel `[D, m_s + m_d]`), `mlp` (MLP). An expert is a dict with `norm` (dict of
    `gain`, `bias`, `mean`, `variance`, all `[D]`, the stored moments; experts may hold the same dict), `kernel` and
    `bias`. Experts are linear, without activation; the gate weighs the shared experts first and reads u without norm.
    """

    def expert_output(expert, v):
        norm = expert["norm"]
        normed = norm["gain"] * (v - norm["mean"]) / np.sqrt(norm["variance"] + epsilon) + norm["bias"]
        return normed @ expert["kernel"] + expert["bias"]

    rows = []
    for i in range(len(x)):
        m = int(domain[i])
        u = x[i] * params["scale"][m] + params["shift"][m]
        outputs = []
        for expert in params["shared"]:
            outputs.append(expert_output(expert, u))
        for expert in params["specific"][m]:
            outputs.append(expert_output(expert, u))
        weights = softmax(u @ params["gates"][m])
        mixture = np.zeros_like(outputs[0])
        for share, output in zip(weights, outputs, strict=True):
            mixture = mixture + share * output
        rows.append(mlp(mixture, params["mlp"]))
    return same_for_all(tasks, rows)


def meta_unit(v, s, generator, width):
    """One row of v W(s) + b(s), the kernel written row by row from the generated vector.

    `generator`: `kernel [ds, in * width]`, `kernel_bias [in * width]`, `bias [ds, width]`, `bias_bias [width]`.
    """
    flat = s @ generator["kernel"] + generator["kernel_bias"]
    result = s @ generator["bias"] + generator["bias_bias"]
    for row in range(len(v)):
        for column in range(width):
            result[column] += v[row] * flat[row * width + column]
    return result


def m2m(params, x, domain, tasks, slope=0.1):
    """M2M without its sequence encoder (Zhang et al., 2022).

    `params`: `domain_embedding` (list of `[d]`), `scenario_mlp` (MLP), `task_embedding` (dict task -> vector),
    `task_mlp` (MLP to H), `experts` (list of MLPs to H), `attention` and `tower` (generators of `meta_unit`, 2H to 2H
    and H to H), `nu [2H]`. MLPs keep their ReLU, the leaky one is used where the equations name it.
    """
    result = {}
    for task in tasks:
        t = mlp(params["task_embedding"][task], params["task_mlp"])
        rows = []
        for i in range(len(x)):
            s = mlp(params["domain_embedding"][int(domain[i])], params["scenario_mlp"])
            outputs, scores = [], []
            for expert in params["experts"]:
                output = mlp(x[i], expert)
                pair = np.concatenate([output, t])
                hidden = leaky_relu(meta_unit(pair, s, params["attention"], len(pair)), slope)
                outputs.append(output)
                scores.append(np.sum(params["nu"] * hidden))
            shares = softmax(np.array(scores))
            mixture = np.zeros_like(outputs[0])
            for share, output in zip(shares, outputs, strict=True):
                mixture = mixture + share * output
            rows.append(leaky_relu(meta_unit(mixture, s, params["tower"], len(mixture)) + mixture, slope))
        result[task] = np.array(rows)
    return result


def adasparse(params, x, domain, tasks, alpha, mode="fusion", beta=2.0, threshold=0.01):
    """AdaSparse (Yang et al., 2022) with `mode` `fusion`, `scaling` or `binarisation`.

    `params`: `domain_embedding` (list of `[d]`), `layers` (MLP of L layers), `pruners` (list of L + 1 kernels
    `[d + width, width]`: one on x, then one on every layer's activated output). `alpha` is the current slope, the same
    for all pruners; scaling does not use it.
    """

    def factors(e, h, kernel):
        scores = np.concatenate([e, h]) @ kernel
        result = np.zeros_like(h)
        for unit in range(len(h)):
            if mode == "fusion":
                value = beta * sigmoid(alpha * scores[unit])
                result[unit] = value if value >= threshold else 0.0
            elif mode == "scaling":
                result[unit] = beta * sigmoid(scores[unit])
            elif mode == "binarisation":
                result[unit] = 1.0 if sigmoid(alpha * scores[unit]) >= threshold else 0.0
            else:
                raise ValueError(f"unknown mode {mode!r}")
        return result

    rows = []
    for i in range(len(x)):
        e = params["domain_embedding"][int(domain[i])]
        h = x[i] * factors(e, x[i], params["pruners"][0])
        for layer, kernel in zip(params["layers"], params["pruners"][1:], strict=True):
            h = relu(linear(h, layer))
            h = h * factors(e, h, kernel)
        rows.append(h)
    return same_for_all(tasks, rows)


def hamur(params, moments, x, domain, tasks, epsilon=EPSILON):
    """HAMUR in evaluation (Li et al., 2023), the adapter's kernels written out.

    `params`: `trunk` (per domain an MLP), `hyper` (`{"hidden": MLP, "output": (kernel [., k * k], bias)}`, the output
    layer linear and read row by row), `adapters` (dict layer index -> dict of `u1 [m, k]`, `v1 [k, n]`, `b1 [n]`,
    `u2 [n, k]`, `v2 [k, m]`, `b2 [m]` and `norm`, see `partitioned_norm_evaluate`). `moments`: dict layer index ->
    moments of that adapter's norm. An adapter acts on the activated output of its layer; nothing follows its sum.
    """
    rows = []
    for i in range(len(x)):
        m = int(domain[i])
        flat = linear(mlp(x[i], params["hyper"]["hidden"]), params["hyper"]["output"])
        k = round(len(flat) ** 0.5)
        instance = np.zeros((k, k))
        for row in range(k):
            for column in range(k):
                instance[row, column] = flat[row * k + column]
        h = x[i]
        for index, layer in enumerate(params["trunk"][m]):
            h = relu(linear(h, layer))
            if index in params["adapters"]:
                adapter = params["adapters"][index]
                down = adapter["u1"] @ instance @ adapter["v1"]
                up = adapter["u2"] @ instance @ adapter["v2"]
                o = sigmoid(h @ down + adapter["b1"]) @ up + adapter["b2"]
                mean, variance = moments[index]["mean"][m], moments[index]["variance"][m]
                h = _partitioned_row(adapter["norm"], o, m, mean, variance, epsilon) + h
        rows.append(h)
    return same_for_all(tasks, rows)


def epnet(params, x, domain, gamma=2.0):
    """The embedding gate of PEPNet (Chang et al., 2023); returns x' `[B, D]`.

    `params`: `domain_embedding` (list of `[d]`), `gate` (see `gate_nu`; it reads `[e; x]`, hidden width D).
    """
    rows = []
    for i in range(len(x)):
        e = params["domain_embedding"][int(domain[i])]
        rows.append(x[i] * gate_nu(np.concatenate([e, x[i]]), params["gate"], gamma))
    return np.array(rows)


def ppnet(params, x, prior, tasks, gamma=2.0):
    """The parameter gates of PEPNet (Chang et al., 2023).

    `params`: dict task -> `{"layers": MLP, "gates": list of gates}`, one gate (see `gate_nu`; it reads `[prior; x]`)
    per layer, multiplied after the ReLU. `prior [B, Dp]`.
    """
    result = {}
    for task in tasks:
        rows = []
        for i in range(len(x)):
            known = np.concatenate([prior[i], x[i]])
            h = x[i]
            for layer, gate in zip(params[task]["layers"], params[task]["gates"], strict=True):
                h = relu(linear(h, layer)) * gate_nu(known, gate, gamma)
            rows.append(h)
        result[task] = np.array(rows)
    return result


def pepnet(params, x, domain, prior, tasks, gamma=2.0):
    """PEPNet (Chang et al., 2023): `params` is `{"epnet": ..., "ppnet": ...}`; ppnet and its gates read x'."""
    gated = epnet(params["epnet"], x, domain, gamma)
    return ppnet(params["ppnet"], gated, prior, tasks, gamma)


def adapt_dhm_route(centres, x, weight=None, beta=0.9, repeats=3):
    """Routing of one training batch of AdaptDHM (Li et al., 2022); returns `(cluster int [B], new centres [C, D])`.

    `centres [C, D]` has unit rows. Each repeat computes the memberships from the current centres and then moves the
    centres by the sum (not the mean) of the rows; rows of weight 0 do not move them. The cluster is the argmax of the
    last memberships computed, hence of those before the last move.
    """
    if weight is None:
        weight = np.ones(len(x))
    centres = np.array(centres, dtype=np.float64)
    memberships = []
    for _ in range(repeats):
        memberships = []
        for i in range(len(x)):
            scores = [np.sum(x[i] * centres[c]) for c in range(len(centres))]
            memberships.append(softmax(np.array(scores)))
        moved = []
        for c in range(len(centres)):
            pull = np.zeros(x.shape[1])
            for i in range(len(x)):
                pull = pull + weight[i] * memberships[i][c] * x[i]
            target = beta * centres[c] + (1.0 - beta) * pull
            moved.append(target / np.sqrt(np.sum(target**2)))
        centres = np.array(moved)
    return np.array([int(np.argmax(row)) for row in memberships]), centres


def adapt_dhm_assign(centres, x):
    """Clusters of rows under stored centres, int `[B]`; the centres stay as they are."""
    clusters = []
    for i in range(len(x)):
        scores = [np.sum(x[i] * centres[c]) for c in range(len(centres))]
        clusters.append(int(np.argmax(softmax(np.array(scores)))))
    return np.array(clusters)


def adapt_dhm_layers(layers, x, cluster, tasks):
    """The layers of AdaptDHM (see `star_layers`, partitions are clusters) for given clusters; no norm, no extras."""
    rows = []
    for i in range(len(x)):
        rows.append(star_layers(layers, x[i], int(cluster[i])))
    return same_for_all(tasks, rows)


def adapt_dhm(params, centres, x, tasks):
    """AdaptDHM in evaluation (Li et al., 2022): `params` is `{"layers": ...}` (see `star_layers`)."""
    return adapt_dhm_layers(params["layers"], x, adapt_dhm_assign(centres, x), tasks)


def adapt_dhm_train(params, centres, x, tasks, weight=None, beta=0.9, repeats=3):
    """AdaptDHM on a training batch (Li et al., 2022); returns `(dict task -> [B, H], new centres)`."""
    cluster, moved = adapt_dhm_route(centres, x, weight, beta, repeats)
    return adapt_dhm_layers(params["layers"], x, cluster, tasks), moved


def m3oe(params, x, domain, tasks, epsilon=EPSILON):
    """M3oE (Zhang et al., 2024).

    `params`: `star` (one layer of `star_layers`, here without activation), `psi` and `psi_x` (dicts of `kernel`,
    `bias`, `gain`, `norm_bias`: linear, layer norm, ReLU; on the star output and on x), `shared` (list of E MLPs),
    `domain_experts` (list of M MLPs), `task_experts` (dict task -> MLP), `gates` (dict task -> per domain a kernel
    `[., E]`), `a_d`, `a_t`, `b_d`, `b_t` (floats before the sigmoid, the same for all tasks and domains). With one
    domain or one task the sum over the others is left out and b still multiplies the own expert.
    """

    def psi(v, block):
        return relu(layer_norm(v @ block["kernel"] + block["bias"], block["gain"], block["norm_bias"], epsilon))

    a_d, a_t = sigmoid(params["a_d"]), sigmoid(params["a_t"])
    b_d, b_t = sigmoid(params["b_d"]), sigmoid(params["b_t"])
    count = len(params["domain_experts"])
    result = {}
    for task in tasks:
        rows = []
        for i in range(len(x)):
            m = int(domain[i])
            layer = params["star"]
            kernel = layer["kernel"] * layer["domain_kernel"][m]
            y = x[i] @ kernel + layer["bias"] + layer["domain_bias"][m]
            u = psi(y, params["psi"]) + psi(x[i], params["psi_x"])

            shares = softmax(u @ params["gates"][task][m])
            z = 0.0
            for share, expert in zip(shares, params["shared"], strict=True):
                z = z + share * mlp(u, expert)

            by_domain = b_d * mlp(u, params["domain_experts"][m])
            for other in range(count):
                if other != m:
                    by_domain = by_domain + (1.0 - b_d) / (count - 1) * mlp(u, params["domain_experts"][other])

            by_task = b_t * mlp(u, params["task_experts"][task])
            for other in tasks:
                if other != task:
                    by_task = by_task + (1.0 - b_t) / (len(tasks) - 1) * mlp(u, params["task_experts"][other])

            rows.append(z + a_d * by_domain + a_t * by_task)
        result[task] = np.array(rows)
    return result
