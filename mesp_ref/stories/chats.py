"""Conversations about the stories: a request for a story, and questions that only one can answer."""

import re
from typing import Any

import numpy as np

from mesp_ref.stories.grammar import Story
from mesp_ref.stories.tales import TALES

Conversation = dict[str, list[dict[str, str]]]

_REQUESTS = (
    "Tell me a story about a {trait} {kind}.",
    "Tell me a story about {name}.",
    "Who lived in a {home}?",
)

# Questions and answers that hold in every story that has their words, then those of one plot, by a
# word that only this plot has.
_ALWAYS = (
    ("Where did {name} live?", "In a {home}."),
    ("What animal was {name}?", "A {kind}."),
    ("What animal was {name2}?", "A {kind2}."),
    ("What animal was {name3}?", "A {kind3}."),
    ("Who was the {kind2}?", "It was {name2}."),
    ("What colour was the {thing}?", "It was {colour}."),
)
_PLOTS = {
    "find": (
        ("Where was the {thing} in the end?", "It was {place2.at}."),
        ("What did they find {place.at}?", "It was {find}."),
        ("What did {name} give {name2}?", "It was {food}."),
    ),
    "trouble": (
        ("Where was {name2} stuck?", "{name2} was stuck {trouble}."),
        ("What did {name3} give {name}?", "It was {trouble.tool}."),
    ),
    "dish": (
        ("Who had a birthday?", "It was {name2}."),
        ("What did {name} make?", "A {dish}."),
        ("Who had the {dish.needs}?", "It was {name3}."),
        ("What did {name} do for the {dish.needs}?", "{name} {deed.did}."),
    ),
    "shelter": (
        ("Where did {name} hide?", "In {shelter}."),
        ("Who was cold and hungry?", "It was {name3}."),
        ("Who lived near the {place}?", "It was {name2}."),
    ),
    "doing": (
        ("Who was {doing}?", "It was {name2}."),
        ("What was {name2} doing?", "{name2} was {doing}."),
        ("What did {name} take?", "It was {light}."),
    ),
    "mishap": (
        ("Who won {food}?", "It was {name2}."),
        ("Who had {mishap}?", "It was {name3}."),
        ("Where did they run?", "They ran to the {place}."),
    ),
}
_VARIABLE = re.compile(r"\{(\w+)")


def questions(story: Story) -> list[tuple[str, str]]:
    """Every question that the story answers, with its answer."""
    pairs = list(_ALWAYS)
    for word, found in _PLOTS.items():
        pairs += found if word in story.facts else ()
    return [
        (TALES.fill(question, story.facts), TALES.fill(answer, story.facts))
        for question, answer in pairs
        if story.facts.keys() >= set(_VARIABLE.findall(question + answer))
    ]


def ask(story: Story, rng: np.random.Generator, count: int = 3) -> Conversation:
    """A conversation of `count` different questions; the first one follows the story itself."""
    pairs = questions(story)
    messages: list[dict[str, str]] = []
    for i in rng.permutation(len(pairs))[:count]:
        question, answer = pairs[i]
        content = question if messages else f"{story.text}\n{question}"
        messages += [_turn("user", content), _turn("assistant", answer)]
    return {"messages": messages}


def request(story: Story, rng: np.random.Generator) -> Conversation:
    """A conversation in which the story is what was asked for."""
    wish = TALES.fill(_REQUESTS[rng.integers(len(_REQUESTS))], story.facts)
    return {"messages": [_turn("user", wish), _turn("assistant", story.text)]}


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
