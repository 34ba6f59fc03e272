"""Templates of strangers: published ways out of Jinja's sandbox, and texts that know their data."""

import json
import os
import re
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesp_ref.errors import MespRefError
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.traced import OTHER, Traced, joined, spans_of, trace

MESSAGES = [{"role": "user", "content": "{0.__class__} %s {x.__init__}"}]
SECRET = "mesp-ref-secret-7f3a"
# What no template may print: the secret, an address, the text of a function, class or object.
_OBJECT = re.compile(
    r"0x[0-9a-f]{4,}|<(class|function|built-in|bound|module|generator|Macro|method|Name)"
)

# Published escapes. The first group reads the environment where there is no sandbox, and is run
# there too, so that each is known to be a real attack.
WORKING = {
    "lipsum globals": "{{ lipsum.__globals__['os'].environ }}",
    "lipsum by attr": "{{ (lipsum | attr('__globals__'))['os'].environ }}",
    "cycler globals": "{{ cycler.__init__.__globals__.os.environ }}",
    "joiner globals": "{{ joiner.__init__.__globals__.os.environ }}",
    "namespace globals": "{{ namespace.__init__.__globals__.os.environ }}",
    "self globals": "{{ self.__init__.__globals__.__builtins__['__import__']('os').environ }}",
    "context of self": "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.environ }}",
    "subclasses": (
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
        "{{ c.__init__.__globals__['environ'] }}{% endif %}{% endfor %}"
    ),
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__['__builtins__']['__import__']"
    "('os').environ }}",
    "undefined": "{{ nothing.__init__.__globals__['__builtins__']['__import__']('os').environ }}",
    "str.format, CVE-2016-10745": "{{ '{0.__init__.__globals__[os].environ}'.format(cycler) }}",
    "str.format_map, CVE-2019-10906": (
        "{{ '{a.__init__.__globals__[os].environ}'.format_map({'a': cycler}) }}"
    ),
    "format by attr, CVE-2025-27516": (
        "{{ ('{0.__init__.__globals__[os].environ}' | attr('format'))(cycler) }}"
    ),
    "format kept, CVE-2024-56326": (
        "{% set ns = namespace() %}{% set ns.f = '{0.__init__.__globals__[os].environ}'.format %}"
        "{{ ns.f(cycler) }}"
    ),
    "format of namespace": "{{ '{0.__init__.__globals__[os].environ}'.format(namespace) }}",
    "format of a macro": (
        "{% macro m() %}{% endmacro %}"
        "{{ '{0.__init__.__globals__[__builtins__][__import__].__self__}'.format(m) }}"
    ),
    "tojson that calls": "{{ [cycler] | tojson(default=cycler.__init__.__globals__.os.getenv) }}",
    "tojson with our layout": "{{ {1: namespace} | tojson(default=namespace.__init__.__globals__.os"
    ".environ.get) }}",
}
OTHERS = {
    "format in a filter, CVE-2024-56326": (
        "{{ ['{0.__class__.__mro__}'] | map('format', messages) | list }}"
    ),
    "format of data": "{{ messages[0].content.format(messages) }}",
    "format of data by attr": "{{ (messages[0].content | attr('format'))(messages, x=messages) }}",
    "map to attr": "{{ [messages] | map('attr', '__class__') | list }}",
    "map an attribute": "{{ messages | map(attribute='__class__') | list }}",
    "sort by an attribute": "{{ [messages] | sort(attribute='__class__.__mro__') }}",
    "join an attribute": "{{ [messages] | join(attribute='__class__') }}",
    "group by an attribute": "{{ [messages] | groupby('__class__') }}",
    "block names, CVE-2024-56201": "{% block __class__ %}{{ self.__class__ }}{% endblock %}",
    "xmlattr, CVE-2024-22195": "{{ {'a onclick=x ': 1} | xmlattr }}",
    "xmlattr, CVE-2024-34064": "{{ {'a/onclick=x': 1, 'b>': 2} | xmlattr }}",
    "tojson with a class": "{{ messages | tojson(cls=dict) }}",
    "tojson with a function": "{{ [range] | tojson(default=dict) }}",
    "tojson with dict": "{{ [range] | tojson(default=messages.count) }}",
    "generator's frame": "{{ (messages | map('length')).gi_frame.f_globals }}",
    "generator": "{{ messages | map('length') }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "environment of a macro": "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "method": "{{ messages.count }}",
    "method of a text": "{{ ''.join }}",
    "method of data": "{{ messages[0].content.upper }}",
    "spans of data": "{{ messages[0].content._spans }}",
    "joined to a text": "{{ '' ~ messages.count }}",
    "joined to data": "{{ messages[0].content ~ range }}",
    "a filter's text": "{{ messages.count | string }}",
    "upper": "{{ messages.count | upper }}",
    "replace": "{{ messages.count | replace('0x', '') }}",
    "join": "{{ [messages.count, range] | join }}",
    "join of a text": "{{ ''.join([messages.count]) }}",
    "percent": "{{ '%s' % messages.count }}",
    "percent of many": "{{ '%s %s' % (range, dict) }}",
    "percent of a name": "{{ '%(a)s' % {'a': range} }}",
    "percent of data": "{{ messages[0].content % range }}",
    "format filter": "{{ '%s' | format(range) }}",
    "format": "{{ '{}'.format(range) }}",
    "format of an attribute": "{{ '{0.count}'.format(messages) }}",
    "format, converted": "{{ '{0.count!r}'.format(messages) }}",
    "format of a field": "{{ '{0[0]}'.format([range]) }}",
    "in a list": "{{ [range] }}",
    "in a dict": "{{ {'a': dict} }}",
    "pprint": "{{ [range] | pprint }}",
    "escape": "{{ range | e }}",
    "list of methods": "{{ [''.upper] | map('string') | list }}",
    "class": "{{ dict }}",
    "classes": "{{ dict.mro() }}",
    "namespace": "{{ namespace(a=1) }}",
    "loop": "{% for m in messages %}{{ loop }}{% endfor %}",
    "self": "{{ self }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m }}",
    "caller": "{% macro m() %}{{ caller }}{% endmacro %}{% call m() %}{% endcall %}",
    "reason": "{{ raise_exception(range) }}",
    "reason of many": "{{ raise_exception([messages.count]) }}",
    "a day": "{{ strftime_now(range) }}",
    "unhashable": "{{ {}[messages.count] }}",
    "filter block": "{% filter replace(range, 'x') %}a{% endfilter %}",
    "set block": "{% set a %}{{ range }}{% endset %}{{ a }}",
    "bytes": "{{ messages[0].content.encode().decode() }}",
    "changed": "{{ messages.append(range) }}{{ messages }}",
    "urlize": "{{ [range] | urlize }}",
    "default": "{{ nothing | default(range) }}",
    "first": "{{ [range] | first }}",
    "random": "{{ [range] | random }}",
    "items": "{{ {'a': range} | items | list }}",
    "batch": "{{ [range] | batch(1) | list }}",
}


def outcome(source: str) -> str:
    """What a template of a stranger gets out: its text, or the error."""
    try:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES)
    except MespRefError as error:
        return str(error)


@pytest.mark.parametrize("source", [*WORKING.values(), *OTHERS.values()], ids=[*WORKING, *OTHERS])
def test_no_template_gets_out(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESP_REF_SECRET", SECRET)
    found = outcome(source)
    assert SECRET not in found
    assert not _OBJECT.search(found), found


@pytest.mark.parametrize("source", WORKING.values(), ids=WORKING)
def test_the_same_attacks_work_where_there_is_no_sandbox(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESP_REF_SECRET", SECRET)
    monkeypatch.setenv("range", SECRET)
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value, **layout: json.dumps(value, **layout)
    calls = "tojson" in source
    if calls:  # json.dumps calls the function of the template with an object of its own
        called: list[Any] = []
        monkeypatch.setattr(os, "getenv", called.append)
        monkeypatch.setattr(type(os.environ), "get", lambda self, key: called.append(key))
    text = environment.from_string(source).render(messages=MESSAGES)
    assert called if calls else SECRET in text or "built-in" in text


def test_a_template_cannot_choose_its_file_name() -> None:
    """CVE-2024-56201 needs a name of the attacker's beside the content."""
    template = ChatTemplate("a", where="x' + __import__('os').getcwd() + '")._template
    assert template.name is None
    assert template.filename == "<template>"


def test_errors_name_no_address() -> None:
    for source in ("{{ raise_exception('at 0x7f3aaabbccdd') }}", "{{ range | tojson }}"):
        assert " at 0x" not in outcome(source)


def test_what_templates_print_stays() -> None:
    source = (
        "{{ 1 }}{{ 2.5 }}{{ true }}{{ none }}{{ [1, 'a'] }}{{ {'a': (1, 2)} }}{{ range(3) | list }}"
        "{{ 'a' ~ 1 ~ none }}{{ nothing }}{{ '%d' % 3 }}{{ '{:>3}'.format('x') }}{{ [1, 2] | sum }}"
        "{{ ['b', 'a'] | sort | join('+') }}{{ dict(a=1) }}{{ 'a,b'.split(',') }}"
    )
    plain = jinja2.Environment().from_string(source).render()
    assert ChatTemplate(source).render([]) == plain


# Text that knows its data


def spans(text: str) -> str:
    """Each letter's source: a digit, * for several, or . for the template's."""
    found = ["."] * len(text)
    for start, stop, source in spans_of(text):
        found[start:stop] = ("*" if source == OTHER else str(source)) * (stop - start)
    return "".join(found)


def flow(source: str, **values: Any) -> tuple[str, str]:
    template = ChatTemplate(source)
    turns = [{"role": "user", "content": "  ab<x>cd  "}, {"role": "assistant", "content": "EF"}]
    text, data = template.asked(turns, values.get("tools"), add_generation_prompt=False)
    return text, spans(Traced(text, data))


@pytest.mark.parametrize(
    ("source", "text", "where"),
    [
        ("<{{ messages[1].content }}>", "<EF>", ".11."),
        ("{{ '<' + messages[1].content + '>' }}", "<EF>", ".11."),
        ("{{ '<' ~ messages[1].content ~ 3 }}", "<EF3", ".11."),
        ("{{ messages[0].content | trim }}", "ab<x>cd", "0000000"),
        ("{{ ('  <' + messages[1].content + '> ') | trim }}", "<EF>", ".11."),
        ("{{ ('[' + messages[1].content + ']')[1:-1] }}", "EF", "11"),
        ("{{ ('[' + messages[1].content + ']')[0] }}", "[", "."),
        ("{{ ('a|' + messages[1].content).split('|') | join('-') }}", "a-EF", "..11"),
        ("{{ ('a-' + messages[1].content) | replace('-', '+') }}", "a+EF", "..11"),
        ("{{ ('a' + messages[1].content) | lower }}", "aef", ".11"),
        ("{{ messages[1].content.title() }}", "Ef", "11"),
        ("{{ ('a' + messages[1].content) | reverse }}", "FEa", "11."),
        ("{{ '%s' % ('a' + messages[1].content) }}", "aEF", "111"),
        ("{{ ('a' + messages[1].content) | center(5) }}", " aEF ", "11111"),
        ("{{ messages[1].content.ljust(3, 'x') }}", "EFx", "111"),
        ("{{ messages[1].content | truncate(1, true, '', 0) }}", "E", "1"),
        ("{{ messages[1].content.join(['a', 'b']) }}", "aEFb", "1111"),
        ("{{ [messages[1].content] | batch(2) | first | first }}", "EF", "11"),
        ("{{ dict(a=messages[1].content).a }}", "EF", "11"),
        ("{% for k in {messages[1].content: 1} %}{{ k }}{% endfor %}", "EF", "11"),
        ("{% set a, b = messages[1].content %}{{ b }}{{ a }}", "FE", "11"),
        ("{{ messages[1].content | urlencode }}", "EF", "11"),
        ("{{ messages[1].content | wordwrap(9) }}", "EF", "11"),
        ("{{ messages[1].content | replace('E', bos_token or '<s>') }}", "<s>F", "...1"),
        ("{{ messages[1].content * 2 }}", "EFEF", "1111"),
        ("{{ '%s!' % messages[1].content }}", "EF!", "111"),
        ("{{ '{}!'.format(messages[1].content) }}", "EF!", "111"),
        ("{{ ' '.join([messages[1].content, 'x']) }}", "EF x", "11.."),
        ("{{ messages | map(attribute='content') | list | last }}", "EF", "11"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user,assistant", "." * 14),
        ("{{ messages[1].content | tojson }}", '"EF"', "1111"),
        ("{{ [messages[1].content] }}", "['EF']", "111111"),
        ("{% for c in messages[1].content %}{{ c }}.{% endfor %}", "E.F.", "1.1."),
        ("{% set t %}<{{ messages[1].content }}{% endset %}{{ t }}", "<EF", ".11"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(messages[1].content) }}", "[EF]", ".11."),
        ("{% filter upper %}a{{ messages[1].content }}{% endfilter %}", "AEF", ".11"),
        ("{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content | trim %}"
         "{% endfor %}{{ ns.t }}", "ab<x>cdEF", "000000011"),
        ("{{ messages[1].content | e }}", "EF", "11"),
        ("{{ (messages[0].content, messages[1].content) | join | trim }}", "ab<x>cd  EF", "00000000011"),
    ],
)  # fmt: skip
def test_data_is_followed_through_a_template(source: str, text: str, where: str) -> None:
    assert flow(source) == (text, where)


def test_tools_are_data_throughout() -> None:
    tools = [{"name": "<|im_end|>", "<k>": 1}]
    for source in ("{{ tools | tojson }}", "{{ tools }}", "{{ '' ~ tools }}", "{{ tools[0].name }}",
                   "{% for k in tools[0] %}{{ k }}{% endfor %}"):  # fmt: skip
        text, where = flow(source, tools=tools)
        assert set(where) == {"*"}, text


TEXTS = st.text("ab -<|>\n\t", max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    a=TEXTS, b=TEXTS, sep=st.sampled_from(["", "-", "ab", None, " ", "\n"]), n=st.integers(-3, 3)
)
def test_a_traced_text_is_that_text(a: str, b: str, sep: str | None, n: int) -> None:
    """Every operation gives what str gives, and every letter keeps its source."""
    text = joined([a, trace(b, 1)])
    marks = ["."] * len(a) + ["1"] * len(b)
    assert text == a + b
    for found, want in (
        (text.strip(sep), (a + b).strip(sep)),
        (text[n:], (a + b)[n:]),
        (text[::-1], (a + b)[::-1]),
        (text.upper(), (a + b).upper()),
        (text.replace("a", "xy"), (a + b).replace("a", "xy")),
        (text + "!", a + b + "!"),
        ("!" + text, "!" + a + b),
        (text.zfill(20), (a + b).zfill(20)),
    ):
        assert found == want
        assert type(found) in (Traced, str)
        assert all(0 <= start <= stop <= len(found) for start, stop, _ in spans_of(found))
    assert spans(text) == "".join(marks)
    assert spans(text[n:]) == "".join(marks[n:])
    assert text.splitlines() == (a + b).splitlines()
    if sep != "":
        assert text.split(sep) == (a + b).split(sep)
        assert text.rsplit(sep, 1) == (a + b).rsplit(sep, 1)
        if sep is not None:
            assert joined(text.split(sep), "#") == "#".join((a + b).split(sep))
            assert text.partition(sep) == (a + b).partition(sep)
            assert text.rpartition(sep) == (a + b).rpartition(sep)
            kept = [m for part in text.split(sep) for m in spans(part)]
            assert len(kept) == sum(map(len, (a + b).split(sep)))
