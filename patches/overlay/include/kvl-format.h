// How a slot's key or value is stored: row formats of pages, what libllama and a backend agree on.

#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ROWS_ENCODE_PROC "kvl_rows_encode"
#define KVL_ROWS_DECODE_PROC "kvl_rows_decode"
#define KVL_ROW_ROTATE_PROC "kvl_row_rotate"
#define KVL_ROWS_DOT_PROC "kvl_rows_dot"

typedef enum kvl_row {
    KVL_ROW_F16 = 0,
    KVL_ROW_Q8 = 1,     // ggml's q8_0: blocks of 32, 8.5 bits per value
    KVL_ROW_Q4 = 2,     // ggml's q4_0: blocks of 32, 4.5 bits
    KVL_ROW_KV3 = 3,    // blocks of 64, 3.25 bits: eight levels of a normal distribution
    KVL_ROW_KV2 = 4,    // blocks of 64, 2.25 bits: four levels
    KVL_ROW_TOKEN2 = 5, // blocks of 64, 2.375 bits: four steps of a range, an integer zero point
    // KIVI (arXiv 2402.02750) in 2 or 4 bits: steps of a range. Values in blocks of 32 or 64 channels of a slot, ...
    KVL_ROW_KIVI2_32 = 6,
    KVL_ROW_KIVI2_64 = 7,
    KVL_ROW_KIVI4_32 = 8,
    KVL_ROW_KIVI4_64 = 9,
    // ... keys in groups of 32 or 64 slots of a channel: these rows are written and read only as kvl_rows_* do
    KVL_ROW_KIVI2_32_K = 10,
    KVL_ROW_KIVI2_64_K = 11,
    KVL_ROW_KIVI4_32_K = 12,
    KVL_ROW_KIVI4_64_K = 13,
    KVL_ROW_OF_K = 14, // of V: nothing is stored, a value is the key of its slot (multi-head latent attention)
    KVL_ROW_COUNT = 15,
} kvl_row;

// kv3 and kv2 are for values that are about normal, such as rotated ones. Element i of a block has its two low bits
// in byte i % 16 of qs, at bit 2 * (i / 16), and its third in byte i % 8 of qh, at bit i / 8. The scale keeps the norm
// of the block: d^2 * (sum of the squared levels) = sum of the squared values.
struct kvl_block_kv2 {
    uint16_t d; // f16
    uint8_t qs[16];
};
struct kvl_block_kv3 {
    uint16_t d; // f16
    uint8_t qs[16];
    uint8_t qh[8];
};

// token2: a block is {f16 scale, int8 zero point, codes}, a value scale * (code - zero point).
// kivi: a block of values is {f16 scale, f16 zero, codes}, a group of keys {f16 scale[d], f16 zero[d], codes of slot 0,
// codes of slot 1, ...}; a value is code * scale + zero.
// Codes of b bits are packed in runs of 32. Element i of a run is in byte i % (4b), at bit b * (i / 4b).

static inline int kvl_row_is_kivi(kvl_row row) {
    return row >= KVL_ROW_KIVI2_32 && row <= KVL_ROW_KIVI4_64_K;
}
static inline int kvl_kivi_bits(kvl_row row) {
    return (row - KVL_ROW_KIVI2_32) & 2 ? 4 : 2;
}
static inline int kvl_kivi_group(kvl_row row) {
    return (row - KVL_ROW_KIVI2_32) & 1 ? 64 : 32;
}
static inline kvl_row kvl_kivi_row(int bits, int group, int keys) {
    return (kvl_row)((keys ? KVL_ROW_KIVI2_32_K : KVL_ROW_KIVI2_32) + (bits == 4 ? 2 : 0) + (group == 64 ? 1 : 0));
}

// Slots that are stored together, from a multiple of their number on: 1 unless they share scales.
static inline int kvl_row_slots(kvl_row row) {
    return kvl_row_is_kivi(row) && row >= KVL_ROW_KIVI2_32_K ? kvl_kivi_group(row) : 1;
}

// Values per block; a row's length is a multiple of it.
static inline int kvl_row_block(kvl_row row) {
    if (kvl_row_is_kivi(row)) {
        return row >= KVL_ROW_KIVI2_32_K ? 32 : kvl_kivi_group(row);
    }
    return row == KVL_ROW_F16 || row == KVL_ROW_OF_K ? 1 : row <= KVL_ROW_Q4 ? 32 : 64;
}

// Bytes of a row of d values, with its share of what a group has in common.
static inline size_t kvl_row_bytes(kvl_row row, int d) {
    const int block_bytes[KVL_ROW_KIVI2_32] = {2, 34, 18, 26, 18, 19};
    if (kvl_row_is_kivi(row)) {
        return (size_t)(4 * d / kvl_kivi_group(row) + d * kvl_kivi_bits(row) / 8);
    }
    if (row == KVL_ROW_OF_K) {
        return 0;
    }
    return (size_t)(d / kvl_row_block(row)) * (size_t)block_bytes[row];
}

// n rows x[n][d]; n is a multiple of kvl_row_slots().
typedef void (*kvl_rows_encode_t)(kvl_row row, const float * x, int n, int d, void * out);
// Rows [first, first + n) of those that begin at in, a group; out[n][ld].
typedef void (*kvl_rows_decode_t)(kvl_row row, const void * in, int first, int n, int d, float * out, int ld);

// In place: a row times the orthonormal Walsh-Hadamard matrix of the largest power of two that divides d, block by
// block. Its own inverse.
typedef void (*kvl_row_rotate_t)(float * x, int d);

// out[n]: the dot products of f16 rows[n][d] and x[d], added up in f32.
typedef void (*kvl_rows_dot_t)(const uint16_t * rows, int64_t n, int d, const float * x, float * out);

// One row that shares nothing with others, and back.
void kvl_row_encode(kvl_row row, const float * x, int d, void * out);
void kvl_row_decode(kvl_row row, const void * in, int d, float * out);
// One value after the other, in plain loops: what kvl_row_decode must equal bit for bit in any instructions.
void kvl_row_decode_ref(kvl_row row, const void * in, int d, float * out);
void kvl_row_rotate(float * x, int d);
void kvl_rows_dot(const uint16_t * rows, int64_t n, int d, const float * x, float * out);
void kvl_rows_encode(kvl_row row, const float * x, int n, int d, void * out);
void kvl_rows_decode(kvl_row row, const void * in, int first, int n, int d, float * out, int ld);

#ifdef __cplusplus
}
#endif
