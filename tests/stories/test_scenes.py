"""Scenes and their questions: the right answer, found again in the text by other means."""

import re

import pytest

from mesp_ref.stories import SCENES, lesson_or_request, quiz
from mesp_ref.stories.corpus import generator
from mesp_ref.stories.scenes import lesson, scene_questions

# What a reader of whole stories knows; written down once more.
TOOLS = {
    "in a deep well": "a long rope",
    "on a high branch": "a tall ladder",
    "in the thick mud": "a wide plank",
    "under a fallen log": "a strong pole",
    "behind a locked gate": "an iron key",
    "in a dark cave": "a bright lamp",
    "on a rock in the stream": "a small boat",
    "in a thorny bush": "a pair of shears",
}
NEEDS = {
    "plum cake": "plums", "cherry pie": "cherries", "lemon cake": "lemons", "nut cake": "nuts",
    "pumpkin pie": "pumpkins", "carrot cake": "carrots", "berry tart": "berries",
    "pear tart": "pears",
}  # fmt: skip
HOMES = "hollow tree|little cottage|cosy burrow|stone tower|wooden hut|blue houseboat|crooked house"


def answer(scene: str, question: str) -> str:
    """The answer by patterns of the text alone; no word of the grammar."""
    opening, _, rest = scene.partition(". ")
    home = re.search(rf"in an? ({HOMES}|snug cabin)", scene, re.IGNORECASE)
    hero = re.search(r"(?:named|called|name of) (\w+)", opening) or re.search(r"(\w+) was h", rest)
    if question.endswith(" live?"):
        assert hero
        assert home
        assert question == f"Where did {hero[1]} live?"
        return f"In a {home[1]}."
    if question.startswith("Who lived"):
        assert hero
        assert home
        assert question == f"Who lived in the {home[1]}?"
        return f"It was {hero[1]}."
    if question.endswith(" hide?"):
        who, _, where = scene.partition(" hid in ")
        assert question == f"Where did {who.split()[-1]} hide?"
        return f"In {where}"
    if question == "What was missing?":
        return f"There were no {NEEDS[scene.split('make a ')[1].rstrip('.')]}."
    stuck = re.search(r"It was (\w+) the \w+, who was stuck (.*)\.", scene)
    assert stuck
    assert question == f"What did {stuck[1]} need?"
    return f"It was {TOOLS[stuck[2]]}."


def test_every_question_has_the_answer_that_a_reader_finds() -> None:
    for each in quiz(400):
        assert each.answer == answer(each.scene, each.question), each


def test_every_kind_of_question_is_asked() -> None:
    asked = " ".join(each.question for each in quiz(100))
    for kind in ("live?", "Who lived in the", "hide?", "need?", "What was missing?"):
        assert asked.count(kind) >= 5


def test_scenes_are_read_as_they_were_written() -> None:
    for number in range(40):
        scene = SCENES.write(generator("quiz", number))
        assert SCENES.read(scene.text) == scene  # one derivation; two would raise


def test_no_question_of_the_quiz_is_trained_on() -> None:
    lessons = [lesson_or_request(number)["messages"] for number in range(2000)]
    scenes = {turns[0]["content"].rpartition(". ")[0] for turns in lessons}
    assert not scenes & {each.prompt.rpartition(". ")[0] for each in quiz(20)}


def test_a_lesson_asks_all_questions_about_its_scene_once() -> None:
    seen = set()
    for number in range(30):
        turns = lesson(generator("questions", number))["messages"]
        scene = SCENES.write(generator("questions", number))
        pairs = scene_questions(scene)
        seen.add(len(pairs))
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(pairs)
        assert turns[0]["content"].startswith(scene.text + " ")
        asked = [turn["content"].removeprefix(scene.text + " ") for turn in turns[::2]]
        found = zip(asked, [turn["content"] for turn in turns[1::2]], strict=True)
        assert sorted(found) == sorted(pairs)
    assert seen == {1, 2, 3}


def test_some_records_ask_for_a_story() -> None:
    lessons = [lesson_or_request(number)["messages"] for number in range(1000)]
    requests = sum(len(turns[1]["content"].split()) > 80 for turns in lessons)
    assert requests == pytest.approx(100, abs=4 * (1000 * 0.1 * 0.9) ** 0.5)
