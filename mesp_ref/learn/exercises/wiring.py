"""Questions about how a block hangs together: what a bug touches, RoPE's order, biases, shared heads."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question, sizes
from mesp_ref.ops import Array

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NEXT = {  # the backward of a block: what each cotangent is handed on to
    "dy": ("dz",), "dz": ("dgate", "dup"), "dgate": ("da",), "dup": ("da",), "da": ("dv", "ds"),
    "ds": ("dq", "dk"), "dv": ("dx",), "dq": ("dx",), "dk": ("dx",), "dx": (),
}  # fmt: skip
_OF = {  # the cotangent that a projection's gradients are formed from
    "q_proj": "dq", "k_proj": "dk", "v_proj": "dv", "o_proj": "da", "gate_proj": "dgate",
    "up_proj": "dup", "down_proj": "dy",
}  # fmt: skip
PLACES = {  # what is forgotten, and the first cotangent that it makes wrong
    "the residual path of the MLP": "da", "the slope of silu": "dgate", "the row sum of softmax": "ds",
    "dq is not turned back": "dq", "dn of k_proj": "dx", "the residual path of attention": "dx",
}  # fmt: skip


def stays_right(forgotten: str) -> set[str]:
    """What a bug touches.

    Asked     Something is forgotten in the backward of one block. Which LoRA gradients of that block are
              right all the same?
    Shapes    forgotten is the name of a case -> names out of q_proj, k_proj, v_proj, o_proj, gate_proj,
              up_proj, down_proj, as a set, list or tuple
    Answer    those whose cotangent is formed before the mistake in the backward, or beside it: the MLP comes
              first, then o_proj, then v_proj and (through softmax) q_proj and k_proj; dx comes last
    """
    wrong, todo = set[str](), [PLACES[forgotten]]
    while todo:
        cotangent = todo.pop()
        wrong.add(cotangent)
        todo += _NEXT[cotangent]
    return {name for name, cotangent in _OF.items() if cotangent not in wrong}


def _as_marks(returned: Any) -> Outputs:
    """Names as a 1 for each projection that stays right. Raises ValueError in a student's words."""
    if not isinstance(returned, set | frozenset | list | tuple):
        raise ValueError(f"expected a set of names, found {type(returned).__name__}")
    found = {str(name) for name in returned}
    if unknown := found - set(PROJECTIONS):
        raise ValueError(f"expected names out of {', '.join(PROJECTIONS)}; found {min(unknown)}")
    return {name: float(name in found) for name in PROJECTIONS}


_MLP, _ATTENTION = {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}
# By key: the place it is about, the names that are then returned, and what is said.
_TOUCHED: dict[str, tuple[str, set[str], str]] = {
    "other_half": ("the residual path of the MLP", _ATTENTION, "the other way round: the backward begins with the MLP, so its three gradients are formed before da is wrong, and attention's after it."),
    "o_before": ("the residual path of the MLP", _MLP | {"o_proj"}, "o_proj is formed from da, which is wrong already."),
    "none_of_mlp": ("the residual path of the MLP", set(), "the MLP's three gradients are formed before da in the backward, so they stay right."),
    "only_down": ("the residual path of the MLP", {"down_proj"}, "gate_proj and up_proj are formed before da as well, not down_proj alone."),
    "below_is_here": ("the residual path of attention", _MLP, "the residual path of attention changes dx only, which goes to the block below: in this block everything stays right."),
    "below_is_all": ("the residual path of attention", set(), "the residual path of attention changes dx only, which goes to the block below: in this block everything stays right."),
    "gate_right": ("the slope of silu", _MLP, "gate_proj is formed from dgate, which holds the slope of silu: it is wrong."),
    "up_wrong": ("the slope of silu", {"down_proj"}, "up_proj is formed from dup = dz ⊙ silu(gate), which holds no slope of silu: it stays right beside down_proj."),
    "slope_local": ("the slope of silu", _ATTENTION | {"up_proj", "down_proj"}, "a wrong dgate goes on through dn into da and all of attention."),
    "q_all": ("dq is not turned back", _MLP, "only dq is wrong: k_proj, v_proj and o_proj do not see it."),
    "q_and_k": ("dq is not turned back", _MLP | {"v_proj", "o_proj"}, "only dq is wrong: dk is turned back by a call of its own, so k_proj stays right."),
    "q_right": ("dq is not turned back", _MLP | _ATTENTION, "q_proj is formed from dq, which is wrong."),
    "v_wrong": ("the row sum of softmax", _MLP | {"o_proj"}, "dv = pᵀ·do needs no backward of softmax: v_proj stays right."),
    "o_wrong": ("the row sum of softmax", _MLP | {"v_proj"}, "o_proj is formed before softmax in the backward: it stays right."),
    "softmax_all": ("the row sum of softmax", _MLP, "o_proj is formed before softmax in the backward and dv beside it: both stay right."),
    "softmax_none": ("the row sum of softmax", _MLP | _ATTENTION, "q_proj and k_proj are formed from ds, which lacks the row sum: they are wrong."),
    "k_itself": ("dn of k_proj", _MLP | _ATTENTION - {"k_proj"}, "dn of k_proj is what goes below, into dx: the gradients of k_proj itself are formed from dk and stay right."),
    "dn_all": ("dn of k_proj", _MLP, "dn of k_proj only enters dx, which goes to the block below: here everything stays right."),
}  # fmt: skip


def _stays(g: Given, m: Wrong) -> Outputs:
    right = stays_right(g.forgotten)
    for place in PLACES:
        others = {key: said for key, (where, said, _) in _TOUCHED.items() if where == place}
        here = m.pick(right, **others)
        right = here if place == g.forgotten else right
    right = m.pick(right, nothing=set(), everything=set(PROJECTIONS), complement=set(PROJECTIONS) - right, mlp_always=_MLP)  # fmt: skip
    return _as_marks(right)


def _forgotten(place: str) -> Case:
    note = place if "not" in place else f"{place} is forgotten"
    return Case(place, note, lambda rng: {"forgotten": place})


STAYS = question(
    stays_right,
    "which gradients a bug leaves right",
    cases=tuple(_forgotten(place) for place in PLACES),
    formula=_stays,
    named=_as_marks,
    numbers=lambda g: {},
    given="A result of 1 for a projection means: its gradients of A and B stay right.",
    hints=(
        "Walk the backward in its own order: dy, MLP, da, o_proj, attention, dx. What comes before the mistake is right.",
        "Within attention: dv does not pass softmax; dq and dk do. dx belongs to the block below.",
    ),
    mistakes={key: said for key, (_, _, said) in _TOUCHED.items()}
    | {
        "nothing": "nothing is said to stay right: a backward forms its gradients one after the other, and what came before a mistake is untouched.",
        "everything": "everything is said to stay right.",
        "complement": "it is the other way round: these turn wrong.",
        "mlp_always": "the MLP's three are said every time: it depends on what is forgotten.",
    },
)


def qkv_bias_bwd(dq: Array, dk: Array, dv: Array, cos: Array, sin: Array) -> tuple[Array, ...]:
    """The biases of q, k and v, were they trained.

    Asked     q = rope(x·W_qᵀ + b_q), k likewise, v = x·W_vᵀ + b_v without RoPE. Attention's backward has given
              dq, dk and dv. The gradients of the three biases?
    Shapes    dq [N, T, H, D], dk and dv [N, T, G, D], cos and sin [T, D/2] -> db_q [H·D], db_k [G·D], db_v [G·D]
    Answer    turn dq and dk back (rope_bwd), then sum over N and T: every row adds the same bias
    """
    turned = [ops.rope_bwd(d, ops.RopeRes(), cos, sin) for d in (dq, dk)]
    bq, bk, bv = (d.sum(axis=(0, 1)).reshape(-1) for d in (*turned, dv))
    return bq, bk, bv


def _turn(g: Given, d: Array, m: Wrong, name: str) -> Array:
    found: Array = m.pick(
        ops.rope_bwd(d, ops.RopeRes(), g.cos, g.sin), not_turned=d, forward=ops.rope(d, g.cos, g.sin)[0],
        **{f"{name}_not_turned": d, f"{name}_forward": ops.rope(d, g.cos, g.sin)[0],
           f"{name}_summed_first": ops.rope_bwd(d.mean(axis=(0, 1), keepdims=True) + 0 * d, ops.RopeRes(), g.cos, g.sin)},
    )  # fmt: skip
    return found


def _over_rows(d: Array, m: Wrong, name: str) -> Array:
    rows = d.shape[0] * d.shape[1]
    summed = m.pick(
        d.sum(axis=(0, 1)), averaged=d.mean(axis=(0, 1)), first=d[0].sum(axis=0), last=d[-1].sum(axis=0),
        **{f"{name}_averaged": d.sum(axis=(0, 1)) / rows, f"{name}_over_batch": d.sum(axis=(0, 1)) / len(d),
           f"{name}_over_length": d.sum(axis=(0, 1)) / d.shape[1], f"{name}_first": d[0].sum(axis=0), f"{name}_last": d[:, -1].sum(axis=0)},
    )  # fmt: skip
    found: Array = m.pick(summed.reshape(-1), **{f"{name}_heads_inside": summed.T.reshape(-1), f"{name}_not_flat": summed})  # fmt: skip
    return found


def _bias(g: Given, m: Wrong) -> Outputs:
    dv = m.pick(g.dv, v_turned=ops.rope_bwd(g.dv, ops.RopeRes(), g.cos, g.sin))
    three = {"q": _turn(g, g.dq, m, "q"), "k": _turn(g, g.dk, m, "k"), "v": dv}
    found = {f"db_{name}": _over_rows(d, m, name) for name, d in three.items()}
    return m.pick(found, exchanged=found | {"db_k": found["db_v"], "db_v": found["db_k"]})


def _heads(name: str, note: str, n: int, t: int, h: int, g: int, d: int) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        angle = np.arange(t)[:, None] * 10.0 ** (-np.arange(d // 2) / 2)
        given = {
            k: rng.standard_normal((n, t, heads, d))
            for k, heads in (("dq", h), ("dk", g), ("dv", g))
        }
        return given | {"cos": np.cos(angle), "sin": np.sin(angle)}

    return Case(name, note, draw)


_BIAS_SAYS = {
    "{}_not_turned": "{} is not turned back before the sum: the bias enters before RoPE.",
    "{}_forward": "{} is turned forward again where it must be turned back.",
    "{}_summed_first": "{} is averaged over positions first and turned afterwards: each position has an angle of its own.",
    "{}_averaged": "{} is averaged over the rows: it is a sum, every row adds the same bias.",
    "{}_over_batch": "{} is divided by the batch size N: it is a sum.",
    "{}_over_length": "{} is divided by the number of positions T: it is a sum.",
    "{}_first": "only the first sequence of the batch counts in {}.",
    "{}_last": "only the last position counts in {}.",
    "{}_heads_inside": "the entries of {} are in another order: heads come first, then D (no transpose).",
    "{}_not_flat": "{} has the shape [heads, D]: its values are right, flatten it to one row (reshape).",
}
BIAS = question(
    qkv_bias_bwd,
    "gradients of the biases of q, k and v",
    outputs="db_q db_k db_v",
    cases=(
        _heads("small", "two rows, two heads, one shared", 1, 2, 2, 1, 2),
        _heads("uneven", "three sequences of five, six heads share two", 3, 5, 6, 2, 4),
        _heads("longer", "two sequences of nine", 2, 9, 3, 3, 6),
    ),
    formula=_bias,
    numbers=lambda g: {"N": g.dq.shape[0], "T": g.dq.shape[1], "H": g.dq.shape[2], "G": g.dk.shape[2], "D": g.dq.shape[3]},
    hints=(
        "The bias is added to every row, before q and k are rotated. v is not rotated.",
        "ops.rope_bwd(dq, ops.RopeRes(), cos, sin) turns back; then a sum over the first two axes.",
    ),
    mistakes={
        key.format(n): said.format(f"d{n}" if "turn" in key or "summed" in key else f"db_{n}")
        for n in "qkv"
        for key, said in _BIAS_SAYS.items()
        if n != "v" or ("turn" not in key and "forward" not in key and "summed" not in key)
    }
    | {
        "not_turned": "dq and dk are not turned back before the sum: the bias enters before RoPE rotates.",
        "forward": "dq and dk are turned forward again where they must be turned back.",
        "averaged": "the gradients are averaged over the rows: they are sums.",
        "first": "only the first sequence of the batch counts.",
        "last": "only the last sequence of the batch counts.",
        "v_turned": "dv is turned, too: v has no RoPE, it is not rotated.",
        "exchanged": "db_k and db_v are exchanged when they are returned (wrong order).",
    },
)  # fmt: skip


def rope_order(D: int) -> Array:
    """From halves to neighbours.

    Asked     This RoPE pairs entry i with i + D/2. Other models pair 2i with 2i + 1. With which order are the
              two the same: x[..., order] has the pair (i, i + D/2) at 2i and 2i + 1, for every i?
    Shapes    D an even number -> order [D], indices
    Answer    0, D/2, 1, D/2 + 1, …: np.arange(D).reshape(2, D // 2).T.ravel()
    """
    return np.arange(D).reshape(2, D // 2).T.ravel()


def _order(g: Given, m: Wrong) -> Outputs:
    d, whole = g.D, np.arange(g.D)
    order = whole.reshape(2, d // 2).T.ravel()
    pairs = order.reshape(-1, 2)
    return {"order": m.pick(
        order, inverse=np.argsort(order), identity=whole, pairs_exchanged=pairs[:, ::-1].ravel(), first_twice=np.repeat(whole[: d // 2], 2),
        second_reversed=np.stack([whole[: d // 2], whole[::-1][: d // 2]], 1).ravel(), backwards=order[::-1], neighbours=whole.reshape(-1, 2)[:, ::-1].ravel(),
        halves=np.roll(whole, d // 2), late=np.stack([whole[: d // 2], (whole[: d // 2] + d // 2 + 1) % d], 1).ravel(),
        reversed=whole[::-1], not_flat=lambda: pairs, plain_inverse=np.concatenate([whole[1::2], whole[::2]]), pairs_backwards=pairs[::-1].ravel(),
    )}  # fmt: skip


ORDER = question(
    rope_order,
    "from RoPE in halves to RoPE in neighbours",
    outputs="order",
    cases=tuple(sizes(f"D = {d}", f"{d // 2} pairs", D=d) for d in (6, 8, 10, 64)),
    formula=_order,
    hints=(
        "The first two entries of x[..., order] must be the pair that turns with the first angle.",
        "order[0] = 0, order[1] = D/2, order[2] = 1, …: two rows of D/2, read column by column.",
    ),
    mistakes={
        "inverse": "it is the inverse order, the other way round: it takes neighbours to halves (0, 2, 4, …, 1, 3, …).",
        "plain_inverse": "odd entries come first, then even ones: it goes the other way round, and with pairs exchanged.",
        "identity": "the entries are left as they are.",
        "pairs_exchanged": "within each pair the two entries are exchanged: that turns the other way.",
        "first_twice": "the second half is missing: each pair holds an entry of the first half twice. The second of the pair is i + D/2 (not exchanged, not equal).",
        "second_reversed": "the second half is in reverse order: pair i is (i, i + D/2).",
        "backwards": "the whole order is reversed: the first pair turns fastest.",
        "pairs_backwards": "the pairs come in reverse: the first pair turns fastest.",
        "neighbours": "neighbours are exchanged: entry i is paired with i + D/2, not with the next one.",
        "halves": "the halves are exchanged: they must be interleaved.",
        "late": "the second entry of each pair is off by one place: i + D/2.",
        "reversed": "the entries are in reverse.",
        "not_flat": "its values are right; only the shape is not: pairs as rows, expected one row.",
    },
)


def rope_verdict(dx: Array, dy: Array, cos: Array, sin: Array) -> int:
    """A namer of your own.

    Asked     Somebody's backward of RoPE made dx of dy. Say what it did: 0 turned back, as is right; 1 nothing
              (dx is dy); 2 turned forward again; 3 something else.
    Shapes    dx, dy [N, T, H, D], cos and sin [T, D/2] -> 0, 1, 2 or 3. dx may come in float32
    Answer    compute each of the three from dy and compare all entries, within the rounding of float32
    """
    for verdict, turned in enumerate(_candidates(dy, cos, sin)):
        if np.abs(dx - turned).max() <= 1e-5 * np.abs(turned).max():
            return verdict
    return 3


def _candidates(dy: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
    return ops.rope_bwd(dy, ops.RopeRes(), cos, sin), dy, ops.rope(dy, cos, sin)[0]


def _verdict(g: Given, m: Wrong) -> Outputs:
    def near(a: Array, b: Array) -> bool:
        size = np.linalg.norm(b)
        found = m.pick(
            np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), by_length=abs(np.linalg.norm(a) - size) <= 1e-5 * size,
            exactly=np.array_equal(a, b), first_position=np.abs(a - b)[:, 0].max() <= 1e-5 * np.abs(b).max(),
            by_sum=abs(a.sum() - b.sum()) <= 1e-5 * np.abs(b).max(), loose=np.abs(a - b).max() <= 3 * np.abs(b).max(), last_only=np.abs(a - b)[:, -1].max() <= 1e-5 * np.abs(b).max(),
        )  # fmt: skip
        return bool(found)

    found = next((i for i, c in enumerate(_candidates(g.dy, g.cos, g.sin)) if near(g.dx, c)), 3)
    swapped = {0: 2, 2: 0}.get(found, found)
    found = m.pick(
        found, always_right=0, never_3=min(found, 2), no_2=3 if found == 2 else found, no_1=3 if found == 1 else found,
        no_0=3 if found == 0 else found, exchanged=swapped, only_right=0 if found == 0 else 3,
        forward_twice=0 if found == 2 else 3 if found == 0 else found, always_3=3, from_1=found + 1,
    )  # fmt: skip
    return {"verdict": float(found)}


_DOES = {
    "turned back": 0,
    "turned back, in float32": 0,
    "handed on": 1,
    "turned forward": 2,
    "halves exchanged": 3,
    "first half only": 3,
    "positions reversed": 3,
    "one position doubled": 3,
}


def _judged(name: str, shape: tuple[int, int, int, int]) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        t, d = shape[1], shape[3]
        angle = np.arange(t)[:, None] * 10.0 ** (-np.arange(d // 2) / 2)
        dy, cos, sin = rng.standard_normal(shape), np.cos(angle), np.sin(angle)
        right = ops.rope_bwd(dy, ops.RopeRes(), cos, sin)
        made = {
            "turned back": right, "turned back, in float32": right.astype(np.float32), "handed on": dy,
            "turned forward": ops.rope(dy, cos, sin)[0], "positions reversed": right[:, ::-1], "one position doubled": right * (1 + (np.arange(t) == 1)[:, None, None]), "halves exchanged": ops.rope_bwd(dy, ops.RopeRes(), sin, cos),
            "first half only": np.concatenate([right[..., : d // 2], dy[..., d // 2 :]], axis=-1),
        }  # fmt: skip
        return {"dx": made[name].copy(), "dy": dy, "cos": cos, "sin": sin}

    return Case(name, f"expected {_DOES[name]}", draw)


VERDICT = question(
    rope_verdict,
    "a namer of your own: what did this RoPE backward do?",
    outputs="verdict",
    cases=tuple(_judged(name, (2, 4, 3, 6)) for name in _DOES),
    formula=_verdict,
    numbers=lambda g: {},
    hints=(
        "Compute what each mistake would give, and compare: that is all that the tutor does.",
        "A rotation keeps lengths, and at position 0 it does nothing: compare every entry, within 1e-5 of the largest.",
    ),
    mistakes={
        "by_length": "only lengths (norms) are compared: a rotation keeps them, so everything looks right.",
        "exactly": "values are compared exactly: float32's rounding makes a right answer look wrong.",
        "first_position": "only the first position is compared: at position 0 the angle is 0, and every rotation is the same.",
        "last_only": "only the last position is compared.",
        "by_sum": "only sums are compared.",
        "loose": "the verdict is always 0, right: nothing is compared, or the tolerance is so loose that a large difference passes.",
        "always_right": "the verdict is always 0, right: nothing is compared, or the tolerance is so loose that a large difference passes.",
        "always_3": "the verdict is always 3.",
        "never_3": "what is neither of the three is called 2: it is 3, something else.",
        "no_2": "turned forward again (2) is not recognised.",
        "no_1": "not turned at all (1) is not recognised.",
        "no_0": "the right answer (0) is not recognised.",
        "only_right": "only 0 is told from the rest: 1 and 2 have a verdict of their own.",
        "exchanged": "forward and backward are exchanged: right is turned back (0), turned forward is 2.",
        "forward_twice": "turned forward is taken for right, and turned back not recognised: forward and backward are exchanged.",
        "from_1": "verdicts count from 0.",
    },
)  # fmt: skip


def averaged_heads(H: int, G: int) -> dict[str, float]:
    """A mean where a sum belongs.

    Asked     H query heads share G key/value heads. A backward averages dk and dv over the query heads of a
              group instead of summing them. By which factor are the gradients of A and B of q_proj, k_proj,
              v_proj and o_proj then off?
    Shapes    H, G numbers -> the four factors by name, or in this order
    Answer    H/G queries share a head, so dk and dv are G/H of what they must be; q_proj and o_proj are right
    """
    return {"q_proj": 1.0, "k_proj": G / H, "v_proj": G / H, "o_proj": 1.0}


def _averaged(g: Given, m: Wrong) -> Outputs:
    off = m.pick(g.G / g.H, upside_down=g.H / g.G, by_heads=1 / g.H, by_groups=1 / g.G, no_effect=1.0, rooted=(g.G / g.H) ** 0.5, zero=0.0)  # fmt: skip
    found = {
        "q_proj": m.pick(1.0, q_too=off), "k_proj": m.pick(off, k_right=1.0),
        "v_proj": m.pick(off, v_right=1.0), "o_proj": m.pick(1.0, o_too=off),
    }  # fmt: skip
    return m.pick(
        found,
        all_four=dict.fromkeys(found, off),
        exchanged={"q_proj": off, "k_proj": 1.0, "v_proj": 1.0, "o_proj": off},
    )


AVERAGED = question(
    averaged_heads,
    "what a mean over shared heads does",
    outputs="q_proj k_proj v_proj o_proj",
    cases=(
        sizes("Qwen2.5-0.5B", "H = 14, G = 2", H=14, G=2),
        sizes("pairs", "H = 8, G = 4", H=8, G=4),
        sizes("one", "H = 9, G = 1", H=9, G=1),
    ),
    formula=_averaged,
    hints=(
        "How many query heads does one key/value head receive from?",
        "A mean is the sum divided by H/G. dq does not depend on dk; o_proj comes before both.",
    ),
    mistakes={
        "upside_down": "it is upside down: a mean of H/G is G/H of the sum, too small and not too large.",
        "by_heads": "1/H stands where G/H belongs: only the H/G heads of a group are averaged, not all heads.",
        "by_groups": "1/G stands where G/H belongs: a group has H/G query heads, not G.",
        "no_effect": "k_proj and v_proj are said to be right, a factor of 1: a mean is smaller than a sum.",
        "rooted": "a root is taken: gradients are linear in dk.",
        "zero": "k_proj and v_proj are not 0: a mean is left.",
        "q_too": "q_proj is right: dq is not summed over heads.",
        "k_right": "k_proj is wrong as well: dk is averaged, too.",
        "v_right": "v_proj is wrong as well: dv is averaged, too.",
        "o_too": "o_proj is right: its gradients are formed before attention's backward.",
        "all_four": "q_proj and o_proj are right: only dk and dv are averaged.",
        "exchanged": "it is the other way round: k_proj and v_proj are wrong, q_proj and o_proj right (exchanged).",
    },
)
