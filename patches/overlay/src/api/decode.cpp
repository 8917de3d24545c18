// The C API: decoding a batch, and taking room for one without computing it.

#include "api/arguments.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <memory>

using namespace kvl_api;

// Sets the error if upstream would refuse the batch in its log only, or assert on it.
static bool check_batch(const llama_context & ctx, const llama_kv_paged * kv, const llama_batch & batch) {
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
    std::unique_ptr<kvl_positions_check> positions(kv ? new kvl_positions_check(*kv) : nullptr);
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        if (batch.token[i] < 0 || batch.token[i] >= n_vocab) {
            kvl_set_error("token " + std::to_string(batch.token[i]) + " is not one of the model's " +
                          std::to_string(n_vocab));
            return false;
        }
        if (positions && !positions->add(batch.n_seq_id[i], batch.seq_id[i], batch.pos[i])) {
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

// As llama_context::decode does it, up to the graph.
static int32_t append(llama_context & ctx, const llama_batch & batch) {
    const llama_model & model = ctx.get_model();
    const llama_batch_compat compat(&ctx, batch);
    llama_batch_allocr allocr(model.hparams.n_pos_per_embd());
    if (!allocr.init(*compat.batch_ext, model.vocab, false)) {
        return kvl_fail(KVL_ERR_ARGUMENT, "the batch does not continue its sequences");
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

int32_t kvl_decode(llama_context * ctx, llama_batch batch) {
    if (!ctx || !ctx->get_memory()) {
        return kvl_fail(KVL_ERR_ARGUMENT, "no context, or one without a cache");
    }
    return guarded([&] {
        if (!check_batch(*ctx, dynamic_cast<llama_kv_paged *>(ctx->get_memory()), batch)) {
            return int32_t(KVL_ERR_ARGUMENT);
        }
        kvl_set_error("");
        const bool counts = ctx->get_model().hparams.no_alloc;
        const int32_t code = counts ? append(*ctx, batch) : llama_decode(ctx, batch);
        auto * kv = dynamic_cast<llama_kv_paged *>(ctx->get_memory());
        if (code != 0 && code != 1 && kv && kv->recr) {
            // a recurrent state cannot be taken back: what it belongs to goes with it
            for (int32_t i = 0; i < batch.n_tokens; i++) {
                kv->truncate(batch.seq_id[i][0], 0);
            }
        }
        if (kv && code == 0 && kv->params.window_format != KVL_FORMAT_F16) {
            ctx->synchronize();
        }
        for (int32_t i = 0; kv && code == 0 && i < batch.n_tokens; i++) {
            // what a long batch saw of a window is not held until the next one
            kv->slide(batch.seq_id[i][0]);
            kv->store_windows(batch.seq_id[i][0], int(ctx->n_threads_batch()));
        }
        if (code != 0 && *kvl_last_error() == 0) {
            kvl_set_error("llama.cpp could not compute a batch of " + std::to_string(batch.n_tokens) +
                          " tokens (code " + std::to_string(code) + ")");
        }
        return code;
    });
}
