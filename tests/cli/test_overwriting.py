"""Nobody's files are lost: every command that writes a folder, on every layout of that folder.

The oracle is a snapshot: whatever the command itself did not write there before must be there
afterwards, of the same type, mode and content, whether the command was refused or not.
"""

import itertools
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import words, write_model
from test_convert import write_gguf
from tokenizers import Tokenizer

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.files.models import random_model
from mesp_ref.files.output import new_directory
from mesp_ref.golden.suite import Suite
from mesp_ref.verify.samples import small_config

pytest.importorskip("gguf")

COMMANDS = {
    "merge": "merge --model model --adapter adapter --out {}",
    "quantize": "quantize model {} --group-size 32",
    "pretrain": "pretrain --steps 1 --layers 1 --hidden-size 16 --intermediate-size 16 --seq-len 16 "
    "--heads 2 --kv-heads 1 --head-dim 8 --vocab-size 300 --heldout 1 --samples 1 --quiet --out {}",
    "golden run": "golden run engine --only ops/rmsnorm/usual --out {}",
    "golden build": "golden build {}",
    "golden export": "golden export {}",
    "convert gguf": "convert gguf model.gguf {}",
    "convert adapter": "convert adapter adapter {} --to mlx",
    "finetune": "finetune --model model --data notes.txt --steps 1 --seq-len 16 --accumulate 1 "
    "--sample-tokens 0 --val-fraction 0 --rank 1 --quiet --out {}",
}  # fmt: skip

Layout = Callable[[Path, Callable[[], object]], object]
LAYOUTS: dict[str, Layout] = {}
PHOTO = b"\x89PNG my only photo"


def put(path: Path, content: bytes = PHOTO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Nothing of ours there. `out` is the place that the command is told.
LAYOUTS |= {
    "nothing": lambda out, own: None,
    "an empty folder": lambda out, own: out.mkdir(),
    "a private empty folder": lambda out, own: out.mkdir(0o700),
    "a file in the way": lambda out, own: put(out),
    "an empty file in the way": lambda out, own: put(out, b""),
    "a link to a folder": lambda out, own: out.symlink_to(put(out.parent / "photos/a").parent),
    "a link to an empty folder": lambda out, own: (
        (out.parent / "e").mkdir(), out.symlink_to("e"))[1],
    "a link to a file": lambda out, own: out.symlink_to(put(out.parent / "a.png")),
    "a link to nothing": lambda out, own: out.symlink_to("nowhere"),
    "a link to the model": lambda out, own: out.symlink_to("model"),
    "a pipe": lambda out, own: os.mkfifo(out),
    "photos": lambda out, own: put(out / "a.png"),
    "photos deep down": lambda out, own: put(out / "2024/05/a.png"),
    "one hidden file": lambda out, own: put(out / ".secret"),
    "a home": lambda out, own: [put(out / n) for n in (".ssh/id", ".bashrc", "thesis.tex")],
    "only empty folders": lambda out, own: (out / "a/b").mkdir(parents=True),
    "a repository": lambda out, own: [put(out / n) for n in (".git/HEAD", "a.py")],
    "a link inside": lambda out, own: (out.mkdir(), (out / "l").symlink_to("/etc"))[1],
    "a foreign .lock": lambda out, own: put(out / ".lock", b"vital"),
    "a foreign model": lambda out, own: [
        put(out / n) for n in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    ],
    "a foreign run": lambda out, own: [
        put(out / n, b"{}") for n in ("run.json", "metrics.jsonl", "loss.png", "adapter/a",
        "adapter/adapter_model.safetensors", "state.safetensors", "summary.json")
    ],
    "names of ours, hidden": lambda out, own: [
        put(out / n) for n in (".run.json.bak", ".summary.json.swp", ".loss.png.old")],
    "an aside of nobody": lambda out, own: put(
        out.parent / ".out.mesp-ref-0123abcd/a.png"),
    "an old aside of nobody": lambda out, own: put(
        out.parent / ".out.mesp-ref-old-0123abcd/a.png"),
    "a linked aside": lambda out, own: (out.parent / ".out.mesp-ref-0123abcd").symlink_to("adapter"),
    "beside it, .new": lambda out, own: put(out.parent / "out.new/a.png"),
}  # fmt: skip


def forged(files: dict[str, object], state: str = "complete") -> bytes:
    manifest = {"format": "mesp-ref manifest 1", "state": state, "files": files}
    return json.dumps(manifest).encode()


# A manifest that does not list what is there.
LAYOUTS |= {
    "a manifest of nothing": lambda out, own: [
        put(out / "a.png"), put(out / ".mesp-ref.json", forged({}))],
    "a manifest that names places outside": lambda out, own: [
        put(out / ".mesp-ref.json", forged({"../a.png": [[17, "0"]], "/a.png": []})),
        put(out.parent / "a.png")],
    "a manifest of another content": lambda out, own: [
        put(out / "a.png"),
        put(out / ".mesp-ref.json", forged({"a.png": [[len(PHOTO), "0" * 64]]}))],
    "a manifest that calls it unfinished": lambda out, own: [
        put(out / "a.png"), put(out / ".mesp-ref.json", forged({}, "unfinished"))],
    "a manifest that calls it retired": lambda out, own: [
        put(out / "a.png"), put(out / ".mesp-ref.json", forged({}, "retired"))],
    "a manifest that is no JSON": lambda out, own: [
        put(out / "a.png"), put(out / ".mesp-ref.json", b"\xff{")],
    "a manifest in a link": lambda out, own: [
        put(out / "a.png"), put(out.parent / "m", forged({})),
        (out / ".mesp-ref.json").symlink_to("../m")],
}  # fmt: skip


def ours_and(change: Callable[[Path], object]) -> Layout:
    """What the command wrote there before, and then something more."""

    def arrange(out: Path, own: Callable[[], object]) -> None:
        own()
        change(out)

    return arrange


def first(out: Path) -> Path:
    """A file of ours."""
    return next(p for p in sorted(out.rglob("*")) if p.is_file() and not p.name.startswith("."))


def edit(out: Path) -> None:
    data = bytearray(first(out).read_bytes())
    data[-1] ^= 1
    first(out).write_bytes(data)


def link_for_file(out: Path) -> None:
    file = first(out)
    file.unlink()
    file.symlink_to(put(out.parent / "elsewhere.png"))


LAYOUTS |= {
    "ours": ours_and(lambda out: None),
    "ours and a photo": ours_and(lambda out: put(out / "a.png")),
    "ours and a hidden file": ours_and(lambda out: put(out / ".note")),
    "ours and a folder": ours_and(lambda out: put(out / "photos/a.png")),
    "ours and a photo in our folder": ours_and(lambda out: put(first(out).parent / "zz.png")),
    "ours and an empty folder": ours_and(lambda out: (out / "empty").mkdir()),
    "ours and a link": ours_and(lambda out: (out / "l").symlink_to("../adapter")),
    "ours and a pipe": ours_and(lambda out: os.mkfifo(out / "p")),
    "ours and a hard link": ours_and(lambda out: os.link(put(out.parent / "a"), out / "b")),
    "ours and a foreign .lock": ours_and(lambda out: put(out / ".lock", b"vital")),
    "ours and foreign events": ours_and(lambda out: put(out / "metrics.jsonl", b"my notes\n")),
    "ours, edited": ours_and(edit),
    "ours, appended": ours_and(lambda out: put(first(out), first(out).read_bytes() + b"mine")),
    "ours, a link for a file": ours_and(link_for_file),
    "ours without the manifest": ours_and(lambda out: (out / ".mesp-ref.json").unlink()),
    "ours, and .new": ours_and(lambda out: put(out.parent / "out.new/a.png")),
    "ours, and an aside of nobody": ours_and(
        lambda out: put(out.parent / ".out.mesp-ref-0123abcd/a.png")),
    "ours behind a link": ours_and(lambda out: (
        out.rename(out.parent / "real"), out.symlink_to("real"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """What all commands read."""
    home = tmp_path_factory.mktemp("desk")
    config = small_config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=32, head_dim=8,
    )  # fmt: skip
    write_model(home / "model", config, tokenizer)
    model = mr.load_model(home / "model")
    mr.save_adapter(mr.init_lora(model.config, rank=1, b_std=0.1), home / "adapter")
    (home / "notes.txt").write_text(words(200), encoding="utf-8")
    arrays = {n: random_model(config).weights[n] for n in config.weight_shapes()}
    arrays = {n: a for n, a in arrays.items() if not n.endswith(".bias")}
    from gguf import GGMLQuantizationType as kinds

    write_gguf(home / "model.gguf", config, arrays, tokenizer, "llama", "smollm",
               lambda name: kinds.F32)  # fmt: skip
    return home


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """golden build makes one case, golden export copies it, pretrain's tokenizer sees 100 documents."""
    from mesp_ref.golden import builder
    from mesp_ref.golden.builder import ops, quantised

    cases = ops.op_cases
    monkeypatch.setattr(ops, "op_cases", lambda: itertools.islice(cases(), 1))
    monkeypatch.setattr(quantised, "quantised_cases", lambda: ())
    monkeypatch.setattr(builder, "model_cases", lambda root: ())
    monkeypatch.setattr("mesp_ref.stories.tokenizer._DOCUMENTS", 100)


def look(path: Path) -> tuple[object, ...]:
    """What a path is: type and permissions, and its content or target."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "link", str(path.readlink())
    if stat.S_ISREG(status.st_mode):
        return "file", stat.S_IMODE(status.st_mode), path.read_bytes()
    return stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)


def snapshot(home: Path) -> dict[str, tuple[object, ...]]:
    return {str(p.relative_to(home)): look(p) for p in home.rglob("*")}


def run(argv: str, out: str, overwrite: bool) -> int:
    return main([*argv.format(out).split(), *["--overwrite"] * overwrite])


def lost(
    home: Path, before: dict[str, tuple[object, ...]], own: dict[str, tuple[object, ...]]
) -> list:
    """Paths that are no longer what they were, apart from what the command had written itself."""
    foreign = {name: was for name, was in before.items() if own.get(name) != was}
    after = snapshot(home)
    return [name for name, was in foreign.items() if after.get(name) != was]


@pytest.mark.filterwarnings("ignore::mesp_ref.errors.MespRefWarning")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_no_file_of_anybody_is_lost(
    command: str, share: int, desk: Path, tmp_path: Path, quick: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All layouts, with and without --overwrite; in the suite each command takes its share."""
    assert len(LAYOUTS) >= 40
    monkeypatch.chdir(desk)
    before = snapshot(desk)
    if command == "golden export":
        assert main(["golden", "build", str(tmp_path / "suite")]) == 0
        monkeypatch.setattr("mesp_ref.cli.golden.Suite", lambda: Suite(tmp_path / "suite"))
    template = tmp_path / "template"
    assert run(COMMANDS[command], str(template), False) == 0, capsys.readouterr().err
    offset, losses, refused = list(COMMANDS).index(command) % share, [], 0
    names = [name for i, name in enumerate(LAYOUTS) if i % share == offset or name == "ours"]
    for number, (name, overwrite) in enumerate(itertools.product(names, (False, True))):
        home = tmp_path / f"{number}"
        shutil.copytree(desk, home)
        monkeypatch.chdir(home)
        LAYOUTS[name](home / "out", lambda home=home: shutil.copytree(template, home / "out"))
        own = {f"out{'/' * (p != '.')}{p}": was for p, was in snapshot(template).items()}
        there = snapshot(home)
        own |= {
            n: w for n, w in there.items() if w == (stat.S_IFDIR, 0o755) and f"{n}/" in str(own)
        }
        if name in ("ours", "a manifest that names places outside"):  # nothing else is in these
            own |= {n: there[n] for n in ("out", "out/.mesp-ref.json")}
        code = run(COMMANDS[command], "out", overwrite)
        assert code in (0, 2)
        refused += code == 2
        losses += [(name, overwrite, path) for path in lost(home, there, own)]
        if name == "ours":
            assert code == (0 if overwrite else 2), capsys.readouterr().err
        shutil.rmtree(home)
    assert losses == []
    assert refused >= len(names)  # else nothing was in the way
    assert snapshot(desk) == before


def test_the_snapshot_can_tell(desk: Path, tmp_path: Path) -> None:
    """The oracle on a command that loses things: without it nothing above would be shown."""
    shutil.copytree(desk, tmp_path / "home")
    before = snapshot(tmp_path / "home")
    assert lost(tmp_path / "home", before, {}) == []
    (tmp_path / "home/notes.txt").chmod(0o640)
    (tmp_path / "home/model/config.json").write_text("{}")
    (tmp_path / "home/model.gguf").unlink()
    told = ["model.gguf", "model/config.json", "notes.txt"]
    assert sorted(lost(tmp_path / "home", before, {})) == told


# Commands that write one file

FILES = {
    "page.html": "golden check outputs --only ops/rmsnorm/usual --html {}",
    "plot.html": "memory model --seq-len 8 --method mesp --plot {}",
    "plot.png": "memory model --seq-len 8 --method mesp --plot {}",
    "sketch.json": "golden sketch --model model --adapter adapter --batch batch.json --out {}",
    "figure.png": "compare --model model --data notes.txt --steps 1 --seq-len 16 --quiet --out {}",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_replaced_only_on_demand(
    name: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(desk, home)
    monkeypatch.chdir(home)
    (home / "batch.json").write_text(json.dumps({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]}))
    assert main(["golden", "run", "engine", "--only", "ops/rmsnorm/usual", "--out", "outputs"]) == 0
    put(home / name)
    put(home / "model" / name)
    put(home / "outputs" / name)
    put(home / "adapter" / name)
    put(home / "folder" / name)
    (home / f"link.{name}").symlink_to(name)
    (home / f"folder.{name}").mkdir()
    there = snapshot(home)
    read = {"page": "outputs", "plot": "model", "sketch": "adapter", "figure": "model"}
    inside = f"{read[name.partition('.')[0]]}/{name}"
    for out, overwrite in itertools.product((f"link.{name}", f"folder.{name}", inside), (0, 1)):
        assert run(FILES[name], out, bool(overwrite)) == 2, out
    assert run(FILES[name], name, False) == 2
    assert lost(home, there, {}) == []
    assert run(FILES[name], name, True) == 0
    assert lost(home, there, {}) == [name]
    assert run(FILES[name], f"new.{name}", False) == 0


@pytest.mark.parametrize("command", ["merge", "quantize", "convert adapter", "convert gguf"])
def test_what_is_read_is_not_replaced(
    command: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The output of a command of ours, named as the input of the next and as its output."""
    shutil.copytree(desk, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    if command == "convert adapter":
        argv = COMMANDS[command].replace("adapter adapter", "adapter ours")
        assert run(COMMANDS[command], "ours", False) == 0
    else:
        with new_directory("ours") as folder:
            for file in ("config.json", "model.safetensors", "tokenizer.json"):
                shutil.copyfile(f"model/{file}", folder / file)
            shutil.copyfile("model.gguf", folder / "model.gguf")
        argv = COMMANDS[command].replace("model {}", "ours {}").replace("model model", "model ours")
        argv = argv.replace("model.gguf", "ours/model.gguf")
    before = snapshot(Path())
    assert run(argv, "ours", True) == 2
    assert "which is read" in capsys.readouterr().err
    assert snapshot(Path()) == before


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "slow or not slow", "-q"]))
