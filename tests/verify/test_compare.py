"""`mesp-ref compare --perturbations`: only MeZO averages, and n = 1 is what it was."""

import json

import pytest

from mesp_ref.cli import main


def told(capsys: pytest.CaptureFixture[str], tmp_path, *options: str) -> dict:
    command = ["compare", "--steps", "2", "--seq-len", "384", "--json", "--quiet", "--overwrite"]
    assert main([*command, "--out", str(tmp_path / "c.png"), *options]) == 0
    return json.loads(capsys.readouterr().out)


def by_method(answer: dict) -> dict:
    methods = answer["methods"]
    return methods if isinstance(methods, dict) else {m["method"]: m for m in methods}


def test_only_mezo_averages(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    one, four = (by_method(told(capsys, tmp_path, "--perturbations", n)) for n in ("1", "4"))
    assert one.keys() == four.keys()
    assert one["mezo"]["losses"] != four["mezo"]["losses"]
    for method in one.keys() - {"mezo"}:
        assert one[method]["losses"] == four[method]["losses"], method


def test_fewer_than_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--steps", "1", "--perturbations", "0"]) == 2
    assert "perturbations: found 0, expected at least 1" in capsys.readouterr().err
