// Attention of a paged graph: its inputs, and what llama.cpp's graph calls.

#include "graph/graph.h"

#include "kvl-hooks.h"
#include "llama-hparams.h"

#include <algorithm>
#include <stdexcept>

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

llm_graph_input_kv_paged::llm_graph_input_kv_paged(const llm_graph_context & g, const llama_kv_paged_context * paged)
    : llm_graph_input_attn_kv(g.hparams, g.cparams, nullptr), paged(paged), n_seqs(g.ubatch.n_seqs),
      n_seq_tokens(g.ubatch.n_seq_tokens),
      n_ring(std::min<uint32_t>(g.ubatch.n_seq_tokens, std::max(paged->kv->params.n_window, 0))) {
    int64_t n_table = 0, n_rows = 0, n_masks = 0;
    uint32_t n_kv_max = 0;
    bool any_portable = false;
    // parts begin where every device lets a view begin
    const auto reserve = [](int64_t & end, int64_t n) {
        const int64_t begin = end;
        end += GGML_PAD(n, 128);
        return begin;
    };
    for (uint32_t l = 0; l < paged->kv->layers.size(); l++) {
        const kvl_layer & layer = paged->kv->layers[l];
        const int64_t n_stream = int64_t(layer.n_head_kv) * n_seqs;
        layer_input in;
        in.shape = paged->shape(l, n_seq_tokens, g.ubatch);
        if (layer.kernels()) {
            in.table = int32_t(n_table);
            n_table += kvl_table_size(KVL_FORMAT_COUNT, n_stream, n_stream * in.shape.n_kv / KVL_PAGE_SLOTS);
        } else {
            const kvl_arena & arena = *layer.arena;
            const bool apart = arena.k_parts != arena.v_parts; // else the rows of v are those of k
            const int64_t n_new = int64_t(layer.n_head_kv) * g.n_tokens;
            in.append_k = reserve(n_rows, n_new * arena.k_parts);
            in.append_v = apart ? reserve(n_rows, n_new * arena.v_parts) : in.append_k;
            in.gather_k = reserve(n_rows, n_stream * in.shape.n_kv * arena.k_parts);
            in.gather_v = apart ? reserve(n_rows, n_stream * in.shape.n_kv * arena.v_parts) : in.gather_k;
            const int64_t n_mask = mask_streams(layer, in.shape);
            for (uint32_t i = paged->kv->n_open; i < l && in.owns_mask; i++) {
                const kvl_layer & before = paged->kv->layers[i];
                in.owns_mask = before.kernels() || layers[i].shape.n_kv != in.shape.n_kv ||
                               before.n_swa != layer.n_swa || mask_streams(before, layers[i].shape) != n_mask;
                in.live = layers[i].live;
            }
            if (in.owns_mask) {
                in.live = reserve(n_masks, in.shape.n_kv * n_mask * (layer.open() ? 1 : n_seq_tokens));
            }
            n_kv_max = std::max(n_kv_max, in.shape.n_kv);
            any_portable = true;
        }
        layers.push_back(in);
    }
    if (n_table > 0) {
        table = new_input(g.ctx0, GGML_TYPE_I32, n_table, 1, "kvl_table");
    }
    if (any_portable) {
        rows = new_input(g.ctx0, GGML_TYPE_I32, n_rows, 1, "kvl_rows");
        masks = new_input(g.ctx0, GGML_TYPE_F16, n_masks, 1, "kvl_masks");
        if (n_seq_tokens > 1) {
            causal = new_input(g.ctx0, GGML_TYPE_F16, n_kv_max, n_seq_tokens, "kvl_causal");
        }
        if (n_ring > 0) {
            ring = new_input(g.ctx0, GGML_TYPE_I32, int64_t(n_ring) * n_seqs, 1, "kvl_ring");
        }
    }
}

const kvl_head & llm_graph_input_kv_paged::head(const llama_ubatch * ubatch, uint32_t layer, uint32_t stream) const {
    const uint32_t n_head_kv = paged->kv->layers[layer].n_head_kv;
    const llama_seq_id seq = ubatch->seq_id[stream / n_head_kv * n_seq_tokens][0];
    return paged->kv->seqs[seq].heads[layer][stream % n_head_kv];
}

void llm_graph_input_kv_paged::set_input(const llama_ubatch * ubatch) {
    for (uint32_t l = 0; l < layers.size(); l++) {
        if (paged->kv->layers[l].kernels()) {
            set_table(l, ubatch);
        } else {
            set_rows(l, ubatch);
        }
    }
    if (causal && causal->buffer) {
        auto * mask = static_cast<ggml_fp16_t *>(causal->data);
        for (int64_t t = 0; t < causal->ne[1]; t++, mask += causal->ne[0]) {
            std::fill(mask, mask + causal->ne[0], ggml_fp32_to_fp16(0.0f));
            std::fill(mask + t + 1, mask + n_seq_tokens, ggml_fp32_to_fp16(-INFINITY));
        }
    }
    if (ring && ring->buffer) {
        auto * to = static_cast<int32_t *>(ring->data);
        const int32_t w = paged->kv->params.n_window;
        for (uint32_t s = 0; s < n_seqs; s++) {
            for (uint32_t t = n_seq_tokens - n_ring; t < n_seq_tokens; t++) {
                const uint32_t i = s * n_seq_tokens + t;
                *to++ = ubatch->seq_id[i][0] * w + ubatch->pos[i] % w;
            }
        }
    }
}

bool llm_graph_input_kv_paged::can_reuse(const llm_graph_params & params) {
    // the memory of a context never changes its kind
    paged = static_cast<const llama_kv_paged_context *>(params.mctx);
    if (params.ubatch.n_seqs != n_seqs || params.ubatch.n_seq_tokens != n_seq_tokens) {
        return false;
    }
    for (uint32_t l = 0; l < layers.size(); l++) {
        if (!(layers[l].shape == paged->shape(l, n_seq_tokens, params.ubatch))) {
            return false;
        }
    }
    return true;
}

//
// the hook of a layer
//

static ggml_tensor * contiguous(ggml_context * ctx, ggml_tensor * t) {
    return !t || ggml_is_contiguous(t) ? t : ggml_cont(ctx, t);
}

ggml_tensor * kvl_build_attn(const llm_graph_context & g, llm_graph_input_attn_kv * inp_base, ggml_tensor * q,
                             ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale,
                             int il) {
    auto * inp = static_cast<llm_graph_input_kv_paged *>(inp_base);
    llama_kv_paged & kv = *inp->paged->kv;
    const int32_t l = kv.find_layer(il);
    if (kq_b || l < 0) {
        const std::string what = kq_b ? "position biases" : "a layer without a cache";
        kvl_set_error("the model uses " + what + " in layer " + std::to_string(il) +
                      ", which the paged cache does not serve; use --policy full");
        throw std::runtime_error(kvl_last_error());
    }
    kvl_layer & layer = kv.layers[l];
    ggml_context * ctx = g.ctx0;

    layer.kq_scale = kq_scale;
    layer.soft_cap = g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f;
    layer.sinks = sinks;

    const int64_t n_tokens = int64_t(inp->n_seqs) * inp->n_seq_tokens;
    const int64_t H = layer.n_head_kv;
    const int64_t d_k = layer.pool->d_k;
    const int64_t d_v = layer.pool->d_v;
    if (v && v->ne[0] == d_v * H && v->ne[1] == n_tokens) { // some models make all heads' values one row
        v = ggml_reshape_3d(ctx, contiguous(ctx, v), d_v, H, n_tokens);
    }
    const auto is = [](const ggml_tensor * x, int64_t d, int64_t n) {
        return !x || (x->ne[0] == d && x->ne[1] == n);
    };
    if (!is(q, d_k, layer.n_head) || !is(k, d_k, H) || !is(v, d_v, H) || (!v && k && !layer.latent())) {
        kvl_set_error("the attention of layer " + std::to_string(il) + " has shapes that the model file does not name");
        throw std::runtime_error(kvl_last_error());
    }

    const auto rotated = [&](ggml_tensor * x) {
        if (!x || !kv.params.rotate || !layer.open()) {
            return x;
        }
        return ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], 1, &x, 1, layer.kernels()->rotate,
                              GGML_N_TASKS_MAX, nullptr);
    };
    q = rotated(contiguous(ctx, q));
    k = rotated(contiguous(ctx, k));
    v = rotated(contiguous(ctx, v));
    const auto build = layer.kernels() ? kvl_build_fused : kvl_build_portable;
    ggml_tensor * cur = build(g, *inp, uint32_t(l), q, k, v, sinks, kq_scale);
    cur = ggml_reshape_2d(ctx, rotated(contiguous(ctx, cur)), d_v * layer.n_head, n_tokens);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}

ggml_tensor * kvl_build_attn_mla(const llm_graph_context & g, llm_graph_input_attn_kv * inp, ggml_tensor * q,
                                 ggml_tensor * k, ggml_tensor * v_mla, ggml_tensor * kq_b, ggml_tensor * sinks,
                                 float kq_scale, int il) {
    ggml_context * ctx = g.ctx0;
    const int64_t n_head = q->ne[1];
    const int64_t n_tokens = q->ne[2];
    ggml_tensor * cur = kvl_build_attn(g, inp, q, k, nullptr, kq_b, sinks, kq_scale, il);
    cur = ggml_reshape_3d(ctx, cur, cur->ne[0] / n_head, n_head, n_tokens);
    // what was added up of the keys begins with the values
    cur = ggml_view_3d(ctx, cur, v_mla->ne[0], n_head, n_tokens, cur->nb[1], cur->nb[2], 0);
    cur = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, cur, 0, 2, 1, 3));
    cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0] * n_head, n_tokens);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}
