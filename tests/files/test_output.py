"""Outputs: whole or not at all, in nobody's place, as the umask says, and after a kill put right."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mesp_ref as mr
from mesp_ref.errors import MespRefWarning
from mesp_ref.files import aside, models, output
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.manifest import Manifest, content
from mesp_ref.files.mlx import save_mlx_adapter
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.verify.samples import sample_model, small_config

CONFIG = small_config(hidden_size=32, intermediate_size=32)
SCRIPT = Path(__file__).parents[1] / "replacing.py"


def write(place: Path, text: str, **options: object) -> None:
    with output.new_directory(place, **options) as folder:  # type: ignore[arg-type]
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text(text)


def text(place: Path) -> str:
    return (place / "sub" / "a").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def adapter_of(value: float, alpha: float = 16.0) -> mr.Adapter:
    adapter = mr.init_lora(CONFIG, rank=2, alpha=alpha)
    for array in adapter.weights.values():
        array[...] = value
    return adapter


# Faults and readers, in processes of their own


def script(*options: object) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_any_call_leaves_the_old_or_the_new(every: int) -> None:
    found = script("--every", every)
    assert found["lost"] == 0
    seen = {version for counts in found["found"].values() for version in counts}  # type: ignore[attr-defined]
    assert {"1", "2"} <= seen  # else nothing was cut


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reads", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_reader_finds_a_torn_adapter(reads: int) -> None:
    for counts in script("--torn", reads).values():
        assert counts.keys() <= {"8.0", "16.0", "absent", "the writer ended"}  # type: ignore[attr-defined]
        assert min(counts["8.0"], counts["16.0"]) > reads / 20  # type: ignore[index]  # both were met


def test_the_scale_of_an_adapter_is_held_against_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesp_ref.files.peft._PAUSE", 0)
    for alpha in (8.0, 16.0):
        mr.save_adapter(adapter_of(alpha, alpha), tmp_path / f"{alpha}")
    mixed, weights = tmp_path / "8.0", "adapter_model.safetensors"
    (mixed / weights).write_bytes((tmp_path / "16.0" / weights).read_bytes())
    with pytest.raises(
        mr.MespRefError, match=r"lora_alpha: found 8\.0, expected 16\.0, with which"
    ):
        mr.load_adapter(mixed)


# Folders


def test_an_adapter_of_another_scale_is_replaced_only_on_demand(tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    mr.save_adapter(adapter_of(1), place)
    mr.save_adapter(adapter_of(2), place)
    with pytest.raises(mr.MespRefError, match="exists and is not empty"):
        mr.save_adapter(adapter_of(3, 8.0), place)
    (place / "note.txt").write_text("mine")
    mr.save_adapter(adapter_of(4), place)  # a run goes on beside the user's note
    with pytest.raises(mr.MespRefError, match=r"found note\.txt, which mesp-ref did not write"):
        mr.save_adapter(adapter_of(3, 8.0), place, overwrite=True)
    assert mr.load_adapter(place).alpha == 16
    (place / "note.txt").unlink()
    mr.save_adapter(adapter_of(3, 8.0), place, overwrite=True)
    assert mr.load_adapter(place).alpha == 8
    assert names(tmp_path) == ["adapter"]


def test_what_came_while_the_new_was_written_stays(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write(place, "old")
    with pytest.raises(mr.MespRefError, match=r"found late\.txt"):  # noqa: SIM117
        with output.new_directory(place, overwrite=True):
            (place / "late.txt").write_text("mine")
    assert text(place) == "old"
    assert (place / "late.txt").read_text() == "mine"
    with pytest.raises(mr.MespRefError, match="cannot be written"):  # noqa: SIM117
        with output.new_directory(tmp_path / "other"):
            write(tmp_path / "other", "mine")
    assert text(tmp_path / "other") == "mine"
    assert names(tmp_path) == ["other", "out"]


def test_an_input_is_never_its_own_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to("out")
    for source in ("out", "out/sub/a", "link", "link/sub", "out/../out/sub"):
        with pytest.raises(mr.MespRefError, match="which is read; name another directory"):
            write(tmp_path / "out", "new", overwrite=True, inputs=[None, tmp_path / source])
    (tmp_path / "twin").hardlink_to(tmp_path / "out/sub/a")
    for path in ("out/sub/a", "twin"):
        with pytest.raises(mr.MespRefError, match="which is read; name another place"):
            output.check_file(tmp_path / path, True, [tmp_path / "out/sub/a"])
    output.check_file(tmp_path / "out/new", True, [tmp_path / "out"])
    write(tmp_path / "out", "new", overwrite=True, inputs=[tmp_path / "nowhere", "out2"])
    assert text(tmp_path / "out") == "new"


def test_the_check_of_foreign_files_is_what_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a photo is swapped out of its folder: the tests of this file can fail."""
    write(tmp_path / "out", "old")
    (tmp_path / "out/photo").write_text("mine")
    monkeypatch.setattr(Manifest, "foreign", lambda self, ours=None: iter(()))
    with pytest.warns(MespRefWarning, match="left of the old out"):
        write(tmp_path / "out", "new", overwrite=True)
    assert not (tmp_path / "out/photo").exists()
    [left] = tmp_path.glob(".out.mesp-ref-*")  # even so it is not removed
    assert (left / "photo").read_text() == "mine"


# What a killed process leaves


def test_leftovers_are_removed_put_back_or_named(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write(place, "old")
    gone = [aside.aside_name(place), aside.aside_name(place, "old-")]
    place.rename(gone[1])  # killed between two renames
    with pytest.warns(MespRefWarning, match="put back; replacing it had been cut short"):
        output.recover(place)
    assert text(place) == "old"
    gone[0].mkdir()  # killed while writing
    Manifest(gone[0], "unfinished").save()
    (gone[0] / "half").write_text("x")
    write(tmp_path / "copy", "older")
    (tmp_path / "copy").rename(gone[1])  # killed before the old version was removed
    output.recover(place)
    assert names(tmp_path) == ["out"]
    gone[0].mkdir()
    (gone[0] / "photo").write_text("mine")
    with pytest.warns(MespRefWarning, match="found beside out, holds what mesp-ref did not write"):
        write(place, "new", overwrite=True)
    assert (gone[0] / "photo").read_text() == "mine"
    assert text(place) == "new"


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with output.new_directory(tmp_path / "out") as folder, output.write_aside(tmp_path / "f") as f:
        (folder / "a").write_text("x")
        output.recover(tmp_path / "out")
        output.recover(tmp_path / "f")
        assert folder.exists()
        assert f.exists()
    assert names(tmp_path) == ["f", "out"]


def test_the_next_reader_puts_a_model_and_an_adapter_back(tmp_path: Path) -> None:
    mr.save_adapter(adapter_of(1), tmp_path / "adapter")
    mr.merge(
        sample_model(np.random.default_rng(0), CONFIG, "float32"), adapter_of(1), tmp_path / "m"
    )
    for name, read in (("adapter", mr.load_adapter), ("m", mr.load_model)):
        (tmp_path / name).rename(aside.aside_name(tmp_path / name, "old-"))
        with pytest.warns(MespRefWarning, match="put back"):
            read(tmp_path / name)


# Files


def test_a_file_is_written_where_a_file_or_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(mr.MespRefError, match="expected the name of a file"):  # noqa: SIM117
            with output.write_aside(tmp_path / name):
                pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mr.MespRefError, match="file: exists; name another file, or add"):  # noqa: SIM117
        with output.write_aside(tmp_path / "file", overwrite=False):
            pass
    with pytest.raises(mr.MespRefError, match="late: exists"):  # noqa: SIM117
        with output.write_aside(tmp_path / "late", overwrite=False):
            (tmp_path / "late").write_text("mine")
    assert names(tmp_path) == ["file", "folder", "late", "link", "pipe"]


# Permissions


def modes(folder: Path) -> set[tuple[bool, int]]:
    paths = [folder, *folder.rglob("*")]
    return {(p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in paths}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002])
def test_the_umask_is_respected(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        model = sample_model(np.random.default_rng(0), CONFIG, "float32")
        save_checkpoint(CONFIG, model.weights, tmp_path / "model")  # type: ignore[attr-defined]
        for file in (tmp_path / "model").iterdir():
            file.chmod(0o600)  # a private model beside a usual umask
        quantize_checkpoint(tmp_path / "model", tmp_path / "packed", group_size=32)
        mr.merge(model, adapter_of(1), tmp_path / "merged")
        mr.save_adapter(adapter_of(1), tmp_path / "adapter")
        mr.save_adapter(adapter_of(2), tmp_path / "adapter")
        save_mlx_adapter(adapter_of(1), tmp_path / "mlx")
    finally:
        os.umask(before)
    for name in ("packed", "merged", "adapter", "mlx"):
        assert modes(tmp_path / name) == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}, name


def test_what_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").chmod(0o700)
    write(tmp_path / "out", "new", overwrite=True)
    (tmp_path / "empty").mkdir(0o700)
    write(tmp_path / "empty", "new")
    (tmp_path / "f").touch(0o600)
    with output.write_aside(tmp_path / "f") as file:
        file.write_text("new")
    found = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("out", "empty", "f")]
    assert found == [0o700, 0o700, 0o600]


# The manifest


def test_a_manifest_lists_what_sha256sum_says(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    values = json.loads((tmp_path / "out/.mesp-ref.json").read_text())
    digest = "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"  # of "old"
    assert values["files"] == {"sub/a": [[3, digest]]}
    assert content(tmp_path / "out/sub/a") == (3, digest)
    assert str(tmp_path) not in json.dumps(values)


def test_a_file_written_into_a_folder_of_ours_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with output.write_aside(tmp_path / "out" / "b") as file:
        file.write_text("more")
    write(tmp_path / "out", "new", overwrite=True)
    assert not (tmp_path / "out" / "b").exists()


def test_weights_in_the_cache_take_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the cache whose model has another shape is made anew, if it is one of ours."""
    monkeypatch.setenv("MESP_REF_CACHE", str(tmp_path))
    place = tmp_path / "random" / "tiny-float32"
    monkeypatch.setitem(models.SHAPES, "tiny", CONFIG)
    models.random_checkpoint("tiny")
    monkeypatch.setitem(models.SHAPES, "tiny", small_config(hidden_size=48))
    (place / "photo").write_text("mine")
    with pytest.raises(mr.MespRefError, match="found photo, which mesp-ref did not write"):
        models.random_checkpoint("tiny")
    (place / "photo").unlink()
    assert models.random_checkpoint("tiny").config.hidden_size == 48


def test_the_weights_of_an_adapter_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    adapter = adapter_of(1)
    mr.save_adapter(adapter, tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == adapter.weights.keys()
    for name, array in adapter.weights.items():
        np.testing.assert_array_equal(found[name], array)
