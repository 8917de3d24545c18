// Finds the paged memory of a context once its arguments are in range.

#include "api/arguments.h"

#include "llama-context.h"

llama_kv_paged * kvl_api::memory_of(const llama_context * ctx) {
    auto * kv = ctx ? dynamic_cast<llama_kv_paged *>(ctx->get_memory()) : nullptr;
    if (!kv) {
        kvl_set_error("the context has no paged memory; create it with kvl_init_from_model");
    }
    return kv;
}

llama_kv_paged * kvl_api::memory_of(const llama_context * ctx, llama_seq_id seq) {
    auto * kv = memory_of(ctx);
    if (kv && !kv->valid_seq(seq)) {
        kvl_set_error("sequence " + std::to_string(seq) +
                      " is not below n_seq_max = " + std::to_string(kv->seqs.size()));
        return nullptr;
    }
    return kv;
}

llama_kv_paged * kvl_api::memory_of(const llama_context * ctx, llama_seq_id seq, int32_t layer) {
    auto * kv = memory_of(ctx, seq);
    if (kv && (layer < 0 || uint32_t(layer) >= kv->n_open)) {
        kvl_set_error("layer " + std::to_string(layer) + " is not below " + std::to_string(kv->n_open));
        return nullptr;
    }
    return kv;
}

llama_kv_paged * kvl_api::contents_of(const llama_context * ctx, llama_seq_id seq, int32_t layer) {
    auto * kv = memory_of(ctx, seq, layer);
    if (kv && kv->no_alloc()) {
        kvl_set_error("the model was loaded without its weights, so that the cache only counts what it would hold");
        return nullptr;
    }
    return kv;
}
