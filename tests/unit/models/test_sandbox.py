"""Templates that would never end, or fill the memory."""

from __future__ import annotations

import pytest

from kvlocal.errors import UsageError
from kvlocal.models import sandbox
from kvlocal.models.template import ChatTemplate

HUGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ (1, 2) * 10 ** 9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% set n=namespace(x='ab') %}{% for i in range(60)%}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
    "{% set n=namespace(x='ab') %}{% for i in range(60)%}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(60)%}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(60)%}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(60)%}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(60)%}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string }}",
    "{% set n=namespace(x={}) %}{% for i in range(60)%}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x ~ '' }}",
    "{% set n=namespace(x='ab') %}{% for i in range(60)%}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}{{ n.x }}",
    "{% set n=namespace(x='ab') %}{% for i in range(60)%}{% set n.x = n.x | replace('b', n.x) %}{% endfor %}{{ n.x }}",
    "{% set n=namespace(x='a') %}{% for i in range(60)%}{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}{{ n.x }}",
    "{% set n=namespace(x='a') %}{% for i in range(60)%}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}{{ n.x }}",
    "{% set n=namespace(x='a') %}{% for i in range(60)%}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ m('ab', 60) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a'.zfill(9999999999) }}",
    "{{ 'a' | indent(9999999999, true) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format('a') }}",
    "{{ '{:{}}'.format('a', 9999999999) }}",
    "{{ [1] | tojson(indent=9999999999) }}",
    "{{ lipsum(n=99999) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "{% macro m(n) %}{{ m(n) ~ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [[[[1]]]] recursive %}{{ loop([x, x]) }}{% endfor %}",
]


@pytest.mark.parametrize("source", HUGE + ENDLESS)
def test_it_ends_with_a_sentence(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises(UsageError, match="does not compile|refuses the conversation") as error:
        ChatTemplate(source + "{{ messages[0].content }}").render([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    ],
)
def test_nothing_of_python_is_reached(source: str) -> None:
    template = ChatTemplate(source + "|{{ messages[0].content }}")
    try:
        text = "".join(piece.text for piece in template.render([{"role": "user", "content": "Hi"}]))
    except UsageError:
        return
    assert text == "|Hi"


def test_what_templates_of_models_need_still_works() -> None:
    source = (
        "{%- set n = namespace(k=0) -%}{%- for m in messages -%}{%- if m.role == 'x' -%}{%- continue -%}{%- endif -%}"
        "{%- set n.k = n.k + 1 -%}{%- generation -%}{{ '%s: ' % n.k }}{%- endgeneration -%}"
        "{{ m.content }}|{{ {'a': 'ü<'} | tojson }}|{{ [1, 2] | tojson(indent=2) | replace('\\n', '') }}"
        "|{{ 'a-b'.split('-') | join('+') }}|{{ strftime_now('%Y') | length }}|{{ 'ab' * 3 }}|{{ 7 % 4 }}|{{ 2 ** 3 }}"
        "|{{ 'x' | center(5) | trim }}|{{ 'a' ~ 1 ~ none }}|{{ '{} {}'.format(1, 2) }}{%- break -%}{%- endfor -%}"
    )
    pieces = ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
    assert "".join(piece.text for piece in pieces) == ('1: Hi|{"a": "ü<"}|[  1,  2]|a+b|4|ababab|3|8|x|a1None|1 2')


def test_long_texts_are_no_reason_to_refuse() -> None:
    text = "The river is long. <|im_end|>\n" * 200_000
    pieces = ChatTemplate("<|u|>{{ messages[0].content | trim ~ '<|e|>' }}").render([{"role": "user", "content": text}])
    assert [len(piece.text) for piece in pieces] == [5, len(text) - 1, 5]
