// Units that were brought back from the archive: exact, in pages of their own beside those of the heads.

#pragma once

#include "kvl.h"
#include "llama.h"

#include <cstdint>
#include <vector>

class llama_kv_paged;
struct kvl_layer;
struct kvl_sequence;

// The tokens of a unit that a KV head does not hold in f16 itself, and their rows in its pages: 32 * page + slot.
struct kvl_recalled_unit {
    size_t unit = 0;
    std::vector<llama_pos> pos;
    std::vector<uint32_t> rows;
};

// Of one KV head. Rows are given to units and taken back; nothing moves.
struct kvl_recalled {
    std::vector<kvl_recalled_unit> units;
    std::vector<uint32_t> pages; // of f16: numbers in the pool; one without rows in use is given back
    std::vector<uint32_t> used;  // bits per page
    std::vector<uint32_t> mass;  // as kvl_head::mass; nobody asks for it

    uint64_t row(uint32_t i) const { return uint64_t(pages[i / 32]) * 32 + i % 32; } // in the pool
    uint32_t n_pages() const;                                                        // in use
    uint32_t n() const;                                                              // tokens
};

// [open layer][KV head], empty: nothing was brought back
using kvl_recalled_heads = std::vector<std::vector<kvl_recalled>>;

// Bring back exactly the units that are wanted, [open layer][KV head][unit]; others that were are given back. What of
// them lies on a lower rung is hidden meanwhile. now: all that can be read is there then; else what is not there yet is
// read while the next token is computed, and comes with the next call, which waits for it: what a token reads does not
// depend on how fast a disk is. A unit that cannot be read, or for which there is no page, is left out.
void kvl_bring_back(llama_kv_paged & kv, llama_seq_id seq,
                    const std::vector<std::vector<std::vector<uint8_t>>> & wanted, bool now, kvl_retrieval_stats & out);
// Give back all, or the units that end behind a position.
void kvl_give_back(llama_kv_paged & kv, llama_seq_id seq, llama_pos behind = 0);
// Let attention see all that is held, each token once.
void kvl_see_all(llama_kv_paged & kv, llama_seq_id seq);
