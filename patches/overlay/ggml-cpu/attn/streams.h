// Shared by the page kernels: the operator's tensors, and what the two of them are.

#pragma once

#include "kvl-attn.h"
#include "kvl-simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvl {

constexpr int PAGE = KVL_PAGE_SLOTS;

// Smallest logit of a row that is a probability of at least 1 / n, from its maximum and sum.
inline float mean_logit(float m, float l, int n) {
    return m + logf(l) - logf(float(n));
}

// Maximum of a row's logits, and the sum of their exponentials relative to it.
struct row_stats {
    float m, l;
};

// Those of a row whose work was split: parts of d_v values, maximum and sum, stride apart.
inline row_stats total_of(const float * part, int n_split, int64_t stride, int d_v) {
    row_stats out = {-INFINITY, 0.0f};
    for (int c = 0; c < n_split; c++) {
        out.m = std::max(out.m, part[c * stride + d_v]);
    }
    for (int c = 0; c < n_split; c++) {
        const float * from = part + c * stride;
        out.l += from[d_v + 1] > 0.0f ? expf(from[d_v] - out.m) * from[d_v + 1] : 0.0f;
    }
    return out;
}

// The rows of a page as they are stored.
struct page_rows {
    kvl_row row;
    int d;
    int first; // the page's first row among those that are stored together with it
    const char * data;

    const ggml_fp16_t * f16() const { return reinterpret_cast<const ggml_fp16_t *>(data); }
    // the first n as f32, ld apart
    void widen(int n, float * to, int ld) const;
};

// Pages of one format: where they lie and how their rows are stored.
struct page_pool {
    kvl_row k_row, v_row;
    int d_k, d_v;
    int n_together;           // pages of a unit
    int64_t k_bytes, v_bytes; // of a row
    char * base;

    page_pool() = default;
    page_pool(char * pages, kvl_pool_ref ref, int d_k, int d_v)
        : k_row(kvl_row(ref.rows & 255)), v_row(kvl_row(ref.rows >> 8)), d_k(d_k), d_v(d_v),
          n_together(std::max(kvl_row_slots(k_row) / PAGE, 1)), k_bytes(int64_t(kvl_row_bytes(k_row, d_k))),
          v_bytes(int64_t(kvl_row_bytes(v_row, d_v))), base(pages + int64_t(ref.base) * KVL_POOL_ALIGNMENT) {}

    char * unit(int page) const { return base + page / n_together * (n_together * PAGE * (k_bytes + v_bytes)); }
    page_rows keys(int page) const { return {k_row, d_k, page % n_together * PAGE, unit(page)}; }
    page_rows values(int page) const {
        if (v_row == KVL_ROW_OF_K) {
            return keys(page);
        }
        return {v_row, d_v, 0, unit(page) + PAGE * (n_together * k_bytes + page % n_together * v_bytes)};
    }
};

// The operator's tensors and shape, decoded once per thread and call.
struct attn {
    const kvl_attn_params & p;
    ggml_tensor * dst;
    const float * q;
    const float * means;
    const float * sinks; // per query head, NULL: none
    const kvl_stream_ref * streams;
    const kvl_page_ref * list;
    int d_k, d_v, n_head, n_tokens, group, n_stream;
    int n_rows; // query rows of a stream, row t*group + g
    page_pool pools[KVL_PAGE_POOLS];

    // q, table, pages, means and sinks are the sources from `first` on
    attn(ggml_tensor * dst, int first) : p(*static_cast<const kvl_attn_params *>(kvl_get_params(dst))), dst(dst) {
        const ggml_tensor * queries = dst->src[first];
        int32_t * layer = static_cast<int32_t *>(dst->src[first + 1]->data) + p.table;
        q = static_cast<const float *>(queries->data);
        means = static_cast<const float *>(dst->src[first + 3]->data);
        sinks = dst->src[first + 4] ? static_cast<const float *>(dst->src[first + 4]->data) : nullptr;
        d_k = int(queries->ne[0]);
        d_v = p.d_v;
        n_head = int(queries->ne[1]);
        n_tokens = int(queries->ne[2]) / p.n_seqs;
        group = n_head / p.n_head_kv;
        n_stream = p.n_seqs * p.n_head_kv;
        n_rows = n_tokens * group;
        streams = kvl_table_streams(layer, p.n_pools);
        list = kvl_table_pages(layer, p.n_pools, n_stream);
        for (int i = 0; i < p.n_pools; i++) {
            pools[i] = page_pool(static_cast<char *>(dst->src[first + 2]->data), kvl_table_pools(layer)[i], d_k, d_v);
        }
    }

    int mass() const { return p.flags & KVL_ATTN_MASS_MASK; }
    int n_pages(int stream) const { return streams[stream].n_pages; }
    const kvl_page_ref * pages(int stream) const { return list + streams[stream].first; }
    page_rows keys(const kvl_page_ref & page) const {
        return pools[page.entry >> KVL_PAGE_POOL_SHIFT].keys(int(page.entry & KVL_PAGE_NUMBER));
    }
    page_rows values(const kvl_page_ref & page) const {
        return pools[page.entry >> KVL_PAGE_POOL_SHIFT].values(int(page.entry & KVL_PAGE_NUMBER));
    }
    // what a stream's keys lack in formats other than f16, NULL: nothing
    const float * mean(int stream) const {
        const int64_t row = streams[stream].mean;
        return row < 0 ? nullptr : means + row * d_k;
    }
    // whether the keys of a page do
    bool lacks_mean(int stream, const kvl_page_ref & page) const {
        return streams[stream].mean >= 0 && pools[page.entry >> KVL_PAGE_POOL_SHIFT].k_row != KVL_ROW_F16;
    }
    // slots of a page that there are: fewer than all only in the very last one
    int in_page(int stream, const kvl_page_ref & page) const {
        return std::min(PAGE, streams[stream].n_slots - page.slot);
    }
    // index of a stream's row among all (token, query head) rows
    int64_t row(int stream, int r) const {
        const int s = stream / p.n_head_kv;
        const int h = stream % p.n_head_kv;
        return int64_t(s * n_tokens + r / group) * n_head + h * group + r % group;
    }
    // slots that a row sees: numbers below this
    int visible(int stream, int r) const { return streams[stream].n_slots - n_tokens + r / group + 1; }
    // and from this on
    int first_seen(int stream, int r) const {
        const kvl_stream_ref & s = streams[stream];
        if (s.n_swa >= 0) {
            return s.n_swa == 0 ? 0 : std::max(visible(stream, r) - s.n_swa, 0);
        }
        const int pos = s.number + r / group - 1;
        return std::max(visible(stream, r) - 1 - pos % -s.n_swa, 0);
    }
    // what a row's maximum and sum begin with
    row_stats begin(int stream, int r, float nothing) const {
        return sinks ? row_stats{sinks[stream % p.n_head_kv * group + r % group], 1.0f} : row_stats{nothing, 0.0f};
    }
    // how many of the slots with numbers below n are live
    int n_live(int stream, int n) const {
        int count = 0;
        const kvl_page_ref * page = pages(stream);
        for (int i = 0; i < n_pages(stream) && page[i].slot < n; i++) {
            const int left = n - page[i].slot;
            count += __builtin_popcount(page[i].live & (left < PAGE ? (1u << left) - 1 : UINT32_MAX));
        }
        return count;
    }
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
    float bias[KVL_ATTN_FEW_ROWS]; // query times mean
    const float * q[KVL_ATTN_FEW_ROWS];
    float * o[KVL_ATTN_FEW_ROWS];
    float m[KVL_ATTN_FEW_ROWS], l[KVL_ATTN_FEW_ROWS]; // maximum and sum so far

    few_rows(int d_k, int d_v)
        : ld_q((d_k + 15) / 16 * 16), scaled(size_t(KVL_ATTN_FEW_ROWS) * ld_q), page(size_t(PAGE) * (d_k + d_v)) {}
};

// Few queries: rows of one stream over its pages [page0, page1) of those listed, `first` with the sinks. Unnormalized
// output, maximum and sum of row r are written at dst + r*(d_v + 2), logits (unless NULL) at logits + r*n_kv, -inf
// where a row does not see.
void attend_few(const attn & a, int stream, int page0, int page1, bool first, few_rows & w, float * dst,
                float * logits);

// Many queries: a tile holds some rows of one stream, first, first + step, ...
constexpr int TILE = 192; // most rows of a tile; a multiple of every kernel's width
constexpr int BLOCK_PAGES = 2;
constexpr int BLOCK = BLOCK_PAGES * PAGE; // slots that are looked at together

struct tile_rows {
    int first, step, n;
};

// Scratch of one thread; rows of v and o are padded to whole vectors.
struct tile_buffers {
    int ld_k, ld_v;
    line_buffer memory;
    float *qt, *k, *v, *s, *o, *m, *l, *c, *bias;
    int first_seen[TILE], visible[TILE]; // slots that each row sees: from, up to
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
// Pages of a stream, of those listed up to page1, that are looked at together from page on, and their slots.
struct tile_block {
    int page, n_pages, n;
};
tile_block block_at(const attn & a, const tile_buffers & t, int stream, tile_rows rows, int page, int page1);
// Logits of a block's slots into t.s [n][TILE], -inf where a row does not see.
void tile_logits(const attn & a, tile_buffers & t, int stream, tile_rows rows, tile_block block);
// Turns them into weights relative to the running maxima t.m; t.l are the sums, t.c rescales what came before.
void tile_soften(tile_buffers & t, int n_rows, int n);

// Output of the rows over all pages of the stream; maximum and sum of row r go to stats + 2*r unless that is NULL.
void attend_tile(const attn & a, tile_buffers & t, int stream, tile_rows rows, float * stats);

} // namespace kvl
