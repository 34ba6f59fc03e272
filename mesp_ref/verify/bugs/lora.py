"""Linear layers and LoRA gone wrong."""

from mesp_ref.verify.bugs.bug import one

BUGS = [
    *one(
        "ops.lora_linear:lora_linear", "forward", "lora_linear model",
        ("lora: scale missing", "(h * s) @ B.T", "h @ B.T"),
        ("lora: bias not added", "y += b[...]", "pass"),
    ),
    *one(
        "ops.lora_linear:lora_linear_bwd", "backward", "lora_linear model",
        ("lora: scale missing in dB", "dy2.T @ (h * s)", "dy2.T @ h"),
        ("lora: scale twice in dA", "dh.T @ x", "s * dh.T @ x"),
        ("lora: scale missing in dh", "dh = (dy2 @ B) * s", "dh = dy2 @ B"),
        ("lora: dx without the base", "dx = dy2 @ w[...]", "dx = 0 * (dy2 @ w[...])"),
        ("lora: dx without the adapter", "dx += dh @ A", "pass"),
        ("lora: dA from h for x", "dh.T @ x", "dh.T @ (h @ A)"),
    ),
    *one(
        "ops.lora_linear:lora_linear_bwd", "backward", "model",
        ("lora: stale h", "h = x @ A.T if res.h is None", "h = 0 * (x @ A.T) if res.h is None"),
        ("lora: h rebuilt with its scale", "x @ A.T if res.h", "s * x @ A.T if res.h"),
    ),
    *one(
        "ops.linear:linear_bwd_params", "backward", "linear lora_linear model",
        ("linear: bias gradient missing", "dy.sum(axis=0)", "np.zeros_like(b)"),
        ("linear: bias gradient averaged", "dy.sum(axis=0)", "dy.mean(axis=0)"),
        ("linear: dW negated", "return dy.T", "return -dy.T"),
    ),
    *one(
        "engine.adapter:Adapter.scale", "forward", "model",
        ("lora: alpha/√r", "math.sqrt(self.rank) if self.use_rslora else self.rank",
         "math.sqrt(self.rank)"),
        ("lora: alpha for alpha/r", " / (math.sqrt(self.rank) if self.use_rslora else self.rank)", ""),
    ),
]  # fmt: skip
