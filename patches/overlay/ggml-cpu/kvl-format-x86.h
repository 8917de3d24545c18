// Blocks of the row formats, back to f32, by AVX-512 or AVX2: a code per lane of a vf, a table of levels in another.
// Part of kvl-format-decode.h.

#pragma once

namespace kvl::fast {

#if VF_N == 16

typedef __m512i vi;

inline vi load_u8(const uint8_t * p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}

inline vi load_i8(const int8_t * p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}

// The bytes of qh, moved so that bit 2 is the next code's. The last eight lanes have the next bits of the same bytes.
inline vi load_high(const uint8_t * qh) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)qh);
    const vi twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(bytes, bytes));
    return _mm512_mask_slli_epi32(_mm512_slli_epi32(twice, 1), 0x00ff, twice, 2);
}

constexpr int HIGH_STEP = 2;

inline vi shift_right(vi a, int n) {
    return _mm512_srli_epi32(a, unsigned(n));
}

inline vi and_bits(vi a, int b) {
    return _mm512_and_si512(a, _mm512_set1_epi32(b));
}

// the bits of a that are set in mask, the others of b
inline vi select(int mask, vi a, vi b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca);
}

inline vi add(vi a, int b) {
    return _mm512_add_epi32(a, _mm512_set1_epi32(b));
}

inline vf number(vi a) {
    return _mm512_cvtepi32_ps(a);
}

inline vf pick(vf levels, vi code) {
    return _mm512_permutexvar_ps(code, levels);
}

#else

typedef __m256i vi;

inline vi load_u8(const uint8_t * p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}

inline vi load_i8(const int8_t * p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
}

inline vi load_high(const uint8_t * qh) {
    return _mm256_slli_epi32(load_u8(qh), 2);
}

constexpr int HIGH_STEP = 1;

inline vi shift_right(vi a, int n) {
    return _mm256_srli_epi32(a, n);
}

inline vi and_bits(vi a, int b) {
    return _mm256_and_si256(a, _mm256_set1_epi32(b));
}

inline vi select(int mask, vi a, vi b) {
    const vi m = _mm256_set1_epi32(mask);
    return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
}

inline vi add(vi a, int b) {
    return _mm256_add_epi32(a, _mm256_set1_epi32(b));
}

inline vf number(vi a) {
    return _mm256_cvtepi32_ps(a);
}

inline vf pick(vf levels, vi code) {
    return _mm256_permutevar8x32_ps(levels, code);
}

#endif

inline vf scale(ggml_fp16_t d) {
    return vf_set(GGML_CPU_FP16_TO_FP32(d));
}

inline void decode(const block_q8_0 & b, float * out) {
    const vf d = scale(b.d);
    for (int i = 0; i < 32; i += VF_N) {
        vf_store(out + i, vf_mul(number(load_i8(b.qs + i)), d));
    }
}

#if VF_N == 16

// sixteen levels fit into one vector, and the table looks at the four low bits alone
inline void decode(const block_q4_0 & b, float * out) {
    const vi codes = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const vf levels = vf_mul(number(codes), scale(b.d));
    const vi q = load_u8(b.qs);
    vf_store(out, pick(levels, q));
    vf_store(out + 16, pick(levels, shift_right(q, 4)));
}

#else

inline void decode(const block_q4_0 & b, float * out) {
    const vf d = scale(b.d);
    for (int i = 0; i < 16; i += VF_N) {
        const vi q = load_u8(b.qs + i);
        vf_store(out + i, vf_mul(number(add(and_bits(q, 15), -8)), d));
        vf_store(out + i + 16, vf_mul(number(add(shift_right(q, 4), -8)), d));
    }
}

#endif

inline void decode(const kvl_block_kv3 & b, float * out) {
    const vf levels = vf_mul(number(load_i8(KV3)), scale(b.d));
    vi high = load_high(b.qh);
    vi low[16 / VF_N];
    for (int j = 0; j < 16; j += VF_N) {
        low[j / VF_N] = load_u8(b.qs + j);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
#pragma GCC unroll 2
        for (int j = 0; j < 16; j += VF_N) {
            vi & q = low[j / VF_N];
            vf_store(out + i + j, pick(levels, select(3, q, high)));
            q = shift_right(q, 2);
            high = shift_right(high, HIGH_STEP);
        }
    }
}

inline void decode(const kvl_block_kv2 & b, float * out) {
    const vf levels = vf_mul(number(load_i8(KV2)), scale(b.d));
    for (int j = 0; j < 16; j += VF_N) {
        vi q = load_u8(b.qs + j);
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16) {
            vf_store(out + i + j, pick(levels, q));
            q = shift_right(q, 2);
        }
    }
}

} // namespace kvl::fast
