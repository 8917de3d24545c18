// Few queries (decode): the work is reading K and V, so every slot is read once for up to four query rows.

#include "kvl-attn-impl.h"

namespace kvl {

namespace {

// Lines of a later page are asked for while this one is worked on: pages lie apart, so the hardware cannot guess them.
void prefetch_row(const ggml_fp16_t * row, int d) {
    for (int c = 0; row && c < d; c += 32) {
        __builtin_prefetch(row + c);
    }
}

void prefetch_page(const page_rows & rows) {
    const int64_t bytes = int64_t(kvl_row_bytes(rows.row, rows.d));
    for (int64_t c = rows.first * bytes; c < (rows.first + PAGE) * bytes; c += 64) {
        __builtin_prefetch(rows.data + c);
    }
}

vf load(const ggml_fp16_t * p) {
    return vf_load_f16(p);
}

vf load(const float * p) {
    return vf_load(p);
}

float load_one(ggml_fp16_t x) {
    return GGML_CPU_FP16_TO_FP32(x);
}

float load_one(float x) {
    return x;
}

// s[i*PAGE + j] = q_i . k_j for N rows and the first n slots of a page
template <int N, int B, typename T>
void dots(const float * const * q, const T * k, const ggml_fp16_t * next, int d, int n, float * s) {
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
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            prefetch_row(next ? next + (j + b) * d : nullptr, d);
        }
        int c = 0;
        for (; c + VF_N <= d; c += VF_N) {
            vf kv[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                kv[b] = load(k + (j + b) * d + c);
            }
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                const vf qv = vf_load(q[i] + c);
#pragma GCC unroll 4
                for (int b = 0; b < B; b++) {
                    acc[i][b] = vf_fma(kv[b], qv, acc[i][b]);
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
            for (int r = c; r < d; r++) {
#pragma GCC unroll 4
                for (int b = 0; b < B; b++) {
                    to[b] += load_one(k[(j + b) * d + r]) * q[i][r];
                }
            }
        }
    }
    if (B > 1 && j < n) {
        dots<N, 1>(q, k + j * d, next ? next + j * d : nullptr, d, n - j, s + j);
    }
}

// o_i += sum_j p[i*PAGE + j] * v_j for N rows and the first n slots of a page
template <int N, int B, typename T>
void accumulate(float * const * o, const T * v, const ggml_fp16_t * next, int d, int n, const float * p) {
    int c = 0;
    for (; c + B * VF_N <= d; c += B * VF_N) {
        vf acc[N][B];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                acc[i][b] = vf_load(o[i] + c + b * VF_N);
            }
        }
        for (int j = 0; j < n; j++) {
            prefetch_row(next ? next + j * d + c : nullptr, B * VF_N);
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) {
                const vf vv = load(v + j * d + c + b * VF_N);
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
                    acc = vf_fma(load(v + j * d + c), vf_set(p[i * PAGE + j]), acc);
                }
                vf_store(o[i] + c, acc);
            }
        }
    }
    for (; c < d; c++) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < n; j++) {
                o[i][c] += load_one(v[j * d + c]) * p[i * PAGE + j];
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

// A page to attend to. T: ggml_fp16_t as stored, or float, decoded.
template <typename T> struct page_job {
    int stream, slot0;
    const T * k;
    const T * v;
    const ggml_fp16_t * next_k; // will be read soon, or NULL
    const ggml_fp16_t * next_v;
    bool biased; // its keys lack mu
    uint32_t live;
    float * logits; // of row 0 and this page's first slot, or NULL
};

// Rows r0 .. r0+N-1 of a stream over one page.
template <int N, typename T> void attend_page(const attn & a, const page_job<T> & job, int r0, few_rows & w) {
    alignas(64) float s[N * PAGE];
    int n_max = 0;
    int n_seen[N];
    for (int i = 0; i < N; i++) {
        n_seen[i] = job.live ? std::clamp(a.visible(job.stream, r0 + i) - job.slot0, 0, PAGE) : 0;
        n_max = std::max(n_max, n_seen[i]);
    }
    constexpr int wide = sizeof(vf) == 64 || VF_N == 4; // 32 registers
    if (n_max > 0) {
        dots<N, (N <= 3 || wide) ? 4 : 2>(w.q + r0, job.k, job.next_k, a.d_k, n_max, s);
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
        for (int j = 0; job.live != UINT32_MAX && j < n_seen[i]; j++) {
            z[j] = job.live >> j & 1 ? z[j] : -INFINITY;
        }
        if (job.logits) {
            const int n = std::min(PAGE, a.n_slots(job.stream) - job.slot0);
            std::copy_n(z, n, job.logits + int64_t(r0 + i) * a.p.n_kv);
        }
        soften(z, w.m[r0 + i], w.l[r0 + i], w.o[r0 + i], a.d_v);
    }
    if (n_max > 0) {
        accumulate<N, (N <= 2 || wide) ? 4 : 2>(w.o + r0, job.v, job.next_v, a.d_v, n_max, s);
    }
}

// All rows of a stream over one page.
template <typename T> void attend_rows(const attn & a, const page_job<T> & job, few_rows & w) {
    for (int r0 = 0; r0 < a.n_rows; r0 += 4) {
        switch (a.n_rows - r0) {
            case 1:
                attend_page<1>(a, job, r0, w);
                break;
            case 2:
                attend_page<2>(a, job, r0, w);
                break;
            case 3:
                attend_page<3>(a, job, r0, w);
                break;
            default:
                attend_page<4>(a, job, r0, w);
        }
    }
}

} // namespace

void attend_few(const attn & a, int stream, int page0, int page1, few_rows & w, float * dst, float * logits) {
    const int stride = a.d_v + 2;
    const int32_t * pages = a.pages(stream);
    const int32_t * live = a.live(stream);
    for (int r = 0; r < a.n_rows; r++) {
        const float * q = a.q + a.row(stream, r) * a.d_k;
        float * scaled = w.scaled.data() + r * w.ld_q;
        for (int c = 0; c < a.d_k; c++) {
            scaled[c] = q[c] * a.p.scale;
        }
        w.q[r] = scaled;
        w.o[r] = dst + int64_t(r) * stride;
        std::fill_n(w.o[r], a.d_v, 0.0f);
        w.m[r] = -INFINITY;
        w.l[r] = 0.0f;
        w.bias[r] = 0.0f;
        const float * mu = a.p.mu ? a.p.mu[stream] : nullptr;
        for (int c = 0; mu && c < a.d_k; c++) {
            w.bias[r] += scaled[c] * mu[c];
        }
    }
    for (int p = page0; p < page1; p++) {
        const page_rows k = a.k_page(pages[p]);
        const page_rows v = a.v_page(pages[p]);
        const int32_t next = pages[std::min(p + 2, page1 - 1)]; // one page ahead comes too late
        const page_rows next_k = a.k_page(next);
        const page_rows next_v = a.v_page(next);
        float * to = logits ? logits + p * PAGE : nullptr;
        const bool plain = k.row == KVL_ROW_F16;
        if (plain && next_k.row == KVL_ROW_F16) {
            attend_rows<ggml_fp16_t>(
                a, {stream, p * PAGE, k.f16(), v.f16(), next_k.f16(), next_v.f16(), false, uint32_t(live[p]), to}, w);
            continue;
        }
        prefetch_page(next_k);
        prefetch_page(next_v);
        if (plain) {
            attend_rows<ggml_fp16_t>(
                a, {stream, p * PAGE, k.f16(), v.f16(), nullptr, nullptr, false, uint32_t(live[p]), to}, w);
            continue;
        }
        const int n = std::min(PAGE, a.n_slots(stream) - p * PAGE);
        float * keys = w.page.data();
        float * values = keys + PAGE * a.d_k;
        k.widen(n, keys, a.d_k);
        v.widen(n, values, a.d_v);
        attend_rows<float>(a,
                           {stream, p * PAGE, keys, values, nullptr, nullptr, a.mu(stream, pages[p]) != nullptr,
                            uint32_t(live[p]), to},
                           w);
    }
    for (int r = 0; r < a.n_rows; r++) {
        w.o[r][a.d_v] = w.m[r];
        w.o[r][a.d_v + 1] = w.l[r];
    }
}

} // namespace kvl
