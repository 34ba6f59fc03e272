"""Wrong backends written for the score: torch autograd bent by detach and custom functions.

Nothing here knows `mesp_ref.golden.mistakes`; each entry names the sentence that a report should
contain. Run over block/usual and e2e/tied through the torch client.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mesp_ref.golden.backends import torch as client
from mesp_ref.golden.suite import Case
from mesp_ref.registry import attention, causal_softmax, cross_entropy, lora_linear, rmsnorm, rope
from mesp_ref.registry.twins import torch_wide

Patch = Callable[[pytest.MonkeyPatch], None]

# The right functions: the torch twins of the registry, which the client calls by these names.
right_rope = partial(rope.torch_twin, torch)
right_norm = partial(rmsnorm.torch_twin, torch)
right_softmax = partial(causal_softmax.torch_twin, torch)
right_probabilities = partial(attention.torch_probabilities, torch)
right_mix = partial(attention.torch_mix, torch)
right_lora = partial(lora_linear.torch_twin, torch)
right_loss = partial(cross_entropy.torch_twin, torch)


def put(
    p: pytest.MonkeyPatch, op: ModuleType, function: Callable[..., Any], name: str = "torch_twin"
) -> None:
    """A function of tensors in the place of an op's twin, which is given torch first."""
    p.setattr(op, name, lambda torch, *args: function(*args))


def bent(forward: Callable[..., torch.Tensor], backward: Callable[..., Any]) -> Any:
    """A function with a forward and a backward that do not belong together.

    backward(dy, *inputs) gives the gradients of the tensor inputs, None for the others.
    """

    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> torch.Tensor:
            ctx.args = args
            return forward(*args)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            return backward(dy, *ctx.args)

    return Bent.apply


def through(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """Gradients of another function at the same inputs: what a confused backward computes."""

    def pull(dy: torch.Tensor) -> Any:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            y = function(*leaves)
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    return pull


# -- RoPE ------------------------------------------------------------------------------------------


def rope_kept(p: pytest.MonkeyPatch) -> None:
    put(p, rope, bent(right_rope, lambda dy, x, c, s: (dy, None, None)))


def rope_kept_for_keys(p: pytest.MonkeyPatch) -> None:
    """Only the tensor with fewer heads, the keys, is not rotated back."""
    kept = bent(right_rope, lambda dy, x, c, s: (dy, None, None))

    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return (kept if x.shape[2] == 2 else right_rope)(x, cos, sin)

    put(p, rope, wrong)


def rope_again(p: pytest.MonkeyPatch) -> None:
    put(p, rope, bent(right_rope, lambda dy, x, c, s: (right_rope(dy, c, s), None, None)))


def rope_even_odd(p: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = cos[:, None], sin[:, None]
        return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)

    put(p, rope, wrong)


def rope_absent(p: pytest.MonkeyPatch) -> None:
    put(p, rope, lambda x, cos, sin: x)


# -- attention -------------------------------------------------------------------------------------


def _tiled(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat(1, 1, heads // x.shape[2], 1)


def kv_repeat_for_interleave(p: pytest.MonkeyPatch) -> None:
    put(
        p,
        attention,
        name="torch_probabilities",
        function=lambda q, k: right_probabilities(q, _tiled(k, q.shape[2])),
    )
    put(p, attention, name="torch_mix", function=lambda a, v: right_mix(a, _tiled(v, a.shape[1])))


def _grouped(reduce: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        def spread(heads: int) -> Any:
            def forward(x: torch.Tensor) -> torch.Tensor:
                return x.repeat_interleave(heads // x.shape[2], dim=2)

            def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                return reduce(dy.unflatten(2, (x.shape[2], -1)))

            return bent(forward, backward)

        put(
            p,
            attention,
            name="torch_probabilities",
            function=lambda q, k: right_probabilities(q, spread(q.shape[2])(k)),
        )
        put(
            p,
            attention,
            name="torch_mix",
            function=lambda a, v: right_mix(a, spread(a.shape[1])(v)),
        )

    return patch


def no_scale_on_the_way_back(p: pytest.MonkeyPatch) -> None:
    def backward(dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        dq, dk = through(right_probabilities, q, k)(dy)
        return dq * q.shape[3] ** 0.5, dk * q.shape[3] ** 0.5

    put(p, attention, name="torch_probabilities", function=bent(right_probabilities, backward))


def detached_attention(p: pytest.MonkeyPatch) -> None:
    put(
        p,
        attention,
        name="torch_probabilities",
        function=lambda q, k: 0 * k.sum() + right_probabilities(q, k).detach() + 0 * q.sum(),
    )


def elementwise_softmax(p: pytest.MonkeyPatch) -> None:
    put(
        p,
        causal_softmax,
        bent(right_softmax, lambda dy, s: dy * right_softmax(s) * (1 - right_softmax(s))),
    )


def softmax_like_exp(p: pytest.MonkeyPatch) -> None:
    put(p, causal_softmax, bent(right_softmax, lambda dy, s: dy * right_softmax(s)))


def bidirectional(p: pytest.MonkeyPatch) -> None:
    put(p, causal_softmax, lambda s: torch_wide(torch, s).softmax(dim=-1).to(s.dtype))


# -- recomputation ---------------------------------------------------------------------------------


def _recomputed(rotary: bool, bias: bool, back: bool) -> Patch:
    """Attention's backward sees other q and k than its forward did."""

    def patch(p: pytest.MonkeyPatch) -> None:
        def attention(self: client.Step, w: Any, at: str, n: torch.Tensor) -> torch.Tensor:
            raw, seen = {}, {}
            for c in "qkv":
                part = f"self_attn.{c}_proj"
                y = self.project(w, at, part, n)
                z = y.detach() if bias else y.detach() - w[f"{part}.bias"].detach()
                raw[c], seen[c] = (a.unflatten(-1, (-1, self.config["head_dim"])) for a in (y, z))
            turn = right_rope if back else bent(right_rope, lambda dy, x, a, b: (dy, None, None))
            q, k = (turn(raw[c], self.cos, self.sin) for c in "qk")
            if rotary:
                seen = {c: z if c == "v" else right_rope(z, self.cos, self.sin).detach()
                        for c, z in seen.items()}  # fmt: skip
            prob = right_probabilities(q.detach(), k.detach())

            def forward(q: Any, k: Any, v: Any) -> torch.Tensor:
                return right_mix(prob, v)

            def backward(do: torch.Tensor, q: Any, k: Any, v: Any) -> Any:
                share = q.shape[2] // k.shape[2]
                sq, sk, sv = seen["q"], seen["k"], seen["v"]
                wk, wv = (t.repeat_interleave(share, dim=2) for t in (sk, sv))
                dp = torch.einsum("nqhd,nkhd->nhqk", do, wv)
                ds = prob * (dp - (dp * prob).sum(-1, keepdim=True)) * q.shape[3] ** -0.5
                dq = torch.einsum("nhqk,nkhd->nqhd", ds, wk)
                dk = torch.einsum("nhqk,nqhd->nkhd", ds, sq).unflatten(2, (-1, share)).sum(3)
                dv = torch.einsum("nhqk,nqhd->nkhd", prob, do).unflatten(2, (-1, share)).sum(3)
                return dq, dk, dv

            return bent(forward, backward)(q, k, raw["v"]).flatten(2)

        p.setattr(client.Step, "attention", attention)

    return patch


# -- norms and MLP ---------------------------------------------------------------------------------


def _rsqrt(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def _norm(backward: Callable[..., torch.Tensor]) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        put(p, rmsnorm, bent(right_norm, lambda dy, x, w, eps: (
                backward(dy.float(), x.float(), w.float(), _rsqrt(x.float(), eps)).to(x.dtype),
                None, None)),
        )  # fmt: skip

    return patch


def norm_eps_outside(p: pytest.MonkeyPatch) -> None:
    put(p, rmsnorm, lambda x, w, eps: w * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps))


def _silu(slope: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        p.setattr(client.F, "silu", bent(torch.ops.aten.silu, lambda dy, x: dy * slope(x)))

    return patch


class Residuals(client.Step):
    """The block with its terms apart, so that one can be detached."""

    cut = ""

    def block(self, w: Any, x: torch.Tensor, at: str = "", name: str = "y") -> torch.Tensor:
        def path(what: str, t: torch.Tensor) -> torch.Tensor:
            return t.detach() if self.cut == what else t

        n = self.norm(f"{at}input_layernorm", x, w["input_layernorm.weight"])
        o = self.attention(w, at, n)
        a = path("attention", x) + self.project(w, at, "self_attn.o_proj", o)
        part = "post_attention_layernorm"
        n = self.norm(f"{at}{part}", a, w[f"{part}.weight"])
        gate = self.project(w, at, "mlp.gate_proj", n)
        up = self.project(w, at, "mlp.up_proj", path("up", n))
        z = F.silu(gate) * up
        return path("mlp", a) + self.project(w, at, "mlp.down_proj", z)


def _cut(what: str) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        p.setattr(client, "Step", type("Cut", (Residuals,), {"cut": what}))

    return patch


# -- LoRA ------------------------------------------------------------------------------------------


def _project(layer: Callable[..., torch.Tensor]) -> Patch:
    """layer(x, W, b, A, B, s) in place of the right LoRA layer."""

    def patch(p: pytest.MonkeyPatch) -> None:
        def project(self: client.Step, w: Any, at: str, part: str, x: torch.Tensor) -> torch.Tensor:
            matrices = (w[f"{part}.lora_{c}.weight"] for c in "AB")
            y = layer(self, x, w[f"{part}.weight"], w.get(f"{part}.bias"), *matrices)
            return self.keep(f"{at}{part}", y)

        p.setattr(client.Step, "project", project)

    return patch


def _forgets_base(self: Any, x: Any, w: Any, b: Any, A: Any, B: Any) -> torch.Tensor:
    return F.linear(x.detach(), w, b) + self.s * F.linear(F.linear(x, A), B)


def _forgets_branch(self: Any, x: Any, w: Any, b: Any, A: Any, B: Any) -> torch.Tensor:
    return F.linear(x, w, b) + self.s * F.linear(F.linear(x.detach(), A), B)


def _with_scale(scale: Callable[[dict[str, Any]], float]) -> Patch:
    def patch(p: pytest.MonkeyPatch) -> None:
        right = client.Step.__init__

        def init(self: client.Step, case: Case, cos: Any, sin: Any) -> None:
            right(self, case, cos, sin)
            self.s = scale(case.attributes)

        p.setattr(client.Step, "__init__", init)

    return patch


def _unscaled_backward(self: Any, x: Any, w: Any, b: Any, A: Any, B: Any) -> torch.Tensor:
    right = right_lora(x, w, A, B, self.s, b)
    wrong = right_lora(x, w, A, B, 1.0, b)
    return wrong + (right - wrong).detach()


def _scaled_gradients(factor_a: Any, factor_b: Any) -> Patch:
    """dA and dB times a function of the step; dx stays right."""

    def times(f: float) -> Any:
        return bent(lambda t: t.clone(), lambda dy, t: dy * f)

    def layer(self: Any, x: Any, w: Any, b: Any, A: Any, B: Any) -> torch.Tensor:
        return right_lora(x, w, times(factor_a(self))(A), times(factor_b(self))(B), self.s, b)

    return _project(layer)


def _one_row(rows: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """dA and dB of some rows only."""

    def layer(self: Any, x: Any, w: Any, b: Any, A: Any, B: Any) -> torch.Tensor:
        mask = torch.zeros(x.shape[0], x.shape[1], 1, dtype=x.dtype)
        mask.view(-1, 1)[rows(torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]))] = 1
        live = right_lora(x, w, A, B, self.s, b)
        dead = right_lora(x, w, A.detach(), B.detach(), self.s, b)
        return dead + mask * (live - live.detach() - dead + dead.detach())

    return _project(layer)


def _loss(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Patch:
    return lambda p: put(p, cross_entropy, function)


def _zero_ignored(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return right_loss(logits, torch.where(labels == 0, -100, labels))


def _counts_padding(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return right_loss(logits, labels.clamp(min=0))


def unshifted(p: pytest.MonkeyPatch) -> None:
    """The slices [:, :-1] and [:, 1:] undone: logits and labels of the same position."""

    def model(self: client.Step, w: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, w["model.embed_tokens.weight"])
        for number in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{number}."
            x = self.block({n.split(at)[1]: t for n, t in w.items() if at in n}, x, at, at[:-1])
        n = self.norm("model.norm", x, w["model.norm.weight"])
        logits = F.linear(n, w["model.embed_tokens.weight"])
        return self.keep("loss", right_loss(logits.flatten(0, 1), labels.flatten()))

    p.setattr(client.Step, "model", model)


BLOCKS: dict[str, tuple[Patch, str]] = {
    "rope kept": (rope_kept, "without inverse RoPE"),
    "rope kept for keys": (rope_kept_for_keys, "without inverse RoPE"),
    "rope again": (rope_again, "rotates dq and dk forward again"),
    "rope even odd": (rope_even_odd, "pairs neighbours"),
    "rope absent": (rope_absent, "no RoPE at all"),
    "kv repeated whole": (kv_repeat_for_interleave, "heads tiled (head h"),
    "group mean": (_grouped(lambda d: d.mean(3)), "averaged over the query heads"),
    "group first": (_grouped(lambda d: d[:, :, :, 0]), "only the first query head"),
    "scores unscaled back": (no_scale_on_the_way_back, "without the factor 1/√D"),
    "attention detached": (detached_attention, "treated as constants"),
    "softmax diagonal": (elementwise_softmax, "p ⊙ (1 − p)"),
    "softmax no sum": (softmax_like_exp, "without the row sum"),
    "no mask": (bidirectional, "without the causal mask"),
    "rebuilt, no rope": (_recomputed(False, True, True), "recomputed in the backward without RoPE"),
    "rebuilt, no bias": (_recomputed(True, False, True), "without their biases"),
    "as published": (_recomputed(False, False, False), "on-device MeSP"),
    "norm first term": (_norm(lambda dy, x, w, r: dy * w * r), "without the term along x"),
    "norm no weight": (
        _norm(lambda dy, x, w, r: dy * r - x * (dy * x).mean(-1, keepdim=True) * r**3),
        "without the norm's weight",
    ),
    "norm sum": (
        _norm(lambda dy, x, w, r: dy * w * r - x * (dy * w * x).sum(-1, keepdim=True) * r**3),
        "sum over channels",
    ),
    "norm skipped": (_norm(lambda dy, x, w, r: dy), "skipped in the backward"),
    "eps outside": (norm_eps_outside, "eps outside the root"),
    "silu sigmoid": (_silu(torch.sigmoid), "taken as σ alone"),
    "silu bell": (_silu(lambda x: torch.sigmoid(x) * torch.sigmoid(-x)), "that of the sigmoid"),
    "mlp residual": (_cut("mlp"), "residual path around the MLP"),
    "attention residual": (_cut("attention"), "residual path around the attention"),
    "up path": (_cut("up"), "through up_proj is missing"),
    "frozen means detached": (_project(_forgets_base), "frozen weight's term is missing"),
    "adapter detached": (_project(_forgets_branch), "adapter's term is missing"),
    "alpha": (_with_scale(lambda a: a["alpha"]), "alpha instead of alpha/rank"),
    "scale one": (_with_scale(lambda a: 1.0), "scale is 1"),
    "rslora": (_with_scale(lambda a: a["alpha"] / a["rank"] ** 0.5), "rsLoRA"),
    "scale forgotten": (_project(_unscaled_backward), "missing in the backward"),
    "dB twice": (_scaled_gradients(lambda t: 1.0, lambda t: t.s), "scale is applied twice to dB"),
    "dA unscaled": (_scaled_gradients(lambda t: 1 / t.s, lambda t: 1.0), "missing in dA|1/s"),
    "over rank": (_scaled_gradients(lambda t: 1 / 4, lambda t: 1 / 4), "1/rank"),
    "negative": (_scaled_gradients(lambda t: -1, lambda t: -1), "−1"),
    "last token": (_one_row(lambda i: i[:, -1].flatten()), "last token only|does not arrive"),
    "first sequence": (_one_row(lambda i: i[0].flatten()), "first sequence"),
}  # fmt: skip
LOSSES: dict[str, tuple[Patch, str]] = {
    "sum": (
        _loss(lambda z, y: F.cross_entropy(torch_wide(torch, z), y, reduction="sum")),
        "a sum over",
    ),
    "token 0": (_loss(_zero_ignored), "token id 0"),
    "padding counts": (_loss(_counts_padding), "labels of −100 count"),
    "no shift": (unshifted, "not shifted"),
}
