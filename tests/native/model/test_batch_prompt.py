"""Where a document stands in the prompt of a batch, with templates that trim, keep, or have no system role."""

from __future__ import annotations

import pytest
from contexts import OpenModel

from kvlocal.batch.documents import Document
from kvlocal.batch.prompt import Prompt
from kvlocal.models.template import chat_tokens

TURNS = "{% for m in messages %}</s>{{ m.role }}:\n{{ m.content }}</s>{% endfor %}assistant:"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
TEXTS = ("the hat", " the hat\n\n", "a</s>b", "\n\n</s>", "☂")


@pytest.mark.parametrize("source", [TURNS, TURNS.replace("m.content", "m.content | trim"), NO_SYSTEM])
@pytest.mark.parametrize("system", [None, "Be </s> brief."])
@pytest.mark.parametrize("instruction", ["", "Sum </s>."])
def test_it_is_that_of_a_conversation(open_model: OpenModel, source: str, system: str | None, instruction: str) -> None:
    model = open_model(chat_template=source)
    prompt = Prompt(system, instruction)
    frame = prompt.frame(model)
    start = [{"role": "system", "content": system}] if system else []
    for text in TEXTS:
        question = f"{instruction}\n\n{text}" if instruction else text
        want = chat_tokens(model, [*start, {"role": "user", "content": question}])
        found = [*frame.before, *prompt.tokens(model, Document("d", "d", text), frame)]
        assert found.count(2) == want.count(2)
        assert model.detokenize(found) == model.detokenize(want)
    assert (frame.note is not None) == (source == NO_SYSTEM and system is not None)


def test_a_raw_prompt_has_bos_once_and_no_control_tokens(open_model: OpenModel) -> None:
    model = open_model(add_eos=True)
    for instruction in ("", "Sum </s>."):
        prompt = Prompt(None, instruction, raw=True)
        frame = prompt.frame(model)
        tokens = [*frame.before, *prompt.tokens(model, Document("d", "d", "a</s>b"), frame)]
        assert tokens[0] == 1 and tokens.count(1) == 1 and 2 not in tokens
