// What a context will take: its buffers by kind, and the cache growing without anything being computed.

#include "kvl-api.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama-model.h"

using namespace kvl_api;

// As llama_context::decode does it, up to the graph.
static int32_t append(llama_context & ctx, const llama_batch & batch) {
    const llama_model & model = ctx.get_model();
    const llama_batch_compat compat(&ctx, batch);
    llama_batch_allocr allocr(model.hparams.n_pos_per_embd());
    if (!allocr.init(*compat.batch_ext, model.vocab, false)) {
        return fail(KVL_ERR_ARGUMENT, "the batch does not continue its sequences");
    }
    const llama_memory_context_ptr mctx = ctx.get_memory()->init_batch(allocr, ctx.n_ubatch(), false);
    if (!mctx || mctx->get_status() == LLAMA_MEMORY_STATUS_FAILED_COMPUTE) {
        return -2;
    }
    if (mctx->get_status() == LLAMA_MEMORY_STATUS_FAILED_PREPARE) {
        return 1;
    }
    do {
        if (!mctx->apply()) {
            return -2;
        }
    } while (mctx->next());
    return 0;
}

int32_t kvl_append(llama_context * ctx, llama_batch batch) {
    if (!ctx || !ctx->get_memory()) {
        return fail(KVL_ERR_ARGUMENT, "no context, or one without a cache");
    }
    if (!ctx->get_model().hparams.no_alloc) {
        return fail(KVL_ERR_ARGUMENT, "the model has its weights, so that its cache cannot hold what was not computed");
    }
    if (batch.n_tokens <= 0 || !batch.token || uint32_t(batch.n_tokens) > ctx->n_batch()) {
        return fail(KVL_ERR_ARGUMENT, "a batch of " + std::to_string(batch.n_tokens) +
                                          " tokens is empty or exceeds n_batch = " + std::to_string(ctx->n_batch()));
    }
    return guarded([&] {
        return append(*ctx, batch);
    });
}

// Accelerators have memory of their own; what they share with the CPU (pinned), and what it repacks, is main memory.
static bool has_memory(ggml_backend_dev_t dev) {
    const enum ggml_backend_dev_type type = dev ? ggml_backend_dev_type(dev) : GGML_BACKEND_DEVICE_TYPE_CPU;
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

int32_t kvl_get_breakdown(const llama_context * ctx, bool on_device, kvl_breakdown * out) {
    if (!ctx || !out) {
        return fail(KVL_ERR_ARGUMENT, "no context");
    }
    return guarded([&] {
        *out = {};
        for (const auto & [buft, bytes] : ctx->memory_breakdown()) {
            if (on_device == (!ggml_backend_buft_is_host(buft) && has_memory(ggml_backend_buft_get_device(buft)))) {
                out->model_bytes += bytes.model;
                out->context_bytes += bytes.context;
                out->compute_bytes += bytes.compute;
            }
        }
        for (size_t i = 0; on_device && i < ggml_backend_dev_count(); i++) {
            if (has_memory(ggml_backend_dev_get(i))) {
                size_t free = 0;
                size_t total = 0;
                ggml_backend_dev_memory(ggml_backend_dev_get(i), &free, &total);
                out->free_bytes += free;
            }
        }
        return int32_t(KVL_OK);
    });
}
