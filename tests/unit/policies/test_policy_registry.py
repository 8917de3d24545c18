"""Names, parameters and the sentences that a wrong one gets."""

from __future__ import annotations

import dataclasses

import pytest

from kvlocal.errors import UsageError
from kvlocal.policies import REGISTRY, describe, make_policy
from kvlocal.policies.ada_snapkv import AdaSnapKV
from kvlocal.policies.snapkv import SnapKV
from kvlocal.policies.streaming import Streaming

SCORED = ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"]


def test_registry_names():
    assert list(REGISTRY) == [
        "full",
        "ladder",
        "streaming",
        "cascading",
        *SCORED,
        "sentencekv",
        "buzz",
        "h2o",
        "tova",
        "corm",
        "observed",
        "expected-attention",
        "chunkkv",
        "keydiff",
        "knorm",
        "random",
    ]
    assert all(name == cls.name and make_policy(name) == cls() for name, cls in REGISTRY.items())


@pytest.mark.parametrize("name", SCORED)
def test_defaults_of_scored_policies(name):
    policy = make_policy(name)
    fields = {"window": 32, "sink": 0, "kernel": 7, "pool": "max", "agg": "mean", "compat": None}
    fields |= {"beta": 20} if "pyramid" in name else {}
    fields |= {"alpha": 0.2, "safeguard": "mix"} if "ada" in name else {}
    assert dataclasses.asdict(policy) == fields
    assert policy.needs == {"scores"} and policy.evicts
    assert policy.n_window == 32 and policy.min_budget == 33


def test_defaults_of_the_others():
    assert dataclasses.asdict(make_policy("streaming")) == {"sink": 4, "positions": "true"}
    assert make_policy("streaming").min_budget == 5 and make_policy("streaming").n_window == 0
    assert dataclasses.asdict(make_policy("full")) == {}
    assert dataclasses.asdict(make_policy("h2o")) == {"recent": 0.5}
    assert dataclasses.asdict(make_policy("tova")) == {"newest": "free"}
    shared = {"sink": 0, "alpha": 0.2, "safeguard": "mix", "beta": 20, "allocation": "uniform"}
    for name in ("observed", "keydiff", "knorm"):
        assert dataclasses.asdict(make_policy(name)) == {"window": 0, **shared}
        assert make_policy(name).min_budget == 1 and make_policy(name).n_window == 0
    assert dataclasses.asdict(make_policy("random")) == {"window": 32, **shared, "seed": 0}
    assert dataclasses.asdict(make_policy("chunkkv")) == {"window": 32, **shared, "chunk": 16}
    assert make_policy("chunkkv").n_window == 32 and make_policy("chunkkv").min_budget == 33
    assert dataclasses.asdict(make_policy("cascading")) == {"sink": 4, "cascades": 4}
    assert make_policy("cascading").min_budget == 5 and make_policy("cascading").n_window == 0
    expected = make_policy("expected-attention")
    own = {"queries": 256, "n_future": 512, "covariance": "yes", "vnorm": "yes", "epsilon": 0.0}
    assert dataclasses.asdict(expected) == {"window": 0, **shared, "sink": 4, **own}
    assert expected.n_window == 256 and expected.min_budget == 5
    assert make_policy("tova").n_window == 1 and make_policy("h2o").n_window == 0
    needs = {name: set(make_policy(name).needs) for name in REGISTRY}
    assert [n for n, what in needs.items() if what == {"mass"}] == ["cascading", "buzz", "h2o", "observed"]
    assert [n for n, what in needs.items() if what == {"queries"}] == ["expected-attention"]
    assert not make_policy("full").evicts
    assert not make_policy("full").needs and not make_policy("streaming").needs


def test_minimum_follows_sink_and_window():
    assert make_policy("snapkv", {"sink": "4", "window": "16"}).min_budget == 21
    assert make_policy("streaming", {"sink": "0"}).min_budget == 1


def test_text_is_converted():
    policy = make_policy(
        "ada-pyramid",
        {"window": " 16 ", "kernel": "5", "pool": "AVG", "alpha": "0.5", "safeguard": "protect", "compat": "none"},
    )
    assert (policy.window, policy.kernel, policy.pool, policy.alpha) == (16, 5, "avg", 0.5)
    assert (policy.safeguard, policy.compat) == ("protect", None)
    assert make_policy("snapkv", {"compat": "kvpress"}).compat == "kvpress"
    assert make_policy("snapkv", {"pool": "none"}).pool == "none"
    assert make_policy("streaming", {"sink": 7}) == Streaming(sink=7)
    assert make_policy("ada-snapkv", {"alpha": 1}) == AdaSnapKV(alpha=1)


@pytest.mark.parametrize(("name", "closest"), [("snap", "snapkv"), ("adasnapkv", "ada-snapkv"), ("SnapKV", "snapkv")])
def test_unknown_policy(name, closest):
    with pytest.raises(UsageError) as error:
        make_policy(name)
    message = str(error.value)
    assert repr(name) in message and f"did you mean {closest!r}?" in message
    assert all(known in message for known in REGISTRY)


def test_unknown_policy_far_from_all():
    with pytest.raises(UsageError, match="no policy 'qqqq'; known policies: full, ladder, streaming"):
        make_policy("qqqq")


def test_unknown_parameter():
    with pytest.raises(UsageError, match=r"snapkv has no parameter 'windw' \(did you mean 'window'\?\); it has window"):
        make_policy("snapkv", {"windw": "3"})
    with pytest.raises(UsageError, match="snapkv has no parameter 'alpha'"):
        make_policy("snapkv", {"alpha": "0.5"})
    with pytest.raises(UsageError, match="full has no parameter 'sink'; it has none at all"):
        make_policy("full", {"sink": "1"})


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("snapkv", "window", "0", "a whole number of at least 1"),
        ("snapkv", "window", "many", "a whole number of at least 1"),
        ("snapkv", "window", "3.5", "a whole number of at least 1"),
        ("snapkv", "window", 3.0, "a whole number of at least 1"),
        ("snapkv", "window", True, "a whole number of at least 1"),
        ("snapkv", "sink", "-1", "a whole number of at least 0"),
        ("streaming", "sink", "-1", "a whole number of at least 0"),
        ("snapkv", "kernel", "4", "an odd whole number of at least 1"),
        ("snapkv", "kernel", "-1", "an odd whole number of at least 1"),
        ("snapkv", "pool", "median", "one of max, avg, none"),
        ("snapkv", "pool", None, "one of max, avg, none"),
        ("snapkv", "agg", "sum", "one of mean, max"),
        ("snapkv", "compat", "other", "one of none, adakv, kvpress"),
        ("ada-snapkv", "alpha", "1.01", "a number from 0 to 1"),
        ("ada-snapkv", "alpha", "-0.1", "a number from 0 to 1"),
        ("ada-snapkv", "alpha", "nan", "a number from 0 to 1"),
        ("ada-snapkv", "alpha", "half", "a number from 0 to 1"),
        ("ada-snapkv", "safeguard", "none", "one of mix, protect"),
        ("pyramidkv", "beta", "0", "a whole number of at least 1"),
    ],
)
def test_bad_value(name, key, value, allowed):
    with pytest.raises(UsageError) as error:
        make_policy(name, {key: value})
    assert str(error.value) == f"{key}={value} is not possible for policy {name}: give {allowed}."


def test_a_direct_construction_is_validated_too():
    with pytest.raises(UsageError, match="kernel=2"):
        SnapKV(kernel=2)
    with pytest.raises(UsageError, match="window"):
        SnapKV(window="32")


def test_adakv_rounding_knows_no_protect():
    with pytest.raises(UsageError, match="safeguard=protect"):
        make_policy("ada-snapkv", {"compat": "adakv", "safeguard": "protect"})


def test_describe_has_a_row_per_policy():
    rows = {row.name: row for row in describe()}
    assert list(rows) == list(REGISTRY)
    assert all(row.summary.endswith(".") and "\n" not in row.summary for row in rows.values())
    assert all(row.paper or row.name == "full" for row in rows.values())
    assert [(p.name, p.default) for p in rows["streaming"].parameters] == [("sink", 4), ("positions", "true")]
    assert rows["full"].parameters == ()
    for row in rows.values():
        for p in row.parameters:
            assert p.help and p.allowed and getattr(REGISTRY[row.name](), p.name) == p.default
