"""Checkers of gradients on known kinds of bugs and on right backwards; writes docs/checkers.md's tables.

python benchmarks/checkers.py [--draws 40] [--cases FILE]

Cases are those of tests/verify/known_bugs.py, or a file of one's own with the same list KNOWN. Each
checker gets the pair at the case's one ordinary sample and at `draws` drawn examples, with its own
default tolerances. torch, jax, autograd and numdifftools are measured where they are installed.
"""

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from mesp_ref.verify import gradcheck

Pair = tuple[Callable[..., Any], Callable[..., Any]]
Checker = Callable[[Callable[..., Any], Callable[..., Any], tuple[Any, ...]], bool]
ROOT = Path(__file__).parent.parent


def ours(forward: Any, backward: Any, args: Any) -> bool:
    """mesp_ref.verify.gradcheck"""
    return gradcheck(forward, backward, args).passed


def _floats(args: Any) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def torch_gradcheck(forward: Any, backward: Any, args: Any) -> bool:
    """torch.autograd.gradcheck of a Function made of the pair."""
    import torch

    at, several = _floats(args), isinstance(forward(*args), tuple)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            full = _with(args, at, [t.detach().numpy() for t in tensors])
            ctx.full = full
            made = tuple(torch.as_tensor(np.asarray(y)) for y in _tuple(forward(*full)))
            return made if several else made[0]

        @staticmethod
        def backward(ctx: Any, *dys: Any) -> Any:
            given = tuple(d.detach().numpy() for d in dys)
            grads = _tuple(backward(given if several else given[0], *ctx.full))
            return tuple(None if g is None else torch.as_tensor(np.asarray(g)) for g in grads)

    tensors = [torch.tensor(args[i], requires_grad=True) for i in at]
    return bool(torch.autograd.gradcheck(Function.apply, tensors, raise_exception=False))


def _with(args: Any, at: list[int], moved: list[Any]) -> list[Any]:
    full = list(args)
    for i, value in zip(at, moved, strict=True):
        full[i] = np.asarray(value)
    return full


def jax_check_grads(forward: Any, backward: Any, args: Any) -> bool:
    """jax.test_util.check_grads, reverse mode, of a custom_vjp that calls the pair back."""
    import jax
    from jax.test_util import check_grads

    at = _floats(args)

    def like(value: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), value)

    made = forward(*args)

    def called(*moved: Any) -> Any:
        return jax.pure_callback(lambda *m: forward(*_with(args, at, list(m))), like(made), *moved)

    def back(moved: Any, dy: Any) -> Any:
        def run(d: Any, *m: Any) -> Any:
            given = tuple(map(np.asarray, d)) if isinstance(d, tuple) else np.asarray(d)
            return _tuple(backward(given, *_with(args, at, list(m))))

        return jax.pure_callback(run, like(tuple(moved)), dy, *moved)

    function: Any = jax.custom_vjp(called)
    function.defvjp(lambda *moved: (function(*moved), moved), back)
    with jax.enable_x64(True):
        check_grads(function, [jax.numpy.asarray(args[i]) for i in at], order=1, modes=["rev"])
    return True


def autograd_check_grads(forward: Any, backward: Any, args: Any) -> bool:
    """autograd.test_util.check_vjp of the pair as a primitive."""
    from autograd.extend import defvjp, primitive
    from autograd.test_util import check_vjp

    at = _floats(args)
    function = primitive(lambda *moved: forward(*_with(args, at, list(moved))))

    def vjp(k: int) -> Any:
        def maker(ans: Any, *moved: Any) -> Any:
            return lambda dy: _tuple(backward(dy, *_with(args, at, list(moved))))[k]

        return maker

    defvjp(function, *(vjp(k) for k in range(len(at))))
    for k in range(len(at)):
        rest = [args[i].copy() for i in at]

        def one(x: Any, k: int = k, rest: Any = rest) -> Any:
            return function(*rest[:k], x, *rest[k + 1 :])

        check_vjp(one, rest[k])
    return True


def by_numdifftools(forward: Any, backward: Any, args: Any) -> bool:
    """numdifftools.Gradient of ⟨dy, forward⟩ compared with numpy.allclose."""
    import numdifftools

    rng, at = np.random.default_rng(0), _floats(args)
    made = forward(*args)
    dy = jax_like(made, rng)
    grads = _tuple(backward(dy, *args))
    for k, i in enumerate(at):

        def value(flat: Any, i: int = i) -> float:
            full = _with(args, [i], [flat.reshape(args[i].shape)])
            pairs = zip(_tuple(dy), _tuple(forward(*full)), strict=True)
            return float(sum((d * y).sum() for d, y in pairs))

        gradient: Any = numdifftools.Gradient
        truth = gradient(value)(args[i].reshape(-1)).reshape(args[i].shape)
        if np.shape(grads[k]) != truth.shape or not np.allclose(grads[k], truth, 1e-6, 1e-8):
            return False
    return True


def jax_like(made: Any, rng: np.random.Generator) -> Any:
    """Random cotangents in the containers of the outputs."""
    drawn = tuple(np.asarray(rng.standard_normal(np.shape(y))) for y in _tuple(made))
    return drawn if isinstance(made, tuple) else drawn[0]


CHECKERS: dict[str, tuple[str, Checker]] = {
    "mesp_ref": ("mesp_ref", ours),
    "torch.autograd.gradcheck": ("torch", torch_gradcheck),
    "jax.test_util.check_grads": ("jax", jax_check_grads),
    "autograd.test_util.check_vjp": ("autograd", autograd_check_grads),
    "numdifftools.Gradient": ("numdifftools", by_numdifftools),
}


def accepts(check: Checker, pair: Pair, known: Any, draws: int) -> bool:
    """Does a checker accept a pair at its sample and at every draw? An exception is a rejection."""

    def judged(args: Any) -> None:
        copies = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in args)
        if sum(np.size(a) for a in args) > 3000 and check is not ours:
            return  # entry by entry that would take minutes
        assert check(*pair, copies)

    quick: Any = settings(
        max_examples=max(draws, 1), deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    drawn: Any = given(known.examples)
    test = quick(drawn(judged))
    try:
        judged(known.sample)
        if draws:
            test()
    except Exception:
        return False
    return True


def rows(cases: list[Any], draws: int) -> Iterator[str]:
    """A Markdown table: wrong ones found, right ones accepted, seconds."""
    yield "| checker | wrong: found of | right: accepted of | seconds | missed |"
    yield "| --- | --- | --- | --- | --- |"
    for name, (module, check) in CHECKERS.items():
        if importlib.util.find_spec(module) is None:
            yield f"| {name} | not installed | | | |"
            continue
        start, missed, right = time.perf_counter(), [], 0
        for known in cases:
            forward = known.wrong_forward or known.forward
            if accepts(check, (forward, known.wrong), known, draws):
                missed.append(known.kind)
            right += accepts(check, (known.forward, known.right), known, draws)
        spent = time.perf_counter() - start
        found, total = len(cases) - len(missed), len(cases)
        yield f"| {name} | {found} of {total} | {right} of {total} | {spent:.0f} | {', '.join(missed)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--cases", type=Path, default=ROOT / "tests/verify/known_bugs.py")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("known_cases", options.cases)
    if spec is None or spec.loader is None:
        parser.error(f"--cases {options.cases}: found no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["known_cases"] = module
    spec.loader.exec_module(module)
    warnings.simplefilter("ignore")
    with np.errstate(all="ignore"):
        for row in rows(list(module.KNOWN), options.draws):
            print(row, flush=True)


if __name__ == "__main__":
    main()
