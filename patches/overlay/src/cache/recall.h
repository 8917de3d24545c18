// Units that were brought back from the archive: exact, in pages of their own beside those of the heads.

#pragma once

#include "kvl.h"
#include "llama.h"

#include <cstdint>
#include <vector>

class llama_kv_paged;
struct kvl_layer;
struct kvl_sequence;

// Of one KV head: the tokens of a unit that it does not hold in f16 itself.
struct kvl_recalled {
    size_t unit = 0;
    std::vector<llama_pos> pos;
    std::vector<uint32_t> pages; // of f16, numbers in the pool; token i lies in row i of them
    std::vector<uint32_t> mass;  // as kvl_head::mass; nobody asks for it

    uint32_t live(size_t page) const {
        const size_t n = pos.size() - page * 32;
        return n < 32 ? (1u << n) - 1 : UINT32_MAX;
    }
};

// [open layer][KV head], empty: nothing was brought back
using kvl_recalled_heads = std::vector<std::vector<std::vector<kvl_recalled>>>;

// Bring back exactly the units that are wanted, [open layer][KV head][unit]; others that were are given back. What of
// them lies on a lower rung is hidden meanwhile. A unit that cannot be read, or for which there is no page, is left
// out.
void kvl_bring_back(llama_kv_paged & kv, llama_seq_id seq,
                    const std::vector<std::vector<std::vector<uint8_t>>> & wanted, kvl_retrieval_stats & out);
// Give back all, or the units that end behind a position.
void kvl_give_back(llama_kv_paged & kv, llama_seq_id seq, llama_pos behind = 0);
// Let attention see all that is held, each token once.
void kvl_see_all(llama_kv_paged & kv, llama_seq_id seq);
