// How a slot's key or value is stored: row formats of pages, what libllama and a backend agree on.

#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ROW_ENCODE_PROC "kvl_row_encode"
#define KVL_ROW_DECODE_PROC "kvl_row_decode"
#define KVL_ROW_ROTATE_PROC "kvl_row_rotate"

typedef enum kvl_row {
    KVL_ROW_F16 = 0,
    KVL_ROW_Q8 = 1,  // ggml's q8_0: blocks of 32, 8.5 bits per value
    KVL_ROW_Q4 = 2,  // ggml's q4_0: blocks of 32, 4.5 bits
    KVL_ROW_KV3 = 3, // blocks of 64, 3.25 bits: eight levels of a normal distribution
    KVL_ROW_KV2 = 4, // blocks of 64, 2.25 bits: four levels
    KVL_ROW_COUNT = 5,
} kvl_row;

// The last two are for values that are about normal, such as rotated ones. Element i of a block has its two low bits
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

// Values per block; a row's length is a multiple of it.
static inline int kvl_row_block(kvl_row row) {
    return row == KVL_ROW_F16 ? 1 : row <= KVL_ROW_Q4 ? 32 : 64;
}

static inline size_t kvl_row_bytes(kvl_row row, int d) {
    const int block_bytes[KVL_ROW_COUNT] = {2, 34, 18, 26, 18};
    return (size_t)(d / kvl_row_block(row)) * (size_t)block_bytes[row];
}

// One row of d values, and back.
typedef void (*kvl_row_encode_t)(kvl_row row, const float * x, int d, void * out);
typedef void (*kvl_row_decode_t)(kvl_row row, const void * in, int d, float * out);

// In place: a row times the orthonormal Walsh-Hadamard matrix of the largest power of two that divides d, block by
// block. Its own inverse.
typedef void (*kvl_row_rotate_t)(float * x, int d);

void kvl_row_encode(kvl_row row, const float * x, int d, void * out);
void kvl_row_decode(kvl_row row, const void * in, int d, float * out);
// One value after the other, in plain loops: what kvl_row_decode must equal bit for bit in any instructions.
void kvl_row_decode_ref(kvl_row row, const void * in, int d, float * out);
void kvl_row_rotate(float * x, int d);

#ifdef __cplusplus
}
#endif
