// The C API: versions, and contexts.

#include "api/abort_guard.h"
#include "api/arguments.h"
#include "llama-context.h"
#include "llama-cparams.h"

#include <cstring>
#include <exception>

#ifndef KVL_LLAMA_COMMIT
#define KVL_LLAMA_COMMIT "unknown"
#endif

using namespace kvl_api;

int32_t kvl_abi_version(void) {
    return KVL_ABI_VERSION;
}

const char * kvl_llama_commit(void) {
    return KVL_LLAMA_COMMIT;
}

size_t kvl_struct_size(const char * name) {
#define KVL_SIZE(type)                      \
    if (name && strcmp(name, #type) == 0) { \
        return sizeof(struct type);         \
    }
    KVL_SIZE(kvl_params)
    KVL_SIZE(kvl_retrieval)
    KVL_SIZE(kvl_retrieval_stats)
    KVL_SIZE(kvl_archive_stats)
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

int32_t kvl_has_kernels(ggml_backend_dev_t device) {
    if (!device) {
        return kvl_fail(KVL_ERR_ARGUMENT, "no device");
    }
    return guarded([&] {
        return int32_t(kvl_find_kernels(kvl_device_of(ggml_backend_dev_buffer_type(device))) ? 1 : 0);
    });
}

kvl_params kvl_default_params(void) {
    return {/*.n_window =*/32,
            /*.n_pool_ctx =*/0,
            /*.score_bytes =*/64 << 20,
            /*.portable =*/0,
            /*.formats =*/0,
            /*.rotate =*/0,
            /*.kivi_bits =*/2,
            /*.kivi_group =*/32,
            /*.window_format =*/KVL_FORMAT_F16};
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
    if (p.window_format != KVL_FORMAT_F16 && p.window_format != KVL_FORMAT_Q8) {
        kvl_set_error("sliding windows are stored in f16 or q8, not in kvl_format " + std::to_string(p.window_format));
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
    return kv ? int32_t(kv->n_open) : KVL_ERR_ARGUMENT;
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
            l.latent() ? 0 : int32_t(l.pool->d_v),
            l.pool->is_host() ? 0 : 1,
            l.kernels() ? 1 : 0,
            l.kq_scale,
            ggml_backend_dev_name(kvl_device_of(l.arena->shape.buft))};
    return KVL_OK;
}
