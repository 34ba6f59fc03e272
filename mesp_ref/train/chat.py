"""A model's own chat template, rendered as Hugging Face renders it, cut into turns.

Source    transformers' chat-template conventions: a sandboxed Jinja environment with trim_blocks
          and lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that does
          not escape HTML, and the `{% generation %}` block around what the assistant says
"""

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.tokenizer import read_chat_template, read_tokenizer_config
from mesp_ref.train.traced import (
    OTHER,
    Span,
    TracingEnvironment,
    plain,
    said_of,
    spans_of,
    trace,
)

Message = Mapping[str, Any]
Segment = tuple[str, bool]  # text, and whether the assistant says it

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
FIELDS = (
    "role", "content", "name", "reasoning_content", "thinking", "tool_calls", "tool_call_id",
    "weight", "train",
)  # fmt: skip
_SWITCHES = ("weight", "train")  # what they say is ours to do: the template does not see them
# Turns by which is seen whether a template takes content that is a list of parts, or none at all.
_PARTS: Message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
_CALL: Message = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}  # fmt: skip
_ADDRESS = re.compile(r"( at)? ?0x[0-9a-fA-F]{6,}")


class Learned(NamedTuple):
    """An answer in a rendered conversation: from where the model is asked, to its end."""

    start: int
    stop: int
    last: int  # where its last word ends; what follows is the template's


class Cut(NamedTuple):
    """A rendered conversation: where its data stands, what is learned, and what cannot be.

    answers     turns of the assistant
    excluded    of them, those whose `weight` is 0 or whose `train` is false
    rewritten   of them, those the template writes otherwise once more follows, or whose beginning it
                does not tell: what the model would be asked there is not in this text
    """

    text: str
    data: tuple[Span, ...]
    learned: tuple[Learned, ...]
    answers: int
    excluded: int
    rewritten: int


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message if isinstance(message, str) else "no reason given")


def excluded(message: Message) -> bool:
    """Whether a turn says of itself that it is not to be learned."""
    return message.get("weight") == 0 or message.get("train") is False


class ChatTemplate:
    """A compiled template with the special tokens it may name.

    `now` is what `strftime_now` tells: fixed per run, so that a resumed run sees the same day.
    Raises MespRefError, naming `where`, for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
        now: datetime | None = None,
    ):
        self.where, self.special_tokens = where, dict(special_tokens or {})
        self.now = now or datetime.now()
        environment = TracingEnvironment()
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: self.now.strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = " ".join(str(error).split())
            raise MespRefError(f"{where}: line {error.lineno}: template error: {reason}") from None
        except (
            Exception
        ) as error:  # the compiler meets what no grammar foresees: 1 nested 1000 times
            raise MespRefError(f"{where}: template error: {type(error).__name__}") from None

    def rendered(self, messages: Sequence[Message], prompt: bool, tools: Any) -> str:
        """What the template makes of messages, as they are given to it: traced, or not."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = _ADDRESS.sub("", " ".join(str(error).split())) or type(error).__name__
            raise MespRefError(f"{self.where}: template error: {reason[:200]}") from None

    def asked(
        self, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool = True
    ) -> tuple[str, tuple[Span, ...]]:
        """The conversation as one text, ready to be answered, and where its data stands."""
        turns = _traced(self._fitted(messages))
        text = self.rendered(turns, add_generation_prompt, trace(tools, OTHER))
        return plain(text), spans_of(text)

    def _fitted(self, messages: Sequence[Message]) -> list[Message]:
        """The turns, with words alone as content where the template knows nothing else: many write
        a list as Python would, or the word None."""
        found: list[Message] = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                found.append(message)
            elif self._takes_nothing if content is None else self._takes_parts:
                found.append({**message, "content": content})
            else:
                words = "".join(part["text"] for part in content or ())
                found.append({**message, "content": words})
        return found

    @cached_property
    def _takes_parts(self) -> bool:
        return self._writes_no("'type'", [_PARTS])

    @cached_property
    def _takes_nothing(self) -> bool:
        return self._writes_no("None", [{"role": "user", "content": "x"}, _CALL])

    def _writes_no(self, word: str, turns: Sequence[Message]) -> bool:
        """Whether these turns are rendered, and without a word that only Python would write."""
        try:
            text = self.rendered(turns, False, None)
        except MespRefError:
            return False
        return bool(text) and word not in text

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """The conversation as one text; with the generation prompt, ready to be answered."""
        text, _ = self.asked(messages, tools, add_generation_prompt=add_generation_prompt)
        return text

    def segments(self, messages: Sequence[Message], tools: Any = None) -> list[Segment]:
        """The conversation cut where the assistant begins and ends to speak."""
        cut = self.cut(messages, tools)
        found: list[Segment] = []
        done = 0
        for start, stop, _ in cut.learned:
            found += [(cut.text[done:start], False), (cut.text[start:stop], True)]
            done = stop
        return [segment for segment in [*found, (cut.text[done:], False)] if segment[0]]

    def cut(self, messages: Sequence[Message], tools: Any = None) -> Cut:
        """The conversation rendered, and what of it the assistant is to learn.

        A template with `{% generation %}` says it itself. Otherwise turn i of the assistant is what
        rendering i+1 messages adds to rendering i messages with the generation prompt: exactly what
        the model would be asked to write. Where the generation prompt says more than the turn begins
        with (an opened `<think>`), the turn begins where the two part. A turn that the
        template renders otherwise when more follows is not learned, and counted; so that the last
        one never is, messages behind it are left out if they would change it.

        Cost      one rendering, and up to three for each way in which turns lie in it: linear
        """
        messages = self._fitted(messages)
        asked = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        answers = [i for i in asked if not excluded(messages[i])]
        cut, last = self._cut(messages, tools, answers)
        if not last and answers and answers[-1] + 1 < len(messages):
            cut, _ = self._cut(messages[: answers[-1] + 1], tools, answers)
        return cut._replace(answers=len(asked), excluded=len(asked) - len(answers))

    def _cut(self, messages: Sequence[Message], tools: Any, answers: list[int]) -> tuple[Cut, bool]:
        """The cut, and whether the last of the answers is learned."""
        whole = self.rendered(_traced(messages), False, trace(tools, OTHER))
        text, data, said = plain(whole), spans_of(whole), said_of(whole)
        del whole  # as long as the conversation, which may have 40 MB
        if said:
            roles = [message.get("role") for message in messages]
            found = _generated(data, said, set(answers), roles)
        else:
            found = _Rendering(self, messages, tools, text, data).answers(answers)
        _require_calls(messages, text, data)
        learned = tuple(part for part in found if part is not None)
        cut = Cut(text, data, learned, 0, 0, found.count(None))
        return cut, bool(found) and found[-1] is not None

    @cached_property
    def generation_prompt(self) -> str:
        """What is added to a user's message to ask for an answer; empty where that is not known."""
        turn = [{"role": "user", "content": "x"}]
        try:
            before, after = self.rendered(turn, False, None), self.rendered(turn, True, None)
        except MespRefError:
            return ""
        return after[len(before) :] if after.startswith(before) else ""


def _seen(message: Message) -> Message:
    """A turn as a template sees it: what is said to us alone left out."""
    if not any(name in message for name in _SWITCHES):
        return message
    return {name: value for name, value in message.items() if name not in _SWITCHES}


def _require_calls(messages: Sequence[Message], text: str, data: Sequence[Span]) -> None:
    """Raise MespRefError for calls of functions that the template leaves out: an answer of theirs would
    be learned as one of nothing."""
    if not any(message.get("tool_calls") for message in messages):
        return
    words = [""] * len(messages)  # of each turn, as they stand in the text
    for start, stop, source in data:
        if source != OTHER:
            words[source] += text[start:stop]
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or (name not in words[i] and f'"{name}"' not in text):
                raise MespRefError(
                    f"turn {i + 1}: tool_calls: found a call of {shown(name)}, expected one that the "
                    "chat template renders; this template leaves it out"
                )


def _traced(messages: Sequence[Message]) -> list[Message]:
    """The turns as the template gets them: all but a known role is data of its message."""
    return [
        {
            name: value if name == "role" and value in ROLES else trace(value, i)
            for name, value in _seen(message).items()
        }
        for i, message in enumerate(messages)
    ]


def _generated(
    spans: Sequence[Span], said: Sequence[Span], answers: set[int], roles: Sequence[Any]
) -> list[Learned | None]:
    """What `{% generation %}` blocks hold, without those of turns that are not to be learned."""
    found: list[Learned | None] = []
    starts = [start for start, _, _ in spans]
    seen: set[int] = set()
    for start, stop, _ in said:
        low = bisect.bisect_left(starts, start)
        inner = [span for span in spans[low : bisect.bisect_right(starts, stop)] if span[1] <= stop]
        sources = {s for *_, s in inner if s >= 0 and roles[s] == "assistant"}
        if stop > start and sources <= answers:
            seen |= sources
            found.append(Learned(start, stop, max((end for _, end, _ in inner), default=start)))
    return found + [None] * len(answers - seen)


class _Rendering:
    """One rendered conversation, in which the answers are looked for."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Any, text: str,
        spans: Sequence[Span],
    ):  # fmt: skip
        self.template, self.messages, self.tools = template, messages, tools
        self.text, self.spans = text, spans
        self.first, self.last = [-1] * len(messages), [-1] * len(messages)  # of each one's spans
        for number, (_, _, source) in enumerate(spans):
            if source != OTHER:
                self.last[source] = number
                if self.first[source] < 0:
                    self.first[source] = number

    def answers(self, answers: Iterable[int]) -> list[Learned | None]:
        """Each answer, or None. Those that lie in the text in one way, with the same words of the
        template around, begin and end in one way, so one of them is rendered for all."""
        known: dict[Any, tuple[int, int] | None] = {}
        found: list[Learned | None] = []
        done = 0
        for i in answers:
            kind = self._kind(i)
            if kind is None or kind not in known:
                answer = self._rendered(i, done)
            else:
                answer = self._alike(i, known[kind], done)
            if kind is not None and kind not in known:
                (first, last), (before, after) = self._place(i), self._around(i)
                if answer is None:
                    known[kind] = None
                elif before <= answer.start <= first and answer.stop <= after:
                    known[kind] = first - answer.start, answer.stop - last
            found.append(answer)
            done = answer.stop if answer else done
        return found

    def _place(self, i: int) -> tuple[int, int]:
        """From the first to the last character of message i."""
        return self.spans[self.first[i]][0], self.spans[self.last[i]][1]

    def _around(self, i: int) -> tuple[int, int]:
        """Where the data before message i ends, and that behind it begins."""
        first, last = self.first[i], self.last[i]
        before = self.spans[first - 1][1] if first else 0
        return before, self.spans[last + 1][0] if last + 1 < len(self.spans) else len(self.text)

    def _kind(self, i: int) -> Any:
        """How answer i lies in the text: None for one that has no place in it, or whose own words
        go on with the generation prompt (an opened `<think>` that the answer repeats)."""
        if self.first[i] < 0:
            return None
        place, prompt = self._place(i)[0], self.template.generation_prompt
        if any(self.text.startswith(prompt, place - j) for j in range(1, min(len(prompt), place))):
            return None
        message, (before, after) = self.messages[i], self._around(i)
        own = self.spans[self.first[i] : self.last[i] + 1]
        bounds = [before, *(at for span in own for at in span[:2]), after]
        words = tuple(self.text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))
        content = message.get("content")
        shown = sum(stop - start for start, stop, _ in own)
        whole = isinstance(content, str) and shown >= len(content.strip())
        fields = tuple(sorted(name for name, value in message.items() if value))
        return i and self.messages[i - 1].get("role"), fields, whole, words

    def _alike(self, i: int, found: tuple[int, int] | None, done: int) -> Learned | None:
        if found is None:
            return None
        (first, last), (lead, tail) = self._place(i), found
        if first - lead < done or last + tail > len(self.text):
            return self._rendered(i, done)
        return Learned(first - lead, last + tail, last)

    def _rendered(self, i: int, done: int) -> Learned | None:
        """Answer i, by rendering the conversation up to it and as it asks for it."""
        answered = self._prefix(i + 1, False)
        if answered is None or not self.text.startswith(answered):
            return None
        first, last = self._place(i) if self.first[i] >= 0 else (len(answered), 0)
        start = self._begin(i, answered, first, done)
        if start is None or not done <= start < len(answered):
            return None
        return Learned(start, len(answered), max(start, last))

    def _begin(self, i: int, answered: str, first: int, done: int) -> int | None:
        """Where answer i begins: where what the model is asked parts from what is answered."""
        asked = self._prefix(i, True)
        if asked is None or (i == 0 and not answered.startswith(asked)):
            # Few templates render nothing as a beginning: an answer that opens a conversation.
            prompt = self.template.generation_prompt
            place = answered.rfind(prompt, done, first) if prompt else -1
            return place + len(prompt) if place >= 0 else None
        if answered.startswith(asked):
            return len(asked)
        before = self._prefix(i, False)
        if before is None or not answered.startswith(before):
            return None
        common = _common(asked, answered)
        return min(common, first) if common > len(before) else None

    def _prefix(self, count: int, prompt: bool) -> str | None:
        """The first `count` messages as the template renders them, or None where it does not."""
        if count == len(self.messages) and not prompt:
            return self.text
        turns = [_seen(message) for message in self.messages[:count]]
        try:
            return plain(self.template.rendered(turns, prompt, self.tools))
        except MespRefError:
            return None


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def load_chat_template(path: str | Path, now: datetime | None = None) -> ChatTemplate | None:
    """The chat template of a checkpoint directory, or None when it has none.

    Reads chat_template.jinja, or `chat_template` of tokenizer_config.json (a text, or a list of
    named ones of which "default" is taken), and the special tokens of tokenizer_config.json.

    Raises MespRefError for files that cannot be read and templates that do not compile.
    """
    source, where = read_chat_template(path)
    if source is None:
        return None
    return ChatTemplate(source, _special_tokens(read_tokenizer_config(path)), where, now)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … as texts; older files store them as objects with `content`."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found
