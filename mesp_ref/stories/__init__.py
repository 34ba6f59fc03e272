"""Stories from a seeded grammar whose entropy is known, and conversations about them."""

from mesp_ref.stories.chats import Conversation, ask, questions, request
from mesp_ref.stories.corpus import conversation, question_lines, story, write_questions
from mesp_ref.stories.grammar import Grammar, Story
from mesp_ref.stories.tales import TALES

__all__ = [
    "TALES",
    "Conversation",
    "Grammar",
    "Story",
    "ask",
    "conversation",
    "question_lines",
    "questions",
    "request",
    "story",
    "write_questions",
]
