"""Right answers as others write them: loops, einsum, float32, lists, torch, other names and orders."""

RIGHT = {
    "rmsnorm_bwd by loops": (
        "rmsnorm_bwd",
        """
def backward(dout, cache, weight, eps):
    x = cache.x
    dx = np.zeros_like(x)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            row, g = x[i, t], dout[i, t] * weight
            n = (sum(v * v for v in row) / len(row) + eps) ** 0.5
            along = sum(a * b for a, b in zip(g, row)) / len(row)
            for c in range(len(row)):
                dx[i, t, c] = g[c] / n - row[c] * along / n**3
    return dx
""",
    ),
    "rmsnorm_bwd with names of its own": (
        "rmsnorm_bwd",
        """
def backward(grad, inputs, gamma, epsilon):
    r = 1 / np.sqrt((inputs * inputs).mean(-1, keepdims=True) + epsilon)
    g = grad * gamma
    return r * (g - inputs * r * r * (g * inputs).mean(-1, keepdims=True))
""",
    ),
    "swiglu_bwd with names of its own": (
        "swiglu_bwd",
        """
def backward(grad, a, b, s):
    sig = 1 / (1 + np.exp(-a))
    return [grad * b * sig * (1 + a * (1 - sig)), grad * a * sig]
""",
    ),
    "rmsnorm_bwd in float32": (
        "rmsnorm_bwd",
        """
def rmsnorm_bwd(dy, x, w, *, eps):
    dy, x, w = (a.astype(np.float32) for a in (dy, x, w))
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    u = dy * w
    return u * r - x * (u * x).mean(-1, keepdims=True) * r**3
""",
    ),
    "rmsnorm_bwd in float32, given back as float64": (
        "rmsnorm_bwd",
        """
def rmsnorm_bwd(dy, res, w, *, eps):
    dy, x, w = (a.astype(np.float32) for a in (dy, res.x, w))
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    u = dy * w
    return (u * r - x * (u * x).mean(-1, keepdims=True) * r**3).astype(np.float64)
""",
    ),
    "rmsnorm_bwd by a Jacobian": (
        "rmsnorm_bwd",
        """
def rmsnorm_bwd(dy, res, w, *, eps):
    x = res.x
    n = np.sqrt((x * x).mean(-1) + eps)
    J = np.eye(x.shape[-1]) / n[..., None, None] - np.einsum("...i,...j->...ij", x, x) / (
        x.shape[-1] * n[..., None, None] ** 3)
    return np.einsum("...c,c,...ci->...i", dy, w, J)
""",
    ),
    "rmsnorm_bwd_params as a list": (
        "rmsnorm_bwd_params",
        """
def rmsnorm_bwd_params(dy, res, w, *, eps):
    n = np.sqrt((res.x**2).mean(-1, keepdims=True) + eps)
    return [float((dy[..., c] * res.x[..., c] / n[..., 0]).sum()) for c in range(len(w))]
""",
    ),
    "linear_bwd_params by einsum": (
        "linear_bwd_params",
        """
def linear_bwd_params(dy, res, w, b=None):
    return np.einsum("nto,nti->oi", dy, res.x), None if b is None else np.einsum("nto->o", dy)
""",
    ),
    "lora_linear_bwd through the merged weight": (
        "lora_linear_bwd",
        """
def f(dy, res, w, b, A, B, s):
    dw = np.einsum("nto,nti->oi", dy, res.x)
    return dict(dx=dy @ (w + s * B @ A), dA=s * B.T @ dw, dB=s * dw @ A.T)
""",
    ),
    "rope_bwd with complex numbers": (
        "rope_bwd",
        """
def rope_bwd(dy, res, cos, sin):
    h = dy.shape[-1] // 2
    z = (dy[..., :h] + 1j * dy[..., h:]) * (cos - 1j * sin)[:, None]
    return np.concatenate([z.real, z.imag], -1)
""",
    ),
    "causal_softmax_bwd by a Jacobian": (
        "causal_softmax_bwd",
        """
def causal_softmax_bwd(dp, res):
    p = res.p
    J = p[..., :, None] * (np.eye(p.shape[-1]) - p[..., None, :])
    return (dp[..., None, :] @ J)[..., 0, :]
""",
    ),
    "attention_bwd head by head": (
        "attention_bwd",
        """
def attention_bwd(do, res):
    q, k, v, p = res
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for n in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h // (q.shape[2] // k.shape[2])
            P, D = p[n, h], do[n, :, h]
            dv[n, :, g] += P.T @ D
            dP = D @ v[n, :, g].T
            dS = P * (dP - (P * dP).sum(1, keepdims=True)) / q.shape[-1] ** 0.5
            dq[n, :, h] = dS @ k[n, :, g]
            dk[n, :, g] += dS.T @ q[n, :, h]
    return [dq, dk, dv]
""",
    ),
    "attention_bwd in float32": (
        "attention_bwd",
        """
def attention_bwd(do, res):
    q, k, v, p = (a.astype("f") for a in res)
    do, share = do.astype("f"), q.shape[2] // k.shape[2]
    K, V = k.repeat(share, 2), v.repeat(share, 2)
    dp = np.einsum("nihd,njhd->nhij", do, V)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * np.float32(q.shape[-1] ** -0.5)
    def group(x):
        return x.reshape(*k.shape[:3], share, -1).sum(3)
    return (np.einsum("nhij,njhd->nihd", ds, K), group(np.einsum("nhij,nihd->njhd", ds, q)),
            group(np.einsum("nhij,nihd->njhd", p, do)))
""",
    ),
    "swiglu_bwd with tanh": (
        "swiglu_bwd",
        """
def swiglu_bwd(dz, gate, up):
    s = 0.5 * (1 + np.tanh(gate / 2))
    return dz * up * s * (1 + gate * (1 - s)), dz * gate * s
""",
    ),
    "cross_entropy_bwd by loops": (
        "cross_entropy_bwd",
        """
def cross_entropy_bwd(dloss, res):
    z, labels = res.logits, res.labels
    count = max(1, sum(1 for l in labels if l != -100))
    out = []
    for row, label in zip(z, labels):
        e = np.exp(row - max(row))
        g = dloss * e / sum(e) / count
        if label >= 0:
            g[label] -= dloss / count
        else:
            g = 0 * g
        out.append(g)
    return out
""",
    ),
    "cross_entropy_bwd in float32": (
        "cross_entropy_bwd",
        """
def cross_entropy_bwd(dloss, res):
    z = res.logits.astype("f")
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    keep = res.labels != -100
    onehot = np.eye(z.shape[1], dtype="f")[np.where(keep, res.labels, 0)]
    return (p - onehot) * keep[:, None] * np.float32(dloss / max(1, keep.sum()))
""",
    ),
    "embedding_bwd_params by a one-hot product": (
        "embedding_bwd_params",
        """
def embedding_bwd_params(dy, res, w):
    onehot = np.eye(len(w))[res.ids.ravel()]
    return onehot.T @ dy.reshape(-1, dy.shape[-1])
""",
    ),
    "mezo that moves the weights in place and puts them back": (
        "mezo",
        """
def mezo(loss, weights, *, seeds, eps):
    grads = {n: 0 * w for n, w in weights.items()}
    def move(seed, by, to):
        rng = np.random.default_rng(seed)
        for n, w in to.items():
            w += by * rng.standard_normal(w.shape, dtype=w.dtype)
    for seed in seeds:
        move(seed, eps, weights)
        up = loss(weights)
        move(seed, -2 * eps, weights)
        down = loss(weights)
        move(seed, eps, weights)
        move(seed, (up - down) / (2 * eps * len(seeds)), grads)
    return grads
""",
    ),
    "stays_right as a list": (
        "stays_right",
        """
def stays_right(place):
    order = ["down_proj", "up_proj", "gate_proj", "o_proj", "v_proj", "k_proj", "q_proj"]
    keep = {"the residual path of the MLP": 3, "the residual path of attention": 7, "the slope of silu": 2,
            "dq is not turned back": 6, "the row sum of softmax": 5, "dn of k_proj": 7}
    return order[: keep[place]]
""",
    ),
    "qkv_bias_bwd by loops": (
        "qkv_bias_bwd",
        """
def qkv_bias_bwd(dq, dk, dv, cos, sin):
    found = []
    for d, turn in ((dq, True), (dk, True), (dv, False)):
        total = np.zeros(d.shape[2:])
        for n in range(d.shape[0]):
            for t in range(d.shape[1]):
                a, b = np.split(d[n, t], 2, axis=-1)
                row = [a * cos[t] + b * sin[t], b * cos[t] - a * sin[t]] if turn else [a, b]
                total += np.concatenate(row, axis=-1)
        found.append(total.ravel().tolist())
    return found
""",
    ),
    "rope_order as a list": (
        "rope_order",
        """
def f(D):
    return [i for k in range(D // 2) for i in (k, k + D // 2)]
""",
    ),
    "averaged_heads as a tuple": (
        "averaged_heads",
        """
def f(H, G):
    share = H // G
    return 1, 1 / share, 1 / share, 1
""",
    ),
    "layernorm_bwd in float32": (
        "layernorm_bwd",
        """
def layernorm_bwd(dy, x, w, *, eps):
    dy, x, w = (a.astype(np.float32) for a in (dy, x, w))
    c = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt(c.var(-1, keepdims=True) + np.float32(eps))
    u, n = dy * w, c * r
    return r * (u - u.mean(-1, keepdims=True) - n * (u * n).mean(-1, keepdims=True))
""",
    ),
    "blind_spot by a Jacobian": (
        "blind_spot",
        """
def f(dy, p):
    return np.linalg.norm((np.diag(p) - np.outer(p, p)) @ dy)
""",
    ),
    "x_from_h by least squares": (
        "x_from_h",
        """
def f(h, A):
    return h @ np.linalg.pinv(A).T
""",
    ),
    "late_dx by taking two": (
        "late_dx",
        """
def late_dx(dy, x, A, B, *, s, lr):
    dh = s * dy @ B
    late = A - lr * np.einsum("mr,mi->ri", dh, x)
    return dh @ late - dh @ A
""",
    ),
    "best_pair with numbers of NumPy": (
        "best_pair",
        """
def best_pair(marks):
    missed = (~marks).astype(int)
    both = missed.T @ missed + 10**6 * np.eye(marks.shape[1], dtype=int)
    return np.unravel_index(both.argmin(), both.shape)
""",
    ),
    "to_bfloat16 by arithmetic": (
        "to_bfloat16",
        """
def to_bfloat16(x):
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)
""",
    ),
    "mezo_steps by loops": (
        "mezo_steps",
        """
def mezo_steps(grad, lam):
    size = along = trace = 0.0
    for a, c in zip(grad, lam):
        size, along, trace = size + a * a, along + c * a * a, trace + c
    return 2 + size * trace / along
""",
    ),
    "head_bwd with one-hot rows": (
        "head_bwd",
        """
def head_bwd(n, w, labels):
    z = np.einsum("ntc,vc->ntv", n, w)
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    counted = labels != -100
    onehot = np.eye(len(w))[np.where(counted, labels, 0)] * counted[..., None]
    count = counted.sum()
    dz = (np.exp(logp) * counted[..., None] - onehot) / count
    return -(onehot * logp).sum() / count, np.einsum("ntv,vc->ntc", dz, w)
""",
    ),
}
TORCH = {
    "rmsnorm_bwd by autograd": (
        "rmsnorm_bwd",
        """
def rmsnorm_bwd(dy, res, w, *, eps):
    x = torch.tensor(res.x, requires_grad=True)
    y = torch.tensor(w) * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return torch.autograd.grad(y, x, torch.tensor(dy))[0]
""",
    ),
    "rmsnorm_bwd on tensors": (
        "rmsnorm_bwd",
        """
def rmsnorm_bwd(dy, res, w, *, eps):
    x, u = res.x, dy * w
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return u * r - x * (u * x).mean(dim=-1, keepdim=True) * r**3
""",
    ),
    "softmax_bwd on tensors": (
        "causal_softmax_bwd",
        """
def softmax_bwd(dp, res):
    return res.p * (dp - (dp * res.p).sum(dim=-1, keepdim=True))
""",
    ),
    "linear_bwd in torch's usual float32": (
        "linear_bwd",
        """
def linear_bwd(dy, res, w, b=None):
    return torch.Tensor(dy) @ torch.Tensor(w)
""",
    ),
    "embedding_bwd_params by index_add_": (
        "embedding_bwd_params",
        """
def embedding_bwd_params(dy, res, w):
    dw = torch.zeros(w.shape, dtype=torch.float64)
    return dw.index_add_(0, torch.tensor(res.ids.reshape(-1)), torch.tensor(dy.reshape(-1, dy.shape[-1])))
""",
    ),
    "merged_weight in torch": (
        "merged_weight",
        """
def merged_weight(W, A, B, s):
    W, A, B = (torch.as_tensor(a) for a in (W, A, B))
    return torch.addmm(W, B, A, alpha=s)
""",
    ),
    "layernorm_bwd by autograd": (
        "layernorm_bwd",
        """
def layernorm_bwd(dy, x, w, *, eps):
    x, w, dy = torch.tensor(x, requires_grad=True), torch.tensor(w), torch.tensor(dy)
    torch.nn.functional.layer_norm(x, x.shape[-1:], w, eps=eps).backward(dy)
    return x.grad
""",
    ),
}
