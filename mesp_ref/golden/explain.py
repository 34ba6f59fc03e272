"""What a wrong answer looks like: a mistake that we know, or what can be said without one.

A name is given only where it explains every tensor that failed, leaves those that passed alone, and
nothing else explains them as well. In this order: values that are not finite; gradients that are 0;
one number alone, from which nothing can be told; the known mistakes, each computed for this very case;
tensor by tensor a factor, another order or a sum of terms; products of matrices in TF32; a known mistake
in one place only; how many digits agree. Otherwise the sentence begins with "not a mistake we know" and
says where the error is.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.config import config_of
from mesp_ref.golden import places, terms
from mesp_ref.golden.answer import Answer, Arrays, floor, judged, left, weights
from mesp_ref.golden.mistakes import known, title
from mesp_ref.golden.mistakes.sites import at_one_site
from mesp_ref.golden.plain import Plain, model_name
from mesp_ref.golden.relations import listed, relation
from mesp_ref.golden.simulate import Run, of_op, simulator
from mesp_ref.golden.suite import DTYPES, Case, Suite, Tensor, Vectors
from mesp_ref.golden.tf32 import in_tf32
from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

MOST = 2  # explanations that a name may have beside it, because they are the same on this case
SHOWN = 3  # explanations that are the same here, or sentences about single tensors
SIMPLER = 4.0  # an explanation must leave this many times less than another to be the better one
STRANGE = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    MespRefError,
)
TILE = re.compile(r"tiles of (\d+)")
UNKNOWN = "not a mistake we know"


def explain(
    suite: Suite, case: Case, vectors: Vectors, got: Arrays, dtype: str, failed: Sequence[Tensor]
) -> list[str]:
    """Sentences about an answer to a case of a suite; `failed` are the tensors that did.

    A stranger's suite may lack what its case is computed from: then nothing is said.
    """
    try:
        with np.errstate(all="ignore"):
            answer, whole = (
                _answer(case, vectors, got, dtype, failed, inner=inner) for inner in (False, True)
            )
            return sentences(answer, lambda: simulator(case, vectors.inputs, suite.root), whole)
    except STRANGE:
        return []


def explain_op(
    op: str,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    got: Arrays,
    want: Arrays,
    allowed: Arrays,
    dtype: str = "float64",
) -> list[str]:
    """Sentences about the results of one op on any arguments, empty when all are within `allowed`.

    op           its name in the registry
    inputs       arrays by the names of the op's arguments, and "dy", the cotangent
    attributes   eps, s
    got          results: "y", and the gradient "dx" of every argument x; some may be left out
    want         the right ones, allowed: the largest right deviation of every entry
    """
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in inputs.items()}
    usable, unusable, failed = Arrays(), {}, []
    for name, right in want.items():
        if name not in got:
            continue
        value = np.asarray(got[name], np.float64)
        if problem := _problem(value, right.shape, right):
            unusable[name] = problem
        else:
            usable[name] = value
            failed += [name] if (np.abs(value - right) > allowed[name]).any() else []
    answer = Answer(
        "op", {"op": op, **attributes}, wide, usable, want, allowed, tuple(failed), unusable, dtype
    )
    return sentences(answer, lambda: of_op(op, wide, attributes)) if failed or unusable else []


def sentences(
    answer: Answer, simulate: Callable[[], Run | None], whole: Answer | None = None
) -> list[str]:
    """The sentences of the first way of looking that says something; see the module.

    `whole` has the tensors on the way, too, where the answer has results alone.
    """
    if answer.unusable:
        return _unusable(answer)
    if not answer.failed:  # tensors that are missing, and nothing else
        return []
    gone = places.all_zero(answer)
    if not gone and all(answer.got[name].size == 1 for name in answer.failed):
        return [_one_number(answer)]
    answer, run = judged(answer), simulate()
    with np.errstate(all="ignore"):
        if run is not None and not _reproduces(answer, run(Plain)):
            run = None
    kinds = known(answer.kind, answer.attributes, answer.inputs) if run else []
    names = _explaining(answer, run, kinds) if run else []
    if gone:
        return [gone + (f", as where {' or '.join(names)}" if 0 < len(names) <= MOST else "")]
    single = _single(answer)
    if 0 < len(names) <= MOST:
        factor = f" ({single[0]})" if len(single) == 1 and " × " in single[0] else ""
        return [_named(names) + factor]
    return (
        single
        or (in_tf32(whole or answer, run) if run else [])
        or ([_several(names)] if names else [])
        or _one_factor(answer)
        or (_one_site(answer, run) if run else [])
        or _digits(answer)
        or [_unknown(answer)]
    )


def _named(names: Sequence[str]) -> str:
    return "like: " + "; or, the same here: ".join(names)


def _several(names: Sequence[str]) -> str:
    shown = "; or: ".join(names[:SHOWN])
    return f"{UNKNOWN} alone: {len(names)} look the same here, such as: {shown}"


# -- the answer --------------------------------------------------------------------------------


def _answer(
    case: Case, vectors: Vectors, got: Arrays, dtype: str, failed: Sequence[Tensor], *, inner: bool
) -> Answer:
    """What was given; of tensors on the way nothing where a result failed, or with `inner` all."""
    usable, allowed, unusable, want = Arrays(), Arrays(), dict[str, str](), dict(vectors.want)
    wrong = {tensor.name for tensor in failed}
    for tensor in case.tensors:
        array = got.get(tensor.name)
        if array is None or array.dtype.name not in DTYPES:
            continue
        value = array.astype(np.float64)
        if problem := _problem(value, tensor.shape, vectors.want[tensor.name]):
            unusable[tensor.name] = problem
            continue
        usable[tensor.name] = tensor.seen(value)
        want[tensor.name], allowed[tensor.name] = _known(tensor, vectors, dtype)
    inputs = {
        n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in vectors.inputs.items()
    }
    outer = {t.name for t in case.tensors if inner or t.role != "inner"}
    said = [n for n in usable if n in wrong]
    chosen = tuple(n for n in said if n in outer) or tuple(said)
    keep = outer if set(chosen) <= outer else set(usable)
    usable = {n: a for n, a in usable.items() if n in keep}
    unusable = {n: text for n, text in unusable.items() if n in wrong}
    views = {tensor.name: tensor.seen for tensor in case.tensors if tensor.samples}
    return Answer(
        case.kind, case.attributes, inputs, usable, want, allowed, chosen, unusable, dtype, views
    )


def _known(tensor: Tensor, vectors: Vectors, dtype: str) -> tuple[Array, Array]:
    """The right values of all that is seen of a tensor, and what each may be off by."""
    want, allowed = vectors.want[tensor.name], tensor.tolerance(vectors, dtype)
    if not tensor.samples:
        return want, allowed
    whole = vectors.whole[tensor.name]
    off = np.full(len(whole) - 2, tensor.whole_tolerance(vectors, dtype))
    return np.concatenate([want, whole[:-2]]), np.concatenate([allowed, off])


def _problem(value: Array, shape: tuple[int, ...], want: Array) -> str:
    if value.shape != shape:
        for text, order in (("is transposed", want.T), ("holds the right values", want.ravel())):
            if value.size == want.size and (value.shape == order.shape or order.ndim == 1):
                off = np.linalg.norm(value.ravel() - order.ravel())
                if off <= 0.02 * np.linalg.norm(want):
                    return f"{text}: has shape {list(value.shape)} instead of {list(shape)}"
        return f"has shape {list(value.shape)} instead of {list(shape)}"
    bad = int((~np.isfinite(value)).sum())
    return f"{bad} of {value.size} entries are not finite" if bad else ""


def _unusable(answer: Answer) -> list[str]:
    """Shapes and values that are not finite; nothing is named beside them."""
    said = [f"{name}: {text}" for name, text in answer.unusable.items()][:SHOWN]
    labels = answer.inputs.get("labels")
    finite = all("not finite" in text for text in answer.unusable.values())
    if finite and labels is not None and not (labels != -100).any():
        said.insert(0, "0/0 where no label counts: loss and gradient are 0 there")
    return said


def _one_number(answer: Answer) -> str:
    (name, *more) = answer.failed
    right = [n for n in answer.got if n not in answer.failed]
    beside = f"; {places.some(right)} agree" if right else ""
    those = places.some([name, *more])
    return f"{UNKNOWN}: of {those} one number differs, from which none can be told{beside}"


# -- known mistakes ----------------------------------------------------------------------------


class _Differs(Exception):
    """A tensor on the way is not what the backend gave."""


def _probe(kind: type[Plain], answer: Answer) -> type[Plain]:
    """A Plain that gives up at the first tensor that the backend has otherwise."""

    def compare(name: str, value: Array) -> None:
        if name in answer.got and left(answer, name, value) == np.inf:
            raise _Differs

    def keep(self: Plain, name: str, value: Array) -> Array:
        if answer.kind != "traj":
            compare(name, value)
            compare(model_name(name, self.number), value)
        return kind.keep(self, name, value)

    def stepped(self: Plain, name: str, value: Array) -> Array:
        compare(name, value)
        return value

    fast = {"scores": _scores, "mixed": _mixed}
    return type("Probe", (kind,), {"keep": keep, "stepped": stepped, **fast})


def _scores(_: Plain, q: Array, k: Array) -> Array:
    """Plain.scores by BLAS: hundreds of mistakes are tried."""
    return q.swapaxes(1, 2) @ k.transpose(0, 2, 3, 1)


def _mixed(_: Plain, p: Array, v: Array) -> Array:
    """Plain.mixed by BLAS."""
    return (p @ v.swapaxes(1, 2)).swapaxes(1, 2)


def _total(answer: Answer, guess: Arrays) -> float:
    """The worst part of an error that a guess leaves over all tensors given."""
    return max(
        (left(answer, n, guess[n]) if n in guess else np.inf for n in answer.got), default=np.inf
    )


def _reproduces(answer: Answer, right: Arrays) -> bool:
    """Whether Plain computes this case at all: it knows one family."""
    given = [n for n in answer.got if n in right]
    return bool(given) and all(
        _is_right(answer, n, answer.views[n](right[n]) if n in answer.views else right[n])
        for n in given
    )


def _is_right(answer: Answer, name: str, value: Array) -> bool:
    want = answer.want[name]
    if value.shape != want.shape:
        return False
    return bool((np.abs(value - want) <= 4 * weights(answer, name)).all())


def _try(
    answer: Answer, run: Run, kinds: Sequence[type[Plain]]
) -> Iterator[tuple[float, type[Plain]]]:
    """What each mistake leaves, where it explains."""
    with np.errstate(all="ignore"):
        for kind in kinds:
            try:
                rest = _total(answer, run(_probe(kind, answer)))
            except (_Differs, ValueError, IndexError, ZeroDivisionError):
                continue  # not this one, or one that this case's shapes cannot show
            if rest < np.inf:
                yield rest, kind


def _explaining(answer: Answer, run: Run, kinds: Sequence[type[Plain]]) -> list[str]:
    """The sentences of all mistakes that explain the answer equally well, in the order of `kinds`."""
    found = list(_try(answer, run, kinds))
    best = max(min((rest for rest, _ in found), default=0.0), floor(answer))
    return _merged([title(kind) for rest, kind in found if rest <= SIMPLER * best])


def _merged(names: Sequence[str]) -> list[str]:
    """Each sentence once; those that differ in the size of a tile as one."""
    sizes: dict[str, list[str]] = {}
    for name in names:
        size = TILE.search(name)
        sizes.setdefault(TILE.sub("tiles of #", name), []).append(size[1] if size else "")
    return [text.replace("#", " or ".join(dict.fromkeys(found))) for text, found in sizes.items()]


def _one_site(answer: Answer, run: Run) -> list[str]:
    """A known mistake at one projection, norm or rotation only."""
    if answer.kind not in ("block", "e2e"):
        return []
    sites = at_one_site(answer.kind, config_of(answer.attributes["config"]))
    names = _explaining(answer, run, sites)
    return [_named(names) if len(names) <= MOST else _several(names)] if names else []


# -- single tensors ----------------------------------------------------------------------------


def _single(answer: Answer) -> list[str]:
    """What every failed tensor is by itself; empty unless each is explained, in few sentences."""
    groups: dict[str, list[str]] = {}
    for name in answer.failed:
        text = relation(answer, name) or _terms(answer, name)
        if not text:
            return []
        groups.setdefault(text, []).append(name)
    if len(groups) > SHOWN and not all(text.startswith("holds ") for text in groups):
        return []
    said = [
        text if text.startswith(names[0] + ":") else f"{listed(names, answer)} {text}"
        for text, names in groups.items()
    ]
    return said[:SHOWN]


def _one_factor(answer: Answer) -> list[str]:
    """One factor on all failed tensors that is no number of the case: a clipped norm, or unknown."""
    names = answer.failed
    pairs = [(answer.got[n], answer.want[n]) for n in names if answer.want[n].any()]
    factor = sum(float((g * w).sum()) for g, w in pairs) / (
        sum(float((w * w).sum()) for _, w in pairs) or 1.0
    )
    if len(pairs) < 2 or any(left(answer, n, factor * answer.want[n]) == np.inf for n in names):
        return []
    size = float(np.sqrt(sum((answer.got[n] ** 2).sum() for n in names)))
    clipped = [c for c in (0.1, 0.5, 1.0, 5.0, 10.0) if abs(size / c - 1) < 1e-3]
    if clipped and factor < 1:
        return [
            f"{listed(names, answer)} × {factor:.4g}: clipped to a norm of {clipped[0]:g} together"
        ]
    return [f"{UNKNOWN}: {listed(names, answer)} × {factor:.4g}, one factor for all"]


def _terms(answer: Answer, name: str) -> str:
    if answer.kind != "op" or answer.got[name].size == 1:
        return ""
    found = terms.fit(answer, name, terms.terms_of(answer, name))
    return found.text if found else ""


# -- what can be said without a name -----------------------------------------------------------


def _digits(answer: Answer) -> list[str]:
    """Roundings: errors as large as those of a lower precision, everywhere."""
    lower = DTYPES[DTYPES.index(answer.dtype) + 1 :]
    errors = [places.relative(answer, n) for n in answer.failed]
    worst, typical = max(float(e.max()) for e in errors), max(map(_middle, errors))
    near = [d for d in lower if UNITS[d].store / 24 < typical < 3 * UNITS[d].store > worst / 6]
    if near and all(places.is_noise(answer, n) for n in answer.failed):
        return [
            f"agrees to {places.digits(answer):.1f} digits: computed or stored in a lower "
            f"precision, such as {' or '.join(near)}?"
        ]
    return []


def _middle(errors: Array) -> float:
    return float(np.median(errors)) if errors.size else 0.0


def _unknown(answer: Answer) -> str:
    return f"{UNKNOWN}: " + "; ".join(places.described(answer))
