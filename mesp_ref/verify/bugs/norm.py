"""RMSNorm gone wrong."""

from mesp_ref.verify.bugs.bug import one

BUGS = [
    *one(
        "ops.rmsnorm:_inverse_rms", "forward", "rmsnorm model",
        ("rmsnorm: eps outside the root", "np.sqrt(mean_square + eps)", "(np.sqrt(mean_square) + eps)"),
        ("rmsnorm: no eps", "mean_square + eps", "mean_square"),
        ("rmsnorm: sum for mean", " / x.shape[-1]", ""),
    ),
    *one(
        "ops.rmsnorm:rmsnorm", "forward", "rmsnorm model",
        ("rmsnorm: weight 1 + w", "y *= w", "y *= 1 + w"),
    ),
    *one(
        "ops.rmsnorm:rmsnorm_bwd", "backward", "rmsnorm model",
        ("rmsnorm: cross term missing", "dx -= x * along_x", "pass"),
        ("rmsnorm: cross term added", "dx -= x", "dx += x"),
        ("rmsnorm: n² for n³", "* r * r", "* r"),
        ("rmsnorm: cross term without mean", " / x.shape[-1] * r * r", " * r * r"),
        ("rmsnorm: w missing", "dx = dy * w", "dx = dy.copy()"),
        ("rmsnorm: cross term of dy for u", '"...c,...c->...", dx, x', '"...c,...c->...", dy, x'),
        ("rmsnorm: straight through the root", "dx *= r ", "pass "),
    ),
    *one(
        "ops.rmsnorm:rmsnorm_bwd_params", "backward", "rmsnorm model",
        ("rmsnorm: dw without 1/n", "res.x * _inverse_rms(res.x, eps)", "res.x"),
        ("rmsnorm: dw averaged over rows", "return np.einsum", "return 1 / len(rows(dy)) * np.einsum"),
    ),
]  # fmt: skip
