"""Names of the hub in the place of paths, against a hub of our own on loopback and a filled cache."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import words
from loopback_hub import MAIN, OLD, Hub
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.files.hub import HubName, data_path, hub_name, model_directory
from mesp_ref.train.data import open_data

ROOT, NAME = Path(__file__).parents[2], "mila/tiny"
QUICK = ["--steps", "2", "--seq-len", "24", "--sample-tokens", "3", "--quiet", "--out", "run"]


@pytest.fixture
def hub(
    loopback: Hub, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Hub:
    """The hub with a model in it, beside what is never to be fetched; and a directory to work in."""
    repo = tmp_path / "repos" / "tiny"
    shutil.copytree(tiny_model_dir, repo)
    for name in ("pytorch_model.bin", "training_args.bin", "onnx/model.safetensors", "README.md"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"never fetched")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loopback.add(NAME, repo)
    return loopback


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sets the switch."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def committed(hub: Hub, name: str) -> dict[str, bytes]:
    """The files of the last commit to a repository."""
    rows = [row["value"] for row in hub.committed[name] if row["key"] == "file"]
    return {row["path"]: base64.b64decode(row["content"]) for row in rows}


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line with which a command ends, exit code 2."""
    capsys.readouterr()
    assert main(list(command)) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("hub      ")
    ]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", HubName("Qwen/Qwen2.5-0.5B")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b@refs/pr/3", HubName("a/b", "refs/pr/3")),
        *(
            (text, None)
            for text in ("a", "/a/b", "./a/b", "../a", "a/b/c", "a/b@", "a/b@..", "~/b")
        ),
        ("here/too", None),
        (Path("a/b"), None),
    ],
)
def test_what_is_a_name(
    text: Any, expected: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/too").mkdir(parents=True)
    assert hub_name(text) == expected


def test_only_what_is_read_is_fetched(hub: Hub, tiny_model_dir: Path) -> None:
    model, here = mr.load_model(NAME), mr.load_model(tiny_model_dir)
    assert {name: model.weights[name][...].tobytes() for name in model.weights} == {
        name: here.weights[name][...].tobytes() for name in here.weights
    }
    assert set(hub.fetched) <= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    count = len(hub.fetched)
    mr.load_model(NAME)
    assert len(hub.fetched) == count  # the second time it is there


def test_shards_are_fetched_as_the_index_names_them(hub: Hub, tiny_model_dir: Path) -> None:
    repo = hub.repos["models", NAME]
    tensors = load_file(repo / "model.safetensors")
    (repo / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, repo / file)
    (repo / "model-3.safetensors").write_bytes(b"of no use")
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (repo / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    model = mr.load_model(NAME)
    assert np.array_equal(model.weights[names[0]][...], tensors[names[0]])
    assert {f for f in hub.fetched if f.endswith("s")} == set(parts)


def test_what_the_engine_does_not_compute_is_refused_before_its_weights(hub: Hub) -> None:
    file = hub.repos["models", NAME] / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"model_type": "mamba"}
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(MespRefError, match="model_type"):
        mr.load_model(NAME)
    assert "model.safetensors" not in hub.fetched


def test_what_is_here_wins(hub: Hub, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, NAME)
    assert model_directory(NAME) == Path(NAME)
    assert mr.load_model(NAME).path == Path(NAME)
    assert hub.asked == []


def test_revisions(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_directory(NAME).name == MAIN
    assert model_directory(f"{NAME}@v1").name == OLD
    assert main(["info", NAME, "--revision", "v1", "--json"]) == 0
    assert OLD in json.loads(capsys.readouterr().out)["model"]
    assert "has no revision nope" in refused(capsys, "info", f"{NAME}@nope")
    for command in (["info", "weights", "--revision", "v1"], ["info", f"{NAME}@v1", "--revision", "v2"],
                    ["info", "--revision", "v1"], ["info", NAME, "--revision", "a b"]):  # fmt: skip
        assert "--revision: found" in refused(capsys, *command)


def test_a_run_from_names_alone(
    hub: Hub, capsys: pytest.CaptureFixture[str], offline: Callable[[], None], tmp_path: Path
) -> None:
    """The id goes into the adapter, and by it generate finds the base; then all of it without a hub."""
    data = tmp_path / "repos" / "notes"
    data.mkdir()
    (data / "train.jsonl").write_text(
        "".join(json.dumps({"text": words(30, i)}) + "\n" for i in range(20)), encoding="utf-8"
    )
    (data / "test.jsonl").write_text('{"text": "not this one"}\n', encoding="utf-8")
    (data / "README.md").write_text("notes", encoding="utf-8")
    hub.add("mila/notes", data, "datasets")
    train = ["finetune", "--model", f"{NAME}@v1", "--data", "mila/notes", *QUICK]
    assert main(train) == 0
    assert [f for f in hub.fetched if f.endswith("jsonl")] == ["train.jsonl"]
    config = json.loads(Path("run/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, "v1")
    assert str(tmp_path) not in Path("run/adapter/adapter_config.json").read_text(encoding="utf-8")

    assert main(["finetune", "--resume", "run", "--steps", "3", "--quiet"]) == 0
    hub.add("mila/adapter", Path("run/adapter").resolve())
    asked = ["generate", "--prompt", "the ship", "--max-new-tokens", "4", "--adapter"]
    capsys.readouterr()
    texts = []
    for place in ("run", "run/adapter", "mila/adapter"):
        assert main([*asked, place]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].strip()

    offline()
    hub.asked.clear()
    assert main([*asked, "mila/adapter"]) == 0
    assert capsys.readouterr().out == texts[0]
    assert (
        main(["eval", "--adapter", "mila/adapter", "--data", "mila/notes", "--seq-len", "24"]) == 0
    )
    assert hub.asked == []


def test_every_command_that_takes_a_model_takes_a_name(hub: Hub, tmp_path: Path) -> None:
    mr.save_adapter(mr.init_lora(mr.load_model(NAME).config, rank=2, b_std=0.1), "adapter")
    shutil.copytree("adapter", tmp_path / "repos" / "adapter")
    hub.add("mila/lora", tmp_path / "repos" / "adapter")
    hub.add("mila/stories", ROOT / "weights")
    Path("notes.txt").write_text(words(300), encoding="utf-8")
    data = ["--data", "notes.txt", "--seq-len", "16"]
    both = ["--model", NAME, "--adapter", "mila/lora"]
    for command in (
        ["info", NAME],
        ["data", "notes.txt", "--model", NAME],
        ["generate", *both, "--prompt", "the"],
        ["eval", *both, *data, "--rows", "2"],
        ["merge", *both, "--out", "merged"],
        ["compare", "--model", NAME, *data, "--steps", "1", "--quiet"],
        ["gradcheck", *both, *data, "--tensors", "1"],
        ["memory", NAME, "--seq-len", "8"],
        ["quantize", "mila/stories", "packed"],
        ["convert", "adapter", "mila/lora", "mlx", "--to", "mlx", "--model", NAME],
        ["finetune", *both, *data, "--steps", "1", "--quiet"],
        ["golden", "sketch", *both, "--text", "the sea", "--out", "s.json"],
    ):
        assert main(command) == 0, command
    pytest.importorskip("gguf")
    assert main(["convert", "gguf-model", "mila/stories", "base.gguf"]) == 0
    assert Path("mlx/adapters.safetensors").is_file()


def test_what_stands_in_the_way_is_one_line(
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    offline: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    assert "no such model" in refused(capsys, "info", "mila/nowhere")
    hub.add("mila/gated", hub.repos["models", NAME])
    hub.gated.add("mila/gated")
    assert "accept" in refused(capsys, "info", "mila/gated")
    bare = hub.repos["models", NAME]
    (bare / "model.safetensors").unlink()
    assert "pickles never" in refused(capsys, "info", NAME)
    assert "pickles never" in refused(capsys, "generate", "--adapter", NAME, "--prompt", "a")
    hub.down = True
    assert "out of reach" in refused(capsys, "info", "mila/third")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1:9 is out of reach" in refused(capsys, "info", "mila/third")
    offline()
    assert "HF_HUB_OFFLINE" in refused(capsys, "info", "mila/third")


def test_without_the_package(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    kept = sys.modules["huggingface_hub.errors"]
    sys.modules["huggingface_hub.errors"] = None  # type: ignore[assignment]
    try:
        assert "pip install 'mesp-ref[hub]'" in refused(capsys, "info", NAME)
    finally:
        sys.modules["huggingface_hub.errors"] = kept


def test_a_data_set_of_several_files(hub: Hub, tmp_path: Path) -> None:
    repo = tmp_path / "repos" / "data"
    for name in ("en/train.csv", "de/train.csv", "dataset_infos.json"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("text,n\na,1\n", encoding="utf-8")
    hub.add("mila/data", repo, "datasets")
    with pytest.raises(MespRefError, match=r"found 2 data files .*hf://datasets/mila/data/FILE"):
        data_path("mila/data")
    found = data_path("hf://datasets/mila/data/de/train.csv")
    assert found.read_text(encoding="utf-8") == "text,n\na,1\n"
    assert hub.fetched == ["de/train.csv"]
    with pytest.raises(MespRefError, match="expected hf://datasets/org/name/FILE"):
        data_path("hf://datasets/mila/data")
    with pytest.raises(MespRefError, match=r"xx\.csv: not found"):
        data_path("hf://datasets/mila/data/xx.csv")


SHARDS = "data/train-{:05d}-of-00003.{}"


def _sharded(hub: Hub, tmp_path: Path, kind: str, missing: int | None = None) -> list[str]:
    """A data set whose training split lies in three files, beside another split."""
    repo, texts = tmp_path / "repos" / "sharded", [f"story {i} of many." for i in range(9)]
    (repo / "data").mkdir(parents=True)
    for number in range(3):
        file = repo / SHARDS.format(number, kind)
        rows = [{"text": text} for text in texts[3 * number : 3 * number + 3]]
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.write_text(lines, encoding="utf-8")
        if number == missing:
            file.unlink()
    (repo / "data" / f"test-00000-of-00001.{kind}").write_text("{}", encoding="utf-8")
    hub.add("mila/sharded", repo, "datasets")
    return texts


@pytest.mark.parametrize(
    ("kind", "name"),
    [("parquet", "mila/sharded"), ("jsonl", "hf://datasets/mila/sharded/data/train-*")],
)
def test_all_shards_of_a_split_are_read_in_order(
    kind: str, name: str, hub: Hub, tmp_path: Path
) -> None:
    texts = _sharded(hub, tmp_path, kind)
    path = data_path(name)
    assert path.name == f"train-*-of-00003.{kind}"
    assert sorted(hub.fetched) == [SHARDS.format(number, kind) for number in range(3)]
    data = open_data(path)
    records = [record for page in range(data.pages) for record in data.records(page)]
    assert [record["text"] for _, record in records] == texts
    what = "line" if kind == "jsonl" else "record"
    assert records[-1][0].endswith(f"{SHARDS.format(2, kind)}: {what} 3")


def test_a_missing_shard_is_told(hub: Hub, tmp_path: Path) -> None:
    _sharded(hub, tmp_path, "jsonl", missing=1)
    with pytest.raises(MespRefError, match="found no shard 1 among 2 files, expected 3"):
        data_path("mila/sharded")
    assert not hub.fetched


def test_a_run_on_shards(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the hub, and of the same files here: the same run; and the hash of all is kept."""
    _sharded(hub, tmp_path, "jsonl")
    train = ["finetune", "--model", NAME, *QUICK]
    assert main([*train, "--data", "mila/sharded", "--out", "a"]) == 0
    here = str(tmp_path / "repos" / "sharded" / "data" / "train-*.jsonl")
    assert main([*train, "--data", here, "--out", "b"]) == 0
    first, second = (
        Path(run, "adapter", "adapter_model.safetensors").read_bytes() for run in ("a", "b")
    )
    assert first == second


def test_a_mistyped_file_is_nobodys_name(hub: Hub) -> None:
    assert data_path("data/private.jsonl") == Path("data/private.jsonl")
    assert hub.asked == []


def test_progress_goes_to_standard_error(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", NAME, "--json"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert f"hub      fetching {NAME}: " in printed.err
    assert main(["info", NAME]) == 0
    assert capsys.readouterr().err == ""


def test_push_takes_what_others_load_and_nothing_more(
    hub: Hub, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text(words(300), encoding="utf-8")
    model = str(tiny_model_dir)
    assert main(["finetune", "--model", model, "--data", "notes.txt", *QUICK]) == 0
    file = Path("run/adapter/adapter_config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/home/mila/tiny"}), "utf-8")
    capsys.readouterr()
    assert main(["push", "run", "mila/lora", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.made == [{"name": "lora", "organization": "mila"}]  # public, as hf upload makes it
    found = committed(hub, "mila/lora")
    weights = Path("run/adapter/adapter_model.safetensors").read_bytes()
    assert found["adapter_model.safetensors"] == weights
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "tiny"
    assert b"library_name: peft" in found["README.md"]
    assert not any(b"/home" in data or b"the ship" in data for data in found.values())

    assert main(["merge", "--model", model, "--adapter", "run", "--out", "merged"]) == 0
    Path("merged/notes-of-mine.txt").write_text("private", encoding="utf-8")
    assert main(["push", "merged", "mila/merged", "--private"]) == 0
    assert hub.made[-1]["visibility"] == "private"
    assert set(committed(hub, "mila/merged")) == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_what_is_pushed_comes_back(hub: Hub, tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = mr.init_lora(mr.load_model(NAME).config, rank=2, b_std=0.1)
    adapter.base_model_name_or_path = NAME
    mr.save_adapter(adapter, "adapter")
    assert main(["push", "adapter", "mila/back"]) == 0
    repo = tmp_path / "repos" / "back"
    repo.mkdir()
    for name, data in committed(hub, "mila/back").items():
        (repo / name).write_bytes(data)
    assert f"base_model: {NAME}" in (repo / "README.md").read_text(encoding="utf-8")
    hub.add("mila/back", repo)
    back = mr.load_adapter("mila/back")
    assert {n: a.tobytes() for n, a in back.weights.items()} == {
        n: a.tobytes() for n, a in adapter.weights.items()
    }


def test_what_cannot_be_pushed(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mr.save_adapter(mr.init_lora(mr.load_model(NAME).config, rank=2), "adapter")
    Path("empty").mkdir()
    assert "expected user/name" in refused(capsys, "push", "adapter", "just-a-name")
    assert "neither adapter_config.json nor config.json" in refused(capsys, "push", "empty", "a/b")
    assert "found no directory" in refused(capsys, "push", "nowhere", "a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HF_TOKEN" in refused(capsys, "push", "adapter", "mila/lora")
    weights = Path("adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in refused(capsys, "push", "adapter", "mila/lora")
    assert hub.committed == {}
