// Few queries (decode): the work is reading K and V, so every slot is read once for up to four query rows.

#include "attn/page_rows.h"

namespace kvl {

namespace {

// s[i*PAGE + j] = q_i . k_j for N rows and the first n slots of a page
template <int N, int B, typename Rows>
void dots(const float * const * q, const Rows & k, const rows_ahead & next, int d, int n, float * s) {
    int j = 0;
    for (; j + B <= n; j += B) {
        vf acc[N][B];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                acc[i][b] = vf_zero();
            }
        }
        next.prefetch(j, B);
        int c = 0;
        for (; c + Rows::STEP <= d; c += Rows::STEP) {
            decltype(k.at(0, 0)) part[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                part[b] = k.at(j + b, c);
            }
#pragma GCC unroll 8
            for (int w = 0; w < Rows::STEP; w += VF_N) {
                vf kv[B];
#pragma GCC unroll 4
                for (int b = 0; b < B; b++) {
                    kv[b] = part[b].get(w);
                }
#pragma GCC unroll 4
                for (int i = 0; i < N; i++) {
                    const vf qv = vf_load(q[i] + c + w);
#pragma GCC unroll 4
                    for (int b = 0; b < B; b++) {
                        acc[i][b] = vf_fma(kv[b], qv, acc[i][b]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            float * to = s + i * PAGE + j;
            if constexpr (B == 4) {
                vf_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], to);
            } else {
#pragma GCC unroll 4
                for (int b = 0; b < B; b++) {
                    to[b] = vf_sum(acc[i][b]);
                }
            }
            if constexpr (Rows::STEP == VF_N) { // blocks divide d
                for (int r = c; r < d; r++) {
#pragma GCC unroll 4
                    for (int b = 0; b < B; b++) {
                        to[b] += k.one(j + b, r) * q[i][r];
                    }
                }
            }
        }
    }
    if (B > 1 && j < n) {
        dots<N, 1>(q, k.from(j), next.from(j), d, n - j, s + j);
    }
}

// o_i += sum_j p[i*PAGE + j] * v_j for N rows and the first n slots of a page
template <int N, int B, typename Rows>
void accumulate(float * const * o, const Rows & v, const rows_ahead & next, int d, int n, const float * p) {
    constexpr int CHUNK = B * VF_N;
    constexpr int STEP = std::min(CHUNK, Rows::STEP); // opened at once
    int c = 0;
    for (; c + CHUNK <= d; c += CHUNK) {
        vf acc[N][B];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                acc[i][b] = vf_load(o[i] + c + b * VF_N);
            }
        }
        for (int j = 0; j < n; j++) {
            if (c == 0) {
                next.prefetch(j, 1);
            }
            decltype(v.at(0, 0)) part[CHUNK / STEP];
#pragma GCC unroll 4
            for (int b = 0; b < CHUNK / STEP; b++) {
                part[b] = v.at(j, c + b * STEP);
            }
            const int in = CHUNK % Rows::STEP == 0 ? 0 : c % Rows::STEP;
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                const vf vv = part[b * VF_N / STEP].get(in + b * VF_N % STEP);
#pragma GCC unroll 4
                for (int i = 0; i < N; i++) {
                    acc[i][b] = vf_fma(vv, vf_set(p[i * PAGE + j]), acc[i][b]);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                vf_store(o[i] + c + b * VF_N, acc[i][b]);
            }
        }
    }
    if (B > 1 && c + VF_N <= d) {
        for (; c + VF_N <= d; c += VF_N) {
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                vf acc = vf_load(o[i] + c);
                for (int j = 0; j < n; j++) {
                    acc = vf_fma(v.at(j, c).get(c % Rows::STEP), vf_set(p[i * PAGE + j]), acc);
                }
                vf_store(o[i] + c, acc);
            }
        }
    }
    if constexpr (Rows::STEP == VF_N) {
        for (; c < d; c++) {
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                for (int j = 0; j < n; j++) {
                    o[i][c] += v.one(j, c) * p[i * PAGE + j];
                }
            }
        }
    }
}

// Turns logits of a page into weights relative to the running maximum; the output so far is rescaled when that moves.
void soften(float * s, float & m, float & l, float * o, int d) {
    vf peak = vf_load(s);
    for (int j = VF_N; j < PAGE; j += VF_N) {
        peak = vf_max(peak, vf_load(s + j));
    }
    const float top = vf_top(peak);
    if (top > m) {
        const float c = m == -INFINITY ? 0.0f : expf(m - top);
        l *= c;
        for (int i = 0; i < d; i++) {
            o[i] *= c;
        }
        m = top;
    }
    if (m == -INFINITY) {
        std::fill_n(s, PAGE, 0.0f); // nothing seen yet
        return;
    }
    vf sum = vf_zero();
    for (int j = 0; j < PAGE; j += VF_N) {
        const vf e = vf_exp(vf_sub(vf_load(s + j), vf_set(m)));
        vf_store(s + j, e);
        sum = vf_add(sum, e);
    }
    l += vf_sum(sum);
}

// A page to attend to.
struct page_job {
    int stream;
    kvl_page_ref page;
    rows_ahead next_k, next_v; // will be read soon
    bool biased;               // its keys lack their mean
    float * logits;            // of row 0 and this page's first slot, or NULL
};

// Rows r0 .. r0+N-1 of a stream over one page.
template <int N, typename Keys, typename Values>
void attend_page(const attn & a, const page_job & job, const Keys & k, const Values & v, int r0, few_rows & w) {
    alignas(64) float s[N * PAGE];
    int n_max = 0;
    int n_seen[N];
    for (int i = 0; i < N; i++) {
        n_seen[i] = std::clamp(a.visible(job.stream, r0 + i) - job.page.slot, 0, PAGE);
        n_max = std::max(n_max, n_seen[i]);
    }
    constexpr int wide = sizeof(vf) == 64 || VF_N == 4; // 32 registers
    if (n_max > 0) {
        dots<N, (N <= 3 || wide) ? 4 : 2>(w.q + r0, k, job.next_k, a.d_k, n_max, s);
    }
    for (int i = 0; i < N; i++) {
        float * z = s + i * PAGE;
        for (int j = 0; job.biased && j < n_seen[i]; j++) {
            z[j] += w.bias[r0 + i];
        }
        for (int j = 0; a.p.soft_cap > 0.0f && j < n_seen[i]; j++) {
            z[j] = cap(z[j], a.p.soft_cap);
        }
        std::fill(z + n_seen[i], z + PAGE, -INFINITY);
        std::fill_n(z, std::clamp(a.first_seen(job.stream, r0 + i) - job.page.slot, 0, PAGE), -INFINITY);
        for (int j = 0; job.page.live != UINT32_MAX && j < n_seen[i]; j++) {
            z[j] = job.page.live >> j & 1 ? z[j] : -INFINITY;
        }
        if (job.logits) {
            std::copy_n(z, PAGE, job.logits + int64_t(r0 + i) * a.p.n_kv);
        }
        soften(z, w.m[r0 + i], w.l[r0 + i], w.o[r0 + i], a.d_v);
    }
    if (n_max > 0) {
        accumulate<N, (N <= 2 || wide) ? 4 : 2>(w.o + r0, v, job.next_v, a.d_v, n_max, s);
    }
}

// All rows of a stream over one page.
template <typename Keys, typename Values>
void attend_rows(const attn & a, const page_job & job, few_rows & w, const Keys & k, const Values & v) {
    for (int r0 = 0; r0 < a.n_rows; r0 += 4) {
        switch (a.n_rows - r0) {
            case 1:
                attend_page<1>(a, job, k, v, r0, w);
                break;
            case 2:
                attend_page<2>(a, job, k, v, r0, w);
                break;
            case 3:
                attend_page<3>(a, job, k, v, r0, w);
                break;
            default:
                attend_page<4>(a, job, k, v, r0, w);
        }
    }
}

// As they are stored; a format without rows of its own is decoded first.
void attend_stored(const attn & a, const page_job & job, few_rows & w, const page_rows & k, const page_rows & v) {
    switch (k.row) {
        case KVL_ROW_F16:
            return attend_rows(a, job, w, f16_rows{k.f16(), k.d}, f16_rows{v.f16(), v.d});
#if VF_N >= 8
        case KVL_ROW_Q8:
            return attend_rows(a, job, w, block_rows<block_q8_0>(k), block_rows<block_q8_0>(v));
        case KVL_ROW_Q4:
            return attend_rows(a, job, w, block_rows<block_q4_0>(k), block_rows<block_q4_0>(v));
        case KVL_ROW_KV3:
            if (v.row == KVL_ROW_KV3) {
                return attend_rows(a, job, w, block_rows<kvl_block_kv3>(k), block_rows<kvl_block_kv3>(v));
            }
            return attend_rows(a, job, w, block_rows<kvl_block_kv3>(k), block_rows<kvl_block_kv2>(v));
        case KVL_ROW_KV2:
            return attend_rows(a, job, w, block_rows<kvl_block_kv2>(k), block_rows<kvl_block_kv2>(v));
        case KVL_ROW_KIVI2_32_K:
        case KVL_ROW_KIVI2_64_K:
            return attend_rows(a, job, w, kivi_keys<2>(k), kivi_values<2>(v));
        case KVL_ROW_KIVI4_32_K:
        case KVL_ROW_KIVI4_64_K:
            return attend_rows(a, job, w, kivi_keys<4>(k), kivi_values<4>(v));
#endif
        default:
            break;
    }
    const int n = a.in_page(job.stream, job.page);
    float * keys = w.page.data();
    float * values = keys + PAGE * a.d_k;
    k.widen(n, keys, a.d_k);
    v.widen(n, values, a.d_v);
    attend_rows(a, job, w, f32_rows{keys, a.d_k}, f32_rows{values, a.d_v});
}

} // namespace

void attend_few(const attn & a, int stream, int page0, int page1, bool first, few_rows & w, float * dst,
                float * logits) {
    const int stride = a.d_v + 2;
    const kvl_page_ref * pages = a.pages(stream);
    const float * mean = a.mean(stream);
    for (int r = 0; r < a.n_rows; r++) {
        const float * q = a.q + a.row(stream, r) * a.d_k;
        float * scaled = w.scaled.data() + r * w.ld_q;
        for (int c = 0; c < a.d_k; c++) {
            scaled[c] = q[c] * a.p.scale;
        }
        w.q[r] = scaled;
        w.o[r] = dst + int64_t(r) * stride;
        std::fill_n(w.o[r], a.d_v, 0.0f);
        const row_stats stats = first ? a.begin(stream, r, -INFINITY) : row_stats{-INFINITY, 0.0f};
        w.m[r] = stats.m;
        w.l[r] = stats.l;
        w.bias[r] = 0.0f;
        for (int c = 0; mean && c < a.d_k; c++) {
            w.bias[r] += scaled[c] * mean[c];
        }
    }
    for (int p = page0; p < page1; p++) {
        const kvl_page_ref & next = pages[std::min(p + 2, page1 - 1)]; // one page ahead comes too late
        const page_job job{
            stream,
            pages[p],
            rows_ahead(a.keys(next)),
            rows_ahead(a.values(next)),
            a.lacks_mean(stream, pages[p]),
            logits ? logits + p * PAGE : nullptr,
        };
        attend_stored(a, job, w, a.keys(pages[p]), a.values(pages[p]));
    }
    for (int r = 0; r < a.n_rows; r++) {
        w.o[r][a.d_v] = w.m[r];
        w.o[r][a.d_v + 1] = w.l[r];
    }
}

} // namespace kvl
