"""mesp-ref pretrain, small: it learns, repeats itself bit for bit, and writes a whole checkpoint."""

import json

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.job.pretrain import PretrainOptions, pretrain
from mesp_ref.job.storyteller import StoryRows, heldout_loss, openings, tell
from mesp_ref.stories import TALES, story
from mesp_ref.stories.tokenizer import CHAT_TEMPLATE, END, train_tokenizer
from mesp_ref.train.chat import ChatTemplate, load_chat_template

SMALL = {
    "steps": 40, "batch_size": 4, "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48,
    "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "heldout": 8, "samples": 2, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _few_documents():
    """Merges counted on few documents: the tokenizer is trained in a fraction of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mesp_ref.stories.tokenizer._DOCUMENTS", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run: its directory, its facts and its events."""
    out, events = tmp_path_factory.mktemp("pretrain") / "model", []
    facts = pretrain(PretrainOptions(out=str(out), **SMALL), events.append)
    return out, facts, events


def test_a_short_run_learns(run):
    _, facts, events = run
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 41))
    assert steps[0]["loss"] == pytest.approx(np.log(600), abs=0.7)  # it starts knowing nothing
    assert facts["loss"] < steps[0]["loss"] - 2
    assert facts["loss"] > facts["bound"] > 0
    assert events[0]["parameters"] == facts["parameters"]


def test_the_directory_is_a_checkpoint(run):
    out, facts, _ = run
    model, tokenizer = mr.load_model(out), mr.load_tokenizer(out)
    assert sum(model.weights[name][...].size for name in model.weights) == facts["parameters"]
    assert heldout_loss(model, tokenizer, 8).loss == pytest.approx(facts["loss"], abs=1e-6)
    template = load_chat_template(out)
    assert template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|endoftext|><|im_start|>assistant\n"
    )
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{facts['loss']:.4f} nats per token" in card
    assert f"{facts['bound']:.4f} nats per token" in card
    assert sorted(file.name for file in out.iterdir()) == [
        ".mesp-ref.json",
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_bits(tmp_path):
    files = []
    for name, method in (("a", "store_all"), ("b", "mesp")):
        options = SMALL | {"steps": 3, "samples": 1, "method": method}
        pretrain(PretrainOptions(out=str(tmp_path / name), **options))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_the_command_line(tmp_path, capsys):
    numbers = SMALL | {"steps": 2, "samples": 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    out = str(tmp_path / "model")
    assert main(["pretrain", "--out", out, "--json", "--quiet", *flags]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == out
    assert facts["entropy"] == pytest.approx(TALES.entropy())
    assert main(["pretrain", "--out", out, *flags]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(tmp_path / "other"), "--hidden-size", "0"]) == 2
    assert main(["pretrain", "--out", str(tmp_path / "other"), "--heldout", "0"]) == 2
    assert not (tmp_path / "other").exists()


def test_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(600)
    texts = [story(i).text for i in range(20)]
    for text in [*texts, "naïve 東京 🦔\n\ttabs", " x  y ", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    end = tokenizer.token_to_id(END)
    assert tokenizer.encode("fox").ids[0] == end
    assert tokenizer.encode("fox" + END, add_special_tokens=False).ids[-1] == end
    assert train_tokenizer(600).to_str() == tokenizer.to_str()


def test_a_row_is_a_story_or_a_wish_for_one():
    tokenizer = train_tokenizer(600)
    rows = StoryRows(tokenizer, 300).take(40)
    chats = 0
    for row in rows:
        text = tokenizer.decode(row.ids, skip_special_tokens=False)
        assert text.endswith(END)
        if text.startswith(END):
            assert TALES.read(text.removeprefix(END).removesuffix(END)) is not None
            continue
        chats += 1
        wish, told, _ = text.split(END)
        assert wish.startswith("<|im_start|>user\n")
        assert wish[-1] in ".?"
        assert TALES.read(told.removeprefix("<|im_start|>assistant\n")) is not None
    assert 0 < chats < 20
    again = StoryRows(tokenizer, 300)
    again.take(7)
    assert np.array_equal(again.take(1)[0].ids, rows[7].ids)
    assert len(StoryRows(tokenizer, 20).take(1)[0].ids) == 20


def test_heldout_bound_is_that_of_the_stories(run):
    out, _, _ = run
    model, tokenizer = mr.load_model(out), mr.load_tokenizer(out)
    held = heldout_loss(model, tokenizer, 5)
    stories = [story(i) for i in range(5)]
    tokens = [tokenizer.encode(told.text + END).ids for told in stories]
    assert held.heldout_tokens == sum(len(ids) - 1 for ids in tokens)
    assert held.bound * held.heldout_tokens == pytest.approx(sum(told.nats for told in stories))
    alone = [mr.loss(model, None, [ids], [ids]) * (len(ids) - 1) for ids in tokens]
    assert held.loss * held.heldout_tokens == pytest.approx(sum(alone), rel=1e-5)


def test_tell_continues_its_prompts(run):
    out, _, _ = run
    model, tokenizer = mr.load_model(out), mr.load_tokenizer(out)
    prompts = openings(tokenizer, 3)
    texts, share = tell(model, tokenizer, prompts, 0.0)
    assert share == 0  # forty steps teach no grammar
    for number, text in enumerate(texts):
        first = story(number).text.split(".")[0] + "."
        assert text.startswith(first)


def test_chat_template_is_a_chat_template():
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    segments = ChatTemplate(CHAT_TEMPLATE).segments(turns * 2)
    assert [text for text, said in segments if said] == ["B" + END] * 2
