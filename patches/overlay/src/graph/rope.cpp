// Rotary embedding outside the model's graph.

#include "graph/rope.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

// Whether the values that RoPE turns are the last ones of a key, not the first.
static bool turns_the_end(llm_arch arch) {
    return arch == LLM_ARCH_PLM || arch == LLM_ARCH_MINICPM3 || arch == LLM_ARCH_DEEPSEEK2;
}

static int32_t rotate_some(const llama_context & ctx, llama_kv_paged & kv, uint32_t layer_id, int64_t n, float * x,
                           const int32_t * pos) {
    const kvl_layer & layer = kv.layers[layer_id];
    const llama_hparams & hp = kv.hparams;
    const llama_cparams & cp = ctx.get_cparams();
    const llama_model & model = ctx.get_model();
    const int il = int(layer.il);
    ggml_tensor * model_factors = model.get_rope_factors(cp, il);

    constexpr size_t n_nodes = 8;
    ggml_init_params ip = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr,
                           true};
    ggml_context_ptr owner(ggml_init(ip));
    ggml_context * g = owner.get();
    ggml_tensor * rows = ggml_new_tensor_3d(g, GGML_TYPE_F32, layer.pool->d_k, 1, n);
    const bool multi = hp.use_mrope();
    ggml_tensor * at = ggml_new_tensor_1d(g, GGML_TYPE_I32, multi ? 4 * n : n);
    ggml_tensor * factors = model_factors ? ggml_dup_tensor(g, model_factors) : nullptr;
    // YaRN scales what it turns, by this; stored keys have been scaled before
    const float scale = model.get_rope_freq_scale(cp, il);
    const float magnitude = cp.yarn_ext_factor != 0.0f ? 1.0f / (1.0f + 0.1f * logf(1.0f / scale)) : 1.0f;
    const int n_rot = int(hp.n_rot(layer.il));
    const float base = model.get_rope_freq_base(cp, il);
    std::array<int, 4> sections = hp.rope_sections;
    ggml_tensor * turned =
        multi ? ggml_rope_multi(g, rows, at, factors, n_rot, sections.data(), hp.rope_type, int(cp.n_ctx_orig_yarn),
                                base, scale, cp.yarn_ext_factor, magnitude, cp.yarn_beta_fast, cp.yarn_beta_slow)
              : ggml_rope_ext(g, rows, at, factors, n_rot, hp.rope_type, int(cp.n_ctx_orig_yarn), base, scale,
                              cp.yarn_ext_factor, magnitude, cp.yarn_beta_fast, cp.yarn_beta_slow);
    if (turns_the_end(model.arch) || hp.is_mla()) {
        turned = ggml_rope_set_offset(turned, int(layer.pool->d_k) - int(hp.n_rot(layer.il)));
    }
    ggml_cgraph * gf = ggml_new_graph_custom(g, n_nodes, false);
    ggml_build_forward_expand(gf, turned);
    ggml_backend_t cpu = kv.host_backend(1); // so little work that waiting for others would cost more
    ggml_backend_buffer_ptr buffer(cpu ? ggml_backend_alloc_ctx_tensors(g, cpu) : nullptr);
    if (!buffer) {
        kvl_set_error("no memory to turn " + std::to_string(n) + " rows");
        return KVL_ERR_MEMORY;
    }
    std::copy_n(x, n * layer.pool->d_k, static_cast<float *>(rows->data));
    // text has the same position in three sections of an M-RoPE and none in the fourth
    std::fill_n(static_cast<int32_t *>(at->data), ggml_nelements(at), 0);
    for (int64_t section = 0; section < (multi ? 3 : 1); section++) {
        std::copy_n(pos, n, static_cast<int32_t *>(at->data) + section * n);
    }
    if (factors) {
        ggml_backend_tensor_get(model_factors, factors->data, 0, ggml_nbytes(factors));
    }
    if (ggml_backend_graph_compute(cpu, gf) != GGML_STATUS_SUCCESS) {
        kvl_set_error("the rotation failed in layer " + std::to_string(layer.il));
        return KVL_ERR_COMPUTE;
    }
    std::copy_n(static_cast<const float *>(turned->data), n * layer.pool->d_k, x);
    return KVL_OK;
}

int32_t kvl_rotate_rows(const llama_context & ctx, llama_kv_paged & kv, uint32_t layer_id, int64_t n, float * x,
                        const int32_t * pos) {
    const kvl_layer & layer = kv.layers[layer_id];
    if (!kv.hparams.has_rope(layer.il) || kv.hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return KVL_OK;
    }
    constexpr int64_t STEP = 8192; // bounds the scratch memory
    for (int64_t i = 0; i < n; i += STEP) {
        const int32_t rc = rotate_some(ctx, kv, layer_id, std::min(STEP, n - i), x + i * layer.pool->d_k, pos + i);
        if (rc != KVL_OK) {
            return rc;
        }
    }
    return KVL_OK;
}

int32_t kvl_roll_sequence(const llama_context & ctx, llama_kv_paged & kv, llama_seq_id seq_id) {
    if (kv.has_bounded()) {
        return kvl_fail(KVL_ERR_UNSUPPORTED, "a model with sliding windows or recurrent layers cannot be renumbered");
    }
    auto & heads_of = kv.seqs[seq_id].heads;
    const uint32_t n = heads_of[0][0].held();
    for (size_t l = 0; l < kv.layers.size(); l++) {
        for (const kvl_head & head : heads_of[l]) {
            if (head.held() != n) {
                kvl_set_error("heads hold " + std::to_string(n) + " and " + std::to_string(head.held()) +
                              " slots; only a sequence with equal heads can be renumbered");
                return KVL_ERR_ARGUMENT;
            }
        }
    }
    for (const auto & heads : heads_of) {
        for (const kvl_head & head : heads) {
            if (!head.plain()) {
                return kvl_fail(KVL_ERR_ARGUMENT, "slots that are not stored in f16 cannot be given other positions");
            }
        }
    }
    if (!kv.own_pages(seq_id)) {
        return KVL_ERR_MEMORY;
    }
    for (uint32_t l = 0; l < kv.layers.size(); l++) {
        const uint32_t d = kv.layers[l].pool->d_k;
        std::vector<uint64_t> rows; // of all heads: one transfer each way
        std::vector<int32_t> turn;
        for (kvl_head & head : heads_of[l]) {
            for (uint32_t i = 0; i < n; i++) {
                if (head.pos[i] != llama_pos(i)) { // the sinks stay where they are
                    rows.push_back(head.row(i));
                    turn.push_back(int32_t(i) - head.pos[i]);
                }
            }
            std::iota(head.pos.begin(), head.pos.end(), 0);
            head.starts.clear();
        }
        if (kv.no_alloc()) {
            continue;
        }
        std::vector<float> x(rows.size() * d);
        if (!kv.layers[l].arena->read(rows, x.data(), nullptr)) {
            return KVL_ERR_COMPUTE;
        }
        const auto rotated = [&] {
            for (size_t i = 0; kv.params.rotate && i < rows.size(); i++) {
                kv.rotate_row(x.data() + i * d, d);
            }
        };
        rotated();
        const int32_t rc = kvl_rotate_rows(ctx, kv, l, int64_t(rows.size()), x.data(), turn.data());
        rotated();
        if (rc != KVL_OK) {
            return rc;
        }
        if (!kv.layers[l].arena->write_keys(rows, x.data())) {
            return KVL_ERR_COMPUTE;
        }
    }
    kv.seqs[seq_id].n_seen = llama_pos(n);
    // its units have other positions now
    kvl_give_back(kv, seq_id);
    kv.seqs[seq_id].index = {};
    kv.seqs[seq_id].archive.cut(0);
    std::fill(kv.seqs[seq_id].window.begin(), kv.seqs[seq_id].window.end(), -1);
    return KVL_OK;
}
