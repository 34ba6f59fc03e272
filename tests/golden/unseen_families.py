"""Wrong fused ops, masks, blocks and models of families, written before the namer knew of any of them.

Torch's autograd, bent in one place; the sentences that would be right stand beside each. Every second
row is held out, as in unseen_ops; `score` counts what is rejected, named rightly, and named wrongly.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wrong_backends import Patch, bent, put, right_norm, right_rope

from mesp_ref.golden.backends import torch as client
from mesp_ref.golden.check import judge
from mesp_ref.golden.explain import explain
from mesp_ref.golden.suite import Suite
from mesp_ref.registry import attention, causal_softmax, rmsnorm, rope

Tensor, Step = torch.Tensor, client.Step
Row = tuple[str, str, Any, str]

# -- ops: f(v, at) -> y, or a dictionary that also holds gradients to be put in place ---------------


def tri(t: int, shift: int = 0) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril(shift)


def ago(t: int) -> Tensor:
    return torch.arange(t)[:, None] - torch.arange(t)


def documents(v: Any, slack: int = 0) -> Tensor:
    """[N, 1, T, T]: keys of the query's document."""
    t = v["q"].shape[1]
    if "positions" not in v:
        return torch.ones(1, 1, t, t, dtype=torch.bool)
    return (ago(t) <= v["positions"][:, None, :, None] + slack) | torch.zeros(1, 1, t, t).bool()


def within(at: Any, t: int, more: int = 0) -> Tensor:
    return ago(t) < at["window"] + more if "window" in at else torch.ones(t, t, dtype=torch.bool)


def attend(
    v: Any, at: Any, seen: Tensor, scale: float | None = None, fill: float = -torch.inf,
    after: bool = False,
) -> Tensor:  # fmt: skip
    q, share = v["q"], v["q"].shape[2] // v["k"].shape[2]
    k, w = (v[n].repeat_interleave(share, dim=2) for n in "kv")
    s = torch.einsum("nqhd,nkhd->nhqk", q, k) * (scale or at.get("scale", q.shape[3] ** -0.5))
    p = s.masked_fill(~tri(s.shape[-1]), -torch.inf) if after else s.masked_fill(~seen, fill)
    p = p.softmax(-1)
    p = p * seen if after else p
    return torch.einsum("nhqk,nkhd->nqhd", p, w)


def both(v: Any, at: Any) -> Tensor:
    return tri(v["q"].shape[1]) & within(at, v["q"].shape[1]) & documents(v)


def parts_of(v: Any, at: Any, which: int) -> Any:
    """dk and dv of the first or the last document's queries only."""
    t = v["q"].shape[1]
    number = (v["positions"] == 0).cumsum(1)
    chosen = number == (number[:, -1:] if which else number[:, :1])
    right = attend(v, at, both(v, at))
    found: dict[str, Any] = {"y": right}
    dk, dv = torch.autograd.grad(
        attend(v, at, both(v, at)), [v["k"], v["v"]], v["dy"] * chosen[:, :, None, None]
    )
    assert t == chosen.shape[1]
    return found | {"dk": dk, "dv": dv}


MASKED: list[Row] = [
    ("window one more", "window window_scaled",
     lambda v, at: attend(v, at, tri(7) & within(at, 7, 1)), "window"),
    ("window one less", "window window_scaled",
     lambda v, at: attend(v, at, tri(7) & within(at, 7, -1)), "window"),
    ("window ignored", "window window_scaled", lambda v, at: attend(v, at, tri(7)), "window"),
    ("documents ignored", "documents documents_in_a_window",
     lambda v, at: attend(v, at, tri(7) & within(at, 7)), "document|packed"),
    ("a key of the document before", "documents one_document",
     lambda v, at: attend(v, at, tri(7) & documents(v, 1)), "document"),
    ("sees the document only from its second token", "documents",
     lambda v, at: attend(
         v, at, tri(7) & documents(v) & ((v["positions"] > 0)[:, None, None] | (ago(7) == 0))),
     "document|first"),
    ("window both ways", "window",
     lambda v, at: attend(v, at, ago(7).abs() < at["window"]), "future|mask|causal|both"),
    ("no causal mask in documents", "documents",
     lambda v, at: attend(
         v, at, documents(v) & ((v["positions"] == 0).cumsum(1)[:, None, :, None]
                                == (v["positions"] == 0).cumsum(1)[:, None, None, :])),
     "causal|mask|future"),
    ("scale ignored", "window_scaled",
     lambda v, at: attend(v, {**at, "scale": 0.5}, both(v, at)), "scale|√"),
    ("scale times 1/√D", "window_scaled",
     lambda v, at: attend(v, at, both(v, at), at["scale"] * 0.5), "scale|√"),
    ("hidden scores are 0", "window documents",
     lambda v, at: attend(v, at, both(v, at), fill=0.0), "0|mask|not a mistake"),
    ("masked after the softmax", "window documents",
     lambda v, at: attend(v, at, both(v, at), after=True), "after|normalis|sum"),
    ("dk and dv of the last document", "documents", lambda v, at: parts_of(v, at, 1),
     "document|last|overwrit"),
    ("dk and dv of the first document", "documents", lambda v, at: parts_of(v, at, 0),
     "document|first"),
    ("first key taken for the position", "documents_in_a_window documents",
     lambda v, at: attend(
         v, at, tri(7) & within(at, 7) & (torch.arange(7) >= v["positions"][:, None, :, None])),
     "document|position|not a mistake"),
    ("window ends at the last key, not at the query", "window",
     lambda v, at: attend(
         v, at, tri(7) & ((torch.arange(7) > 6 - at["window"]) | (ago(7) == 0))), "window"),
]  # fmt: skip


def lora(x: Tensor, v: Any, c: str, s: float, b: bool = True) -> Tensor:
    y = F.linear(x, v[f"w{c}"], v.get(f"b{c}") if b else None)
    return y + s * F.linear(F.linear(x, v[f"A{c}"]), v[f"B{c}"])


def qkv(layer: Callable[..., Tensor], order: str = "qkv") -> Any:
    return lambda v, at: torch.cat([layer(v["x"], v, c, at["s"]) for c in order], -1)


def swapped(names: dict[str, str], make: Any) -> Any:
    """Right results, gradients under each other's names."""
    return lambda v, at: {"y": make(v, at), "names": names}


def stopped(x: Tensor, v: Any, c: str, s: float, which: str) -> Tensor:
    return lora(x.detach() if c in which else x, v, c, s)


QKV: list[Row] = [
    ("k has no adapter", "usual no_biases",
     qkv(lambda x, v, c, s: lora(x, v, c, s if c != "k" else 0.0)), "k_proj|adapter.*k"),
    ("scale missing", "usual scale_2", qkv(lambda x, v, c, s: lora(x, v, c, 1.0)), "scale"),
    ("v does not reach x", "usual one_kv_head", qkv(lambda x, v, c, s: stopped(x, v, c, s, "v")),
     "v_proj|dx.*v"),
    ("q does not reach x", "usual", qkv(lambda x, v, c, s: stopped(x, v, c, s, "q")), "q_proj|dx.*q"),
    ("no biases", "usual", qkv(lambda x, v, c, s: lora(x, v, c, s, False) + 0 * v[f"b{c}"]), "bias"),
    ("bias of k missing", "usual",
     qkv(lambda x, v, c, s: lora(x, v, c, s, c != "k") + 0 * v[f"b{c}"]), "bias"),
    ("adapter does not reach x", "usual no_biases",
     qkv(lambda x, v, c, s: F.linear(x, v[f"w{c}"], v.get(f"b{c}"))
         + s * F.linear(F.linear(x.detach(), v[f"A{c}"]), v[f"B{c}"])), "dh·A|adapter's term"),
    ("frozen weight does not reach x", "usual no_biases",
     qkv(lambda x, v, c, s: F.linear(x.detach(), v[f"w{c}"], v.get(f"b{c}"))
         + s * F.linear(F.linear(x, v[f"A{c}"]), v[f"B{c}"])), "frozen"),
    ("k and v exchanged", "usual", qkv(lora, "qvk"), "exchang|swap|order"),
    ("adapter of q for all", "one_kv_head usual",
     qkv(lambda x, v, c, s: F.linear(x, v[f"w{c}"], v.get(f"b{c}")) + s * F.linear(
         F.linear(x, v["Aq"]), v[f"B{c}"]) + 0 * v[f"A{c}"].sum()), "A of q|Aq|shared|not a mistake"),
    ("gradients of A of k and v exchanged", "usual", swapped({"dAk": "dAv", "dAv": "dAk"}, qkv(lora)),
     "holds|exchang|swap"),
    ("s twice", "usual scale_2", qkv(lambda x, v, c, s: lora(x, v, c, s * s)), "twice|s²|scale"),
]  # fmt: skip


def gate(kind: str, g: Tensor) -> Tensor:
    if kind == "exact":
        return F.gelu(g)
    if kind == "quick":
        return g * torch.sigmoid(1.702 * g)
    return {"tanh": F.gelu(g, approximate="tanh"), "silu": F.silu(g), "relu": F.relu(g),
            "sigmoid": torch.sigmoid(g)}[kind]  # fmt: skip


def own(at: Any) -> str:
    return "tanh" if at.get("is_gelu") else "silu"


def mlp(
    kind: str | None = None, up: Any = lambda u: u, g: Any = lambda g: g, layer: Any = lora,
    z: Any = lambda act, u: act * u,
) -> Any:  # fmt: skip
    def answer(v: Any, at: Any) -> Tensor:
        a, b = g(layer(v["x"], v, "g", at["s"])), up(layer(v["x"], v, "u", at["s"]))
        return layer(z(gate(kind or own(at), a), b), v, "d", at["s"])

    return answer


def crossed(v: Any, at: Any) -> Tensor:
    a, b = lora(v["x"], v, "g", at["s"]), lora(v["x"], v, "u", at["s"])
    return lora(gate(own(at), b) * a, v, "d", at["s"])


def straight(act: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Any:
    return bent(act, lambda dy, g: dy * slope(g))


def with_slope(slope: Callable[[Tensor], Tensor], kind: str = "silu") -> Any:
    def answer(v: Any, at: Any) -> Tensor:
        a, b = lora(v["x"], v, "g", at["s"]), lora(v["x"], v, "u", at["s"])
        act = straight(lambda g: gate(kind, g), slope)(a)
        return lora(act * b, v, "d", at["s"])

    return answer


def no_up_path(v: Any, at: Any) -> Tensor:
    b = lora(v["x"].detach(), v, "u", at["s"])
    return lora(gate(own(at), lora(v["x"], v, "g", at["s"])) * b, v, "d", at["s"])


MLP: list[Row] = [
    ("up does not reach x", "usual rank_1", no_up_path, "up_proj|up"),
    ("gate and up exchanged", "usual", crossed, "gate and up|swap|exchang"),
    ("slope is sigma", "usual rank_1", with_slope(torch.sigmoid), "σ alone|derivative"),
    ("gelu", "usual", mlp("tanh"), "GELU"),
    ("down without its adapter", "usual",
     mlp(layer=lambda x, v, c, s: lora(x, v, c, s if c != "d" else 0.0)), "down_proj|adapter"),
    ("up treated as a constant", "usual", mlp(up=lambda u: u.detach()), "up|constant|dup"),
    ("act treated as a constant", "usual", mlp(z=lambda act, u: act.detach() * u), "gate|constant"),
    ("relu", "usual one_token", mlp("relu"), "ReLU"),
    ("scale of the gate's adapter missing", "usual",
     mlp(layer=lambda x, v, c, s: lora(x, v, c, s if c != "g" else 1.0)), "gate_proj|scale"),
    ("adapter of down does not pass back", "usual",
     mlp(layer=lambda x, v, c, s: lora(x, v, c, s) if c != "d" else F.linear(x, v["wd"])
         + s * F.linear(F.linear(x.detach(), v["Ad"]), v["Bd"])), "down_proj|dh·A"),
]  # fmt: skip
GELU: list[Row] = [
    ("silu", "usual", mlp("silu"), "SiLU"),
    ("exact", "usual rank_1", mlp("exact"), "exact|erf"),
    ("quick", "usual", mlp("quick"), "quick|1.702"),
    ("slope of silu", "usual",
     with_slope(lambda g: torch.sigmoid(g) * (1 + g * (1 - torch.sigmoid(g))), "tanh"), "SiLU"),
    ("slope without its second term", "usual",
     with_slope(
         lambda g: (1 + torch.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) / 2, "tanh"),
     "derivative|slope|second term"),
    ("slope without the cubic's derivative", "usual",
     with_slope(
         lambda g: (1 + (t := torch.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))) / 2
         + g / 2 * (1 - t * t) * (2 / np.pi) ** 0.5, "tanh"), "derivative|slope|cub"),
    ("up does not reach x", "usual", no_up_path, "up_proj|up"),
    ("relu", "usual", mlp("relu"), "ReLU"),
]  # fmt: skip


def bare_gate(make: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return lambda v, at: make(v["gate"], v["up"])


GEGLU: list[Row] = [
    ("exact", "usual large", bare_gate(lambda g, u: F.gelu(g) * u), "exact|erf"),
    ("silu", "usual large", bare_gate(lambda g, u: F.silu(g) * u), "SiLU"),
    ("without the cubic", "usual large",
     bare_gate(lambda g, u: g / 2 * (1 + torch.tanh((2 / np.pi) ** 0.5 * g)) * u),
     "cub|0.044715|not a mistake"),
    ("exchanged", "usual", bare_gate(lambda g, u: F.gelu(u, approximate="tanh") * g), "swap|exchang"),
]  # fmt: skip


def normed(a: Tensor, w: Tensor, e: float) -> Tensor:
    return w * a / torch.sqrt((a * a).mean(-1, keepdim=True) + e)


def add_norm(
    n: Callable[..., Tensor] = lambda x, f, w, e: normed(x + f, w, e),
    a: Callable[[Tensor, Tensor], Tensor] = lambda x, f: x + f,
) -> Any:
    return lambda v, at: torch.cat([n(v["x"], v["f"], v["w"], at["eps"]), a(v["x"], v["f"])], -1)


ADD_NORM: list[Row] = [
    ("the sum passes nothing back", "usual", add_norm(a=lambda x, f: (x + f).detach()),
     "residual|da|sum"),
    ("f gets nothing of the sum", "usual", add_norm(a=lambda x, f: x + f.detach()),
     "f|residual|sum|not a mistake"),
    ("norm of x", "usual stream", add_norm(lambda x, f, w, e: normed(x, w, e) + 0 * f),
     "norm of x|without f|before|not a mistake"),
    ("eps outside", "usual",
     add_norm(lambda x, f, w, e: w * (x + f) / (((x + f) ** 2).mean(-1, keepdim=True).sqrt() + e)),
     "outside"),
    ("1 + w", "usual cancels", add_norm(lambda x, f, w, e: normed(x + f, 1 + w, e)), r"1 ?\+ ?w|Gemma"),
    ("n is a constant", "usual",
     add_norm(lambda x, f, w, e: w * (x + f)
              / torch.sqrt(((x + f) ** 2).mean(-1, keepdim=True) + e).detach()), "term along x"),
    ("x twice", "usual", add_norm(lambda x, f, w, e: normed(2 * x + f, w, e), lambda x, f: 2 * x + f),
     "twice"),
    ("f subtracted", "usual", add_norm(lambda x, f, w, e: normed(x - f, w, e), lambda x, f: x - f),
     "subtract|sign"),
    ("norm and sum in the other order", "usual",
     lambda v, at: add_norm()(v, at).roll(v["x"].shape[-1], -1), "order|exchang|swap|halves"),
    ("x left out of the sum", "usual", add_norm(a=lambda x, f: f + 0 * x), "residual|missing"),
]  # fmt: skip


def head(
    n: Callable[..., Tensor] = normed, loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    labels: Callable[[Tensor], Tensor] = lambda t: t,
) -> Any:  # fmt: skip
    def answer(v: Any, at: Any) -> Tensor:
        z = F.linear(n(v["x"], v["w"], at["eps"]), v["head"]).flatten(0, 1)
        y = labels(v["labels"]).flatten()
        total = F.cross_entropy(z, y, ignore_index=-100, reduction="sum")
        return loss(z, y) if loss else total / max(1, int((y != -100).sum()))

    return answer


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-100, reduction="sum")


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


HEAD: list[Row] = [
    ("sum", "usual none_ignored", head(loss=summed), "sum over tokens|sum"),
    ("mean over all", "usual", head(loss=lambda z, y: summed(z, y) / len(y)), "mean over all|ignored"),
    ("labels shifted once more", "usual none_ignored", head(labels=shifted), "shift"),
    ("norm skipped", "usual", head(lambda x, w, e: x + 0 * w), "norm"),
    ("norm passed through", "usual",
     head(bent(normed, lambda dy, x, w, e: (dy, (dy * normed(x, torch.ones_like(w), e)).sum((0, 1)),
                                            None))), "norm|dx = dy"),
    ("eps outside", "usual small_inputs",
     head(lambda x, w, e: w * x / ((x * x).mean(-1, keepdim=True).sqrt() + e)), "outside"),
    ("1 + w", "usual", head(lambda x, w, e: normed(x, 1 + w, e)), r"1 ?\+ ?w|Gemma"),
    ("token 0 ignored", "none_ignored",
     head(labels=lambda t: torch.where(t == 0, torch.full_like(t, -100), t)), "token 0|label 0|padding"),
]  # fmt: skip

OPS: dict[str, list[Row]] = {
    "ops/masked_attention/": MASKED,
    "ops/qkv_lora/": QKV,
    "ops/mlp_lora/": MLP,
    "ops/gelu_mlp_lora/": GELU,
    "ops/geglu/": GEGLU,
    "ops/add_norm/": ADD_NORM,
    "ops/head_loss/": HEAD,
}


def op_answer(make: Any, suite: Suite, name: str) -> dict[str, Any]:
    """Output and gradients in float32."""
    case = suite.cases[name]
    v = {n: client.to_torch(a, torch.float32) for n, a in suite.read(case).inputs.items()}
    found = make(v, case.attributes)
    found = found if isinstance(found, dict) else {"y": found}
    names, wanted = found.pop("names", {}), [t.name for t in case.tensors if t.name != "y"]
    grads = torch.autograd.grad(
        found["y"], [v[n[1:]] for n in wanted], v["dy"].to(found["y"].dtype), allow_unused=True
    )
    got = {
        names.get(n, n): torch.zeros_like(v[n[1:]]) if g is None else g
        for n, g in zip(wanted, grads, strict=True)
    }
    return {n: np.asarray(t.detach()) for n, t in (got | found).items()}


# -- blocks and models -----------------------------------------------------------------------------

Dx = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def on_heads(function: Callable[[Tensor, Tensor, float], Tensor], only: int = 0) -> Patch:
    """Another norm of q and k (of the one with so many heads)."""

    def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
        ours = x.ndim == 4 and only in (0, x.shape[2])
        return function(x, w, eps) if ours else right_norm(x, w, eps)

    return lambda p: put(p, rmsnorm, norm)


def heads_back(dx: Dx, only: int = 0) -> Patch:
    """The norm of q and k with another backward; dw stays right."""

    def back(dy: Tensor, x: Tensor, w: Tensor, eps: float) -> Any:
        r = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        return dx(dy, x, w, r), (dy * x * r).flatten(0, 2).sum(0), None

    return on_heads(bent(right_norm, back), only)


def all_heads(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """One norm over heads and channels."""
    return w * x / torch.sqrt((x * x).mean((-2, -1), keepdim=True) + eps)


def step(**methods: Any) -> Patch:
    return lambda p: p.setattr(client, "Step", type("Bent", (Step,), methods))


def normed_after(self: Any, w: Any, at: str, n: Tensor) -> Tensor:
    """Norms of q and k behind RoPE."""
    right, tables = Step.head_norm, (self.cos, self.sin)
    heads = []
    for c in "qkv":
        y = self.project(w, at, f"self_attn.{c}_proj", n)
        y = y.reshape(*y.shape[:2], -1, self.config["head_dim"])
        if c != "v":
            y = right(self, w, at, c, right_rope(y, *tables))
            y = self.keep(f"{at}self_attn.{c}_rope", y * 1)
        heads.append(y)
    q, k, v = heads
    p = attention.torch_probabilities(torch, q, k, *self.masks(at, q.shape[1]))
    p = self.keep(f"{at}self_attn.attention.p", p)
    return self.keep(f"{at}self_attn.attention", attention.torch_mix(torch, p, v)).flatten(2)


def other_norm(self: Any, w: Any, at: str, letter: str, x: Tensor) -> Tensor:
    other = {"q": "k", "k": "q"}[letter]
    return self.norm(f"{at}self_attn.{letter}_norm", x, w[f"self_attn.{other}_norm.weight"])


def masks(window: Callable[[Any, str], int | None], scale: Any = None) -> Patch:
    """Another window, by layer, and another scale of scores."""

    def found(self: Any, at: str, tokens: int) -> tuple[Any, ...]:
        t, size = torch.arange(tokens), window(self, at)
        first = None if size is None else (t - size + 1).clamp(min=0)[None]
        return first, scale(self) if scale else self.family.attention_scale

    return step(masks=found)


def own_window(self: Any, at: str) -> int | None:
    size: int | None = self.family.sliding_window if self.slides(at) else None
    return size


def more_window(by: int) -> Callable[[Any, str], int | None]:
    return lambda self, at: (own_window(self, at) or -99) + by if self.slides(at) else None


def gain(
    forward: float, backward: float, chosen: Callable[[str], bool] = lambda name: True
) -> Patch:
    """forward + w and backward + w in the place of 1 + w."""

    def norm(self: Any, name: str, x: Tensor, w: Tensor) -> Tensor:
        a, b = (forward, backward) if chosen(name) else (1.0, 1.0)

        def back(dy: Tensor, x: Tensor, w: Tensor, eps: float) -> Any:
            r, u = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps), dy * (b + w)
            dx = u * r - x * (u * x).mean(-1, keepdim=True) * r**3
            return dx, (dy * x * r).reshape(-1, len(w)).sum(0), None

        f = bent(lambda x, w, eps: right_norm(x, a + w, eps), back)
        return self.keep(name, f(x, w, self.config["rms_norm_eps"]))

    return step(norm=norm)


def half(change: Any) -> Patch:
    """change(step, w, at, norms, x, y): what a half adds to x, y being what it gives before its norm."""

    def made(self: Any, w: Any, at: str, norms: Any, x: Tensor, inside: Any, last: str) -> Tensor:
        before = norms[0]
        y = inside(w, at, self.norm(f"{at}{before}", x, w[f"{before}.weight"]))
        return change(self, w, at, norms, x, self.project(w, at, last, y))

    return step(half=made)


def after(self: Any, w: Any, at: str, part: str, y: Tensor) -> Tensor:
    return self.norm(f"{at}{part}", y, w[f"{part}.weight"])


def skipped(*parts: str) -> Patch:
    def add(self: Any, w: Any, at: str, norms: Any, x: Tensor, y: Tensor) -> Tensor:
        if norms[1] in parts:
            return x + self.keep(f"{at}{norms[1]}", y + 0 * w[f"{norms[1]}.weight"])
        return x + after(self, w, at, norms[1], y)

    return half(add)


def skipped_before(part: str) -> Patch:
    def norm(self: Any, name: str, x: Tensor, w: Tensor) -> Tensor:
        if name.endswith(part):
            return self.keep(name, x + 0 * w)
        return Step.norm(self, name, x, w)

    return step(norm=norm)


def passed_back(part: str) -> Patch:
    """dx = dy at norms of a name."""

    def norm(self: Any, name: str, x: Tensor, w: Tensor) -> Tensor:
        if not name.endswith(part):
            return Step.norm(self, name, x, w)
        plus, eps = self.family.traits.gain, self.config["rms_norm_eps"]

        def back(dy: Tensor, x: Tensor, w: Tensor) -> Any:
            unit = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
            return dy, (dy * unit).reshape(-1, len(w)).sum(0)

        return self.keep(name, bent(lambda x, w: right_norm(x, plus + w, eps), back)(x, w))

    return step(norm=norm)


def exchanged_norms(self: Any, w: Any, at: str, norms: Any, x: Tensor, y: Tensor) -> Tensor:
    first, second = self.family.traits.norms
    other = second[1] if norms == first else first[1]
    return x + self.norm(f"{at}{norms[1]}", y, w[f"{other}.weight"])


def gated(kind: str) -> Patch:
    def made(self: Any, w: Any, at: str, n: Tensor) -> Tensor:
        g, up = (self.project(w, at, f"mlp.{c}_proj", n) for c in ("gate", "up"))
        name = "geglu" if self.family.traits.gelu else "swiglu"
        inner = "gelu" if self.family.traits.gelu else "silu"
        act = self.keep(f"{at}mlp.{name}.{inner}", gate(kind, g))
        return self.keep(f"{at}mlp.{name}", act * up)

    return step(mlp=made)


def embedded(factor: Callable[[int], float], back: Callable[[int], float] | None = None) -> Patch:
    def embed(self: Any, w: Any, ids: Tensor) -> Tensor:
        x, c = F.embedding(ids, w["model.embed_tokens.weight"]), self.config["hidden_size"]
        if back is None:
            return x * factor(c)
        return bent(lambda x: x * factor(c), lambda dy, x: dy * back(c))(x)

    return step(embed=embed)


def tabled(change: Callable[[Any, Callable[..., Any]], Any]) -> Patch:
    """change(config, table) -> whole, local; table(theta, scaling, positions=None) -> cos, sin."""

    def patch(p: pytest.MonkeyPatch) -> None:
        def model_tables(config: Any, tokens: int) -> Any:
            def table(theta: float, f: Callable[[Any], Any] = lambda f: f, start: int = 0) -> Any:
                d = config.head_dim
                turns = f(theta ** (-np.arange(0, d, 2) / d))
                t = (start + np.arange(tokens))[:, None] * turns
                return np.cos(t), np.sin(t)

            return change(config, table)

        p.setattr(client, "model_tables", model_tables)

    return patch


def llama3(f: Any, factor: float, original: float, low: float, high: float) -> Any:
    smooth = np.clip((original * f / (2 * np.pi) - low) / (high - low), 0, 1)
    return (1 - smooth) * f / factor + smooth * f


def stretched(config: Any, times: int = 1, factor: float | None = None) -> Callable[[Any], Any]:
    """A config's scaling of frequencies, so many times."""
    c = config.rope_scaling

    def f(x: Any) -> Any:
        for _ in range(times):
            if c.original is None:
                x = x / (factor or c.factor)
            else:
                x = llama3(x, factor or c.factor, c.original, c.low, c.high)
        return x

    return f


def scalings(c: Any) -> tuple[float, float, float, float]:
    return tuple(c.rope_scaling)


def scores(change: Callable[[Tensor], Tensor]) -> Patch:
    """What is done to the scores before the softmax."""

    def wrong(s: Tensor, first: Tensor | None = None) -> Tensor:
        return right(torch, change(s), *([] if first is None else [first]))

    right = causal_softmax.torch_twin
    return lambda p: put(p, causal_softmax, wrong)


LORA_OFF = ("self_attn.k_proj", "self_attn.v_proj")


def no_adapter(self: Any, w: Any, at: str, part: str, x: Tensor) -> Tensor:
    A, B = w[f"{part}.lora_A.weight"], w[f"{part}.lora_B.weight"]
    h = self.keep(f"{at}{part}.h", F.linear(x, A))
    s = 0.0 if part in LORA_OFF else self.s
    y = F.linear(x, w[f"{part}.weight"], w.get(f"{part}.bias"))
    return self.keep(f"{at}{part}", y + s * F.linear(h, B))


def unscaled(self: Any, w: Any, at: str, part: str, x: Tensor) -> Tensor:
    self.s = 1.0
    return Step.project(self, w, at, part, x)


Q3, L, G3, GW = "block/qwen3", "block/llama", "block/gemma3", "block/gemma3_window"
E3, EL, EG = "e2e/qwen3", "e2e/llama", "e2e/gemma3"
FAMILIES: list[Row] = [
    ("q and k norms passed through", f"{Q3} {E3}", heads_back(lambda dy, x, w, r: dy),
     "norm.*(skip|pass|dx = dy)|q_norm|norm of q"),
    ("head norms without the term along x", f"{Q3} {G3}", heads_back(lambda dy, x, w, r: dy * w * r),
     "term along x"),
    ("q norm passed through", f"{Q3} {E3}", heads_back(lambda dy, x, w, r: dy, 4), "q_norm|norm of q"),
    ("k norm without its term", f"{Q3} {G3}", heads_back(lambda dy, x, w, r: dy * w * r, 2),
     "k_norm|norm of k"),
    ("no norms of q and k", f"{Q3} {E3}", on_heads(lambda x, w, e: x + 0 * w),
     "q_norm|norms? of q|q and k"),
    ("no norm of k", f"{Q3} {G3}", on_heads(lambda x, w, e: x + 0 * w, 2), "k_norm|norm of k"),
    ("no norm of q", f"{Q3} {EG}", on_heads(lambda x, w, e: x + 0 * w, 4), "q_norm|norm of q"),
    ("norm over all heads", f"{Q3} {G3}", on_heads(all_heads), "all heads|whole|head"),
    ("norm behind RoPE", f"{Q3} {G3}", step(attention=normed_after), "RoPE|after|behind|order"),
    ("head norms without eps", f"{Q3} {E3}", on_heads(lambda x, w, e: right_norm(x, w, 0.0)), "eps"),
    ("head norms without weight", f"{Q3} {E3}",
     on_heads(lambda x, w, e: right_norm(x, torch.ones_like(w), e) + 0 * w), "weight|gain"),
    ("norms of q and k exchanged", f"{Q3} {G3}", step(head_norm=other_norm), "exchang|swap|other"),
    ("LayerNorm on heads", f"{Q3} {E3}",
     on_heads(lambda x, w, e: F.layer_norm(x, (x.shape[-1],), w, None, e)), "LayerNorm|mean"),
    ("1 + w on heads", f"{Q3} {E3}", on_heads(lambda x, w, e: right_norm(x, 1 + w, e)),
     r"1 ?\+ ?w|Gemma"),
    ("head norms' weight missing in dx", f"{Q3} {G3}",
     heads_back(lambda dy, x, w, r: dy * r - x * (dy * x).mean(-1, keepdim=True) * r**3),
     "without the norm's weight|weight"),
    ("window one more", f"{GW} {EG}", masks(more_window(1)), "window"),
    ("window one less", f"{GW} {EG}", masks(more_window(-1)), "window"),
    ("window ignored", f"{GW} {EG}", masks(lambda self, at: None), "window"),
    ("window on the wrong layers", EG, masks(lambda self, at: None if self.slides(at) else 3),
     "window.*layer|layer.*window|wrong layer|exchang"),
    ("window on all layers", EG, masks(lambda self, at: 3), "window.*(all|every)|(all|every).*window"),
    ("w for 1 + w", f"{G3} {EG}", gain(0.0, 0.0), r"1 ?\+ ?w|gain"),
    ("w for 1 + w in the backward", f"{G3} {GW}", gain(1.0, 0.0), r"1 ?\+ ?w|gain|weight"),
    ("w for 1 + w in the last norm", EG, gain(0.0, 0.0, lambda n: n == "model.norm"),
     "model.norm|last|final"),
    ("w for 1 + w on heads", f"{G3} {EG}", gain(0.0, 0.0, lambda n: n.endswith(("q_norm", "k_norm"))),
     "q_norm|head|q and k"),
    ("w for 1 + w in the forward", f"{G3} {GW}", gain(0.0, 1.0), r"1 ?\+ ?w|gain|weight"),
    ("norm behind the attention skipped", f"{G3} {EG}", skipped("post_attention_layernorm"),
     "post_attention_layernorm|behind the attention"),
    ("norm behind the MLP skipped", f"{G3} {EG}", skipped("post_feedforward_layernorm"),
     "post_feedforward_layernorm|behind the MLP"),
    ("both norms behind skipped", f"{G3} {EG}",
     skipped("post_attention_layernorm", "post_feedforward_layernorm"), "behind|post_|norms"),
    ("norm behind the sum", f"{G3} {GW}",
     half(lambda self, w, at, norms, x, y: after(self, w, at, norms[1], x + y)),
     "sum|residual|not a mistake"),
    ("norm behind the attention passed through", f"{G3} {EG}", passed_back("post_attention_layernorm"),
     "post_attention_layernorm|behind the attention"),
    ("norm behind the MLP passed through", f"{G3} {EG}", passed_back("post_feedforward_layernorm"),
     "post_feedforward_layernorm|behind the MLP"),
    ("norms behind exchanged", f"{G3} {EG}", half(exchanged_norms), "exchang|swap"),
    ("pre_feedforward_layernorm skipped", f"{G3} {EG}", skipped_before("pre_feedforward_layernorm"),
     "pre_feedforward_layernorm"),
    ("silu", f"{G3} {EG}", gated("silu"), "SiLU"),
    ("exact gelu", f"{G3} {EG}", gated("exact"), "exact|erf"),
    ("relu", f"{GW} {EG}", gated("relu"), "ReLU"),
    ("gelu in Llama", f"{L} {EL}", gated("tanh"), "GELU"),
    ("1/√D in Gemma", f"{G3} {EG}", masks(own_window, lambda self: 6**-0.5), "√|query_pre_attn|scale"),
    ("scale of scores twice", f"{G3} {GW}", masks(own_window, lambda self: 1 / 9), "scale|√"),
    ("√C lost", EG, embedded(lambda c: 1.0), "√C|embedding"),
    ("√C lost in the backward", EG, embedded(lambda c: c**0.5, lambda c: 1.0), "√C|embedding"),
    ("C for √C", EG, embedded(lambda c: float(c)), "√C|embedding"),
    ("√C in Llama", EL, embedded(lambda c: c**0.5), "√C|embedding"),
    ("no scaling of RoPE", EL, tabled(lambda c, t: (t(c.rope_theta), None)), "scaling"),
    ("scaling twice", EL, tabled(lambda c, t: (t(c.rope_theta, stretched(c, 2)), None)), "twice"),
    ("linear for llama3", EL, tabled(lambda c, t: (t(c.rope_theta, lambda f: f / 8), None)),
     "linear|alike|all frequencies"),
    ("low and high frequencies exchanged", EL,
     tabled(lambda c, t: (t(c.rope_theta, lambda f: llama3(f, 8.0, 40, 4.0, 1.0)), None)),
     "low|high|scaling|not a mistake"),
    ("scaling upside down", EL, tabled(lambda c, t: (t(c.rope_theta, stretched(c, 1, 1 / 8)), None)),
     "upside|scaling"),
    ("theta 10000", f"{EL} {E3}",
     tabled(lambda c, t: (t(1e4, stretched(c) if c.rope_scaling else lambda f: f), None)), "theta"),
    ("no scaling in Gemma", EG, tabled(lambda c, t: (t(1000.0), t(100.0))), "scaling"),
    ("scaling twice in Gemma", EG, tabled(lambda c, t: (t(1000.0, lambda f: f / 16), t(100.0))),
     "twice"),
    ("scaling of layers with a window, too", EG,
     tabled(lambda c, t: (t(1000.0, lambda f: f / 4), t(100.0, lambda f: f / 4))),
     "window|local|sliding"),
    ("one theta for all", EG, tabled(lambda c, t: (t(1000.0, lambda f: f / 4),) * 2),
     "theta|local|same|table"),
    ("the two tables exchanged", EG, tabled(lambda c, t: (t(100.0), t(1000.0, lambda f: f / 4))),
     "exchang|swap"),
    ("positions from 1", f"{EL} {E3}",
     tabled(lambda c, t: (t(c.rope_theta, stretched(c) if c.rope_scaling else lambda f: f, 1), None)),
     "position"),
    ("neighbours", f"{L} {EL}",
     lambda p: put(p, rope, lambda x, c, s: torch.stack(
         [x[..., 0::2] * c[:, None] - x[..., 1::2] * s[:, None],
          x[..., 1::2] * c[:, None] + x[..., 0::2] * s[:, None]], -1).flatten(-2)), "neighbour"),
    ("softcap left on", f"{G3} {EG}", scores(lambda s: 5 * torch.tanh(s / 5)), "cap|not a mistake"),
    ("rope not turned back", f"{L} {E3}",
     lambda p: put(p, rope, bent(right_rope, lambda dy, x, c, s: (dy, None, None))), "inverse RoPE"),
    ("no adapter on k and v", f"{L} {EG}", step(project=no_adapter), "LoRA is missing|k and v|adapter"),
    ("scale of LoRA 1", f"{Q3} {GW}", step(project=unscaled), "LoRA scale"),
    ("residual around the MLP lost", f"{G3} {L}",
     half(lambda self, w, at, norms, x, y:
          (x if norms == self.family.traits.norms[0] else 0 * x)
          + (after(self, w, at, norms[1], y) if norms[1] else y)), "residual"),
    ("attention's residual from the norm", f"{Q3} {L}",
     half(lambda self, w, at, norms, x, y:
          (self.seen[f"{at}input_layernorm"] if norms == self.family.traits.norms[0] else x) + y),
     "residual.*norm|norm.*residual"),
]  # fmt: skip


class Found(NamedTuple):
    """A mistake in a case, and the report's first sentence; None where it passes."""

    mistake: str
    case: str
    held_out: bool
    said: str | None
    pattern: str

    @property
    def verdict(self) -> str:
        if self.said is None:
            return "passed"
        if self.said.startswith("not a mistake we know"):
            return "silent"
        return "right" if re.search(self.pattern, self.said) else "wrong"


def sentence(suite: Suite, name: str, got: dict[str, Any]) -> str | None:
    case = suite.cases[name]
    vectors = suite.read(case)
    got = {n: np.asarray(a) for n, a in got.items()}
    wrong = [
        t for t in case.tensors
        if t.name not in got or not judge(t, got[t.name], vectors, "float32").passed
    ]  # fmt: skip
    if not wrong:
        return None
    given = {t.name: got[t.name] for t in case.tensors if t.name in got}
    return (explain(suite, case, vectors, given, "float32", wrong) or ["not a mistake we know"])[0]


def results(suite: Suite, ops: dict[str, list[Row]] | None = None) -> Iterator[Found]:
    """Every mistake in each of its cases, or those of some ops."""
    for prefix, rows in (OPS if ops is None else ops).items():
        for number, (mistake, cases, make, pattern) in enumerate(rows):
            for name in cases.split():
                said = sentence(suite, prefix + name, op_answer(make, suite, prefix + name))
                yield Found(mistake, prefix + name, number % 2 == 1, said, pattern)
    for number, (mistake, cases, patch, pattern) in enumerate(FAMILIES if ops is None else ()):
        for name in cases.split():
            case = suite.cases[name]
            with pytest.MonkeyPatch.context() as context:
                patch(context)
                got = client.compute(case, suite.read(case).inputs, Path(suite.root), "float32")
            yield Found(mistake, name, number % 2 == 1, sentence(suite, name, got), pattern)


def score(found: list[Found]) -> dict[str, int]:
    """Pairs, and how many of them end each way."""
    verdicts = [f.verdict for f in found]
    counts = {v: verdicts.count(v) for v in ("right", "wrong", "silent", "passed")}
    return {"pairs": len(found), "rejected": len(found) - counts["passed"], **counts}
