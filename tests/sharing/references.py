"""Float64 references of the multi-task sharing strategies, written from the equations with plain loops.

Row vectors throughout: a linear map is ``x @ kernel + bias``. These shapes of parameters recur below:

- a layer is ``(kernel [in, out], bias [out])``; the bias may be None,
- an MLP is a list of layers, each followed by ReLU, the last one included; the empty list is the identity,
- a bank of experts is a list of MLPs of equal output width,
- a gate is a kernel ``[in, n]``, or a dict with ``kernel`` and any of ``hidden`` (an MLP before it), ``bias [n]`` and
  ``temperature``; its weights are a softmax over n,
- a norm is None, ``(scale, offset)`` for layer norm, or ``(scale, offset, mean, variance)`` for given moments.

Every function returns ``dict[task, [B, H]]`` unless its docstring says otherwise; regularisers return a float.
"""

import numpy as np

# Helpers. All but `collect` work on one row.


def relu(values):
    return np.maximum(values, 0.0)


def sigmoid(values):
    values = np.asarray(values, dtype=np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0.0, 1.0 / (1.0 + small), small / (1.0 + small))


def softmax(logits):
    shifted = np.exp(logits - np.max(logits))
    return shifted / np.sum(shifted)


def swish(values):
    return values * sigmoid(values)


def linear(row, layer):
    kernel, bias = layer
    return row @ kernel if bias is None else row @ kernel + bias


def mlp(row, layers, relu_last: bool = True):
    """ReLU after every layer; `relu_last=False` leaves the last layer linear."""
    for index, layer in enumerate(layers):
        row = linear(row, layer)
        if relu_last or index < len(layers) - 1:
            row = relu(row)
    return row


def gate(row, parameters):
    """Softmax weights [n] of a gate."""
    if not isinstance(parameters, dict):
        return softmax(row @ parameters)
    hidden = mlp(row, parameters.get("hidden", []))
    logits = linear(hidden, (parameters["kernel"], parameters.get("bias")))
    return softmax(logits / parameters.get("temperature", 1.0))


def bank(row, experts) -> list:
    """The output of each expert."""
    return [mlp(row, expert) for expert in experts]


def mix(weights, outputs):
    """The sum of the outputs, each times its weight; there are as many weights as outputs."""
    total = 0.0
    for weight, output in zip(weights, outputs, strict=True):
        total = total + weight * output
    return total


def normalise(row, norm, epsilon: float = 1e-5):
    """No norm, layer norm over the row (biased variance), or a norm with given moments."""
    if norm is None:
        return row
    if len(norm) == 2:
        scale, offset = norm
        mean = np.mean(row)
        variance = np.mean((row - mean) ** 2)
    else:
        scale, offset, mean, variance = norm
    return scale * (row - mean) / np.sqrt(variance + epsilon) + offset


def collect(rows: list, tasks) -> dict:
    """From one dict per row to one array per task."""
    return {task: np.stack([row[task] for row in rows]) for task in tasks}


# Networks without gates.


def single_task(x, tasks, networks) -> dict:
    """Separate networks (baseline).

    x: [B, D], or a dict task -> [B, D] when each task has its own tables. networks: dict task -> MLP.
    """
    outputs = {}
    for task in tasks:
        inputs = x[task] if isinstance(x, dict) else x
        outputs[task] = np.stack([mlp(row, networks[task]) for row in inputs])
    return outputs


def shared_bottom(x, tasks, bottom) -> dict:
    """One network for all tasks (Caruana 1997). bottom: MLP."""
    return collect([{task: mlp(row, bottom) for task in tasks} for row in x], tasks)


def soft_sharing(x, tasks, networks) -> dict:
    """Separate networks pulled together by a penalty (Duong et al. 2015; Ma et al. 2018).

    networks: dict task -> MLP.
    """
    return collect([{task: mlp(row, networks[task]) for task in tasks} for row in x], tasks)


def soft_sharing_regulariser(tasks, networks, alpha: float = 1e-3) -> float:
    """alpha times the squared distances of all unordered pairs of networks, kernels and biases alike.

    networks: dict task -> MLP, of equal shapes.
    """
    total = 0.0
    for second in range(len(tasks)):
        for first in range(second):
            for layer_a, layer_b in zip(networks[tasks[first]], networks[tasks[second]], strict=True):
                for array_a, array_b in zip(layer_a, layer_b, strict=True):
                    if array_a is not None:
                        total += float(np.sum((array_a - array_b) ** 2))
    return alpha * total


# Mixtures of experts.


def omoe(x, tasks, experts, shared_gate) -> dict:
    """Mixture of experts with one gate (Ma et al. 2018). experts: bank of E; shared_gate: gate [D, E]."""
    rows = []
    for row in x:
        mixture = mix(gate(row, shared_gate), bank(row, experts))
        rows.append({task: mixture for task in tasks})
    return collect(rows, tasks)


def mmoe(x, tasks, experts, gates) -> dict:
    """Mixture of experts with one gate a task (Ma et al. 2018).

    experts: bank of E; gates: dict task -> gate [D, E].
    """
    rows = []
    for row in x:
        outputs = bank(row, experts)
        rows.append({task: mix(gate(row, gates[task]), outputs) for task in tasks})
    return collect(rows, tasks)


def cgc(x, tasks, specific, shared, gates) -> dict:
    """Customised gate control (Tang et al. 2020).

    specific: dict task -> bank of m_k; shared: bank of m_s; gates: dict task -> gate [D, m_k + m_s].
    Gate columns: own experts, then shared experts.
    """
    rows = []
    for row in x:
        shared_outputs = bank(row, shared)
        result = {}
        for task in tasks:
            outputs = bank(row, specific[task]) + shared_outputs
            result[task] = mix(gate(row, gates[task]), outputs)
        rows.append(result)
    return collect(rows, tasks)


def ple(x, tasks, levels) -> dict:
    """Progressive layered extraction (Tang et al. 2020).

    levels: list of dicts with `specific` (dict task -> bank of m_k), `shared` (bank of m_s),
    `gates` (dict task -> gate [in, m_k + m_s]) and, in all but the last level,
    `shared_gate` (gate [in, sum of m_k + m_s]).
    Gate columns: own experts, then shared; in the shared gate the experts of all tasks in task order, then shared.
    The gate of a stream reads that stream.
    """
    rows = []
    for row in x:
        streams = {task: row for task in tasks}
        shared_stream = row
        for number, level in enumerate(levels):
            own = {task: bank(streams[task], level["specific"][task]) for task in tasks}
            shared = bank(shared_stream, level["shared"])
            new_streams = {}
            for task in tasks:
                new_streams[task] = mix(gate(streams[task], level["gates"][task]), own[task] + shared)
            if number < len(levels) - 1:
                everything = []
                for task in tasks:
                    everything += own[task]
                everything += shared
                shared_stream = mix(gate(shared_stream, level["shared_gate"]), everything)
            streams = new_streams
        rows.append(streams)
    return collect(rows, tasks)


# Networks of tasks that read each other layer by layer.


def cross_stitch(x, tasks, levels) -> dict:
    """Cross-stitch networks (Misra et al. 2016).

    levels: list of dicts with `layers` (dict task -> layer) and `stitch` (dict task -> [K] coefficients, or [K, H] for
    one coefficient a unit), entry j of a row belonging to the j-th task. The last layer is stitched too.
    """
    rows = []
    for row in x:
        streams = {task: row for task in tasks}
        for level in levels:
            hidden = [relu(linear(streams[task], level["layers"][task])) for task in tasks]
            streams = {task: mix(level["stitch"][task], hidden) for task in tasks}
        rows.append(streams)
    return collect(rows, tasks)


def sluice(x, tasks, levels, betas) -> dict:
    """Sluice networks (Ruder et al. 2019).

    levels: list of dicts with `layers` (dict task -> (layer, layer), the two subspaces, each of width H/2) and
    `mixing` (dict task -> [2, 2K], the rows of the two subspaces of that task). betas: dict task -> [L].
    Columns of the mixing: first and second subspace of the first task, then of the second task, and so on.
    """
    rows = []
    for row in x:
        streams = {task: row for task in tasks}
        result = {task: 0.0 for task in tasks}
        for number, level in enumerate(levels):
            subspaces = []
            for task in tasks:
                for layer in level["layers"][task]:
                    subspaces.append(relu(linear(streams[task], layer)))
            streams = {}
            for task in tasks:
                first = mix(level["mixing"][task][0], subspaces)
                second = mix(level["mixing"][task][1], subspaces)
                streams[task] = np.concatenate([first, second])
                result[task] = result[task] + betas[task][number] * streams[task]
        rows.append(result)
    return collect(rows, tasks)


def sluice_regulariser(tasks, levels, factor: float = 1e-3) -> float:
    """factor times the squared inner products of every column of one subspace's kernel with every one of the other's.

    levels: as for `sluice`. Biases do not enter.
    """
    total = 0.0
    for level in levels:
        for task in tasks:
            (first, _), (second, _) = level["layers"][task]
            for a in range(first.shape[1]):
                for b in range(second.shape[1]):
                    total += float(np.sum(first[:, a] * second[:, b])) ** 2
    return factor * total


def mtan_mask(row, mask, epsilon: float = 1e-5):
    """The attention mask of one task and level for one row.

    mask: dict with `hidden` (layer), `hidden_norm` (norm), `output` (layer), `output_norm` (norm).
    """
    hidden = relu(normalise(linear(row, mask["hidden"]), mask["hidden_norm"], epsilon))
    return sigmoid(normalise(linear(hidden, mask["output"]), mask["output_norm"], epsilon))


def mtan(x, tasks, levels, epsilon: float = 1e-5) -> dict:
    """Multi-task attention network, dense form (Liu, Johns, Davison 2019).

    levels: list of dicts with `inner` (layer from p of the level below to u), `outer` (layer from u to p),
    `masks` (dict task -> mask, see `mtan_mask`) and, in all but the first level, `bridge` (layer, followed by ReLU,
    that carries the attended features of the level below; one for all tasks).
    A mask reads u, then the bridged features.
    """
    rows = []
    for row in x:
        p = row
        attended = {}
        for number, level in enumerate(levels):
            u = relu(linear(p, level["inner"]))
            p = relu(linear(u, level["outer"]))
            new_attended = {}
            for task in tasks:
                view = u
                if number > 0:
                    view = np.concatenate([u, relu(linear(attended[task], level["bridge"]))])
                new_attended[task] = mtan_mask(view, level["masks"][task], epsilon) * p
            attended = new_attended
        rows.append(attended)
    return collect(rows, tasks)


# Routed networks.


def ltb_routed(x, tasks, levels, routes, task_routes) -> dict:
    """Learning to branch with given routes (Guo, Lee, Ulbricht 2020).

    levels: list of banks, the nodes of each level. routes: list of [N, N_below], row i holding the weights of the
    parents of node i, [N, 1] (or None, meaning ones) for the first level, whose only parent is x.
    task_routes: dict task -> [N]. Rows may be one-hot or any other weights.
    """
    rows = []
    for row in x:
        values = [row]
        for nodes, route in zip(levels, routes, strict=True):
            new_values = []
            for index, node in enumerate(nodes):
                weights = np.ones(1) if route is None else route[index]
                new_values.append(mlp(mix(weights, values), node))
            values = new_values
        rows.append({task: mix(task_routes[task], values) for task in tasks})
    return collect(rows, tasks)


def ltb(x, tasks, levels, logits, task_logits) -> dict:
    """Learning to branch in evaluation: every node and task reads its most likely parent, the first of equal ones.

    levels: as for `ltb_routed`; logits: list of [N, N_below] or None; task_logits: dict task -> [N].
    """

    def one_hot(row):
        result = np.zeros(len(row))
        result[int(np.argmax(row))] = 1.0
        return result

    routes = []
    for level_logits in logits:
        routes.append(None if level_logits is None else [one_hot(row) for row in level_logits])
    return ltb_routed(x, tasks, levels, routes, {task: one_hot(task_logits[task]) for task in tasks})


def smooth_step(value: float, gamma: float = 1.0) -> float:
    """0 up to -gamma/2, 1 from gamma/2 on, a cubic between (Hazimeh et al. 2021)."""
    if value <= -gamma / 2:
        return 0.0
    if value >= gamma / 2:
        return 1.0
    return -2.0 * value**3 / gamma**3 + 3.0 * value / (2.0 * gamma) + 0.5


def dselect_k_codes(row, task_gate, num_experts: int, gamma: float, per_example: bool, high_bit_first: bool) -> list:
    """The s single-expert selectors r, each [E], of one task for one row."""
    num_selected, num_bits = task_gate["code_bias"].shape
    selectors = []
    for i in range(num_selected):
        logits = task_gate["code_bias"][i]
        if per_example:
            logits = row @ task_gate["code"][i] + logits
        activations = [smooth_step(float(logit), gamma) for logit in logits]
        selector = np.ones(num_experts)
        for expert in range(num_experts):
            for position, activation in enumerate(activations):
                shift = num_bits - 1 - position if high_bit_first else position
                is_set = (expert >> shift) & 1
                selector[expert] *= activation if is_set else 1.0 - activation
        selectors.append(selector)
    return selectors


def dselect_k(
    x, tasks, experts, gates, gamma: float = 1.0, per_example: bool = True, high_bit_first: bool = False
) -> dict:
    """Differentiable selection of s experts (Hazimeh et al. 2021).

    experts: bank of E; gates: dict task -> dict with `selector` [D, s], `selector_bias` [s], `code` [s, D, b],
    `code_bias` [s, b]. With per_example=False the biases are the static logits and the other two are not read.
    Code bit t of expert e is (e >> t) & 1; high_bit_first reverses the bits. Codes from E on are dropped.
    """
    rows = []
    for row in x:
        outputs = bank(row, experts)
        result = {}
        for task in tasks:
            task_gate = gates[task]
            logits = task_gate["selector_bias"]
            if per_example:
                logits = row @ task_gate["selector"] + logits
            selectors = dselect_k_codes(row, task_gate, len(experts), gamma, per_example, high_bit_first)
            result[task] = mix(mix(softmax(logits), selectors), outputs)
        rows.append(result)
    return collect(rows, tasks)


def dselect_k_regulariser(
    x,
    tasks,
    num_experts: int,
    gates,
    entropy_factor: float = 1e-6,
    gamma: float = 1.0,
    per_example: bool = True,
    high_bit_first: bool = False,
) -> float:
    """Sum over tasks of means over rows and selectors (Hazimeh et al. 2021); gates as for `dselect_k`.

    entropy_factor times the entropy of the selector over the E experts as it is (not rescaled to sum 1), plus, without
    that factor and only if E is no power of two, one over its sum.
    """
    power_of_two = (num_experts & (num_experts - 1)) == 0
    total = 0.0
    for task in tasks:
        terms = []
        for row in x:
            for selector in dselect_k_codes(row, gates[task], num_experts, gamma, per_example, high_bit_first):
                entropy = 0.0
                for probability in selector:
                    if probability > 0.0:
                        entropy -= float(probability) * float(np.log(probability))
                term = entropy_factor * entropy
                if not power_of_two:
                    term += 1.0 / float(np.sum(selector))
                terms.append(term)
        total += float(np.mean(terms))
    return total


def snr_gate(log_alpha, beta: float = 0.9, gamma: float = -0.1, zeta: float = 1.1, uniform=None):
    """Hard concrete gates (Ma et al. 2019): deterministic, or for given draws `uniform` of the shape of log_alpha."""
    log_alpha = np.asarray(log_alpha, dtype=np.float64)
    if uniform is None:
        opening = sigmoid(log_alpha)
    else:
        opening = sigmoid((np.log(uniform) - np.log(1.0 - uniform) + log_alpha) / beta)
    return np.minimum(1.0, np.maximum(0.0, opening * (zeta - gamma) + gamma))


def _snr(x, tasks, levels, last, gates, transform: bool, gamma: float, zeta: float) -> dict:
    if gates is None:
        level_gates = []
        for level in levels:
            has_gates = level.get("log_alpha") is not None
            level_gates.append(snr_gate(level["log_alpha"], gamma=gamma, zeta=zeta) if has_gates else None)
        last_gates = {task: snr_gate(last["log_alpha"][task], gamma=gamma, zeta=zeta) for task in tasks}
    else:
        level_gates, last_gates = gates

    def node_input(values, weights, maps):
        total = 0.0
        for j, value in enumerate(values):
            carried = value @ maps[j] if transform else value
            total = total + weights[j] * carried
        return total

    rows = []
    for row in x:
        values = [row]
        for level, level_gate in zip(levels, level_gates, strict=True):
            new_values = []
            for i, node in enumerate(level["nodes"]):
                inputs = row
                if level_gate is not None:
                    inputs = node_input(values, level_gate[i], level["maps"][i] if transform else None)
                new_values.append(mlp(inputs, node))
            values = new_values
        result = {}
        for task in tasks:
            inputs = node_input(values, last_gates[task], last["maps"][task] if transform else None)
            result[task] = mlp(inputs, last["nodes"][task])
        rows.append(result)
    return collect(rows, tasks)


def snr_trans(x, tasks, levels, last, gates=None, gamma: float = -0.1, zeta: float = 1.1) -> dict:
    """Sub-network routing with a matrix a connection (Ma et al. 2019).

    levels: list of dicts with `nodes` (bank of n), `log_alpha` [n, n_below] and `maps` (maps[i][j]: kernel from node j
    below to node i); in the first level these two are None or absent, its nodes reading x directly.
    last: dict with `nodes` (dict task -> MLP), `log_alpha` (dict task -> [n_below]) and `maps` (dict task -> list of
    kernels).
    gates: None for the deterministic gates of evaluation, or (list of [n, n_below], None where a level has no gates;
    dict task -> [n_below]).
    """
    return _snr(x, tasks, levels, last, gates, True, gamma, zeta)


def snr_aver(x, tasks, levels, last, gates=None, gamma: float = -0.1, zeta: float = 1.1) -> dict:
    """Sub-network routing without matrices (Ma et al. 2019): parameters as for `snr_trans` without `maps`.

    A node reads the gated sum of the nodes below, not divided by their number.
    """
    return _snr(x, tasks, levels, last, gates, False, gamma, zeta)


def snr_regulariser(
    tasks, levels, last, factor: float = 1e-4, beta: float = 0.9, gamma: float = -0.1, zeta: float = 1.1
) -> float:
    """factor times the sum over all connections of the probability of an open gate; parameters as for `snr_trans`."""
    connections = []
    for level in levels:
        if level.get("log_alpha") is not None:
            for row in level["log_alpha"]:
                connections += list(row)
    for task in tasks:
        connections += list(last["log_alpha"][task])
    total = 0.0
    for log_alpha in connections:
        total += float(sigmoid(log_alpha - beta * np.log(-gamma / zeta)))
    return factor * total


# Fusion of the experts of all tasks.


def adatt(x, tasks, levels, native_residual: bool = True) -> dict:
    """Adaptive task-to-task fusion with shared experts (Li et al. 2023).

    levels: list of dicts with `experts` (dict task -> bank of m_k), `shared` (bank of m_s, may be absent),
    `gates` (dict task -> gate [in, n], n the number of all experts), `residual` (dict task -> [m_k], absent for ones)
    and, in all but the last level, `shared_gate` (gate [in, n]) and `shared_residual` ([m_s], absent for ones).
    Gate columns: the experts of all tasks in task order, then shared. Without shared experts there is no shared stream.
    """

    def fuse(stream, fusion_gate, everything, own, residual):
        fused = mix(gate(stream, fusion_gate), everything)
        if native_residual:
            weights = np.ones(len(own)) if residual is None else residual
            fused = fused + mix(weights, own)
        return fused

    rows = []
    for row in x:
        streams = {task: row for task in tasks}
        shared_stream = row
        for number, level in enumerate(levels):
            own = {task: bank(streams[task], level["experts"][task]) for task in tasks}
            shared = bank(shared_stream, level.get("shared", []))
            everything = []
            for task in tasks:
                everything += own[task]
            everything += shared
            residuals = level.get("residual") or {}
            new_streams = {}
            for task in tasks:
                residual = residuals.get(task)
                new_streams[task] = fuse(streams[task], level["gates"][task], everything, own[task], residual)
            if shared and number < len(levels) - 1:
                residual = level.get("shared_residual")
                shared_stream = fuse(shared_stream, level["shared_gate"], everything, shared, residual)
            streams = new_streams
        rows.append(streams)
    return collect(rows, tasks)


def adatt_sp(x, tasks, levels, native_residual: bool = True) -> dict:
    """Adaptive task-to-task fusion without shared experts (Li et al. 2023).

    levels: list of dicts with `experts` (dict task -> bank of m_k), `gates` (dict task -> gate [in, sum of m_k]) and
    `residual` (dict task -> [m_k], absent for ones). Gate columns: the experts of all tasks in task order.
    """
    rows = []
    for row in x:
        streams = {task: row for task in tasks}
        for level in levels:
            outputs = {task: bank(streams[task], level["experts"][task]) for task in tasks}
            new_streams = {}
            for task in tasks:
                weights = gate(streams[task], level["gates"][task])
                total = 0.0
                column = 0
                for other in tasks:
                    for output in outputs[other]:
                        total = total + weights[column] * output
                        column += 1
                if native_residual:
                    for i, output in enumerate(outputs[task]):
                        residual = level["residual"][task][i] if level.get("residual") else 1.0
                        total = total + residual * output
                new_streams[task] = total
            streams = new_streams
        rows.append(streams)
    return collect(rows, tasks)


def stem(x, tasks, levels) -> dict:
    """Forward values of shared and task-specific embeddings (Su et al. 2024).

    x: [B, K + 1, D], the tables of the tasks in task order, then the shared one. levels: list of dicts with
    `specific` (dict task -> bank of m_k), `shared` (bank of m_s), `gates` (dict task -> gate [in, n], n the number of
    all experts) and, in all but the last level, `shared_gate` (gate [in, n]).
    Gate columns: the experts of all tasks in task order (the own ones in their place), then shared.
    """
    rows = []
    for row in x:
        streams = {task: row[index] for index, task in enumerate(tasks)}
        shared_stream = row[len(tasks)]
        for number, level in enumerate(levels):
            everything = []
            for task in tasks:
                everything += bank(streams[task], level["specific"][task])
            everything += bank(shared_stream, level["shared"])
            new_streams = {}
            for task in tasks:
                new_streams[task] = mix(gate(streams[task] + shared_stream, level["gates"][task]), everything)
            if number < len(levels) - 1:
                shared_stream = mix(gate(shared_stream, level["shared_gate"]), everything)
            streams = new_streams
        rows.append(streams)
    return collect(rows, tasks)


def home_feature_gate(row, parameters):
    """One factor in (0, 2) for each input (Wang et al. 2025).

    parameters: dict with `selector` [in, R], `down` (R kernels [in, r]) and `up` (R kernels [r, in]).
    """
    factors = []
    for down, up in zip(parameters["down"], parameters["up"], strict=True):
        factors.append(2.0 * sigmoid((row @ down) @ up))
    return mix(softmax(row @ parameters["selector"]), factors)


def home(x, tasks, categories, first, second, relu_last: bool = True, epsilon: float = 1e-5) -> dict:
    """Hierarchy of multi-gate experts in evaluation (Wang et al. 2025).

    categories: dict category -> list of its tasks; the order of the dict is that of the columns.
    An expert is a dict with `layers` (MLP) and `norm` (norm with given moments); swish follows the norm. relu_last: the
    last layer of the MLP has its ReLU before the norm (False: it is linear).
    A set is a dict with `feature_gate` (see `home_feature_gate`) and `experts` (list of experts); a gated set has also
    `gate` and `self_gate` (gates [in, n]; a self gate over one expert is a sigmoid of its only logit).
    first: dict with `shared` (gated set) and `categories` (dict category -> gated set).
    second: dict with `shared` (set), `categories` (dict category -> set), `tasks` (dict task -> gated set).
    Gate columns: shared, category, task experts; in the shared gate of the first level shared, then all categories.
    Gates read the input as it is, only experts read it through the feature gate.
    """

    def experts_of(row, expert_set):
        inputs = row * home_feature_gate(row, expert_set["feature_gate"])
        outputs = []
        for expert in expert_set["experts"]:
            hidden = mlp(inputs, expert["layers"], relu_last)
            outputs.append(swish(normalise(hidden, expert["norm"], epsilon)))
        return outputs

    def self_gate(row, parameters, outputs):
        if len(outputs) > 1:
            return mix(gate(row, parameters), outputs)
        if not isinstance(parameters, dict):
            parameters = {"kernel": parameters}
        hidden = mlp(row, parameters.get("hidden", []))
        logit = linear(hidden, (parameters["kernel"], parameters.get("bias")))
        return mix(sigmoid(logit / parameters.get("temperature", 1.0)), outputs)

    rows = []
    for row in x:
        shared = experts_of(row, first["shared"])
        by_category = {category: experts_of(row, first["categories"][category]) for category in categories}
        category_streams = {}
        for category in categories:
            gates = first["categories"][category]
            own = by_category[category]
            category_streams[category] = mix(gate(row, gates["gate"]), shared + own)
            category_streams[category] += self_gate(row, gates["self_gate"], own)
        everything = list(shared)
        for category in categories:
            everything += by_category[category]
        shared_stream = mix(gate(row, first["shared"]["gate"]), everything)
        shared_stream = shared_stream + self_gate(row, first["shared"]["self_gate"], shared)

        second_shared = experts_of(shared_stream, second["shared"])
        result = {}
        for category in categories:
            stream = category_streams[category]
            second_category = experts_of(stream, second["categories"][category])
            for task in categories[category]:
                gates = second["tasks"][task]
                own = experts_of(stream, gates)
                weights = gate(np.concatenate([stream, shared_stream]), gates["gate"])
                result[task] = mix(weights, second_shared + second_category + own)
                result[task] = result[task] + self_gate(stream, gates["self_gate"], own)
        rows.append(result)
    return collect(rows, tasks)


# Ordered tasks.


def aitm(x, tasks, networks, transfers, attention, order=None) -> dict:
    """Adaptive information transfer between steps, the network alone (Xi et al. 2021).

    networks: dict task -> MLP; transfers: dict task -> layer, for every task but the first, carrying the step before to
    it; attention: (value, query, key) kernels [H, H] without bias for all steps, or a dict task -> such a triple, for
    every task but the first; order: names in order of the steps, `tasks` by default. ReLU follows the transfer.
    """
    order = tasks if order is None else order
    rows = []
    for row in x:
        result = {}
        previous = None
        for task in order:
            own = mlp(row, networks[task])
            if previous is None:
                result[task] = own
            else:
                value, query, key = attention[task] if isinstance(attention, dict) else attention
                candidates = [own, relu(linear(previous, transfers[task]))]
                scores = []
                for candidate in candidates:
                    scores.append(float(np.sum((candidate @ query) * (candidate @ key))) / np.sqrt(len(own)))
                weights = softmax(np.array(scores))
                result[task] = mix(weights, [candidate @ value for candidate in candidates])
            previous = result[task]
        rows.append(result)
    return collect(rows, tasks)


def aitm_penalty(order, probabilities, alpha: float = 0.6, observed=None) -> float:
    """Calibrator of ordered steps (Xi et al. 2021).

    probabilities: dict task -> [B]; observed: None, or dict task -> [B] of booleans. For every pair of consecutive
    steps the mean over rows where both are observed (0 if there are none), summed over pairs, times alpha.
    """
    total = 0.0
    for before, after in zip(order[:-1], order[1:], strict=True):
        excesses = []
        for index in range(len(probabilities[after])):
            if observed is None or (observed[before][index] and observed[after][index]):
                excesses.append(max(float(probabilities[after][index] - probabilities[before][index]), 0.0))
        if excesses:
            total += sum(excesses) / len(excesses)
    return alpha * total


def dbmtl(x, tasks, parents, networks, relations, bottom=None, experts=None, gates=None) -> dict:
    """Deep Bayesian multi-target learning (Wang et al. 2019).

    parents: dict task -> names of its parents (absent: none); networks: dict task -> MLP; relations: dict task -> MLP,
    read only for tasks with parents; bottom: MLP on x or None; experts: bank on the output of the bottom or None, with
    gates: dict task -> gate. A relation reads its own task first, then the parents in the order of `tasks`.
    """
    rows = []
    for row in x:
        base = row if bottom is None else mlp(row, bottom)
        own = {}
        for task in tasks:
            inputs = base if experts is None else mix(gate(base, gates[task]), bank(base, experts))
            own[task] = mlp(inputs, networks[task])
        result = {}
        while len(result) < len(tasks):
            ready = []
            for task in tasks:
                if task not in result and all(parent in result for parent in parents.get(task, ())):
                    ready.append(task)
            if not ready:
                raise ValueError("the parents form a cycle or name an unknown task")
            for task in ready:
                pieces = [own[task]]
                for other in tasks:
                    if other in parents.get(task, ()):
                        pieces.append(result[other])
                result[task] = own[task] if len(pieces) == 1 else mlp(np.concatenate(pieces), relations[task])
        rows.append(result)
    return collect(rows, tasks)


def resflow(x, tasks, networks, order=None, features: bool = True, epsilon: float = 1e-5) -> dict:
    """Residual learner of ordered tasks in evaluation (Fu et al. 2024).

    networks: dict task -> list of dicts with `layer` (layer), `slope` (of PReLU on negative values, a scalar or [H])
    and `norm` (norm, given moments or None); widths equal over tasks. A layer is linear, PReLU, norm; the last one too.
    order: names in order, `tasks` by default. features=False leaves the residuals of the task before out.
    """
    order = tasks if order is None else order
    rows = []
    for row in x:
        before = None
        result = {}
        for task in order:
            hidden = row
            streams = []
            for number, layer in enumerate(networks[task]):
                hidden = linear(hidden, layer["layer"])
                hidden = np.where(hidden >= 0.0, hidden, layer["slope"] * hidden)
                hidden = normalise(hidden, layer["norm"], epsilon)
                if features and before is not None:
                    hidden = hidden + before[number]
                streams.append(hidden)
            before = streams
            result[task] = hidden
        rows.append(result)
    return collect(rows, tasks)


# Experts and critics.


def _metaheac_context(row, embedding, num_fields: int):
    width = len(row) // num_fields
    mean = np.zeros(width)
    for field in range(num_fields):
        mean = mean + row[field * width : (field + 1) * width] / num_fields
    return np.concatenate([embedding, mean])


def metaheac_mixture(x, tasks, embeddings, num_fields: int, experts, expert_gate) -> dict:
    """The mixture of experts of each task that the critics read (Zhu et al. 2021); parameters as for `metaheac`."""
    rows = []
    for row in x:
        outputs = bank(row, experts)
        result = {}
        for task in tasks:
            context = _metaheac_context(row, embeddings[task], num_fields)
            result[task] = mix(gate(context, expert_gate), outputs)
        rows.append(result)
    return collect(rows, tasks)


def metaheac(x, tasks, embeddings, num_fields: int, experts, expert_gate, critics, critic_gate) -> dict:
    """Logits [B, 1] of hybrid experts and critics (Zhu et al. 2021).

    x: [B, num_fields * width], field after field; embeddings: dict task -> [d]; experts: bank of E on x;
    critics: list of J dicts with `hidden` (MLP) and `output` (layer to one logit);
    expert_gate and critic_gate: gates [d + width, E] and [d + width, J] with bias, one of each for all tasks.
    The logit is that of the mean of the critics' probabilities, weighted by the gate.
    """
    mixtures = metaheac_mixture(x, tasks, embeddings, num_fields, experts, expert_gate)
    rows = []
    for index, row in enumerate(x):
        result = {}
        for task in tasks:
            weights = gate(_metaheac_context(row, embeddings[task], num_fields), critic_gate)
            positive = 0.0
            negative = 0.0
            for weight, critic in zip(weights, critics, strict=True):
                logit = linear(mlp(mixtures[task][index], critic["hidden"]), critic["output"])
                positive = positive + weight * sigmoid(logit)
                negative = negative + weight * sigmoid(-logit)
            result[task] = np.log(positive) - np.log(negative)
        rows.append(result)
    return collect(rows, tasks)
