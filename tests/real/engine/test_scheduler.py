"""Jobs that share a context: nobody waits for a long prompt, and what has no room is made anew later."""

from __future__ import annotations

import pytest
from needles import FILLER, GREEDY, LANTERN, MILL, OpenEngine, document, prompt

from kvlocal.engine.engine import Engine
from kvlocal.engine.scheduler import Job, Scheduler
from kvlocal.engine.stepper import Plain
from kvlocal.errors import KVError
from kvlocal.native.sampling import Sampling

LONG = Sampling(temp=0, ignore_eos=True)


def scheduler_of(engine: Engine) -> Scheduler:
    return Scheduler(engine.model, engine.reader, engine.evictor, engine.sequences[::-1])


def job(engine: Engine, tokens: list[int], n_predict: int, sampling: Sampling = GREEDY) -> Job:
    ends = engine.model.end_tokens if sampling.ignore_eos else ()
    return Job(tokens, Plain(sampling, engine.model.n_vocab, ends), n_predict)


def run(scheduler: Scheduler, *jobs: Job) -> None:
    for each in jobs:
        scheduler.add(each)
    while not all(each.over for each in jobs):
        for done in scheduler.step():
            scheduler.retire(done)


@pytest.mark.parametrize("policy", ["full", "ada-snapkv", "ladder"])
def test_an_answer_goes_on_while_a_long_prompt_is_read(policy: str, open_engine: OpenEngine) -> None:
    """A token of the answer for every piece of the prompt, and both texts are what they are alone."""
    engine = open_engine(policy, "256", n_seq_max=2, n_ctx=2048, n_ubatch=128, n_pool=4096)
    short = prompt(engine, document(LANTERN), LANTERN.question)
    long = prompt(engine, document(MILL, before=20, after=30), MILL.question)
    assert len(long) > 1000
    alone = {}
    for name, tokens, n in (("short", short, 24), ("long", long, 12)):
        alone[name] = job(engine, tokens, n, LONG)
        run(scheduler_of(engine), alone[name])
    scheduler = scheduler_of(engine)
    one, two = job(engine, short, 24, LONG), job(engine, long, 12, LONG)
    scheduler.add(one)
    while not one.first:
        scheduler.step()
    scheduler.add(two)
    n_pieces = 0
    while not two.first:
        said, read = one.n_generated, two.n_read
        scheduler.step()
        assert 0 < two.n_read - read <= 128
        assert one.n_generated == said + 1 or one.over
        n_pieces += 1
    assert n_pieces == -(-len(long) // 128)
    while not (one.over and two.over):
        scheduler.step()
    assert (one.text, two.text) == (alone["short"].text, alone["long"].text)
    assert (one.n_generated, two.n_generated) == (24, 12)
    for each in (one, two):
        scheduler.retire(each)
    assert engine.context.stats().used_bytes == 0 and len(scheduler.free) == 2


def test_what_finds_no_room_waits_and_is_made_anew(open_engine: OpenEngine) -> None:
    """llama.cpp's cache has room for one of two answers: the later one gives way and comes to the same end."""
    engine = open_engine("full", "100%", n_seq_max=2, n_ctx=256, n_pool=256)
    tokens = engine.tokenize(FILLER * 2)
    n = 240 - len(tokens)
    alone = job(engine, tokens, n, LONG)
    run(scheduler_of(engine), alone)
    both = [job(engine, list(tokens), n, LONG) for _ in range(2)]
    run(scheduler_of(engine), *both)
    assert [each.error for each in both] == [None, None]
    assert [each.text for each in both] == [alone.text] * 2
    assert [(each.n_prompt, each.n_generated) for each in both] == [(len(tokens), n)] * 2


def test_one_failure_is_nobody_else_s(open_engine: OpenEngine) -> None:
    engine = open_engine("ada-snapkv", "64", n_seq_max=3, n_ctx=512)
    good = [job(engine, engine.tokenize(FILLER), 8, LONG) for _ in range(2)]
    bad = job(engine, engine.tokenize(FILLER * 60), 8)
    bad.mode = "exact"
    run(scheduler_of(engine), good[0], bad, good[1])
    assert isinstance(bad.error, KVError) and "context has room" in str(bad.error)
    assert [each.n_generated for each in good] == [8, 8] and not any(each.error for each in good)


def test_a_job_that_is_let_go_leaves_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine("ada-snapkv", "64", n_seq_max=2, n_ctx=2048, n_ubatch=64)
    scheduler = scheduler_of(engine)
    one = job(engine, engine.tokenize(FILLER * 20), 8)
    scheduler.add(one)
    scheduler.step()
    assert 0 < one.n_read < len(one.prompt)
    scheduler.retire(one)
    assert engine.context.stats().used_bytes == 0 and len(scheduler.free) == 2 and not scheduler.running


def test_half_a_character_is_left_out(open_engine: OpenEngine) -> None:
    engine = open_engine("full", "100%")
    one = Job([], None)
    one.say("漢".encode()[:2])
    assert one.take() == ""
    one.say("漢".encode()[2:])
    one.say("字".encode()[:1])
    assert one.text == "漢" and engine.n_max
