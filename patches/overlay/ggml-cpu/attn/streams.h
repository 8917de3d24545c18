// Shared by the page kernels: the operator's tensors, and what the two of them are.

#pragma once

#include "kvl-attn.h"
#include "kvl-simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvl {

constexpr int PAGE = 32;

// How many of the first n slots are live.
inline int n_live(const int32_t * live, int n) {
    int count = 0;
    for (int i = 0; i * PAGE < n; i++) {
        const int left = n - i * PAGE;
        const uint32_t bits = uint32_t(live[i]) & (left < PAGE ? (1u << left) - 1 : UINT32_MAX);
        count += __builtin_popcount(bits);
    }
    return count;
}

// Smallest logit of a row that is a probability of at least 1 / n, from its maximum and sum.
inline float mean_logit(float m, float l, int n) {
    return m + logf(l) - logf(float(n));
}

// The rows of a page as they are stored.
struct page_rows {
    kvl_row row;
    int d;
    int first; // the page's first row among those that are stored together with it
    const char * data;

    page_rows(kvl_row row, const void * pool, int32_t entry, int d) : row(row), d(d) {
        const int64_t i = int64_t(entry & ((1 << KVL_PAGE_FORMAT_SHIFT) - 1)) * PAGE;
        first = int(i % kvl_row_slots(row));
        data = static_cast<const char *>(pool) + (i - first) * kvl_row_bytes(row, d);
    }

    const ggml_fp16_t * f16() const { return reinterpret_cast<const ggml_fp16_t *>(data); }
    // the first n as f32, ld apart
    void widen(int n, float * to, int ld) const;
};

// The operator's tensors and shape, decoded once per thread and call.
struct attn {
    const kvl_attn_params & p;
    ggml_tensor * dst;
    const float * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const int32_t * table;
    int d_k, d_v, group, n_stream, n_rows; // n_rows: query rows of a stream, row t*group + g

    attn(ggml_tensor * dst, void * userdata)
        : p(*static_cast<const kvl_attn_params *>(userdata)), dst(dst),
          q(static_cast<const float *>(dst->src[0]->data)), k(dst->src[1]), v(dst->src[2]),
          table(static_cast<const int32_t *>(dst->src[3]->data)), d_k(int(k->ne[0])), d_v(int(v->ne[0])),
          group(p.n_head / p.n_head_kv), n_stream(p.n_seqs * p.n_head_kv), n_rows(p.n_seq_tokens * group) {}

    int n_slots(int stream) const { return table[stream]; }
    const int32_t * pages(int stream) const { return table + 2 * n_stream + table[n_stream + stream]; }
    // live bits of the pages of a stream
    const int32_t * live(int stream) const { return pages(stream) + (dst->src[3]->ne[0] - 2 * n_stream) / 2; }
    // rows of the page that an entry of a table stands for
    page_rows k_page(int32_t entry) const {
        const int f = entry >> KVL_PAGE_FORMAT_SHIFT;
        return f == 0 ? page_rows(KVL_ROW_F16, k->data, entry, d_k)
                      : page_rows(p.formats[f].k_row, p.formats[f].k, entry, d_k);
    }
    page_rows v_page(int32_t entry) const {
        const int f = entry >> KVL_PAGE_FORMAT_SHIFT;
        return f == 0 ? page_rows(KVL_ROW_F16, v->data, entry, d_v)
                      : page_rows(p.formats[f].v_row, p.formats[f].v, entry, d_v);
    }
    // what the keys of an entry's page lack, NULL: nothing
    const float * mu(int stream, int32_t entry) const {
        return p.mu && entry >> KVL_PAGE_FORMAT_SHIFT ? p.mu[stream] : nullptr;
    }
    // index of a stream's row among all (token, query head) rows
    int64_t row(int stream, int r) const {
        const int s = stream / p.n_head_kv;
        const int h = stream % p.n_head_kv;
        return int64_t(s * p.n_seq_tokens + r / group) * p.n_head + h * group + r % group;
    }
    // slots that a row sees: indices below this
    int visible(int stream, int r) const { return n_slots(stream) - p.n_seq_tokens + r / group + 1; }
    // how many of the first n slots are live
    int n_live(int stream, int n) const { return kvl::n_live(live(stream), n); }
};

// Work item of a thread by cost: items [first, last) of those whose costs are summed up.
template <typename Cost, typename Run> void share_out(int n_items, int ith, int nth, Cost && cost, Run && run) {
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

inline float cap(float z, float soft_cap) {
    return soft_cap > 0.0f ? soft_cap * tanhf(z / soft_cap) : z;
}

// Floats that begin at a cache line: a vector load across two lines costs twice.
class line_buffer {
  public:
    explicit line_buffer(size_t n) : lines((n + 15) / 16) {}
    float * data() { return lines.data()->f; }

  private:
    struct alignas(64) line {
        float f[16];
    };
    std::vector<line> lines;
};

// Scratch of one thread: what the rows of a stream carry from page to page.
struct few_rows {
    int ld_q;
    line_buffer scaled;            // queries times the scale
    line_buffer page;              // keys, then values of a page that is not f16
    float bias[KVL_ATTN_FEW_ROWS]; // query times mu
    const float * q[KVL_ATTN_FEW_ROWS];
    float * o[KVL_ATTN_FEW_ROWS];
    float m[KVL_ATTN_FEW_ROWS], l[KVL_ATTN_FEW_ROWS]; // maximum and sum so far

    few_rows(int d_k, int d_v)
        : ld_q((d_k + 15) / 16 * 16), scaled(size_t(KVL_ATTN_FEW_ROWS) * ld_q), page(size_t(PAGE) * (d_k + d_v)) {}
};

// Few queries: rows of one stream over its pages [page0, page1). Unnormalized output, maximum and sum of row r are
// written at dst + r*(d_v + 2), logits (unless NULL) at logits + r*n_kv, -inf where a row does not see.
void attend_few(const attn & a, int stream, int page0, int page1, few_rows & w, float * dst, float * logits);

// Many queries: a tile holds some rows of one stream, first, first + step, ...
constexpr int TILE = 192; // most rows of a tile; a multiple of every kernel's width
constexpr int BLOCK = 64; // slots that are looked at together

struct tile_rows {
    int first, step, n;
};

// Scratch of one thread; rows of v and o are padded to whole vectors.
struct tile_buffers {
    int ld_k, ld_v;
    line_buffer memory;
    float *qt, *k, *v, *s, *o, *m, *l, *c, *bias;
    int visible[TILE]; // slots that each row sees
    // per slot of the stream: the first new tokens, so many of them, do not see it either; rows are one head's then
    const int32_t * blind = nullptr;

    tile_buffers(int d_k, int d_v)
        : ld_k((d_k + 15) / 16 * 16), ld_v((d_v + 31) / 32 * 32),
          memory(size_t(d_k) * TILE + size_t(BLOCK) * (ld_k + ld_v + TILE) + size_t(TILE) * ld_v + 4 * TILE) {
        qt = memory.data();
        k = qt + d_k * TILE;
        v = k + BLOCK * ld_k;
        s = v + BLOCK * ld_v;
        o = s + BLOCK * TILE;
        m = o + TILE * ld_v;
        l = m + TILE;
        c = l + TILE;
        bias = c + TILE;
    }
};

// Queries of the rows, scaled, into t.qt [d_k][TILE]; t.visible; maxima and sums of nothing.
void tile_begin(const attn & a, tile_buffers & t, int stream, tile_rows rows);
// Logits of n slots from slot0 on into t.s [n][TILE], -inf where a row does not see.
void tile_logits(const attn & a, tile_buffers & t, int stream, tile_rows rows, int slot0, int n);
// Turns them into weights relative to the running maxima t.m; t.l are the sums, t.c rescales what came before.
void tile_soften(tile_buffers & t, int n_rows, int n);

// Output of the rows over all pages of the stream; maximum and sum of row r go to stats + 2*r unless that is NULL.
void attend_tile(const attn & a, tile_buffers & t, int stream, tile_rows rows, float * stats);

// to[j] += exp(logits[j] - m) * scale
void add_weights(const float * logits, int n, float m, float scale, float * to);
// to[j] = value where logits[j] >= least
void note_weights(const float * logits, int n, float least, float value, float * to);

} // namespace kvl
