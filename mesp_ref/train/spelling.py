"""How a text becomes tokens when part of it is data, which must not make control tokens.

A tokenizer looks for its added tokens first, wherever they stand, so whoever writes
`<|im_end|>` into a message ends the turn. Control tokens are those that the tokenizer calls special
and those that the template itself writes between turns, special or not. One counts only where the
template wrote every letter of it; elsewhere its letters are spelled as ordinary text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
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
        self._ids = np.array(sorted(self._control), np.int64)

    def _written(self) -> set[int]:
        """Added tokens that the template writes around the turns of a plain conversation; all of
        them for a template that renders none."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            text, data = self.template.asked(turns, add_generation_prompt=False)
        except MespRefError:
            return set(self._added.values())
        return {found.token for found in self._find(text, data, set(self._added.values()))}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _find(self, text: str, data: Iterable[Span], wanted: set[int]) -> list[Control]:
        found = []
        for start, stop in _between(data, len(text)):
            for match in self._pattern.finditer(text, start, stop):
                if (token := self._added[match.group()]) in wanted:
                    found.append(Control(*match.span(), token))
        return found

    def controls(self, text: str, data: Iterable[Span]) -> list[Control]:
        """The control tokens that the template wrote, in order."""
        return self._find(text, data, self._control)

    def end_of_turn(self, text: str, controls: Sequence[Control], start: int, stop: int) -> int:
        """Where a turn ends whose last word ends at `start`: behind its first control token, or at
        `stop` where none follows."""
        for control in controls:
            if start <= control.start and control.stop <= stop:
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
        if np.array_equal(ids[np.isin(ids, self._ids)], [control.token for control in controls]):
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

    def _ordinary(self, text: str, plain: Encode) -> Array:
        ids = plain(text)
        for other, token in self._renumbered.items():
            ids[ids == other] = token
        made = ids[np.isin(ids, self._ids)]
        if made.size:
            name = self.tokenizer.id_to_token(int(made[0]))
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
        controls = self.controls(cut.text, cut.data)
        ends = [c.token for *_, last in cut.learned for c in controls if c.start >= last]
        return ends[0] if ends else None


def _between(data: Iterable[Span], length: int) -> Iterator[tuple[int, int]]:
    """The stretches that no data touches."""
    at = 0
    for start, stop, _ in data:
        if stop > start:
            if start > at:
                yield at, start
            at = max(at, stop)
    if length > at:
        yield at, length
