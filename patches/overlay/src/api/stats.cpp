// The C API: what a context holds and takes, in bytes.

#include "api/arguments.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama-model.h"

#include <algorithm>

#ifdef __GLIBC__
#include <malloc.h>
#endif

using namespace kvl_api;

//
// measure
//

// The stock cache takes everything at once; what is in use follows from the tokens it has seen.
static void stock_stats(const llama_context & ctx, kvl_stats & out) {
    const llama_model & model = ctx.get_model();
    out = {};
    for (const auto & [buft, size] : ctx.get_memory()->memory_breakdown()) {
        out.allocated_bytes += size;
    }
    uint64_t n_seen = 0;
    for (uint32_t s = 0; s < ctx.n_seq_max(); s++) {
        const auto n = uint64_t(ctx.get_memory()->seq_pos_max(llama_seq_id(s)) + 1);
        out.full_bytes += kvl_full_bytes(model, n);
        n_seen += n;
    }
    const bool bounded = model.hparams.is_swa_any() || llm_arch_is_hybrid(model.arch);
    out.used_bytes = bounded ? out.full_bytes : n_seen * (out.allocated_bytes / std::max(ctx.n_ctx(), 1u));
    out.used_bytes = std::min(out.allocated_bytes, out.used_bytes);
    out.peak_bytes = out.reserved_bytes = out.allocated_bytes;
}

// Accelerators have memory of their own; what they share with the CPU (pinned), and what it repacks, is main memory.
static bool has_memory(ggml_backend_dev_t dev) {
    const enum ggml_backend_dev_type type = dev ? ggml_backend_dev_type(dev) : GGML_BACKEND_DEVICE_TYPE_CPU;
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

static void breakdown(const llama_context & ctx, bool on_device, kvl_breakdown & out) {
    out = {};
    for (const auto & [buft, bytes] : ctx.memory_breakdown()) {
        if (on_device == (!ggml_backend_buft_is_host(buft) && has_memory(ggml_backend_buft_get_device(buft)))) {
            out.model_bytes += bytes.model;
            out.context_bytes += bytes.context;
            out.compute_bytes += bytes.compute;
        }
    }
    for (size_t i = 0; on_device && i < ggml_backend_dev_count(); i++) {
        if (has_memory(ggml_backend_dev_get(i))) {
            size_t free = 0;
            size_t total = 0;
            ggml_backend_dev_memory(ggml_backend_dev_get(i), &free, &total);
            out.free_bytes += free;
        }
    }
}

int32_t kvl_get_stats(const llama_context * ctx, kvl_stats * all, llama_seq_id seq, kvl_seq_stats * one,
                      kvl_breakdown * host, kvl_breakdown * device) {
    if (!ctx || !ctx->get_memory()) {
        return kvl_fail(KVL_ERR_ARGUMENT, "no context, or one without a cache");
    }
    if (one && !memory_of(ctx, seq)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        const auto * kv = dynamic_cast<const llama_kv_paged *>(ctx->get_memory());
        if (all && kv) {
            kv->get_stats(*all);
        } else if (all) {
            stock_stats(*ctx, *all);
        }
        if (one) {
            kv->get_seq_stats(seq, *one);
        }
        if (host) {
            breakdown(*ctx, false, *host);
        }
        if (device) {
            breakdown(*ctx, true, *device);
        }
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
