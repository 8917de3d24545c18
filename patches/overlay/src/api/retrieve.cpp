// The C API: reading a part of a sequence, chosen by what stands for its units.

#include "api/arguments.h"
#include "llama-context.h"

using namespace kvl_api;

static bool check(const llama_kv_paged & kv, const kvl_retrieval & p) {
    const bool fits = p.budget >= 1 && p.sink >= 0 && p.recent >= 1 && p.min_unit >= 1 && p.n_queries >= 0 &&
                      p.dense_layers >= 0 && p.full_below >= 0 && p.hysteresis >= 0.0f && p.drift >= 0.0f &&
                      p.summary >= KVL_SUMMARY_NONE && p.recall >= KVL_RECALL_OFF && p.recall <= KVL_RECALL_TURN &&
                      p.summary <= KVL_SUMMARY_ATTENTION && p.every >= 0 &&
                      (p.summary != KVL_SUMMARY_ATTENTION || (p.n_queries > 0 && p.recall != KVL_RECALL_STEP)) &&
                      int64_t(p.sink) + p.recent <= p.budget;
    if (!fits) {
        kvl_set_error(
            "a retrieval needs a budget of at least sink + recent, with recent and min_unit of 1 or more; one by "
            "attention also n_queries, and recalls nothing by step");
    } else if ((p.summary != KVL_SUMMARY_NONE || p.recall == KVL_RECALL_TURN) && kv.params.n_window == 0) {
        kvl_set_error("a retrieval needs the queries of the newest tokens; the context remembers none (n_window is 0)");
    } else {
        return true;
    }
    return false;
}

int32_t kvl_retrieve(llama_context * ctx, llama_seq_id seq, const kvl_retrieval * params, const llama_pos * ends,
                     int32_t n_ends, kvl_retrieval_stats * out) {
    auto * kv = memory_of(ctx, seq);
    if (!kv || (n_ends > 0 && !given(ends))) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        if (!params) {
            kvl_see_all(*kv, seq);
            kv->seqs[seq].index.chosen_at = -1;
            return int32_t(KVL_OK);
        }
        if (!check(*kv, *params)) {
            return int32_t(KVL_ERR_ARGUMENT);
        }
        const int64_t t0 = ggml_time_us();
        ctx->synchronize();
        const int n_threads = int(ctx->n_threads());
        if (!kvl_update_index(*kv, seq, params->summary, ends, n_ends, n_threads)) {
            return int32_t(KVL_ERR_ARGUMENT);
        }
        if (out && kv->no_alloc()) { // only what it would take is counted
            *out = {};
            out->n_units = int64_t(kv->seqs[seq].index.ends.size());
            out->index_bytes = kv->seqs[seq].index.bytes();
        } else if (out) {
            kvl_choose(*kv, seq, *params, n_threads, *out);
            out->us = uint64_t(ggml_time_us() - t0);
        }
        return int32_t(KVL_OK);
    });
}
