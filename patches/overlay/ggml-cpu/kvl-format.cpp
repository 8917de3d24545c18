// Row formats: encoding happens once per slot, decoding at every look at it.

#include "kvl-format.h"

#include "kvl-affine.h"
#include "kvl-attn.h"

#include "kvl-simd.h"

#include "ggml-quants.h"

#include <cmath>
#include <cstring>

namespace {

constexpr float KV2[4] = {-10, -3, 3, 10};
constexpr float KV3[8] = {-60, -38, -21, -7, 7, 21, 38, 60};

// Where a value passes to the next level, in units of the block's root mean square: those of Lloyd and Max for a
// normal distribution.
constexpr float KV2_STEP = 0.9816f;
constexpr float KV3_STEPS[3] = {0.5006f, 1.05f, 1.748f};

float square_sum(const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < 64; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

void encode_kv2(const float * x, kvl_block_kv2 & out) {
    const float ss = square_sum(x);
    const float step = KV2_STEP * sqrtf(ss / 64);
    float levels = 0.0f;
    memset(out.qs, 0, sizeof(out.qs));
    for (int i = 0; i < 64; i++) {
        const int big = fabsf(x[i]) > step;
        const int code = x[i] < 0 ? 1 - big : 2 + big;
        levels += KV2[code] * KV2[code];
        out.qs[i % 16] |= uint8_t(code << i / 16 * 2);
    }
    out.d = GGML_CPU_FP32_TO_FP16(sqrtf(ss / levels));
}

void encode_kv3(const float * x, kvl_block_kv3 & out) {
    const float ss = square_sum(x);
    const float rms = sqrtf(ss / 64);
    float levels = 0.0f;
    memset(out.qs, 0, sizeof(out.qs));
    memset(out.qh, 0, sizeof(out.qh));
    for (int i = 0; i < 64; i++) {
        int m = 0;
        for (const float step : KV3_STEPS) {
            m += fabsf(x[i]) > step * rms;
        }
        const int code = x[i] < 0 ? 3 - m : 4 + m;
        levels += KV3[code] * KV3[code];
        out.qs[i % 16] |= uint8_t((code & 3) << i / 16 * 2);
        out.qh[i % 8] |= uint8_t((code >> 2) << i / 8);
    }
    out.d = GGML_CPU_FP32_TO_FP16(sqrtf(ss / levels));
}

#if defined(__AVX512F__)

void decode_q8(const block_q8_0 & b, float * out) {
    const __m512 d = _mm512_set1_ps(GGML_CPU_FP16_TO_FP32(b.d));
    for (int i = 0; i < 32; i += 16) {
        const __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b.qs + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_cvtepi32_ps(q), d));
    }
}

void decode_q4(const block_q4_0 & b, float * out) {
    const __m512 d = _mm512_set1_ps(GGML_CPU_FP16_TO_FP32(b.d));
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)b.qs));
    const __m512i low = _mm512_sub_epi32(_mm512_and_si512(q, _mm512_set1_epi32(15)), _mm512_set1_epi32(8));
    const __m512i high = _mm512_sub_epi32(_mm512_srli_epi32(q, 4), _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(low), d));
    _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(high), d));
}

void decode_kv2(const kvl_block_kv2 & b, float * out) {
    const __m512 d = _mm512_set1_ps(GGML_CPU_FP16_TO_FP32(b.d));
    const __m512 levels = _mm512_mul_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(KV2)), d);
    __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)b.qs));
    for (int i = 0; i < 64; i += 16) {
        const __m512i code = _mm512_and_si512(q, _mm512_set1_epi32(3));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(code, levels));
        q = _mm512_srli_epi32(q, 2);
    }
}

void decode_kv3(const kvl_block_kv3 & b, float * out) {
    const __m512 d = _mm512_set1_ps(GGML_CPU_FP16_TO_FP32(b.d));
    const __m256 half = _mm256_loadu_ps(KV3);
    const __m512 levels = _mm512_mul_ps(_mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(half))), d);
    __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)b.qs));
    const __m128i high8 = _mm_loadl_epi64((const __m128i *)b.qh);
    __m512i high = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(high8, high8));
    // lanes 8 to 15 hold the next bit of the same bytes
    high = _mm512_mask_srli_epi32(high, 0xff00, high, 1);
    for (int i = 0; i < 64; i += 16) {
        const __m512i low = _mm512_and_si512(q, _mm512_set1_epi32(3));
        const __m512i bit = _mm512_and_si512(_mm512_slli_epi32(high, 2), _mm512_set1_epi32(4));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(_mm512_or_si512(low, bit), levels));
        q = _mm512_srli_epi32(q, 2);
        high = _mm512_srli_epi32(high, 2);
    }
}

#else

void decode_q8(const block_q8_0 & b, float * out) {
    const float d = GGML_CPU_FP16_TO_FP32(b.d);
    for (int i = 0; i < 32; i++) {
        out[i] = float(b.qs[i]) * d;
    }
}

void decode_q4(const block_q4_0 & b, float * out) {
    const float d = GGML_CPU_FP16_TO_FP32(b.d);
    for (int i = 0; i < 16; i++) {
        out[i] = float((b.qs[i] & 15) - 8) * d;
        out[i + 16] = float((b.qs[i] >> 4) - 8) * d;
    }
}

void decode_kv2(const kvl_block_kv2 & b, float * out) {
    const float d = GGML_CPU_FP16_TO_FP32(b.d);
    const float levels[4] = {KV2[0] * d, KV2[1] * d, KV2[2] * d, KV2[3] * d};
    for (int i = 0; i < 64; i++) {
        out[i] = levels[b.qs[i % 16] >> i / 16 * 2 & 3];
    }
}

void decode_kv3(const kvl_block_kv3 & b, float * out) {
    const float d = GGML_CPU_FP16_TO_FP32(b.d);
    float levels[8];
    for (int i = 0; i < 8; i++) {
        levels[i] = KV3[i] * d;
    }
    for (int i = 0; i < 64; i++) {
        const int low = b.qs[i % 16] >> i / 16 * 2 & 3;
        const int high = b.qh[i % 8] >> i / 8 & 1;
        out[i] = levels[low | high << 2];
    }
}

#endif

// f(block number) for every block of a row
template <typename F> void blocks(kvl_row row, int d, F && f) {
    for (int i = 0; i < d / kvl_row_block(row); i++) {
        f(i);
    }
}

} // namespace

extern "C" void kvl_row_encode(kvl_row row, const float * x, int d, void * out) {
    switch (row) {
        case KVL_ROW_F16:
            for (int i = 0; i < d; i++) {
                static_cast<ggml_fp16_t *>(out)[i] = GGML_CPU_FP32_TO_FP16(x[i]);
            }
            break;
        case KVL_ROW_Q8:
            quantize_row_q8_0_ref(x, static_cast<block_q8_0 *>(out), d);
            break;
        case KVL_ROW_Q4:
            quantize_row_q4_0_ref(x, static_cast<block_q4_0 *>(out), d);
            break;
        case KVL_ROW_KV3:
            blocks(row, d, [&](int i) {
                encode_kv3(x + 64 * i, static_cast<kvl_block_kv3 *>(out)[i]);
            });
            break;
        case KVL_ROW_KV2:
            blocks(row, d, [&](int i) {
                encode_kv2(x + 64 * i, static_cast<kvl_block_kv2 *>(out)[i]);
            });
            break;
        default:
            kvl::affine_encode(row, x, d, out);
    }
}

extern "C" void kvl_row_decode(kvl_row row, const void * in, int d, float * out) {
    switch (row) {
        case KVL_ROW_F16:
            for (int i = 0; i < d; i++) {
                out[i] = GGML_CPU_FP16_TO_FP32(static_cast<const ggml_fp16_t *>(in)[i]);
            }
            break;
        case KVL_ROW_Q8:
            blocks(row, d, [&](int i) {
                decode_q8(static_cast<const block_q8_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_Q4:
            blocks(row, d, [&](int i) {
                decode_q4(static_cast<const block_q4_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_KV3:
            blocks(row, d, [&](int i) {
                decode_kv3(static_cast<const kvl_block_kv3 *>(in)[i], out + 64 * i);
            });
            break;
        case KVL_ROW_KV2:
            blocks(row, d, [&](int i) {
                decode_kv2(static_cast<const kvl_block_kv2 *>(in)[i], out + 64 * i);
            });
            break;
        default:
            kvl::affine_decode(row, in, d, out);
    }
}

extern "C" void kvl_row_rotate(float * x, int d) {
    const int block = d & -d;
    const float scale = 1.0f / sqrtf(float(block));
    for (int i = 0; i < d; i++) {
        x[i] *= scale;
    }
    for (float * b = x; b < x + d; b += block) {
        for (int h = 1; h < block; h *= 2) {
            for (int i = 0; i < block; i += 2 * h) {
                for (int j = i; j < i + h; j++) {
                    const float sum = b[j] + b[j + h];
                    b[j + h] = b[j] - b[j + h];
                    b[j] = sum;
                }
            }
        }
    }
}

extern "C" void kvl_attn_rotate(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const ggml_tensor * src = dst->src[0];
    const int d = int(src->ne[0]);
    const int64_t n_rows = ggml_nrows(src);
    for (int64_t r = n_rows * ith / nth; r < n_rows * (ith + 1) / nth; r++) {
        float * x = static_cast<float *>(dst->data) + r * d;
        memcpy(x, static_cast<const float *>(src->data) + r * d, size_t(d) * sizeof(float));
        kvl_row_rotate(x, d);
    }
}
