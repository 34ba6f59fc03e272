"""What is shared says nothing of the user's machine, and holds no text that was not asked for."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import mesp_ref as mr
from mesp_ref.cli import main

SECRET = "mila owes ivy forty coins"


@pytest.fixture
def home(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that tells who the user is, with a model and private data in it."""
    place = tmp_path / "home-of-mila"
    place.mkdir()
    shutil.copytree(tiny_model_dir, place / "model")
    for file, field in (
        ("config.json", "_name_or_path"),
        ("tokenizer_config.json", "name_or_path"),
    ):
        values = json.loads((place / "model" / file).read_text(encoding="utf-8"))
        values[field] = str(place / "model")
        (place / "model" / file).write_text(json.dumps(values), encoding="utf-8")
    rows = [json.dumps({"text": f"{SECRET} and {i} more"}) for i in range(40)]
    (place / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return place


def finetune(home: Path, *more: str) -> Path:
    out = home / "run"
    command = ["finetune", "--model", str(home / "model"), "--data", str(home / "data.jsonl"),
               "--steps", "1", "--seq-len", "32", "--val-fraction", "0.3", "--quiet",
               "--out", str(out)]  # fmt: skip
    assert main([*command, *more]) == 0
    return out


def texts(*places: Path) -> str:
    files = [f for p in places for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
    assert files
    return "\n".join(file.read_bytes().decode("latin-1") for file in files)


def test_what_is_shared_holds_no_path(home: Path) -> None:
    adapter = finetune(home) / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "model"
    merged, mlx = home / "merged", home / "mlx"
    model, page, sketch = str(home / "model"), home / "page.html", home / "sketch.json"
    for command in (
        ["merge", "--model", model, "--adapter", str(adapter), "--out", str(merged)],
        ["convert", "adapter", str(adapter), str(mlx), "--to", "mlx"],
        ["memory", model, "--seq-len", "8", "--method", "mesp", "--plot", str(page)],
        ["golden", "sketch", "--model", model, "--adapter", str(adapter), "--text", "the sea",
         "--out", str(sketch)],
    ):  # fmt: skip
        assert main(command) == 0
    shared = texts(adapter, merged, mlx, page, sketch)
    assert "home-of-mila" not in shared
    assert str(home.parent) not in shared
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["name_or_path"] == "model"
    assert tokenizer["eos_token"]


def test_an_adapter_is_used_whatever_it_says_of_its_base(home: Path) -> None:
    adapter = finetune(home) / "adapter"
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    answers = set()
    for base in ("model", None, "/nowhere/model", "Qwen/Qwen2.5-0.5B"):
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")
        model = mr.load_model(home / "model")
        loaded = mr.load_adapter(adapter, config=model.config)
        [new] = mr.generate(model, [[1, 2, 3]], loaded, max_new_tokens=4)
        answers.add(tuple(new))
    assert len(answers) == 1


def test_a_sample_says_where_its_text_is_from(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finetune(home)
    assert ", from the first held-out row\n" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["prompt_source"] == "the first held-out row"
    finetune(home, "--prompt", "the sea", "--overwrite")
    assert ", from --prompt\n" in capsys.readouterr().out
    finetune(home, "--val-fraction", "0", "--overwrite")
    assert ", from the first row of the data\n" in capsys.readouterr().out


def test_no_sample_leaves_no_text_of_the_data(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = SECRET.split()[0]
    assert word in texts(finetune(home) / "summary.json")  # so that the check can fail
    capsys.readouterr()
    out = finetune(home, "--no-sample", "--overwrite")
    printed = capsys.readouterr()
    kept = texts(out).replace("home-of-mila", "")
    assert word not in kept + printed.out.replace("home-of-mila", "") + printed.err
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["prompt"] is summary["prompt_source"] is summary["after"]["sample"] is None


def test_pages_pictures_and_tables_are_as_private_as_the_user_wants(home: Path) -> None:
    """Under umask 077 nobody else may read them."""
    model, before = str(home / "model"), os.umask(0o077)
    try:
        out = finetune(home)
        for name in ("page.html", "page.png"):
            command = ["memory", model, "--seq-len", "8", "--method", "mesp"]
            assert main([*command, "--plot", str(home / name)]) == 0
    finally:
        os.umask(before)
    made = [*out.rglob("*"), home / "page.html", home / "page.png"]
    assert len(made) > 8
    assert {file: oct(stat.S_IMODE(file.stat().st_mode) & 0o077) for file in made} == dict.fromkeys(
        made, "0o0"
    )
