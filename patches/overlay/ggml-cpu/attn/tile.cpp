// Many queries (prefill): two small matrix products per block of slots, K and V converted once per tile of rows.

#include "attn/streams.h"

namespace kvl {

namespace {

// Sizes of the accumulator blocks: all registers but those that the operands need.
constexpr bool WIDE = sizeof(vf) == 64 || VF_N == 4; // 32 registers
constexpr int SLOTS = WIDE ? 8 : 4;
constexpr int ROWS = WIDE ? 12 : 6;

// c[i*ldc + j] = sum_k a[i*a_row + k*a_col] * b[k*ldb + j], added to c if ADD; M rows and W vectors of columns
template <int M, int W, bool ADD>
void gemm(const float * a, int a_row, int a_col, const float * b, int ldb, float * c, int ldc, int n_k) {
    vf acc[M][W];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            acc[i][w] = ADD ? vf_load(c + i * ldc + w * VF_N) : vf_zero();
        }
    }
    for (int k = 0; k < n_k; k++) {
        vf bv[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            bv[w] = vf_load(b + k * ldb + w * VF_N);
            VF_PIN(bv[w]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            vf av = vf_set(a[i * a_row + k * a_col]);
            VF_PIN(av);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) {
                acc[i][w] = vf_fma(av, bv[w], acc[i][w]);
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            vf_store(c + i * ldc + w * VF_N, acc[i][w]);
        }
    }
}

// What the stored keys of n slots from j on lack, added to their logits.
void add_bias(tile_buffers & t, int j, int n) {
    for (float * s = t.s + j * TILE; n > 0; n--, s += TILE) {
        for (int r = 0; r < TILE; r += VF_N) {
            vf_store(s + r, vf_add(vf_load(s + r), vf_load(t.bias + r)));
        }
    }
}

} // namespace

void page_rows::widen(int n, float * to, int ld) const {
    if (row != KVL_ROW_F16) {
        kvl_rows_decode(row, data, first, n, d, to, ld);
        return;
    }
    const ggml_fp16_t * from = f16();
    for (int j = 0; j < n; j++, from += d, to += ld) {
        int c = 0;
        for (; c + VF_N <= d; c += VF_N) {
            vf_store(to + c, vf_load_f16(from + c));
        }
        for (; c < d; c++) {
            to[c] = vf_half(from + c);
        }
    }
}

void tile_begin(const attn & a, tile_buffers & t, int stream, tile_rows rows) {
    for (int c = 0; c < a.d_k; c++) {
        std::fill_n(t.qt + c * TILE, TILE, 0.0f);
    }
    for (int r = 0; r < rows.n; r++) {
        const int row = rows.first + r * rows.step;
        const float * q = a.q + a.row(stream, row) * a.d_k;
        for (int c = 0; c < a.d_k; c++) {
            t.qt[c * TILE + r] = q[c] * a.p.scale;
        }
        t.first_seen[r] = a.first_seen(stream, row);
        t.visible[r] = a.visible(stream, row);
    }
    std::fill_n(t.m, TILE, -1e30f);
    std::fill_n(t.l, TILE, 0.0f);
    for (int r = 0; a.sinks && r < rows.n; r++) {
        const row_stats stats = a.begin(stream, rows.first + r * rows.step, 0.0f);
        t.m[r] = stats.m;
        t.l[r] = stats.l;
    }
    const float * mean = a.mean(stream);
    std::fill_n(t.bias, TILE, 0.0f);
    for (int c = 0; mean && c < a.d_k; c++) {
        for (int r = 0; r < TILE; r++) {
            t.bias[r] += t.qt[c * TILE + r] * mean[c];
        }
    }
}

tile_block block_at(const attn & a, const tile_buffers & t, int stream, tile_rows rows, int page, int page1) {
    const kvl_page_ref * pages = a.pages(stream);
    const int end = t.visible[rows.n - 1];
    tile_block out = {page, 0, 0};
    while (out.n_pages < BLOCK_PAGES && page + out.n_pages < page1 && pages[page + out.n_pages].slot < end) {
        out.n += std::min(PAGE, end - pages[page + out.n_pages].slot); // only the last page has fewer
        out.n_pages++;
    }
    return out;
}

void tile_logits(const attn & a, tile_buffers & t, int stream, tile_rows rows, tile_block block) {
    const kvl_page_ref * pages = a.pages(stream) + block.page;
    const int n = block.n;
    for (int j = 0; j < n; j += PAGE) {
        a.keys(pages[j / PAGE]).widen(std::min(PAGE, n - j), t.k + j * t.ld_k, t.ld_k);
    }
    // a panel of queries stays in the first-level cache while all slots of the block pass by
    for (int r = 0; r < rows.n; r += 3 * VF_N) {
        int j = 0;
        for (; j + SLOTS <= n; j += SLOTS) {
            gemm<SLOTS, 3, false>(t.k + j * t.ld_k, t.ld_k, 1, t.qt + r, TILE, t.s + j * TILE + r, TILE, a.d_k);
        }
        for (; j < n; j++) {
            gemm<1, 3, false>(t.k + j * t.ld_k, t.ld_k, 1, t.qt + r, TILE, t.s + j * TILE + r, TILE, a.d_k);
        }
    }
    for (int j = 0; j < n; j += PAGE) {
        if (a.lacks_mean(stream, pages[j / PAGE])) {
            add_bias(t, j, std::min(PAGE, n - j));
        }
    }
    if (a.p.soft_cap > 0.0f) {
        for (int i = 0; i < n * TILE; i++) {
            t.s[i] = cap(t.s[i], a.p.soft_cap);
        }
    }
    for (int page = 0; page < block.n_pages; page++) {
        float * s = t.s + page * PAGE * TILE;
        const int slot0 = pages[page].slot;
        const int n_here = std::min(PAGE, n - page * PAGE);
        // a new token is not seen by those before it: the first rows of the tile
        int n_blind = 0;
        for (int j = std::max(0, t.visible[0] - slot0); j < n_here; j++) {
            while (n_blind < rows.n && t.visible[n_blind] <= slot0 + j) {
                n_blind++;
            }
            std::fill_n(s + j * TILE, n_blind, -INFINITY);
        }
        // what has left the window is not seen by the last rows
        for (int j = 0, r = 0; t.first_seen[rows.n - 1] > slot0 + j && j < n_here; j++) {
            while (t.first_seen[r] <= slot0 + j) {
                r++;
            }
            std::fill_n(s + j * TILE + r, rows.n - r, -INFINITY);
        }
        for (int j = 0; t.blind && j < n_here; j++) {
            std::fill_n(s + j * TILE, std::clamp(t.blind[slot0 + j] - rows.first / a.group, 0, rows.n), -INFINITY);
        }
        for (int j = 0; pages[page].live != UINT32_MAX && j < n_here; j++) {
            if (!(pages[page].live >> j & 1)) {
                std::fill_n(s + j * TILE, rows.n, -INFINITY);
            }
        }
    }
}

// Logits of a block are kept slot by slot, rows side by side: the softmax then needs no sums across a vector.
void tile_soften(tile_buffers & t, int n_rows, int n) {
    for (int r = 0; r < n_rows; r += VF_N) {
        vf top = vf_load(t.m + r);
        for (int j = 0; j < n; j++) {
            top = vf_max(top, vf_load(t.s + j * TILE + r));
        }
        vf_store(t.c + r, vf_exp(vf_sub(vf_load(t.m + r), top)));
        vf_store(t.m + r, top);
        vf sum = vf_zero();
        for (int j = 0; j < n; j++) {
            const vf e = vf_exp(vf_sub(vf_load(t.s + j * TILE + r), top));
            vf_store(t.s + j * TILE + r, e);
            sum = vf_add(sum, e);
        }
        vf_store(t.l + r, vf_fma(vf_load(t.l + r), vf_load(t.c + r), sum));
    }
}

void attend_tile(const attn & a, tile_buffers & t, int stream, tile_rows rows, float * stats) {
    const kvl_page_ref * pages = a.pages(stream);
    tile_begin(a, t, stream, rows);
    std::fill_n(t.o, TILE * t.ld_v, 0.0f);
    std::fill_n(t.v, BLOCK * t.ld_v, 0.0f);

    int page = 0;
    while (page + 1 < a.n_pages(stream) && pages[page + 1].slot <= t.first_seen[0]) {
        page++;
    }
    for (; page < a.n_pages(stream); page += BLOCK_PAGES) {
        const tile_block block = block_at(a, t, stream, rows, page, a.n_pages(stream));
        const int n = block.n;
        if (n == 0) {
            break;
        }
        for (int j = 0; j < n; j += PAGE) {
            a.values(pages[page + j / PAGE]).widen(std::min(PAGE, n - j), t.v + j * t.ld_v, t.ld_v);
        }
        tile_logits(a, t, stream, rows, block);
        tile_soften(t, rows.n, n);
        for (int r = 0; r < rows.n; r++) {
            if (t.c[r] != 1.0f) {
                const vf c = vf_set(t.c[r]);
                for (int i = 0; i < t.ld_v; i += VF_N) {
                    vf_store(t.o + r * t.ld_v + i, vf_mul(vf_load(t.o + r * t.ld_v + i), c));
                }
            }
        }
        for (int c = 0; c < t.ld_v; c += 2 * VF_N) {
            for (int r = 0; r < rows.n; r += ROWS) {
                gemm<ROWS, 2, true>(t.s + r, 1, TILE, t.v + c, t.ld_v, t.o + r * t.ld_v + c, t.ld_v, n);
            }
        }
    }
    for (int r = 0; r < rows.n; r++) {
        const int row = rows.first + r * rows.step;
        float * out = static_cast<float *>(a.dst->data) + a.row(stream, row) * a.d_v;
        const float scale = 1.0f / t.l[r];
        for (int c = 0; c < a.d_v; c++) {
            out[c] = t.o[r * t.ld_v + c] * scale;
        }
        if (stats) {
            stats[2 * row] = t.m[r];
            stats[2 * row + 1] = t.l[r];
        }
    }
}

} // namespace kvl
