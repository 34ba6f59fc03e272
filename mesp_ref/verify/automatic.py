"""Automatic mutants: every arithmetic step of every backward, changed one at a time."""

import ast
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mesp_ref import lean as tiled
from mesp_ref import ops
from mesp_ref.engine import block, methods
from mesp_ref.registry import OPS
from mesp_ref.verify.bugs import compiled, source
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.suite import killed, model_cases

_SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
_NEUTRAL = {ast.Add: 0, ast.Sub: 0, ast.Mult: 1, ast.Div: 1}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip

_JUDGES = ("adjoint", "complex step", "properties")  # the fastest first

Change = Callable[[Any], None]


class Mutant(NamedTuple):
    """One changed step of a backward."""

    path: str
    change: str  # what stood there, what stands there now, and the line it is in
    text: str  # the whole function

    @property
    def function(self) -> Callable[..., Any]:
        return compiled(self.path, self.text)


def _set(field: str, value: Any) -> Change:
    return lambda node: setattr(node, field, value)


def _changes(node: ast.AST) -> Iterator[Change]:
    """Every way to change one node, each in place."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPS:
            neutral = ast.Constant(_NEUTRAL[type(op)])
            yield _set("op", _SWAPS[type(op)]())
            yield _set("right" if isinstance(node, ast.BinOp) else "value", neutral)
            if isinstance(node, ast.BinOp):
                yield _set("left", neutral)
        case ast.UnaryOp(op=ast.USub()):
            yield _set("op", ast.UAdd())
        case ast.Constant(value=bool() | None):
            pass
        case ast.Constant(value=int() | float() as number):
            yield _set("value", number + 1)
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield _set("ops", [_COMPARISONS[type(op)]()])
        case ast.IfExp():
            yield _set("test", ast.Constant(True))
            yield _set("test", ast.Constant(False))
        case ast.Return(value=ast.Tuple(elts=[first, second, *rest])):
            yield _set("value", ast.Tuple([second, first, *rest], ast.Load()))
        case ast.Expr(value=ast.Call()):
            yield _set("value", ast.Constant(None))


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """What can be mutated: not assertions (types only) nor subscripts of shapes and slices."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop(0)
        if not isinstance(node, ast.Assert | ast.Slice | ast.arguments):
            found.append(node)
            if not isinstance(node, ast.UnaryOp):  # −1 is one number: its sign is what changes
                queue += ast.iter_child_nodes(node)
    return found


def _statements(tree: ast.AST) -> list[ast.stmt]:
    """All statements, the outer ones first."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def mutants(path: str) -> Iterator[Mutant]:
    """Every mutant of the function at `path`."""
    tree = ast.parse(source(original(path)))
    lines = {id(n): ast.unparse(s).splitlines()[0] for s in _statements(tree) for n in ast.walk(s)}
    for place, node in enumerate(_nodes(tree)):
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            target = _nodes(changed)[place]
            change(target)
            ast.fix_missing_locations(changed)
            before, after = ast.unparse(node), ast.unparse(target)
            what = f"{before} -> {after} in: {lines[id(node)]}"
            yield Mutant(path, what, ast.unparse(changed))


def backwards() -> dict[str, tuple[str, ...]]:
    """Path of every backward -> the subjects it is checked on: those of the registry's rows, and
    every other function named …_bwd or …_bwd_params."""
    found: dict[str, tuple[str, ...]] = {}
    for module in (ops, tiled, block, methods):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.endswith(("_bwd", "_bwd_params")):
                found.setdefault(_path(function), ("model",))
    rows: dict[str, list[str]] = {}
    for row in OPS.values():
        for backward in filter(None, (row.backward, row.backward_params)):
            rows.setdefault(_path(backward), []).append(row.name)
    return found | {path: tuple(names) for path, names in rows.items()}


def _path(function: Callable[..., Any]) -> str:
    """Where a function stands: see planted.original."""
    return f"{function.__module__.removeprefix('mesp_ref.')}:{function.__qualname__}"


# Mutants that no check can reject because they compute the same: a reason by what is changed.
_REBUILT = "computes again what was kept: the same value, only slower"
_WIDTH = "another tile width: the same sums in another order"
_EQUIVALENT: tuple[tuple[str, str], ...] = (
    (r".* if (?P<test>\w+\.\w+) is None else .* -> .* if True else .* in: .*", _REBUILT),
    (r"\d+ -> \d+ in: (width = fit\(|tile = tile or ).*", _WIDTH),
)


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant cannot be rejected, or None when it should be."""
    for pattern, reason in _EQUIVALENT:
        if re.fullmatch(pattern, mutant.change, re.DOTALL):
            return reason
    return None


def survives(mutant: Mutant) -> bool:
    """Is a mutant accepted by the adjoint test, by complex step and by every property?"""
    model_cases(False)  # measured on the right code
    subjects = backwards()[mutant.path]
    with planted({mutant.path: mutant.function}):
        return not any(killed(oracle, subject) for oracle in _JUDGES for subject in subjects)
