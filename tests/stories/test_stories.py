"""The story grammar: seeded, unambiguous, its probabilities exact; questions that stories answer."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from mesp_ref.stories import TALES, Grammar, ask, lesson_or_request, questions, request, story
from mesp_ref.stories.chats import _ALWAYS, _PLOTS
from mesp_ref.stories.corpus import write_questions
from mesp_ref.train.data import open_data

GLUE = {"it", "was", "they", "ran", "to", "in", "a"}

# Three alternatives, a value told twice, an attribute, two values of one rule.
SMALL = Grammar(
    {
        "story": (
            "{name} met {name2}. <end>",
            "{name} saw a {thing}; {name.he} took the {thing}.",
            "Nothing.",
        ),
        "end": ("They ate {food}.", "{name2.He} left."),
        "name": ("Ann", "Bob", "Cy"),
        "thing": ("cup", "key"),
        "food": ("soup", "rice", "eggs", "figs"),
    },
    {"he": {"Ann": "she", "Bob": "he", "Cy": "they"}},
)


def test_every_text_of_a_small_grammar_is_counted_by_hand():
    stories = list(SMALL.all())
    # 3·2 pairs with 4 dishes or a leave-taking, 3 names with 2 things, nothing
    assert len(stories) == 6 * (4 + 1) + 3 * 2 + 1
    assert len({s.text for s in stories}) == len(stories), "two derivations give one text"
    p = np.array([math.exp(-s.nats) for s in stories])
    assert p.sum() == pytest.approx(1, abs=1e-12)
    by_text = {s.text: q for s, q in zip(stories, p, strict=True)}
    assert by_text["Nothing."] == pytest.approx(1 / 3)
    assert by_text["Bob saw a key; he took the key."] == pytest.approx(1 / 3 / 3 / 2)
    assert by_text["Ann met Cy. They ate figs."] == pytest.approx(1 / 3 / 3 / 2 / 2 / 4)
    assert by_text["Cy met Ann. She left."] == pytest.approx(1 / 3 / 3 / 2 / 2)
    assert -(p * np.log(p)).sum() == pytest.approx(SMALL.entropy(), abs=1e-12)


def test_drawn_stories_have_the_stated_frequencies():
    rng = np.random.default_rng(0)
    counts = Counter(SMALL.write(rng).text for _ in range(6000))
    for expected in SMALL.all():
        p = math.exp(-expected.nats)
        assert abs(counts[expected.text] - 6000 * p) < 5 * math.sqrt(6000 * p), expected.text


def test_reading_gives_back_what_was_written():
    for i in range(100):
        told = story(i)
        assert TALES.read(told.text) == told  # one derivation, the same draws; two would raise


def test_reading_refuses_what_the_grammar_cannot_write():
    told = next(s for s in map(story, range(50)) if "thing" in s.facts)
    facts = told.facts
    other = next(k for k in TALES.rules["kind"] if k not in facts.values())
    assert TALES.read(told.text + " ") is None
    assert TALES.read(told.text[:-1]) is None
    assert TALES.read("") is None
    assert (
        TALES.read(told.text.replace(facts["kind"], other, 1)) is None
        or told.text.count(facts["kind"]) == 1
    )
    swapped = {"he": "she", "she": "he", "his": "her", "her": "his", "him": "her"}
    words = told.text.split(" ")
    for i, word in enumerate(words):
        if word in swapped:
            wrong = " ".join([*words[:i], swapped[word], *words[i + 1 :]])
            assert TALES.read(wrong) is None, wrong


def test_an_ambiguous_grammar_is_found_out():
    grammar = Grammar({"story": ("{a}{b}",), "a": ("x", "xy"), "b": ("yz", "z")}, {})
    with pytest.raises(ValueError, match="2 derivations of: xyz"):
        grammar.read("xyz")


def test_no_word_begins_another_of_its_rule():
    """With this no draw can be taken for another, up to the text that follows it."""
    for rule, options in TALES.rules.items():
        assert len(set(options)) == len(options), rule
        for a in options:
            for b in options:
                assert a is b or not b.startswith(a), f"{rule}: {a!r} begins {b!r}"


def test_entropy_is_the_mean_surprisal():
    assert TALES.entropy() == pytest.approx(41.843648, abs=1e-6)
    nats = np.array([story(i).nats for i in range(4000)])
    assert abs(nats.mean() - TALES.entropy()) < 4 * nats.std() / math.sqrt(len(nats))


def test_stories_are_a_function_of_seed_part_and_number():
    assert story(0).text == (
        "Far away, in a snug cabin, there lived a quiet hedgehog by the name of Theo. One "
        "morning, Theo packed a marble and set out for the barn, where Mila the fox lived. "
        "The marble was blue, and it was for Mila. On the way, thick fog came over the land, "
        "and Theo hid in a hollow log. Inside sat Poppy, a small rabbit, who was cold and "
        'hungry. "I can give you a plate of pancakes," said Theo, and Poppy ate it all. When '
        'the sky was clear again, Poppy showed him the way. "Where have you been?" asked '
        'Mila. "I met Poppy in a hollow log," said Theo. The marble was just what Mila had '
        "always wanted. And whenever Theo came past the barn, he had to smile."
    )
    texts = {
        story(i, part, seed).text
        for part in ("train", "heldout")
        for seed in (0, 1)
        for i in range(200)
    }
    assert len(texts) == 800


def test_stories_are_plain_and_finished():
    for i in range(300):
        text = story(i).text
        assert text.isascii()
        assert "  " not in text
        assert not set("{}<>") & set(text)
        assert text[0].isupper()
        assert text[-1] in '."'
        assert 80 < len(text.split()) < 160


def test_every_question_has_its_answer_in_the_story():
    """The words of an answer all stand in the story, apart from those that only make a sentence."""
    asked = Counter()
    for i in range(400):
        told = story(i)
        known = set(re.findall(r"[\w']+", told.text.lower())) | GLUE
        for question, answer in questions(told):
            asked[question.split(" ")[0]] += 1
            assert question.endswith("?")
            assert answer.endswith(".")
            assert set(re.findall(r"[\w']+", answer.lower())) <= known, (
                question,
                answer,
                told.text,
            )
    assert min(asked[word] for word in ("Who", "What", "Where")) > 100


def test_every_question_is_asked():
    templates = {q for q, _ in _ALWAYS} | {q for plot in _PLOTS.values() for q, _ in plot}
    found = set()
    for i in range(200):
        told = story(i)
        asked = {q for q, _ in questions(told)}
        for template in templates:
            try:
                found |= {template} if TALES.fill(template, told.facts) in asked else set()
            except KeyError:
                continue  # the story lacks one of its words
    assert found == templates


def test_conversations_alternate_and_begin_with_the_story():
    told, rng = story(3), np.random.default_rng(0)
    messages = ask(told, rng, count=2)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"].startswith(told.text + "\n")
    assert len({m["content"] for m in messages}) == 4
    wish = request(told, rng)["messages"]
    assert wish[1] == {"role": "assistant", "content": told.text}


def test_the_default_fine_tuning_set_is_valid_chat_jsonl(tmp_path):
    path = tmp_path / "questions.jsonl"
    write_questions(path, count=20)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [lesson_or_request(i) for i in range(20)]
    assert open_data(path).kinds == ("messages",)
    again = tmp_path / "again.jsonl"
    write_questions(again, count=20)
    assert again.read_bytes() == path.read_bytes()
