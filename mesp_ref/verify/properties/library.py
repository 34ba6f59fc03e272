"""SciPy's own functions beside the ops: exponentials, normal forms and products of another library."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import block_diag, expm, norm
from scipy.linalg.blas import dgemm
from scipy.special import expit, log_softmax, softmax

from mesp_ref.ops import IGNORED, Array
from mesp_ref.verify.properties.claim import agree, drawn, holds
from mesp_ref.verify.result import Finding


@holds("swiglu")
def swiglu_by_expit(rng: np.random.Generator) -> Iterator[Finding]:
    """z = gate·expit(gate)·up; expit is SciPy's logistic function."""
    spec, args, _ = drawn("swiglu", rng)
    args["gate"] *= 10.0 ** rng.uniform(-3, 2, args["gate"].shape)
    z = args["gate"] * expit(args["gate"]) * args["up"]
    yield agree("swiglu", "z", spec.forward(**args)[0], z, np.abs(z))


@holds("causal_softmax")
def softmax_by_scipy(rng: np.random.Generator) -> Iterator[Finding]:
    """p = softmax of the scores that a query sees, and ds = (diag(p) − p·pᵀ)·dp row by row."""
    spec, args, dp = drawn("causal_softmax", rng)
    s: Array = args["s"]
    tq, tk = s.shape[-2:]
    p, ds = np.zeros_like(s), np.zeros_like(s)
    for at in np.ndindex(*s.shape[:-1]):
        seen = slice(0, at[-1] + tk - tq + 1)
        row = softmax(s[at][seen])
        p[at][seen], ds[at][seen] = row, (np.diag(row) - np.outer(row, row)) @ dp[at][seen]
    yield agree("causal_softmax", "p", spec.forward(**args)[0], p, p)
    yield agree("causal_softmax", "ds", spec.vjp(dp, args)["s"], ds, np.abs(dp).max())


@holds("cross_entropy")
def cross_entropy_by_log_softmax(rng: np.random.Generator) -> Iterator[Finding]:
    """loss = −mean of log_softmax at the labels; dlogits = (softmax − onehot)/count."""
    spec, args, dloss = drawn("cross_entropy", rng)
    z, labels = args["logits"], args["labels"]
    counted = np.flatnonzero(labels != IGNORED)
    picked = log_softmax(z[counted], axis=1)[np.arange(len(counted)), labels[counted]]
    mag = np.abs(picked).sum() + np.abs(z).max()
    yield agree("cross_entropy", "loss", spec.forward(**args)[0], -picked.mean(), mag)
    want = np.zeros_like(z)
    want[counted] = softmax(z[counted], axis=1)
    want[counted, labels[counted]] -= 1
    want *= dloss / len(counted)
    yield agree("cross_entropy", "dlogits", spec.vjp(dloss, args)["logits"], want, np.abs(dloss))


@holds("rope")
def rope_by_matrix_exponential(rng: np.random.Generator) -> Iterator[Finding]:
    """A rotation is exp of a skew matrix: y = exp(A_t)·x, dx = exp(−A_t)·dy with the angles of t."""
    spec, args, dy = drawn("rope", rng)
    x, half = args["x"], args["x"].shape[-1] // 2
    angles = np.arctan2(args["sin"], args["cos"])  # [T, D/2]
    pairs = np.arange(2 * half).reshape(2, half).T.ravel()  # i and i + D/2 become neighbours
    y, dx = np.zeros_like(x), np.zeros_like(x)
    for t, row in enumerate(angles):
        turn = expm(block_diag(*(a * np.array([[0.0, -1.0], [1.0, 0.0]]) for a in row)))
        y[:, t][..., pairs] = x[:, t][..., pairs] @ turn.T
        dx[:, t][..., pairs] = dy[:, t][..., pairs] @ turn
    size = np.abs(x).sum(axis=-1, keepdims=True)
    yield agree("rope", "y", spec.forward(**args)[0], y, size)
    yield agree("rope", "dx", spec.vjp(dy, args)["x"], dx, np.abs(dy).sum(axis=-1, keepdims=True))


@holds("rmsnorm")
def rmsnorm_by_norm(rng: np.random.Generator) -> Iterator[Finding]:
    """y = w·x/sqrt(norm(x)²/C + eps) with LAPACK's norm, which scales before it squares."""
    spec, args, _ = drawn("rmsnorm", rng)
    x = args["x"]
    lengths = np.apply_along_axis(norm, -1, x)[..., None]
    y = args["w"] * x / np.sqrt(lengths**2 / x.shape[-1] + args["eps"])
    yield agree("rmsnorm", "y", spec.forward(**args)[0], y, np.abs(y))


@holds("lora_linear")
def lora_by_gemm(rng: np.random.Generator) -> Iterator[Finding]:
    """y = x·(W + s·B·A)ᵀ + b, and its gradients, from BLAS's gemm on the merged weight."""
    spec, args, dy = drawn("lora_linear", rng)
    A, B, s, x = args["A"], args["B"], args["s"], args["x"].reshape(-1, args["x"].shape[-1])
    merged, dy2 = dgemm(s, B, A, beta=1.0, c=args["w"]), dy.reshape(-1, dy.shape[-1])
    y = dgemm(1.0, x, merged, trans_b=True) + args["b"]
    mag = np.abs(x) @ (np.abs(args["w"]) + s * np.abs(B) @ np.abs(A)).T + np.abs(args["b"])
    yield agree("lora_linear", "y", spec.forward(**args)[0].reshape(y.shape), y, mag)
    grads, dw = spec.vjp(dy, args), dgemm(1.0, dy2, x, trans_a=True)
    size = np.abs(dy2).T @ np.abs(x)
    dx = dgemm(1.0, dy2, merged)
    yield agree("lora_linear", "dx", grads["x"].reshape(dx.shape), dx, np.abs(dy2) @ np.abs(merged)
                + s * np.abs(dy2) @ np.abs(B) @ np.abs(A))  # fmt: skip
    dA, dB = dgemm(s, B, dw, trans_a=True), dgemm(s, dw, A, trans_b=True)
    yield agree("lora_linear", "dA", grads["A"], dA, s * np.abs(B).T @ size)
    yield agree("lora_linear", "dB", grads["B"], dB, s * size @ np.abs(A).T)
