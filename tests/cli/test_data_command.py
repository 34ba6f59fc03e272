"""mesp-ref data, and the table that finetune and eval begin with."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import mesp_ref as mr
from mesp_ref.cli import main

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
LONG = [TURNS[0], {"role": "assistant", "content": "and on " * 60}]
CHATS = [TURNS] * 12 + [LONG] * 5 + [[TURNS[0], TURNS[1] | {"weight": 0}]] * 3
QUICK = ["--steps", "1", "--sample-tokens", "0"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model_dir, target_is_directory=True)
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS))


def run(*argv: str, capsys: Any, code: int = 0) -> Any:
    assert main(list(argv)) == code
    return capsys.readouterr()


def learned() -> int:
    """Tokens of twelve answers, and an end for each, by the tokenizer itself."""
    ids = mr.load_tokenizer("model").encode("Nobody.", add_special_tokens=False).ids
    return 12 * (len(ids) + 1)


def number(lines: str, beginning: str) -> list[str]:
    """The last words of the line that begins so."""
    [line] = [line for line in lines.splitlines() if line.strip().startswith(beginning)]
    return line.strip()[len(beginning) :].split()


def test_it_tells_what_finetune_would_train_on(capsys: Any) -> None:
    out = run("data", "chats.jsonl", "--model", "model", "--seq-len", "200", capsys=capsys).out
    assert number(out, "documents") == ["20"]
    assert number(out, "rows of at most 200 tokens") == ["12"]
    assert number(out, "learned tokens") == [str(learned())]
    assert number(out, "left out: no answer ends within 200 tokens") == ["5"]
    assert number(out, "left out: nothing in them to learn") == ["3"]
    assert number(out, "answers not learned: excluded by weight or train") == ["3"]
    assert out.count("[[Nobody.<|im_end|>]]") == 3
    assert "\x1b" not in out


def test_json_has_the_same_numbers_and_pieces(capsys: Any) -> None:
    argv = ["data", "chats.jsonl", "--model", "model", "--seq-len", "200", "--rows", "1", "--json"]
    told = json.loads(run(*argv, capsys=capsys).out)
    assert told["contents"]["too_long"] == 5
    assert told["contents"]["kinds"] == ["messages"]
    [row] = told["rows"]
    assert [p["text"] for p in row if p["learned"]] == ["Nobody.<|im_end|>"]


def test_a_terminal_gets_colours_and_obeys_no_data(capsys: Any, monkeypatch: Any) -> None:
    record = {"prompt": "a \x1b[2J", "completion": "b\x1b]0;x\x07"}
    Path("p.jsonl").write_text(json.dumps(record))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = run("data", "p.jsonl", "--model", "model", capsys=capsys).out
    assert out.count("\x1b") == 2
    assert "\x1b[32mb\\x1b]0;x\\x07" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("data", "p.jsonl", "--model", "model", capsys=capsys).out


def test_packed_documents_are_shown_apart(capsys: Any) -> None:
    Path("t.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    out = run("data", "t.jsonl", "--model", "model", "--seq-len", "64", capsys=capsys).out
    assert out.count("--- another document ---") == 1
    # The first letter of each is in sight, and nobody's to foresee.
    assert re.search(r"^o\[\[ne.*\]\]$", out, re.MULTILINE)
    assert re.search(r"^t\[\[wo.*\]\]$", out, re.MULTILINE)


def test_the_page_marks_what_is_learned_and_escapes_it(capsys: Any) -> None:
    text = "<script>alert(1)</script> & \u202e so"
    turns = [TURNS[0] | {"content": text}, TURNS[1] | {"content": text}]
    Path("x.jsonl").write_text(json.dumps({"messages": turns}))
    argv = ["data", "x.jsonl", "--model", "model", "--seq-len", "400", "--html", "x.html"]
    assert "wrote x.html" in run(*argv, capsys=capsys).out
    page = Path("x.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "\u202e" not in page
    [marked] = re.findall(r"<mark>(.*?)</mark>", page.partition("<h2>")[2], re.DOTALL)
    assert html.unescape(marked) == text.replace("\u202e", "\\u202e") + "<|im_end|>"
    assert "x.html" in run(*argv, capsys=capsys, code=2).err
    assert main([*argv, "--overwrite"]) == 0


def test_finetune_tells_before_the_first_step(capsys: Any) -> None:
    argv = ["finetune", "--model", "model", "--data", "chats.jsonl", "--seq-len", "200", "--out",
            "run", "--val-data", "chats.jsonl", *QUICK]  # fmt: skip
    err = run(*argv, capsys=capsys).err
    assert err.index("left out") < err.index("step 1/1")
    assert number(err, "left out: no answer ends within 200 tokens") == ["5", "5"]
    summary = json.loads(Path("run/summary.json").read_text())
    assert set(summary["contents"]) == {"train", "held out"}
    assert summary["contents"]["train"]["too_long"] == 5
    assert summary["contents"]["held out"]["learned"] == learned()


def test_nothing_that_fits_is_told_before_training(capsys: Any) -> None:
    Path("long.jsonl").write_text((json.dumps({"messages": LONG}) + "\n") * 100)
    argv = ["finetune", "--model", "model", "--data", "long.jsonl", "--seq-len", "64", "--out", "run",
            "--val-fraction", "0", *QUICK]  # fmt: skip
    err = run(*argv, capsys=capsys, code=2).err
    assert "100 of 100 have no answer that ends there, the longest has" in err
    assert not Path("run").exists()


def test_held_out_rows_that_are_all_too_long_are_warned_of(capsys: Any) -> None:
    Path("long.jsonl").write_text(json.dumps({"messages": LONG}))
    argv = ["finetune", "--model", "model", "--data", "chats.jsonl", "--val-data", "long.jsonl",
            "--seq-len", "200", "--out", "run", *QUICK]  # fmt: skip
    assert (
        "no held-out row has a token to learn: nothing is evaluated"
        in run(*argv, capsys=capsys).err
    )
    more = ["--patience", "1", "--eval-every", "1", "--overwrite"]
    assert "patience: found 1 without held-out data" in run(*argv, *more, capsys=capsys, code=2).err


def test_eval_tells_alike(capsys: Any) -> None:
    argv = ["eval", "--model", "model", "--data", "chats.jsonl", "--seq-len", "200"]
    told = run(*argv, "--json", capsys=capsys)
    assert number(told.err, "left out: no answer ends within 200 tokens") == ["5"]
    found = json.loads(told.out)
    assert found["contents"]["learned"] == found["tokens"] == learned()
