"""How pages store their slots: names, sizes. Everything above the native library may ask here."""

from __future__ import annotations

PAGE_SLOTS = 32
"""Slots of a page."""

FORMATS = ("f16", "q8", "q4", "kv3", "kv2", "kivi", "token2")
"""How pages store their slots, in the order of ``kvl_format``; kv3 has 3-bit keys and 2-bit values.

kivi (arXiv 2402.02750) stores keys per channel over groups of slots, values per slot; token2 is the 2-bit quantizer
that the code of LogQuant (arXiv 2503.19950) runs.
"""

BITS = {
    **{"f16": (16.0, 16.0), "q8": (8.5, 8.5), "q4": (4.5, 4.5), "kv3": (3.25, 2.25), "kv2": (2.25, 2.25)},
    **{"kivi": (3.0, 3.0), "token2": (2.375, 2.375)},
}
"""Per value of K and of V, scales included; kivi: of 2 bits in groups of 32."""
