"""Stories as training rows, and the two measures of a model that tells them."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mesp_ref.engine.generate import generate
from mesp_ref.engine.model import Model
from mesp_ref.stories.chats import request
from mesp_ref.stories.corpus import generator, story
from mesp_ref.stories.tales import TALES
from mesp_ref.stories.tokenizer import CHAT_TEMPLATE, END
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.rows import Cursor, Row
from mesp_ref.train.trainer import evaluate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHAT_SHARE = 0.2  # of the rows are conversations
_LONGEST = 256  # tokens: more than any story has


class StoryRows:
    """Endless rows of fresh stories: row k is a function of (seed, k) alone, none comes twice.

    A row is END, story, END, or for a share of the rows a conversation in which somebody asks for
    the story. A story's own names are the only ones in sight, so to copy a name it is enough to
    look for one: with several stories packed into a row the model takes far longer to begin to.
    """

    def __init__(self, tokenizer: "Tokenizer", seq_len: int, seed: int = 0):
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.template = ChatTemplate(CHAT_TEMPLATE)
        self.cursor = Cursor()

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        first = self.cursor.row
        self.cursor = Cursor(row=first + count)
        return [self._row(number) for number in range(first, first + count)]

    def _row(self, number: int) -> Row:
        rng = generator("train", number, self.seed)
        told = TALES.write(rng)
        if rng.random() < _CHAT_SHARE:
            text = self.template.render(request(told, rng)["messages"])
        else:
            text = END + told.text + END
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        row = np.array(ids[: self.seq_len], np.int32)
        return Row(row, row)


class HeldOut(NamedTuple):
    """Loss on whole stories that training never saw, beside what the grammar itself would reach.

    A story determines its tokens and they determine the story, so the grammar's −log P(story) is
    what the best possible predictor of the tokens pays, in the mean over all stories. `bound` is
    that of these very stories, Σ −log P(story) / Σ tokens.
    """

    stories: int
    heldout_tokens: int
    loss: float  # nats per token, the token that ends a story included
    bound: float  # nats per token
    nats_per_story: float  # mean surprisal of these stories under the grammar


def heldout_loss(model: Model, tokenizer: "Tokenizer", count: int, seed: int = 0) -> HeldOut:
    """Mean loss of a model on `count` held-out stories, each a row of its own after END."""
    stories = [story(number, "heldout", seed) for number in range(count)]
    rows = []
    for told in stories:
        ids = np.array(tokenizer.encode(told.text + END).ids, np.int32)
        rows.append(Row(ids, ids))
    loss, tokens, _ = evaluate(model, None, rows, batch_size=16)
    nats = sum(told.nats for told in stories)
    return HeldOut(count, tokens, loss, nats / tokens, nats / count)


def openings(tokenizer: "Tokenizer", count: int, seed: int = 0) -> list[list[int]]:
    """The first sentences of held-out stories, as prompts to go on from."""
    texts = (story(number, "heldout", seed).text for number in range(count))
    return [tokenizer.encode(text[: text.index(".") + 1]).ids for text in texts]


def tell(
    model: Model,
    tokenizer: "Tokenizer",
    prompts: list[list[int]],
    temperature: float,
    seed: int = 0,
) -> tuple[list[str], float]:
    """Whole stories that begin with the prompts, and the share that the grammar could have written.

    The grammar checks every word: a pronoun, place or colour that contradicts an earlier one fails.
    """
    written = generate(model, prompts, max_new_tokens=_LONGEST, temperature=temperature, seed=seed)
    texts = [
        tokenizer.decode(prompt + new, skip_special_tokens=True)
        for prompt, new in zip(prompts, written, strict=True)
    ]
    return texts, sum(TALES.read(text) is not None for text in texts) / len(texts)
