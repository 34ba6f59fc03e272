"""Wrong blocks, models and optimisers that were written before the namer was (see unseen_ops).

Torch's autograd, bent in one place; the sentences that would be right stand beside each.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from wrong_backends import Patch, bent, put, right_loss, right_norm, right_rope, through

from mesp_ref.golden.backends import torch as client
from mesp_ref.registry import attention, causal_softmax, cross_entropy, rmsnorm, rope

Tensor = torch.Tensor


def norm(forward: Callable[..., Tensor]) -> Patch:
    return lambda p: put(p, rmsnorm, forward)


def norm_back(backward: Callable[..., Tensor]) -> Patch:
    """backward(dy, x, w, r) -> dx; dw is left out."""

    def back(dy: Tensor, x: Tensor, w: Tensor, eps: float) -> Any:
        r = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        dw = (dy * x * r).flatten(0, 1).sum(0)
        return backward(dy, x, w, r), dw, None

    return lambda p: put(p, rmsnorm, bent(right_norm, back))


def project(layer: Callable[..., Tensor]) -> Patch:
    """layer(x, W, b, A, B, s, part)"""

    def patch(p: pytest.MonkeyPatch) -> None:
        def wrong(self: client.Step, w: Any, at: str, part: str, x: Tensor) -> Tensor:
            A, B = (w[f"{part}.lora_{c}.weight"] for c in "AB")
            self.keep(f"{at}{part}.h", F.linear(x, A))
            y = layer(x, w[f"{part}.weight"], w.get(f"{part}.bias"), A, B, self.s, part)
            return self.keep(f"{at}{part}", y)

        p.setattr(client.Step, "project", wrong)

    return patch


def usual(x: Tensor, w: Tensor, b: Any, A: Tensor, B: Tensor, s: float, part: str = "") -> Tensor:
    return F.linear(x, w, b) + s * F.linear(F.linear(x, A), B)


def scores(mask: Callable[[int, int], Tensor]) -> Patch:
    """mask(Tq, Tk): True where hidden."""

    def wrong(s: Tensor) -> Tensor:
        return s.masked_fill(mask(*s.shape[-2:]), -torch.inf).softmax(-1).nan_to_num(0.0)

    return lambda p: put(p, causal_softmax, wrong)


def seen_scale(f: Callable[[int], float]) -> Patch:
    def wrong(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        s = torch.einsum("nqhd,nkhd->nhqk", q, k) * f(q.shape[3])
        return causal_softmax.torch_twin(torch, s)

    return lambda p: put(p, attention, wrong, "torch_probabilities")


def angles(f: Callable[[dict[str, Any], Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        right = client.Step.__init__

        def init(self: client.Step, case: Any, cos: Tensor, sin: Tensor) -> None:
            right(self, case, *f(case.attributes["config"], cos, sin))

        p.setattr(client.Step, "__init__", init)

    return patch


def tables(theta: float, start: int = 0) -> Callable[..., Any]:
    def f(config: dict[str, Any], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[1]
        t = (start + torch.arange(len(cos), dtype=torch.float64))[:, None]
        turns = t * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        return turns.cos().to(cos.dtype), turns.sin().to(cos.dtype)

    return f


def silu(f: Callable[[Tensor], Tensor]) -> Patch:
    return lambda p: p.setattr(client.F, "silu", f)


class Parts(client.Step):
    """The block in pieces that can be bent."""

    how = ""

    def block(self, w: Any, x: Tensor, at: str = "", name: str = "y") -> Tensor:
        n = self.norm(f"{at}input_layernorm", x, w["input_layernorm.weight"])
        o = self.attention(w, at, n)
        o = o.detach() if self.how == "attention zeros" else o
        base = n if self.how == "post-norm" else x
        a = base + self.project(w, at, "self_attn.o_proj", o)
        a = self.keep(f"{at}after_attention", a)
        part = "post_attention_layernorm"
        source = x if self.how == "parallel" else a
        n2 = self.norm(f"{at}{part}", source, w[f"{part}.weight"])
        if self.how == "no second norm":
            n2 = self.keep(f"{at}{part}", a * 1)
        m = n2.detach() if self.how == "mlp zeros" else n2
        names = ("up", "gate") if self.how == "swapped" else ("gate", "up")
        gate, up = (self.project(w, at, f"mlp.{c}_proj", m) for c in names)
        act = self.keep(f"{at}mlp.swiglu.silu", F.silu(gate))
        z = self.keep(f"{at}mlp.swiglu", act * up)
        down = self.project(w, at, "mlp.down_proj", z)
        out = a + down
        if self.how == "residual twice":
            out = a + a + down
        if self.how == "residual lost":
            out = down
        if self.how == "layer 0 detached" and at.endswith("layers.0."):
            out = out.detach() + 0 * out
        return self.keep(name, out)


def part(how: str) -> Patch:
    return lambda p: p.setattr(client, "Step", type("Bent", (Parts,), {"how": how}))


def loss(f: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    return lambda p: put(p, cross_entropy, f)


def mean_of_means(z: Tensor, y: Tensor) -> Tensor:
    half = len(z) // 2
    return (right_loss(z[:half], y[:half]) + right_loss(z[half:], y[half:])) / 2


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-100, label_smoothing=0.1)


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    c = y != -100
    return right_loss(z, y) + 1e-2 * (torch.logsumexp(z[c], -1) ** 2).mean()


def padded(z: Tensor, y: Tensor) -> Tensor:
    return right_loss(torch.cat([z, z.new_zeros(len(z), 11)], 1), y)


def gradients(f: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Patch:
    """What is done to the LoRA gradients after a right backward."""

    def patch(p: pytest.MonkeyPatch) -> None:
        right = client.Step.results

        def wrong(self: client.Step, case: Any, leaves: Any) -> Any:
            found = right(self, case, leaves)
            ours = {n: t for n, t in found.items() if ".lora_" in n and n.endswith(".grad")}
            return found | f(ours)

        p.setattr(client.Step, "results", wrong)

    return patch


def clipped(g: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.sqrt(sum((t**2).sum() for t in g.values()))
    return {n: t / total for n, t in g.items()}


def each_clipped(g: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clamp(-0.1, 0.1) for n, t in g.items()}


def later(mask: Tensor) -> Tensor:
    return mask


def group_last(p: pytest.MonkeyPatch) -> None:
    """dk and dv of a group: the last query head overwrites."""

    def spread(x: Tensor, heads: int) -> Tensor:
        share = heads // x.shape[2]
        full = bent(
            lambda t: t.repeat_interleave(share, dim=2),
            lambda dy, t: dy.unflatten(2, (t.shape[2], -1))[:, :, :, -1],
        )
        return full(x)

    put(p, attention, lambda q, k: attention_p(q, spread(k, q.shape[2])), "torch_probabilities")
    put(p, attention, lambda a, v: attention_mix(a, spread(v, a.shape[1])), "torch_mix")


def attention_p(q: Tensor, k: Tensor) -> Tensor:
    s = torch.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[3] ** -0.5
    return causal_softmax.torch_twin(torch, s)


def attention_mix(a: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nhqk,nkhd->nqhd", a, v)


def tri(tq: int, tk: int, shift: int) -> Tensor:
    return ~torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq + shift)


def fixed_dropout(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return x * (torch.rand(x.shape, generator=g) > 0.1) / 0.9


def mlp_only(x: Tensor, w: Tensor, b: Any, A: Tensor, B: Tensor, s: float, part: str) -> Tensor:
    if "mlp" in part:
        return usual(x, w, b, A, B, s)
    return F.linear(x, w, b) + 0 * usual(x, 0 * w, None, A, B, s)


def rope_on(which: Callable[[Tensor], bool]) -> Patch:
    return lambda p: put(p, rope, lambda x, c, s: right_rope(x, c, s) if which(x) else x)


BLOCKS: dict[str, tuple[Patch, str]] = {
    "layernorm mean": (
        norm_back(
            lambda dy, x, w, r: (
                dy * w * r
                - (dy * w).mean(-1, keepdim=True) * r
                - x * (dy * w * x).mean(-1, keepdim=True) * r**3
            )
        ),
        "LayerNorm|mean term",
    ),
    "n4": (
        norm_back(lambda dy, x, w, r: dy * w * r - x * (dy * w * x).mean(-1, keepdim=True) * r**4),
        "n⁴|power",
    ),
    "layernorm": (
        norm(lambda x, w, e: F.layer_norm(x, (x.shape[-1],), w, None, e)),
        "LayerNorm|mean (is )?subtracted",
    ),
    "one plus": (norm(lambda x, w, e: right_norm(x, 1 + w, e)), r"1 ?\+ ?w|Gemma"),
    "no eps": (norm(lambda x, w, e: right_norm(x, w, 0.0)), "eps"),
    "norm by channels of 32": (
        norm(lambda x, w, e: w * x / torch.sqrt((x * x).sum(-1, keepdim=True) / 32 + e)),
        "padded|channels|divi",
    ),
    "cross term sign": (
        norm_back(lambda dy, x, w, r: dy * w * r + x * (dy * w * x).mean(-1, keepdim=True) * r**3),
        "sign",
    ),
    "attention zeros": (part("attention zeros"), "zero|× 0|does not arrive"),
    "mlp zeros": (part("mlp zeros"), "MLP"),
    "post-norm": (part("post-norm"), "residual|norm"),
    "parallel": (part("parallel"), "parallel|not a mistake"),
    "no second norm": (part("no second norm"), "norm"),
    "gate and up swapped": (part("swapped"), "swap|exchang|gate and up"),
    "residual twice": (part("residual twice"), "residual"),
    "residual lost": (part("residual lost"), "residual"),
    "gelu": (silu(lambda x: F.gelu(x, approximate="tanh")), "GELU|gelu"),
    "relu": (silu(F.relu), "ReLU|relu"),
    "sigmoid": (silu(torch.sigmoid), "σ|sigmoid|GLU"),
    "theta 10000": (angles(tables(10000.0)), "theta"),
    "positions from 1": (angles(tables(100.0, 1)), "position"),
    "sign of sin": (angles(lambda c, a, b: (a, -b)), "sign|other way|direction|backwards"),
    "q only": (rope_on(lambda x: x.shape[2] == 4), "key|k_rope|k "),
    "k only": (rope_on(lambda x: x.shape[2] == 2), "quer|q_rope|q "),
    "no biases": (
        project(
            lambda x, w, b, A, B, s, p: usual(x, w, None, A, B, s) + (0 if b is None else 0 * b)
        ),
        "bias",
    ),
    "no v bias": (
        project(
            lambda x, w, b, A, B, s, p: (
                usual(x, w, b, A, B, s) - (b.detach() if "v_proj" in p else 0)
            )
        ),
        "bias",
    ),
    "sees the next": (
        scores(lambda q, k: tri(q, k, 1)),
        "future|one (key|token|position)|mask|off by one",
    ),
    "window of 2": (scores(lambda q, k: tri(q, k, 0) | ~tri(q, k, -2)), "window"),
    "scale by hidden": (seen_scale(lambda d: 16**-0.5), "scale|√"),
    "scale 1/D": (seen_scale(lambda d: 1 / d), "scale|1/D"),
    "no scale": (seen_scale(lambda d: 1.0), "scale|√"),
    "group last": (group_last, "last|overwrit|one query head|only"),
    "dropout left on": (
        project(
            lambda x, w, b, A, B, s, p: (
                F.linear(x, w, b) + s * F.linear(F.linear(fixed_dropout(x), A), B)
            )
        ),
        "dropout|not a mistake",
    ),
    "scale twice": (
        project(lambda x, w, b, A, B, s, p: usual(x, w, b, A, B, s * s)),
        "twice|s²|squared",
    ),
    "adapters on the MLP only": (project(mlp_only), "adapter|LoRA|without"),
    "bias scaled": (
        project(
            lambda x, w, b, A, B, s, p: usual(x, w, b, A, B, s) + (0 if b is None else (s - 1) * b)
        ),
        "bias",
    ),
    "clipped": (gradients(clipped), "factor|norm|clip|all LoRA gradients ×"),
    "clipped by value": (gradients(each_clipped), "clip|not a mistake"),
    "accumulated twice": (gradients(lambda g: {n: 2 * t for n, t in g.items()}), "× 2|twice"),
    "A as [in, R]": (
        gradients(lambda g: {n: t.T.reshape(t.shape) for n, t in g.items() if "lora_A" in n}),
        "column|transpos",
    ),
    "q and k exchanged": (
        gradients(
            lambda g: {n: g[n.replace("gate_proj", "up_proj")] for n in g if "gate_proj" in n}
        ),
        "holds",
    ),
    "softmax over queries back": (
        lambda p: put(
            p,
            causal_softmax,
            bent(
                lambda s: causal_softmax_right(s),
                lambda dy, s: (lambda a: a * (dy - (dy * a).sum(-2, keepdim=True)))(
                    causal_softmax_right(s)
                ),
            ),
        ),
        "axis|quer|column|not a mistake",
    ),
    "slope sign": (
        lambda p: p.setattr(
            client.F,
            "silu",
            bent(
                torch.ops.aten.silu,
                lambda dy, x: dy * (torch.sigmoid(x) - x * torch.sigmoid(x) * torch.sigmoid(-x)),
            ),
        ),
        "sign",
    ),
}


def causal_softmax_right(s: Tensor) -> Tensor:
    return s.masked_fill(tri(*s.shape[-2:], 0), -torch.inf).softmax(-1)


LOSSES: dict[str, tuple[Patch, str]] = {
    "mean of means": (loss(mean_of_means), "mean of"),
    "smoothing": (loss(smoothed), "smooth"),
    "z-loss": (loss(z_loss), "z.loss|lse²"),
    "padded vocabulary": (loss(padded), "padd|vocabulary"),
    "over all tokens": (
        loss(lambda z, y: F.cross_entropy(z, y, ignore_index=-100, reduction="sum") / len(y)),
        "all (tokens|rows|labels|positions)|ignored",
    ),
    "over all with the last": (
        loss(lambda z, y: F.cross_entropy(z, y, ignore_index=-100, reduction="sum") / 14),
        "all (tokens|rows|labels|positions)|ignored",
    ),
    "shifted twice": (loss(lambda z, y: right_loss(z[:-1], y[1:])), "shift"),
    "gradient of a sum": (
        loss(
            bent(
                right_loss,
                lambda dy, z, y: (
                    through(lambda a: F.cross_entropy(a, y, ignore_index=-100, reduction="sum"), z)(
                        dy
                    )[0],
                    None,
                ),
            )
        ),
        "sum|count|label|×",
    ),
    "second layer detached": (part("layer 0 detached"), "layer|does not arrive|zero"),
    "base 2": (loss(lambda z, y: right_loss(z, y) / 0.6931471805599453), "log|base|1.44"),
    "head in other rows": (
        loss(lambda z, y: right_loss(z, torch.where(y >= 0, (y + 1) % 21, y))),
        "label",
    ),
}


# -- optimisers: (w, g, state, t, at) -> w, in NumPy or torch alike ---------------------------------


def adam(
    w: Any,
    g: Any,
    c: dict[str, Any],
    t: int,
    at: Any,
    *,
    betas: Any = None,
    correct: str = "mv",
    eps: str = "outside",
    decay: str = "decoupled",
    late: int = 0,
) -> Any:
    b1, b2 = betas or (at["beta1"], at["beta2"])
    t += late
    lr, wd = at["lr"], at["weight_decay"]
    if decay == "l2":
        g = g + wd * w
    if decay == "decoupled":
        w = w * (1 - lr * wd)
    if decay == "without lr":
        w = w * (1 - wd)
    m = c["m"] = b1 * c.get("m", 0) + (1 - b1) * g
    v = c["v"] = b2 * c.get("v", 0) + (1 - b2) * g * g
    m = m / (1 - b1**t) if "m" in correct and t else m
    v_hat = v / (1 - b2**t) if "v" in correct and t else v
    root = (v_hat + at["eps"]) ** 0.5 if eps == "inside" else v_hat**0.5 + at["eps"]
    if eps == "before correction":
        root = (v**0.5 + at["eps"]) / (1 - b2**t) ** 0.5
    w = w - lr * m / root
    if decay == "after":
        w = w * (1 - lr * wd)
    return w


def sgd(
    w: Any,
    g: Any,
    c: dict[str, Any],
    t: int,
    at: Any,
    *,
    damp: float = 0,
    nesterov: bool = False,
    momentum: Any = None,
    decay: bool = True,
    inside: bool = False,
) -> Any:
    mu = at["momentum"] if momentum is None else momentum
    g = g + at["weight_decay"] * w if decay else g
    u = c["u"] = mu * c.get("u", 0) + (1 - damp) * g * (at["lr"] if inside else 1)
    step = g + mu * u if nesterov else u
    return w - step * (1 if inside else at["lr"])


def with_(f: Any, **how: Any) -> Any:
    return lambda *args: f(*args, **how)


OPTIMISERS: dict[str, dict[str, tuple[Any, str]]] = {
    "adamw": {
        "no correction": (with_(adam, correct=""), "bias correction"),
        "m only": (with_(adam, correct="m"), "bias correction|v̂|second moment"),
        "l2": (with_(adam, decay="l2"), "decoupled|L2|decay"),
        "no decay": (with_(adam, decay=""), "decay"),
        "decay without lr": (with_(adam, decay="without lr"), "decay"),
        "betas swapped": (with_(adam, betas=(0.999, 0.9)), "beta"),
        "beta2 0.95": (with_(adam, betas=(0.9, 0.95)), "beta"),
        "beta2 0.99": (with_(adam, betas=(0.9, 0.99)), "beta"),
        "t from 2": (with_(adam, late=1), "step|t |counts"),
        "maximise": (lambda w, g, c, t, at: adam(w, -g, c, t, at), "sign|ascen|\\+"),
        "sgd": (lambda w, g, c, t, at: w - at["lr"] * g, "SGD|not a mistake"),
        "eps 1e-3": (lambda w, g, c, t, at: adam(w, g, c, t, {**at, "eps": 1e-3}), "eps"),
        "eps inside": (
            lambda w, g, c, t, at: adam(w, g, c, t, {**at, "eps": 1e-8}, eps="inside"),
            "eps",
        ),
        "no m": (with_(adam, betas=(0.0, 0.999)), "beta|momentum|first moment"),
    },
    "sgd": {
        "damped": (with_(sgd, damp=0.9), "damp|1 ?− ?momentum|1 - momentum"),
        "nesterov": (with_(sgd, nesterov=True), "Nesterov"),
        "no momentum": (with_(sgd, momentum=0.0), "momentum"),
        "no decay": (with_(sgd, decay=False), "decay"),
        "gradients pile up": (
            lambda w, g, c, t, at: sgd(w, pile(c, g), c, t, at),
            "accumulat|zero|pile|reset",
        ),
        "lr twice": (
            lambda w, g, c, t, at: sgd(w, g, c, t, {**at, "lr": 0.1}),
            "lr|learning rate|step|× 2",
        ),
        "decay outside": (
            lambda w, g, c, t, at: sgd(
                w * (1 - at["lr"] * at["weight_decay"]), g, c, t, at, decay=False
            ),
            "decay",
        ),
        "ascent": (lambda w, g, c, t, at: sgd(w, -g, c, t, at), "sign|ascen"),
    },
}


def pile(c: dict[str, Any], g: Any) -> Any:
    c["pile"] = c.get("pile", 0) + g
    return c["pile"]


def trajectory(rule: Any) -> Patch:
    """Another rule in the place of torch.optim."""

    def patch(p: pytest.MonkeyPatch) -> None:
        def compute(case: Any, given: Any, root: Any, dtype: Any) -> Any:
            leaves, names = client.leaves_of(case, root, dtype)
            states: dict[str, dict[str, Any]] = {n: {} for n in names}
            losses, found = [], {}
            for t in range(1, case.attributes["steps"] + 1):
                step = client.run_model(case, leaves, given, dtype)
                losses.append(step.seen["loss"].detach())
                grads = torch.autograd.grad(step.seen["loss"], [leaves[n] for n in names])
                for n, g in zip(names, grads, strict=True):
                    with torch.no_grad():
                        new = rule(leaves[n], g, states[n], t, case.attributes)
                    leaves[n] = new.detach().requires_grad_()
                    found[f"{n}.step_{t}"] = new.detach().clone()
            wanted = {tensor.name for tensor in case.tensors}
            return {"loss": torch.stack(losses)} | {n: w for n, w in found.items() if n in wanted}

        p.setattr(client, "compute_trajectory", compute)

    return patch


def mezo(f: Any) -> Patch:
    return lambda p: p.setattr(client, "mezo_step", f)


def mezo_with(
    divide: float = 2.0, sign: float = 1.0, shown: str = "mean", restore: float = 1.0
) -> Any:
    def step(weights: Any, given: Any, number: int, at: Any, value: Any) -> Tensor:
        z = {n: given[f"z/{n}"][number] for n in weights}
        up, down = (
            value({n: w + m * z[n] for n, w in weights.items()}) for m in (at["eps"], -at["eps"])
        )
        g = sign * (up - down) / (divide * at["eps"])
        for n, w in weights.items():
            w -= at["lr"] * g * z[n]
            w -= (1 - restore) * at["eps"] * z[n]
        return (up + down) / 2 if shown == "mean" else up

    return step


MEZO: dict[str, tuple[Patch, str]] = {
    "over eps": (mezo(mezo_with(divide=1.0)), "2·eps|eps|× 2"),
    "ascent": (mezo(mezo_with(sign=-1.0)), "sign"),
    "loss of the first side": (mezo(mezo_with(shown="up")), "not a mistake|loss"),
    "not restored": (mezo(mezo_with(restore=0.0)), "restor"),
}
