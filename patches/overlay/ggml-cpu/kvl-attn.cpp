// Attention that reads pages where they lie: the operators, and how their work is shared out among threads.

#include "kvl-attn-impl.h"

#include <cstring>

using kvl::attn;
using kvl::PAGE;
using kvl::TILE;

// Work item of a thread by cost: items [first, last) of those whose costs are summed up.
template <typename Cost, typename Run> static void share_out(int n_items, int ith, int nth, Cost && cost, Run && run) {
    int64_t total = 0;
    for (int i = 0; i < n_items; i++) {
        total += cost(i);
    }
    int64_t done = 0;
    for (int i = 0; i < n_items; i++) {
        // an item belongs to the thread in whose share its middle lies
        const int64_t c = cost(i);
        const int owner = int(std::min<int64_t>((2 * done + c) * nth / (2 * std::max<int64_t>(total, 1)), nth - 1));
        done += c;
        if (owner == ith) {
            run(i);
        }
    }
}

extern "C" void kvl_attn_compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const attn a(dst, userdata);
    const int n_split = a.p.n_split;
    if (n_split > 1 || a.n_rows <= KVL_ATTN_FEW_ROWS) {
        const int64_t stride = int64_t(a.n_rows) * (a.d_v + 2);
        std::vector<float> own(n_split > 1 ? 0 : stride);
        kvl::few_rows w(a.d_k);
        const auto n_pages = [&](int stream) {
            return (a.n_slots(stream) + PAGE - 1) / PAGE;
        };
        const auto begin = [&](int item) {
            return n_pages(item / n_split) * (item % n_split) / n_split;
        };
        const auto end = [&](int item) {
            return n_pages(item / n_split) * (item % n_split + 1) / n_split;
        };
        share_out(
            a.n_stream * n_split, ith, nth,
            [&](int i) {
                return end(i) - begin(i);
            },
            [&](int i) {
                float * out = n_split > 1 ? static_cast<float *>(dst->data) + i * stride : own.data();
                attend_few(a, i / n_split, begin(i), end(i), w, out);
                for (int r = 0; n_split == 1 && r < a.n_rows; r++) {
                    const float * from = out + int64_t(r) * (a.d_v + 2);
                    float * to = static_cast<float *>(dst->data) + a.row(i, r) * a.d_v;
                    for (int c = 0; c < a.d_v; c++) {
                        to[c] = from[c] / from[a.d_v + 1];
                    }
                }
            });
        return;
    }
    kvl::tile_buffers t(a.d_k, a.d_v);
    const int n_tiles = (a.n_rows + TILE - 1) / TILE;
    share_out(
        a.n_stream * n_tiles, ith, nth,
        [&](int i) {
            return a.n_slots(i / n_tiles);
        },
        [&](int i) {
            attend_tile(a, t, i / n_tiles, (i % n_tiles) * TILE);
        });
}

extern "C" void kvl_attn_merge(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const kvl_attn_params & p = *static_cast<const kvl_attn_params *>(userdata);
    const int group = p.n_head / p.n_head_kv;
    const int n_rows = p.n_seq_tokens * group;
    const int n_stream = p.n_seqs * p.n_head_kv;
    const int d_v = int(dst->src[0]->ne[0]) - 2;
    const float * parts = static_cast<const float *>(dst->src[0]->data);
    const int64_t stride = int64_t(n_rows) * (d_v + 2);
    for (int i = ith; i < n_stream * n_rows; i += nth) {
        const int stream = i / n_rows;
        const int r = i % n_rows;
        const float * part = parts + stream * p.n_split * stride + int64_t(r) * (d_v + 2);
        const int s = stream / p.n_head_kv;
        const int64_t row =
            int64_t(s * p.n_seq_tokens + r / group) * p.n_head + stream % p.n_head_kv * group + r % group;
        float * out = static_cast<float *>(dst->data) + row * d_v;
        float m = -INFINITY;
        for (int c = 0; c < p.n_split; c++) {
            m = std::max(m, part[c * stride + d_v]);
        }
        float l = 0.0f;
        std::fill_n(out, d_v, 0.0f);
        for (int c = 0; c < p.n_split; c++) {
            const float * from = part + c * stride;
            const float w = from[d_v + 1] > 0.0f ? expf(from[d_v] - m) : 0.0f;
            l += w * from[d_v + 1];
            for (int j = 0; w > 0.0f && j < d_v; j++) {
                out[j] += w * from[j];
            }
        }
        for (int j = 0; j < d_v; j++) {
            out[j] /= l;
        }
    }
}

extern "C" void * kvl_cpu_proc_address(const char * name) {
    if (strcmp(name, KVL_ATTN_PROC) == 0) {
        return reinterpret_cast<void *>(&kvl_attn_compute);
    }
    if (strcmp(name, KVL_ATTN_MERGE_PROC) == 0) {
        return reinterpret_cast<void *>(&kvl_attn_merge);
    }
    return nullptr;
}
