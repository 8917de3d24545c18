"""Parsing budgets and turning them into tokens per head."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.errors import UsageError
from kvlocal.storage.budget import Budget, format_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1024", "tokens", 1024),
        (" 1024 ", "tokens", 1024),
        ("+64", "tokens", 64),
        ("64.0", "tokens", 64),
        ("25%", "percent", 25),
        ("12.5 %", "percent", Decimal("12.5")),
        (".5%", "percent", Decimal("0.5")),
        ("100%", "percent", 100),
        ("512MiB", "bytes", 512 * MIB),
        ("1GiB", "bytes", 2**30),
        ("300MB", "bytes", 300_000_000),
        ("1.5 gib", "bytes", 3 * 2**29),
        ("1000kb", "bytes", 1_000_000),
        ("2tb", "bytes", 2 * 10**12),
        ("4096b", "bytes", 4096),
    ],
)
def test_parse(text, unit, value):
    assert Budget.parse(text) == Budget(unit, value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "keeps nothing"),
        ("0%", "keeps nothing"),
        ("0MiB", "keeps nothing"),
        ("0.1b", "keeps nothing"),
        ("-5", "negative"),
        ("-25%", "negative"),
        ("-1MiB", "negative"),
        ("101%", "100% already keeps all"),
        ("100.0001%", "100% already keeps all"),
        ("", "not a budget"),
        ("abc", "not a budget"),
        ("nan", "not a budget"),
        ("inf", "not a budget"),
        ("1e3", "not a budget"),
        ("25%%", "not a budget"),
        ("1 024", "not a budget"),
        ("\u0661\u0662", "not a budget"),
        ("12.5", "not a whole number of tokens"),
        ("512M", "not a unit"),
        ("10 tokens", "not a unit"),
    ],
)
def test_parse_refuses(text, says):
    with pytest.raises(UsageError, match=says) as error:
        Budget.parse(text)
    assert str(error.value).endswith(".")
    assert "1024" in str(error.value) or "%" in str(error.value)


@given(
    st.one_of(
        st.integers(1, 10**9).map(str),
        st.decimals("0.01", "100", places=2).map(lambda d: f"{d}%"),
        st.tuples(st.integers(1, 10**6), st.sampled_from(["B", "KB", "MB", "GB", "KiB", "MiB", "GiB", "TiB"])).map(
            lambda pair: f"{pair[0]}{pair[1]}"
        ),
    )
)
@settings(max_examples=100, deadline=None)
def test_text_round_trip(text):
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget


def test_str_uses_the_largest_exact_unit():
    assert [str(Budget.parse(t)) for t in ("1024MiB", "1536KiB", "300MB", "25%", "12.50%", "64")] == [
        "1GiB",
        "1536KiB",
        "300000000B",
        "25%",
        "12.50%",
        "64",
    ]


def test_tokens_are_taken_literally():
    assert Budget.parse("1024").tokens(10, 1000) == 1024
    assert Budget.parse("1024").tokens(10**6, 1000, min_budget=1024) == 1024


@pytest.mark.parametrize(
    ("text", "n_seen", "expected"),
    [("25%", 4096, 1024), ("25%", 4099, 1024), ("10%", 1000, 100), ("7%", 100, 7), ("0.1%", 1000, 1), ("0.1%", 5, 1)],
)
def test_percent_of_the_tokens_seen(text, n_seen, expected):
    assert Budget.parse(text).tokens(n_seen, 1000) == expected


def test_percent_is_raised_to_the_minimum():
    assert Budget.parse("25%").tokens(40, 1000, min_budget=33) == 33
    assert Budget.parse("25%").tokens(4000, 1000, min_budget=33) == 1000


@given(st.integers(0, 10**7))
@settings(max_examples=50, deadline=None)
def test_everything_is_everything(n_seen):
    budget = Budget.parse("100%")
    assert budget.keeps_all and not Budget.parse("99.99%").keeps_all
    assert budget.tokens(n_seen, 1000) == max(n_seen, 1)


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4096), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_pages_stay_within_the_bytes(n, n_layer, n_head, bytes_per_slot, seed):
    """However the budget is divided over the heads, whole pages of 32 slots fit."""
    heads = n_layer * n_head
    limit = (n + 31) * heads * bytes_per_slot + seed % (heads * bytes_per_slot)
    budget = Budget("bytes", limit).tokens(10**6, heads * bytes_per_slot)
    assert budget >= n
    rng = np.random.default_rng(seed)
    worst = 1 + 32 * rng.multinomial((budget - 1) * heads // 32, np.ones(heads) / heads)
    worst[0] += budget * heads - worst.sum()
    random = rng.multinomial(budget * heads, rng.dirichlet(np.ones(heads)))
    for counts in (worst, random, np.full(heads, budget)):
        assert counts.sum() == budget * heads
        assert (-(-counts // 32) * 32).sum() * bytes_per_slot <= limit


def test_bytes_cost_at_most_one_page_per_head():
    assert Budget.parse("1MiB").tokens(10**6, 1024) == 1024 - 31
    assert Budget.parse("1MiB").tokens(10**6, 1024, page_slots=1) == 1024


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("32", "at least 33"),
        ("64KiB", "at least 33 tokens per head, which take 64 MiB"),
        ("60MiB", "which take 64 MiB"),
    ],
)
def test_explicit_budget_below_the_minimum(text, says):
    with pytest.raises(UsageError, match=says):
        Budget.parse(text).tokens(4096, MIB, min_budget=33)
    with pytest.raises(UsageError, match=says):
        Budget.parse(text).check(33, 4096, MIB, None)


def test_the_minimum_that_is_named_works():
    assert Budget.parse("64MiB").tokens(4096, MIB, min_budget=33) == 33


def test_larger_than_memory_names_both_numbers():
    with pytest.raises(UsageError, match=r"1TiB is larger than the memory of 15\.9 GiB"):
        Budget.parse("1TiB").check(33, 4096, MIB, 16 * 2**30 - 1)
    with pytest.raises(UsageError, match="100000 tokens per head takes 4 GiB, larger than the memory of 1 GiB"):
        Budget.parse("100000").check(33, 4096, MIB, 2**30)


@pytest.mark.parametrize("text", ["1024", "25%", "100%", "64MiB", "1GiB"])
def test_possible_budgets_pass(text):
    Budget.parse(text).check(33, 4096, MIB, 2**30)
    Budget.parse(text).check(33, 4096, MIB, None)


@pytest.mark.parametrize(
    ("n", "up", "expected"),
    [
        (1, True, "1 B"),
        (1024, True, "1 KiB"),
        (1025, True, "1.1 KiB"),
        (1025, False, "1 KiB"),
        (3 * 2**29, True, "1.5 GiB"),
    ],
)
def test_format_bytes(n, up, expected):
    assert format_bytes(n, up=up) == expected
