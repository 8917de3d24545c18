// Attention that reads pages where they lie. Two kernels: few queries (decode), where the work is reading K and V once
// for all query heads of a group; and many (prefill), where it is two small matrix products per block of slots.

#include "kvl-attn.h"

#include "ggml-cpu.h"
#include "kvl-simd.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr int PAGE = 32;

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
    const ggml_fp16_t * k_page(int32_t page) const {
        return static_cast<const ggml_fp16_t *>(k->data) + int64_t(page) * PAGE * d_k;
    }
    const ggml_fp16_t * v_page(int32_t page) const {
        return static_cast<const ggml_fp16_t *>(v->data) + int64_t(page) * PAGE * d_v;
    }
    // index of a stream's row among all (token, query head) rows
    int64_t row(int stream, int r) const {
        const int s = stream / p.n_head_kv;
        const int h = stream % p.n_head_kv;
        return int64_t(s * p.n_seq_tokens + r / group) * p.n_head + h * group + r % group;
    }
    // slots that a row sees: indices below this
    int visible(int stream, int r) const { return n_slots(stream) - p.n_seq_tokens + r / group + 1; }
};

float cap(float z, float soft_cap) {
    return soft_cap > 0.0f ? soft_cap * tanhf(z / soft_cap) : z;
}

//
// few queries
//

// s[i*PAGE + j] = q_i . k_j for N rows and the first n slots of a page
template <int N, int B> void dots(const float * const * q, const ggml_fp16_t * k, int d, int n, float * s) {
    int j = 0;
    for (; j + B <= n; j += B) {
        vf acc[N][B];
        for (int i = 0; i < N; i++) {
            for (int b = 0; b < B; b++) {
                acc[i][b] = vf_zero();
            }
        }
        int c = 0;
        for (; c + VF_N <= d; c += VF_N) {
            vf kv[B];
            for (int b = 0; b < B; b++) {
                kv[b] = vf_load_f16(k + (j + b) * d + c);
            }
            for (int i = 0; i < N; i++) {
                const vf qv = vf_load(q[i] + c);
                for (int b = 0; b < B; b++) {
                    acc[i][b] = vf_fma(kv[b], qv, acc[i][b]);
                }
            }
        }
        for (int i = 0; i < N; i++) {
            for (int b = 0; b < B; b++) {
                float sum = vf_sum(acc[i][b]);
                for (int r = c; r < d; r++) {
                    sum += GGML_CPU_FP16_TO_FP32(k[(j + b) * d + r]) * q[i][r];
                }
                s[i * PAGE + j + b] = sum;
            }
        }
    }
    if (B > 1 && j < n) {
        dots<N, 1>(q, k + j * d, d, n - j, s + j);
    }
}

// o_i += sum_j p[i*PAGE + j] * v_j for N rows and the first n slots of a page
template <int N, int B> void accumulate(float * const * o, const ggml_fp16_t * v, int d, int n, const float * p) {
    int c = 0;
    for (; c + B * VF_N <= d; c += B * VF_N) {
        vf acc[N][B];
        for (int i = 0; i < N; i++) {
            for (int b = 0; b < B; b++) {
                acc[i][b] = vf_load(o[i] + c + b * VF_N);
            }
        }
        for (int j = 0; j < n; j++) {
            for (int b = 0; b < B; b++) {
                const vf vv = vf_load_f16(v + j * d + c + b * VF_N);
                for (int i = 0; i < N; i++) {
                    acc[i][b] = vf_fma(vv, vf_set(p[i * PAGE + j]), acc[i][b]);
                }
            }
        }
        for (int i = 0; i < N; i++) {
            for (int b = 0; b < B; b++) {
                vf_store(o[i] + c + b * VF_N, acc[i][b]);
            }
        }
    }
    if (B > 1 && c + VF_N <= d) {
        for (; c + VF_N <= d; c += VF_N) {
            for (int i = 0; i < N; i++) {
                vf acc = vf_load(o[i] + c);
                for (int j = 0; j < n; j++) {
                    acc = vf_fma(vf_load_f16(v + j * d + c), vf_set(p[i * PAGE + j]), acc);
                }
                vf_store(o[i] + c, acc);
            }
        }
    }
    for (; c < d; c++) {
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < n; j++) {
                o[i][c] += GGML_CPU_FP16_TO_FP32(v[j * d + c]) * p[i * PAGE + j];
            }
        }
    }
}

// Turns logits of a page into weights relative to the running maximum; the output so far is rescaled when that moves.
void soften(float * s, int n, float & m, float & l, float * o, int d) {
    float top = m;
    for (int j = 0; j < n; j++) {
        top = std::max(top, s[j]);
    }
    if (top > m) {
        const float c = m == -INFINITY ? 0.0f : expf(m - top);
        l *= c;
        for (int i = 0; i < d; i++) {
            o[i] *= c;
        }
        m = top;
    }
    std::fill(s + n, s + PAGE, -INFINITY);
    vf sum = vf_zero();
    for (int j = 0; j < PAGE; j += VF_N) {
        const vf e = vf_exp(vf_sub(vf_load(s + j), vf_set(m)));
        vf_store(s + j, e);
        sum = vf_add(sum, e);
    }
    l += vf_sum(sum);
}

template <int N>
void attend_page(const attn & a, int stream, int r0, const float * const * q, float * const * o, int slot0,
                 int32_t page, float * m, float * l) {
    float s[N * PAGE];
    int n_max = 0;
    int n_seen[N];
    for (int i = 0; i < N; i++) {
        n_seen[i] = std::clamp(a.visible(stream, r0 + i) - slot0, 0, PAGE);
        n_max = std::max(n_max, n_seen[i]);
    }
    if (n_max == 0) {
        return;
    }
    constexpr int wide = sizeof(vf) == 64 || VF_N == 4; // 32 registers
    dots<N, (N <= 3 || wide) ? 4 : 2>(q, a.k_page(page), a.d_k, n_max, s);
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < n_seen[i]; j++) {
            s[i * PAGE + j] = cap(s[i * PAGE + j] * a.p.scale, a.p.soft_cap);
        }
        if (n_seen[i] > 0) {
            soften(s + i * PAGE, n_seen[i], m[i], l[i], o[i], a.d_v);
        } else {
            std::fill_n(s + i * PAGE, PAGE, 0.0f);
        }
    }
    accumulate<N, (N <= 2 || wide) ? 4 : 2>(o, a.v_page(page), a.d_v, n_max, s);
}

// Rows of one stream over its pages [page0, page1): unnormalized output, maximum and sum at dst + r*(d_v + 2).
void attend_few(const attn & a, int stream, int page0, int page1, float * dst) {
    const int stride = a.d_v + 2;
    const int32_t * pages = a.pages(stream);
    for (int r0 = 0; r0 < a.n_rows;) {
        const int n = std::min(4, a.n_rows - r0);
        const float * q[4];
        float * o[4];
        float m[4], l[4];
        for (int i = 0; i < n; i++) {
            q[i] = a.q + a.row(stream, r0 + i) * a.d_k;
            o[i] = dst + int64_t(r0 + i) * stride;
            std::fill_n(o[i], a.d_v, 0.0f);
            m[i] = -INFINITY;
            l[i] = 0.0f;
        }
        for (int p = page0; p < page1; p++) {
            switch (n) {
                case 1:
                    attend_page<1>(a, stream, r0, q, o, p * PAGE, pages[p], m, l);
                    break;
                case 2:
                    attend_page<2>(a, stream, r0, q, o, p * PAGE, pages[p], m, l);
                    break;
                case 3:
                    attend_page<3>(a, stream, r0, q, o, p * PAGE, pages[p], m, l);
                    break;
                default:
                    attend_page<4>(a, stream, r0, q, o, p * PAGE, pages[p], m, l);
            }
        }
        for (int i = 0; i < n; i++) {
            o[i][a.d_v] = m[i];
            o[i][a.d_v + 1] = l[i];
        }
        r0 += n;
    }
}

//
// many queries
//

constexpr int TILE = 96;  // query rows of a tile: a multiple of every kernel's width
constexpr int BLOCK = 64; // slots of a block

// c[i*ldc + j] = sum_k a[i*lda + k] * b[k*ldb + j] for M rows and W vectors of columns
template <int M, int W>
void gemm_rows(const float * a, int lda, const float * b, int ldb, float * c, int ldc, int n_k) {
    vf acc[M][W];
    for (int i = 0; i < M; i++) {
        for (int w = 0; w < W; w++) {
            acc[i][w] = vf_zero();
        }
    }
    for (int k = 0; k < n_k; k++) {
        vf bv[W];
        for (int w = 0; w < W; w++) {
            bv[w] = vf_load(b + k * ldb + w * VF_N);
        }
        for (int i = 0; i < M; i++) {
            const vf av = vf_set(a[i * lda + k]);
            for (int w = 0; w < W; w++) {
                acc[i][w] = vf_fma(av, bv[w], acc[i][w]);
            }
        }
    }
    for (int i = 0; i < M; i++) {
        for (int w = 0; w < W; w++) {
            vf_store(c + i * ldc + w * VF_N, acc[i][w]);
        }
    }
}

// c[i*ldc + j] += sum_k a[k*lda + i] * b[k*ldb + j] for M rows and W vectors of columns
template <int M, int W> void gemm_add(const float * a, int lda, const float * b, int ldb, float * c, int ldc, int n_k) {
    vf acc[M][W];
    for (int i = 0; i < M; i++) {
        for (int w = 0; w < W; w++) {
            acc[i][w] = vf_load(c + i * ldc + w * VF_N);
        }
    }
    for (int k = 0; k < n_k; k++) {
        vf bv[W];
        for (int w = 0; w < W; w++) {
            bv[w] = vf_load(b + k * ldb + w * VF_N);
        }
        for (int i = 0; i < M; i++) {
            const vf av = vf_set(a[k * lda + i]);
            for (int w = 0; w < W; w++) {
                acc[i][w] = vf_fma(av, bv[w], acc[i][w]);
            }
        }
    }
    for (int i = 0; i < M; i++) {
        for (int w = 0; w < W; w++) {
            vf_store(c + i * ldc + w * VF_N, acc[i][w]);
        }
    }
}

// Scratch of one thread; rows of k and v are padded to whole vectors.
struct tile_buffers {
    int ld_v;
    std::vector<float> data;
    float *qt, *k, *v, *s, *o, *m, *l, *c;

    tile_buffers(int d_k, int d_v) : ld_v((d_v + 2 * VF_N - 1) / (2 * VF_N) * (2 * VF_N)) {
        data.resize(size_t(d_k) * TILE + size_t(BLOCK) * d_k + size_t(BLOCK) * ld_v + size_t(BLOCK) * TILE +
                    size_t(TILE) * ld_v + 3 * TILE);
        qt = data.data();
        k = qt + d_k * TILE;
        v = k + BLOCK * d_k;
        s = v + BLOCK * ld_v;
        o = s + BLOCK * TILE;
        m = o + TILE * ld_v;
        l = m + TILE;
        c = l + TILE;
    }
};

// Logits of a block are kept slot by slot, rows side by side: the softmax then needs no sums across a vector.
void soften_block(tile_buffers & t, int n) {
    for (int r = 0; r < TILE; r += VF_N) {
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

void attend_tile(const attn & a, tile_buffers & t, int stream, int r0) {
    const int n_rows = std::min(TILE, a.n_rows - r0);
    const int n_past = a.n_slots(stream) - a.p.n_seq_tokens;
    const int n_end = a.visible(stream, r0 + n_rows - 1);
    const int32_t * pages = a.pages(stream);

    for (int c = 0; c < a.d_k; c++) {
        std::fill_n(t.qt + c * TILE, TILE, 0.0f);
    }
    for (int r = 0; r < n_rows; r++) {
        const float * q = a.q + a.row(stream, r0 + r) * a.d_k;
        for (int c = 0; c < a.d_k; c++) {
            t.qt[c * TILE + r] = q[c] * a.p.scale;
        }
    }
    std::fill_n(t.o, TILE * t.ld_v, 0.0f);
    std::fill_n(t.m, TILE, -1e30f);
    std::fill_n(t.l, TILE, 0.0f);
    std::fill_n(t.v, BLOCK * t.ld_v, 0.0f);

    for (int slot0 = 0; slot0 < n_end; slot0 += BLOCK) {
        const int n = std::min(BLOCK, n_end - slot0);
        for (int j = 0; j < n; j += PAGE) {
            const int32_t page = pages[(slot0 + j) / PAGE];
            const int n_page = std::min(PAGE, n - j);
            ggml_cpu_fp16_to_fp32(a.k_page(page), t.k + j * a.d_k, int64_t(n_page) * a.d_k);
            for (int i = 0; i < n_page; i++) {
                ggml_cpu_fp16_to_fp32(a.v_page(page) + i * a.d_v, t.v + (j + i) * t.ld_v, a.d_v);
            }
        }
        int j = 0;
        for (; j + 4 <= n; j += 4) {
            for (int r = 0; r < TILE; r += 3 * VF_N) {
                gemm_rows<4, 3>(t.k + j * a.d_k, a.d_k, t.qt + r, TILE, t.s + j * TILE + r, TILE, a.d_k);
            }
        }
        for (; j < n; j++) {
            for (int r = 0; r < TILE; r += 3 * VF_N) {
                gemm_rows<1, 3>(t.k + j * a.d_k, a.d_k, t.qt + r, TILE, t.s + j * TILE + r, TILE, a.d_k);
            }
        }
        if (a.p.soft_cap > 0.0f) {
            for (int i = 0; i < n * TILE; i++) {
                t.s[i] = cap(t.s[i], a.p.soft_cap);
            }
        }
        // a new token is not seen by those before it: the first rows of the tile
        for (j = std::max(0, n_past + 1 - slot0); j < n; j++) {
            const int n_blind = std::clamp((slot0 + j - n_past) * a.group - r0, 0, n_rows);
            std::fill_n(t.s + j * TILE, n_blind, -INFINITY);
        }
        soften_block(t, n);
        for (int r = 0; r < n_rows; r++) {
            if (t.c[r] != 1.0f) {
                const vf c = vf_set(t.c[r]);
                for (int i = 0; i < t.ld_v; i += VF_N) {
                    vf_store(t.o + r * t.ld_v + i, vf_mul(vf_load(t.o + r * t.ld_v + i), c));
                }
            }
        }
        for (int c = 0; c < t.ld_v; c += 2 * VF_N) {
            for (int r = 0; r < n_rows; r += 6) {
                gemm_add<6, 2>(t.s + r, TILE, t.v + c, t.ld_v, t.o + r * t.ld_v + c, t.ld_v, n);
            }
        }
    }
    for (int r = 0; r < n_rows; r++) {
        float * out = static_cast<float *>(a.dst->data) + a.row(stream, r0 + r) * a.d_v;
        const float scale = 1.0f / t.l[r];
        for (int c = 0; c < a.d_v; c++) {
            out[c] = t.o[r * t.ld_v + c] * scale;
        }
    }
}

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

} // namespace

extern "C" void kvl_attn_compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const attn a(dst, userdata);
    const int n_split = a.p.n_split;
    if (n_split > 1 || a.n_rows <= KVL_ATTN_FEW_ROWS) {
        const int64_t stride = int64_t(a.n_rows) * (a.d_v + 2);
        std::vector<float> own(n_split > 1 ? 0 : stride);
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
                attend_few(a, i / n_split, begin(i), end(i), out);
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
    tile_buffers t(a.d_k, a.d_v);
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
