"""What of a conversation is learned: six public templates against an oracle that renders prefixes."""

import os
import time
from typing import Any

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from public_templates import PUBLIC, Public, conversation, letters

from mesp_ref.errors import MespRefError
from mesp_ref.ops import IGNORED
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.rows import Encoder

COUNT = int(
    os.environ.get("MESP_REF_CHATS", "60")
)  # conversations a template; the full number is 200


def encoder_of(public: Public, **settings: Any) -> Encoder:
    tokenizer = letters(public.added)
    template = ChatTemplate(public.source, {"bos_token": public.bos})
    ends = (tokenizer.token_to_id(public.eos),)
    return Encoder(tokenizer, template, ends, tokenizer.get_vocab_size(), **settings)


# The oracle: Jinja as transformers sets it up, prefixes of the conversation, and a scan of letters.


class Oracle:
    def __init__(self, public: Public):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        environment.filters["tojson"] = lambda x: __import__("json").dumps(x, ensure_ascii=False)
        self.template = environment.from_string(public.source)
        self.public, self.tokenizer = public, letters(public.added)

    def render(self, messages: Any, tools: Any, prompt: bool = False) -> str:
        return self.template.render(
            messages=messages, tools=tools, add_generation_prompt=prompt, bos_token=self.public.bos
        )

    def answers(self, messages: Any, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text that is read, and the letters of it that are learned."""
        whole = self.render(messages, tools)
        wanted = [
            i for i, m in enumerate(messages)
            if m["role"] == "assistant" and m.get("weight") != 0 and m.get("train") is not False
        ]  # fmt: skip
        found = {i: span for i in wanted if (span := self.answer(messages, tools, i, whole))}
        if wanted and wanted[-1] not in found:
            whole = self.render(messages[: wanted[-1] + 1], tools)
            found = {i: span for i in wanted if (span := self.answer(messages, tools, i, whole))}
        return whole, list(found.values())

    def answer(self, messages: Any, tools: Any, i: int, whole: str) -> tuple[int, int] | None:
        until = self.render(messages[: i + 1], tools)
        if not whole.startswith(until):
            return None
        asked = self.render(messages[:i], tools, True)
        while not until.startswith(asked):
            asked = asked[:-1]
        if not asked.startswith(self.render(messages[:i], tools)):
            return None
        tail = until[len(asked) :]
        return len(asked), len(asked) + tail.rindex(self.public.turn_end) + len(
            self.public.turn_end
        )

    def labels(self, whole: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        at = 0
        for start, stop in [*spans, (len(whole), len(whole))]:
            for text, said in ((whole[at:start], False), (whole[start:stop], True)):
                part = self.tokenizer.encode(text, add_special_tokens=False).ids
                ids += part
                labels += part if said else [IGNORED] * len(part)
            at = stop
        return ids, labels


@pytest.mark.parametrize("name", PUBLIC)
def test_labels_are_what_rendering_prefixes_finds(name: str) -> None:
    """Ids, labels and the mask they are, of generated conversations, letter for letter."""
    rng, public = np.random.default_rng(7), PUBLIC[name]
    encoder, oracle = encoder_of(public), Oracle(public)
    learned = 0
    for number in range(COUNT):
        messages, tools = conversation(rng, name)
        row = encoder.record({"messages": messages, "tools": tools}, "here")
        ids, labels = oracle.labels(*oracle.answers(messages, tools))
        assert row.ids.tolist() == ids, number
        assert row.labels.tolist() == labels, number
        learned += row.counted
    assert learned > 20 * COUNT
    assert encoder.counts.forged == 0
    assert (encoder.counts.rewritten > 0) == (name == "Qwen3")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_text_is_that_of_plain_jinja(name: str) -> None:
    rng, public = np.random.default_rng(8), PUBLIC[name]
    template, oracle = encoder_of(public).template, Oracle(public)
    assert template is not None
    for _ in range(20):
        messages, tools = conversation(rng, name)
        for prompt in (False, True):
            got = template.render(messages, add_generation_prompt=prompt, tools=tools)
            assert type(got) is str
            assert got == oracle.render(messages, tools, prompt)


def said(encoder: Encoder, messages: list[dict[str, Any]], tools: Any = None) -> str:
    row = encoder.record({"messages": messages, "tools": tools}, "here")
    assert encoder.tokenizer is not None
    return encoder.tokenizer.decode(
        row.ids[row.labels != IGNORED].tolist(), skip_special_tokens=False
    )


USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_reasoning_that_a_template_drops_is_learned_where_it_stands() -> None:
    encoder = encoder_of(PUBLIC["Qwen3"])
    thought = BOT | {"content": "<think>\nhm\n</think>\n\nA"}
    whole = "<think>\nhm\n</think>\n\nA<|im_end|>"
    assert said(encoder, [USER, thought]) == whole
    assert said(encoder, [USER, BOT, USER, thought]) == whole
    assert said(encoder, [USER, thought, USER]) == whole  # a last word would rewrite it
    assert said(encoder, [USER, thought, USER, thought | {"weight": 0}]) == whole
    assert encoder.counts.rewritten == 1
    assert encoder.counts.excluded == 1
    assert "1 not learned: the template rewrites them" in encoder.counts.told()


def test_an_answer_that_opens_the_conversation_is_learned() -> None:
    """No template can be asked for it with nothing before; its own generation prompt tells where."""
    for name in ("Qwen2.5", "SmolLM2", "ChatML", "Llama 3"):
        public = PUBLIC[name]
        assert said(encoder_of(public), [BOT, USER, BOT]) == f"A{public.turn_end}" * 2, name
        system = {"role": "system", "content": "S"}
        assert said(encoder_of(public), [system, BOT]) == f"A{public.turn_end}", name


def test_turns_without_weight_are_read_and_not_learned() -> None:
    encoder = encoder_of(PUBLIC["ChatML"])
    first, second = BOT | {"content": "1"}, BOT | {"content": "2"}
    for switch in ({"weight": 0}, {"train": False}, {"weight": 0.0}):
        assert said(encoder, [USER, first | switch, USER, second]) == "2<|im_end|>"
        assert said(encoder, [USER, first, USER, second | switch]) == "1<|im_end|>"
    for switch in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert said(encoder, [USER, first | switch]) == "1<|im_end|>"
    assert said(encoder, [USER, first | {"weight": 0}]) == ""
    assert encoder.counts.silent == 1


def test_conversations_without_an_answer_are_counted() -> None:
    encoder = encoder_of(PUBLIC["ChatML"])
    assert said(encoder, [{"role": "system", "content": "S"}]) == ""
    assert said(encoder, [USER]) == ""
    assert encoder.counts.told() == (
        "of 2 read so far, with 0 answers: 2 conversations without an answer to learn"
    )


def test_generation_blocks_are_followed_and_excluded() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
    )
    encoder = encoder_of(PUBLIC["ChatML"]._replace(source=source))
    second = BOT | {"content": "B\ufdd1"}
    assert said(encoder, [USER, BOT, USER, second]) == "A<|im_end|>B\ufdd1<|im_end|>"
    assert said(encoder, [USER, BOT | {"weight": 0}, USER, second]) == "B\ufdd1<|im_end|>"
    assert said(encoder, [USER, BOT | {"content": ""}]) == "<|im_end|>"


def test_the_end_of_a_turn_is_the_templates_own() -> None:
    """A base whose text ends with another token than its turns: both end an answer."""
    for public in PUBLIC.values():
        encoder = encoder_of(public)
        assert encoder.tokenizer is not None
        ends = [encoder.tokenizer.token_to_id(name) for name in (public.eos, public.turn_end)]
        assert sorted(encoder.turn_ends) == sorted(set(ends))
        assert encoder.turn_ends[0] == ends[0]


def test_a_template_that_renders_no_such_conversation_says_so() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(MespRefError, match=r"here: messages: .*roles must alternate"):
        encoder_of(PUBLIC["ChatML"]._replace(source=source)).record(
            {"messages": [USER, BOT]}, "here"
        )


WRITES = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
READS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "want"),
    [(PUBLIC["ChatML"].source, "AB<|im_end|>"), (WRITES, "AB<|im_end|>"), (READS, "[A][B]<|im_end|>")],
    ids=["raises", "writes Python", "reads parts"],
)  # fmt: skip
def test_parts_are_words_where_a_template_knows_no_parts(source: str, want: str) -> None:
    """ChatML adds strings, which fails on a list; others write the list's repr."""
    encoder = encoder_of(PUBLIC["ChatML"]._replace(source=source))
    parts = [{"type": "text", "text": letter} for letter in "AB"]
    assert said(encoder, [USER, BOT | {"content": parts}]).endswith(want)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "fox"}}}


ASKS = (  # as templates of DeepSeek do
    "{% for m in messages %}{{ m.role }}:{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    "public", [PUBLIC["Qwen2.5"], PUBLIC["Qwen3"], PUBLIC["ChatML"]._replace(source=ASKS)]
)
def test_a_call_without_words_is_learned(public: Public) -> None:
    """Null or no content: as the template writes it; never the word None."""
    for call in ({"role": "assistant", "content": None, "tool_calls": [CALL]},
                 {"role": "assistant", "tool_calls": [CALL]}):  # fmt: skip
        text = said(encoder_of(public), [USER, call])
        assert "find" in text
        assert "None" not in text


def test_calls_that_a_template_leaves_out_are_refused() -> None:
    """ChatML writes content alone: the call would be learned as an empty answer."""
    for content in (None, "", "A"):
        turn = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        with pytest.raises(MespRefError, match=r"here: messages: turn 2: tool_calls: .*'find'"):
            encoder_of(PUBLIC["ChatML"]).record({"messages": [USER, turn]}, "here")


def test_empty_answers_have_their_place() -> None:
    for name, public in PUBLIC.items():
        empty = "<think>\n\n</think>\n\n" if name == "Qwen3" else ""
        encoder = encoder_of(public)
        assert said(encoder, [USER, BOT | {"content": ""}]) == empty + public.turn_end, name


@pytest.mark.parametrize("name", PUBLIC)
def test_masks_take_linear_time_in_the_turns(name: str) -> None:
    """Four times as many turns take about four times as long, not sixteen."""
    template = encoder_of(PUBLIC[name]).template
    assert template is not None

    def seconds(turns: int) -> float:
        messages = [turn for k in range(turns) for turn in (USER, BOT | {"content": f"A {k}"})]
        times = []
        for _ in range(3):
            begin = time.process_time()
            cut = template.cut(messages)
            times.append(time.process_time() - begin)
        assert len(cut.learned) == (1 if name == "Qwen3" else turns)
        return min(times)

    seconds(50)
    assert seconds(1600) < 9 * seconds(400)


def test_jinja_is_not_changed_for_others() -> None:
    """The environment is ours alone."""
    assert jinja2.Environment().from_string("{{ 'a' ~ 1 }}").render() == "a1"
    assert "lipsum" in jinja2.Environment().globals
