"""SwiGLU gone wrong."""

from mesp_ref.verify.bugs.bug import one

BUGS = [
    *one(
        "ops.swiglu:swiglu", "forward", "swiglu model",
        ("swiglu: gate and up exchanged", "silu = sigmoid(gate)",
         "gate, up = up, gate\n    silu = sigmoid(gate)"),
        ("swiglu: σ for silu", "silu *= gate", "pass"),
        ("swiglu: σ(1.702·x)", "sigmoid(gate)", "sigmoid(1.702 * gate)"),
    ),
    *one(
        "ops.swiglu:swiglu_bwd", "backward", "swiglu model",
        ("swiglu: second term missing", "dgate *= silu", "dgate *= 0"),
        ("swiglu: second term without gate", "dgate *= silu", "dgate *= sig"),
        ("swiglu: first term missing", "dgate += sig", "pass"),
        ("swiglu: up missing", "dgate *= res.up", "pass"),
        ("swiglu: σ for silu in dup", "(dz, silu, out=sig)", "(dz, sig, out=sig)"),
        ("swiglu: gradients exchanged", "return dgate, np.multiply(dz, silu, out=sig)",
         "return np.multiply(dz, silu, out=sig), dgate"),
        ("swiglu: 1 − σ as σ", "dgate *= silu", "dgate = sig * silu"),
    ),
    *one(
        "ops.swiglu:swiglu_bwd", "backward", "model",
        ("swiglu: rebuilt without gate", "np.multiply(res.gate, sig, out=spare) if", "sig if"),
    ),
]  # fmt: skip
