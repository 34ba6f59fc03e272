"""Commands that ranks share: the result of one process, and one line for what goes wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks_at_hand import ENVIRONMENT, MPIEXEC, needs_mpi, ranks

from mesp_ref.train.ranks import ALONE, Ranks

HERE = Path(__file__).parent


def done(command: list[str], patience: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=patience
    )


class OneOf(Ranks):
    """Rank `rank` of `size`, whose fellows have found what `others` says."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def in_order(self, own: Any, count: int) -> list[Any]:
        return list(own)


def test_pieces_are_shared_in_turn() -> None:
    items = "abcdefg"
    assert ALONE.shared(items, str.upper) == list("ABCDEFG")
    assert OneOf(0, 3).shared(items, str.upper) == ["A", "D", "G"]
    assert OneOf(2, 3).shared(items, str.upper) == ["C", "F"]
    assert OneOf(2, 3).shared("ab", str.upper) == []


@needs_mpi
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_eval_on_ranks_prints_what_one_process_prints(
    size: int, tiny_model_dir: Path, text_file: Path
) -> None:
    options = ["-m", "mesp_ref", "eval", "--model", str(tiny_model_dir), "--data", str(text_file)]
    options += ["--seq-len", "24", "--rows", "7", "--json"]
    alone = done([sys.executable, *options])
    shared = done(ranks(size, *options, "--mpi"))
    assert alone.returncode == shared.returncode == 0, shared.stderr
    assert (shared.stdout, shared.stderr) == (alone.stdout, alone.stderr)
    other = json.loads(done([sys.executable, *options, "--rows", "6"]).stdout)
    assert other["loss"] != json.loads(shared.stdout)["loss"]  # the seventh row counts


@needs_mpi
def test_what_goes_wrong_is_one_line(tiny_model_dir: Path, text_file: Path) -> None:
    """A mistake that all ranks make, a difference, and what only rank 1 lacks."""
    assert MPIEXEC is not None
    good = ["-m", "mesp_ref", "eval", "--model", str(tiny_model_dir), "--data", str(text_file)]
    good += ["--rows", "2", "--mpi"]
    bad = [word.replace(str(tiny_model_dir), "nowhere") for word in good]
    one, two = (["-n", "1", sys.executable, *words] for words in (good, bad))
    for command, told in (
        (ranks(2, *bad), "error: nowhere: not found"),
        ([MPIEXEC, *one, ":", *one, "--rows", "3"], ": --rows: found 3, expected 2 as on rank 0"),
        ([MPIEXEC, *one, ":", *two], ": nowhere: not found"),
    ):
        ended = done(command)
        lines = [line for line in ended.stderr.splitlines() if line.startswith("mesp-ref: ")]
        assert ended.returncode == 2
        assert len(lines) == 1, ended.stderr
        assert told in lines[0]
        assert not ended.stdout


PIECES = """
import sys
from mesp_ref.errors import MespRefError
from mesp_ref.spread.start import share_over_mpi

def piece(item):
    if item == int(sys.argv[1]):
        raise eval(sys.argv[2])
    return item * item

def command(ranks):
    ranks.alike({})
    print(*ranks.shared(range(9), piece))
    return 3

sys.exit(share_over_mpi({}, 600, command))
"""


@needs_mpi
def test_pieces_on_ranks() -> None:
    """The results in order, printed once, the exit code; and an error with its rank, told once."""
    well = done(ranks(2, "-c", PIECES, "-1", ""))
    assert (well.returncode, well.stdout) == (3, "0 1 4 9 16 25 36 49 64\n"), well.stderr
    for item, rank in ((3, 1), (4, 0)):
        ended = done(ranks(2, "-c", PIECES, str(item), "MespRefError('piece: torn')"))
        lines = [line for line in ended.stderr.splitlines() if line.startswith("mesp-ref: ")]
        assert len(lines) == 1, ended.stderr
        assert f"error: rank {rank} on " in lines[0]
        assert lines[0].endswith(": piece: torn")
        assert "Traceback" not in ended.stderr
        assert ended.returncode == 2
        assert not ended.stdout
    stopped = done(ranks(2, "-c", PIECES, "4", "KeyboardInterrupt()"))
    assert stopped.returncode == 130
    assert [x for x in stopped.stderr.splitlines() if "mesp-ref" in x] == ["mesp-ref: interrupted"]


@needs_mpi
@pytest.mark.slow
def test_golden_build_and_compare_on_ranks(tmp_path: Path) -> None:
    """The suite, byte for byte, and of a comparison all that is no time (two minutes)."""
    suites = [tmp_path / name for name in ("one", "two")]
    build = ["-m", "mesp_ref", "golden", "build"]
    done([sys.executable, *build, str(suites[0])], 600)
    done(ranks(2, *build, str(suites[1]), "--mpi"), 600)
    files = [
        {p.relative_to(s): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in suites
    ]
    assert len(files[0]) > 80
    assert files[0] == files[1]
    compare = ["-m", "mesp_ref", "compare", "--steps", "2", "--quiet", "--json"]
    one = done([sys.executable, *compare, "--out", str(tmp_path / "one.png")])
    two = done(ranks(2, *compare, "--out", str(tmp_path / "two.png"), "--mpi"))
    found = [json.loads(text.stdout)["methods"] for text in (one, two)]
    for facts in [*found[0].values(), *found[1].values()]:
        del facts["seconds_per_step"], facts["peak_bytes"]  # with Python's own objects
    assert found[0] == found[1]
    assert (tmp_path / "two.png").exists()
