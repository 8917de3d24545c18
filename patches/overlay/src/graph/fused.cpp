// Attention by page kernels: the table that they read, and the operators of a layer.

#include "graph/graph.h"

#include <algorithm>

kvl_pool_ref kvl_ref_of(const kvl_pool * pool) {
    return pool ? kvl_pool_ref{pool->k_row | pool->v_row << 8, pool->base_ref()} : kvl_pool_ref{};
}

// Writes the pages of a head, those of which attention sees a slot, or all; returns where the next ones go.
static kvl_page_ref * fill_pages(const kvl_head & head, kvl_page_ref * to) {
    const uint32_t n_pages = uint32_t(head.pages.size());
    for (uint32_t p = 0; p < n_pages; p++) {
        *to = {head.pages[p], head.live[p], int32_t(p * KVL_PAGE_SLOTS), 0};
        to += head.live[p] != 0 ? 1 : 0; // one that is not seen is written over
    }
    return to;
}

void llm_graph_input_kv_paged::set_table(uint32_t l, const llama_ubatch * ubatch) {
    const llama_kv_paged & kv = *paged->kv;
    const kvl_layer & layer = kv.layers[l];
    const uint32_t n_stream = layer.n_head_kv * n_seqs;
    auto * pools = reinterpret_cast<kvl_pool_ref *>(static_cast<int32_t *>(table->data) + layers[l].table);
    auto * streams = reinterpret_cast<kvl_stream_ref *>(pools + KVL_FORMAT_COUNT);
    auto * pages = reinterpret_cast<kvl_page_ref *>(streams + n_stream);
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        pools[f] = kvl_ref_of(layer.pools[f]);
    }
    kvl_page_ref * next = pages;
    for (uint32_t i = 0; i < n_stream; i++) {
        const uint32_t token = i / layer.n_head_kv * n_seq_tokens;
        const llama_seq_id seq = ubatch->seq_id[token][0];
        const uint32_t h = i % layer.n_head_kv;
        const kvl_head & stream = head(ubatch, l, i);
        const int32_t first = int32_t(next - pages);
        kvl_page_ref * end = fill_pages(stream, next);
        for (kvl_page_ref * page = next; !stream.mass.empty() && page < end; page++) {
            page->mass = int32_t(stream.mass[uint32_t(page->slot) / KVL_PAGE_SLOTS]);
        }
        const bool has_mean = !kv.seqs[seq].mu[l].empty();
        streams[i] = {
            /*n_slots =*/int32_t(stream.n()),
            /*first =*/first,
            /*n_pages =*/int32_t(end - next),
            /*mean =*/has_mean ? int32_t(layer.arena->mean_row(uint32_t(seq), layer.first_head + h)) : -1,
            /*number =*/ubatch->pos[token] + 1,
            /*window =*/seq * kv.params.n_window,
            /*reserved =*/{},
        };
        next = end;
    }
}

ggml_tensor * kvl_build_fused(const llm_graph_context & g, llm_graph_input_kv_paged & inp, uint32_t l, ggml_tensor * q,
                              ggml_tensor * k, ggml_tensor * v, float kq_scale) {
    ggml_context * ctx = g.ctx0;
    const llama_kv_paged & kv = *inp.paged->kv;
    const kvl_layer & layer = kv.layers[l];
    const kvl_kernels & kernels = *layer.kernels();
    const kvl_arena & arena = *layer.arena;
    const auto & in = inp.layers[l];
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
    kvl_attn_params params = {in.table,      KVL_FORMAT_COUNT, int32_t(S),     int32_t(H),   int32_t(n_split),
                              int32_t(n_kv), kq_scale,         layer.soft_cap, int32_t(d_v), int32_t(in.shape.mass)};
    const auto op = [&](ggml_custom_op_t f, int64_t ne0, int64_t ne1, int64_t ne2, std::vector<ggml_tensor *> args) {
        ggml_tensor * t = ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, 1, args.data(), int(args.size()), f,
                                         GGML_N_TASKS_MAX, nullptr);
        return kvl_with_params(t, params);
    };
    // what changes a tensor is in the graph though nothing depends on it
    const auto change = [&](ggml_custom_op_t f, ggml_tensor * target, std::vector<ggml_tensor *> args) {
        ggml_tensor * t = ggml_custom_inplace(ctx, target, args.data(), int(args.size()), f, GGML_N_TASKS_MAX, nullptr);
        ggml_build_forward_expand(g.gf, kvl_with_params(t, params));
    };

    change(kernels.append, arena.pages, {k, v, inp.table});
    if (inp.n_ring > 0) {
        params.n_kv = kv.params.n_window;
        change(kernels.window, layer.queries, {q, inp.table});
        params.n_kv = int32_t(n_kv);
    }
    std::vector<ggml_tensor *> args = {q, inp.table, arena.pages, arena.means};
    if (!in.shape.mass) {
        if (few && n_split > 1) {
            return op(kernels.merge, d_v, Hq, T * S,
                      {op(kernels.compute, n_rows * H * S * (d_v + 2) * n_split, 1, 1, args)});
        }
        return op(kernels.compute, d_v, Hq, T * S, args);
    }
    ggml_tensor * cur;
    if (few) {
        cur = op(kernels.compute, n_rows * H * S * ((d_v + 2) * n_split + n_kv), 1, 1, args);
    } else {
        cur = op(kernels.compute, (d_v + 2) * Hq * T * S, 1, 1, args);
    }
    args.insert(args.begin(), cur);
    change(kernels.mass, arena.mass.tensor(), args);
    if (few) {
        return op(kernels.merge, d_v, Hq, T * S, {cur});
    }
    return ggml_view_3d(ctx, cur, d_v, Hq, T * S, d_v * sizeof(float), d_v * Hq * sizeof(float), 0);
}
