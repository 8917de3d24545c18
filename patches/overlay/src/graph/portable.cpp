// Attention by stock operators: which rows they gather, and the operators of a layer.

#include "graph/graph.h"

#include <algorithm>
#include <cmath>

void llm_graph_input_kv_paged::set_rows(uint32_t l, const llama_ubatch * ubatch) {
    const kvl_layer & layer = paged->kv->layers[l];
    const kvl_arena & arena = *layer.arena;
    const layer_input & in = layers[l];
    const uint32_t n_kv = in.shape.n_kv;
    const uint32_t H = layer.n_head_kv;
    auto * index = static_cast<int32_t *>(rows->data);
    auto * mask = static_cast<ggml_fp16_t *>(masks->data) + in.live;
    // the parts of row number i of an index
    const auto put = [&](bool keys, int64_t begin, uint64_t i, uint64_t row) {
        const uint32_t n = keys ? arena.k_parts : arena.v_parts;
        const int32_t first = keys ? arena.k_part(row) : arena.v_part(row);
        for (uint32_t c = 0; c < n; c++) {
            index[begin + int64_t(i * n + c)] = first + int32_t(c);
        }
    };
    const bool apart = in.gather_k != in.gather_v;
    for (uint32_t i = 0; i < H * n_seqs; i++) {
        const kvl_head & stream = head(ubatch, l, i);
        const uint32_t n_past = stream.n() - n_seq_tokens;
        for (uint32_t t = 0; t < n_seq_tokens; t++) {
            const uint64_t to = uint64_t(i / H * n_seq_tokens + t) * H + i % H;
            put(true, in.append_k, to, stream.row(n_past + t));
            if (apart) {
                put(false, in.append_v, to, stream.row(n_past + t));
            }
        }
        const bool windowed = !layer.open();
        if (windowed && in.owns_mask && int64_t(i) < mask_streams(layer, in.shape)) {
            set_window_mask(l, ubatch, i);
        }
        ggml_fp16_t * live = windowed ? nullptr : mask + (in.shape.uniform ? 0 : uint64_t(i) * n_kv);
        if (live) {
            std::fill(live, live + n_kv, ggml_fp32_to_fp16(-INFINITY));
        }
        uint32_t n = 0;
        const auto gather = [&](uint64_t row, bool seen) {
            const uint64_t at = uint64_t(i) * n_kv + n;
            put(true, in.gather_k, at, row);
            if (apart) {
                put(false, in.gather_v, at, row);
            }
            if (live && seen) {
                live[n] = ggml_fp32_to_fp16(0.0f);
            }
            n++;
        };
        for (uint32_t t = 0; t < n_seq_tokens; t++) {
            gather(stream.row(n_past + t), true);
        }
        for (uint32_t slot = 0; slot < n_past; slot++) {
            if (stream.live[slot / KVL_PAGE_SLOTS] != 0) { // a page that nobody sees is not read
                gather(stream.row(slot), stream.is_live(slot));
            }
        }
        const llama_seq_id seq = ubatch->seq_id[i / H * n_seq_tokens][0];
        const kvl_recalled & recalled = paged->kv->seqs[seq].recalled_of(l, i % H);
        for (uint32_t row = 0; row < recalled.pages.size() * KVL_PAGE_SLOTS; row++) {
            if (recalled.used[row / KVL_PAGE_SLOTS] >> row % KVL_PAGE_SLOTS & 1) {
                gather(recalled.row(row), true);
            }
        }
        while (n < n_kv) { // padding reads a row that is sure to be finite: the first new token
            gather(stream.row(n_past), false);
        }
    }
}

int64_t llm_graph_input_kv_paged::mask_streams(const kvl_layer & layer, const kvl_layer_shape & shape) const {
    // all heads of a sequence have the same window
    return (layer.open() ? shape.uniform : n_seqs == 1) ? 1 : int64_t(layer.n_head_kv) * n_seqs;
}

void llm_graph_input_kv_paged::set_window_mask(uint32_t l, const llama_ubatch * ubatch, uint32_t i) const {
    const kvl_layer & layer = paged->kv->layers[l];
    const kvl_head & stream = head(ubatch, l, i);
    const uint32_t n_kv = layers[l].shape.n_kv;
    const uint32_t n_past = stream.n() - n_seq_tokens;
    auto * mask = static_cast<ggml_fp16_t *>(masks->data) + layers[l].live + uint64_t(i) * n_seq_tokens * n_kv;
    std::fill_n(mask, uint64_t(n_seq_tokens) * n_kv, ggml_fp32_to_fp16(-INFINITY));
    for (uint32_t t = 0; t < n_seq_tokens; t++, mask += n_kv) {
        const llama_pos first = layer.first_seen(stream.pos[n_past + t]);
        for (uint32_t n = 0; n <= t; n++) { // new tokens come first
            mask[n] = stream.pos[n_past + n] >= first ? ggml_fp32_to_fp16(0.0f) : mask[n];
        }
        for (uint32_t n = 0; n < n_past; n++) {
            mask[n_seq_tokens + n] = stream.pos[n] >= first ? ggml_fp32_to_fp16(0.0f) : mask[n_seq_tokens + n];
        }
    }
}

ggml_tensor * llm_graph_input_kv_paged::beside(const llm_graph_context & g, const kvl_layer & layer,
                                               ggml_tensor * input) {
    if (layer.arena->is_host()) {
        return input;
    }
    // every view of the input itself would be copied to the device
    ggml_tensor *& copy = copies[{layer.arena->shape.buft, input}];
    copy = copy ? copy : ggml_cont(g.ctx0, input);
    return copy;
}

ggml_tensor * llm_graph_input_kv_paged::part(const llm_graph_context & g, const kvl_layer & layer, ggml_tensor * input,
                                             int64_t ne0, int64_t ne1, int64_t ne3, int64_t first) {
    input = beside(g, layer, input);
    const size_t size = ggml_type_size(input->type);
    const size_t matrix = size_t(ne0 * ne1) * size;
    return ggml_view_4d(g.ctx0, input, ne0, ne1, 1, ne3, ne0 * size, matrix, matrix, size_t(first) * size);
}

// Flash attention of one KV head after the other: sinks belong to query heads, which are numbered within their KV head
// in q [d, n_seq_tokens, group, heads * sequences]. [d_v, n_head, n_seq_tokens, sequences]
static ggml_tensor * attend_with_sinks(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                       ggml_tensor * mask, ggml_tensor * sinks, int64_t n_head_kv, float kq_scale,
                                       float soft_cap) {
    const auto of_head = [&](ggml_tensor * t, int64_t h) {
        return ggml_view_4d(ctx, t, t->ne[0], t->ne[1], t->ne[2], t->ne[3] / n_head_kv, t->nb[1], t->nb[2],
                            t->nb[3] * size_t(n_head_kv), t->nb[3] * size_t(h));
    };
    ggml_tensor * out = nullptr;
    for (int64_t h = 0; h < n_head_kv; h++) {
        ggml_tensor * seen = mask->ne[3] == 1 ? mask : ggml_cont(ctx, of_head(mask, h));
        ggml_tensor * cur =
            ggml_flash_attn_ext(ctx, of_head(q, h), of_head(k, h), of_head(v, h), seen, kq_scale, 0.0f, soft_cap);
        ggml_flash_attn_ext_add_sinks(
            cur, ggml_view_1d(ctx, sinks, q->ne[2], size_t(h * q->ne[2]) * ggml_element_size(sinks)));
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        out = out ? ggml_concat(ctx, out, cur, 1) : cur;
    }
    return out;
}

ggml_tensor * kvl_build_portable(const llm_graph_context & g, llm_graph_input_kv_paged & inp, uint32_t l,
                                 ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks,
                                 float kq_scale) {
    ggml_context * ctx = g.ctx0;
    const kvl_layer & layer = inp.paged->kv->layers[l];
    const kvl_arena & arena = *layer.arena;
    const auto & in = inp.layers[l];
    const int64_t S = inp.n_seqs;
    const int64_t T = inp.n_seq_tokens;
    const int64_t Hq = layer.n_head;
    const int64_t H = layer.n_head_kv;
    const int64_t G = Hq / H;
    const int64_t d_k = layer.pool->d_k;
    const int64_t d_v = layer.pool->d_v;
    const int64_t n_kv = in.shape.n_kv;
    const auto rows = [&](int64_t n, int64_t first) {
        return inp.part(g, layer, inp.rows, n, 1, 1, first);
    };

    // new tokens
    const int64_t n_new = H * T * S;
    if (k) {
        k = ggml_reshape_2d(ctx, k, arena.row_size, n_new * arena.k_parts);
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, arena.k_rows, k, rows(n_new * arena.k_parts, in.append_k)));
    }
    if (v) {
        v = ggml_reshape_2d(ctx, v, arena.row_size, n_new * arena.v_parts);
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, arena.v_rows, v, rows(n_new * arena.v_parts, in.append_v)));
    }
    if (inp.ring && layer.queries && k) {
        const int64_t R = inp.n_ring;
        ggml_tensor * last = ggml_view_3d(ctx, q, d_k * Hq, R, S, q->nb[2], q->nb[2] * T, q->nb[2] * size_t(T - R));
        last = ggml_reshape_2d(ctx, ggml_is_contiguous(last) ? last : ggml_cont(ctx, last), d_k * Hq, R * S);
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, layer.queries, last, inp.ring));
    }

    // [d, n_kv, 1, H*S], stream s*H + h
    const int64_t n_all = n_kv * H * S;
    ggml_tensor * kg = ggml_get_rows(ctx, arena.k_rows, rows(n_all * arena.k_parts, in.gather_k));
    ggml_tensor * vg = ggml_get_rows(ctx, arena.v_rows, rows(n_all * arena.v_parts, in.gather_v));
    if (!arena.is_host()) {
        // accelerators have no flash attention over f32 keys
        kg = ggml_cast(ctx, kg, GGML_TYPE_F16);
        vg = ggml_cast(ctx, vg, GGML_TYPE_F16);
    }
    kg = ggml_reshape_4d(ctx, kg, d_k, n_kv, 1, H * S);
    vg = ggml_reshape_4d(ctx, vg, d_v, n_kv, 1, H * S);

    // [d_k, Hq, T*S] -> [d_k, T, G, H*S]
    ggml_tensor * q4;
    if (T == 1) {
        q4 = ggml_reshape_4d(ctx, q, d_k, 1, G, H * S);
    } else if (S == 1) {
        q4 = ggml_view_4d(ctx, q, d_k, T, G, H, q->nb[2], q->nb[1], q->nb[1] * G, 0);
    } else {
        q4 = ggml_cont(ctx, ggml_permute(ctx, ggml_reshape_4d(ctx, q, d_k, Hq, T, S), 0, 2, 1, 3));
        q4 = ggml_reshape_4d(ctx, q4, d_k, T, G, H * S);
    }

    // f16 [n_kv, T, 1, H*S or 1]: 0 where a query sees a slot, -inf elsewhere
    ggml_tensor * mask =
        inp.part(g, layer, inp.masks, n_kv, layer.open() ? 1 : T, inp.mask_streams(layer, in.shape), in.live);
    if (inp.causal && layer.open()) {
        ggml_tensor * order = ggml_view_2d(ctx, inp.beside(g, layer, inp.causal), n_kv, T, inp.causal->nb[1], 0);
        mask = ggml_add(ctx, ggml_repeat_4d(ctx, mask, n_kv, T, 1, mask->ne[3]), order);
    }
    if (sinks) {
        ggml_tensor * cur = attend_with_sinks(ctx, q4, kg, vg, mask, sinks, H, kq_scale, layer.soft_cap);
        return ggml_reshape_3d(ctx, cur, d_v, Hq, T * S);
    }
    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q4, kg, vg, mask, kq_scale, 0.0f, layer.soft_cap);
    ggml_prec_set_acc(cur, GGML_PREC_F32);

    // [d_v, G, T, H*S] -> [d_v, Hq, T*S]
    if (T > 1) {
        cur = ggml_permute(ctx, ggml_reshape_4d(ctx, cur, d_v * G, T, H, S), 0, 2, 1, 3);
        cur = ggml_cont(ctx, cur);
    }
    return ggml_reshape_3d(ctx, cur, d_v, Hq, T * S);
}
