"""Checkpoints, the ends of the model and MeZO gone wrong."""

from mesp_ref.verify.bugs.bug import bug, one

BUGS = [
    *one(
        "checkpoints:RamCheckpoints.pop", "method", "model",
        ("checkpoint: of the wrong block", "self._stack.pop()", "self._stack.pop(0)"),
    ),
    *one(
        "methods:_checkpointed_forward", "method", "model",
        ("checkpoint: pushed after its block",
         "step.checkpoints.push(x)\n        x = block(x, layer)",
         "x = block(x, layer)\n        step.checkpoints.push(x)"),
    ),
    bug(
        "update before dx", "method", "model",
        ("methods:_head", "ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), None", "None, None"),
        ("methods:_head", "return loss, dx,",
         "return loss, ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps),"),
    ),
    *one(
        "methods:_head", "backward", "model",
        ("final norm's backward skipped", "ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), None",
         "dn, None"),
    ),
    *one(
        "methods:_embed_bwd", "backward", "model",
        ("tied: head's gradient dropped", "dw if tied is None else dw + tied", "dw"),
        ("tied: lookup's gradient dropped", "dw if tied is None else dw + tied",
         "dw if tied is None else tied"),
    ),
    *one(
        "methods:mezo", "method", "mezo",
        ("mezo: over eps for 2·eps", "(2 * step.eps)", "step.eps"),
        ("mezo: sign", "losses[0] - losses[1]", "losses[1] - losses[0]"),
        ("mezo: one-sided", "(step.eps, -step.eps)", "(step.eps, 0.0)"),
        ("mezo: not restored", "_perturb(step, -at)", "pass"),
        ("mezo: restored twice", "_perturb(step, -at)", "_perturb(step, -2 * at)"),
    ),
    *one(
        "methods:_noise", "method", "mezo",
        ("mezo: unseeded noise", "default_rng(step.seed)", "default_rng()"),
        ("mezo: uniform noise", "rng.standard_normal(array.shape, dtype=array.dtype)",
         "rng.random(array.shape, dtype=array.dtype)"),
        ("mezo: the same noise for every tensor", "rng.standard_normal(array.shape",
         "np.random.default_rng(step.seed).standard_normal(array.shape"),
    ),
    *one(
        "train.trainer:Trainer._accumulate", "method", "model",
        ("mean of means", "count / sum(counts)", "1 / len(counts)"),
    ),
]  # fmt: skip
