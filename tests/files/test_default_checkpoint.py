"""The checkpoint that comes with the package: present, small, as good as stated, in the wheel."""

import re
from pathlib import Path

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.files.default import default_checkpoint
from mesp_ref.job.storyteller import heldout_loss, openings, tell
from mesp_ref.stories import TALES
from mesp_ref.train.chat import load_chat_template

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return mr.load_model()


@pytest.fixture(scope="module")
def tokenizer(model):
    return mr.load_tokenizer(model.path)


def test_no_path_means_the_default_checkpoint(model):
    assert model.path == default_checkpoint() == ROOT / "weights"
    assert mr.load_model(None).config == model.config
    assert mr.load_model(dtype="float64").dtype == np.float64


def test_it_is_small_and_complete():
    sizes = {file.name: file.stat().st_size for file in (ROOT / "weights").iterdir()}
    assert set(sizes) == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(sizes.values()) <= 8_000_000


def test_its_heldout_loss_is_as_stated(model, tokenizer):
    held = heldout_loss(model, tokenizer, 100)
    assert held.bound == pytest.approx(0.276259018, abs=1e-9)
    assert held.loss == pytest.approx(0.2891, abs=1e-3)
    card = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    assert "| loss on 500 held-out stories | 0.2919 nats per token |" in card
    assert f"{TALES.entropy():.3f} nats per story" in card


def test_it_writes_stories_that_the_grammar_accepts(model, tokenizer):
    nothing = tokenizer.encode("").ids
    texts, share = tell(model, tokenizer, [nothing] * 40, 0.8)
    assert share >= 5 / 40, texts  # 10 of these 40 when it was trained
    words = " ".join(" ".join(rule) for rule in TALES.rules.values())
    finished = [text for text in texts if text[-1] in '."']
    assert len(finished) >= 36
    known = set(re.findall(r"[A-Za-z]+", words + " ".join(map(str, TALES.attributes.values()))))
    known |= {word.capitalize() for word in known}
    for text in texts:
        assert set(re.findall(r"[A-Za-z]+", text)) <= known, text  # no word is made up


def test_it_goes_on_from_a_first_sentence(model, tokenizer):
    texts, _ = tell(model, tokenizer, openings(tokenizer, 4), 0.0)
    for text in texts:
        assert 80 < len(text.split()) < 170
        assert text[-1] in '."'


@pytest.mark.parametrize(
    ("wish", "word"),
    [("Tell me a story about Ruby.", "Ruby"), ("Who lived in a stone tower?", "stone tower")],
)
def test_it_answers_a_request(model, tokenizer, wish, word):
    template = load_chat_template(model.path)
    prompt = template.render([{"role": "user", "content": wish}], add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    [new] = mr.generate(model, [ids], max_new_tokens=200)
    assert new[-1] == model.config.eos_token_id
    told = tokenizer.decode(new)
    assert re.match("(Once|There|In a|Far away)", told)
    assert word in told


def test_an_installed_package_finds_its_own(tmp_path, monkeypatch):
    place = tmp_path / "default_checkpoint"
    place.mkdir()
    (place / "model.safetensors").touch()
    monkeypatch.setattr("mesp_ref.files.default._PLACES", (place, ROOT / "weights"))
    assert default_checkpoint() == place
    monkeypatch.setattr("mesp_ref.files.default._PLACES", (tmp_path,))
    with pytest.raises(mr.MespRefError, match="expected the default checkpoint"):
        default_checkpoint()
