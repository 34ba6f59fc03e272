"""Numbers that nobody means: every numeric option of every command refuses them in one line."""

import argparse
import time
from collections.abc import Iterator

import pytest

from mesp_ref.cli import build_parser, main
from mesp_ref.errors import MespRefError
from mesp_ref.job.finetune import FinetuneOptions
from mesp_ref.job.pretrain import PretrainOptions
from mesp_ref.train.bounds import RANGES
from mesp_ref.train.trainer import TrainConfig

# What has to stand beside the option for the command to be one.
REST = {
    "generate": ["--prompt", "a"],
    "merge": ["--adapter", "a", "--out", "b"],
    "memory": ["qwen2.5-0.5b"],
    "quantize": ["a", "b"],
    "pretrain": ["--out", "a"],
    "golden build": ["a"],
}
NOT_FOR_INT = ("1e3", "0x10", "nan", "inf", "", "1.5", "9" * 5000)
NEVER = ("nan", "inf", "-inf", "1e400", "", "1" + "0" * 40)


def numeric(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, type]]:
    """Every numeric option: its command, its name, its type."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from numeric(command, (*path, name))
        elif action.type in (int, float):
            yield path, action.option_strings[0], action.type  # type: ignore[misc]


# A backend's result, not a setting: NaN is a verdict, FAIL (tests/cli/test_terminal.py).
RESULTS = ("--loss",)
OPTIONS = [found for found in numeric(build_parser()) if found[1] not in RESULTS]


def test_every_numeric_option_has_bounds() -> None:
    assert len(OPTIONS) > 50
    missing = {option[2:].replace("-", "_") for _, option, _ in OPTIONS} - RANGES.keys()
    assert not missing


@pytest.mark.parametrize(("path", "option", "kind"), OPTIONS, ids=lambda x: str(x))
def test_odd_numbers_are_one_line(
    path: tuple[str, ...], option: str, kind: type, capsys: pytest.CaptureFixture[str],
    tmp_path: object, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Far too large, NaN, infinite, empty, no integer; negative where nothing can be."""
    monkeypatch.chdir(str(tmp_path))
    odd = [*NEVER, *(NOT_FOR_INT if kind is int else ())]
    if option != "--alpha":
        odd += ["-1", "-1000000000"]
    if kind is int:
        odd += [str(10**18 if option != "--seed" else 2**63)]
        odd += [str(10**9)] if option != "--seed" else []
    for value in odd:
        begin = time.perf_counter()
        line = [*path, *REST.get(" ".join(path), []), f"{option}={value}"]
        assert main(line) == 2, line
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("mesp-ref: error: "), shown.err
        assert shown.err.count("\n") == 1
        assert option in shown.err or option[2:].replace("-", "_") in shown.err
        assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("option", ["--model", "--adapter", "--data", "--out", "--targets"])
def test_an_empty_name_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty path would be the current directory."""
    assert main(["finetune", f"{option}="]) == 2
    assert f"{option}: found nothing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TrainConfig, FinetuneOptions, PretrainOptions])
@pytest.mark.parametrize("value", [-1, 10**18, 10**40, float("nan"), float("inf")])
def test_the_same_bounds_hold_in_python(kind: type, value: float) -> None:
    given = {"out": "a"} if kind is PretrainOptions else {}
    rates = {"seed", "alpha", "lr", "clip", "weight_decay", "eps"}
    free = rates if value == 10**18 else {"alpha"} if value == -1 else set()
    for name in kind.__dataclass_fields__.keys() & RANGES.keys() - free:  # type: ignore[attr-defined]
        with pytest.raises(MespRefError, match=name):
            kind(**given | {name: value})


def test_sizes_that_are_too_large_only_together(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "finetune --batch-size 65536 --accumulate 65536",
        "compare --steps 100000000 --batch-size 65536",
        "pretrain --out a --layers 1024 --hidden-size 16384 --intermediate-size 65536",
    ):
        assert main(line.split()) == 2
        assert "expected at most" in capsys.readouterr().err
