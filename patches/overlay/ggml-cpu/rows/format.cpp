// Row formats: encoding happens once per slot, decoding at every look at it.

#include "kvl-format.h"

#include "rows/affine.h"
#include "kvl-attn.h"

#include "rows/decode.h"

#include "ggml-cpu.h"

#include <cmath>
#include <cstring>

using namespace kvl;

namespace {

// Where a value passes to the next level, in units of the block's root mean square: those of Lloyd and Max for a
// normal distribution.
constexpr float KV2_STEP = 0.9816f;
constexpr float KV3_STEPS[3] = {0.5006f, 1.05f, 1.748f};

// The loops below are written so that compilers make vectors of them; what they compute is the same bits in any
// instructions. The squares of f32 are exact in f64, so that a fused multiply-add changes nothing, and their sum is
// always taken in this order: sixteen partial sums, which are then halved.
float square_sum(const float * x) {
    double sums[16] = {};
    for (int i = 0; i < 64; i += 16) {
        for (int j = 0; j < 16; j++) {
            sums[j] += double(x[i + j]) * double(x[i + j]);
        }
    }
    for (int n = 8; n > 0; n /= 2) {
        for (int j = 0; j < n; j++) {
            sums[j] += sums[j + n];
        }
    }
    return float(sums[0]);
}

// The scale that gives levels with this sum of squares the norm of what they stand for.
ggml_fp16_t norm_scale(float ss, int levels) {
    return GGML_CPU_FP32_TO_FP16(sqrtf(ss / float(levels)));
}

void pack_low(const uint8_t * codes, uint8_t * qs) {
    for (int j = 0; j < 16; j++) {
        qs[j] =
            uint8_t((codes[j] & 3) | (codes[j + 16] & 3) << 2 | (codes[j + 32] & 3) << 4 | (codes[j + 48] & 3) << 6);
    }
}

// Eight bytes at a time: compilers make no vectors of a loop this short.
void pack_high(const uint8_t * codes, uint8_t * qh) {
    uint64_t bits = 0;
    for (int k = 0; k < 8; k++) {
        uint64_t eight;
        memcpy(&eight, codes + 8 * k, sizeof(eight));
        bits |= (eight >> 2 & 0x0101010101010101) << k;
    }
    memcpy(qh, &bits, sizeof(bits));
}

void encode(const float * x, kvl_block_kv2 & out) {
    const float ss = square_sum(x);
    const float step = KV2_STEP * sqrtf(ss / 64);
    uint8_t codes[64];
    int n_big = 0;
    for (int i = 0; i < 64; i++) {
        const int big = fabsf(x[i]) > step;
        n_big += big;
        codes[i] = uint8_t(x[i] < 0 ? 1 - big : 2 + big);
    }
    pack_low(codes, out.qs);
    out.d = norm_scale(ss, 9 * 64 + (100 - 9) * n_big);
}

void encode(const float * x, kvl_block_kv3 & out) {
    const float ss = square_sum(x);
    const float rms = sqrtf(ss / 64);
    const float steps[3] = {KV3_STEPS[0] * rms, KV3_STEPS[1] * rms, KV3_STEPS[2] * rms};
    uint8_t codes[64];
    int n_above[3] = {}; // values beyond each step
    for (int i = 0; i < 64; i++) {
        const float size = fabsf(x[i]);
        const int above[3] = {size > steps[0], size > steps[1], size > steps[2]};
        const int m = above[0] + above[1] + above[2];
        for (int k = 0; k < 3; k++) {
            n_above[k] += above[k];
        }
        codes[i] = uint8_t(x[i] < 0 ? 3 - m : 4 + m);
    }
    pack_low(codes, out.qs);
    pack_high(codes, out.qh);
    int levels = 7 * 7 * 64;
    levels += (21 * 21 - 7 * 7) * n_above[0] + (38 * 38 - 21 * 21) * n_above[1] + (60 * 60 - 38 * 38) * n_above[2];
    out.d = norm_scale(ss, levels);
}

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
            ggml_cpu_fp32_to_fp16(x, static_cast<ggml_fp16_t *>(out), d);
            break;
        case KVL_ROW_Q8:
            quantize_row_q8_0_ref(x, static_cast<block_q8_0 *>(out), d);
            break;
        case KVL_ROW_Q4:
            quantize_row_q4_0_ref(x, static_cast<block_q4_0 *>(out), d);
            break;
        case KVL_ROW_KV3:
            blocks(row, d, [&](int i) {
                encode(x + 64 * i, static_cast<kvl_block_kv3 *>(out)[i]);
            });
            break;
        case KVL_ROW_KV2:
            blocks(row, d, [&](int i) {
                encode(x + 64 * i, static_cast<kvl_block_kv2 *>(out)[i]);
            });
            break;
        default:
            kvl::affine_encode(row, x, d, out);
    }
}

extern "C" void kvl_row_decode(kvl_row row, const void * in, int d, float * out) {
    switch (row) {
        case KVL_ROW_F16:
            ggml_cpu_fp16_to_fp32(static_cast<const ggml_fp16_t *>(in), out, d);
            break;
        case KVL_ROW_Q8:
            blocks(row, d, [&](int i) {
                fast::decode(static_cast<const block_q8_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_Q4:
            blocks(row, d, [&](int i) {
                fast::decode(static_cast<const block_q4_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_KV3:
            blocks(row, d, [&](int i) {
                fast::decode(static_cast<const kvl_block_kv3 *>(in)[i], out + 64 * i);
            });
            break;
        case KVL_ROW_KV2:
            blocks(row, d, [&](int i) {
                fast::decode(static_cast<const kvl_block_kv2 *>(in)[i], out + 64 * i);
            });
            break;
        default:
            kvl::affine_decode(row, in, d, out);
    }
}

extern "C" void kvl_row_decode_ref(kvl_row row, const void * in, int d, float * out) {
    switch (row) {
        case KVL_ROW_F16:
            for (int i = 0; i < d; i++) {
                out[i] = vf_half(static_cast<const ggml_fp16_t *>(in) + i);
            }
            break;
        case KVL_ROW_Q8:
            blocks(row, d, [&](int i) {
                plain::decode(static_cast<const block_q8_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_Q4:
            blocks(row, d, [&](int i) {
                plain::decode(static_cast<const block_q4_0 *>(in)[i], out + 32 * i);
            });
            break;
        case KVL_ROW_KV3:
            blocks(row, d, [&](int i) {
                plain::decode(static_cast<const kvl_block_kv3 *>(in)[i], out + 64 * i);
            });
            break;
        case KVL_ROW_KV2:
            blocks(row, d, [&](int i) {
                plain::decode(static_cast<const kvl_block_kv2 *>(in)[i], out + 64 * i);
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
