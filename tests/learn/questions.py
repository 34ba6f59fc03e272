"""Questions of the notebooks: a right answer each, and wrong ones as students give them.

The wrong ones were written before the exercises' tables of mistakes were.
"""

RIGHT = {
    "logistic_bwd": """
def logistic_bwd(w, x):
    b = np.exp(-w * x)
    dc = 1 / (1 + b)
    da = dc * b
    return -x * da
""",
    "layernorm_bwd": """
def layernorm_bwd(dy, x, w, *, eps):
    centred = x - x.mean(-1, keepdims=True)
    sigma = np.sqrt((centred ** 2).mean(-1, keepdims=True) + eps)
    u = dy * w
    shift = u.mean(-1, keepdims=True)
    along = (u * centred).mean(-1, keepdims=True)
    return (u - shift) / sigma - centred * along / sigma ** 3
""",
    "blind_spot": """
def blind_spot(dy, p):
    dot = np.sum(dy * p)
    dz = p * (dy - dot)
    return np.sqrt(np.sum(dz ** 2))
""",
    "eps_outside_bwd": """
def eps_outside_bwd(dy, x, w, *, eps):
    root = np.sqrt((x ** 2).mean(-1, keepdims=True))
    n = root + eps
    u = dy * w
    along = (u * x).mean(-1, keepdims=True)
    return u / n - x * along / (n ** 2 * root)
""",
    "eps_noticed": """
def eps_noticed(rtol, eps):
    grown = (1 + rtol) ** 2 - 1
    return np.sqrt(eps / grown)
""",
    "stays_right": """
def stays_right(forgotten):
    down, up, gate, attention = ["down_proj"], ["up_proj"], ["gate_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = gate + up + down
    if forgotten == "the residual path of the MLP":
        return mlp
    if forgotten == "the residual path of attention":
        return mlp + attention
    if forgotten == "the slope of silu":
        return up + down
    if forgotten == "dq is not turned back":
        return mlp + ["k_proj", "v_proj", "o_proj"]
    if forgotten == "the row sum of softmax":
        return mlp + ["v_proj", "o_proj"]
    if forgotten == "dn of k_proj":
        return mlp + attention
    return mlp
""",
    "qkv_bias_bwd": """
def qkv_bias_bwd(dq, dk, dv, cos, sin):
    dq = ops.rope_bwd(dq, ops.RopeRes(), cos, sin)
    dk = ops.rope_bwd(dk, ops.RopeRes(), cos, sin)
    bq = dq.sum(axis=(0, 1)).reshape(-1)
    bk = dk.sum(axis=(0, 1)).reshape(-1)
    bv = dv.sum(axis=(0, 1)).reshape(-1)
    return bq, bk, bv
""",
    "rope_order": """
def rope_order(D):
    order = np.zeros(D, int)
    order[0::2] = np.arange(D // 2)
    order[1::2] = np.arange(D // 2) + D // 2
    return order
""",
    "rope_verdict": """
def rope_verdict(dx, dy, cos, sin):
    def near(a, b):
        return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    if near(dx, ops.rope_bwd(dy, ops.RopeRes(), cos, sin)):
        return 0
    if near(dx, dy):
        return 1
    if near(dx, ops.rope(dy, cos, sin)[0]):
        return 2
    return 3
""",
    "averaged_heads": """
def averaged_heads(H, G):
    right = 1.0
    wrong = G / H
    return {"q_proj": right, "k_proj": wrong, "v_proj": wrong, "o_proj": right}
""",
    "rank_of_h": """
def rank_of_h(saving, layers, tokens, itemsize):
    per_layer = 7 * tokens * itemsize
    return saving / (layers * per_layer)
""",
    "x_from_h": """
def x_from_h(h, A):
    inverse = np.linalg.inv(A @ A.T)
    return h @ inverse @ A
""",
    "late_dx": """
def late_dx(dy, x, A, B, *, s, lr):
    dh = s * (dy @ B)
    dA = dh.T @ x
    return -lr * (dh @ dA)
""",
    "equal_length": """
def equal_length(H, G, D, C, F):
    numbers = 2 * F
    return numbers / H
""",
    "block_grads": """
def block_grads(R, H, G, D, C, F, itemsize):
    q, kv = H * D, G * D
    attention = (C + q) + (C + kv) + (C + kv) + (q + C)
    mlp = 2 * (C + F) + (F + C)
    return R * (attention + mlp) * itemsize
""",
    "checkpoint_bytes": """
def checkpoint_bytes(layers, N, T, C, itemsize):
    one = N * T * C
    return layers * one * itemsize
""",
    "streamed_bytes": """
def streamed_bytes(layers, H, G, D, C, itemsize):
    inputs = 2 * C
    kv = 2 * G * D
    block = inputs + kv + H * D + H
    return itemsize * (layers * block + C + kv)
""",
    "mezo_needs": """
def mezo_needs(config, tokens, disk):
    from mesp_ref.memory import Shapes, peak
    zeroth = peak("mezo", Shapes(config, tokens=tokens)).total
    exact = peak("mesp_tiled", Shapes(config, tokens=tokens, disk=disk)).total
    return zeroth - exact
""",
    "best_eps": """
def best_eps(u, loss, third):
    ratio = 3 * u * loss / third
    return ratio ** (1 / 3)
""",
    "mezo_steps": """
def mezo_steps(g, curvature):
    trace = curvature.sum()
    along = (g * g * curvature).sum()
    return 2 + (g * g).sum() * trace / along
""",
    "merged_weight": """
def merged_weight(W, A, B, s):
    product = B @ A
    return W + s * product
""",
    "equal_rank": """
def equal_rank(H, G, D, C, F):
    shapes = [(H * D, C), (G * D, C), (G * D, C), (C, H * D), (F, C), (F, C), (C, F)]
    whole = sum(o * i for o, i in shapes)
    each = sum(o + i for o, i in shapes)
    return whole / each
""",
    "forgetting": """
def forgetting(with_adapter, without, tokens):
    more = with_adapter - without
    return (more * tokens).sum() / tokens.sum()
""",
    "best_pair": """
def best_pair(marks):
    best, found = -1, None
    for i in range(marks.shape[1]):
        for j in range(i + 1, marks.shape[1]):
            seen = (marks[:, i] | marks[:, j]).sum()
            if seen > best:
                best, found = seen, (i, j)
    return found
""",
    "to_bfloat16": """
def to_bfloat16(x):
    bits = x.view(np.uint32)
    last = (bits >> 16) & 1
    bits = bits + np.uint32(0x7FFF) + last
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
""",
    "head_bwd": """
def head_bwd(n, w, labels):
    rows, labels = n.reshape(-1, n.shape[-1]), labels.reshape(-1)
    counted = labels != -100
    count = counted.sum()
    z = rows[counted] @ w.T
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z)
    p = p / p.sum(axis=1, keepdims=True)
    here = np.arange(count)
    loss = -np.log(p[here, labels[counted]]).sum() / count
    p[here, labels[counted]] -= 1
    dn = np.zeros_like(rows)
    dn[counted] = p @ w / count
    return loss, dn.reshape(n.shape)
""",
    "adamw_step": """
def adamw_step(w, m, v, g, t, *, lr, beta1, beta2, eps):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1 ** t)
    v_hat = v / (1 - beta2 ** t)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v
""",
}


def _rows(exercise: str, *attempts: tuple[str, str, str]) -> list[tuple[str, str, str, str]]:
    return [(exercise, *attempt) for attempt in attempts]


FIRST = [
    *_rows(
        "logistic_bwd",
        ("sign", "-x * da", "x * da"),
        ("x|inner", "-x * da", "-da"),
        ("with respect to x|dx|w", "-x * da", "-w * da"),
        ("exp|e\\^|b", "da = dc * b", "da = dc"),
        ("sign of the exponent|w·x|other sign|e\\^\\(w", "b = np.exp(-w * x)", "b = np.exp(w * x)"),
        ("logarithm|1/c|log", "dc = 1 / (1 + b)", "dc = 1"),
        ("value of L|L itself|loss", "return -x * da", "return np.log(1 + b)"),
        ("1 \\+|c = 1|1/b", "dc = 1 / (1 + b)", "dc = 1 / b"),
        ("slope of the sigmoid|σ\\(1|twice|square", "da = dc * b", "da = dc * b * dc"),
        ("0\\.5|half|2", "return -x * da", "return -x * da / 2"),
    ),
    *_rows(
        "layernorm_bwd",
        ("mean of u|mean.*missing|first", "(u - shift) / sigma", "u / sigma"),
        ("along|second|σ.*missing|cross", "/ sigma - centred * along / sigma ** 3", "/ sigma"),
        ("sign|added", "/ sigma - centred", "/ sigma + centred"),
        ("σ³|power", "sigma ** 3", "sigma ** 2"),
        ("w|weight", "u = dy * w", "u = dy"),
        ("centred|x itself|x where", "- centred * along", "- x * along"),
        ("sum.*mean|divided by C|mean", "(u * centred).mean(", "(u * centred).sum("),
        ("centred|mean.*x|RMSNorm", "centred = x - x.mean(-1, keepdims=True)", "centred = x"),
        ("outside", ".mean(-1, keepdims=True) + eps)", ".mean(-1, keepdims=True)) + eps"),
        (
            "C − 1|C - 1|unbiased|ddof",
            "(centred ** 2).mean(-1, keepdims=True)",
            "x.var(-1, ddof=1, keepdims=True)",
        ),
        ("mean of dy|w", "shift = u.mean", "shift = dy.mean"),
    ),
    *_rows(
        "blind_spot",
        ("row sum|Σ", "(dy - dot)", "dy"),
        ("p.*missing|factor p", "dz = p * (dy - dot)", "dz = dy - dot"),
        ("weighted|mean|p", "dot = np.sum(dy * p)", "dot = dy.mean()"),
        ("root|squared", "np.sqrt(np.sum(dz ** 2))", "np.sum(dz ** 2)"),
        ("largest", "np.sqrt(np.sum(dz ** 2))", "np.abs(dz).max()"),
        ("mean", "np.sqrt(np.sum(dz ** 2))", "np.sqrt(np.mean(dz ** 2))"),
        ("dy itself|cotangent", "np.sqrt(np.sum(dz ** 2))", "np.sqrt(np.sum(dy ** 2))"),
        ("sum of|absolute|1-norm", "np.sqrt(np.sum(dz ** 2))", "np.abs(dz).sum()"),
        (
            "spread|variance|deviation|√p|root",
            "dz = p * (dy - dot)",
            "dz = np.sqrt(p) * (dy - dot)",
        ),
        ("0|signs cancel|entries add", "np.sqrt(np.sum(dz ** 2))", "np.sum(dz)"),
        ("sum.*dy|weighted|p", "np.sum(dy * p)", "np.sum(dy)"),
    ),
    *_rows(
        "eps_outside_bwd",
        ("n³|inside", "(n ** 2 * root)", "n ** 3"),
        ("n²|power|root", "(n ** 2 * root)", "n ** 2"),
        ("root³|eps", "(n ** 2 * root)", "root ** 3"),
        ("missing|along x", " - x * along / (n ** 2 * root)", ""),
        ("inside", "n = root + eps", "n = np.sqrt(root ** 2 + eps)"),
        ("eps.*(missing|forgotten)", "n = root + eps", "n = root"),
        ("sign|added", "u / n - x", "u / n + x"),
        ("w", "u = dy * w", "u = dy"),
        ("mean|sum", "(u * x).mean(", "(u * x).sum("),
        ("root²|n² · root|n²·root", "(n ** 2 * root)", "(n * root ** 2)"),
    ),
    *_rows(
        "eps_noticed",
        ("root", "np.sqrt(eps / grown)", "eps / grown"),
        (
            "square|\\(1 \\+ rtol\\)|half|first order|2",
            "grown = (1 + rtol) ** 2 - 1",
            "grown = rtol",
        ),
        ("first order|approx", "grown = (1 + rtol) ** 2 - 1", "grown = 2 * rtol"),
        ("upside|inver|divi", "np.sqrt(eps / grown)", "np.sqrt(grown / eps)"),
        ("rtol", "np.sqrt(eps / grown)", "np.sqrt(eps)"),
        ("multipl|times|product", "np.sqrt(eps / grown)", "np.sqrt(eps * grown)"),
        ("rtol²|square of rtol|cross", "(1 + rtol) ** 2 - 1", "rtol ** 2"),
        ("− 1|1 is|- 1", "(1 + rtol) ** 2 - 1", "(1 + rtol) ** 2"),
        ("eps.*root|root.*eps|eps itself", "np.sqrt(eps / grown)", "eps / np.sqrt(grown)"),
        ("sign|below 1|1 −|1 - ", "(1 + rtol) ** 2 - 1", "1 - (1 - rtol) ** 2"),
    ),
    *_rows(
        "stays_right",
        (
            "MLP.*wrong|order|before",
            '        return mlp\n    if forgotten == "the residual path of attention"',
            '        return attention\n    if forgotten == "the residual path of attention"',
        ),
        (
            "attention|below|this block",
            'return mlp + attention\n    if forgotten == "the slope',
            'return mlp\n    if forgotten == "the slope',
        ),
        ("gate|silu", "return up + down", "return mlp"),
        ("q_proj alone|k_proj|only q", 'return mlp + ["k_proj", "v_proj", "o_proj"]', "return mlp"),
        ("v_proj|softmax", 'return mlp + ["v_proj", "o_proj"]', 'return mlp + ["o_proj"]'),
        ("o_proj|softmax|before", 'return mlp + ["v_proj", "o_proj"]', 'return mlp + ["v_proj"]'),
        ("up|silu|down", "return up + down", "return down"),
        (
            "dn|below|k_proj",
            'if forgotten == "dn of k_proj":\n        return mlp + attention',
            'if forgotten == "dn of k_proj":\n        return mlp + ["q_proj", "v_proj", "o_proj"]',
        ),
        ("nothing|all|none", "    down, up, gate", "    return []\n    down, up, gate"),
        (
            "every|all",
            "    down, up, gate",
            '    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]\n    down, up, gate',
        ),
        ("softmax|q_proj|k_proj", 'return mlp + ["v_proj", "o_proj"]', "return mlp + attention"),
    ),
    *_rows(
        "qkv_bias_bwd",
        (
            "turned back|RoPE|rotat",
            "    dq = ops.rope_bwd(dq, ops.RopeRes(), cos, sin)\n    dk = ops.rope_bwd(dk, ops.RopeRes(), cos, sin)\n",
            "",
        ),
        ("k.*turned|dk|bk", "    dk = ops.rope_bwd(dk, ops.RopeRes(), cos, sin)\n", ""),
        (
            "forward",
            "dq = ops.rope_bwd(dq, ops.RopeRes(), cos, sin)",
            "dq = ops.rope(dq, cos, sin)[0]",
        ),
        (
            "v.*turned|dv|bv|v has no|not rotated",
            "bv = dv.sum",
            "bv = ops.rope_bwd(dv, ops.RopeRes(), cos, sin).sum",
        ),
        ("mean|averag", "bq = dq.sum", "bq = dq.mean"),
        (
            "batch|N",
            "bv = dv.sum(axis=(0, 1)).reshape(-1)",
            "bv = dv.sum(axis=(0, 1)).reshape(-1) / len(dv)",
        ),
        (
            "shape|reshape|values are right",
            "dk.sum(axis=(0, 1)).reshape(-1)",
            "dk.sum(axis=(0, 1))",
        ),
        ("heads", "dk.sum(axis=(0, 1)).reshape(-1)", "dk.sum(axis=(0, 1)).T.reshape(-1)"),
        ("order|exchang", "return bq, bk, bv", "return bq, bv, bk"),
        ("first|sequence|batch", "bv = dv.sum(axis=(0, 1))", "bv = dv[0].sum(axis=0)"),
        (
            "sum.*before|after|position|summed first",
            "dq = ops.rope_bwd(dq, ops.RopeRes(), cos, sin)",
            "dq = ops.rope_bwd(dq.mean(axis=(0, 1), keepdims=True) + 0 * dq, ops.RopeRes(), cos, sin)",
        ),
    ),
    *_rows(
        "rope_order",
        ("inverse|other way|back", "    return order", "    return np.argsort(order)"),
        ("identity|nothing|as they are", "    return order", "    return np.arange(D)"),
        ("exchang|second.*first|within", "np.arange(D // 2) + D // 2", "np.arange(D // 2)"),
        (
            "exchang|pair",
            "order[0::2] = np.arange(D // 2)\n    order[1::2] = np.arange(D // 2) + D // 2",
            "order[1::2] = np.arange(D // 2)\n    order[0::2] = np.arange(D // 2) + D // 2",
        ),
        ("reverse", "np.arange(D // 2) + D // 2", "np.arange(D)[::-1][: D // 2]"),
        ("halves", "    return order", "    return np.roll(np.arange(D), D // 2)"),
        (
            "neighbour|next",
            "    return order",
            "    return np.arange(D).reshape(-1, 2)[:, ::-1].ravel()",
        ),
        ("reverse", "    return order", "    return order[::-1]"),
        (
            "1|off by one|one place",
            "np.arange(D // 2) + D // 2",
            "(np.arange(D // 2) + D // 2 + 1) % D",
        ),
        ("shape|half|pairs", "    return order", "    return order.reshape(-1, 2)"),
    ),
    *_rows(
        "rope_verdict",
        ("always 0|right", "    def near(a, b):", "    return 0\n\n    def near(a, b):"),
        (
            "length|norm|size",
            "return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()",
            "return abs(np.linalg.norm(a) - np.linalg.norm(b)) <= 1e-5 * np.linalg.norm(b)",
        ),
        (
            "rounding|exact|float32|equal",
            "return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()",
            "return np.array_equal(a, b)",
        ),
        (
            "position 0|first position|angle",
            "return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()",
            "a, b = a[:, 0], b[:, 0]\n        return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()",
        ),
        (
            "3|neither|something else",
            "        return 2\n    return 3",
            "        return 2\n    return 2",
        ),
        ("forward|2", "    if near(dx, ops.rope(dy, cos, sin)[0]):\n        return 2\n", ""),
        ("not turned|1", "    if near(dx, dy):\n        return 1\n", ""),
        (
            "exchang|forward",
            "ops.rope(dy, cos, sin)[0]",
            "ops.rope_bwd(dy, ops.RopeRes(), cos, -sin) * 0",
        ),
        (
            "loose|sum|mean",
            "return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()",
            "return abs(a.sum() - b.sum()) <= 1e-5 * abs(b).sum()",
        ),
        (
            "forward.*backward|which is right|exchang",
            "if near(dx, ops.rope_bwd(dy, ops.RopeRes(), cos, sin))",
            "if near(dx, ops.rope(dy, cos, sin)[0])",
        ),
        ("loose|large|tolerance", "<= 1e-5 *", "<= 3.0 *"),
    ),
    *_rows(
        "averaged_heads",
        ("upside|H/G|too (large|small)", "wrong = G / H", "wrong = H / G"),
        ("v_proj|v .*too|dv", '"v_proj": wrong', '"v_proj": right'),
        ("k_proj|k .*too|dk", '"k_proj": wrong', '"k_proj": right'),
        ("q_proj|queries", '"q_proj": right', '"q_proj": wrong'),
        ("o_proj", '"o_proj": right', '"o_proj": wrong'),
        ("1/H|groups|all heads", "wrong = G / H", "wrong = 1 / H"),
        ("1/G|group", "wrong = G / H", "wrong = 1 / G"),
        (
            "wrong.*right|exchang|q_proj",
            "right = 1.0\n    wrong = G / H",
            "right = G / H\n    wrong = 1.0",
        ),
        ("nothing|1|none", "wrong = G / H", "wrong = 1.0"),
        ("root", "wrong = G / H", "wrong = (G / H) ** 0.5"),
    ),
    *_rows(
        "rank_of_h",
        ("seven|7", "per_layer = 7 *", "per_layer = 1 *"),
        ("layers|block", "(layers * per_layer)", "per_layer"),
        ("tokens", "7 * tokens * itemsize", "7 * itemsize"),
        ("itemsize|bytes", "7 * tokens * itemsize", "7 * tokens"),
        ("upside|inver", "saving / (layers * per_layer)", "layers * per_layer / saving"),
        ("MB|mega|10⁶|million", "saving / (layers", "saving / 1e6 / (layers"),
        ("bits|8", "saving / (layers", "8 * saving / (layers"),
        ("four|attention|4", "per_layer = 7 *", "per_layer = 4 *"),
        ("2\\^?²?⁰|MiB|1,048,576|2²⁰", "saving / (layers", "saving / 2**20 / (layers"),
        ("tokens.*square|twice|tokens²", "7 * tokens * itemsize", "7 * tokens * tokens * itemsize"),
        ("twice|2", "7 * tokens * itemsize", "14 * tokens * itemsize"),
    ),
    *_rows(
        "x_from_h",
        ("inverse|\\(A·?Aᵀ\\)|missing", "return h @ inverse @ A", "return h @ A"),
        ("inverse.*twice|twice", "return h @ inverse @ A", "return h @ inverse @ inverse @ A"),
        (
            "inverse|A·Aᵀ itself|not inverted",
            "inverse = np.linalg.inv(A @ A.T)",
            "inverse = A @ A.T",
        ),
        ("0|zero", "return h @ inverse @ A", "return 0 * (h @ inverse @ A)"),
        ("sign", "return h @ inverse @ A", "return -h @ inverse @ A"),
        (
            "norm|whole|one number",
            "inverse = np.linalg.inv(A @ A.T)",
            "inverse = np.eye(len(A)) / np.sum(A * A)",
        ),
        (
            "row|diagonal|perpendicular",
            "inverse = np.linalg.inv(A @ A.T)",
            "inverse = np.diag(1 / np.sum(A * A, axis=1))",
        ),
        ("shape|A", "return h @ inverse @ A", "return h @ inverse"),
        (
            "padded|first|zeros",
            "return h @ inverse @ A",
            "return np.pad(h, ((0, 0), (0, A.shape[1] - A.shape[0])))",
        ),
        ("half|2|twice", "return h @ inverse @ A", "return h @ inverse @ A / 2"),
        (
            "root",
            "inverse = np.linalg.inv(A @ A.T)",
            "inverse = np.diag(1 / np.sqrt(np.sum(A * A, axis=1)))",
        ),
    ),
    *_rows(
        "late_dx",
        ("sign", "return -lr *", "return lr *"),
        ("lr|rate", "return -lr *", "return -"),
        ("scale|s ", "dh = s * (dy @ B)", "dh = dy @ B"),
        (
            "dx itself|before|late dx|A −|whole",
            "return -lr * (dh @ dA)",
            "return dh @ (A - lr * dA)",
        ),
        ("A.*dA|update", "return -lr * (dh @ dA)", "return -lr * (dh @ A)"),
        ("once|s ", "return -lr * (dh @ dA)", "return -lr * (dy @ B @ dA)"),
        ("lr.*twice|lr²|square", "return -lr *", "return -lr * lr *"),
        ("tokens|mean|averag|rows", "dA = dh.T @ x", "dA = dh.T @ x / len(x)"),
        ("dA alone|shape|dA", "return -lr * (dh @ dA)", "return -lr * dA"),
        (
            "relative|length",
            "return -lr * (dh @ dA)",
            "d = -lr * (dh @ dA)\n    return d / np.linalg.norm(dh @ A)",
        ),
        ("h .*dh|dh", "dA = dh.T @ x", "dA = (x @ A.T).T @ x"),
    ),
    *_rows(
        "equal_length",
        ("two|gate and up|2|both", "numbers = 2 * F", "numbers = F"),
        ("H|heads", "return numbers / H", "return numbers"),
        ("G|query heads", "return numbers / H", "return numbers / G"),
        ("root|T²", "return numbers / H", "return np.sqrt(numbers / H)"),
        ("D|head", "return numbers / H", "return numbers / D"),
        ("C|hidden", "return numbers / H", "return numbers / C"),
        ("down|three|3", "numbers = 2 * F", "numbers = 3 * F"),
        ("multipl|upside|divid", "return numbers / H", "return numbers * H"),
        ("causal|triangle|half|masked", "numbers = 2 * F", "numbers = 4 * F"),
        ("C|F", "numbers = 2 * F", "numbers = 2 * C"),
        ("upside|inver", "return numbers / H", "return H / numbers"),
    ),
    *_rows(
        "block_grads",
        ("itemsize|bytes", "(attention + mlp) * itemsize", "(attention + mlp)"),
        ("rank|R", "return R * (attention", "return (attention"),
        ("MLP", "(attention + mlp)", "attention"),
        ("attention", "(attention + mlp)", "mlp"),
        (
            "only A|B|in \\+ out|in alone",
            "attention = (C + q) + (C + kv) + (C + kv) + (q + C)\n    mlp = 2 * (C + F) + (F + C)",
            "attention = C + C + C + q\n    mlp = 2 * C + F",
        ),
        ("groups|G|shared|k and v", "kv = H * D, G * D", "kv = H * D, H * D"),
        ("in·out|product|whole", "2 * (C + F) + (F + C)", "3 * C * F"),
        ("gate|up|once", "mlp = 2 * (C + F)", "mlp = (C + F)"),
        ("down", "2 * (C + F) + (F + C)", "2 * (C + F)"),
        ("o_proj", " + (q + C)", ""),
        ("4|8|twice|2", "return R *", "return 2 * R *"),
    ),
    *_rows(
        "checkpoint_bytes",
        ("layers|block", "return layers * one", "return one"),
        ("itemsize|bytes", "one * itemsize", "one"),
        ("N|batch", "one = N * T * C", "one = T * C"),
        ("T|tokens", "one = N * T * C", "one = N * C"),
        ("halves|two|2", "return layers * one", "return 2 * layers * one"),
        ("\\+ 1|one more|final|embedding", "return layers * one", "return (layers + 1) * one"),
        ("− 1|one fewer|first|last", "return layers * one", "return (layers - 1) * one"),
        ("T²|square", "one = N * T * C", "one = N * T * T"),
        ("MB|10⁶|million", "one * itemsize", "one * itemsize / 1e6"),
        ("bits|8", "one * itemsize", "one * itemsize * 8"),
        ("C|width|numbers of a row", "one = N * T * C", "one = N * T"),
    ),
    *_rows(
        "streamed_bytes",
        ("itemsize|bytes", "return itemsize * (", "return ("),
        ("half|two|inputs", "inputs = 2 * C", "inputs = C"),
        ("k and v|two|2", "kv = 2 * G * D", "kv = G * D"),
        ("G|query heads|groups", "kv = 2 * G * D", "kv = 2 * H * D"),
        ("lse", " + H * D + H\n", " + H * D\n"),
        ("output|o ", "kv + H * D + H", "kv + H"),
        ("gradient", "layers * block + C + kv", "layers * block"),
        ("C|rows", "layers * block + C + kv", "layers * block + kv"),
        ("k and v|gradient", "layers * block + C + kv", "layers * block + C"),
        ("layers|block", "(layers * block + C + kv)", "(block + C + kv)"),
        ("layers|once|one block", "(layers * block + C + kv)", "(layers * (block + C + kv))"),
    ),
    *_rows(
        "mezo_needs",
        ("sign|exchang", "return zeroth - exact", "return exact - zeroth"),
        ("disk", "tokens=tokens, disk=disk", "tokens=tokens"),
        ("mesp|tiled", '"mesp_tiled"', '"mesp"'),
        ("store_all", '"mesp_tiled"', '"store_all"'),
        ("mezo alone|mezo itself|difference", "return zeroth - exact", "return zeroth"),
        ("mesp_tiled|difference", "return zeroth - exact", "return exact"),
        ("tokens|256", "Shapes(config, tokens=tokens)", "Shapes(config)"),
        ("MB|10⁶|million", "return zeroth - exact", "return (zeroth - exact) / 1e6"),
        ("ratio|divid", "return zeroth - exact", "return zeroth / exact"),
        ("streamed|tiled", '"mesp_tiled"', '"mesp_streamed"'),
        ("True|yes|difference|number", "return zeroth - exact", "return zeroth > exact"),
    ),
    *_rows(
        "best_eps",
        ("cube|third|1/3|square root", "ratio ** (1 / 3)", "ratio ** (1 / 2)"),
        ("3", "ratio = 3 * u", "ratio = u"),
        ("6|derivative", "ratio = 3 * u", "ratio = 6 * u"),
        ("loss", "3 * u * loss / third", "3 * u / third"),
        ("third|curv", "3 * u * loss / third", "3 * u * loss"),
        ("upside|inver", "3 * u * loss / third", "third / (3 * u * loss)"),
        ("root|cube", "return ratio ** (1 / 3)", "return ratio"),
        ("u |rounding", "3 * u * loss / third", "3 * loss / third"),
        ("equal|6|minim", "ratio = 3 * u", "ratio = 6 * u"),
        ("multipl|third", "3 * u * loss / third", "3 * u * loss * third"),
        ("u|cube root.*u|root", "return ratio ** (1 / 3)", "return np.sqrt(u)"),
    ),
    *_rows(
        "mezo_steps",
        ("2", "return 2 + ", "return "),
        (
            "d|number of parameters|isotrop|all",
            "return 2 + (g * g).sum() * trace / along",
            "return 2 + len(g)",
        ),
        ("1|2", "return 2 + ", "return 1 + "),
        ("largest|max", "trace / along", "trace / curvature.max() / (g * g).sum()"),
        (
            "nonzero|count|flat",
            "return 2 + (g * g).sum() * trace / along",
            "return 2 + np.count_nonzero(curvature)",
        ),
        ("upside|inver", "(g * g).sum() * trace / along", "along / ((g * g).sum() * trace)"),
        ("mean|trace", "trace = curvature.sum()", "trace = curvature.mean()"),
        ("g²|square", "along = (g * g * curvature).sum()", "along = (g * curvature).sum()"),
        (
            "root",
            "return 2 + (g * g).sum() * trace / along",
            "return np.sqrt(2 + (g * g).sum() * trace / along)",
        ),
        ("weight|curvature|along", "along = (g * g * curvature).sum()", "along = (g * g).sum()"),
        ("λ²|square", "(g * g * curvature)", "(g * g * curvature ** 2)"),
    ),
    *_rows(
        "merged_weight",
        ("scale|s ", "s * product", "product"),
        ("sign|subtract", "W + s", "W - s"),
        ("W|base", "return W + s * product", "return s * product"),
        ("adapter|B·A|BA", "return W + s * product", "return W"),
        ("transpos", "product = B @ A", "product = (B @ A).T"),
        ("order|A·B|shape|A @ B", "product = B @ A", "product = A.T @ B.T"),
        ("twice|s²|square", "W + s * product", "W + s * s * product"),
        ("divid|1/s|upside", "W + s * product", "W + product / s"),
        ("rank|R", "W + s * product", "W + s * product / len(A)"),
        ("entry|⊙|multipl|W·", "W + s * product", "W * (1 + s * product)"),
        ("W.*scale|s .*W", "W + s * product", "s * (W + product)"),
    ),
    *_rows(
        "equal_rank",
        ("upside|inver", "return whole / each", "return each / whole"),
        ("only A|in alone|B", "sum(o + i for", "sum(i for"),
        ("down", ", (C, F)]", "]"),
        ("gate|up|once", "(F, C), (F, C), ", "(F, C), "),
        ("G|groups|shared|k and v", "(G * D, C), (G * D, C)", "(H * D, C), (H * D, C)"),
        ("MLP", ", (F, C), (F, C), (C, F)]", "]"),
        ("attention", "(H * D, C), (G * D, C), (G * D, C), (C, H * D), ", ""),
        (
            "mean|each|one by one|ratios",
            "return whole / each",
            "return np.mean([o * i / (o + i) for o, i in shapes])",
        ),
        ("twice|2|half", "return whole / each", "return 2 * whole / each"),
        ("square|root|C", "return whole / each", "return C"),
        (
            "sum of ratios|ratios|each",
            "return whole / each",
            "return sum(o * i / (o + i) for o, i in shapes)",
        ),
    ),
    *_rows(
        "forgetting",
        ("sign|exchang", "with_adapter - without", "without - with_adapter"),
        ("mean of means|tokens|weight", "(more * tokens).sum() / tokens.sum()", "more.mean()"),
        ("ratio|divid", "more = with_adapter - without", "more = with_adapter / without"),
        (
            "perplexit|exp",
            "more = with_adapter - without",
            "more = np.exp(with_adapter) - np.exp(without)",
        ),
        ("sum|not divided", "(more * tokens).sum() / tokens.sum()", "(more * tokens).sum()"),
        (
            "number of (stories|rows)",
            "(more * tokens).sum() / tokens.sum()",
            "(more * tokens).sum() / len(tokens)",
        ),
        ("with.*alone|difference|without", "more = with_adapter - without", "more = with_adapter"),
        ("absolute|sign", "more = with_adapter - without", "more = abs(with_adapter - without)"),
        ("sum|stories", "(more * tokens).sum() / tokens.sum()", "more.sum() / tokens.sum()"),
        (
            "bits|log|2",
            "(more * tokens).sum() / tokens.sum()",
            "(more * tokens).sum() / tokens.sum() / np.log(2)",
        ),
        ("median", "(more * tokens).sum() / tokens.sum()", "np.median(more)"),
    ),
    *_rows(
        "best_pair",
        (
            "alone|singl|each",
            "    best, found = -1, None",
            "    return tuple(np.sort(np.argsort(-marks.sum(axis=0), kind='stable')[:2]))\n    best, found = -1, None",
        ),
        ("both|and", "marks[:, i] | marks[:, j]", "marks[:, i] & marks[:, j]"),
        ("one of|xor|exactly", "marks[:, i] | marks[:, j]", "marks[:, i] ^ marks[:, j]"),
        ("fewest|worst|least", "if seen > best", "if best < 0 or seen < best"),
        ("1|from 0|count", "best, found = seen, (i, j)", "best, found = seen, (i + 1, j + 1)"),
        (
            "greedy|best single|first",
            "    for i in range(marks.shape[1]):",
            "    for i in [int(marks.sum(axis=0).argmax())]:",
        ),
        (
            "axis|rows|bugs",
            "    best, found = -1, None",
            "    marks = marks.T\n    best, found = -1, None",
        ),
        (
            "neighbour|next",
            "for j in range(i + 1, marks.shape[1])",
            "for j in range(i + 1, min(i + 2, marks.shape[1]))",
        ),
        ("number|how many|pair|expected 2", "    return found", "    return best"),
        (
            "itself|twice|same",
            "for j in range(i + 1, marks.shape[1]):\n            seen = (marks[:, i] | marks[:, j])",
            "for j in range(i, i + 1):\n            seen = (marks[:, i] | marks[:, j])",
        ),
        (
            "twice|count",
            "(marks[:, i] | marks[:, j]).sum()",
            "marks[:, i].sum() + marks[:, j].sum()",
        ),
    ),
    *_rows(
        "to_bfloat16",
        (
            "cut off|truncat|chop|toward",
            "bits = bits + np.uint32(0x7FFF) + last",
            "bits = bits + np.uint32(0)",
        ),
        ("tie|even|away", "np.uint32(0x7FFF) + last", "np.uint32(0x8000)"),
        (
            "float16",
            "    bits = x.view(np.uint32)\n",
            "    return x.astype(np.float16).astype(np.float32)\n    bits = x.view(np.uint32)\n",
        ),
        ("tie|down|even", "np.uint32(0x7FFF) + last", "np.uint32(0x7FFF)"),
        (
            "not rounded|itself|unchanged",
            "    bits = x.view(np.uint32)\n",
            "    return x\n    bits = x.view(np.uint32)\n",
        ),
        ("up|always|away", "np.uint32(0x7FFF) + last", "np.uint32(0xFFFF)"),
        ("tie|odd", "last = (bits >> 16) & 1", "last = 1 - ((bits >> 16) & 1)"),
        ("15|bits|one bit|too (many|few)|8", "0xFFFF0000", "0xFFFE0000"),
        (
            "bits|one bit|too many|more",
            "bits = bits + np.uint32(0x7FFF) + last\n    return (bits & np.uint32(0xFFFF0000))",
            "bits = bits + np.uint32(0x3FFF) + ((bits >> 15) & 1)\n    return (bits & np.uint32(0xFFFF8000))",
        ),
        (
            "decimal|digits",
            "    bits = x.view(np.uint32)\n",
            "    return np.round(x, 2)\n    bits = x.view(np.uint32)\n",
        ),
        (
            "bits themselves|integer|shift|view",
            "    return (bits & np.uint32(0xFFFF0000)).view(np.float32)",
            "    return bits >> 16",
        ),
    ),
    *_rows(
        "head_bwd",
        ("counted|all rows|ignored", "count = counted.sum()", "count = len(labels)"),
        ("one-?hot|label", "    p[here, labels[counted]] -= 1\n", ""),
        ("sign", "loss = -np.log", "loss = np.log"),
        ("count|mean|divided", "dn[counted] = p @ w / count", "dn[counted] = p @ w"),
        ("count|mean|sum", "]]).sum() / count", "]]).sum()"),
        ("sign", "p[here, labels[counted]] -= 1", "p[here, labels[counted]] += 1"),
        ("twice|2", "p[here, labels[counted]] -= 1", "p[here, labels[counted]] -= 2"),
        ("dn.*sign|sign", "dn[counted] = p @ w / count", "dn[counted] = -p @ w / count"),
        ("order|exchang", "return loss, dn.reshape(n.shape)", "return dn.reshape(n.shape), loss"),
        ("shape", "return loss, dn.reshape(n.shape)", "return loss, dn"),
        (
            "softmax|p is|not normal|sum",
            "    p = p / p.sum(axis=1, keepdims=True)\n    here",
            "    here",
        ),
        ("root|2|count", "p @ w / count", "p @ w / np.sqrt(count)"),
    ),
    *_rows(
        "adamw_step",
        ("bias correction.*m|m .*correct", "m_hat = m / (1 - beta1 ** t)", "m_hat = m"),
        ("bias correction.*v|v .*correct", "v_hat = v / (1 - beta2 ** t)", "v_hat = v"),
        ("root", "np.sqrt(v_hat) + eps", "v_hat + eps"),
        ("inside", "(np.sqrt(v_hat) + eps)", "np.sqrt(v_hat + eps)"),
        ("sign|uphill", "return w - lr", "return w + lr"),
        ("lr|rate", "w - lr * m_hat", "w - m_hat"),
        ("square", "(1 - beta2) * g * g", "(1 - beta2) * g"),
        (
            "β₁.*β₂|exchang|beta",
            "m = beta1 * m + (1 - beta1) * g\n    v = beta2 * v + (1 - beta2) * g * g",
            "m = beta2 * m + (1 - beta2) * g\n    v = beta1 * v + (1 - beta1) * g * g",
        ),
        ("1 − β₁|damp|weight", "m = beta1 * m + (1 - beta1) * g", "m = beta1 * m + g"),
        ("m̂|v̂|hat|correct", "eps), m, v", "eps), m_hat, v_hat"),
        ("order|exchang", "eps), m, v", "eps), v, m"),
        ("step|t", "(1 - beta1 ** t)", "(1 - beta1 ** (t + 1))"),
    ),
]


# Whole answers, written when the tables of mistakes were there, without looking at them.
HELD_OUT = [
    ("logistic_bwd", "sign|minus", "def f(w,x):\n s=1/(1+np.exp(w*x))\n return x*s"),
    ("logistic_bwd", "exp|b |x·σ", "def f(w,x):\n return -x*(1-1/(1+np.exp(w*x)))"),
    ("logistic_bwd", "value|itself", "def f(w,x):\n return np.log1p(np.exp(-w*x))"),
    (
        "layernorm_bwd",
        "mean of u|mean",
        "def f(dy,x,w,*,eps):\n c=x-x.mean(-1,keepdims=True)\n s=np.sqrt((c*c).mean(-1,keepdims=True)+eps)\n u=dy*w\n return u/s-c*(u*c).mean(-1,keepdims=True)/s**3",
    ),
    (
        "layernorm_bwd",
        "second|σ",
        "def f(dy,x,w,*,eps):\n s=np.sqrt(x.var(-1,keepdims=True)+eps)\n u=dy*w\n return (u-u.mean(-1,keepdims=True))/s",
    ),
    (
        "layernorm_bwd",
        "weight|w",
        "def f(dy,x,w,*,eps):\n c=x-x.mean(-1,keepdims=True)\n s=np.sqrt((c*c).mean(-1,keepdims=True)+eps)\n xh=c/s\n return (dy-dy.mean(-1,keepdims=True)-xh*(dy*xh).mean(-1,keepdims=True))/s",
    ),
    ("blind_spot", "p|mean|weighted", "def f(dy,p):\n return np.linalg.norm(p*(dy-dy.mean()))"),
    ("blind_spot", "diagonal|sum|1 − p|Σ", "def f(dy,p):\n return np.linalg.norm(dy*p*(1-p))"),
    (
        "eps_outside_bwd",
        "inside",
        "def f(dy,x,w,*,eps):\n n=np.sqrt((x*x).mean(-1,keepdims=True)+eps)\n u=dy*w\n return u/n-x*(u*x).mean(-1,keepdims=True)/n**3",
    ),
    (
        "eps_outside_bwd",
        "n³|root",
        "def f(dy,x,w,*,eps):\n n=np.sqrt((x*x).mean(-1,keepdims=True))+eps\n u=dy*w\n return (u-x*(u*x).mean(-1,keepdims=True)/n**2)/n",
    ),
    ("eps_noticed", "first order", "def f(rtol,eps):\n return (eps/2/rtol)**.5"),
    ("eps_noticed", "root", "def f(rtol,eps):\n return eps/(2*rtol+rtol**2)"),
    (
        "stays_right",
        "every time|depends|MLP",
        "def f(forgotten):\n return ['gate_proj','up_proj','down_proj']",
    ),
    (
        "stays_right",
        "q|k|softmax|below|k_proj itself",
        "def f(forgotten):\n d={'the residual path of the MLP':'g u d','the slope of silu':'u d','the row sum of softmax':'g u d v o','dq is not turned back':'g u d k v o','dn of k_proj':'g u d q v o','the residual path of attention':'q k v o g u d'}\n n={'g':'gate_proj','u':'up_proj','d':'down_proj','q':'q_proj','k':'k_proj','v':'v_proj','o':'o_proj'}\n return {n[x] for x in d[forgotten].split()}",
    ),
    (
        "qkv_bias_bwd",
        "turned back|RoPE",
        "def f(dq,dk,dv,cos,sin):\n return tuple(d.reshape(-1,d.shape[2]*d.shape[3]).sum(0) for d in (dq,dk,dv))",
    ),
    (
        "qkv_bias_bwd",
        "batch",
        "def f(dq,dk,dv,cos,sin):\n dq,dk=(ops.rope_bwd(d,ops.RopeRes(),cos,sin) for d in (dq,dk))\n return tuple(d.sum(1).mean(0).ravel() for d in (dq,dk,dv))",
    ),
    (
        "rope_order",
        "inverse|other way",
        "def f(D):\n return np.r_[np.arange(0,D,2),np.arange(1,D,2)]",
    ),
    (
        "rope_order",
        "pairs|exchang|other",
        "def f(D):\n return np.c_[np.arange(D//2,D),np.arange(D//2)].ravel()",
    ),
    (
        "rope_verdict",
        "length",
        "def f(dx,dy,cos,sin):\n return 0 if np.isclose((dx**2).sum(),(dy**2).sum(),rtol=1e-5) else 3",
    ),
    (
        "rope_verdict",
        "first position|position 0",
        "def f(dx,dy,cos,sin):\n for i,c in enumerate((ops.rope_bwd(dy,ops.RopeRes(),cos,sin),dy,ops.rope(dy,cos,sin)[0])):\n  if np.allclose(dx[0,0],c[0,0],atol=1e-5): return i\n return 3",
    ),
    ("averaged_heads", "upside|too", "def f(H,G):\n r=H//G\n return 1,r,r,1"),
    (
        "averaged_heads",
        "all|q_proj",
        "def f(H,G):\n return {n:G/H for n in ('q_proj','k_proj','v_proj','o_proj')}",
    ),
    (
        "rank_of_h",
        "seven|7",
        "def f(saving,layers,tokens,itemsize):\n return saving/(layers*tokens*itemsize)",
    ),
    (
        "rank_of_h",
        "whole|decimal|rounded|up",
        "def f(saving,layers,tokens,itemsize):\n return int(saving/(7*layers*tokens*itemsize))",
    ),
    ("x_from_h", "inverse", "def f(h,A):\n return h@A"),
    (
        "x_from_h",
        "norm|row|perpendicular",
        "def f(h,A):\n return h@(A/np.linalg.norm(A,axis=1,keepdims=True)**2)",
    ),
    ("late_dx", "once|s", "def f(dy,x,A,B,*,s,lr):\n dA=s*(dy@B).T@x\n return -lr*dy@B@dA"),
    ("late_dx", "sign", "def f(dy,x,A,B,*,s,lr):\n dh=s*dy@B\n return dh@A-dh@(A-lr*dh.T@x)"),
    ("equal_length", "two|gate and up", "def f(H,G,D,C,F):\n return F/H"),
    ("equal_length", "bytes|D|down|three", "def f(H,G,D,C,F):\n return 3*F/H"),
    (
        "block_grads",
        "itemsize|bytes",
        "def f(R,H,G,D,C,F,itemsize):\n return R*sum(a+b for a,b in [(C,H*D),(C,G*D),(C,G*D),(H*D,C),(C,F),(C,F),(F,C)])",
    ),
    (
        "block_grads",
        "shared|G|k and v",
        "def f(R,H,G,D,C,F,itemsize):\n return R*itemsize*(8*C+3*(C+F))",
    ),
    (
        "checkpoint_bytes",
        "one more|layers \\+ 1",
        "def f(layers,N,T,C,itemsize):\n return (layers+1)*N*T*C*itemsize",
    ),
    ("checkpoint_bytes", "N|batch", "def f(layers,N,T,C,itemsize):\n return layers*T*C*itemsize"),
    (
        "streamed_bytes",
        "lse",
        "def f(layers,H,G,D,C,itemsize):\n return itemsize*(layers*(2*C+2*G*D+H*D)+C+2*G*D)",
    ),
    (
        "streamed_bytes",
        "gradient",
        "def f(layers,H,G,D,C,itemsize):\n return itemsize*layers*(2*C+2*G*D+H*D+H)",
    ),
    (
        "mezo_needs",
        "sign|exchanged",
        "def f(config,tokens,disk):\n from mesp_ref.memory import Shapes,peak\n return peak('mesp_tiled',Shapes(config,tokens=tokens,disk=disk)).total-peak('mezo',Shapes(config,tokens=tokens)).total",
    ),
    (
        "mezo_needs",
        "disk",
        "def f(config,tokens,disk):\n from mesp_ref.memory import Shapes,peak\n s=Shapes(config,tokens=tokens)\n return peak('mezo',s).total-peak('mesp_tiled',s).total",
    ),
    ("best_eps", "square root", "def f(u,loss,third):\n return np.sqrt(u*loss/third)"),
    ("best_eps", "equal|6", "def f(u,loss,third):\n return (6*u*loss/third)**(1/3)"),
    ("mezo_steps", "d|whatever", "def f(g,curvature):\n return g.size"),
    (
        "mezo_steps",
        "2|1",
        "def f(g,curvature):\n return 1+(g@g)*curvature.sum()/(g*g*curvature).sum()",
    ),
    ("merged_weight", "transpos|order|shape", "def f(W,A,B,s):\n return W+s*A.T@B.T"),
    ("merged_weight", "rank", "def f(W,A,B,s):\n return W+s/A.shape[0]*B@A"),
    (
        "equal_rank",
        "shared|G|H heads",
        "def f(H,G,D,C,F):\n q=H*D\n return (4*q*C+3*C*F)/(4*(q+C)+3*(C+F))",
    ),
    (
        "equal_rank",
        "mean of|ratios",
        "def f(H,G,D,C,F):\n s=[(H*D,C),(G*D,C),(G*D,C),(C,H*D),(F,C),(F,C),(C,F)]\n return np.mean([a*b/(a+b) for a,b in s])",
    ),
    (
        "forgetting",
        "mean of means|tokens",
        "def f(with_adapter,without,tokens):\n return np.mean(with_adapter)-np.mean(without)",
    ),
    (
        "forgetting",
        "perplex|exp",
        "def f(with_adapter,without,tokens):\n return np.exp((with_adapter*tokens).sum()/tokens.sum())-np.exp((without*tokens).sum()/tokens.sum())",
    ),
    ("best_pair", "alone", "def f(marks):\n return list(np.argsort(marks.sum(0))[::-1][:2])"),
    (
        "best_pair",
        "greedy|best single",
        "def f(marks):\n a=int(marks.sum(0).argmax())\n rest=marks & ~marks[:,[a]]\n return a,int(rest.sum(0).argmax())",
    ),
    (
        "to_bfloat16",
        "cut|trunc",
        "def f(x):\n return (x.view(np.uint32)>>16<<16).astype(np.uint32).view(np.float32)",
    ),
    (
        "to_bfloat16",
        "tie",
        "def f(x):\n b=x.view(np.uint32).astype(np.uint64)+0x8000\n return (b>>16<<16).astype(np.uint32).view(np.float32)",
    ),
    (
        "head_bwd",
        "all rows|ignored|counted",
        "def f(n,w,labels):\n z=(n@w.T).reshape(-1,len(w));l=labels.ravel();k=l!=-100\n z=z-z.max(1,keepdims=True);p=np.exp(z);p/=p.sum(1,keepdims=True)\n i=np.flatnonzero(k)\n loss=-np.log(p[i,l[k]]).mean()\n p[i,l[k]]-=1\n p[~k]=0\n return loss,(p@w/len(l)).reshape(n.shape)",
    ),
    (
        "head_bwd",
        "ignored|−100",
        "def f(n,w,labels):\n z=(n@w.T).reshape(-1,len(w));l=labels.ravel();k=l!=-100\n z=z-z.max(1,keepdims=True);p=np.exp(z);p/=p.sum(1,keepdims=True)\n i=np.flatnonzero(k)\n loss=-np.log(p[i,l[k]]).mean()\n p[i,l[k]]-=1\n return loss,(p@w/k.sum()).reshape(n.shape)",
    ),
    (
        "adamw_step",
        "bias correction|correct",
        "def f(w,m,v,g,t,*,lr,beta1,beta2,eps):\n m=beta1*m+(1-beta1)*g;v=beta2*v+(1-beta2)*g**2\n return w-lr*m/(np.sqrt(v)+eps),m,v",
    ),
    (
        "adamw_step",
        "eps",
        "def f(w,m,v,g,t,*,lr,beta1,beta2,eps):\n m=beta1*m+(1-beta1)*g;v=beta2*v+(1-beta2)*g**2\n return w-lr*np.sqrt(1-beta2**t)/(1-beta1**t)*m/(np.sqrt(v)+eps),m,v",
    ),
]
