"""Names instead of paths: what may be said of a base model in files that are shared."""

import json
from pathlib import Path

import pytest

import mesp_ref as mr
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.mlx import save_mlx_adapter
from mesp_ref.files.names import DEFAULT, model_name, shared_name
from mesp_ref.files.peft import save_adapter


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, None),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/home/mila/secret project/qwen", "qwen"),
        ("/home/mila/qwen/", "qwen"),
        ("./qwen", "qwen"),
        ("~/qwen", "qwen"),
        ("../../qwen", "qwen"),
        ("C:\\Users\\mila\\qwen", "qwen"),
        ("C:\\", None),
        ("/", None),
        (".", None),
        ("", None),
        ("/home/mila/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6499f32",
         "Qwen/Qwen2.5-0.5B"),
    ],
)  # fmt: skip
def test_a_path_is_no_name(path: str | None, name: str | None) -> None:
    assert shared_name(path) == name


def test_the_name_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Qwen2.5-0.5B"
    folder.mkdir()
    assert model_name(folder, str(folder)) == "Qwen2.5-0.5B"
    monkeypatch.chdir(folder)
    assert model_name(Path(), ".") == "Qwen2.5-0.5B"
    for stated, name in (
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-1.5B", "Qwen2.5-0.5B"),  # what it was made from is not what it is
        ("/home/mila/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        (7, "Qwen2.5-0.5B"),
    ):
        (folder / "config.json").write_text(json.dumps({"_name_or_path": stated}))
        assert model_name(folder, str(folder)) == name
    assert model_name(folder, "Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"  # no path of this machine
    (folder / "Qwen" / "x").mkdir(parents=True)
    assert model_name(Path("Qwen/x"), "Qwen/x") == "x"
    assert model_name(default_checkpoint()) == DEFAULT


def test_no_adapter_that_is_written_holds_a_path(tmp_path: Path, tiny_config) -> None:
    adapter = mr.init_lora(tiny_config, rank=2, seed=0)
    adapter.base_model_name_or_path = "/home/mila/models/qwen"  # as older ones have it
    save_adapter(adapter, tmp_path / "peft")
    save_mlx_adapter(adapter, tmp_path / "mlx")
    for folder in ("peft", "mlx"):
        text = (tmp_path / folder / "adapter_config.json").read_text()
        assert '"qwen"' in text
        assert "mila" not in text
