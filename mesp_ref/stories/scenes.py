"""Scenes: a sentence or three as stories have them, and questions whose answers are known.

The default fine-tuning set, and the quiz that shows what it teaches. Most of what is asked stands in
the scene. The rest the model must have learned from whole stories: which tool helps whom, and what a
cake is made of.
"""

from typing import NamedTuple

import numpy as np

from mesp_ref.stories.chats import Conversation
from mesp_ref.stories.grammar import Grammar, Story
from mesp_ref.stories.tales import TALES


class Question(NamedTuple):
    """A question about a scene, and the answer that is right."""

    scene: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question as a user asks it."""
        return f"{self.scene} {self.question}"


_OPENING = (
    ("Where did {name} live?", "In a {home}."),
    ("Who lived in the {home}?", "It was {name}."),
)
# A word that only this scene has: its sentence, its own question and the answer.
_SCENES = {
    "trouble": (
        'One {weather} {time}, {name} was walking {place.at} when {name.he} heard a cry. "Help! Help!" '
        "It was {name2} the {kind2}, who was stuck {trouble}.",
        "What did {name2} need?",
        "It was {trouble.tool}.",
    ),
    "dish": (
        "It was the birthday of {name2} the {kind2}, and {name} wanted to make a {dish}.",
        "What was missing?",
        "There were no {dish.needs}.",
    ),
    "shelter": (
        "On the way to the {place}, {storm} came over the land, and {name} hid in {shelter}.",
        "Where did {name} hide?",
        "In {shelter}.",
    ),
}
_TEXTS = (
    "<opening>",
    *(f"{begin}{own[0]}" for own in _SCENES.values() for begin in ("<opening> ", "")),
)
SCENES = Grammar({**TALES.rules, "scene": _TEXTS}, TALES.attributes, "<scene>")


def scene_questions(scene: Story) -> list[tuple[str, str]]:
    """Every question about a scene, with its answer."""
    pairs = list(_OPENING) if "home" in scene.facts else []
    pairs += [
        (question, answer) for word, (_, question, answer) in _SCENES.items() if word in scene.facts
    ]
    return [
        (SCENES.fill(question, scene.facts), SCENES.fill(answer, scene.facts))
        for question, answer in pairs
    ]


def lesson(rng: np.random.Generator) -> Conversation:
    """A conversation of all questions about a scene; the first one follows the scene itself."""
    scene = SCENES.write(rng)
    pairs = scene_questions(scene)
    messages: list[dict[str, str]] = []
    for i in rng.permutation(len(pairs)):
        question, answer = pairs[i]
        asked = question if messages else Question(scene.text, question, answer).prompt
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def question(rng: np.random.Generator) -> Question:
    """One question about a scene."""
    scene = SCENES.write(rng)
    pairs = scene_questions(scene)
    asked, answer = pairs[rng.integers(len(pairs))]
    return Question(scene.text, asked, answer)
