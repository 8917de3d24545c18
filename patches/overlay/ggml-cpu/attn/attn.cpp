// Attention that reads pages where they lie: the operators, and how their work is shared out among threads.

#include "attn/streams.h"

#include <cstring>
#include <utility>

using kvl::attn;
using kvl::share_out;
using kvl::TILE;

extern "C" void kvl_attn_compute(ggml_tensor * dst, int ith, int nth, void *) {
    const attn a(dst, 0);
    const int n_split = a.p.n_split;
    float * out = static_cast<float *>(dst->data);
    if (a.n_rows > KVL_ATTN_FEW_ROWS) {
        kvl::tile_buffers t(a.d_k, a.d_v);
        float * stats = a.mass() ? out + int64_t(a.d_v) * a.n_rows * a.n_stream : nullptr;
        const int n_tiles = (a.n_rows + TILE - 1) / TILE;
        share_out(
            a.n_stream * n_tiles, ith, nth,
            [&](int i) {
                return a.n_pages(i / n_tiles);
            },
            [&](int i) {
                const int stream = i / n_tiles;
                const int r0 = i % n_tiles * TILE;
                attend_tile(a, t, stream, {r0, 1, std::min(TILE, a.n_rows - r0)},
                            stats ? stats + int64_t(2) * stream * a.n_rows : nullptr);
            });
        return;
    }
    const bool parts = n_split > 1 || a.mass();
    const int64_t stride = int64_t(a.n_rows) * (a.d_v + 2);
    float * logits = a.mass() ? out + stride * n_split * a.n_stream : nullptr;
    std::vector<float> own(parts ? 0 : stride);
    kvl::few_rows w(a.d_k, a.d_v);
    const auto begin = [&](int item) {
        return a.n_pages(item / n_split) * (item % n_split) / n_split;
    };
    const auto end = [&](int item) {
        return a.n_pages(item / n_split) * (item % n_split + 1) / n_split;
    };
    share_out(
        a.n_stream * n_split, ith, nth,
        [&](int i) {
            return end(i) - begin(i);
        },
        [&](int i) {
            const int stream = i / n_split;
            float * part = parts ? out + i * stride : own.data();
            attend_few(a, stream, begin(i), end(i), i % n_split == 0, w, part,
                       logits ? logits + int64_t(stream) * a.n_rows * a.p.n_kv : nullptr);
            for (int r = 0; !parts && r < a.n_rows; r++) {
                const float * from = part + int64_t(r) * (a.d_v + 2);
                float * to = out + a.row(i, r) * a.d_v;
                for (int c = 0; c < a.d_v; c++) {
                    to[c] = from[c] / from[a.d_v + 1];
                }
            }
        });
}

extern "C" void kvl_attn_merge(ggml_tensor * dst, int ith, int nth, void *) {
    const auto & p = *static_cast<const kvl_attn_params *>(kvl_get_params(dst));
    const int d_v = int(dst->ne[0]);
    const int n_head = int(dst->ne[1]);
    const int n_tokens = int(dst->ne[2]) / p.n_seqs;
    const int group = n_head / p.n_head_kv;
    const int n_rows = n_tokens * group;
    const int n_stream = p.n_seqs * p.n_head_kv;
    const float * parts = static_cast<const float *>(dst->src[0]->data);
    const int64_t stride = int64_t(n_rows) * (d_v + 2);
    for (int i = ith; i < n_stream * n_rows; i += nth) {
        const int stream = i / n_rows;
        const int r = i % n_rows;
        const float * part = parts + stream * p.n_split * stride + int64_t(r) * (d_v + 2);
        const int s = stream / p.n_head_kv;
        const int64_t row = int64_t(s * n_tokens + r / group) * n_head + stream % p.n_head_kv * group + r % group;
        float * out = static_cast<float *>(dst->data) + row * d_v;
        const kvl::row_stats total = kvl::total_of(part, p.n_split, stride, d_v);
        std::fill_n(out, d_v, 0.0f);
        for (int c = 0; c < p.n_split; c++) {
            const float * from = part + c * stride;
            const float w = from[d_v + 1] > 0.0f ? expf(from[d_v] - total.m) / total.l : 0.0f;
            for (int j = 0; w > 0.0f && j < d_v; j++) {
                out[j] += w * from[j];
            }
        }
    }
}

extern "C" void * kvl_cpu_proc_address(const char * name) {
    const std::pair<const char *, void *> procs[] = {
        {KVL_ATTN_PROC, reinterpret_cast<void *>(kvl_attn_compute)},
        {KVL_ATTN_MERGE_PROC, reinterpret_cast<void *>(kvl_attn_merge)},
        {KVL_ATTN_MASS_PROC, reinterpret_cast<void *>(kvl_attn_mass)},
        {KVL_ATTN_SCORES_PROC, reinterpret_cast<void *>(kvl_attn_scores)},
        {KVL_ATTN_ROTATE_PROC, reinterpret_cast<void *>(kvl_attn_rotate)},
        {KVL_PAGES_APPEND_PROC, reinterpret_cast<void *>(kvl_pages_append)},
        {KVL_PAGES_WINDOW_PROC, reinterpret_cast<void *>(kvl_pages_window)},
        {KVL_PAGES_MOVE_PROC, reinterpret_cast<void *>(kvl_pages_move)},
        {KVL_ROWS_ENCODE_PROC, reinterpret_cast<void *>(kvl_rows_encode)},
        {KVL_ROWS_DECODE_PROC, reinterpret_cast<void *>(kvl_rows_decode)},
        {KVL_ROW_ROTATE_PROC, reinterpret_cast<void *>(kvl_row_rotate)},
        {KVL_ROWS_DOT_PROC, reinterpret_cast<void *>(kvl_rows_dot)},
    };
    for (const auto & [known, proc] : procs) {
        if (strcmp(name, known) == 0) {
            return proc;
        }
    }
    return nullptr;
}
