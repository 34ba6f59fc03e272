"""Questions about LoRA: how much h is, what it keeps of x, a late update, merging, a rank too large."""

from typing import Any

import numpy as np

from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question, sizes
from mesp_ref.ops import Array


def rank_of_h(saving: float, layers: int, tokens: int, itemsize: int) -> float:
    """How much the projection h is.

    Asked     h = x·Aᵀ of all seven projections of all blocks is held at once. At which rank R would it be as
              large as a saving?
    Shapes    saving in bytes, blocks, tokens, bytes of a number -> R, a number
    Answer    one h has tokens·R numbers: R = saving/(7·layers·tokens·itemsize)
    """
    return saving / (7 * layers * tokens * itemsize)


def _rank(g: Given, m: Wrong) -> Outputs:
    one = m.pick(g.tokens, no_tokens=1, tokens_squared=g.tokens**2) * m.pick(g.itemsize, no_itemsize=1, four_bytes=4, bits=g.itemsize / 8)  # fmt: skip
    one = one * m.pick(7, one_h=1, attention_only=4, two=2, mlp_only=3, six=6) * m.pick(1, twice=2)
    whole = one * m.pick(g.layers, no_layers=1, one_fewer=g.layers - 1)
    saving = m.pick(g.saving, in_mb=g.saving / 1e6, in_mib=g.saving / 2**20)
    return {"R": m.pick(saving / whole, upside_down=whole / saving, rounded_up=np.ceil(saving / whole), rounded_down=np.floor(saving / whole), product=saving * whole, whole=float(whole))}  # fmt: skip


RANK = question(
    rank_of_h,
    "the rank at which h would matter",
    outputs="R",
    cases=(
        sizes("Qwen2.5-0.5B", "224.6 MB, 24 blocks, 256 tokens, bfloat16", saving=224.6e6, layers=24, tokens=256, itemsize=2),
        sizes("small", "1 MB, 2 blocks, 40 tokens, float32", saving=1e6, layers=2, tokens=40, itemsize=4),
        sizes("long", "3 GB, 30 blocks, 2,048 tokens, float64", saving=3e9, layers=30, tokens=2048, itemsize=8),
    ),
    formula=_rank,
    hints=("How many numbers has one h, and how many h are there?", "Seven projections a block: q, k, v, o, gate, up, down."),
    mistakes={
        "no_tokens": "the tokens are missing: h has a row for each.",
        "tokens_squared": "the tokens stand squared: h has tokens·R numbers.",
        "no_itemsize": "the itemsize is missing: a saving in bytes, h in numbers.",
        "four_bytes": "4 bytes a number are taken: the itemsize is given.",
        "bits": "the itemsize is divided by 8: bytes are given, not bits.",
        "one_h": "one h a block is counted: there are seven, one for each projection.",
        "attention_only": "only attention's four projections are counted: there are seven.",
        "mlp_only": "only the MLP's three projections are counted: there are seven.",
        "two": "only two projections are counted: there are seven.",
        "six": "six projections are counted: there are seven, q, k, v, o, gate, up and down.",
        "twice": "h is counted twice.",
        "no_layers": "the layers are missing: every block has its own h.",
        "one_fewer": "one layer is missing.",
        "in_mb": "the saving is turned into MB (10⁶) first: it is in bytes, as h is.",
        "in_mib": "the saving is turned into MiB (2²⁰) first: it is in bytes, as h is.",
        "upside_down": "it is upside down: the saving is divided by the bytes of one rank.",
        "rounded_up": "it is rounded up: the number itself is asked for.",
        "rounded_down": "it is rounded to a whole number: the number itself is asked for.",
        "product": "saving and bytes of one rank are multiplied: divide.",
        "whole": "these are the bytes of rank 1: the saving is missing.",
    },
)  # fmt: skip


def x_from_h(h: Array, A: Array) -> Array:
    """What h keeps of x.

    Asked     h = x·Aᵀ is kept and x is dropped. Make the best guess of x from h: the shortest x that gives
              this h. (Then look how much of x is lost: that is why x must be kept, not h.)
    Shapes    h [M, R], A [R, in], R < in -> x [M, in]
    Answer    x = h·(A·Aᵀ)⁻¹·A, the part of x within the R rows of A; dA = dhᵀ·x needs the rest as well
    """
    x: Array = h @ np.linalg.solve(A @ A.T, A)
    return x


def _guess(g: Given, m: Wrong) -> Outputs:
    gram = g.A @ g.A.T
    rows = np.diag(gram)
    inverse = m.pick(
        np.linalg.inv(gram), no_inverse=np.eye(len(gram)), not_inverted=gram, one_norm=np.eye(len(gram)) / rows.sum(),
        rows_apart=np.diag(1 / rows), rows_rooted=np.diag(1 / np.sqrt(rows)), twice=np.linalg.inv(gram) @ np.linalg.inv(gram), over_in=np.eye(len(gram)) / g.A.shape[1], over_rank=np.eye(len(gram)) / len(gram),
    )  # fmt: skip
    x = g.h @ inverse @ g.A
    padded = np.zeros_like(x)
    padded[:, : g.h.shape[1]] = g.h
    return {
        "x": m.pick(
            x, zero=0 * x, negated=-x, half=x / 2, padded=padded, not_back=lambda: g.h @ inverse
        )
    }


def _projected(name: str, note: str, m: int, r: int, i: int) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        A = rng.standard_normal((r, i))
        return {"h": rng.standard_normal((m, i)) @ A.T, "A": A}

    return Case(name, note, draw)


GUESS = question(
    x_from_h,
    "the best guess of x from h, and what it lacks",
    outputs="x",
    cases=(_projected("small", "rank 2 of 4", 3, 2, 4), _projected("larger", "rank 3 of 12", 5, 3, 12)),
    formula=_guess,
    numbers=lambda g: {"R": g.A.shape[0], "in": g.A.shape[1]},
    hints=(
        "The shortest x lies within the rows of A: x = c·A for some c [M, R]. Which c?",
        "c·A·Aᵀ = h, so c = h·(A·Aᵀ)⁻¹.",
    ),
    mistakes={
        "no_inverse": "the inverse (A·Aᵀ)⁻¹ is missing: h·A is the backward of x·Aᵀ, not its inverse.",
        "not_inverted": "A·Aᵀ is not inverted: its inverse belongs there.",
        "one_norm": "one number, the squared norm of A, stands where the inverse of A·Aᵀ belongs.",
        "rows_apart": "the rows of A are treated as if they were perpendicular: A·Aᵀ has entries beside its diagonal.",
        "rows_rooted": "the rows of A are only scaled to length 1 (a root of the diagonal): the inverse of A·Aᵀ belongs there.",
        "twice": "the inverse of A·Aᵀ is applied twice.",
        "over_in": "h·A is divided by the number of inputs where the inverse of A·Aᵀ belongs.",
        "over_rank": "h·A is divided by the rank where the inverse of A·Aᵀ belongs.",
        "zero": "it is 0: that is the shortest x of all, but it does not give h.",
        "negated": "x has the wrong sign.",
        "half": "it is half of what it must be.",
        "padded": "h is padded with zeros: its R numbers are not the first entries of x.",
        "not_back": "A is missing at the end: x = h·(A·Aᵀ)⁻¹·A has the shape [M, in].",
    },
)  # fmt: skip


def late_dx(dy: Array, x: Array, A: Array, B: Array, *, s: float, lr: float) -> Array:
    """An update too early.

    Asked     A backward takes A ← A − lr·dA before it forms dx = dy·W + dh·A. By how much is its dx off?
              Return the error, wrong dx minus right dx.
    Shapes    dy [M, out], x [M, in], A [R, in], B [out, R] -> error [M, in]
    Answer    dh = s·dy·B, dA = dhᵀ·x; the error is −lr·dh·dA
    """
    dh = s * (dy @ B)
    error: Array = -lr * (dh @ (dh.T @ x))
    return error


def _late(g: Given, m: Wrong) -> Outputs:
    plain = g.dy @ g.B
    dh = m.pick(g.s * plain, no_s=plain, s_squared=g.s**2 * plain)
    left = m.pick(dh, s_once=plain)
    inner = m.pick(dh, h_for_dh=g.x @ g.A.T)
    dA = m.pick(inner.T @ g.x, averaged=inner.T @ g.x / len(g.x))
    rate = m.pick(g.lr, no_lr=1.0, lr_squared=g.lr**2)
    error = -rate * (left @ dA)
    relative = error / np.linalg.norm(dh @ g.A)
    return {"error": m.pick(
        error, sign=-error, whole=dh @ (g.A - g.lr * dA), of_A=-g.lr * (dh @ g.A), dA_alone=lambda: -g.lr * dA, relative=relative, zero=0 * error, both=2 * error,
    )}  # fmt: skip


def _layer(name: str, note: str, m: int, o: int, i: int, r: int) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        shapes = {"dy": (m, o), "x": (m, i), "A": (r, i), "B": (o, r)}
        return {k: rng.standard_normal(v) for k, v in shapes.items()} | {"s": 1.7, "lr": 0.1}

    return Case(name, note, draw)


LATE = question(
    late_dx,
    "what an update before dx does",
    outputs="error",
    cases=(_layer("small", "two rows, rank 2", 2, 3, 4, 2), _layer("larger", "six rows, rank 3", 6, 9, 7, 3)),
    formula=_late,
    numbers=lambda g: {"M": len(g.x), "R": len(g.A), "s": g.s, "lr": g.lr},
    hints=("Put A − lr·dA in place of A in dx, and multiply out.", "dx holds A once: what is left over is −lr·dh·dA."),
    mistakes={
        "no_s": "the scale s is missing in dh = s·dy·B.",
        "s_squared": "the scale s stands twice in dh: dh = s·dy·B.",
        "s_once": "the scale s is there only once: dh holds it, and dA holds dh as well.",
        "h_for_dh": "h stands where dh belongs in dA = dhᵀ·x.",
        "averaged": "dA is averaged over the rows: it is a sum.",
        "no_lr": "the learning rate lr is missing.",
        "lr_squared": "the learning rate lr stands twice (lr²).",
        "sign": "the sign is wrong: A − lr·dA is used, so the error is −lr·dh·dA (wrong minus right).",
        "whole": "this is the late dx of the adapter itself, dh·(A − lr·dA): its difference from the right one is asked for.",
        "of_A": "A stands where its update dA belongs.",
        "dA_alone": "this is the change of A, −lr·dA: dx changes by dh times that.",
        "relative": "it is divided by the length of dh·A: the error itself is asked for, not relative.",
        "zero": "it is 0: dx does hold A.",
        "both": "it is twice what it must be: only A is updated, B is not in this term.",
    },
)  # fmt: skip


def merged_weight(W: Array, A: Array, B: Array, s: float) -> Array:
    """An adapter folded into its weight.

    Asked     y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ. Which single weight W' gives the same, y = x·W'ᵀ?
    Shapes    W [out, in], A [R, in], B [out, R], s a number -> W' [out, in]
    Answer    W' = W + s·B·A
    """
    merged: Array = W + s * (B @ A)
    return merged


def _merged(g: Given, m: Wrong) -> Outputs:
    ba = m.pick(g.B @ g.A, transposed=lambda: (g.B @ g.A).T, unshared=np.abs(g.B) @ np.abs(g.A))
    scale = m.pick(g.s, no_s=1.0, s_squared=g.s**2, one_over_s=1 / g.s, over_rank=g.s / len(g.A), times_rank=g.s * len(g.A), rooted=g.s**0.5)  # fmt: skip
    W = m.pick(
        g.W + scale * ba, subtracted=g.W - scale * ba, no_base=scale * ba, no_adapter=g.W + 0 * ba, times_w=lambda: g.W * (1 + scale * ba),
        all_scaled=scale * (g.W + ba), base_scaled=scale * g.W + ba, averaged=(g.W + scale * ba) / 2,
    )  # fmt: skip
    return {"W": m.pick(W, turned=lambda: W.T)}


def _pair(name: str, note: str, o: int, i: int, r: int, s: float) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        return {"W": rng.standard_normal((o, i)), "A": rng.standard_normal((r, i)), "B": rng.standard_normal((o, r)), "s": s}  # fmt: skip

    return Case(name, note, draw)


MERGED = question(
    merged_weight,
    "an adapter folded into its weight",
    outputs="W",
    cases=(_pair("small", "3 × 4, rank 2", 3, 4, 2, 2.0), _pair("square", "5 × 5, rank 2", 5, 5, 2, 0.5), _pair("wide", "2 × 9, rank 3", 2, 9, 3, 1.3)),
    formula=_merged,
    numbers=lambda g: {"R": len(g.A), "s": g.s},
    hints=("Write both branches as x times a matrix.", "(x·Aᵀ)·Bᵀ = x·(B·A)ᵀ."),
    mistakes={
        "transposed": "B·A is transposed, or multiplied in another order (A·B): W is [out, in], as B·A is.",
        "turned": "W' is transposed: W is [out, in].",
        "unshared": "absolute values are taken.",
        "no_s": "the scale s is missing.",
        "s_squared": "the scale s stands twice (s²).",
        "one_over_s": "B·A is divided by the scale: s multiplies it.",
        "over_rank": "it is divided by the rank once more: s = alpha/R holds it already.",
        "times_rank": "it is multiplied by the rank: s = alpha/R holds it already.",
        "rooted": "the root of the scale is taken.",
        "subtracted": "B·A is subtracted: the sign is wrong.",
        "no_base": "the base weight W is missing.",
        "no_adapter": "the adapter is missing: W' is W itself.",
        "times_w": "B·A multiplies W entry by entry: it is added.",
        "all_scaled": "W is scaled, too: s multiplies B·A only.",
        "base_scaled": "s multiplies W where it must multiply B·A.",
        "averaged": "it is halved: the branches are added, not averaged.",
    },
)  # fmt: skip


def equal_rank(H: int, G: int, D: int, C: int, F: int) -> float:
    """A rank too large.

    Asked     The seven projections of a block are q [H·D, C], k and v [G·D, C], o [C, H·D], gate and up [F, C],
              down [C, F]. LoRA of rank R adds R·(in + out) numbers to each. At which R are these together as
              many as the seven projections themselves?
    Shapes    H, G, D, C, F numbers -> R, a number
    Answer    R = Σ in·out / Σ (in + out)
    """
    shapes = [(H * D, C), (G * D, C), (G * D, C), (C, H * D), (F, C), (F, C), (C, F)]
    return sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)


def _equal(g: Given, m: Wrong) -> Outputs:
    kv = m.pick(g.G * g.D, unshared=g.H * g.D, no_d=g.G)
    every = {"q": (g.H * g.D, g.C), "k": (kv, g.C), "v": (kv, g.C), "o": (g.C, g.H * g.D), "gate": (g.F, g.C), "up": (g.F, g.C), "down": (g.C, g.F)}  # fmt: skip
    left = m.pick((), no_down=("down",), one_of_two=("up",), attention=("gate", "up", "down"), mlp=("q", "k", "v", "o"), q_v=("k", "o", "gate", "up", "down"), no_o=("o",))  # fmt: skip
    shapes = [shape for name, shape in every.items() if name not in left]
    whole, each = sum(o * i for o, i in shapes), sum(o + i for o, i in shapes)
    each = m.pick(
        each, only_A=sum(i for _, i in shapes), only_B=sum(o for o, _ in shapes), products=whole
    )
    ratios = [o * i / (o + i) for o, i in shapes]
    return {"R": m.pick(
        whole / each, upside_down=each / whole, mean_of_ratios=sum(ratios) / len(ratios), sum_of_ratios=sum(ratios),
        twice=2 * whole / each, half=whole / each / 2, c_itself=float(g.C), rooted=(whole / each) ** 0.5,
    )}  # fmt: skip


EQUAL_RANK = question(
    equal_rank,
    "the rank at which LoRA is as large as what it adapts",
    outputs="R",
    cases=(
        sizes("Qwen2.5-0.5B", "H 14, G 2, D 64, C 896, F 4864", H=14, G=2, D=64, C=896, F=4864),
        sizes("small", "H 4, G 1, D 8, C 24, F 64", H=4, G=1, D=8, C=24, F=64),
        sizes("wide", "H 6, G 3, D 16, C 80, F 100", H=6, G=3, D=16, C=80, F=100),
    ),
    formula=_equal,
    hints=("Count A [R, in] and B [out, R] for all seven, and the seven matrices.", "R·Σ(in + out) = Σ in·out."),
    mistakes={
        "unshared": "k and v are counted with H heads: they have G, which is what sharing saves.",
        "no_d": "k and v are counted with G outputs: they have G·D.",
        "no_down": "one of the MLP's three projections is missing: gate, up and down.",
        "one_of_two": "one of the MLP's three projections is missing: gate, up and down.",
        "attention": "only attention's projections, or q and v alone, are counted: there are seven, the MLP's three among them.",
        "mlp": "only the MLP's projections are counted: attention's four are missing.",
        "q_v": "only attention's projections, or q and v alone, are counted: there are seven, the MLP's three among them.",
        "no_o": "o_proj is missing.",
        "only_A": "only A, R·in, is counted: B has R·out.",
        "only_B": "only B, R·out, is counted: A has R·in.",
        "products": "Σ in·out is divided by itself.",
        "upside_down": "it is upside down: the matrices are divided by the numbers of rank 1.",
        "mean_of_ratios": "it is the mean of seven ratios: the totals are equal, so divide sum by sum, not each by each.",
        "sum_of_ratios": "it is the sum of seven ratios: the totals are equal, so divide sum by sum, not each by each.",
        "twice": "it is twice what it must be.",
        "half": "it is half of what it must be.",
        "c_itself": "it is the hidden size C, the largest rank that a matrix can have: count the numbers.",
        "rooted": "a root is taken: both counts are plain sums.",
    },
)  # fmt: skip
