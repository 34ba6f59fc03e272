"""The builder of the suite. Needs python-flint for the op cases and mpmath; about a minute."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mesp_ref.errors import MespRefError
from mesp_ref.files.output import new_directory
from mesp_ref.golden.builder.draw import generator
from mesp_ref.golden.builder.models import BLOCKS, MODELS, Made, draw_model, make_block, make_model
from mesp_ref.golden.builder.tiles import tile_cases
from mesp_ref.golden.builder.trajectories import SETTINGS, make_trajectory
from mesp_ref.golden.builder.write import write_case, write_manifest, write_tensors
from mesp_ref.golden.builder.wrong import wrong_models, wrong_op
from mesp_ref.golden.plain import Arrays
from mesp_ref.golden.suite import SHIPPED, Case, Vectors, Wrong
from mesp_ref.registry import OpCase, OpSpec
from mesp_ref.train.ranks import ALONE, Ranks

COMPANIONS = ("README.md", "manifest.schema.json")


def model_cases(root: Path) -> Iterator[Made]:
    """Blocks, whole models with their checkpoints under `root`, and trajectories of the first."""
    yield from map(make_block, BLOCKS)
    models = [make_model(shape, root) for shape in MODELS]
    yield from models
    model, adapter = draw_model(MODELS[0], generator(f"e2e/{MODELS[0].name}"))
    for name in SETTINGS:
        yield make_trajectory(name, model, adapter, models[0])


def computed_ops(log: Callable[[str], object], ranks: Ranks) -> list[tuple[Case, Vectors]]:
    """Every op case with its truth, shared by all ranks: nearly all time is spent here."""
    from mesp_ref.golden.builder.ops import make_op, op_cases

    def computed(piece: tuple[OpSpec, OpCase]) -> tuple[Case, Vectors]:
        log(f"ops/{piece[0].name}/{piece[1].name}")
        return make_op(*piece)

    return ranks.shared(op_cases(), computed)


def build(
    out: str | Path,
    log: Callable[[str], object],
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> int:
    """Write a suite into the directory `out`, whole or not at all; returns how many cases.

    Several `ranks` share the op cases; each writes a whole suite, into a directory of its own.
    Raises MespRefError without python-flint or mpmath, and when `out` is not empty
    """
    try:
        from mesp_ref.golden.builder.positions import position_cases
        from mesp_ref.golden.builder.quantised import quantised_cases
    except ModuleNotFoundError as error:
        raise MespRefError(
            f"{error.name}: not installed, needed to build a suite; pip install {error.name}"
        ) from None
    cases: list[Case] = []
    wrong: list[Wrong] = []
    with new_directory(out, overwrite=overwrite) as root:

        def put(case: Case, vectors: Vectors, answers: Iterable[tuple[Wrong, Arrays]] = ()) -> None:
            write_case(root, case, vectors)
            cases.append(case)
            for entry, arrays in answers:
                write_tensors(root / entry.file, arrays)
                wrong.append(entry)

        ranks.alike({})
        for case, vectors in computed_ops(log, ranks):
            put(case, vectors, wrong_op(case, vectors))
        for case, vectors in (*quantised_cases(), *position_cases(), *tile_cases()):
            log(case.name)
            put(case, vectors)
        for made in model_cases(root):
            log(made.case.name)
            put(made.case, made.vectors, wrong_models(made))
        for name in COMPANIONS:
            shutil.copyfile(SHIPPED / name, root / name)
        write_manifest(root, cases, wrong)
    return len(cases)
