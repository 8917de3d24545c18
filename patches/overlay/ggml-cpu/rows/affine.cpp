// Affine row formats: what is read is code * scale + zero. The products are exact in f32 (codes and zero points have at
// most 8 bits, scales 11), so that every path of instructions, fused or not, gives the same bits.

#include "rows/affine.h"

#include "rows/decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvl {

namespace {

constexpr int RUN = 32; // values whose codes are packed together

constexpr int run_bytes(int bits) {
    return RUN * bits / 8;
}

// f16 values may lie at any address: a block of token2 has an odd number of bytes. Returns what is stored.
float store_half(uint8_t * p, float x) {
    const ggml_fp16_t half = GGML_CPU_FP32_TO_FP16(x);
    memcpy(p, &half, sizeof(half));
    return vf_half(&half);
}

//
// encoding
//

template <int BITS> void pack(const uint8_t * codes, uint8_t * out) {
    constexpr int n = run_bytes(BITS);
    for (int i = 0; i < n; i++) {
        int byte = 0;
        for (int part = 0; part < 8 / BITS; part++) {
            byte |= codes[i + part * n] << part * BITS;
        }
        out[i] = uint8_t(byte);
    }
}

// Nearest step of a range, ties to even; a range without extent has one. A NaN becomes the lowest.
template <int BITS> uint8_t step_of(float x, float scale, float zero) {
    constexpr float top = (1 << BITS) - 1;
    const float at = scale > 0.0f ? (x - zero) / scale : 0.0f;
    const float low = at > 0.0f ? at : 0.0f;
    return uint8_t(rintf(low < top ? low : top));
}

// A row in blocks of channels.
template <int BITS> void encode_values(const float * x, int d, int group, uint8_t * out) {
    for (const float * end = x + d; x < end; x += group) {
        const auto [low, high] = std::minmax_element(x, x + group);
        const float scale = store_half(out, (*high - *low) / ((1 << BITS) - 1));
        const float zero = store_half(out + 2, *low);
        out += 4;
        for (int c = 0; c < group; c += RUN, out += run_bytes(BITS)) {
            uint8_t codes[RUN];
            for (int i = 0; i < RUN; i++) {
                codes[i] = step_of<BITS>(x[c + i], scale, zero);
            }
            pack<BITS>(codes, out);
        }
    }
}

// A group of slots, channel by channel.
template <int BITS> void encode_keys(const float * x, int n, int d, uint8_t * out) {
    uint8_t * codes = out + 4 * d;
    for (int c = 0; c < d; c += RUN, codes += run_bytes(BITS)) {
        float low[RUN], high[RUN], scale[RUN], zero[RUN];
        std::copy_n(x + c, RUN, low);
        std::copy_n(x + c, RUN, high);
        for (int t = 1; t < n; t++) {
            const float * row = x + t * d + c;
            for (int i = 0; i < RUN; i++) {
                low[i] = std::min(low[i], row[i]);
                high[i] = std::max(high[i], row[i]);
            }
        }
        for (int i = 0; i < RUN; i++) {
            scale[i] = store_half(out + 2 * (c + i), (high[i] - low[i]) / ((1 << BITS) - 1));
            zero[i] = store_half(out + 2 * (d + c + i), low[i]);
        }
        for (int t = 0; t < n; t++) {
            uint8_t steps[RUN];
            for (int i = 0; i < RUN; i++) {
                steps[i] = step_of<BITS>(x[t * d + c + i], scale[i], zero[i]);
            }
            pack<BITS>(steps, codes + t * (d * BITS / 8));
        }
    }
}

// As quanto's int2 (what LogQuant's code runs), but the zero point is clamped to int8 where it wraps around there. Such
// a block, whose values are far from zero for their range, loses them all the same; quanto divides by zero where all
// values are equal, here one step is as large as they are, so that they come back as f16.
void encode_token2(const float * x, int d, uint8_t * out) {
    for (const float * end = x + d; x < end; x += 64, out += 19) {
        const auto [low, high] = std::minmax_element(x, x + 64);
        float scale = store_half(out, (*high - *low) / 3);
        float zero;
        if (scale > 0.0f) {
            zero = std::clamp(rintf(-*low / scale), -128.0f, 127.0f);
        } else {
            scale = store_half(out, fabsf(*low));
            zero = *low < 0 ? 1 : 0;
        }
        out[2] = uint8_t(int8_t(zero));
        for (int c = 0; c < 64; c += RUN) {
            uint8_t codes[RUN];
            for (int i = 0; i < RUN; i++) {
                const float code = (scale > 0.0f ? rintf(x[c + i] / scale) : 0.0f) + zero;
                const float least = code > 0.0f ? code : 0.0f;
                codes[i] = uint8_t(least < 3.0f ? least : 3.0f);
            }
            pack<2>(codes, out + 3 + c / 4);
        }
    }
}

//
// decoding
//

// out = code * scale + zero for a run.
#if VF_N >= 8

struct run {
    vf x[RUN / VF_N];
};

run spread(float x) {
    run out;
    for (vf & v : out.x) {
        v = vf_set(x);
    }
    return out;
}

run load_run(const uint8_t * halves) {
    run out;
    for (int i = 0; i < RUN; i += VF_N) {
        out.x[i / VF_N] = vf_load_f16(halves + 2 * i);
    }
    return out;
}

template <int BITS> void decode_run(const uint8_t * p, const run & scale, const run & zero, float * out) {
    const auto codes = fast::run_codes<BITS>::of(p);
#pragma GCC unroll 4
    for (int i = 0; i < RUN; i += VF_N) {
        vf_store(out + i, vf_fma(codes.get(i), scale.x[i / VF_N], zero.x[i / VF_N]));
    }
}

#else

struct run {
    float x[RUN];
};

run spread(float x) {
    run out;
    std::fill_n(out.x, RUN, x);
    return out;
}

run load_run(const uint8_t * halves) {
    run out;
    for (int i = 0; i < RUN; i++) {
        out.x[i] = vf_half(halves + 2 * i);
    }
    return out;
}

template <int BITS> void decode_run(const uint8_t * codes, const run & scale, const run & zero, float * out) {
    constexpr int n = run_bytes(BITS);
    for (int part = 0; part < 8 / BITS; part++) {
        for (int i = 0; i < n; i++) {
            const int c = part * n + i;
            out[c] = float(codes[i] >> part * BITS & ((1 << BITS) - 1)) * scale.x[c] + zero.x[c];
        }
    }
}

#endif

template <int BITS> void decode_values(const uint8_t * in, int d, int group, float * out) {
    for (float * end = out + d; out < end;) {
        const run scale = spread(vf_half(in));
        const run zero = spread(vf_half(in + 2));
        in += 4;
        for (int c = 0; c < group; c += RUN, in += run_bytes(BITS), out += RUN) {
            decode_run<BITS>(in, scale, zero, out);
        }
    }
}

template <int BITS> void decode_keys(const uint8_t * in, int first, int n, int d, float * out, int ld) {
    const int row = d * BITS / 8;
    const uint8_t * codes = in + 4 * d + first * row;
    for (int c = 0; c < d; c += RUN, codes += run_bytes(BITS)) {
        const run scale = load_run(in + 2 * c);
        const run zero = load_run(in + 2 * (d + c));
        for (int t = 0; t < n; t++) {
            decode_run<BITS>(codes + t * row, scale, zero, out + t * ld + c);
        }
    }
}

void decode_token2(const uint8_t * in, int d, float * out) {
    for (float * end = out + d; out < end; in += 19) {
        const float s = vf_half(in);
        const run scale = spread(s);
        const run zero = spread(-float(int8_t(in[2])) * s);
        for (int c = 0; c < 64; c += RUN, out += RUN) {
            decode_run<2>(in + 3 + c / 4, scale, zero, out);
        }
    }
}

} // namespace

void affine_encode(kvl_row row, const float * x, int d, void * out) {
    auto * to = static_cast<uint8_t *>(out);
    if (row == KVL_ROW_TOKEN2) {
        encode_token2(x, d, to);
    } else if (kvl_kivi_bits(row) == 2) {
        encode_values<2>(x, d, kvl_kivi_group(row), to);
    } else {
        encode_values<4>(x, d, kvl_kivi_group(row), to);
    }
}

void affine_decode(kvl_row row, const void * in, int d, float * out) {
    const auto * from = static_cast<const uint8_t *>(in);
    if (row == KVL_ROW_TOKEN2) {
        decode_token2(from, d, out);
    } else if (kvl_kivi_bits(row) == 2) {
        decode_values<2>(from, d, kvl_kivi_group(row), out);
    } else {
        decode_values<4>(from, d, kvl_kivi_group(row), out);
    }
}

} // namespace kvl

extern "C" void kvl_rows_encode(kvl_row row, const float * x, int n, int d, void * out) {
    const int step = kvl_row_slots(row);
    auto * to = static_cast<uint8_t *>(out);
    for (int i = 0; i + step <= n; i += step, x += step * d, to += step * kvl_row_bytes(row, d)) {
        if (step == 1) {
            kvl_row_encode(row, x, d, to);
        } else if (kvl_kivi_bits(row) == 2) {
            kvl::encode_keys<2>(x, step, d, to);
        } else {
            kvl::encode_keys<4>(x, step, d, to);
        }
    }
}

extern "C" void kvl_rows_decode(kvl_row row, const void * in, int first, int n, int d, float * out, int ld) {
    const auto * from = static_cast<const uint8_t *>(in);
    if (kvl_row_slots(row) > 1) {
        if (kvl_kivi_bits(row) == 2) {
            kvl::decode_keys<2>(from, first, n, d, out, ld);
        } else {
            kvl::decode_keys<4>(from, first, n, d, out, ld);
        }
        return;
    }
    const size_t bytes = kvl_row_bytes(row, d);
    from += size_t(first) * bytes;
    if (ld == d) { // rows are blocks, one after the other
        kvl_row_decode(row, from, n * d, out);
        return;
    }
    for (int i = 0; i < n; i++) {
        kvl_row_decode(row, from + size_t(i) * bytes, d, out + i * ld);
    }
}
