"""Every end token ends: config.json's, generation_config.json's, and that of a template's turns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine import generate as generate_module
from mesp_ref.files.end_tokens import end_tokens, generation_ends
from mesp_ref.train.rows import Encoder


def settings(folder: Path, value: object) -> Path:
    content = json.dumps({"eos_token_id": value, "temperature": 0.7})
    (folder / "generation_config.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("given", "found"), [(7, (7,)), ([7, 3], (7, 3)), (None, ()), ([], ()), ([2, 7], (2, 7))]
)
def test_numbers_and_lists_are_read(tmp_path: Path, given: object, found: tuple[int, ...]) -> None:
    assert generation_ends(tmp_path) == ()
    assert generation_ends(settings(tmp_path, given)) == found


def test_those_of_the_config_come_first(tmp_path: Path) -> None:
    """A document is closed by the first of them, the one of config.json where it names one."""
    settings(tmp_path, [9, 2, 7])
    assert end_tokens(tmp_path, (2,)) == (2, 9, 7)
    assert end_tokens(tmp_path, ()) == (9, 2, 7)
    assert end_tokens(None, (2,)) == (2,)


@pytest.mark.parametrize("value", ["7", [7, "x"], -1, 2**31, True, 1.0, {"a": 1}, [[7]]])
def test_what_is_no_token_id_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(mr.MespRefError, match=r"generation_config.json: eos_token_id: found"):
        generation_ends(settings(tmp_path, value))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    model, away = tmp_path / "model", tmp_path / "away.json"
    model.mkdir()
    away.write_text("{}")
    (model / "generation_config.json").symlink_to(away)
    with pytest.raises(mr.MespRefError, match="found a link to"):
        generation_ends(model)


def test_a_loaded_model_ends_at_each(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model is made to say 1, 2, 3, …; it stops at the first end token it meets."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    count = iter(range(1, 1000))
    monkeypatch.setattr(generate_module, "_choose", lambda *_, **__: next(count))

    def said(in_config: object, in_generation: object) -> list[int]:
        nonlocal count
        count = iter(range(1, 1000))
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config}))
        settings(folder, in_generation)
        [new] = mr.generate(mr.load_model(folder), [[5]], max_new_tokens=10)
        return new

    assert said(4, None) == [1, 2, 3, 4]
    assert said(None, 3) == [1, 2, 3]
    assert said(None, [9, 2]) == [1, 2]
    assert said([8, 6], [7, 5]) == [1, 2, 3, 4, 5]
    assert said(None, None) == list(range(1, 11))


def test_documents_that_end_at_any_end_token_are_closed(tokenizer: object) -> None:

    encoder = Encoder(tokenizer, None, (2, 0), 300)  # type: ignore[arg-type]
    names = {0: "<|endoftext|>", 2: "<|im_end|>"}
    for ending, closed in (("", 2), (names[2], 2), (names[0], 0)):
        row = encoder.record({"text": f"one{ending}"}, "here")
        assert row.ids[-1] == closed
        assert int(np.isin(row.ids, [0, 2]).sum()) == 1
