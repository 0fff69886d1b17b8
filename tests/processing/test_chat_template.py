"""Where templates are found, what they see, and that hostile ones end quickly."""

import json
import time

import pytest

from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing.chat_template import ChatTemplate, find_template

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hé <b>"}]}]
GROW = "{% set n = namespace(x=START) %}{% for i in range(90) %}{% set n.x = STEP %}{% endfor %}"
HOSTILE = {
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "captured": "{% set y %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "product": "{{ 'x' * 10**9 }}",
    "product of lists": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "sums": GROW.replace("START", "'x'").replace("STEP", "n.x + n.x"),
    "joins": GROW.replace("START", "'x'").replace("STEP", "n.x ~ n.x"),
    "lists": GROW.replace("START", "[1]").replace("STEP", "[n.x, n.x]") + "{{ n.x }}",
    "dicts": GROW.replace("START", "1").replace("STEP", "{'a': n.x, 'b': n.x}")
    + "{{ n.x|tojson }}",
    "padding": "{{ 'x'.center(10**10) }}",
    "replace": "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
    "replace method": "{{ ('a' * 999999).replace('', 'b' * 999999) }}",
    "join": "{{ (['a'] * 999999) | join('b' * 999999) }}",
    "printf": "{{ '%999999999d' | format(1) }}",
    "printf star": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:{}}'.format(1, 10**9) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "range": "{{ range(10**9) | list }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "size": "x" * 300_000,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_template_is_refused_in_time(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessorError) as caught:
        ChatTemplate(source, "t").render(MESSAGES, {})
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)


def test_ordinary_template() -> None:
    source = (
        "{%- set n = namespace(last=0) -%}\n"
        "{% for m in messages if m.role != 'x' %}\n"
        "    {%- set n.last = loop.index0 %}{{ bos_token ~ m['role'] + ': ' }}"
        "{{ m.content | tojson }}{{ loop.last }}{{ '%02d' % loop.length }}\n"
        "{% endfor %}{% generation %}{{ ['a', n.last] | join('-') }}{% endgeneration %}"
        "{{ dict(k=1).items() | list }}{{ tools is none }}{{ 'a-b'.split('-')[-1] }}"
    )
    out = ChatTemplate(source, "t").render(MESSAGES, {"bos_token": "<s>", "tools": None})
    expected = '<s>user: [{"type": "text", "text": "hé <b>"}]True01\n'
    assert out == expected + "a-0[('k', 1)]Trueb"


def test_template_refuses_with_its_own_words() -> None:
    with pytest.raises(InputError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must\nalternate') }}", "t").render(MESSAGES, {})


def test_places_in_order(tmp_path) -> None:
    assert find_template(tmp_path) is None
    places = {
        "tokenizer_config.json": [
            {"name": "default", "template": "named"},
            {"name": "tool_use", "template": "x"},
        ],
        "processor_config.json": "processor",
        "chat_template.json": "json",
    }
    for name, value in places.items():
        (tmp_path / name).write_text(json.dumps({"chat_template": value}))
        found = find_template(tmp_path)
        assert found == ("named" if isinstance(value, list) else value, name)
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find_template(tmp_path) == ("jinja", "chat_template.jinja")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ProcessorError, match="UTF-8"):
        find_template(tmp_path)
