"""Ollama's Modelfile: templates taken apart, checked by a small interpreter of Go's templates."""

import re
from typing import Any

import pytest
from helpers import CHATML

from mesp_ref.errors import MespRefError
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.modelfile import Render, modelfile, take_apart
from mesp_ref.train.chat import ChatTemplate, load_chat_template

CONVERSATIONS = ("u", "su", "uau", "suauau", "uauau")
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def jinja(source: str) -> Render:
    template = ChatTemplate(source)
    return lambda messages, prompt: template.render(messages, add_generation_prompt=prompt)


def go(source: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are written here."""
    pieces = re.split(r"\{\{-? ?(.*?) ?\}\}", source)
    assert pieces[1] == "range $i, $_ := .Messages"
    text = []
    for number, message in enumerate(messages):
        last, stack = number == len(messages) - 1, [True]  # is what is read now written?
        taken = [True]  # was a branch of this if taken already?
        for literal, action in zip(pieces[2::2], [*pieces[3::2], ""], strict=True):
            text.append(literal if all(stack) else "")
            if action in ("$last := eq (len (slice $.Messages $i)) 1", ""):
                continue
            if action == ".Content":
                text.append(message["content"] if all(stack) else "")
            elif action == "end":
                stack.pop()
                taken.pop()
                if not stack:
                    break
            else:
                condition = action.removeprefix("else ").removeprefix("if ")
                role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
                holds = message["role"] == role[1] if role else {
                    "not $last": not last,
                    'and $last (ne .Role "assistant")': last and message["role"] != "assistant",
                }[condition]  # fmt: skip
                if action.startswith("else "):
                    stack[-1] = holds and not taken[-1]
                    taken[-1] = taken[-1] or holds
                else:
                    stack.append(holds)
                    taken.append(holds)
    return "".join(text)


TEMPLATES = {
    "chatml": CHATML,
    "no system": CHATML.replace("{%- if messages[0]['role'] != 'system' %}", "{%- if false %}"),
    "brackets": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_go(name: str) -> None:
    render = jinja(TEMPLATES[name])
    text = modelfile("m.gguf", ["<|im_end|>", 'a"b'], 128, render)
    found = re.search('TEMPLATE "+(.*?[^"])"+$', text, re.DOTALL | re.MULTILINE)
    assert found
    system = re.search('SYSTEM "(.*?)"', text)
    assert (system and system[1]) == ("Be brief." if name == "chatml" else None)
    for roles in CONVERSATIONS:
        messages = [{"role": ROLES[r], "content": f"{i}: {r}\nof"} for i, r in enumerate(roles)]
        own = [{"role": "system", "content": system[1]}] if system and roles[0] != "s" else []
        assert go(found[1], own + messages) == render(messages, True)
    assert text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop """a"b"""\nPARAMETER num_ctx 128\n' in text


def test_the_story_model() -> None:
    template = load_chat_template(default_checkpoint())
    assert template is not None
    turns = take_apart(lambda m, p: template.render(m, add_generation_prompt=p))
    assert turns is not None
    assert turns.behind == dict.fromkeys(ROLES.values(), "<|endoftext|>")
    assert turns.asks == "<|im_start|>assistant\n"


STRANGE: dict[str, Any] = {
    "opens": "{% for m in messages %}{{ m.role }}{{ '{' }}{{ m.content }}.{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}",
    "counts": "{% for m in messages %}{{ loop.index }}{{ m.content }};{% endfor %}",
    "refuses": "{{ raise_exception('no system turns') }}",
    "first": "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ m.content }}.{% endfor %}",
    "quotes": '{% for m in messages %}"""{{ m.role }}{{ m.content }}.{% endfor %}',
    "begins": "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% else %}[{{ m.role }}]{{ m.content }};{% endif %}{% endfor %}",
    "drops thoughts": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }};"
    "{% endfor %}",
    "shortens": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %};{% endfor %}",
}


@pytest.mark.parametrize("name", STRANGE)
def test_templates_of_another_form(name: str) -> None:
    """No template is better than a wrong one: a comment says so."""
    assert take_apart(jinja(STRANGE[name])) is None
    text = modelfile("m.gguf", ["x"], 8192, jinja(STRANGE[name]))
    assert "TEMPLATE" not in text
    assert "SYSTEM" not in text
    assert "num_ctx" not in text
    assert text.splitlines()[-2].startswith("# The model's chat template")


def test_nothing_of_a_stranger_becomes_an_instruction() -> None:
    with pytest.raises(MespRefError, match="without line ends"):
        modelfile("m\nFROM other.gguf", [], 8192, None)
    with pytest.raises(MespRefError, match="without line ends"):
        modelfile("m.gguf", [], 8192, None, "a\nADAPTER other.gguf")
    stops = ['"""\nFROM other', 'x"\nFROM other"', "a\nFROM b"]
    lines = modelfile("m.gguf", stops, 8192, None).splitlines()
    unsaid = "# An end token holds quotes that no Modelfile can: stop it in the request."
    assert lines == [
        "FROM ./m.gguf", unsaid, unsaid,
        'PARAMETER stop """a', 'FROM b"""', 'TEMPLATE "{{ .Prompt }}"',
    ]  # fmt: skip
    system = (
        "{%- if messages[0]['role'] != 'system' %}{{- '[system]a\"\"\"\nFROM b;' }}{%- endif %}"
    )
    assert take_apart(jinja(system + TEMPLATES["brackets"].replace("[/]", ";"))) is None


def test_without_a_template_and_for_an_adapter() -> None:
    text = modelfile("base.gguf", ["x"], 8192, None, adapter="a.gguf")
    assert text.splitlines() == [
        "# base.gguf: the base model, by mesp-ref convert gguf-model BASE base.gguf",
        "FROM ./base.gguf", "ADAPTER ./a.gguf", 'PARAMETER stop "x"', 'TEMPLATE "{{ .Prompt }}"',
    ]  # fmt: skip
