"""How a text becomes tokens when part of it is data, which must not make control tokens.

A tokenizer looks for its added tokens first, wherever they stand, so whoever writes
`<|im_end|>` into a message ends the turn. Control tokens are those that the tokenizer calls special
and those that the template itself writes between turns, special or not. One counts only where the
template wrote every letter of it; elsewhere its letters are spelled as ordinary text.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.tokenizer import reasons
from mesp_ref.ops import Array
from mesp_ref.train.chat import ChatTemplate, Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[str], Array]


class Control(NamedTuple):
    """A control token where the template wrote it."""

    start: int
    stop: int
    token: int


class Speller:
    """Spells rendered conversations for one tokenizer and one template."""

    def __init__(self, tokenizer: "Tokenizer", template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items() if token.content}
        self._right = {number for number, token in added.items() if token.rstrip}
        self._left = {number for number, token in added.items() if token.lstrip}
        special = {number for number, token in added.items() if token.special}
        self._control = special & set(self._added.values())
        self._control |= self._written()
        numbers = tokenizer.get_vocab(with_added_tokens=True).values()
        self._is_control = np.zeros(max(numbers, default=0) + 1, bool)  # by token id
        self._is_control[list(self._control)] = True

    def _written(self) -> set[int]:
        """Added tokens that the template writes around the turns of a plain conversation; all of
        them for a template that renders none."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            text, data = self.template.asked(turns, add_generation_prompt=False)
        except MespRefError:
            return set(self._added.values())
        return {found.token for found in self._find(text, data, 0, len(text))}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _find(self, text: str, data: Sequence[Span], start: int, stop: int) -> Iterator[Control]:
        for a, b in _between(data, start, stop):
            for match in self._pattern.finditer(text, a, b):
                yield Control(*match.span(), self._added[match.group()])

    def controls(self, text: str, data: Sequence[Span], start: int, stop: int) -> list[Control]:
        """The control tokens that the template wrote between two places, in order."""
        found = self._find(text, data, start, stop)
        return [control for control in found if control.token in self._control]

    def end_of_turn(self, text: str, data: Sequence[Span], start: int, stop: int) -> int:
        """Where a turn ends whose last word ends at `start`: behind its first control token, or at
        `stop` where none follows."""
        for control in self.controls(text, data, start, stop)[:1]:
            end = control.stop
            while control.token in self._right and end < stop and text[end].isspace():
                end += 1  # the tokenizer makes white space part of such a token
            return end
        return stop

    def spell(
        self, text: str, controls: Sequence[Control], encode: Encode, plain: Encode
    ) -> tuple[Array, bool]:
        """Token ids, and whether the text spells a control token that the template did not write.

        encode   the tokenizer as it is. What it finds is taken where its control tokens are those of
                 the template; otherwise stretches between these are spelled one by one
        plain    the tokenizer without control tokens, `self.plain`
        """
        ids = encode(text)
        if self._made(ids) == [control.token for control in controls]:
            return ids, False
        parts: list[Array] = []
        at = 0
        for control in [*controls, None]:
            stretch = text[at : control.start if control else len(text)]
            if at and controls[len(parts) // 2 - 1].token in self._right:
                stretch = stretch.lstrip()
            if control and control.token in self._left:
                stretch = stretch.rstrip()
            parts.append(self._ordinary(stretch, plain))
            if control:
                parts.append(np.array([control.token], np.int32))
                at = control.stop
        return np.concatenate(parts), True

    def _made(self, ids: Array) -> list[int]:
        """The control tokens among these, in order."""
        found: list[int] = ids[self._is_control[ids]].tolist()
        return found

    def _ordinary(self, text: str, plain: Encode) -> Array:
        ids = plain(text)
        for other, token in self._renumbered.items():
            ids[ids == other] = token
        if made := self._made(ids):
            name = self.tokenizer.id_to_token(made[0])
            raise MespRefError(
                f"tokenizer.json: found no way to spell {shown(name)} without the control token of "
                "that name, expected one; leave it out of the text, or allow special tokens in text"
            )
        return ids

    @cached_property
    def plain(self) -> "Tokenizer":
        """The tokenizer without its control tokens: it can spell them as any other text."""
        from tokenizers import Tokenizer

        content = json.loads(self.tokenizer.to_str())
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["id"] not in self._control
        ]
        with reasons("tokenizer.json: not usable without its special tokens"):
            return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _renumbered(self) -> dict[int, int]:
        """Ids of added tokens that the package numbers anew when there are fewer: theirs, and ours."""
        plain = self.plain.get_added_tokens_decoder()
        pairs = {number: self._added[token.content] for number, token in plain.items()}
        return {
            other: token for other, token in sorted(pairs.items(), reverse=True) if other != token
        }

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends a turn of the assistant, by the template's own hand."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        try:
            cut = self.template.cut(turns)
        except MespRefError:
            return None
        for _, stop, last in cut.learned:
            for control in self.controls(cut.text, cut.data, last, stop):
                return control.token
        return None


def _between(data: Sequence[Span], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The stretches between two places that no data touches."""
    at = start
    for number in range(bisect_right(data, start, key=itemgetter(1)), len(data)):
        first, last, _ = data[number]
        if first >= stop:
            break
        if last > first:
            if first > at:
                yield at, first
            at = max(at, last)
    if stop > at:
        yield at, stop
