"""Ollama's Modelfile beside a GGUF file: where the weights are, where a turn ends, how turns look.

Ollama has templates in Go's language where Hugging Face has them in Jinja. A template of the usual
form, in which each turn is a text before it, its content and a text behind it, is taken apart by
rendering it; whether it is of that form is checked on conversations that took no part in this.
Source    Ollama, docs/modelfile and docs/template
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mesp_ref.errors import MespRefError

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # messages, whether an answer is to follow
_USUAL_CONTEXT = 4096  # what Ollama takes where nothing is said

_CHECKED = (  # roles by their first letters
    "u", "uau", "uaua", "su", "sua", "suau", "suauau", "ua",
)  # fmt: skip
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


class Turns(NamedTuple):
    """What stands before and behind the content of each role's turns."""

    before: dict[str, str]
    behind: dict[str, str]
    asks: str  # what stands at the end when an answer is to follow
    system: str | None  # what a conversation without a system turn is given

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """What Ollama makes of a conversation."""
        told = list(messages)
        if self.system is not None and told[0]["role"] != "system":
            told.insert(0, {"role": "system", "content": self.system})
        text = "".join(self.before[m["role"]] + m["content"] + self.behind[m["role"]] for m in told)
        return text + self.asks if prompt else text

    def go(self) -> str:
        """The template in Go's language; an answer that was begun is gone on with."""
        branches = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}'
            + (f"{{{{ if not $last }}}}{self.behind[role]}{{{{ end }}}}" if role == "assistant"
               else self.behind[role])
            for role in self.before
        )  # fmt: skip
        return (
            "{{- range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ {branches}{{{{ end }}}}{{{{ if and $last (ne .Role "assistant") }}}}{self.asks}'
            "{{ end }}{{ end }}"
        )


def take_apart(render: Render) -> Turns | None:
    """The turns of a chat template, or None where it is of no such form."""
    try:
        turns = _pieces(render)
        fits = _writable(turns) and all(_same(turns, render, roles) for roles in _CHECKED)
    except ValueError:  # a content missing or twice; a conversation that the template refuses
        return None
    return turns if fits else None


def _writable(turns: Turns) -> bool:
    """Whether neither Go nor the Modelfile would take a piece for something else."""
    pieces = [*turns.before.values(), *turns.behind.values(), turns.asks]
    if any("{{" in piece or "}}" in piece or piece.endswith("{") for piece in pieces):
        return False
    return all(_quoted(text) is not None for text in (turns.go(), turns.system or ""))


def _same(turns: Turns, render: Render, roles: str) -> bool:
    """Whether a conversation is the same text by the pieces and by the template."""
    prompts = (False,) if roles[-1] == "a" else (False, True)
    for thought in ("", "<think>\nhm\n</think>\n\n"):  # some templates drop what was thought
        told = [
            {"role": _ROLES[r], "content": f"{thought if r == 'a' else ''}{i} words\nof {r}."}
            for i, r in enumerate(roles)
        ]
        if any(turns.render(told, prompt) != render(told, prompt) for prompt in prompts):
            return False
    return True


def _pieces(render: Render) -> Turns:
    """Cut rendered conversations at their contents. ValueError where the pieces do not fit."""
    words = ("zqsystem", "zquser", "zqanswer", "zqagain")
    told = [{"role": _ROLES[r], "content": w} for r, w in zip("suau", words, strict=True)]
    whole, rest, pieces = render(told, False), render(told, True), list[str]()
    asks = _without(rest, whole, "")
    for word in words:
        piece, rest = rest.split(word)
        pieces.append(piece)
    system, user, answer, again = pieces
    _, after_answer = render(told[:3], False).split(words[2])
    after_user = _without(rest, "", asks)
    user_begins = _without(again, after_answer, "")
    after_system = _without(user, "", user_begins)
    alone = user_begins + words[1] + after_user
    default = _without(render(told[1:2], False), "", alone)
    given = _without(default, system, after_system) if default else None
    if given == "":  # what begins every text: Ollama has no empty system turn to hold it
        raise ValueError("another form")
    return Turns(
        {"system": system, "user": user_begins, "assistant": _without(answer, after_user, "")},
        {"system": after_system, "user": after_user, "assistant": after_answer},
        asks,
        given,
    )


def _without(text: str, start: str, end: str) -> str:
    """The text without what it begins and ends with; ValueError where it does not."""
    if not (text.startswith(start) and text.endswith(end)) or len(text) < len(start) + len(end):
        raise ValueError("another form")
    return text[len(start) : len(text) - len(end)]


def modelfile(
    model: str,
    stops: Sequence[str],
    context: int,
    render: Render | None,
    adapter: str | None = None,
) -> str:
    """The text of a Modelfile whose files lie beside it.

    model, adapter  names of GGUF files; stops: the texts of the end tokens; context: most tokens

    Raises MespRefError for a name that would be read as more than a name.
    """
    for name in (model, adapter or ""):
        if not name.isprintable():
            raise MespRefError(f"{name}: expected the name of a file without line ends")
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.insert(0, f"# {model}: the base model, by mesp-ref convert gguf-model BASE {model}")
        lines.append(f"ADAPTER ./{adapter}")
    for stop in map(_quoted, stops):
        unsaid = "# An end token holds quotes that no Modelfile can: stop it in the request."
        lines.append(unsaid if stop is None else f"PARAMETER stop {stop}")
    if context < _USUAL_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    turns = None if render is None else take_apart(render)
    if turns is not None:
        lines.append(f"TEMPLATE {_quoted(turns.go())}")
        if turns.system is not None:
            lines.append(f"SYSTEM {_quoted(turns.system)}")
    elif render is not None:
        lines.append(
            "# The model's chat template is of no form that could be put in Go's language;"
        )
        lines.append(
            "# Ollama chooses one: hold it against tokenizer.chat_template of the GGUF file."
        )
    else:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str | None:
    """A value between quotes, which have no escapes; None for what would end before its end."""
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    return None if '"""' in text or text.endswith('"') else f'"""{text}"""'
