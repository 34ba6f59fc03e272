"""Stories from a seeded grammar whose entropy is known, and conversations about them."""

from mesp_ref.stories.chats import Conversation, ask, questions, request
from mesp_ref.stories.corpus import (
    conversation,
    lesson_or_request,
    question_lines,
    quiz,
    story,
    write_questions,
)
from mesp_ref.stories.grammar import Grammar, Story
from mesp_ref.stories.scenes import SCENES, Question
from mesp_ref.stories.tales import TALES

__all__ = [
    "SCENES",
    "TALES",
    "Conversation",
    "Grammar",
    "Question",
    "Story",
    "ask",
    "conversation",
    "lesson_or_request",
    "question_lines",
    "questions",
    "quiz",
    "request",
    "story",
    "write_questions",
]
