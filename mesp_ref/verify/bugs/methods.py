"""Checkpoints, the ends of the model and MeZO gone wrong."""

from mesp_ref.verify.bugs.bug import bug, one

_PUSH = "step.checkpoints.push(x)"
_BLOCK = "x = block(x, layer, halves=step.halves, drop=EVERYTHING)[0]"

BUGS = [
    *one(
        "lean.activations:Checkpoints.pop", "method", "model",
        ("checkpoint: of the wrong block", "self._stack.pop()", "self._stack.pop(0)"),
    ),
    *one(
        "engine.methods:checkpointed_forward", "method", "model",
        ("checkpoint: pushed after its block",
         _PUSH + "\n        " + _BLOCK, _BLOCK + "\n        " + _PUSH),
    ),
    bug(
        "update before dx", "method", "model",
        ("engine.methods:head_and_loss", "ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), None",
         "None, None"),
        ("engine.methods:head_and_loss", "return loss, dx,",
         "return loss, ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps),"),
    ),
    *one(
        "engine.methods:head_and_loss", "backward", "model",
        ("final norm's backward skipped", "ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), None",
         "dn, None"),
    ),
    *one(
        "engine.methods:embed_bwd", "backward", "model",
        ("tied: head's gradient dropped", "dw if tied is None else dw + tied", "dw"),
        ("tied: lookup's gradient dropped", "dw if tied is None else dw + tied",
         "dw if tied is None else tied"),
    ),
    *one(
        "engine.mezo:mezo", "method", "mezo",
        ("mezo: over eps for 2·eps", "(2 * step.eps)", "step.eps"),
        ("mezo: sign", "up - down", "down - up"),
        ("mezo: sum for mean", " / len(losses)", ""),
        ("mezo: one slope for all seeds", "zip(losses, noise, strict=True)",
         "zip([losses[0]] * len(losses), noise, strict=True)"),
    ),
    *one(
        "engine.mezo:_two_sides", "method", "mezo",
        ("mezo: one-sided", "(step.eps, -step.eps)", "(step.eps, 0.0)"),
        ("mezo: not restored", "_perturb(step, seed, -at)", "pass"),
        ("mezo: restored twice", "_perturb(step, seed, -at)", "_perturb(step, seed, -2 * at)"),
    ),
    *one(
        "engine.mezo:_perturb", "method", "mezo",
        ("mezo: unseeded noise", "default_rng(seed)", "default_rng()"),
    ),
    *one(
        "engine.mezo:_add_noise", "method", "mezo",
        ("mezo: uniform noise", "rng.standard_normal(w.shape, dtype=w.dtype)",
         "rng.random(w.shape, dtype=w.dtype)"),
        ("mezo: the same noise for every tensor", "rng.standard_normal(w.shape",
         "np.random.default_rng(7).standard_normal(w.shape"),
    ),
    *one(
        "train.trainer:Trainer._accumulate", "method", "model",
        ("mean of means", "count / sum(counts)", "1 / len(counts)"),
    ),
]  # fmt: skip
