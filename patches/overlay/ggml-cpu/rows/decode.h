// Blocks of the row formats, back to f32: in plain loops that follow the layout, and the same bits in vectors.

#pragma once

#include "kvl-format.h"

#include "kvl-simd.h"

#include "ggml-quants.h"

namespace kvl {

// Levels, repeated to sixteen: a code's bits beyond its own may then be anything.
constexpr int8_t KV2[16] = {-10, -3, 3, 10, -10, -3, 3, 10, -10, -3, 3, 10, -10, -3, 3, 10};
constexpr int8_t KV3[16] = {-60, -38, -21, -7, 7, 21, 38, 60, -60, -38, -21, -7, 7, 21, 38, 60};

namespace plain {

inline void decode(const block_q8_0 & b, float * out) {
    const float d = vf_half(&b.d);
    for (int i = 0; i < 32; i++) {
        out[i] = float(b.qs[i]) * d;
    }
}

inline void decode(const block_q4_0 & b, float * out) {
    const float d = vf_half(&b.d);
    for (int i = 0; i < 16; i++) {
        out[i] = float((b.qs[i] & 15) - 8) * d;
        out[i + 16] = float((b.qs[i] >> 4) - 8) * d;
    }
}

inline void decode(const kvl_block_kv3 & b, float * out) {
    const float d = vf_half(&b.d);
    for (int i = 0; i < 64; i++) {
        const int low = b.qs[i % 16] >> i / 16 * 2 & 3;
        const int high = b.qh[i % 8] >> i / 8 & 1;
        out[i] = float(KV3[low | high << 2]) * d;
    }
}

inline void decode(const kvl_block_kv2 & b, float * out) {
    const float d = vf_half(&b.d);
    for (int i = 0; i < 64; i++) {
        out[i] = float(KV2[b.qs[i % 16] >> i / 16 * 2 & 3]) * d;
    }
}

} // namespace plain

} // namespace kvl

#if VF_N >= 8
#include "rows/decode_x86.h"
#elif VF_N == 4
#include "rows/decode_neon.h"
#else
namespace kvl {
namespace fast = plain;
}
#endif
