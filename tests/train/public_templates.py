"""Six chat templates that behave as public ones do, written anew, and conversations for them.

Qwen2.5 and SmolLM2 add a system turn of their own; Qwen3 keeps reasoning only behind the last
question of a user, and opens an empty block there for answers without any; R1 drops reasoning
everywhere and asks with an opened one; Llama 3 trims texts and begins with its own token; ChatML is
the plain layout. Turns end with the template's own token, which is not always the model's eos.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


class Public(NamedTuple):
    source: str
    turn_end: str
    eos: str
    added: dict[str, bool]  # added tokens, and whether they are special
    bos: str = ""


_IM = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True}
_TOOL = {"<tool_call>": False, "</tool_call>": False}
_TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CALLS = (
    '{% for call in m.tool_calls %}{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name'
    " + '\", \"arguments\": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}"
)
_QWEN_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:' }}"
    "{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
)
_TOOL_TURN = (
    "{{ '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' }}"
)

CHATML = "{% for m in messages %}{{ " + _TURN + " }}{% endfor %}" + _ASK

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' }}{% endif %}"
    "{{ " + _TURN + " }}{% endfor %}" + _ASK
)

QWEN2_5 = (
    _QWEN_HEAD
    + "{% if not tools and messages[0].role != 'system' %}"
    + "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + _TOOL_TURN
    + "{% elif m.role == 'assistant' and m.tool_calls %}"
    + "{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}{% else %}{{ "
    + _TURN
    + " }}{% endif %}{% endfor %}"
    + _ASK
)

QWEN3 = (
    _QWEN_HEAD
    + "{% set ns = namespace(last=messages | length - 1, open=true) %}"
    + "{% for m in messages[::-1] %}{% if ns.open and m.role == 'user' and not "
    + "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    + "{% set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}"
    + "{% endif %}{% endfor %}"
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + _TOOL_TURN
    + "{% elif m.role == 'assistant' %}{% set text = m.content or '' %}{% set why = '' %}"
    + "{% if m.reasoning_content is string %}{% set why = m.reasoning_content %}"
    + "{% elif '</think>' in text %}"
    + "{% set why = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    + "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    + "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.last and (loop.last or why) %}"
    + "{{ '<think>\\n' + why.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}"
    + "{% else %}{{ text }}{% endif %}{% if m.tool_calls %}"
    + _CALLS
    + "{% endif %}{{ '<|im_end|>\\n' }}{% else %}{{ "
    + _TURN
    + " }}{% endif %}{% endfor %}"
    + _ASK
)

R1 = (
    "{% set ns = namespace(head='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.head = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.head }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + text + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>"
    "\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_THINK = {"<think>": False, "</think>": False}
PUBLIC = {
    "Qwen2.5": Public(QWEN2_5, "<|im_end|>", "<|endoftext|>", _IM | _TOOL),
    "Qwen3": Public(QWEN3, "<|im_end|>", "<|endoftext|>", _IM | _TOOL | _THINK),
    "R1-distill": Public(
        R1,
        "<|end_of_sentence|>",
        "<|end_of_sentence|>",
        {"<|begin_of_sentence|>": True, "<|end_of_sentence|>": True}
        | {"<|User|>": False, "<|Assistant|>": False}
        | _THINK,
        bos="<|begin_of_sentence|>",
    ),
    "Llama 3": Public(
        LLAMA3,
        "<|eot_id|>",
        "<|end_of_text|>",
        {"<|begin_of_text|>": True, "<|end_of_text|>": True, "<|eot_id|>": True}
        | {"<|start_header_id|>": True, "<|end_header_id|>": True},
        bos="<|begin_of_text|>",
    ),
    "SmolLM2": Public(SMOLLM2, "<|im_end|>", "<|im_end|>", _IM),
    "ChatML": Public(CHATML, "<|im_end|>", "<|endoftext|>", _IM),
}  # fmt: skip


def letters(added: dict[str, bool]) -> Tokenizer:
    """A tokenizer of single bytes and the added tokens: a token's id tells what it is.

    Ids below 256 are bytes, in the alphabet's order; the added tokens follow in theirs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        {
            "id": 256 + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special,
        }
        for i, (name, special) in enumerate(added.items())
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(content))


_WORDS = (
    "Ruby", "lost", "her", "kite", "why?", "é", "海", " and ", "\n", "  ", "3.14", "{x}", "\\n",
    "assistant", "user", "A: ", "\ufdd0", "\ufdd1", "<", "|>",
)  # fmt: skip


def _text(rng: np.random.Generator, least: int = 1) -> str:
    picked = rng.choice(len(_WORDS), int(rng.integers(least, 8)))
    return "said " * bool(least) + " ".join(_WORDS[i] for i in picked)


def conversation(rng: np.random.Generator, name: str) -> tuple[list[dict[str, Any]], Any]:
    """Turns of every shape that the template takes, and tools: answers with and without reasoning,
    calls and their results, weights, a user who has the last word."""
    tooled = name in ("Qwen2.5", "Qwen3") and rng.random() < 0.4
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": _text(rng)})
    for _ in range(int(rng.integers(1, 6))):
        messages.append({"role": "user", "content": _text(rng)})
        if tooled and rng.random() < 0.6:
            for _ in range(int(rng.integers(1, 3))):
                call = {"function": {"name": "look", "arguments": {"at": _text(rng)}}}
                said = _text(rng) if rng.random() < 0.5 else ""
                messages.append({"role": "assistant", "content": said, "tool_calls": [call]})
                messages.append({"role": "tool", "content": _text(rng)})
        answer: dict[str, Any] = {"role": "assistant", "content": _text(rng)}
        if name in ("Qwen3", "R1-distill") and rng.random() < 0.4:
            answer["content"] = f"<think>\n{_text(rng)}\n</think>\n\n{answer['content']}"
        elif name == "Qwen3" and rng.random() < 0.3:
            answer["reasoning_content"] = _text(rng)
        if rng.random() < 0.15:
            answer |= {"weight": 0} if rng.random() < 0.5 else {"train": False}
        messages.append(answer)
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": _text(rng)})
    tools = [{"type": "function", "function": {"name": "look"}}] if tooled else None
    return messages, tools
