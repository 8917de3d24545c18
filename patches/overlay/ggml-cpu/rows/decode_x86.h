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

inline vf scale(const ggml_fp16_t & d) {
    return vf_set(vf_half(&d));
}

// A block in registers: get(c) gives the vector of its values from c on.
template <typename Block> struct reader;

template <> struct reader<block_q8_0> {
    static constexpr int SIZE = 32;
    const int8_t * q;
    vf d;

    static reader of(const block_q8_0 & b) { return {b.qs, scale(b.d)}; }
    vf get(int c) const { return vf_mul(number(load_i8(q + c)), d); }
};

#if VF_N == 16

// sixteen levels fit into one vector, and the table looks at the four low bits alone
template <> struct reader<block_q4_0> {
    static constexpr int SIZE = 32;
    vi q;
    vf levels;

    static reader of(const block_q4_0 & b) {
        const vi codes = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return {load_u8(b.qs), vf_mul(number(codes), scale(b.d))};
    }
    vf get(int c) const { return pick(levels, shift_right(q, c / 16 * 4)); }
};

#else

template <> struct reader<block_q4_0> {
    static constexpr int SIZE = 32;
    const uint8_t * q;
    vf d;

    static reader of(const block_q4_0 & b) { return {b.qs, scale(b.d)}; }
    vf get(int c) const {
        const vi code = and_bits(shift_right(load_u8(q + c % 16), c / 16 * 4), 15);
        return vf_mul(number(add(code, -8)), d);
    }
};

#endif

template <> struct reader<kvl_block_kv3> {
    static constexpr int SIZE = 64;
    const uint8_t * q;
    vi high;
    vf levels;

    static reader of(const kvl_block_kv3 & b) {
        return {b.qs, load_high(b.qh), vf_mul(number(load_i8(KV3)), scale(b.d))};
    }
    vf get(int c) const {
        const vi low = shift_right(load_u8(q + c % 16), c / 16 * 2);
        return pick(levels, select(3, low, shift_right(high, c / VF_N * HIGH_STEP)));
    }
};

template <> struct reader<kvl_block_kv2> {
    static constexpr int SIZE = 64;
    const uint8_t * q;
    vf levels;

    static reader of(const kvl_block_kv2 & b) { return {b.qs, vf_mul(number(load_i8(KV2)), scale(b.d))}; }
    vf get(int c) const { return pick(levels, shift_right(load_u8(q + c % 16), c / 16 * 2)); }
};

template <typename Block> void decode(const Block & b, float * out) {
    const auto from = reader<Block>::of(b);
#pragma GCC unroll 8
    for (int c = 0; c < reader<Block>::SIZE; c += VF_N) {
        vf_store(out + c, from.get(c));
    }
}

// Codes of 32 values as kivi and token2 pack them (kvl-format.h), as numbers: get(c) gives those from c on.
template <int BITS> struct run_codes {
#if VF_N == 16
    vi q;

    static run_codes of(const uint8_t * p) {
        if (BITS == 4) {
            return {load_u8(p)};
        }
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)p);
        const vi twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(bytes, bytes));
        // lanes 8 to 15 hold the next code of the same bytes
        return {_mm512_mask_srli_epi32(twice, 0xff00, twice, 2)};
    }
    vf get(int c) const {
        return number(and_bits(shift_right(q, c / 16 * 4), (1 << BITS) - 1));
    }
#else
    const uint8_t * p;

    static run_codes of(const uint8_t * p) {
        return {p};
    }
    vf get(int c) const {
        constexpr int n = 4 * BITS; // bytes
        return number(and_bits(shift_right(load_u8(p + c % n), c / n * BITS), (1 << BITS) - 1));
    }
#endif
};

} // namespace kvl::fast
