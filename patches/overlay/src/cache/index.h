// The text of a sequence cut into units, and what stands for the keys of each: by this is chosen which are read.

#pragma once

#include "ggml.h"
#include "kvl.h"
#include "llama.h"

#include <cstdint>
#include <vector>

class llama_kv_paged;

// What stands for the units of one KV head.
struct kvl_head_index {
    std::vector<ggml_fp16_t> rows; // per closed unit, a kvl_summary
    std::vector<uint32_t> held;    // per closed unit: slots that the head holds of it
    std::vector<float> open;       // of what comes after them: sum of the keys, or their bounds
    uint32_t n_open = 0;           // keys in it
};

// What a layer reads since it chose last.
struct kvl_choice {
    size_t n_queries = 0;                  // of the open unit, then
    double wanted = 0, kept = 0, read = 0; // as kvl_retrieval_stats
};

// It follows from the slots that are held: what is lost of it is made anew from them.
struct kvl_index {
    std::vector<llama_pos> ends;                           // positions after the closed units, ascending
    std::vector<std::vector<kvl_head_index>> heads;        // [open layer][KV head], empty: nothing is in it
    std::vector<std::vector<std::vector<uint8_t>>> chosen; // [open layer][KV head, or one for all][unit]: read last
    std::vector<std::vector<float>> asked; // [open layer] sum of the queries of the open unit, [n_head][d_k]
    std::vector<kvl_choice> choices;       // [open layer]
    llama_pos chosen_at = -1;              // tokens seen when this was so, -1: everything is read
    llama_pos attended_at = -1;            // tokens seen when attention was looked at for it
    size_t n_asked = 0;                    // how many, 0: it has to be made
    llama_pos n_indexed = 0;               // keys before this position are in it
    int32_t summary = KVL_SUMMARY_NONE;    // a kvl_summary
    bool evicted = false;                  // what is held of the units has changed

    // where the unit begins that is open
    llama_pos open_begin() const { return ends.empty() ? 0 : ends.back(); }
    // the text was cut to so many tokens: a unit that ended there is open again, unless it is archived
    void cut(llama_pos n_tokens, bool archived);
    // forget all that follows from keys
    void clear();
    uint64_t bytes() const;
};

// Close units, at ascending positions behind those that are closed, and take up the keys of new tokens. False with the
// error set, and nothing changed.
bool kvl_update_index(llama_kv_paged & kv, llama_seq_id seq, int32_t summary, const llama_pos * ends, int32_t n_ends,
                      int n_threads);
// Choose what the next token reads of every open layer.
void kvl_choose(llama_kv_paged & kv, llama_seq_id seq, const kvl_retrieval & params, int n_threads,
                kvl_retrieval_stats & out);
