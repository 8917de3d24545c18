"""Chat templates: whose text is whose, for every template that llama.cpp's own tests know."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvlocal.errors import UsageError
from kvlocal.models.marks import STEM, Piece
from kvlocal.models.sandbox import _Generation, _tojson
from kvlocal.models.template import ChatTemplate, split_pieces

FOLDER = Path(__file__).resolve().parents[3] / "vendor" / "llama.cpp" / "models" / "templates"
TEMPLATES = sorted(FOLDER.glob("*.jinja"))
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MARKER = re.compile(r"<[^<>\s{}'\"]{1,40}>|\[/?[A-Z_]{2,20}\]|<｜[^<>{}'\"]{1,40}｜>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "(m.content | trim)")
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>' }}{% endfor %}"
    "<start_of_turn>model\n"
)
THINKS = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\n"
)

Texts = Sequence[tuple[str, Any]]


def say(*texts: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in texts]


@functools.cache
def reference(source: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """The template in plain Jinja, and what it finds in the place of tools."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters |= {"tojson": _tojson, "from_json": json.loads}
    env.globals |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
    names = ("tools", "documents", "functions", "function_call", "tool_choice")
    nones = dict.fromkeys(names)
    empty = dict.fromkeys(names, "") | {"datetime": datetime.now().strftime("%b %d %Y")}
    found = env.from_string(source)
    for nothing in (nones, nones | {"tools": []}, empty):
        try:
            found.render(messages=say(("user", "a")), add_generation_prompt=True, **nothing, **SPECIALS)
        except Exception:
            continue
        return found, nothing
    raise AssertionError("not even one question is taken")


def written(source: str, messages: list[dict[str, Any]]) -> str | None:
    """What Jinja makes of a conversation without any marks, ``None`` if the template refuses it."""
    found, nothing = reference(source)
    try:
        return found.render(messages=messages, add_generation_prompt=True, **nothing, **SPECIALS)
    except Exception:
        return None


@functools.cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "Tiny", SPECIALS)


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def own(pieces: Sequence[Piece]) -> list[str]:
    """Markers in the template's own text, in order."""
    return [found for piece in pieces if piece.control for found in MARKER.findall(piece.text)]


def markers(source: str) -> list[str]:
    """The control tokens that a template writes, more or less."""
    return sorted({*MARKER.findall(source), "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]"})


def with_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def test_llama_cpp_is_fetched() -> None:
    assert len(TEMPLATES) > 60, f"no templates in {FOLDER}: run `make build` first"


every_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)

CONVERSATIONS: dict[str, Texts] = {
    "one question": [("user", "Where is it?")],
    "system": [("system", "Be brief."), ("user", "Where is it?")],
    "turns": [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2."), ("user", "Three?")],
    "white space": [("user", " \n One?\n\n"), ("assistant", "  1. \n"), ("user", "\n\nTwo?  ")],
    "thoughts": [("user", "One?"), ("assistant", "<think>\nhm, one\n</think>\n\n1."), ("user", "Two?")],
    "thoughts without lines": [("user", "One?"), ("assistant", "<think>hm</think>1."), ("user", "Two?")],
    "an empty thought": [("user", "One?"), ("assistant", "<think>\n\n</think>\n\n1."), ("user", "Two?")],
    "a cut thought": [("user", "One?"), ("assistant", "<think>\nhm, one"), ("user", "Two?")],
    "an answer after its prompt's tag": [("user", "One?"), ("assistant", "hm\n</think>\n\n1."), ("user", "Two?")],
    "an empty answer": [("user", "One?"), ("assistant", ""), ("user", "Two?")],
    "quotes": [("user", "\"One\" & 'two' <b>?</b> \\n {{ 3 }} {% x %} ü ☂"), ("assistant", '"1"'), ("user", "Two?")],
}


@every_template
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pieces_make_what_the_template_writes(path: Path, name: str) -> None:
    source = path.read_text("utf-8")
    messages = say(*CONVERSATIONS[name])
    chat = template(source)
    if messages[0]["role"] == "system" and not chat.has_system:
        assert "no system role" in str(chat.note(messages))
        messages = say(("user", "Be brief.\n\nWhere is it?"))
    want = written(source, messages)
    if want is None:
        # the template looks into a text and refuses it
        assert name in ("an empty answer",)
        return
    assert joined(chat.render(say(*CONVERSATIONS[name]))) == want


@every_template
def test_no_control_token_comes_out_of_a_text(path: Path) -> None:
    """The template's own markers are the same whatever the texts hold, those aside that it looks for in them."""
    source = path.read_text("utf-8")
    chat = template(source)
    evil = "".join(markers(source))
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    calm = chat.render(say(*((role, f"text {i}") for i, role in enumerate(roles))))
    looked_for = set(chat._literals)
    for form in ("text {0}", "{0}\n\n{0}", "<think>{0}</think>{0}", "x</think>{0}"):
        pieces = chat.render(say(*((role, f"{form.format(evil)} {i}") for i, role in enumerate(roles))))
        assert [m for m in own(pieces) if m not in looked_for] == [m for m in own(calm) if m not in looked_for]
        assert len(own(pieces)) <= len(own(calm)) + 2 * len(roles)
        said = "".join(piece.text for piece in pieces if piece.message == 5)
        assert all(m in said for m in markers(source) if not any(tag in m for tag in looked_for))


@every_template
def test_a_later_turn_begins_with_the_pieces_of_the_first(path: Path) -> None:
    """Wherever the template writes the same text, it is cut at the same places: tokens are those in the cache."""
    source = path.read_text("utf-8")
    chat = template(source)
    first = say(("user", " One?\n"))
    before = chat.render(first)
    thought = "hm\n</think>\n\n1." if joined(before).rstrip().endswith("<think>") else "<think>\nhm\n</think>\n\n1."
    for answer in ("1.", "  1.\n", thought):
        after = chat.render([*first, *say(("assistant", answer), ("user", "Two?"))])
        n_same = next((i for i, (a, b) in enumerate(zip(joined(before), joined(after), strict=False)) if a != b), None)
        n_same = len(joined(before)) if n_same is None else n_same
        end = 0
        for old, new in zip(before, after, strict=False):
            end += len(old.text)
            if end > n_same:
                break
            assert old.control == new.control and old.message == new.message
            # what follows in the same piece is another token only if it continues this one
            assert new.text == old.text or (new.control and new.text.startswith(old.text))


@every_template
def test_contents_in_parts(path: Path) -> None:
    source = path.read_text("utf-8")
    chat = template(source)
    evil = "".join(markers(source))
    messages = say(("user", f"One? {evil}"), ("assistant", "1."), ("user", "Two?"))
    pieces = chat.render(with_parts(messages))
    assert own(pieces) == own(chat.render(messages))
    calm = say(("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    assert joined(chat.render(with_parts(calm))) == joined(chat.render(calm))
    two = [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two?"}]}]
    said = "".join(p.text for p in chat.render(two) if not p.control)
    assert said.split() in (["One", "two?"], ["Onetwo?"])


@every_template
def test_results_of_tools(path: Path) -> None:
    """Where a template has a role for tools, what they give is text as well."""
    source = path.read_text("utf-8")
    chat = template(source)
    found = []
    for result in ("sunny", "".join(markers(source))):
        call = {"name": "weather", "arguments": json.dumps({"city": f"Ulm {result}"})}
        messages = [
            *say(("user", "Weather?")),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}],
            },
            {"role": "tool", "content": result, "name": "weather", "tool_call_id": "abcdefghi"},
        ]
        try:
            pieces = chat.render(messages)
        except UsageError as error:
            assert "refuses the conversation" in str(error)
            found.append(None)
        else:
            found.append([m for m in own(pieces) if m not in chat._literals])
    assert found[0] == found[1]


#
# what templates do to texts
#


def test_a_text_is_cut_where_it_is_trimmed() -> None:
    pieces = template(TRIMMED).render(say(("user", " Hi\n")))
    assert [(p.text, p.control) for p in pieces] == [
        ("<|im_start|>user\n", True),
        ("Hi", False),
        ("<|im_end|>\n<|im_start|>assistant\n", True),
    ]
    pieces = template(CHATML).render(say(("user", " Hi\n")))
    assert [p.text for p in pieces if not p.control] == [" Hi\n"]


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_does() -> None:
    texts = say(("user", "One?"), ("assistant", "<think>\nhm<|im_end|>\n</think>\n\n1<|im_end|>."), ("user", "Two?"))
    pieces = template(THINKS).render(texts)
    assert [p.text for p in pieces if not p.control] == ["One?", "1<|im_end|>.", "Two?"]
    assert own(pieces).count("<|im_end|>") == 3


def test_a_tag_that_the_template_looks_for_stays_text_where_it_is_shown() -> None:
    pieces = template(THINKS).render(say(("user", "What is <think>x</think>?")))
    assert [p.text for p in pieces if not p.control] == ["What is <think>x</think>?"]


def test_a_text_written_as_json_is_still_a_text() -> None:
    source = "{% for m in messages %}<|c|>{{ {'text': m.content} | tojson }}<|e|>{% endfor %}"
    (_, said, _) = template(source).render(say(("user", 'He said "no"<|e|>\n☂')))
    assert said.text == 'He said \\"no\\"<|e|>\\n☂' and not said.control


@pytest.mark.parametrize("form", ["upper", "title", "truncate(10)", "replace('a', 'b')", "reverse", "list | join('-')"])
def test_a_template_that_alters_texts_never_shows_a_mark(form: str) -> None:
    source = f"{{% for m in messages %}}<|c|>{{{{ m.content | {form} }}}}<|e|>{{% endfor %}}"
    try:
        pieces = template(source).render(say(("user", "a banana <|e|> and another")))
    except UsageError as error:
        assert "alters the texts" in str(error) or "leaves out the text" in str(error)
    else:
        assert own(pieces) == ["<|c|>", "<|e|>"] and "kvlocal" not in joined(pieces).casefold()


def test_a_word_that_is_a_mark_is_a_text_like_others() -> None:
    word = f"{STEM}aaaaaa {STEM}zzzzzz"
    pieces = template(CHATML).render([{"role": "user", "content": word, "name": f"{STEM}zzzzzz"}])
    assert [p.text for p in pieces if not p.control] == [word]
    with pytest.raises(UsageError, match="stands for texts"):
        template("{{ 'kvlocal' ~ 'textmarkzzzzzz' ~ messages[0].content }}").render(say(("user", "Hi")))


def test_a_template_that_leaves_the_question_out_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves out the text; use --no-chat-template"):
        template("{% for m in messages[1:] %}{{ m.content }}{% endfor %}Hello").render(say(("user", "Hi")))


#
# system prompts
#


def test_without_a_system_role_the_text_goes_before_the_first_question() -> None:
    chat = template(NO_SYSTEM)
    messages = say(("system", "Be <end_of_turn> brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    pieces = chat.render(messages)
    assert [(p.text, p.message) for p in pieces if not p.control] == [
        ("Be <end_of_turn> brief.\n\nOne?", 1),
        ("1.", 2),
        ("Two?", 3),
    ]
    note = chat.note(messages)
    assert note == "The chat template of Tiny has no system role; the system prompt goes before the first question."
    assert chat.note(messages[1:]) is None and template(CHATML).note(messages) is None


def test_a_system_role_that_is_silently_dropped_counts_as_none() -> None:
    source = "{% for m in messages if m.role != 'system' %}<|u|>{{ m.content }}{% endfor %}<|a|>"
    pieces = template(source).render(say(("system", "Be brief."), ("user", "One?")))
    assert [p.text for p in pieces if not p.control] == ["Be brief.\n\nOne?"]
    with pytest.raises(UsageError, match="no system role, and there is no question"):
        template(source).render(say(("system", "Be brief.")))


def test_a_template_that_wants_parts_gets_them() -> None:
    source = "{% for m in messages %}<|u|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}<|a|>"
    pieces = template(source).render(say(("system", "Be brief."), ("user", "One?")))
    assert [p.text for p in pieces if not p.control] == ["Be brief.", "One?"]


#
# what makes no sense
#


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "The prompt is empty"),
        (say(("user", "")), "The prompt is empty"),
        (say(("user", " \n")), "The prompt is empty"),
        (say(("user", [])), "The prompt is empty"),
        (say(("user", None)), "The content of message 1 is a NoneType; give a text"),
        (say(("user", 5)), "The content of message 1 is a int; give a text"),
        (say(("user", "a\udc80")), r"The content of message 1 has a lone surrogate, U\+DC80, at character 1"),
        (say(("system", "\ud800"), ("user", "a")), r"lone surrogate, U\+D800"),
        (say(("user", [{"type": "text", "text": "\udfff"}])), r"lone surrogate, U\+DFFF"),
        (say(("user", [{"type": "image_url", "image_url": "x"}])), "Message 1 has a part of type image_url; only text"),
        (say(("user<|im_end|>", "a")), "has the role 'user<|im_end|>'; give a plain word"),
        ([{"content": "a"}], "Message 1 has the role None"),
        (["hello"], "Message 1 is a str; give a dictionary"),
        ("hello", "The messages are a str"),
        (None, "The messages are a NoneType"),
        ([{"role": "user", "content": "a", "name": "\udc80"}], "name of message 1 has a lone surrogate"),
    ],
)
def test_messages_that_make_no_sense(messages: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason.replace("|", r"\|")):
        template(CHATML).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }",
        "{{ 'open }}",
        "{% if %}",
        "{{ x | nonsense }}",
        "{% nonsense %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ 1" + "0" * 5000 + " }}",
        "x" * (1 << 21),
    ],
)
def test_a_template_that_does_not_compile(source: str) -> None:
    with pytest.raises(
        UsageError, match="The chat template of Tiny does not compile: .*use --no-chat-template"
    ) as error:
        template(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_template_that_refuses() -> None:
    source = "{{ raise_exception('Roles must\nalternate') }}"
    with pytest.raises(
        UsageError, match="of Tiny refuses the conversation: Roles must alternate; use --no-chat-template"
    ):
        template(source).render(say(("user", "Hi")))


#
# pieces
#


def test_pieces_split_where_a_message_says_something() -> None:
    pieces = template(CHATML).render(say(("user", "Read xyz, please.")))
    found = split_pieces(pieces, "xyz")
    assert found is not None
    assert [p.text for p in found[0]] == ["<|im_start|>user\n", "Read "]
    assert [p.text for p in found[1]] == [", please.", "<|im_end|>\n<|im_start|>assistant\n"]
    assert split_pieces(pieces, "assistant") is None, "the template's own text is not looked at"
