"""Forms of training records that people have, and the few that they are turned into.

text            {"text": …}                                        all is learned, and an end token
tokens          {"tokens": [ids]}                                  all is learned
input_ids       {"input_ids", "labels", "attention_mask"}          what labels have, −100 elsewhere; all
                without labels. Where the mask is 0 is padding, which is left out
messages        {"messages": [{"role", "content"}], "tools"}       what the assistant says
conversations   {"conversations": [{"from", "value"}], "system"}   ShareGPT: becomes messages
prompt          {"prompt": …, "completion": …}                     the completion and an end token;
                both may be lists of turns, which become messages
instruction     {"instruction", "input", "output", "system", "history"}   Alpaca: becomes messages
                where the model has a chat template, else a prompt of `### Instruction:` and so on
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import parse_json
from mesp_ref.train.chat import FIELDS

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip
_QUESTIONS = ("question", "query", "input", "problem", "instruction", "prompt", "user", "source")
_ANSWERS = ("answer", "response", "output", "solution", "completion", "assistant", "target")
_TEXTS = ("content", "body", "document", "article", "story", "sentence", "raw_content", "review")
_CHATS = ("conversation", "dialog", "dialogue", "chat", "turns", "message")


class Form(NamedTuple):
    """A form of record: the fields that make it, those it may have, and how it is turned."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    turned: Callable[[Mapping[str, Any], str], dict[str, Any]]


class Record(NamedTuple):
    """A record turned: the form it had, what is left of it, and the fields that nobody reads."""

    form: str
    value: dict[str, Any]
    unused: tuple[str, ...]


def turned(record: Any, where: str) -> Record:
    """A record of any form as one with `messages`, `tokens`, `text`, or `prompt` and `completion`.

    Raises MespRefError, naming `where`, for one of no known form, with the nearest.
    """
    if not isinstance(record, dict):
        raise MespRefError(f"{where}: found {type(record).__name__}, expected a JSON object")
    _refuse_preferences(record, where)
    given = {name for name, value in record.items() if value is not None}
    for fields in (given, set(record)):  # a table has all columns in every row
        for name, form in FORMS.items():
            if fields.issuperset(form.needs):
                unused = tuple(f for f in record if f not in (*form.needs, *form.may))
                return Record(name, form.turned(record, where), unused)
    names = ", ".join(map(shown, list(record)[:5])) or "none"
    raise MespRefError(
        f"{where}: found fields {names}, expected text, messages, conversations, input_ids, prompt and "
        f"completion, or instruction and output; {_nearest(record)}"
    )


def _refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Pairs of better and worse answers: to learn both, or the wrong one, is worse than nothing."""
    if "chosen" in record or "rejected" in record:
        raise MespRefError(
            f"{where}: found chosen and rejected, a preference pair (DPO), which is not trained on "
            "here; keep what is chosen as messages, or as prompt and completion"
        )
    if "completion" in record and isinstance(record.get("label"), bool):
        raise MespRefError(
            f"{where}: found completion with a label of true or false (KTO), which is not trained "
            "on here; keep the good ones, without label"
        )


def _nearest(record: Mapping[str, Any]) -> str:
    """What to do to a record of no form."""
    asked = next((name for name in _QUESTIONS if name in record), None)
    answer = next((name for name in _ANSWERS if name in record), None)
    if asked and answer:
        return f"rename {asked} to prompt and {answer} to completion"
    if {"role", "content"} <= set(record) or {"from", "value"} <= set(record):
        return 'this is a turn: put those of a conversation in one record, {"messages": [...]}'
    for names, wanted in ((_CHATS, "messages"), (_TEXTS, "text")):
        for name in names:
            if name in record:
                return f"rename {name} to {wanted}"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"give the list of {shown(name)} alone"
    known = sorted({field for form in FORMS.values() for field in form.needs})
    for name in record:
        if name in known:
            form = next(form for form in FORMS.values() if name in form.needs)
            missing = " and ".join(field for field in form.needs if field not in record)
            return f"nearest is {' and '.join(form.needs)}: {missing} is missing"
        if close := difflib.get_close_matches(str(name), known, 1):
            return f"rename {shown(name)} to {close[0]}"
    return "rename what is to be learned to text"


def _whole(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record of `text`, which is what it is."""
    return {"text": _string(record, "text", where)}


def _string(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise MespRefError(f"{where}: {field}: found {found}, expected a string")
    return value


def _list(record: Mapping[str, Any], field: str, where: str) -> Any:
    """A list, also as a table holds it: written as JSON in a cell, or a dict of equal columns."""
    value = record[field]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise MespRefError(f"{where}: {field}: not JSON ({error})") from None
    columns = value.values() if isinstance(value, dict) else ()
    if all(isinstance(v, list) for v in columns) and len({len(v) for v in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _tokens(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"tokens": _list(record, "tokens", where)}


def _input_ids(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Token ids and labels of another tokenising program, without its padding."""
    found = {
        name: _list(record, name, where)
        for name in ("input_ids", "labels", "attention_mask")
        if record.get(name) is not None
    }
    for name, value in found.items():
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise MespRefError(
                f"{where}: {name}: found {shown(value)}, expected a list of integers"
            )
        if len(value) != len(found["input_ids"]):
            raise MespRefError(
                f"{where}: {name}: found {len(value)} numbers, expected {len(found['input_ids'])}, as "
                "many as input_ids"
            )
    if record.get("position_ids") is not None:
        raise MespRefError(
            f"{where}: found position_ids, expected none: give documents one by one, --packing pack "
            "puts them in rows"
        )
    mask = found.pop("attention_mask", None)
    found = found if mask is None else _unpadded(found, mask, where)
    return {"tokens": found.pop("input_ids"), **found}


def _unpadded(found: dict[str, list[int]], mask: list[int], where: str) -> dict[str, list[int]]:
    """The lists where the mask is 1: one stretch, with padding around it."""
    kept = [i for i, one in enumerate(mask) if one]
    if set(mask) - {0, 1} or (kept and kept[-1] - kept[0] + 1 != len(kept)):
        raise MespRefError(
            f"{where}: attention_mask: expected 1 for one stretch of tokens and 0 for the padding "
            "around it"
        )
    return {name: [value[i] for i in kept] for name, value in found.items()}


def _messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"messages": _list(record, "messages", where)} | _tools(record, where)


def _tools(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"tools": _list(record, "tools", where)} if record.get("tools") else {}


def _sharegpt(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ShareGPT's turns by our names; lists of role and content under its name pass."""
    turns = _list(record, "conversations", where)
    if not isinstance(turns, list) or not turns:
        raise MespRefError(
            f"{where}: conversations: found {shown(turns)}, expected a list of turns"
        )
    if isinstance(turns[0], dict) and "role" in turns[0]:
        found = list(turns)
    else:
        found = [_turn(t, f"{where}: conversations: turn {i}") for i, t in enumerate(turns, 1)]
    if record.get("system"):
        found.insert(0, {"role": "system", "content": _string(record, "system", where)})
    return {"messages": found} | _tools(record, where)


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise MespRefError(f"{place}: expected an object with from and value, found {shown(turn)}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise MespRefError(
            f"{place}: from: found {shown(speaker)}, expected one of {', '.join(SPEAKERS)}; give "
            "calls of functions as messages with tool_calls"
        )
    rest = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
    for field in rest:
        if field not in FIELDS or field in ("role", "content"):
            raise MespRefError(
                f"{place}: found field {shown(field)}, expected only from, value, weight, train"
            )
    return {"role": SPEAKERS[speaker], "content": turn["value"], **rest}


def _prompt(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Two texts, or two lists of turns of which only those of the completion are learned."""
    if isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return {"prompt": record["prompt"], "completion": record["completion"]}
    sides = [_list(record, side, where) for side in ("prompt", "completion")]
    for name, side in zip(("prompt", "completion"), sides, strict=True):
        if not isinstance(side, list) or not all(isinstance(turn, dict) for turn in side):
            raise MespRefError(
                f"{where}: {name}: found {shown(record[name])}, expected prompt and completion to be "
                "two strings or two lists of turns"
            )
    asked = [t | {"train": False} if t.get("role") == "assistant" else t for t in sides[0]]
    return {"messages": [*asked, *sides[1]]} | _tools(record, where)


def _alpaca(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both ways to ask: messages for a model with a chat template, a prompt for one without."""
    asked, answer = _string(record, "instruction", where), _string(record, "output", where)
    more = _string(record, "input", where) if record.get("input") else ""
    system = _string(record, "system", where) if record.get("system") else ""
    said = [("system", system)] if system else []
    for pair in _history(record, where):
        said += zip(("user", "assistant"), pair, strict=True)
    said += [("user", f"{asked}\n\n{more}" if more else asked), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in said]
    if record.get("history"):
        return {"messages": messages}
    parts = (("Instruction", asked), ("Input", more))
    prompt = "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text or name != "Input")
    prompt = (f"{system}\n\n" if system else "") + prompt + "### Response:\n"
    return {"messages": messages, "prompt": prompt, "completion": answer}


def _history(record: Mapping[str, Any], where: str) -> Sequence[Sequence[str]]:
    history = _list(record, "history", where) if record.get("history") else []
    pairs = isinstance(history, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in history
    )
    if not pairs:
        raise MespRefError(
            f"{where}: history: found {shown(history)}, expected a list of pairs of strings"
        )
    return history


# The first that a record has all fields of: a table of chats may keep a rendered text beside them.
FORMS = {
    "messages": Form(("messages",), ("tools",), _messages),
    "conversations": Form(("conversations",), ("tools", "system"), _sharegpt),
    "tokens": Form(("tokens",), (), _tokens),
    "input_ids": Form(
        ("input_ids",), ("labels", "attention_mask", "position_ids"), _input_ids
    ),
    "prompt": Form(("prompt", "completion"), ("tools",), _prompt),
    "instruction": Form(
        ("instruction", "output"), ("input", "system", "history"), _alpaca
    ),
    "text": Form(("text",), (), _whole),
}  # fmt: skip
KNOWN = {field for form in FORMS.values() for field in (*form.needs, *form.may)}
