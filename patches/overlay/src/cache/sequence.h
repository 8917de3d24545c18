// One sequence: its heads, and what goes with them.

#pragma once

#include "cache/archive.h"
#include "cache/head.h"
#include "cache/index.h"
#include "cache/readers.h"
#include "cache/recall.h"

#include <cstdint>
#include <vector>

// A way back to where a sequence was when it had seen `pos` tokens: what is bounded in it cannot be cut back otherwise.
struct kvl_marked {
    llama_pos pos;
    std::vector<std::vector<kvl_head>> windows; // of the layers with a sliding window; their pages are shared
    std::vector<uint8_t> state;                 // of the recurrent layers
};

struct kvl_sequence {
    llama_pos n_seen = 0;                         // next position
    std::vector<std::vector<kvl_head>> heads;     // [layer][KV head]
    std::vector<std::vector<float>> mu;           // [layer] f32 [n_head_kv][d_k], empty: none
    std::vector<llama_pos> window;                // position of each remembered query, -1: none
    std::vector<kvl_marked> marks;                // by position
    kvl_index index;                              // of the open layers, by which is chosen what is read
    kvl_archive archive;                          // of its units
    kvl_recalled_heads recalled;                  // what was brought back of them
    std::vector<std::shared_ptr<kvl_load>> loads; // what is being read of them

    const kvl_recalled & recalled_of(size_t layer, size_t head) const {
        static const kvl_recalled nothing;
        return layer < recalled.size() ? recalled[layer][head] : nothing;
    }
};
