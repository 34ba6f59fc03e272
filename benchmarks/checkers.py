"""Checkers of gradients on known kinds of bugs and on right backwards: the tables of docs/checkers.md.

python benchmarks/checkers.py [--draws 40] [--limit 2] [--cases FILE ...] [--only mesp_ref]

Cases are those of tests/verify/known_bugs*.py, or files of one's own: a list KNOWN like theirs, or a
list CASES whose entries have name, forward, right, wrong, wrong_forward, sample() and draw().
Each checker gets a pair at the case's one ordinary sample and at `draws` drawn examples, the same for
all, with its own default tolerances; after `limit` seconds of processor time a case gets no further
example. Every checker runs in a process of its own, which is replaced if it does not come back. torch,
jax, autograd and numdifftools are measured where they are installed.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

    torch.set_num_threads(1)

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

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # callbacks wait for each other else

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


class Answer(NamedTuple):
    """What a checker said to a pair: did it accept it, and in how many seconds of processor time."""

    accepted: bool
    seconds: float


class _Enough(Exception):
    """The time for a case is spent."""


def accepts(check: Checker, pair: Pair, known: Any, draws: int, limit: float) -> bool:
    """Does a checker accept a pair at its sample and at the draws? An exception is a rejection."""
    start = time.process_time()

    def judged(args: Any) -> None:
        if time.process_time() - start > limit:
            raise _Enough
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
    except _Enough:
        return True
    except Exception:
        return False
    return True


class Case(NamedTuple):
    """A pair right and wrong, an ordinary sample, and a strategy of examples."""

    kind: str
    forward: Any
    right: Any
    wrong: Any
    sample: Any
    examples: Any
    wrong_forward: Any = None
    reset: Any = None  # clears what the wrong version keeps from call to call


def _as_case(entry: Any) -> Case:
    """An entry of KNOWN or of CASES."""
    if hasattr(entry, "kind") and hasattr(entry, "examples"):
        sample, examples, kind = entry.sample, entry.examples, entry.kind
    else:
        sample, examples, kind = entry.sample(), entry.draw(), entry.name
    more = getattr(entry, "wrong_forward", None), getattr(entry, "reset", None)
    return Case(kind, entry.forward, entry.right, entry.wrong, sample, examples, *more)


def load(path: Path) -> list[Case]:
    """The cases of a file.

    Raises SystemExit where it holds none.
    """
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--cases {path}: found no Python file")
    module = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    if not hasattr(module, "KNOWN") and not hasattr(module, "CASES"):
        spec.loader.exec_module(module)
    listed = getattr(module, "KNOWN", None) or getattr(module, "CASES", None)
    try:
        return [_as_case(entry) for entry in listed or ()] or _none(path)
    except AttributeError as error:
        raise SystemExit(f"--cases {path}: an entry that is no case, {error}") from None


def _none(path: Path) -> list[Case]:
    raise SystemExit(f"--cases {path}: found no cases, expected a list KNOWN or CASES")


def _work(pipe: Any, name: str, paths: list[Path], draws: int, limit: float) -> None:
    """Answers (file, place, wrong?) with an Answer until it is told None."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    cases = {path: load(path) for path in paths}
    importlib.import_module(CHECKERS[name][0])  # which takes seconds that are no case's
    pipe.send("ready")
    while (wanted := pipe.recv()) is not None:
        path, place, wrong = wanted
        known, start = cases[path][place], time.process_time()
        if known.reset is not None:
            known.reset()
        pair = (known.wrong_forward or known.forward, known.wrong)
        pair = pair if wrong else (known.forward, known.right)
        said = accepts(CHECKERS[name][1], pair, known, draws, limit)
        pipe.send(Answer(said, time.process_time() - start))


class Worker:
    """A checker in another process: one that hangs is killed and counts as having accepted."""

    def __init__(self, name: str, paths: list[Path], draws: int, limit: float):
        self.given, self.limit = (name, paths, draws, limit), limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, *self.given), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def ask(self, path: Path, place: int, wrong: bool) -> Answer:
        """What it says to a case."""
        self.pipe.send((path, place, wrong))
        try:
            if self.pipe.poll(30 * self.limit + 60):
                answer: Answer = self.pipe.recv()
                return answer
        except EOFError:
            pass
        self.process.kill()
        self._start()
        return Answer(True, self.limit)

    def close(self) -> None:
        """Ends the process."""
        self.pipe.send(None)
        self.process.join(5)
        self.process.kill()


def measured(name: str, paths: list[Path], draws: int, limit: float) -> dict[str, Any]:
    """Per file: how many wrong ones a checker caught, how many right ones it accepted, and which not."""
    worker, found = Worker(name, paths, draws, limit), {}
    for path in paths:
        cases = load(path)
        wrong = [worker.ask(path, i, True) for i in range(len(cases))]
        right = [worker.ask(path, i, False) for i in range(len(cases))]
        found[path.stem] = {
            "caught": sum(not a.accepted for a in wrong), "accepted": sum(a.accepted for a in right),
            "of": len(cases), "seconds": sum(a.seconds for a in (*wrong, *right)),
            "missed": [k.kind for k, a in zip(cases, wrong, strict=True) if a.accepted],
            "rejected": [k.kind for k, a in zip(cases, right, strict=True) if not a.accepted],
        }  # fmt: skip
    worker.close()
    return found


def table(results: dict[str, dict[str, Any]], what: str) -> Iterator[str]:
    """A Markdown table: a row a checker, a column a file of cases, their sum, and the seconds."""
    files = list(next(iter(results.values())))
    heads = [f.removeprefix("known_bugs").strip("_") or "formulas, behaviour" for f in files]
    yield f"| {what} | {' | '.join(heads)} | all | seconds |"
    yield "| --- " * (len(files) + 3) + "|"
    for name, found in results.items():
        cells = [f"{found[f][what]} of {found[f]['of']}" for f in files]
        total = f"{sum(found[f][what] for f in files)} of {sum(found[f]['of'] for f in files)}"
        seconds = sum(found[f]["seconds"] for f in files)
        yield f"| {name} | {' | '.join(cells)} | **{total}** | {seconds:.0f} |"


def main() -> None:
    """Prints the tables, and what each checker missed or rejected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds of a case")
    parser.add_argument("--cases", type=Path, nargs="+")
    parser.add_argument("--only", nargs="+", choices=list(CHECKERS), default=list(CHECKERS))
    options = parser.parse_args()
    paths = options.cases or sorted((ROOT / "tests/verify").glob("known_bugs*.py"))
    for path in paths:
        load(path)  # what is wrong with it is said here, not by a process that dies of it
    results = {}
    for name in options.only:
        if importlib.util.find_spec(CHECKERS[name][0]) is None:
            print(f"{name}: not installed", flush=True)
            continue
        results[name] = measured(name, paths, options.draws, options.limit)
        for what in ("missed", "rejected"):
            listed = [kind for found in results[name].values() for kind in found[what]]
            print(f"{name} {what}: {', '.join(listed) or 'nothing'}", flush=True)
    for what in ("caught", "accepted"):
        print("\n".join(["", *table(results, what)]))


if __name__ == "__main__":
    main()
