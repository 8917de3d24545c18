// Attention by page kernels: the table that they read, and the operators of a layer.

#include "graph/graph.h"

#include <algorithm>

static_assert(int(KVL_MASS_SUM) == KVL_ATTN_MASS_SUM && int(KVL_MASS_LAST) == KVL_ATTN_MASS_LAST, "the same kinds");

void kvl_write_table(void * to, const kvl_layer & layer, const std::vector<kvl_table_stream> & streams, bool all) {
    const int n = int(streams.size());
    kvl_pool_ref * pools = kvl_table_pools(to);
    kvl_stream_ref * refs = kvl_table_streams(to, KVL_FORMAT_COUNT);
    kvl_page_ref * pages = kvl_table_pages(to, KVL_FORMAT_COUNT, n);
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        const kvl_pool * pool = layer.pools[f];
        pools[f] = pool ? kvl_pool_ref{pool->k_row | pool->v_row << 8, pool->base_ref()} : kvl_pool_ref{};
    }
    kvl_page_ref * next = pages;
    for (int i = 0; i < n; i++) {
        const kvl_head & head = *streams[i].head;
        kvl_page_ref * first = next;
        // what was recalled comes before all slots of the head, so that every new token sees it
        int32_t slot0 = 0;
        const kvl_recalled & recalled = streams[i].recalled;
        for (size_t p = 0; p < recalled.pages.size(); p++) {
            if (recalled.pages[p] != kvl_pool::NONE) {
                *next++ = {kvl_head::page_entry(KVL_FORMAT_F16, recalled.pages[p]), recalled.used[p], slot0,
                           recalled.mass.empty() ? 0 : int32_t(recalled.mass[p])};
                slot0 += KVL_PAGE_SLOTS;
            }
        }
        kvl_page_ref * held = next;
        refs[i] = {slot0 + int32_t(head.n()), int32_t(first - pages), 0,           streams[i].mean,
                   streams[i].number,         streams[i].window,      layer.n_swa, 0};
        for (uint32_t p = 0; p < head.pages.size(); p++) {
            const uint32_t live = all ? head.all_live(p) : head.live[p];
            if (all || live != 0) {
                *next++ = {head.pages[p], live, slot0 + int32_t(p * KVL_PAGE_SLOTS), 0};
            }
        }
        for (kvl_page_ref * page = held; !head.mass.empty() && page < next; page++) {
            page->mass = int32_t(head.mass[uint32_t(page->slot - slot0) / KVL_PAGE_SLOTS]);
        }
        refs[i].n_pages = int32_t(next - first);
    }
}

void llm_graph_input_kv_paged::set_table(uint32_t l, const llama_ubatch * ubatch) {
    const llama_kv_paged & kv = *paged->kv;
    const kvl_layer & layer = kv.layers[l];
    std::vector<kvl_table_stream> streams;
    for (uint32_t i = 0; i < layer.n_head_kv * n_seqs; i++) {
        const uint32_t token = i / layer.n_head_kv * n_seq_tokens;
        const llama_seq_id seq = ubatch->seq_id[token][0];
        streams.push_back({&head(ubatch, l, i), kv.mean_row(seq, l, i % layer.n_head_kv), ubatch->pos[token] + 1,
                           seq * kv.params.n_window, kv.seqs[seq].recalled_of(l, i % layer.n_head_kv)});
    }
    kvl_write_table(static_cast<int32_t *>(table->data) + layers[l].table, layer, streams, false);
}

ggml_tensor * kvl_build_fused(const llm_graph_context & g, llm_graph_input_kv_paged & inp, uint32_t l, ggml_tensor * q,
                              ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale) {
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

    if (k) {
        change(kernels.append, arena.pages, {k, v ? v : k, inp.table});
    }
    if (k && layer.queries && inp.n_ring > 0) {
        params.n_kv = kv.params.n_window;
        change(kernels.window, layer.queries, {q, inp.table});
        params.n_kv = int32_t(n_kv);
    }
    std::vector<ggml_tensor *> args = {q, inp.table, arena.pages, arena.means};
    if (sinks) {
        args.push_back(sinks);
    }
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
