// Blocks of the row formats, back to f32, by NEON: sixteen codes at a time, as bytes until they are small integers.
// Part of kvl-format-decode.h.

#pragma once

namespace kvl::fast {

// out = q * d
inline void put(float * out, int8x16_t q, float d) {
    const int16x8_t low = vmovl_s8(vget_low_s8(q));
    const int16x8_t high = vmovl_high_s8(q);
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), d));
    vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(low)), d));
    vst1q_f32(out + 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), d));
    vst1q_f32(out + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(high)), d));
}

inline void decode(const block_q8_0 & b, float * out) {
    const float d = vf_half(&b.d);
    put(out, vld1q_s8(b.qs), d);
    put(out + 16, vld1q_s8(b.qs + 16), d);
}

inline void decode(const block_q4_0 & b, float * out) {
    const float d = vf_half(&b.d);
    const uint8x16_t q = vld1q_u8(b.qs);
    const int8x16_t middle = vdupq_n_s8(8);
    put(out, vsubq_s8(vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))), middle), d);
    put(out + 16, vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(q, 4)), middle), d);
}

inline void decode(const kvl_block_kv3 & b, float * out) {
    const float d = vf_half(&b.d);
    const int8x16_t levels = vld1q_s8(KV3);
    uint8x16_t low = vld1q_u8(b.qs);
    const uint8x8_t qh = vld1_u8(b.qh);
    // of sixteen codes, the last eight have the next bits of the same bytes
    uint8x16_t high = vcombine_u8(qh, vshr_n_u8(qh, 1));
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
        const uint8x16_t code = vandq_u8(vsliq_n_u8(low, high, 2), vdupq_n_u8(7));
        put(out + i, vqtbl1q_s8(levels, code), d);
        low = vshrq_n_u8(low, 2);
        high = vshrq_n_u8(high, 2);
    }
}

inline void decode(const kvl_block_kv2 & b, float * out) {
    const float d = vf_half(&b.d);
    const int8x16_t levels = vld1q_s8(KV2);
    uint8x16_t q = vld1q_u8(b.qs);
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
        put(out + i, vqtbl1q_s8(levels, vandq_u8(q, vdupq_n_u8(3))), d);
        q = vshrq_n_u8(q, 2);
    }
}

} // namespace kvl::fast
