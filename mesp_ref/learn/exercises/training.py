"""Exercise: one training step, clipping and AdamW by hand."""

import math
from collections.abc import Callable

import numpy as np

from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs, Wrong, named_outputs
from mesp_ref.ops import Array
from mesp_ref.registry import Args


def training_step(
    w: Array,
    m: Array,
    v: Array,
    t: int,
    gradient: Callable[[Array], Array],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> tuple[Array, Array, Array]:
    """One step: gradient at w, clipped by its norm, then AdamW.

    Step      g = gradient(w);  g ← g·max_norm/|g| where |g| > max_norm;
              m ← β₁·m + (1 − β₁)·g;  v ← β₂·v + (1 − β₂)·g²;  m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ);
              w ← (1 − lr·weight_decay)·w − lr·m̂/(√v̂ + eps)
    Shapes    w, m, v of one shape; t = 1, 2, … is the number of this step -> new w, m, v
    Source    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2; Pascanu et al. 2013
    """
    g = gradient(w)
    norm = math.sqrt(float((g * g).sum()))
    if norm > max_norm:
        g = g * (max_norm / norm)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def _case(name: str, note: str, shape: tuple[int, ...], t: int, max_norm: float, size: float = 1.0) -> Case:  # fmt: skip
    def draw(rng: np.random.Generator) -> Args:
        w, slope = rng.standard_normal((2, *shape))
        m = 0.3 * rng.standard_normal(shape) if t > 1 else np.zeros(shape)
        v = 0.2 * rng.random(shape) if t > 1 else np.zeros(shape)

        def gradient(w: Array) -> Array:
            found: Array = size * (np.sin(w) + slope)
            return found

        return {
            "w": w, "m": m, "v": v, "t": t, "gradient": gradient, "lr": 0.13, "beta1": 0.8, "beta2": 0.95,
            "eps": 0.05, "weight_decay": 0.4, "max_norm": max_norm,
        }  # fmt: skip

    return Case(name, note, draw)


_CASES = (
    _case("first step", "t = 1, m and v are 0, nothing to clip", (3,), 1, 100.0),
    _case("later", "t = 4, nothing to clip", (2, 5), 4, 6.0),
    _case("clipped", "t = 3, |g| > max_norm", (4, 3), 3, 0.7),
    _case("large", "t = 2, gradients of thousands, clipped", (6,), 2, 3.0, 2000.0),
)


def _clipped(g: Given, grad: Array, m: Wrong) -> Array:
    norm, most = float(np.sqrt((grad * grad).sum())), g.max_norm
    over = norm > most
    found: Array = m.pick(
        grad * (most / norm) if over else grad, not_clipped=grad, always_scaled=grad * (most / norm),
        by_entry=np.clip(grad, -most, most), to_unit=grad / norm if over else grad,
        by_square=grad * (most / norm**2) if over else grad,
        by_mean=_to(grad, most, math.sqrt(float((grad * grad).mean()))), by_sum=_to(grad, most, float(np.abs(grad).sum())),
        by_largest=_to(grad, most, float(np.abs(grad).max())), not_rooted=_to(grad, most, norm * norm),
        upside_down=grad * (norm / most) if over else grad,
    )  # fmt: skip
    return found


def _to(grad: Array, most: float, size: float) -> Array:
    return grad * (most / size) if size > most else grad


def _moments(g: Given, grad: Array, m: Wrong) -> tuple[Array, Array]:
    b1, b2 = m.pick(
        (g.beta1, g.beta2), betas_exchanged=(g.beta2, g.beta1), beta1_twice=(g.beta1, g.beta1)
    )
    mean = m.pick(
        b1 * g.m + (1 - b1) * grad, m_weights_exchanged=(1 - b1) * g.m + b1 * grad, m_undamped=b1 * g.m + grad,
        m_is_g=grad, m_of_old=b1 * g.m + (1 - b1) * g.m, m_not_decayed=g.m + (1 - b1) * grad,
    )  # fmt: skip
    square = m.pick(
        b2 * g.v + (1 - b2) * grad * grad, v_of_g=b2 * g.v + (1 - b2) * grad, v_weights_exchanged=(1 - b2) * g.v + b2 * grad * grad,
        v_undamped=b2 * g.v + grad * grad, v_of_size=b2 * g.v + (1 - b2) * np.abs(grad), v_of_m=b2 * g.v + (1 - b2) * mean * mean,
        v_not_decayed=g.v + (1 - b2) * grad * grad, v_is_g2=grad * grad, v_of_mean=b2 * g.v + (1 - b2) * (grad * grad).mean(),
    )  # fmt: skip
    return mean, square


def adam(g: Given, grad: Array, m: Wrong) -> tuple[Array, ...]:
    """m, v, both without their bias, and what m is divided by."""
    mean, square = _moments(g, grad, m)
    t = m.pick(g.t, t_late=g.t + 1, t_early=g.t - 1 or np.inf, t_times=1)
    m_hat = m.pick(
        mean / (1 - g.beta1**t), m_uncorrected=mean, neither_corrected=mean, m_of_beta2=mean / (1 - g.beta2**t),
        g_for_m=grad, corrected_by_t=mean / (1 - g.beta1 * t), m_power_outside=mean / (1 - g.beta1) ** t, m_multiplied=mean * (1 - g.beta1**t),
    )  # fmt: skip
    v_hat = m.pick(square / (1 - g.beta2**t), v_uncorrected=square, v_of_beta1=square / (1 - g.beta1**t),
                   v_corrected_by_t=square / (1 - g.beta2 * t), v_power_outside=square / (1 - g.beta2) ** t, v_multiplied=square * (1 - g.beta2**t))  # fmt: skip
    v_hat = square if "neither_corrected" in m.keys else v_hat
    root = m.pick(
        np.sqrt(v_hat) + g.eps, eps_inside=np.sqrt(v_hat + g.eps), no_eps=np.sqrt(v_hat), no_root=v_hat + g.eps,
        eps_squared=np.sqrt(v_hat + g.eps**2), no_v=1.0, eps_before_correction=(np.sqrt(square) + g.eps) / np.sqrt(1 - g.beta2**g.t),
    )  # fmt: skip
    return mean, square, m_hat, v_hat, root


def _step(g: Given, m: Wrong) -> Outputs:
    grad = m.pick(
        g.gradient(g.w), gradient_at_decayed=g.gradient(g.w * (1 - g.lr * g.weight_decay))
    )
    coupled = g.weight_decay * g.w
    grad = m.pick(grad, decay_in_gradient=grad + coupled, decay_in_both=grad + coupled)
    grad = _clipped(g, grad, m)
    grad = m.pick(grad, decay_after_clipping=grad + coupled)
    mean, square, m_hat, v_hat, root = adam(g, grad, m)
    move = g.lr * m_hat / root
    decay = 0 * g.w if m.keys & {"decay_in_gradient", "decay_after_clipping"} else g.lr * coupled
    decay = m.pick(decay, no_decay=0 * g.w, decay_without_lr=coupled, decay_added=-g.lr * coupled, decay_twice=2 * g.lr * coupled,
                   decay_constant=g.lr * g.weight_decay + 0 * g.w, decay_of_sign=g.lr * g.weight_decay * np.sign(g.w), decay_after=g.lr * g.weight_decay * (g.w - move))  # fmt: skip
    w = m.pick(
        g.w - decay - move, uphill=g.w - decay + move, eps_behind=g.w - decay - g.lr * m_hat / np.sqrt(v_hat) + g.eps, rate_over_root_t=g.w - decay - move / np.sqrt(g.t), rate_over_t=g.w - decay - move / g.t, no_lr=g.w - decay - m_hat / root, not_moved=g.w - decay,
        w_unchanged=g.w, move_alone=-move, plain_sgd=g.w - decay - g.lr * grad,
    )  # fmt: skip
    return m.pick(
        {"w": w, "m": mean, "v": square}, hats_returned={"w": w, "m": m_hat, "v": v_hat},
        exchanged={"w": w, "m": square, "v": mean},
    )  # fmt: skip


def _numbers(g: Given) -> dict[str, float]:
    return {"lr": g.lr, "β₁": g.beta1, "β₂": g.beta2, "1 − β₁": 1 - g.beta1, "1 − β₂": 1 - g.beta2, "eps": g.eps,
            "size of w": g.w.size, "t": g.t}  # fmt: skip


TRAINING = Exercise(
    name="training_step",
    title="one training step: clip, AdamW, decay",
    function=training_step,
    about=(training_step,),
    named=named_outputs(("w", "m", "v")),
    cases=_CASES,
    formula=_step,
    numbers=_numbers,
    aliases=("training", "step", "adam", "adamw"),
    extra=lambda g: {"the gradient": g.gradient(g.w)},
    given=(
        "gradient(w)  the gradient of the loss at w;  m, v  what the last step left, 0 before the first\n"
        "Return the new w, m and v; w, m and v themselves stay as they are."
    ),
    hints=(
        "Four things in this order: clip the whole gradient, update m and v, correct their bias, move w.",
        "m and v start at 0, so they are too small at first: by 1 − βᵗ. Decay does not go through m and v.",
    ),
    mistakes={
        "gradient_at_decayed": "the gradient is taken at the decayed weights: it is taken at w as it came.",
        "decay_in_gradient": "the weight decay is added to the gradient (L2, coupled); AdamW decays the weights themselves.",
        "decay_in_both": "the weight decay is added to the gradient as well as to the weights: only the weights decay.",
        "decay_after_clipping": "the weight decay is added to the clipped gradient (L2, coupled); AdamW decays the weights themselves.",
        "not_clipped": "the gradient is not clipped.",
        "always_scaled": "the gradient is scaled to max_norm even where it is smaller: clip only where |g| > max_norm.",
        "by_entry": "the gradient is clipped entry by entry: the whole is scaled by its norm.",
        "to_unit": "a gradient that is too large is clipped to norm 1 instead of max_norm.",
        "by_square": "clipping divides by the square of the norm.",
        "not_rooted": "clipping compares with the squared norm: its square root is missing.",
        "by_mean": "clipping takes the root of the mean square for the norm: the root of the sum.",
        "by_sum": "clipping takes the sum of |g| for the norm: the root of the sum of squares.",
        "by_largest": "clipping takes the largest entry for the norm: the root of the sum of squares.",
        "upside_down": "clipping multiplies by |g|/max_norm where max_norm/|g| belongs.",
        "betas_exchanged": "β₁ and β₂ are exchanged in m and v.",
        "beta1_twice": "v is decayed with β₁ where β₂ belongs.",
        "m_weights_exchanged": "in m, β₁ and 1 − β₁ are exchanged.",
        "m_undamped": "in m the gradient lacks its factor 1 − β₁.",
        "m_is_g": "m is the gradient itself: the momentum of earlier steps is missing.",
        "m_of_old": "the gradient does not enter m.",
        "m_not_decayed": "in m the old value lacks its factor β₁.",
        "v_of_g": "v is formed with g where g² belongs: the square is missing.",
        "v_of_size": "v is formed with |g| where g² belongs.",
        "v_of_m": "v is formed with m² where g² belongs.",
        "v_of_mean": "v takes the mean of g² over all entries: each entry has its own.",
        "v_weights_exchanged": "in v, β₂ and 1 − β₂ are exchanged.",
        "v_undamped": "in v the squared gradient lacks its factor 1 − β₂.",
        "v_not_decayed": "in v the old value lacks its factor β₂.",
        "v_is_g2": "v is g² itself: that of earlier steps is missing.",
        "t_late": "the bias correction is a step late: t + 1 where t belongs (t = 1 at the first step).",
        "t_early": "the bias correction is a step early: t − 1 where t belongs (t = 1 at the first step).",
        "t_times": "the bias correction is always that of the first step: 1 − β where 1 − βᵗ belongs.",
        "m_uncorrected": "the bias correction of m (the first moment) is missing.",
        "v_uncorrected": "the bias correction of v (the second moment) is missing.",
        "neither_corrected": "the bias correction of m and v is missing.",
        "m_of_beta2": "the bias correction of m is taken with β₂.",
        "v_of_beta1": "the bias correction of v is taken with β₁.",
        "corrected_by_t": "the bias correction of m is 1 − β₁·t where 1 − β₁ᵗ belongs.",
        "v_corrected_by_t": "the bias correction of v is 1 − β₂·t where 1 − β₂ᵗ belongs.",
        "m_power_outside": "the bias correction of m is (1 − β₁)ᵗ where 1 − β₁ᵗ belongs.",
        "v_power_outside": "the bias correction of v is (1 − β₂)ᵗ where 1 − β₂ᵗ belongs.",
        "m_multiplied": "m is multiplied by 1 − β₁ᵗ where it must be divided: the bias correction is upside down.",
        "v_multiplied": "v is multiplied by 1 − β₂ᵗ where it must be divided: the bias correction is upside down.",
        "g_for_m": "w is moved by the gradient itself where m̂, the momentum, belongs.",
        "eps_inside": "eps is inside the root: √v̂ + eps.",
        "eps_squared": "eps² is inside the root: √v̂ + eps.",
        "eps_before_correction": "eps is added before the bias correction of v: √v̂ + eps with v̂ corrected.",
        "no_eps": "eps is missing.",
        "no_root": "the square root of v̂ is missing.",
        "no_v": "the division by √v̂ + eps is missing.",
        "no_decay": "the weight decay is missing.",
        "decay_without_lr": "the weight decay lacks the factor lr.",
        "decay_added": "the weight decay has the wrong sign: it makes the weights larger.",
        "decay_twice": "the weight decay is applied twice.",
        "decay_constant": "the weight decay lacks the factor w: each weight shrinks by its own size.",
        "decay_of_sign": "the weight decay takes the sign of w where w belongs.",
        "decay_after": "the weight decay is taken of the weights after the step: of those before it.",
        "uphill": "the step goes uphill: the sign is wrong, w − lr·m̂/(√v̂ + eps).",
        "eps_behind": "eps is added to the step, not to √v̂: brackets are missing in m̂/(√v̂ + eps).",
        "rate_over_root_t": "the step is divided by √t: the learning rate is lr as it is given.",
        "rate_over_t": "the step is divided by t: the learning rate is lr as it is given.",
        "no_lr": "the step lacks the factor lr.",
        "not_moved": "w only decays: the step along m̂ is missing.",
        "w_unchanged": "w is not updated.",
        "move_alone": "only the change is returned: w itself is missing in the new w.",
        "plain_sgd": "w moves along the gradient, as in SGD: m̂/(√v̂ + eps) belongs there.",
        "hats_returned": "m̂ and v̂ are returned: the next step needs m and v as they are, without the bias correction.",
        "exchanged": "m and v are exchanged when they are returned (wrong order).",
    },
)  # fmt: skip


def adamw_step(
    w: Array,
    m: Array,
    v: Array,
    g: Array,
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Array, Array, Array]:
    """One step of AdamW without decay.

    Step      m ← β₁·m + (1 − β₁)·g;  v ← β₂·v + (1 − β₂)·g²;  m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ);
              w ← w − lr·m̂/(√v̂ + eps)
    Shapes    w, m, v, g of one shape; t = 1, 2, … is the number of this step -> new w, m, v
    Source    Kingma & Ba 2015, algorithm 1
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def _gradient_case(case: Case) -> Case:
    """A case of the whole step with its gradient, for a step that is handed one."""

    def draw(rng: np.random.Generator) -> Args:
        args = case.draw(rng)
        args |= {"g": args["gradient"](args["w"])}
        return {
            name: args[name] for name in ("w", "m", "v", "g", "t", "lr", "beta1", "beta2", "eps")
        }

    return Case(
        case.name, case.note.replace(", clipped", "").replace(", nothing to clip", ""), draw
    )


def _adamw(g: Given, m: Wrong) -> Outputs:
    mean, square, m_hat, v_hat, root = adam(g, g.g, m)
    move = g.lr * m_hat / root
    w = m.pick(
        g.w - move, uphill=g.w + move, no_lr=g.w - m_hat / root, w_unchanged=g.w, move_alone=-move, plain_sgd=g.w - g.lr * g.g,
        eps_behind=g.w - g.lr * m_hat / np.sqrt(v_hat) + g.eps, rate_over_root_t=g.w - move / np.sqrt(g.t), rate_over_t=g.w - move / g.t,
    )  # fmt: skip
    found: Outputs = m.pick(
        {"w": w, "m": mean, "v": square}, hats_returned={"w": w, "m": m_hat, "v": v_hat},
        exchanged={"w": w, "m": square, "v": mean},
    )  # fmt: skip
    return found


_CLIPS = {"gradient_at_decayed", "not_clipped", "always_scaled", "by_entry", "to_unit", "by_square", "not_rooted",
          "by_mean", "by_sum", "by_largest", "upside_down", "not_moved"}  # fmt: skip
ADAMW = Exercise(
    name="adamw_step",
    title="one step of AdamW, without clipping or decay",
    function=adamw_step,
    about=(adamw_step,),
    named=named_outputs(("w", "m", "v")),
    cases=tuple(_gradient_case(case) for case in (*_CASES[:2], _CASES[3])),
    formula=_adamw,
    numbers=_numbers,
    given="m, v  what the last step left, 0 before the first.  Return the new w, m and v.",
    hints=(
        "Update m and v, take their bias away, move w.",
        "m and v start at 0, so they are too small at first: by 1 − βᵗ.",
    ),
    mistakes={
        key: text
        for key, text in TRAINING.mistakes.items()
        if key not in _CLIPS and "decay" not in key.replace("not_decayed", "")
    },
)
