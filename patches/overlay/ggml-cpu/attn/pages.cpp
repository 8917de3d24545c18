// What changes pages inside a graph: new keys and values, window queries, slots that move.

#include "attn/streams.h"

#include <cstring>

namespace {

void store_f16(const float * from, int n, char * to) {
    kvl_row_encode(KVL_ROW_F16, from, n, to);
}

} // namespace

extern "C" void kvl_pages_append(ggml_tensor * dst, int ith, int nth, void *) {
    const auto & p = *static_cast<const kvl_attn_params *>(kvl_get_params(dst));
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int n_head = p.n_head_kv;
    const int n_tokens = int(k->ne[2]) / p.n_seqs;
    const int n_stream = p.n_seqs * n_head;
    int32_t * layer = static_cast<int32_t *>(dst->src[3]->data) + p.table;
    const kvl_stream_ref * streams = kvl_table_streams(layer, p.n_pools);
    const kvl_page_ref * list = kvl_table_pages(layer, p.n_pools, n_stream);
    const int d_k = int(k->ne[0]);
    const int d_v = int(v->ne[0]);
    const kvl::page_pool pool(static_cast<char *>(dst->data), kvl_table_pools(layer)[0], d_k, d_v);
    // tokens are shared out among threads
    const int t0 = n_tokens * ith / nth;
    const int t1 = n_tokens * (ith + 1) / nth;
    for (int i = 0; t0 < t1 && i < n_stream; i++) {
        const kvl_stream_ref & stream = streams[i];
        const int slot0 = stream.n_slots - n_tokens;
        const kvl_page_ref * page = list + stream.first + stream.n_pages - 1;
        for (int t = t1 - 1; t >= t0; t--) {
            while (page->slot > slot0 + t) {
                page--;
            }
            const int number = int(page->entry & KVL_PAGE_NUMBER);
            const int j = slot0 + t - page->slot;
            const int64_t row = int64_t(i / n_head * n_tokens + t) * n_head + i % n_head;
            const auto * keys = static_cast<const float *>(k->data) + row * d_k;
            const auto * values = static_cast<const float *>(v->data) + row * d_v;
            store_f16(keys, d_k, pool.unit(number) + j * pool.k_bytes);
            if (pool.v_row != KVL_ROW_OF_K) {
                store_f16(values, d_v, pool.unit(number) + kvl::PAGE * pool.k_bytes + j * pool.v_bytes);
            }
        }
    }
}

extern "C" void kvl_pages_window(ggml_tensor * dst, int ith, int nth, void *) {
    const auto & p = *static_cast<const kvl_attn_params *>(kvl_get_params(dst));
    const ggml_tensor * q = dst->src[1];
    int32_t * layer = static_cast<int32_t *>(dst->src[2]->data) + p.table;
    const kvl_stream_ref * streams = kvl_table_streams(layer, p.n_pools);
    const int n_tokens = int(q->ne[2]) / p.n_seqs;
    const int n = std::min(p.n_kv, n_tokens);
    const size_t row = size_t(dst->ne[0]) * sizeof(float);
    for (int i = ith; i < p.n_seqs * n; i += nth) {
        const kvl_stream_ref & stream = streams[i / n * p.n_head_kv];
        const int t = n_tokens - n + i % n;
        const int to = stream.window + (stream.number + t - 1) % p.n_kv;
        memcpy(static_cast<char *>(dst->data) + row * size_t(to),
               static_cast<const char *>(q->data) + row * size_t(i / n * n_tokens + t), row);
    }
}

extern "C" void kvl_pages_move(ggml_tensor * dst, int ith, int, void *) {
    const auto & p = *static_cast<const kvl_move_params *>(kvl_get_params(dst));
    const auto * item = static_cast<const int32_t *>(dst->src[1]->data);
    for (int64_t i = 0; ith == 0 && i < dst->src[1]->ne[1]; i++, item += 4) {
        const kvl_pool_ref ref = {p.k_row | p.v_row << 8, uint32_t(item[0])};
        const kvl::page_pool pool(static_cast<char *>(dst->data), ref, p.d_k, p.d_v);
        const auto move = [&](bool keys, int64_t bytes) {
            const auto at = [&](int32_t item_row) {
                const uint32_t row = uint32_t(item_row);
                const int page = int(row / kvl::PAGE);
                const kvl::page_rows rows = keys ? pool.keys(page) : pool.values(page);
                return const_cast<char *>(rows.data) + (rows.first + int(row % kvl::PAGE)) * bytes;
            };
            memmove(at(item[1]), at(item[2]), size_t(item[3]) * size_t(bytes));
        };
        move(true, pool.k_bytes);
        move(false, pool.v_bytes);
    }
}

extern "C" void kvl_set_op_params(ggml_tensor * op, const void * params, size_t size) {
    kvl_set_params(op, params, size);
}
