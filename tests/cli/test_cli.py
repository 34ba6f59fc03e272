"""The command line as a user meets it: examples, results, and one clear line for every mistake."""

import argparse
import csv
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import words, write_model
from safetensors.numpy import save_file

import mesp_ref as mr
from mesp_ref.api import METHODS
from mesp_ref.cli import build_parser, main
from mesp_ref.cli.memory import SHAPES
from mesp_ref.files.config import config_of
from mesp_ref.files.mlx import save_mlx_adapter
from mesp_ref.job.defaults import RECIPE
from mesp_ref.job.pretrain import PretrainOptions
from mesp_ref.stories import story, write_questions
from mesp_ref.verify.compare import agreement

COMMANDS = (
    "finetune", "generate", "eval", "data", "merge", "info", "compare", "gradcheck", "convert",
    "pretrain", "golden", "mutants",
)  # fmt: skip
README = Path(__file__).parents[2] / "README.md"
QUICK = ["--steps", "3", "--seq-len", "24", "--lr", "0.01", "--sample-tokens", "4", "--quiet"]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model_dir):
    """A user's directory: a model, an adapter, a text, chats; and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model_dir, target_is_directory=True)
    Path("notes.txt").write_text(words(900), encoding="utf-8")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    Path("chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9, encoding="utf-8")
    adapter = mr.init_lora(mr.load_model("model").config, rank=2, seed=1, b_std=0.1)
    mr.save_adapter(adapter, "adapter")
    return tmp_path


@pytest.fixture
def finetune():
    """Runs mesp-ref finetune on the user's directory with more options."""

    def run(*more, model="model", data="notes.txt", out="run"):
        return main(["finetune", "--model", model, "--data", data, "--out", out, *QUICK, *more])

    return run


def tree(path):
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if not p.is_dir()}


# What commands do


def documented_examples():
    """Every example of every --help, those of a command's own commands included."""

    def epilogs(parser):
        yield parser.epilog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from epilogs(command)

    lines = [line.strip() for text in epilogs(build_parser()) for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("mesp-ref ")))


@pytest.fixture
def hours(monkeypatch):
    """Examples that take minutes, made short: the command lines stay, what they run over shrinks.

    finetune and pretrain without --steps take two steps (pretrain's tokenizer sees 100 documents),
    golden build makes one case, mutants plants one bug and one backward's automatic mutants, and
    the published shapes of memory are those of one small model.
    """
    from mesp_ref.golden import builder
    from mesp_ref.golden.builder import ops, quantised
    from mesp_ref.verify import mutants

    for name, value in {"steps": 2, "batch_size": 1}.items():
        monkeypatch.setitem(RECIPE, name, value)
    for name, value in {"steps": 2, "batch_size": 1, "heldout": 2, "samples": 1}.items():
        monkeypatch.setattr(PretrainOptions, name, value)
    monkeypatch.setattr("mesp_ref.stories.tokenizer._DOCUMENTS", 100)
    cases, bug = ops.op_cases, next(iter(mutants.BUGS))
    monkeypatch.setattr(ops, "op_cases", lambda: itertools.islice(cases(), 1))
    monkeypatch.setattr(quantised, "quantised_cases", lambda: ())
    monkeypatch.setattr(builder, "model_cases", lambda root: ())
    monkeypatch.setattr(mutants, "BUGS", {bug: mutants.BUGS[bug]})
    monkeypatch.setattr(mutants, "reachable", lambda: {"ops.rope:rope_bwd": ("rope",)})
    for name in SHAPES:
        monkeypatch.setitem(SHAPES, name, mr.Qwen2Config(99, 64, 128, 2, 4, 2, 16))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What a backend wrote that passes: this engine."""
    path = tmp_path_factory.mktemp("golden") / "outputs"
    assert main(["golden", "run", "engine", "--out", str(path)]) == 0
    return path


@pytest.fixture
def reader(tmp_path, monkeypatch, hours):
    """The directory of someone who tries the examples: the default checkpoint, under the names of
    the examples, too; and a cache of their own, since they write weights there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MESP_REF_CACHE", str(tmp_path / "cache"))
    model = mr.load_model()
    Path("Qwen2.5-0.5B").symlink_to(model.path, target_is_directory=True)
    told = [story(number).text for number in range(8)]
    Path("notes.txt").write_text("\n\n".join(told), encoding="utf-8")
    write_questions("chats.jsonl", 40)
    return model


def gguf_file(path, tokenizer):
    """A small llama whose linears are Q4_1 and whose embedding is Q8_0, as SmolLM2's file has it."""
    gguf = pytest.importorskip("gguf")
    from test_convert import write_gguf

    from mesp_ref.engine.init import random_arrays

    config = mr.Qwen2Config(tokenizer.get_vocab_size(), 64, 96, 2, 4, 2, 16, eos_token_id=2)
    kinds = gguf.GGMLQuantizationType
    arrays = {n: w for n, w in random_arrays(config).items() if not n.endswith(".bias")}
    write_gguf(
        path, config, arrays, tokenizer, "llama", "smollm",
        lambda name: kinds.Q8_0 if "embed" in name else kinds.Q4_1,
    )  # fmt: skip


def provide(word, model, request):
    """What an example takes for granted under the name `word`."""
    adapter = mr.init_lora(model.config, rank=2, seed=1, b_std=0.1)
    if word.endswith("adapter"):
        mr.save_adapter(adapter, word)
    elif word == "runs/001":
        mr.save_adapter(adapter, "runs/001/adapter")
    elif word == "merged":
        mr.merge(model, adapter, word)
    elif word == "notes-mlx":
        save_mlx_adapter(adapter, word)
    elif word.endswith(".gguf"):
        gguf_file(word, request.getfixturevalue("tokenizer"))
    elif word == "golden.toml":
        Path(word).write_text("backend = 'mine'\n", encoding="utf-8")
    elif word in ("outputs", "my_outputs"):
        Path(word).symlink_to(request.getfixturevalue("outputs"))
    elif word in ("my_file.py", "folder/"):
        Path("folder").mkdir(exist_ok=True)
        for file in ("my_file.py", "folder/ada.py"):
            Path(file).write_text("from mesp_ref.ops import rmsnorm_bwd\n", encoding="utf-8")
    elif word == "batch.json":
        Path(word).write_text(json.dumps({"input_ids": [[5, 6, 7, 8]], "labels": [[5, 6, 7, 8]]}))
    elif word == "s.json":  # with the gradients that belong to it, and the loss of the example
        mr.save_adapter(adapter, "adapter")
        provide("batch.json", model, request)
        line = ["--model", str(model.path), "--adapter", "adapter", "--batch", "batch.json"]
        assert main(["golden", "sketch", *line, "--out", word]) == 0
        _, grads = mr.loss_and_grads(model, adapter, [[5, 6, 7, 8]], [[5, 6, 7, 8]])
        save_file(grads, "gradients.safetensors")
        sketch = json.loads(Path(word).read_text())
        Path(word).write_text(json.dumps(sketch | {"loss": 3.1415}))


@pytest.mark.parametrize("line", documented_examples())
def test_every_example_runs_as_written(line, reader, capsys, request):
    argv = shlex.split(line)[1:]
    if "torch" in argv:
        pytest.importorskip("torch")
    last = [word for word in argv[2:] if not word.startswith("-")][-1:]
    writes = {"build", "export", "gguf"} & set(argv)
    if {"--to", "gguf-model", "gguf-adapter"} & set(argv):
        last, writes = argv[3:4], True
    for before, word in itertools.pairwise(argv):
        if before != "--out" and not (writes and [word] == last):
            provide(word, reader, request)
    if "--resume" in argv:
        Path("begun.txt").write_text(words(900), encoding="utf-8")
        begin = ["--data", "begun.txt", "--steps", "2", "--seq-len", "16", "--out", argv[-1]]
        assert main(["finetune", *begin]) == 0
    if "--config" in argv:
        assert main(["finetune", "--steps", "2", "--out", "runs/chats"]) == 0
    if argv[0] == "push":
        request.getfixturevalue("loopback")
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    else:
        assert main(argv) == 0, capsys.readouterr().err


def test_the_examples_are_those_of_every_command():
    examples = documented_examples()
    commands = {line.split()[1] for line in examples}
    assert commands == {*COMMANDS, "memory", "push", "quantize", "learn"}
    for two in ("golden check", "golden run", "golden build", "golden export", "golden sketch",
                "golden compare", "convert gguf", "convert adapter"):  # fmt: skip
        assert any(line.startswith(f"mesp-ref {two} ") for line in examples), two


def test_the_command_lines_of_the_readme_run_in_their_order(
    tmp_path, monkeypatch, tiny_config, tokenizer, outputs, loopback, capsys
):
    """As written, all steps included; the models are tiny ones under the names of the README, with
    heads that share out the hidden size, as llama.cpp wants them; the hub is one of our own."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    model = write_model(tmp_path / "tiny", replace(tiny_config, hidden_size=24), tokenizer)
    Path("path/to").mkdir(parents=True)
    for name in ("path/to/Qwen2.5-0.5B", "smollm2"):
        Path(name).symlink_to(model, target_is_directory=True)
    for name in ("notes.txt", "proverbs.txt"):
        Path(name).write_text(words(2000), encoding="utf-8")
    Path("my-outputs").symlink_to(outputs)
    loopback.add("Qwen/Qwen2.5-0.5B-Instruct", model)
    Path("data").mkdir()
    shutil.copyfile("notes.txt", "data/notes.txt")
    loopback.add("mila/notes", tmp_path / "data", "datasets")
    Path("golden.toml").write_text("backend = 'mine'\n", encoding="utf-8")
    pages = README, *(README.parent / "docs" / f"{name}.md" for name in ("fine-tuning", "backends"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [x.partition("#")[0] for language, b in blocks if not language for x in b.splitlines()]
    commands = list(dict.fromkeys(line.strip() for line in lines if line.startswith("mesp-ref ")))
    assert len(commands) >= 6
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"mesp-ref {command} " in text.partition("examples:")[2]
    assert max(map(len, text.splitlines())) < 110


def test_finetune_prints_and_writes_the_same_summary(here, finetune, capsys):
    assert finetune("--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("run/summary.json").read_text())
    assert printed["steps"] == 3
    assert finetune("--overwrite") == 0
    text = capsys.readouterr().out
    assert f"{printed['before']['loss']:.4f} -> {printed['after']['loss']:.4f}" in text
    assert "run/adapter" in text


def test_progress_goes_to_standard_error(here, capsys):
    argv = ["finetune", "--model", "model", "--data", "notes.txt", "--out", "run", *QUICK, "--json"]
    argv.remove("--quiet")
    assert main(argv) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert re.search(r"step 3/3: loss \d+\.\d+, lr .*, \d+ tokens/s, \d+ MB", shown.err)
    assert re.search(r"held out after step 0: loss", shown.err)


def test_runs_are_numbered(here, capsys):
    for number in ("001", "002"):
        argv = ["finetune", "--model", "model", "--data", "notes.txt", *QUICK]
        assert main(argv) == 0
        assert Path("runs", number, "summary.json").is_file()
    assert main([*argv, "--resume"]) == 0  # goes on with the last one, which is complete
    assert not Path("runs/003").exists()


def test_overwrite_replaces_the_run_and_nothing_else(here, finetune, capsys):
    assert finetune() == 0
    Path("run/thesis.tex").write_text("my life's work")
    assert finetune("--rank", "3", "--overwrite") == 2
    assert "run: found thesis.tex, which mesp-ref did not write" in capsys.readouterr().err
    assert Path("run/thesis.tex").read_text() == "my life's work"
    assert mr.load_adapter("run/adapter").rank != 3
    Path("run/thesis.tex").unlink()
    assert finetune("--rank", "3", "--overwrite") == 0
    assert mr.load_adapter("run/adapter").rank == 3
    assert not Path("run.new").exists()
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert sum('"step": 1,' in line for line in lines) == 1


def test_an_adapter_can_be_trained_further(here, finetune, capsys):
    assert finetune("--adapter", "adapter", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    model = mr.load_model("model")
    first, then = mr.load_adapter("adapter"), mr.load_adapter("run/adapter")
    assert (then.rank, then.alpha) == (first.rank, first.alpha)
    [said] = mr.generate(
        model, [mr.load_tokenizer("model").encode(summary["prompt"]).ids], first, 4
    )
    decoded = mr.load_tokenizer("model").decode(said, skip_special_tokens=True)
    assert summary["before"]["sample"] == decoded


@pytest.mark.parametrize("kind", ["text", "pad", "tokens", "messages"])
def test_eval_is_the_mean_loss_per_token(here, capsys, kind):
    """Against transformers' definition written out: −log p of each counted next token, averaged."""
    model, tokenizer = mr.load_model("model", "float64"), mr.load_tokenizer("model")
    adapter = mr.load_adapter("adapter", "float64")
    options = ["--seq-len", "16"]
    if kind == "tokens":
        rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
        Path("data.jsonl").write_text("".join(json.dumps({"tokens": r}) + "\n" for r in rows))
        data, options = "data.jsonl", ["--seq-len", "16", "--packing", "pad", "--batch-size", "2"]
    elif kind == "messages":
        start = tokenizer.encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?"
                                 "<|im_end|>\n<|im_start|>assistant\n").ids  # fmt: skip
        rows, data = [start + tokenizer.encode("Nobody.<|im_end|>").ids], "chats.jsonl"
        options = ["--seq-len", "128", "--rows", "1"]
    else:
        ids, data = tokenizer.encode(Path("notes.txt").read_text()).ids, "notes.txt"
        rows = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    total, count = 0.0, 0
    for row in rows:
        z = mr.logits(model, [row], adapter)[0]
        for t in range(len(start) - 1 if kind == "messages" else 0, len(row) - 1):
            total += float(np.log(np.exp(z[t]).sum()) - z[t, row[t + 1]])
            count += 1
    argv = ["eval", "--model", "model", "--adapter", "adapter", "--dtype", "float64", "--json"]
    assert main([*argv, "--data", data, *options]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["tokens"] == count
    assert got["loss"] == pytest.approx(total / count, rel=1e-12)
    assert 0 <= got["accuracy"] <= 1
    assert got["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-12)


def test_generate_continues_and_answers(here, capsys, monkeypatch):
    tokenizer, model = mr.load_tokenizer("model"), mr.load_model("model")
    argv = ["generate", "--model", "model", "--max-new-tokens", "5", "--json"]
    assert main([*argv, "--prompt", "The ship"]) == 0
    got = json.loads(capsys.readouterr().out)
    [want] = mr.generate(model, [tokenizer.encode("The ship").ids], max_new_tokens=5)
    assert got["token_ids"] == want
    assert main([*argv, "--chat", "--system", "Rhyme.", "--prompt", "Who?"]) == 0
    asked = json.loads(capsys.readouterr().out)["prompt"]
    assert asked == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    Path("p.txt").write_text("The ship")
    assert main([*argv, "--prompt-file", "p.txt"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == want


def test_generate_writes_as_it_goes_and_finds_its_base(here, finetune, capsys, monkeypatch):
    """Pieces as they come, whole characters, together what --json says; from a run or its adapter."""
    assert finetune() == 0
    summary = capsys.readouterr().out
    assert summary.splitlines()[-1] == 'try it:  mesp-ref generate --adapter run --prompt "..."'
    line = ["generate", "--prompt", "Who? é", "--max-new-tokens", "40", "--temperature", "2"]
    assert main([*line, "--model", "model", "--adapter", "run/adapter", "--json"]) == 0
    want = json.loads(capsys.readouterr().out)["text"]
    assert len(want) > 10
    for adapter in ("run", "run/adapter"):
        pieces, write = [], sys.stdout.write
        monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or write(text))  # noqa: B023
        assert main([*line, "--adapter", adapter]) == 0
        monkeypatch.undo()
        monkeypatch.chdir(here)
        # what a terminal would obey is shown as Python would escape it; line ends and tabs stay
        codes = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), 127)} | {13: "\\r"}
        assert "".join(pieces) == want.translate(codes) + "\n"
        assert len([piece for piece in pieces if piece]) > 5
    shutil.copytree("run/adapter", "alone")
    config = json.loads(Path("alone/adapter_config.json").read_text())
    gone = config | {"base_model_name_or_path": "somebody/else"}
    Path("alone/adapter_config.json").write_text(json.dumps(gone))
    assert main([*line, "--adapter", "alone"]) == 2
    assert "alone: its model somebody/else: no such place here" in capsys.readouterr().err
    gone = config | {"base_model_name_or_path": "somebody's"}
    Path("alone/adapter_config.json").write_text(json.dumps(gone))
    assert main([*line, "--adapter", "alone"]) == 2
    assert 'was trained on "somebody\'s", which is no directory' in capsys.readouterr().err


def test_samples_are_shown_as_turns():
    from mesp_ref.cli.finetune import _turns

    chatml = "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWho\nis?<|im_end|>\n"
    chatml += "<|im_start|>assistant\n"
    assert _turns(chatml) == ["system   'Be.'", "user     'Who\\nis?'"]
    llama = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    assert _turns(llama) == ["user     'Who?'"]
    assert _turns("Once") == ["prompt   'Once'"]


def test_merge_gives_a_model_that_needs_no_adapter(here, capsys):
    assert main(["merge", "--model", "model", "--adapter", "adapter", "--out", "merged"]) == 0
    ids = np.arange(3, 20)[None]
    adapted = mr.logits(mr.load_model("model"), ids, mr.load_adapter("adapter"))
    merged = mr.logits(mr.load_model("merged"), ids)
    assert np.abs(adapted - mr.logits(mr.load_model("model"), ids)).max() > 0.05
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=2e-5)  # measured 1.9e-06
    assert Path("merged/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()
    capsys.readouterr()


def test_info_counts_parameters(here, tiny_config, capsys):
    assert main(["info", "model", "--rank", "3", "--targets", "q_proj,down_proj", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # embedding, per block: q, k, v with biases, o, three MLP matrices, two norms; final norm
    block = 20 * 24 + 24 + 2 * (20 * 12 + 12) + 24 * 20 + 3 * 20 * 28 + 2 * 20
    assert facts["parameters"] == 300 * 20 + 2 * block + 20
    assert facts["lora"]["parameters"] == 2 * 3 * ((20 + 24) + (28 + 20))
    assert facts["config"]["vocab_size"] == 300
    assert main(["info", "model"]) == 0
    assert f"{facts['parameters']:,}" in capsys.readouterr().out


def test_no_arguments_fine_tune_the_default_checkpoint(reader, capsys):
    assert main(["finetune", "--quiet", "--json", "--eval-rows", "4", "--sample-tokens", "3"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["out"] == "runs/001"
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["prompt"].endswith("<|im_start|>assistant\n")
    run = Path("runs/001")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["heldout_loss"]) == summary["after"]["loss"]
    base = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "mesp-ref-story-model"  # no path of this machine
    assert main(["finetune", "--quiet", "--json", "--resume"]) == 0  # the data comes out the same


def test_compare_says_what_each_method_gives(here, capsys):
    argv = ["compare", "--model", "model", "--data", "notes.txt", "--seq-len", "48", "--quiet"]
    assert main([*argv, "--steps", "3", "--lr", "0.01", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    methods = shown["methods"]
    assert list(methods) == list(METHODS)
    for name in ("store_all", "mebp", "mesp"):
        assert methods[name]["bit_identical"]
        assert methods[name]["losses"] == methods["store_all"]["losses"]
    assert not methods["mesp_tiled"]["bit_identical"]
    assert methods["mesp_tiled"]["within_rounding"]
    assert not methods["mezo"]["within_rounding"]
    assert methods["mesp_tiled"]["relative_difference"] < 1e-5  # measured 4e-07
    assert abs(methods["mezo"]["cosine"]) < 0.5
    peaks = [methods[name]["peak_bytes"] for name in ("store_all", "mebp", "mesp")]
    assert peaks == sorted(peaks, reverse=True)
    assert Path(shown["figure"]).read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--steps", "1", "--overwrite"]) == 0
    assert "mesp        bit-identical" in capsys.readouterr().out


def test_agreement_tells_rounding_from_another_gradient():
    g = {"a": np.linspace(-1, 1, 7, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
    assert agreement(g, g) == {
        "bit_identical": True,
        "cosine": pytest.approx(1),
        "largest_difference": 0,
        "relative_difference": 0,
        "within_rounding": True,
    }
    near = agreement(g | {"b": g["b"] * np.float32(1 + 1e-6)}, g)
    assert (near["bit_identical"], near["within_rounding"]) == (False, True)
    assert not agreement(g | {"b": g["b"] * np.float32(1.001)}, g)["within_rounding"]
    assert not agreement(g | {"b": g["b"] * np.float32(np.nan)}, g)["within_rounding"]
    assert agreement(g, {name: -x for name, x in g.items()})["cosine"] == pytest.approx(-1)


def test_gradcheck_proves_and_refuses(here, capsys):
    argv = ["gradcheck", "--model", "model", "--adapter", "adapter", "--data", "notes.txt"]
    argv += ["--seq-len", "12", "--batch-size", "2"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "proven: all 58 checks pass" in text  # 2 + 2 blocks of 7 pairs, each twice
    assert "layers.1.mlp.down_proj.lora_B.weight, direction" in text
    assert main([*argv, "--method", "mezo", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["proven"]
    assert main([*argv, "--method", "mezo"]) == 1
    assert "NOT PROVEN" in capsys.readouterr().out


def test_a_loss_that_explodes_keeps_the_last_good_adapter(here, finetune, capsys):
    assert finetune("--lr", "1e30", "--steps", "20", "--schedule", "constant") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"mesp-ref: error: step \d+: .* is kept in run/adapter\n", error)
    assert all(np.isfinite(a).all() for a in mr.load_adapter("run/adapter").weights.values())


# Mistakes: (command line, what the message says). {model}: a copy of the model with one thing wrong


def edit_config(path, **change):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def header_of_a_terabyte(path):
    file = path / "model.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])


def other_tokenizer(path):
    file = path / "tokenizer.json"
    file.write_text("{}")


def bad_template(path):
    source = "{{ raise_exception('no such role') }}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))


def no_template(path):
    (path / "tokenizer_config.json").unlink()


def index_that_leaves(path):
    """A shard index that points outside the checkpoint's directory."""
    (path / "model.safetensors").rename(path.parent / "shard.safetensors")
    names = mr.load_model("model").weights
    index = {"weight_map": dict.fromkeys(names, "../shard.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_shard(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def template_that_does_not_compile(path):
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% for m in %}"}))


def write(name, text):
    """A change that writes a file of the model's directory anew."""
    return lambda path: (path / name).write_text(text)


def remove(name):
    return lambda path: (path / name).unlink()


FINETUNE = "finetune --data notes.txt --out run --model "
DATA = "finetune --model model --out run --data "
GOOD = "finetune --model model --data notes.txt --out run "
COMPARE = "compare --model model --data notes.txt --seq-len 16 --quiet "
CHECK = "gradcheck --model model --data notes.txt --seq-len 16 "
SAY = "generate --model model --prompt Hi "

MISTAKES = {
    "unknown command": ("train", None, "did you mean finetune?; see mesp-ref --help"),
    "misspelt command": ("fintune", None, "did you mean finetune?"),
    "command of another tool": ("inference", None, "did you mean generate?"),
    "misspelt alias": ("trian", None, "did you mean finetune?"),
    "help as a command": ("help", None, "did you mean --help?"),
    "option before the command": ("--epochs 3", None, "found '--epochs' before a command"),
    "a file without its option": ("finetune x.txt", None, "did you mean --data x.txt?"),
    "option of what stands alone": (
        "info --model model",
        None,
        "behind --model alone; see mesp-ref info",
    ),
    "singular": (GOOD + "--epoch 3", None, "did you mean --steps (an epoch"),
    "unknown option": (
        GOOD + "--epochs 3",
        None,
        "arguments: --epochs 3; did you mean --steps (an",
    ),
    "rate": (GOOD + "--learning-rate 3", None, "did you mean --lr?; see mesp-ref finetune --help"),
    "batch": (GOOD + "--batch=3", None, "did you mean --batch-size?"),
    "misspelt option": (
        SAY + "--temprature 3",
        None,
        "did you mean --temperature?; see mesp-ref gen",
    ),
    "no row": ("gradcheck --tensors 1 --seq-len 24", None, "rows: found none"),
    "no such thing": (SAY + "--epochs 3", None, "arguments: --epochs 3; see mesp-ref generate"),
    "no action": ("golden chek", None, "did you mean check?"),
    "not a number": (GOOD + "--steps many", None, "--steps: invalid int value: 'many'"),
    "no model": (FINETUNE + "missing", None, "missing: not found, expected"),
    "model type": (FINETUNE + "{model}", {"model_type": "gemma2"}, "model_type: found 'gemma2'"),
    "sliding window": (FINETUNE + "{model}", {"use_sliding_window": True}, "use_sliding_window"),
    "activation": (FINETUNE + "{model}", {"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
    "rope scaling": (
        FINETUNE + "{model}",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn"}},
        "rope_type: found 'yarn'",
    ),
    "negative size": (FINETUNE + "{model}", {"hidden_size": -20}, "hidden_size"),
    "heads": (FINETUNE + "{model}", {"num_key_value_heads": 3}, "num_key_value_heads: found 3"),
    "wrong shape": (FINETUNE + "{model}", {"intermediate_size": 30}, "shape: found [28, 20]"),
    "missing tensor": (FINETUNE + "{model}", {"num_hidden_layers": 3}, "model.layers.2."),
    "extra tensor": (FINETUNE + "{model}", {"num_hidden_layers": 1}, "model.layers.1."),
    "truncated": (FINETUNE + "{model}", truncate, "truncated"),
    "header of 1 TB": (FINETUNE + "{model}", header_of_a_terabyte, "header length: found"),
    "no tokenizer": (
        FINETUNE + "{model}",
        lambda path: (path / "tokenizer.json").unlink(),
        "tokenizer.json: not found",
    ),
    "bad tokenizer": (FINETUNE + "{model}", other_tokenizer, "tokenizer.json: not a tokenizer"),
    "no data file": (DATA + "missing.txt", None, "missing.txt: not found"),
    "data a directory": (DATA + "model", None, "model: not a regular file"),
    "data binary": (DATA + "model/model.safetensors", None, "expected UTF-8 text"),
    "data empty": (DATA + "empty.txt", None, "empty.txt: empty"),
    "data short": (GOOD + "--seq-len 9000", None, "expected at least one sequence of 9000"),
    "bad line": (DATA + "bad.jsonl", None, "bad.jsonl: line 2: not JSON"),
    "bad chat": (DATA + "nobody.jsonl", None, "1 conversations without an answer to learn"),
    "token range": (DATA + "tokens.jsonl", None, "line 1: tokens: found 900, expected 0 to 299"),
    "no template": (
        "finetune --data chats.jsonl --out run --model {model}",
        no_template,
        "chats.jsonl: line 1: messages: the model has no chat template",
    ),
    "template error": (
        "finetune --data chats.jsonl --out run --model {model}",
        bad_template,
        "template error: no such role",
    ),
    "target": (GOOD + "--targets q_proj,mlp", None, "targets: found 'mlp'"),
    "method": (GOOD + "--method adjoint", None, "--method: invalid choice: 'adjoint'"),
    "rank": (GOOD + "--rank 0", None, "rank: found 0"),
    "steps": (GOOD + "--steps 0", None, "steps: found 0"),
    "lr": (GOOD + "--lr nan", None, "lr: found nan"),
    "warm-up": (GOOD + "--warmup 1000", None, "warmup: found 1000 steps"),
    "held out": (GOOD + "--val-fraction 1.5", None, "val-fraction: found 1.5"),
    "out a file": (GOOD.replace("--out run", "--out notes.txt"), None, "found a file"),
    "out not empty": (GOOD.replace("--out run", "--out adapter"), None, "--overwrite"),
    "resume nothing": (
        GOOD.replace("--out run", "--out adapter") + "--resume",
        None,
        "found no run.json",
    ),
    "both": (GOOD + "--resume --overwrite", None, "--overwrite: found beside --resume"),
    "adapter missing": (GOOD + "--adapter nothing", None, "adapter_config.json: not found"),
    "adapter and rank": (GOOD + "--adapter adapter --rank 4", None, "--rank: found beside"),
    "other adapter": (
        "finetune --data notes.txt --out run --adapter adapter --model {model}",
        lambda path: write_model(path, change_config(path), mr.load_tokenizer(path)),
        "adapter belongs to another model",
    ),
    "empty prompt": ("generate --model model --prompt ''", None, "--prompt: found no text"),
    "prompt file": ("generate --model model --prompt-file gone", None, "gone: --prompt-file"),
    "temperature": (SAY + "--temperature -1", None, "temperature: found -1.0"),
    "top-p": (SAY + "--top-p 0", None, "top_p: found 0.0"),
    "seed": (SAY + "--seed -1", None, "--seed: found -1"),
    "system": (SAY + "--system x", None, "--system: found without --chat"),
    "chat": ("generate --model {model} --prompt a --chat", no_template, "found no chat template"),
    "eval rows": ("eval --model model --data notes.txt --rows 0", None, "--rows: found 0"),
    "merge over": ("merge --model model --adapter adapter --out adapter", None, "not empty"),
    "merge other": (
        "merge --model {model} --adapter adapter --out merged",
        lambda path: write_model(path, change_config(path), mr.load_tokenizer(path)),
        "another model",
    ),
    "no weights": (FINETUNE + "{model}", remove("model.safetensors"), "model.safetensors"),
    "no config": (FINETUNE + "{model}", remove("config.json"), "config.json: not found"),
    "config not JSON": (FINETUNE + "{model}", write("config.json", "{"), "config.json: not"),
    "config a list": (FINETUNE + "{model}", write("config.json", "[]"), "config.json"),
    "no such field": (FINETUNE + "{model}", write("config.json", "{}"), "model_type"),
    "size a text": (FINETUNE + "{model}", {"vocab_size": "300"}, "vocab_size: found '300'"),
    "not dividing": (FINETUNE + "{model}", {"num_attention_heads": 5}, "num_attention_heads"),
    "odd head": (FINETUNE + "{model}", {"head_dim": 5}, "head_dim: found 5"),
    "empty weights": (FINETUNE + "{model}", write("model.safetensors", ""), "model.safetensors"),
    "weights a text": (
        FINETUNE + "{model}",
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        "model.safetensors",
    ),
    "leaving index": (FINETUNE + "{model}", index_that_leaves, "../shard.safetensors"),
    "missing shard": (FINETUNE + "{model}", index_without_shard, "00001-of-00001.safetensors"),
    "template syntax": (
        "finetune --data chats.jsonl --out run --model {model}",
        template_that_does_not_compile,
        "line 1: template error",
    ),
    "no such record": (DATA + "fields.jsonl", None, "line 1: found fields 'prompt', 'answer'"),
    "a JSON list": (DATA + "list.jsonl", None, "record 1: found list, expected a JSON object"),
    "text a number": (DATA + "number.jsonl", None, "line 1: text: found int"),
    "tokens floats": (DATA + "floats.jsonl", None, "line 1: tokens: found [1.5"),
    "text as JSONL": (GOOD + "--format jsonl", None, "notes.txt: line 1: not JSON"),
    "blank": (DATA + "blank.txt", None, "blank.txt: empty"),
    "no val data": (GOOD + "--val-data missing.txt", None, "missing.txt: not found"),
    "batch size": (GOOD + "--batch-size 0", None, "--batch-size: found 0"),
    "sequence": (GOOD + "--seq-len 1", None, "--seq-len: found 1"),
    "alpha": (GOOD + "--alpha nan", None, "alpha: found nan"),
    "no target": (GOOD + "--targets ,", None, "targets"),
    "momentum": (GOOD + "--momentum 0.9", None, "momentum: found 0.9 with adamw"),
    "clip": (GOOD + "--clip -1", None, "clip: found -1.0"),
    "save every": (GOOD + "--save-every 0", None, "--save-every: found 0"),
    "finetune seed": (GOOD + "--seed -1", None, "seed: found -1"),
    "nobody's adapter": (GOOD + "--adapter model", None, "adapter_config.json: not found"),
    "abbreviated": (GOOD + "--step 3", None, "unrecognized arguments: --step 3"),
    "out below a file": (GOOD.replace("--out run", "--out notes.txt/run"), None, "notes.txt"),
    "new tokens": (SAY + "--max-new-tokens 0", None, "--max-new-tokens: found 0"),
    "top-k": (SAY + "--top-k 0", None, "--top-k: found 0"),
    "no prompt": ("generate --model model", None, "--prompt --prompt-file is required"),
    "eval sequence": ("eval --model model --data notes.txt --seq-len 1", None, "--seq-len: found"),
    "merge nothing": ("merge --model model --out merged", None, "required: --adapter"),
    "merge 8 bits": (
        "merge --model model --adapter adapter --out merged --dtype int8",
        None,
        "--dtype: invalid choice: 'int8'",
    ),
    "figure there": (COMPARE + "--out notes.txt", None, "notes.txt: --out: exists"),
    "figure nowhere": (COMPARE + "--out no/where.png", None, "its directory does not exist"),
    "figure a folder": (COMPARE + "--out model", None, "model: --out: found a directory"),
    "compare steps": (COMPARE + "--steps 0", None, "steps: found 0"),
    "compare rank": (COMPARE + "--rank 0", None, "rank: found 0"),
    "compare mezo": (COMPARE + "--mezo-lr -1", None, "lr: found -1.0"),
    "gradcheck rank": (CHECK + "--adapter adapter --rank 4", None, "--rank: found beside"),
    "gradcheck rows": (CHECK + "--batch-size 0", None, "--batch-size: found 0"),
    "gradcheck method": (CHECK + "--method autograd", None, "invalid choice: 'autograd'"),
    "gradcheck nothing": (CHECK + "--directions 0 --tensors 0", None, "--directions: found 0"),
    "info": ("info notes.txt", None, "notes.txt"),
    "info rank": ("info model --rank 0", None, "--rank: found 0"),
}


def change_config(path):
    """The model's configuration with another hidden size."""
    values = json.loads((path / "config.json").read_text())
    return config_of(values | {"hidden_size": 24})


@pytest.mark.parametrize(("line", "change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(here, capsys, line, change, message):
    Path("empty.txt").touch()
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    Path("nobody.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("fields.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    Path("list.jsonl").write_text('[["a"]]\n')
    Path("number.jsonl").write_text('{"text": 1}\n')
    Path("floats.jsonl").write_text('{"tokens": [1.5, 2]}\n')
    Path("blank.txt").write_text(" \n\t\n")
    Path("tokens.jsonl").write_text('{"tokens": [1, 2, 900]}\n')
    if change is not None:
        shutil.copytree("model", "changed")
        if isinstance(change, dict):
            edit_config(Path("changed"), **change)
        else:
            change(Path("changed"))
    before = tree(here)
    assert main(shlex.split(line.replace("{model}", "changed"))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mesp-ref: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert tree(here) == before


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"model": "other"}, "--resume: model: found another file or content"),
        ({"data": "other.txt"}, "--resume: data: found another file or content"),
        (("--seed", "5"), "--resume: seed: found 5, expected 0"),
        (("--method", "mezo"), "--resume: method: found 'mezo', expected 'mesp'"),
        (("--method", "mezo", "--perturbations", "3"), "--resume: method: found 'mezo'"),
        (("--rank", "4"), "--resume: rank: found 4, expected 8"),
    ],
)
def test_resume_of_another_run_is_one_line_and_changes_nothing(here, finetune, capsys, more, found):
    assert finetune() == 0
    write_model(Path("other"), mr.load_model("model").config, mr.load_tokenizer("model"), seed=8)
    Path("other.txt").write_text(words(900, seed=9), encoding="utf-8")
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    capsys.readouterr()
    options, names = ((), more) if isinstance(more, dict) else (more, {})
    assert finetune("--resume", *options, **names) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert f"mesp-ref: error: run: {found}" in shown.err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_without_arguments_it_shows_its_help(capsys):
    assert main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_the_module_is_the_command(here):
    """In a process of its own: exit codes, one line, no traceback, a reader that goes away."""
    base = [sys.executable, "-m", "mesp_ref"]
    good = subprocess.run([*base, "info", "model", "--json"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    json.loads(good.stdout)
    bad = subprocess.run([*base, "info", "nowhere"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert re.fullmatch(r"mesp-ref: error: nowhere: not found.*\n", bad.stderr)
    shell = f"{shlex.join(base)} info model | true"
    piped = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert (piped.returncode, piped.stderr) == (0, "")
