// All pages of one shape of heads on one device, in one tensor, with what the kernels need to know beside them.

#pragma once

#include "cache/kernels.h"
#include "cache/mass.h"
#include "cache/pool.h"

#include <memory>
#include <vector>

struct kvl_shape {
    ggml_backend_buffer_type_t buft;
    uint32_t d_k, d_v;
    bool latent;      // values lie in the keys: multi-head latent attention
    uint32_t n_heads; // KV heads of all layers of this shape
    uint32_t group;   // most query heads of a KV head
    uint64_t n_pages; // that these heads can hold, of every format
    bool open;        // some of these layers are: their slots may be stored in other formats
    bool windows;     // some have a sliding window

    bool is(ggml_backend_buffer_type_t b, uint32_t k, uint32_t v) const { return buft == b && d_k == k && d_v == v; }
};

class kvl_arena {
  public:
    // pools: one per format, nullptr: not asked for; the first is f16
    kvl_arena(const kvl_shape & shape, uint32_t n_seqs, std::vector<std::unique_ptr<kvl_pool>> pools, bool portable,
              bool no_alloc);

    bool is_host() const { return mem.is_host(); }

    // of the device of the pages, for work outside the model's graph: made once, nullptr if it cannot be
    ggml_backend_t device_backend();

    // row of a key mean
    uint32_t mean_row(uint32_t seq, uint32_t head) const { return seq * shape.n_heads + head; }

    // first part of a slot's key in k_rows, and of its value in v_rows
    int32_t k_part(uint64_t row) const { return page_part(row) + int32_t(row % KVL_PAGE_SLOTS * k_parts); }
    int32_t v_part(uint64_t row) const { return page_part(row) + int32_t(row % KVL_PAGE_SLOTS * v_parts); }
    // parts of a slot that are stored
    uint32_t slot_parts() const { return k_parts + (shape.latent ? 0 : v_parts); }

    // Slots of the f16 pool, by row: read as f32 k[n][d_k], v[n][d_v] (or NULL), their keys written. Slots of any pool:
    // moved; no slot is written before it has been read. Where the pages lie on an accelerator this takes a graph per
    // 16,384 slots, however they lie. False with the error set.
    bool read(const std::vector<uint64_t> & rows, float * k, float * v);
    bool write_keys(const std::vector<uint64_t> & rows, const float * k);
    bool move(kvl_pool & pool, const std::vector<kvl_row_move> & moves);

    const kvl_shape shape;
    const kvl_kernels * const kernels; // nullptr: attention with stock operators, all pages are f16
    const std::vector<std::unique_ptr<kvl_pool>> pools;
    kvl_mass_pages mass;

    ggml_tensor * pages = nullptr; // i8 [bytes]
    ggml_tensor * means = nullptr; // f32 [d_k, n_seqs * n_heads]

    // The f16 pool for stock operators, in rows of row_size values: a key is k_parts of them, a value v_parts. v_rows
    // begins at the first value of page 0, or key where values lie in the keys.
    const uint32_t row_size, k_parts, v_parts;
    ggml_tensor * k_rows = nullptr;
    ggml_tensor * v_rows = nullptr;

  private:
    int32_t page_part(uint64_t row) const { return int32_t(row / KVL_PAGE_SLOTS * KVL_PAGE_SLOTS * slot_parts()); }
    std::vector<int32_t> parts(const std::vector<uint64_t> & rows, bool keys) const;
    // on an accelerator
    bool move_by_kernel(const kvl_pool & pool, const std::vector<kvl_row_move> & moves);
    bool move_by_stock(const std::vector<kvl_row_move> & moves); // of the f16 pool

    ggml_context_ptr ctx;
    kvl_region mem;
    kvl_region mean_mem;
    ggml_backend_ptr backend;
};
