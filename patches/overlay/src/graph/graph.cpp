// Inputs of a paged graph, and attention built over them.

#include "graph/graph.h"

#include "kvl-hooks.h"
#include "llama-hparams.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <stdexcept>

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne3,
                               const char * name, int layer) {
    ggml_tensor * t = ggml_new_tensor_4d(ctx, type, ne0, ne1, 1, ne3);
    ggml_set_input(t);
    ggml_format_name(t, "%s-%d", name, layer);
    return t;
}

llm_graph_input_kv_paged::llm_graph_input_kv_paged(const llm_graph_context & g, const llama_kv_paged_context * paged)
    : llm_graph_input_attn_kv(g.hparams, g.cparams, nullptr), paged(paged), n_seqs(g.ubatch.n_seqs),
      n_seq_tokens(g.ubatch.n_seq_tokens),
      n_ring(std::min<uint32_t>(g.ubatch.n_seq_tokens, std::max(paged->kv->params.n_window, 0))) {
    number.resize(n_seqs);
    uint32_t n_kv_max = 0;
    const bool fused = paged->kv->fused();
    for (uint32_t l = 0; l < paged->kv->layers.size(); l++) {
        const kvl_layer & layer = paged->kv->layers[l];
        const int64_t n_stream = int64_t(layer.n_head_kv) * n_seqs;
        layer_input in;
        in.shape = paged->shape(l, n_seq_tokens, g.ubatch);
        in.append = new_input(g.ctx0, GGML_TYPE_I64, layer.n_head_kv * g.n_tokens, 1, 1, "kvl_append", layer.il);
        if (fused) {
            const int64_t n_pages = n_stream * in.shape.n_kv / KVL_PAGE_SLOTS;
            in.table = new_input(g.ctx0, GGML_TYPE_I32, 2 * (n_stream + n_pages), 1, 1, "kvl_table", layer.il);
            in.mu.resize(size_t(n_stream), nullptr);
            in.mass.resize(in.shape.mass ? size_t(n_stream * layer.n_head / layer.n_head_kv) : 0);
        } else {
            in.gather = new_input(g.ctx0, GGML_TYPE_I32, in.shape.n_kv * n_stream, 1, 1, "kvl_gather", layer.il);
            in.live = new_input(g.ctx0, GGML_TYPE_F16, in.shape.n_kv, 1, in.shape.uniform ? 1 : n_stream, "kvl_live",
                                layer.il);
        }
        n_kv_max = std::max(n_kv_max, in.shape.n_kv);
        layers.push_back(std::move(in));
    }
    if (n_seq_tokens > 1 && !fused) {
        causal = new_input(g.ctx0, GGML_TYPE_F16, n_kv_max, n_seq_tokens, 1, "kvl_causal", 0);
    }
    if (n_ring > 0) {
        ring = new_input(g.ctx0, GGML_TYPE_I64, int64_t(n_ring) * n_seqs, 1, 1, "kvl_ring", 0);
    }
}

void llm_graph_input_kv_paged::set_table(uint32_t l, const llama_ubatch * ubatch) {
    llama_kv_paged & kv = *paged->kv;
    layer_input & in = layers[l];
    const uint32_t n_head_kv = kv.layers[l].n_head_kv;
    const uint32_t n_stream = n_head_kv * n_seqs;
    auto * table = static_cast<int32_t *>(in.table->data);
    int32_t * pages = table + 2 * n_stream;
    int32_t * live = pages + (in.table->ne[0] / 2 - n_stream);
    int32_t n_pages = 0;
    auto mass = in.mass.begin();
    for (uint32_t i = 0; i < n_stream; i++) {
        kvl_head & head = kv.seqs[ubatch->seq_id[i / n_head_kv * n_seq_tokens][0]].heads[l][i % n_head_kv];
        const std::vector<float> & mu = kv.seqs[ubatch->seq_id[i / n_head_kv * n_seq_tokens][0]].mu[l];
        in.mu[i] = mu.empty() ? nullptr : mu.data() + i % n_head_kv * kv.layers[l].pool->d_k;
        table[i] = int32_t(head.n());
        table[n_stream + i] = n_pages;
        std::copy(head.pages.begin(), head.pages.end(), pages + n_pages);
        std::copy(head.live.begin(), head.live.end(), live + n_pages);
        n_pages += int32_t(head.pages.size());
        for (size_t g = 0; in.shape.mass && g < head.mass.size(); g++) {
            *mass++ = head.mass[g].data();
        }
    }
}

void llm_graph_input_kv_paged::set_gather(uint32_t l, const llama_ubatch * ubatch) const {
    const llama_kv_paged & kv = *paged->kv;
    const layer_input & in = layers[l];
    const uint32_t n_kv = in.shape.n_kv;
    const uint32_t n_head_kv = kv.layers[l].n_head_kv;
    auto * gather = static_cast<int32_t *>(in.gather->data);
    for (uint32_t s = 0; s < n_seqs; s++) {
        for (uint32_t h = 0; h < n_head_kv; h++) {
            const kvl_head & head = kv.seqs[ubatch->seq_id[s * n_seq_tokens][0]].heads[l][h];
            const uint32_t n_past = head.n() - n_seq_tokens;
            int32_t * rows = gather + uint64_t(s * n_head_kv + h) * n_kv;
            for (uint32_t t = 0; t < n_seq_tokens; t++) {
                rows[t] = int32_t(head.row(n_past + t));
            }
            for (uint32_t i = 0; i < n_past; i++) {
                rows[n_seq_tokens + i] = int32_t(head.row(i));
            }
            // padding reads a row that is sure to be finite: the first new token
            std::fill(rows + head.n(), rows + n_kv, rows[0]);
            if (!in.shape.uniform || (s == 0 && h == 0)) {
                auto * row = static_cast<ggml_fp16_t *>(in.live->data);
                row += in.shape.uniform ? 0 : uint64_t(s * n_head_kv + h) * n_kv;
                std::fill(row, row + head.n(), ggml_fp32_to_fp16(0.0f));
                std::fill(row + head.n(), row + n_kv, ggml_fp32_to_fp16(-INFINITY));
                for (uint32_t i = 0; i < n_past; i++) {
                    if (!(head.live[i / KVL_PAGE_SLOTS] >> i % KVL_PAGE_SLOTS & 1)) {
                        row[n_seq_tokens + i] = ggml_fp32_to_fp16(-INFINITY);
                    }
                }
            }
        }
    }
}

void llm_graph_input_kv_paged::set_input(const llama_ubatch * ubatch) {
    const llama_kv_paged & kv = *paged->kv;
    for (uint32_t s = 0; s < n_seqs; s++) {
        number[s] = ubatch->pos[s * n_seq_tokens] + 1;
    }
    for (uint32_t l = 0; l < layers.size(); l++) {
        const uint32_t n_head_kv = kv.layers[l].n_head_kv;
        assert(ggml_backend_buffer_is_host(layers[l].append->buffer));
        auto * append = static_cast<int64_t *>(layers[l].append->data);
        for (uint32_t s = 0; s < n_seqs; s++) {
            const auto & heads = kv.seqs[ubatch->seq_id[s * n_seq_tokens][0]].heads[l];
            for (uint32_t h = 0; h < n_head_kv; h++) {
                const uint32_t n_past = heads[h].n() - n_seq_tokens;
                for (uint32_t t = 0; t < n_seq_tokens; t++) {
                    append[uint64_t(s * n_seq_tokens + t) * n_head_kv + h] = int64_t(heads[h].row(n_past + t));
                }
            }
        }
        if (layers[l].table) {
            set_table(l, ubatch);
        } else {
            set_gather(l, ubatch);
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
        auto * rows = static_cast<int64_t *>(ring->data);
        const int64_t w = kv.params.n_window;
        for (uint32_t s = 0; s < n_seqs; s++) {
            for (uint32_t t = n_seq_tokens - n_ring; t < n_seq_tokens; t++) {
                const uint32_t i = s * n_seq_tokens + t;
                *rows++ = ubatch->seq_id[i][0] * w + ubatch->pos[i] % w;
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

ggml_tensor * llm_graph_input_kv_paged::build_mask(const llm_graph_context & g, uint32_t layer) const {
    const layer_input & in = layers[layer];
    const uint32_t n_kv = in.shape.n_kv;
    if (!causal) {
        return in.live;
    }
    ggml_tensor * order = ggml_view_2d(g.ctx0, causal, n_kv, n_seq_tokens, causal->nb[1], 0);
    ggml_tensor * mask = ggml_repeat_4d(g.ctx0, in.live, n_kv, n_seq_tokens, 1, in.live->ne[3]);
    return ggml_add(g.ctx0, mask, order);
}

//
// hooks
//

llm_graph_input_attn_kv * kvl_build_attn_inp(const llm_graph_context & g) {
    const auto * paged = dynamic_cast<const llama_kv_paged_context *>(g.mctx);
    if (!paged) {
        return nullptr;
    }
    return static_cast<llm_graph_input_attn_kv *>(
        g.res->add_input(std::make_unique<llm_graph_input_kv_paged>(g, paged)));
}

bool kvl_is_paged(const llm_graph_input_attn_kv * inp) {
    return dynamic_cast<const llm_graph_input_kv_paged *>(inp) != nullptr;
}

static ggml_tensor * contiguous(ggml_context * ctx, ggml_tensor * t) {
    return ggml_is_contiguous(t) ? t : ggml_cont(ctx, t);
}

// Gathers and stock flash attention; [d_v, n_head, n_tokens].
static ggml_tensor * build_portable(const llm_graph_context & g, const kvl_layer & layer,
                                    const llm_graph_input_kv_paged & inp, ggml_tensor * q, float kq_scale) {
    ggml_context * ctx = g.ctx0;
    const auto l = uint32_t(inp.paged->kv->find_layer(int32_t(layer.il)));
    const auto & in = inp.layers[l];
    const int64_t S = inp.n_seqs;
    const int64_t T = inp.n_seq_tokens;
    const int64_t Hq = layer.n_head;
    const int64_t H = layer.n_head_kv;
    const int64_t G = Hq / H;
    const int64_t d_k = layer.pool->d_k;
    const int64_t d_v = layer.pool->d_v;
    const int64_t n_kv = in.shape.n_kv;

    ggml_tensor * kg = ggml_get_rows(ctx, layer.pool->k, in.gather);
    ggml_tensor * vg = ggml_get_rows(ctx, layer.pool->v, in.gather);
    if (!layer.pool->is_host()) {
        // accelerators have no flash attention over f32 keys
        kg = ggml_cast(ctx, kg, GGML_TYPE_F16);
        vg = ggml_cast(ctx, vg, GGML_TYPE_F16);
    }
    kg = ggml_reshape_4d(ctx, kg, d_k, n_kv, 1, H * S);
    vg = ggml_reshape_4d(ctx, vg, d_v, n_kv, 1, H * S);

    // [d_k, Hq, T*S] -> [d_k, T, G, H*S], stream s*H + h
    ggml_tensor * q4;
    if (T == 1) {
        q4 = ggml_reshape_4d(ctx, q, d_k, 1, G, H * S);
    } else if (S == 1) {
        q4 = ggml_view_4d(ctx, q, d_k, T, G, H, q->nb[2], q->nb[1], q->nb[1] * G, 0);
    } else {
        q4 = ggml_cont(ctx, ggml_permute(ctx, ggml_reshape_4d(ctx, q, d_k, Hq, T, S), 0, 2, 1, 3));
        q4 = ggml_reshape_4d(ctx, q4, d_k, T, G, H * S);
    }

    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q4, kg, vg, inp.build_mask(g, l), kq_scale, 0.0f, layer.soft_cap);
    ggml_prec_set_acc(cur, GGML_PREC_F32);

    // [d_v, G, T, H*S] -> [d_v*Hq, T*S]
    if (T > 1) {
        cur = ggml_permute(ctx, ggml_reshape_4d(ctx, cur, d_v * G, T, H, S), 0, 2, 1, 3);
        cur = ggml_cont(ctx, cur);
    }
    return ggml_reshape_3d(ctx, cur, d_v, Hq, T * S);
}

// Operators over the pages (kvl-attn.h); [d_v, n_head, n_tokens].
static ggml_tensor * build_fused(const llm_graph_context & g, const llama_kv_paged & kv, const kvl_layer & layer,
                                 llm_graph_input_kv_paged & inp, ggml_tensor * q, float kq_scale) {
    ggml_context * ctx = g.ctx0;
    auto & in = inp.layers[size_t(kv.find_layer(int32_t(layer.il)))];
    const int64_t S = inp.n_seqs;
    const int64_t T = inp.n_seq_tokens;
    const int64_t Hq = layer.n_head;
    const int64_t H = layer.n_head_kv;
    const int64_t d_v = layer.pool->d_v;
    const int64_t n_kv = in.shape.n_kv;
    const int64_t n_rows = T * Hq / H;
    const bool few = n_rows <= KVL_ATTN_FEW_ROWS;
    // enough parts for many threads, however many there are: the result does not depend on their number
    const int64_t n_split = few ? std::clamp<int64_t>(n_kv / 128, 1, std::max<int64_t>(1, 32 / (H * S))) : 1;
    in.kernel = std::make_unique<kvl_attn_params>(kvl_attn_params{
        int32_t(Hq), int32_t(H), int32_t(S), int32_t(T), int32_t(n_split), int32_t(n_kv), kq_scale, layer.soft_cap,
        in.shape.mass ? in.mass.data() : nullptr, in.shape.mass == KVL_MASS_LAST ? inp.number.data() : nullptr,
        layer.formats.data(), in.mu.data(), /*rms =*/0});
    const auto op = [&](ggml_custom_op_t f, int64_t ne0, int64_t ne1, int64_t ne2, std::vector<ggml_tensor *> args) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, 1, args.data(), int(args.size()), f, GGML_N_TASKS_MAX,
                              in.kernel.get());
    };
    std::vector<ggml_tensor *> args = {q, layer.pool->k, layer.pool->v, in.table};
    if (few && (n_split > 1 || in.shape.mass)) {
        const int64_t size = n_rows * H * S * ((d_v + 2) * n_split + (in.shape.mass ? n_kv : 0));
        return op(kv.attn.merge, d_v, Hq, T * S, {op(kv.attn.compute, size, 1, 1, args), in.table});
    }
    if (!in.shape.mass) {
        return op(kv.attn.compute, d_v, Hq, T * S, args);
    }
    ggml_tensor * cur = op(kv.attn.compute, (d_v + 2) * Hq * T * S, 1, 1, args);
    args.push_back(cur);
    ggml_build_forward_expand(g.gf, op(kv.attn.mass, 1, 1, 1, args));
    return ggml_view_3d(ctx, cur, d_v, Hq, T * S, d_v * sizeof(float), d_v * Hq * sizeof(float), 0);
}

ggml_tensor * kvl_build_attn(const llm_graph_context & g, llm_graph_input_attn_kv * inp_base, ggml_tensor * q,
                             ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale,
                             int il) {
    auto * inp = static_cast<llm_graph_input_kv_paged *>(inp_base);
    llama_kv_paged & kv = *inp->paged->kv;
    const int32_t l = kv.find_layer(il);
    if (kq_b || sinks || l < 0) {
        const std::string what = kq_b ? "position biases" : sinks ? "attention sinks" : "a layer without a cache";
        kvl_set_error("the model uses " + what + " in layer " + std::to_string(il) +
                      ", which the paged cache does not serve; use --policy full");
        throw std::runtime_error(kvl_last_error());
    }
    kvl_layer & layer = kv.layers[l];
    const auto & in = inp->layers[l];
    ggml_context * ctx = g.ctx0;

    layer.kq_scale = kq_scale;
    layer.soft_cap = g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f;

    const int64_t S = inp->n_seqs;
    const int64_t T = inp->n_seq_tokens;
    const int64_t Hq = layer.n_head;
    const int64_t H = layer.n_head_kv;
    const int64_t d_k = layer.pool->d_k;
    const int64_t d_v = layer.pool->d_v;
    if (v->ne[0] == d_v * H && v->ne[1] == T * S) { // some models make all heads' values one row
        v = ggml_reshape_3d(ctx, contiguous(ctx, v), d_v, H, T * S);
    }
    if (q->ne[0] != d_k || q->ne[1] != Hq || k->ne[0] != d_k || k->ne[1] != H || v->ne[0] != d_v || v->ne[1] != H) {
        kvl_set_error("the attention of layer " + std::to_string(il) + " has shapes that the model file does not name");
        throw std::runtime_error(kvl_last_error());
    }

    const auto rotated = [&](ggml_tensor * x) {
        if (!kv.params.rotate) {
            return x;
        }
        return ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], 1, &x, 1, kv.attn.rotate,
                              GGML_N_TASKS_MAX, nullptr);
    };
    q = rotated(contiguous(ctx, q));
    k = ggml_reshape_2d(ctx, rotated(contiguous(ctx, k)), d_k, H * T * S);
    v = ggml_reshape_2d(ctx, rotated(contiguous(ctx, v)), d_v, H * T * S);
    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, layer.pool->k, k, in.append));
    ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, layer.pool->v, v, in.append));

    if (inp->ring) {
        const int64_t R = inp->n_ring;
        ggml_tensor * last = ggml_view_3d(ctx, q, d_k * Hq, R, S, q->nb[2], q->nb[2] * T, q->nb[2] * size_t(T - R));
        last = ggml_reshape_2d(ctx, contiguous(ctx, last), d_k * Hq, R * S);
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, layer.queries, last, inp->ring));
    }

    ggml_tensor * cur =
        kv.fused() ? build_fused(g, kv, layer, *inp, q, kq_scale) : build_portable(g, layer, *inp, q, kq_scale);
    cur = ggml_reshape_2d(ctx, rotated(contiguous(ctx, cur)), d_v * Hq, T * S);
    ggml_build_forward_expand(g.gf, cur);
    return cur;
}
