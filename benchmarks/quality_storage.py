"""Dropping tokens or storing them in fewer bits, at equal bytes: the variants of the storage parts of quality.py."""

from __future__ import annotations

from decimal import Decimal

from kvlocal.measure.variants import PAGED, Variant
from kvlocal.native.formats import BITS
from kvlocal.policies import make_policy
from kvlocal.policies.full import Full
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

SHARES = ("6%", "12.5%", "19%", "25%")
"""Of the bytes of a full f16 cache."""

LADDER = "ladder"
AT_EQUAL_BYTES = {
    "ada-snapkv": "f16",
    "ada-snapkv + q4": "q4:sink=4:tail=32",
    "ada-snapkv + kivi": "kivi:sink=4:tail=32",
    "ada-snapkv + logquant": "logquant:sink=4:tail=48",
    "ada-snapkv, kernel 21, + q4": "q4:sink=4:tail=32",
}
"""With the same protection as the ladder's: 4 sinks, 32 recent tokens; logquant's are 33 to 48, spread out. The last
one pools over as many tokens as the ladder does: what of the ladder's needles is due to that."""

ALL_KEPT = ("f16", "q4", "kv3", "kv2", "kivi", "logquant")
"""With their own sinks and tails."""

MORE = (
    *("q8", "kivi:group=64", "kivi:bits=4", "logquant:quantizer=token", "kivi:sink=32", "logquant:sink=32"),
    *("q4:centre=0", "kv3:centre=0", "kv2:centre=0", "kv3:sink=0", "kv2:sink=0", "kv3:sink=4", "kv2:sink=4"),
)
"""Further ones, and what the mean of the keys and the sinks are worth; on fewer texts."""


def at(share: str, name: str, n_tokens: int) -> Variant | None:
    """One of the above with as many tokens as a share of the bytes has room for; ``None``: for all of them."""
    storage = AT_EQUAL_BYTES[name]
    store = Storage.parse(storage)
    bits = (store.bits + 32 / store.group) if store.format == "kivi" else sum(BITS[store.format]) / 2
    n_f16 = store.sink + max(store.tail, 32) if store.demotes else 0
    room = float(Decimal(share[:-1])) / 100 * n_tokens - n_f16
    tokens = int(n_f16 + room * 16 / bits)
    if tokens > n_tokens:
        return None
    policy = make_policy("ada-snapkv", {"kernel": 21} if "kernel 21" in name else {})
    return Variant(name, policy, Budget("tokens", tokens), storage)


def at_equal_bytes(n_tokens: int) -> list[Variant]:
    """The ladder and the others for every share, for texts of ``n_tokens``."""
    out = []
    for share in SHARES:
        out.append(Variant(LADDER, make_policy("ladder"), Budget.parse(share)))
        out += [found for name in AT_EQUAL_BYTES if (found := at(share, name, n_tokens))]
    return out


def all_kept(storages: tuple[str, ...] = ALL_KEPT) -> list[Variant]:
    """Nothing dropped, in every storage."""
    return [Variant(PAGED, Full(), Budget.parse("100%"), storage) for storage in storages]
