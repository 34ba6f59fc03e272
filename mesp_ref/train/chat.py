"""A model's own chat template, rendered as Hugging Face renders it, cut into turns.

Source    transformers' chat-template conventions: a sandboxed Jinja environment with trim_blocks
          and lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that does
          not escape HTML, and the `{% generation %}` block around what the assistant says
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import inside, read_bytes
from mesp_ref.files.tokenizer import read_tokenizer_config

# Unicode noncharacters: reserved for use inside a program, so no text can hold them by right.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

Message = Mapping[str, Any]
Segment = tuple[str, bool]  # text, and whether the assistant says it


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: its body, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's base class declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


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
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
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

    def _marked(self, messages: Sequence[Message], prompt: bool, tools: Any) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MespRefError(f"{self.where}: template error: {reason[:200]}") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """The conversation as one text; with the generation prompt, ready to be answered."""
        text = self._marked(messages, add_generation_prompt, tools)
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def segments(self, messages: Sequence[Message], tools: Any = None) -> list[Segment]:
        """The conversation cut where the assistant begins and ends to speak.

        A template with `{% generation %}` says it itself. Otherwise turn i of the assistant is what
        rendering i+1 messages adds to rendering i messages with the generation prompt: exactly what
        the model would be asked to write.

        Raises MespRefError when the template rewrites earlier turns, so that no such cut exists.
        """
        whole = self._marked(messages, False, tools)
        if _OPEN in whole:
            return _split_marks(whole)
        found: list[Segment] = []
        done = 0
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            asked = self._marked(messages[:i], True, tools)
            answered = self._marked(messages[: i + 1], False, tools)
            if not (whole.startswith(answered) and answered.startswith(asked)) or len(asked) < done:
                raise MespRefError(
                    f"{self.where}: found a template that renders message {i + 1} otherwise when "
                    "more follows, expected turns one after another; end each conversation "
                    "at its first assistant message"
                )
            found += [(whole[done : len(asked)], False), (answered[len(asked) :], True)]
            done = len(answered)
        return [segment for segment in [*found, (whole[done:], False)] if segment[0]]


def _split_marks(text: str) -> list[Segment]:
    """Text between marks is the assistant's, the rest is not."""
    found: list[Segment] = []
    for part in text.split(_OPEN):
        said, closed, rest = part.rpartition(_CLOSE)
        found += [(said, bool(closed)), (rest, False)]
    return [segment for segment in found if segment[0]]


def load_chat_template(path: str | Path, now: datetime | None = None) -> ChatTemplate | None:
    """The chat template of a checkpoint directory, or None when it has none.

    Reads chat_template.jinja, or `chat_template` of tokenizer_config.json (a text, or a list of
    named ones of which "default" is taken), and the special tokens of tokenizer_config.json.

    Raises MespRefError for files that cannot be read and templates that do not compile.
    """
    directory = Path(path)
    config_file = inside(directory, "tokenizer_config.json")
    template_file = inside(directory, "chat_template.jinja")
    config = read_tokenizer_config(directory)
    source = config.get("chat_template")
    if template_file.is_file():
        try:
            source = read_bytes(template_file).decode("utf-8")
        except (OSError, ValueError) as error:
            raise MespRefError(f"{template_file}: not readable as UTF-8: {error}") from None
    else:
        template_file = config_file
    if isinstance(source, list):
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise MespRefError(
            f"{template_file}: chat_template: found {shown(source)}, expected a text"
        )
    return ChatTemplate(source, _special_tokens(config), f"{template_file}: chat_template", now)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … as texts; older files store them as objects with `content`."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found
