// The C API: contexts, decoding with the evict hook around it, and what is measured. Slots: kvl-slots.cpp.

#include "kvl-api.h"

#include "kvl-guard.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <set>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifndef KVL_LLAMA_COMMIT
#define KVL_LLAMA_COMMIT "unknown"
#endif

using namespace kvl_api;

static thread_local std::string last_error;

void kvl_set_error(const std::string & what) {
    last_error = what;
}

int32_t kvl_api::fail(kvl_status status, const std::string & what) {
    kvl_set_error(what);
    return status;
}

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
    if (kv && (layer < 0 || size_t(layer) >= kv->layers.size())) {
        kvl_set_error("layer " + std::to_string(layer) + " is not below " + std::to_string(kv->layers.size()));
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

int32_t kvl_abi_version(void) {
    return KVL_ABI_VERSION;
}

const char * kvl_llama_commit(void) {
    return KVL_LLAMA_COMMIT;
}

const char * kvl_last_error(void) {
    return last_error.c_str();
}

size_t kvl_struct_size(const char * name) {
#define KVL_SIZE(type)                      \
    if (name && strcmp(name, #type) == 0) { \
        return sizeof(struct type);         \
    }
    KVL_SIZE(kvl_params)
    KVL_SIZE(kvl_stats)
    KVL_SIZE(kvl_seq_stats)
    KVL_SIZE(kvl_layer_info)
    KVL_SIZE(kvl_breakdown)
    KVL_SIZE(llama_context_params)
    KVL_SIZE(llama_model_params)
    KVL_SIZE(llama_batch)
#undef KVL_SIZE
    return 0;
}

kvl_params kvl_default_params(void) {
    return {/*.n_window =*/32, /*.n_pool_ctx =*/0, /*.score_bytes =*/64 << 20, /*.portable =*/0,
            /*.formats =*/0,   /*.rotate =*/0,     /*.kivi_bits =*/2,          /*.kivi_group =*/32};
}

int32_t kvl_model_check(const llama_model * model) {
    if (!model) {
        return fail(KVL_ERR_ARGUMENT, "no model");
    }
    return guarded([&] {
        const std::string why = llama_kv_paged::unsupported(*model);
        return why.empty() ? int32_t(KVL_OK) : fail(KVL_ERR_UNSUPPORTED, why);
    });
}

int32_t kvl_format_check(const llama_model * model, int32_t format) {
    if (const int32_t rc = kvl_model_check(model); rc != KVL_OK) {
        return rc;
    }
    if (format < 0 || format >= KVL_FORMAT_COUNT) {
        return fail(KVL_ERR_ARGUMENT, "there is no kvl_format " + std::to_string(format));
    }
    return guarded([&] {
        const std::string why = llama_kv_paged::unsupported(*model, kvl_format(format));
        return why.empty() ? int32_t(KVL_OK) : fail(KVL_ERR_UNSUPPORTED, why);
    });
}

// Sizes that upstream asserts on, casts to int, or refuses in its log only.
static bool check_sizes(const llama_context_params & params) {
    const auto in_range = [](const char * name, uint32_t n, uint32_t max) {
        if (n < 1 || n > max) {
            kvl_set_error(std::string(name) + " is " + std::to_string(n) + "; it must be 1 to " + std::to_string(max));
        }
        return n >= 1 && n <= max;
    };
    if (params.n_seq_max > LLAMA_MAX_SEQ) {
        kvl_set_error("a context of " + std::to_string(params.n_seq_max) + " sequences is more than the " +
                      std::to_string(LLAMA_MAX_SEQ) + " that llama.cpp serves at a time; use fewer (--parallel)");
        return false;
    }
    return in_range("n_seq_max", params.n_seq_max, LLAMA_MAX_SEQ) && in_range("n_ctx", params.n_ctx, 1u << 30) &&
           in_range("n_batch", params.n_batch, 1u << 30) && in_range("n_ubatch", params.n_ubatch, 1u << 30);
}

static bool check_params(const kvl_params & p) {
    if (p.n_window < 0 || p.n_pool_ctx < 0 || p.score_bytes <= 0) {
        kvl_set_error("n_window and n_pool_ctx must not be negative, score_bytes must be positive");
        return false;
    }
    if (p.formats < 0 || p.formats >> KVL_FORMAT_COUNT != 0) {
        kvl_set_error("formats has bits beyond 1 << " + std::to_string(KVL_FORMAT_COUNT - 1));
        return false;
    }
    if ((p.kivi_bits != 2 && p.kivi_bits != 4) || (p.kivi_group != 32 && p.kivi_group != 64)) {
        kvl_set_error("kivi stores 2 or 4 bits in groups of 32 or 64, not " + std::to_string(p.kivi_bits) +
                      " bits in groups of " + std::to_string(p.kivi_group));
        return false;
    }
    return true;
}

// llama_init_from_model, with paged memory if kvl is not NULL.
static llama_context * create(llama_model * model, llama_context_params params, const kvl_params * kvl) {
    struct request {
        explicit request(const kvl_params * p) { kvl_request_memory(p); }
        ~request() { kvl_request_memory(nullptr); }
    };
    kvl_set_error("");
    try {
        const kvl_abort_guard guard;
        const request asked(kvl);
        return llama_init_from_model(model, params);
    } catch (const std::exception & e) {
        kvl_set_error(e.what());
        return nullptr;
    }
}

llama_context * kvl_init_from_model(llama_model * model, llama_context_params params, const kvl_params * kvl) {
    if (!model) {
        kvl_set_error("no model");
        return nullptr;
    }
    if (!check_sizes(params)) {
        return nullptr;
    }
    if (!kvl) {
        return create(model, params, nullptr);
    }
    if (kvl_model_check(model) != KVL_OK) {
        return nullptr;
    }
    kvl_params p = *kvl;
    p.kivi_bits = p.kivi_bits == 0 ? 2 : p.kivi_bits;
    p.kivi_group = p.kivi_group == 0 ? 32 : p.kivi_group;
    if (!check_params(p)) {
        return nullptr;
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.embeddings) {
        kvl_set_error("the paged cache serves plain decoding contexts only (no drafts, no embeddings)");
        return nullptr;
    }
    // the paged path builds its own attention; these only choose what upstream reserves around it
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = GGML_TYPE_F16;
    params.type_v = GGML_TYPE_F16;
    params.kv_unified = true;
    return create(model, params, &p);
}

bool kvl_is_paged(const llama_context * ctx) {
    return ctx && dynamic_cast<llama_kv_paged *>(ctx->get_memory()) != nullptr;
}

int32_t kvl_n_layer(const llama_context * ctx) {
    const auto * kv = memory_of(ctx);
    return kv ? int32_t(kv->layers.size()) : KVL_ERR_ARGUMENT;
}

int32_t kvl_get_layer(const llama_context * ctx, int32_t layer, kvl_layer_info * out) {
    const auto * kv = memory_of(ctx, 0, layer);
    if (!kv || !given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    const kvl_layer & l = kv->layers[layer];
    *out = {int32_t(l.il),
            int32_t(l.n_head),
            int32_t(l.n_head_kv),
            int32_t(l.pool->d_k),
            int32_t(l.pool->d_v),
            l.pool->is_host() ? 0 : 1,
            l.kq_scale};
    return KVL_OK;
}

//
// decode
//

// Sets the error if upstream would refuse the batch in its log only, or assert on it.
static bool check_batch(const llama_context & ctx, const llama_kv_paged & kv, const llama_batch & batch) {
    if (batch.n_tokens <= 0 || !batch.token || !batch.pos || !batch.n_seq_id || !batch.seq_id) {
        kvl_set_error("kvl_decode needs a batch of tokens with their positions and sequences");
        return false;
    }
    if (uint32_t(batch.n_tokens) > ctx.n_batch()) {
        kvl_set_error("a batch of " + std::to_string(batch.n_tokens) +
                      " tokens exceeds n_batch = " + std::to_string(ctx.n_batch()));
        return false;
    }
    const int64_t n_vocab = ctx.get_model().vocab.n_tokens();
    kvl_positions_check positions(kv);
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        if (batch.token[i] < 0 || batch.token[i] >= n_vocab) {
            kvl_set_error("token " + std::to_string(batch.token[i]) + " is not one of the model's " +
                          std::to_string(n_vocab));
            return false;
        }
        if (!positions.add(batch.n_seq_id[i], batch.seq_id[i], batch.pos[i])) {
            return false;
        }
    }
    const uint32_t n_outputs_max = ctx.get_cparams().n_outputs_max;
    const uint32_t n_outputs = batch.logits ? uint32_t(std::count_if(batch.logits, batch.logits + batch.n_tokens,
                                                                     [](int8_t output) {
                                                                         return output != 0;
                                                                     }))
                                            : 1;
    if (n_outputs > n_outputs_max) {
        kvl_set_error("a batch asks for " + std::to_string(n_outputs) + " outputs, the context has room for " +
                      std::to_string(n_outputs_max));
        return false;
    }
    return true;
}

int32_t kvl_decode(llama_context * ctx, llama_batch batch, int32_t event) {
    auto * kv = memory_of(ctx);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    if (event < KVL_EVENT_NONE || event > KVL_EVENT_PROMPT) {
        return fail(KVL_ERR_ARGUMENT, "there is no kvl_event " + std::to_string(event));
    }
    const int32_t rc = guarded([&] {
        if (!check_batch(*ctx, *kv, batch)) {
            return int32_t(KVL_ERR_ARGUMENT);
        }
        kvl_set_error("");
        const int32_t code = kv->no_alloc() ? kvl_append(ctx, batch) : llama_decode(ctx, batch);
        if (code != 0 && last_error.empty()) {
            kvl_set_error("llama.cpp could not compute a batch of " + std::to_string(batch.n_tokens) +
                          " tokens (code " + std::to_string(code) + ")");
        }
        return code;
    });
    if (rc != 0 || !kv->hook) {
        return rc;
    }
    std::set<llama_seq_id> seqs;
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; s++) {
            seqs.insert(batch.seq_id[i][s]);
        }
    }
    for (const llama_seq_id seq : seqs) {
        int32_t what = event;
        if (what == KVL_EVENT_NONE) {
            const int32_t limit = kv->seqs[seq].limit;
            kvl_seq_stats st;
            kv->get_seq_stats(seq, st);
            if (limit <= 0 || st.n_slots <= int64_t(limit) * st.n_heads) {
                continue;
            }
            what = KVL_EVENT_LIMIT;
        }
        if (kv->hook(ctx, seq, what, kv->hook_user) != 0) {
            return fail(KVL_ERR_HOOK, "the evict hook failed for sequence " + std::to_string(seq));
        }
    }
    return KVL_OK;
}

int32_t kvl_set_evict_hook(llama_context * ctx, kvl_evict_hook hook, void * user) {
    auto * kv = memory_of(ctx);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    kv->hook = hook;
    kv->hook_user = user;
    return KVL_OK;
}

int32_t kvl_set_limit(llama_context * ctx, llama_seq_id seq, int32_t n_slots) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    kv->seqs[seq].limit = std::max(n_slots, 0);
    return KVL_OK;
}

//
// measure
//

// The stock cache takes everything at once; what is in use follows from the tokens it has seen.
static void stock_stats(const llama_context & ctx, kvl_stats & out) {
    const llama_hparams & hp = ctx.get_model().hparams;
    uint64_t full = 0;
    for (uint32_t il = 0; il < hp.n_layer(); il++) {
        full += hp.has_kv(il) ? (hp.n_embd_k_gqa(il) + hp.n_embd_v_gqa(il)) * sizeof(ggml_fp16_t) : 0;
    }
    out = {};
    for (const auto & [buft, size] : ctx.get_memory()->memory_breakdown()) {
        out.allocated_bytes += size;
    }
    uint64_t n_seen = 0;
    for (uint32_t s = 0; s < ctx.n_seq_max(); s++) {
        n_seen += uint64_t(ctx.get_memory()->seq_pos_max(llama_seq_id(s)) + 1);
    }
    out.full_bytes = n_seen * full;
    out.used_bytes = std::min(out.allocated_bytes, n_seen * (out.allocated_bytes / std::max(ctx.n_ctx(), 1u)));
    out.peak_bytes = out.reserved_bytes = out.allocated_bytes;
}

int32_t kvl_get_stats(const llama_context * ctx, kvl_stats * out) {
    if (!ctx || !ctx->get_memory()) {
        return fail(KVL_ERR_ARGUMENT, "no context, or one without a cache");
    }
    if (!given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        if (const auto * kv = dynamic_cast<const llama_kv_paged *>(ctx->get_memory())) {
            kv->get_stats(*out);
        } else {
            stock_stats(*ctx, *out);
        }
        return int32_t(KVL_OK);
    });
}

int32_t kvl_get_seq_stats(const llama_context * ctx, llama_seq_id seq, kvl_seq_stats * out) {
    const auto * kv = memory_of(ctx, seq);
    if (!kv || !given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        kv->get_seq_stats(seq, *out);
        return int32_t(KVL_OK);
    });
}

int32_t kvl_trim(llama_context * ctx) {
    if (!memory_of(ctx)) {
        return KVL_ERR_ARGUMENT;
    }
#ifdef __GLIBC__
    malloc_trim(0);
#endif
    return KVL_OK;
}

int32_t kvl_reset_peak(llama_context * ctx) {
    auto * kv = memory_of(ctx);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    kv->reset_peak();
    return KVL_OK;
}
