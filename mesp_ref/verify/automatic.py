"""Automatic mutants: every step of every function a gradient passes through, changed one at a time."""

import ast
import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.registry import OPS
from mesp_ref.verify.bugs import compiled, source
from mesp_ref.verify.equivalents import reasons
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.reached import reached
from mesp_ref.verify.samples import FAMILY_SIZES
from mesp_ref.verify.steps import CASES, Case, Step, step
from mesp_ref.verify.subject import Subject
from mesp_ref.verify.suite import ORACLES, family_case, killed, model_cases, op_cases

_SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
_NEUTRAL = {ast.Add: 0, ast.Sub: 0, ast.Mult: 1, ast.Div: 1}
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot, ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.Lt: ast.GtE, ast.Gt: ast.LtE,
}  # fmt: skip
_OPPOSITES |= {opposite: comparison for comparison, opposite in _OPPOSITES.items()}
_OTHER_END = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum"}
_SMALL, _PARTS = (ast.Constant, ast.Name, ast.Attribute), (ast.expr, ast.keyword, ast.Slice)
_COMMUTE = {*_OTHER_END, "add", "multiply", "result_type", "swapaxes"}

_MEZO = Case({"method": "mezo"})

Change = Callable[[Any], None]


class Mutant(NamedTuple):
    """One changed step of a backward."""

    path: str
    change: str  # what stood there, what stands there now, and the line it is in
    tree: ast.Module  # the whole function

    @property
    def function(self) -> Callable[..., Any]:
        return compiled(self.path, ast.unparse(self.tree))


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
        case ast.Compare(ops=[op]) if type(op) in _OPPOSITES:
            yield _set("ops", [_OPPOSITES[type(op)]()])
        case ast.BoolOp(op=op):
            yield _set("op", ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.IfExp():
            yield _set("test", ast.Constant(True))
            yield _set("test", ast.Constant(False))
        case ast.If(test=ast.Name() | ast.Attribute() | ast.Call() as test):
            yield _set("test", ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.Tuple(elts=[first, second, *rest])):
            yield _set("value", ast.Tuple([second, first, *rest], ast.Load()))
        case ast.Assign(targets=[ast.Subscript()]):
            yield _set("value", ast.Constant(0))
        case ast.Expr(value=ast.Call()):
            yield _set("value", ast.Constant(None))
        case ast.Name(id=name) if name in _OTHER_END:
            yield _set("id", _OTHER_END[name])
        case ast.Attribute(attr=name) if name in _OTHER_END:
            yield _set("attr", _OTHER_END[name])
        case ast.Call(args=[first, second, *rest]) if _ordered(node):
            yield _set("args", [second, first, *rest])


def _ordered(call: ast.Call) -> bool:
    """Do the first two arguments of a call mean different things?"""
    name = ast.unparse(call.func).split(".")[-1]
    same = name in _COMMUTE or any(isinstance(arg, ast.Starred) for arg in call.args[:2])
    return not same


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """What can be mutated: not assertions, annotations and defaults, nor the text of errors."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop(0)
        if not isinstance(node, ast.Assert | ast.arguments | ast.Raise):
            found.append(node)
            if not isinstance(node, ast.UnaryOp):  # −1 is one number: its sign is what changes
                queue += ast.iter_child_nodes(node)
    return found


def _statements(tree: ast.AST) -> list[ast.stmt]:
    """All statements, the outer ones first."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _shown(nodes: list[ast.AST]) -> list[int]:
    """For each node the place of the one that is shown of it: of a number or a name what it is in."""
    above = {id(child): place for place, n in enumerate(nodes) for child in ast.iter_child_nodes(n)}
    found = []
    for place, node in enumerate(nodes):
        parent = above.get(id(node), place)
        inside = isinstance(node, _SMALL) and isinstance(nodes[parent], _PARTS)
        found.append(parent if inside else place)
    return found


def _text(node: ast.AST) -> str:
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node)


def mutants(path: str) -> Iterator[Mutant]:
    """Every mutant of the function at `path`."""
    text = source(original(path))
    tree = ast.parse(text)
    lines: dict[int, str] = {}
    for statement in _statements(tree):
        lines |= dict.fromkeys(map(id, ast.walk(statement)), ast.unparse(statement).splitlines()[0])
    nodes = _nodes(tree)
    for (place, node), shown in zip(enumerate(nodes), _shown(nodes), strict=True):
        for change in _changes(node):
            changed = ast.parse(text)  # ten times as fast as a deep copy
            others = _nodes(changed)
            change(others[place])
            ast.fix_missing_locations(changed)
            before, after = _text(nodes[shown]), _text(others[shown])
            if before == after:
                continue
            what = f"{before} -> {after} in: {lines[id(node)]}"
            yield Mutant(path, what, changed)


def reachable() -> dict[str, tuple[str, ...]]:
    """Path of every function that a gradient passes through -> the subjects that call it: rows of
    the registry first, then steps, then "model" and "mezo"."""
    found: dict[str, list[str]] = {}
    for name, row in OPS.items():
        homes = {importlib.import_module(f.__module__) for f in row.functions}
        calls = reached(partial(_gradients, op_cases(name)), *homes)
        for path in dict.fromkeys([*calls, *reached(partial(ORACLES["properties"], name))]):
            found.setdefault(path, []).append(name)
    for path, names in _reached_by_steps():
        found.setdefault(path, []).extend(names)
    return {path: tuple(names) for path, names in found.items()}


def _gradients(cases: list[Subject]) -> None:
    """Forward and backward of every case."""
    for subject in cases:
        subject.backward(subject.cotangents(np.random.default_rng(0)), subject.args)


def _model() -> None:
    """What the oracles do with "model"."""
    ORACLES["adjoint"]("model")
    ORACLES["properties"]("model")


@cache
def _reached_by_steps() -> list[tuple[str, list[str]]]:
    """The functions that steps call, and which steps."""
    found: dict[str, list[str]] = {}
    runs: dict[str, Callable[[], object]] = {name: step(name).run for name in CASES}
    runs |= {"model": _model, "mezo": Step(_MEZO).run}
    for name, run in runs.items():
        for path in reached(run):
            found.setdefault(path, []).append(name)
    return list(found.items())


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant cannot be rejected, or None when it should be."""
    return next((row.reason for row in reasons(mutant.path, mutant.change)), None)


_EXACT = frozenset({*OPS, *FAMILY_SIZES, "model", "mezo"})  # what equations at 50 digits are for


def judges(subjects: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Oracle and subject for those that call a function: the fastest first, the strongest last."""
    rows, steps = ([s for s in subjects if s in known] for known in (OPS, CASES))
    yield from (("adjoint", name) for name in (*rows, *steps))
    general = [*rows, *(["model"] if "model" in subjects else ["mezo"])]
    yield from (("properties", name) for name in general)
    families = dict.fromkeys(s.split("/")[0] for s in steps)
    yield from (("precision", name) for name in (*families, *general) if name in _EXACT)


def prepare() -> None:
    """Make the subjects of whole steps: their magnitudes are measured on the right code."""
    for tiny in (True, False):
        model_cases(tiny)
    for name in CASES:
        step(name)
    for name in FAMILY_SIZES:
        family_case(name)


def survives(mutant: Mutant, subjects: tuple[str, ...]) -> bool:
    """Do all oracles accept a mutant, on every one of the subjects that call its function?"""
    prepare()
    with planted({mutant.path: mutant.function}):
        return not any(killed(oracle, subject) for oracle, subject in judges(subjects))
