// Few queries (decode): the work is reading K and V, so every slot is read once for up to four query rows.

#include "kvl-attn-impl.h"

namespace kvl {

namespace {

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

} // namespace

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

} // namespace kvl
