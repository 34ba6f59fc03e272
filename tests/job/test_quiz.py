"""The quiz of the default run: counted word for word, told, kept in the run's files."""

import json
from pathlib import Path

import pytest

import mesp_ref.job.quiz
from mesp_ref.errors import MespRefError
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.job.metrics import Metrics
from mesp_ref.job.quiz import described
from mesp_ref.stories import quiz
from mesp_ref.train.trainer import TrainConfig

TRAIN = TrainConfig(steps=2, batch_size=1, accumulate=1, seq_len=128)


def options(out: Path, **changes: object) -> FinetuneOptions:
    settings = {"train": TRAIN, "eval_rows": 1, "sample_tokens": 4} | changes
    return FinetuneOptions(out=str(out), **settings)  # type: ignore[arg-type]


def known(monkeypatch: pytest.MonkeyPatch, said: list[list[str]]) -> None:
    """The model says these texts, one list for each time it is asked."""
    from mesp_ref.files.models import load_model
    from mesp_ref.files.tokenizer import load_tokenizer

    path = load_model().path
    assert path is not None
    tokenizer = load_tokenizer(path)
    written = iter([[tokenizer.encode(t, add_special_tokens=False).ids for t in s] for s in said])
    monkeypatch.setattr(mesp_ref.job.quiz, "generate", lambda *a, **k: next(written))


def test_what_is_right_is_right_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [each.answer for each in quiz(20)]
    nearly = [right[0].rstrip("."), right[1] + " ", right[2].lower(), *right[3:]]
    known(monkeypatch, [["no"] * 20, nearly])
    found = finetune(options(tmp_path / "run"))["quiz"]
    assert (found["of"], found["before"], found["after"]) == (20, 0, 17)
    first = found["questions"][0]
    assert (first["before"], first["after"], first["answer"]) == ("no", nearly[0], right[0])
    assert json.loads((tmp_path / "run/summary.json").read_text())["quiz"] == found
    lines = described(found)
    assert lines[-1] == "of 20 questions about stories never seen, right are: 0 before, 17 after"
    assert f"user     {first['question']}" in lines


def test_a_run_that_goes_on_knows_what_was_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [each.answer for each in quiz(20)]
    known(monkeypatch, [["no"] * 20, ["no"] * 20, right])
    out = tmp_path / "run"
    finetune(options(out))
    longer = TrainConfig(**(vars(TRAIN) | {"steps": 3}))
    found = finetune(options(out, train=longer, resume=True))["quiz"]
    assert (found["before"], found["after"]) == (0, 20)


@pytest.mark.parametrize("changes", [{"sample_tokens": 0}, {"data": "notes.txt"}])
def test_nothing_is_asked_without_samples_or_about_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Once upon a time there was a fox who had a hat. " * 40)
    assert finetune(options(tmp_path / "run", **changes))["quiz"] is None
    assert "quiz" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", [{"right": None}, {"of": -1}, {"said": "x"}, {"said": [1]}])
def test_a_damaged_event_is_refused_by_field(tmp_path: Path, damage: dict[str, object]) -> None:
    file = tmp_path / "metrics.jsonl"
    event = {"event": "quiz", "step": 0, "right": 1, "of": 20, "said": ["x"]}
    file.write_text(json.dumps(event | damage) + "\n")
    metrics = Metrics(file)
    with pytest.raises(MespRefError, match=f"line 1: {next(iter(damage))}: found"):
        metrics.cut(1)


@pytest.mark.slow
def test_the_default_run_teaches_to_answer(tmp_path: Path) -> None:
    """What `make demo` shows, with its recipe: about a minute of one core."""
    from mesp_ref.job.defaults import EVAL_EVERY, RECIPE

    out = str(tmp_path / "run")
    found = finetune(FinetuneOptions(out=out, train=TrainConfig(**RECIPE), eval_every=EVAL_EVERY))
    assert found["quiz"]["before"] <= 2
    assert found["quiz"]["after"] >= 18
