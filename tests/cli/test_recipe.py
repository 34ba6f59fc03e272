"""finetune --config: the same run as if its options had been typed, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

from mesp_ref.cli import build_parser, main
from mesp_ref.cli.finetune import _options
from mesp_ref.cli.recipe import with_config

TYPED = ["--steps", "3", "--lr", "1e-3", "--seq-len", "24", "--targets", "q_proj,v_proj", "--rslora",
         "--memory-limit", "4MB", "--sample-tokens", "0", "--val-fraction", "0.2"]  # fmt: skip
YAML = """\
# as a person writes it
steps: 3
lr: 1e-3           # YAML 1.1 takes this for a text
seq-len: 24
targets: [q_proj, v_proj]
rslora: true
special_tokens_in_text: false
memory_limit: 4MB
sample_tokens: 0
val_fraction: 0.2
adapter:
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def options(*command: str) -> object:
    return _options(with_config(build_parser().parse_args(["finetune", *command])))


def test_yaml_says_what_the_command_line_says() -> None:
    pytest.importorskip("yaml")
    Path("run.yaml").write_text(YAML, encoding="utf-8")
    assert options("--config", "run.yaml") == options(*TYPED)
    assert options("--config", "run.yaml", "--steps", "7") == options(*TYPED, "--steps", "7")


def test_a_run_is_repeated_from_its_run_json(
    tiny_model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes; its place, and whether it replaced another, are not the recipe's."""
    first = ["finetune", "--model", str(tiny_model_dir), "--data", str(text_file), "--quiet"]
    more = [
        "--steps",
        "3",
        "--seq-len",
        "16",
        "--rank",
        "3",
        "--out",
        "a",
        "--overwrite",
        "--no-sample",
    ]
    assert main([*first, *more]) == 0
    assert main(["finetune", "--config", "a/run.json", "--out", "b", "--quiet"]) == 0
    adapters = [Path(run, "adapter/adapter_model.safetensors").read_bytes() for run in "ab"]
    assert adapters[0] == adapters[1]
    assert main(["finetune", "--config", "a/run.json", "--seed", "5", "--out", "c", "--quiet"]) == 0
    assert Path("c/adapter/adapter_model.safetensors").read_bytes() != adapters[0]
    run = json.loads(Path("c/run.json").read_text(encoding="utf-8"))["options"]
    assert (run["train"]["seed"], run["rank"]) == (5, 3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"stpes": 3}', "'stpes': no such option; did you mean --steps?"),
        ('{"learning_rate": 3}', "did you mean --lr?"),
        ('{"steps": "many"}', "--steps: invalid int value: 'many'"),
        ('{"steps": -1}', "--steps: found -1, expected at least 1"),
        ('{"steps": true}', "steps: found True, expected one value"),
        ('{"rslora": 3}', "rslora: found 3, expected true or false"),
        ('{"lr": [1]}', "lr: found [1], expected one value"),
        ('{"method": "guess"}', "invalid choice: 'guess'"),
        ('{"resume": "x"}', "'resume': no such option"),
        ('{"steps": 1, "steps": 2}', "'steps' is given twice"),
        ('{"steps": 1, "train": {"steps": 2}}', "steps: found twice"),
        ('{"train": 1}', "train: found 1"),
        ('{"steps": ', "--config: "),
    ],
)
def test_what_is_wrong_is_one_line(
    text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.json").write_text(text, encoding="utf-8")
    assert main(["finetune", "--config", "run.json"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("mesp-ref: error: run.json: ")
    assert line in said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [("steps: 1\nsteps: 2\n", "'steps' is given twice"), ("[", "not readable as YAML"),
     ("- a\n", "expected options"), ("a: !!python/object:os.system {}\n", "not readable as YAML")],
)  # fmt: skip
def test_yaml_that_is_wrong(text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    Path("run.yaml").write_text(text, encoding="utf-8")
    assert main(["finetune", "--config", "run.yaml"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_config_that_is_not_there_or_beside_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--config", "nowhere.yaml"]) == 2
    assert main(["finetune", "--config", "nowhere.yaml", "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "nowhere.yaml: --config" in lines[0]
    assert "--config: found beside --resume" in lines[1]
