"""Numbered stories and conversations: number i of a part is a function of (seed, part, i) alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mesp_ref.files.output import write_aside
from mesp_ref.stories.chats import Conversation, ask, request
from mesp_ref.stories.grammar import Story
from mesp_ref.stories.scenes import Question, lesson, question
from mesp_ref.stories.tales import TALES

# Parts of the corpus. Their random streams differ, so no part repeats another's stories.
PARTS = ("train", "heldout", "tokenizer", "questions", "quiz")
# Of the fine-tuning set are stories that were asked for, which are not to be forgotten.
_REQUESTED = 0.1


def generator(part: str, number: int, seed: int = 0) -> np.random.Generator:
    """The random numbers of one document."""
    return np.random.default_rng([seed, PARTS.index(part), number])


def story(number: int, part: str = "heldout", seed: int = 0) -> Story:
    """Story `number` of a part."""
    return TALES.write(generator(part, number, seed))


def conversation(number: int, part: str = "questions", seed: int = 0) -> Conversation:
    """A whole story with three questions and their answers, by number."""
    rng = generator(part, number, seed)
    return ask(TALES.write(rng), rng)


def lesson_or_request(number: int, seed: int = 0) -> Conversation:
    """Record `number` of the fine-tuning set: questions about a scene, now and then a story."""
    rng = generator("questions", number, seed)
    if rng.random() < _REQUESTED:
        return request(TALES.write(rng), rng)
    return lesson(rng)


def quiz(count: int, seed: int = 0) -> list[Question]:
    """Questions about scenes that no fine-tuning set has, the same each time."""
    return [question(generator("quiz", number, seed)) for number in range(count)]


def question_lines(count: int, seed: int = 0) -> Iterator[str]:
    """The default fine-tuning set: `count` lines of JSON with `messages`."""
    for number in range(count):
        yield json.dumps(lesson_or_request(number, seed)) + "\n"


def write_questions(path: str | Path, count: int = 2000, seed: int = 0) -> None:
    """Write the default fine-tuning set as chat JSONL, whole or not at all."""
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(question_lines(count, seed))
