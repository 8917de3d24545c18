// Pages of one format: 32 slots of one KV head, K [32, d_k], then V [32, d_v].

#pragma once

#include "cache/region.h"
#include "kvl-attn.h"
#include "kvl.h"

#include <cstdint>
#include <vector>

// Slots that move: rows are 32 * page + slot, neither side crosses a page.
struct kvl_row_move {
    uint64_t to, from;
    uint32_t n;
};

class kvl_pool {
  public:
    static constexpr uint32_t NONE = UINT32_MAX;

    kvl_pool(uint32_t d_k, uint32_t d_v, uint32_t n_pages, kvl_row k_row, kvl_row v_row);

    // where its pages lie: in `tensor`, which lies at the beginning of `mem`, from byte `at` on, a multiple of
    // KVL_POOL_ALIGNMENT
    void place(kvl_region & mem, ggml_tensor * tensor, size_t at);

    // n_together lowest free pages with one owner, by the first of them; NONE when the pool is exhausted
    uint32_t take();
    void share(uint32_t page) { refs[page]++; }
    void drop(uint32_t page);
    bool shared(uint32_t page) const { return refs[page] > 1; }
    // what an owner of a page holds in it, a bit per slot: exact while it has no other owner, else what all have held
    void hold(uint32_t page, uint32_t bits);
    // a page that is shared may hold less than is counted: forget() what pages hold and count what every owner holds
    bool stale() const { return is_stale; }
    void forget();
    void count(uint32_t page, uint32_t bits);
    // a private copy of the first n slots of a shared page, once `moves` have been done; the caller's reference goes to
    // the copy. Not of groups: nobody writes to them
    uint32_t unshare(uint32_t page, uint32_t n, std::vector<kvl_row_move> & moves);

    // give dropped pages back to the operating system
    void trim();

    uint32_t size() const { return n_pages; }
    uint32_t n_free() const { return n_pages - n_taken; }
    uint64_t allocated_bytes() const { return n_taken * page_bytes(); }
    uint64_t used_bytes() const { return n_held * slot_bytes(); }
    uint64_t reserved_bytes() const { return n_pages * page_bytes(); }
    size_t slot_bytes() const { return k_bytes + v_bytes; }
    size_t page_bytes() const { return KVL_PAGE_SLOTS * slot_bytes(); }
    size_t unit_bytes() const { return n_together * page_bytes(); }
    bool is_host() const { return mem->is_host(); }

    // bytes from the beginning of the tensor
    size_t base() const { return begin; }
    // as kvl-attn.h has it
    uint32_t base_ref() const { return uint32_t(begin / KVL_POOL_ALIGNMENT); }
    size_t unit_at(uint32_t page) const { return begin + page / n_together * unit_bytes(); }
    size_t k_at(uint64_t row) const { return unit_of(row) + row % unit_slots() * k_bytes; }
    size_t v_at(uint64_t row) const {
        return v_row == KVL_ROW_OF_K ? k_at(row) : unit_of(row) + unit_slots() * k_bytes + row % unit_slots() * v_bytes;
    }
    // the same in main memory
    char * host_at(size_t at) const { return static_cast<char *>(pages->data) + at; }

    // moves in main memory, one after the other
    void move_rows(const std::vector<kvl_row_move> & moves);

    const uint32_t d_k;
    const uint32_t d_v;
    const kvl_row k_row;
    const kvl_row v_row;
    const size_t k_bytes; // of a row
    const size_t v_bytes;
    // pages of one kivi group (else 1): a unit, taken, shared and dropped together; the first page number is a multiple
    // of it
    const uint32_t n_together;

    ggml_tensor * pages = nullptr; // i8: the tensor of all pools of a shape

  private:
    uint64_t unit_slots() const { return uint64_t(n_together) * KVL_PAGE_SLOTS; }
    size_t unit_of(uint64_t row) const { return begin + row / unit_slots() * unit_bytes(); }

    uint32_t n_pages;
    uint32_t n_taken = 0;
    uint32_t hint = 0; // no free page below this one
    size_t begin = 0;
    kvl_region * mem = nullptr;

    std::vector<uint32_t> refs;
    std::vector<uint32_t> held; // bits per page: slots in use
    uint64_t n_held = 0;
    bool is_stale = false;
    std::vector<uint32_t> dropped; // pages to give back in trim()
};
