"""What a line that starts with a slash does in `kvlocal chat`."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kvlocal.errors import UsageError
from kvlocal.settings import N_PREDICT
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.backend.cache import evicted, read_rungs
from kvlocal_cli.commands.kv_map import picture_path, write_picture
from kvlocal_cli.terminal import prompt

if TYPE_CHECKING:
    from kvlocal_cli.commands.conversation import Conversation


@dataclass(frozen=True)
class Command:
    """A command: its arguments as the help shows them, what it does, and the function."""

    usage: str
    summary: str
    run: Callable[[Conversation, str], None]


def is_command(text: str) -> bool:
    """Whether a line begins with a slash and letters: /etc/hosts and // do not."""
    return re.match(r"/[A-Za-z][A-Za-z-]*(\s|$)", text) is not None


def run(talk: Conversation, line: str) -> None:
    """Obey a line that is a command, save for /exit."""
    name, *rest = line.split(maxsplit=1)
    command = COMMANDS.get(name)
    if command is None or command.run is _leave:
        raise UsageError(
            f"There is no command {name}; the commands are {', '.join(COMMANDS)}. "
            'A question that begins like one goes between """ and """.'
        )
    command.run(talk, rest[0].strip() if rest else "")


def _kv(talk: Conversation, rest: str) -> None:
    from kvlocal_cli.render.heads import layer_table, rungs_map

    rungs = read_rungs(talk.engine)
    if rungs is None:  # without eviction the engine runs on llama.cpp's own cache, which has no heads to tell apart
        talk.screen.line("Nothing is evicted with this policy: every head holds every token, in f16.")
    elif not rest:
        talk.screen.show(rungs_map(rungs))
    elif rest.isdecimal():
        if int(rest) >= len(rungs.layers):
            raise UsageError(f"There is no layer {rest}; the layers are 0 to {len(rungs.layers) - 1}.")
        talk.screen.show(layer_table(rungs, int(rest)))
    else:
        path = picture_path(_argument(rest, "/kv FILE.svg"))
        write_picture(path, rungs, talk.engine)
        talk.screen.line(f"The picture is in {path}.")


def _stats(talk: Conversation, _rest: str) -> None:
    from kvlocal_cli.render.report import stats_table

    if talk.answered:
        talk.screen.show(stats_table(talk.engine.report().as_dict()))
    else:
        talk.screen.line("There is no answer yet, so nothing was measured.")


def _regen(talk: Conversation, _rest: str) -> None:
    talk.turn(None)


def _undo(talk: Conversation, _rest: str) -> None:
    was_evicted = evicted(talk.engine)
    question = talk.chat.undo()
    if was_evicted and not talk.engine.sequences[0].tokens:
        talk.screen.line("What follows it was evicted, so the conversation is read again with your next question.")
    talk.transcript.note("The last turn was taken back.")
    talk.screen.line(f"Taken back: {_short(question)}")


def _read(talk: Conversation, rest: str) -> None:
    path = _argument(rest, "/read FILE")
    text = prompt.read_file(str(prompt.file_path(path))).strip()
    if not text:
        raise UsageError(f"'{path}' is empty.")
    talk.pending.append(text)
    n = len(talk.engine.tokenize(text, add_special=False))
    talk.screen.line(f"{path}: {n:,} tokens; they go before your next question.")


def _system(talk: Conversation, rest: str) -> None:
    if not rest:
        system = talk.chat.system
        talk.screen.line(f"The system prompt is: {system}" if system else "There is no system prompt.")
        return
    talk.chat.set_system("" if rest == "none" else rest)
    talk.transcript.note(f"System prompt: {rest}")
    talk.screen.line("The system prompt has changed; the conversation is read again with your next question.")
    talk.note()


def _set(talk: Conversation, rest: str) -> None:
    names = {field.name.replace("_", "-"): field for field in fields(talk.sampling)}
    if not rest:
        now = [f"{name} {getattr(talk.sampling, field.name):g}" for name, field in names.items()]
        talk.screen.line(", ".join([*now, f"n-predict {talk.n_predict}"]))
        return
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if name != "n-predict" and name not in names:
        raise UsageError(f"There is no setting {name}; the settings are {', '.join([*names, 'n-predict'])}.")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"/set {name} takes a number, not '{value.strip()}'.")
    if name == "n-predict":
        if number != int(number) or number < -1:
            raise UsageError(f"n-predict is {value.strip()}; it must be a whole number, -1 or more.")
        talk.n_predict = N_PREDICT.check(int(number))
    else:
        old: Any = getattr(talk.sampling, names[name].name)
        if isinstance(old, int) and number != int(number):
            raise UsageError(f"{name} is {value.strip()}; it must be a whole number.")
        talk.sampling = replace(talk.sampling, **{names[name].name: type(old)(number)})
    talk.screen.line(f"{name} is {number:g}.")


def _policy(talk: Conversation, rest: str) -> None:
    if not rest:
        talk.screen.line(f"The policy is {talk.engine.policy.name}, the budget {talk.engine.config.budget}.")
        return
    try:
        name, *pairs = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"/policy {rest}: {error}.") from None
    anew = backend.change_policy(talk.engine, name, pairs)
    _changed(talk, f"The policy is {name} from now on", anew)


def _budget(talk: Conversation, rest: str) -> None:
    if not rest:
        _policy(talk, "")
        return
    anew = backend.change_budget(talk.engine, rest)
    _changed(talk, f"The budget is {rest} from now on", anew)


def _changed(talk: Conversation, what: str, anew: bool) -> None:
    if anew:
        talk.chat.forget_cache()
        talk.screen.line(f"{what}; it needs another cache, so the conversation is read again with your next question.")
    else:
        talk.screen.line(f"{what}; it takes effect at the next eviction.")


def _save(talk: Conversation, rest: str) -> None:
    from kvlocal_cli.render.numbers import size

    path = _argument(rest, "/save FILE")
    talk.screen.line(f"Saved: {path}, {size(talk.chat.save(prompt.file_path(path)))}.")


def _load(talk: Conversation, rest: str) -> None:
    path = _argument(rest, "/load FILE")
    talk.chat.load(prompt.file_path(path))
    talk.screen.line(loaded(talk, path))
    talk.note()


def loaded(talk: Conversation, path: str) -> str:
    """What to say of a session that was loaded."""
    asked = sum(message["role"] == "user" for message in talk.chat.messages)
    turns = f"{asked} turn{'' if asked == 1 else 's'}"
    if talk.chat.dropped:
        return f"{path} goes on: {turns}; it is read again with your next question, because {talk.chat.dropped}."
    if talk.chat.left_out:
        return f"{path} goes on: {turns}. {talk.chat.left_out}"
    return f"{path} goes on: {turns}, {len(talk.engine.sequences[0].tokens):,} tokens read."


def _clear(talk: Conversation, _rest: str) -> None:
    talk.chat.clear()
    talk.answered = False
    talk.pending.clear()
    talk.transcript.note("The conversation was cleared.")
    talk.screen.line("The conversation is cleared.")


def _help(talk: Conversation, _rest: str) -> None:
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        talk.screen.line(f"{f'{name} {command.usage}':<{width}}  {command.summary}")
    talk.screen.line('"""  begins and ends a question of several lines')


def _leave(_talk: Conversation, _rest: str) -> None:
    """Never called: /exit ends the loop over the lines."""


def _argument(rest: str, usage: str) -> str:
    """A file name; quotes around one with spaces are taken off."""
    if not rest:
        raise UsageError(f"A file is missing: {usage}.")
    return rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "\"'" else rest


def _short(text: str, n: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n else f"{line[: n - 1]}…"


COMMANDS = {
    "/kv": Command("[LAYER | FILE.svg]", "draw how every layer and head holds its tokens", _kv),
    "/stats": Command("", "show all measured figures", _stats),
    "/regen": Command("", "answer the last question again", _regen),
    "/undo": Command("", "take the last question and its answer back", _undo),
    "/read": Command("FILE", "put a text file before your next question", _read),
    "/system": Command("[TEXT]", "show or change the system prompt; none: take it away", _system),
    "/set": Command("[NAME VALUE]", "show or change a sampling setting, such as temp 0.2", _set),
    "/policy": Command("[NAME [ARG=VALUE]…]", "show or change which tokens are kept", _policy),
    "/budget": Command("[SIZE]", "show or change how much is kept", _budget),
    "/save": Command("FILE", "write the conversation and its cache", _save),
    "/load": Command("FILE", "go on with a saved conversation", _load),
    "/clear": Command("", "forget the conversation", _clear),
    "/help": Command("", "show this list", _help),
    "/exit": Command("", "leave (or Ctrl-D)", _leave),
}
