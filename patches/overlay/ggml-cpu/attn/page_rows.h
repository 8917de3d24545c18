// Rows of a page as the kernels for few queries read them: a vector at a time, straight from how they are stored.

#pragma once

#include "attn/streams.h"
#include "rows/decode.h"

namespace kvl {

// Rows of floats. at(j, c) opens STEP values of row j, whose vectors get(0), get(VF_N), ... gives.
struct f32_rows {
    static constexpr int STEP = VF_N;
    const float * x;
    int d;

    struct part {
        vf x;
        vf get(int) const { return x; }
    };
    part at(int j, int c) const { return {vf_load(x + j * d + c)}; }
    float one(int j, int c) const { return x[j * d + c]; }
    f32_rows from(int j) const { return {x + j * d, d}; }
};

struct f16_rows {
    static constexpr int STEP = VF_N;
    const ggml_fp16_t * x;
    int d;

    f32_rows::part at(int j, int c) const { return {vf_load_f16(x + j * d + c)}; }
    float one(int j, int c) const { return vf_half(x + j * d + c); }
    f16_rows from(int j) const { return {x + j * d, d}; }
};

// Lines of a later page, asked for little by little while this one is worked on: pages lie apart, so the hardware
// cannot guess them, and a whole page asked for at once would hold up the loads of this one.
struct rows_ahead {
    const char * data;
    int row_bytes;

    explicit rows_ahead(const page_rows & rows)
        : data(rows.data + rows.first * kvl_row_bytes(rows.row, rows.d)),
          row_bytes(int(kvl_row_bytes(rows.row, rows.d))) {}
    // lines that begin in rows j .. j+n-1, and the one in which row 0 does
    void prefetch(int j, int n) const {
        const uintptr_t begin = uintptr_t(data) + uintptr_t(j * row_bytes);
        const uintptr_t end = begin + uintptr_t(n * row_bytes);
        for (uintptr_t line = (j ? begin + 63 : begin) & ~uintptr_t(63); line < end; line += 64) {
            __builtin_prefetch(reinterpret_cast<const void *>(line));
        }
    }
    rows_ahead from(int j) const {
        rows_ahead out = *this;
        out.data += j * row_bytes;
        return out;
    }
};

#if VF_N >= 8

// Rows of blocks that share nothing with others.
template <typename Block> struct block_rows {
    static constexpr int STEP = fast::reader<Block>::SIZE;
    const Block * x;
    int n; // blocks of a row

    explicit block_rows(const page_rows & rows)
        : x(reinterpret_cast<const Block *>(rows.data) + rows.first * rows.d / STEP), n(rows.d / STEP) {}
    fast::reader<Block> at(int j, int c) const { return fast::reader<Block>::of(x[j * n + c / STEP]); }
    block_rows from(int j) const {
        block_rows out = *this;
        out.x += j * n;
        return out;
    }
};

// kivi's values: scale and zero point per slot and group of channels.
template <int BITS> struct kivi_values {
    static constexpr int STEP = 32;
    const uint8_t * x;
    int row_bytes, group;

    explicit kivi_values(const page_rows & rows)
        : row_bytes(int(kvl_row_bytes(rows.row, rows.d))), group(kvl_kivi_group(rows.row)) {
        x = reinterpret_cast<const uint8_t *>(rows.data) + rows.first * row_bytes;
    }

    struct part {
        fast::run_codes<BITS> codes;
        vf scale, zero;
        vf get(int c) const { return vf_fma(codes.get(c), scale, zero); }
    };
    // the run that c lies in: get() counts from its beginning
    part at(int j, int c) const {
        const uint8_t * block = x + j * row_bytes + c / group * (4 + group * BITS / 8);
        return {fast::run_codes<BITS>::of(block + 4 + c % group / STEP * (STEP * BITS / 8)), vf_set(vf_half(block)),
                vf_set(vf_half(block + 2))};
    }
};

// kivi's keys: scale and zero point per channel and group of slots.
template <int BITS> struct kivi_keys {
    static constexpr int STEP = 32;
    const uint8_t * scale;
    const uint8_t * zero;
    const uint8_t * codes;
    int row_bytes;

    explicit kivi_keys(const page_rows & rows)
        : scale(reinterpret_cast<const uint8_t *>(rows.data)), zero(scale + 2 * rows.d), row_bytes(rows.d * BITS / 8) {
        codes = zero + 2 * rows.d + rows.first * row_bytes;
    }

    struct part {
        fast::run_codes<BITS> codes;
        const uint8_t * scale;
        const uint8_t * zero;
        vf get(int c) const { return vf_fma(codes.get(c), vf_load_f16(scale + 2 * c), vf_load_f16(zero + 2 * c)); }
    };
    part at(int j, int c) const {
        return {fast::run_codes<BITS>::of(codes + j * row_bytes + c * BITS / 8), scale + 2 * c, zero + 2 * c};
    }
    kivi_keys from(int j) const {
        kivi_keys out = *this;
        out.codes += j * row_bytes;
        return out;
    }
};

#endif

} // namespace kvl
