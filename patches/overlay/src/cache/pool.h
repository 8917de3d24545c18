// Pages of one shape and format on one device: 32 slots of one KV head, K [32, d_k] and V [32, d_v].

#pragma once

#include "kvl-format.h"
#include "kvl.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

// Memory for one tensor set: on the CPU an address range that the system commits on first touch and takes back page by
// page; elsewhere a plain buffer of the device. With no_alloc, as llama.cpp means it: an empty buffer, and tensors that
// have no data.
class kvl_region {
  public:
    kvl_region(ggml_backend_buffer_type_t buft, size_t size, bool no_alloc);
    ~kvl_region();

    kvl_region(const kvl_region &) = delete;
    kvl_region & operator=(const kvl_region &) = delete;

    // place a tensor at an offset; returns false when the backend refuses
    bool place(ggml_tensor * t, size_t offset);
    // give [begin, end) back to the operating system; only whole system pages inside it go
    void give_back(size_t begin, size_t end);
    // [begin, end) is written to again
    void take_again(size_t begin, size_t end);

    ggml_backend_buffer_t buffer() const { return buf.get(); }
    bool is_host() const { return host; }

  private:
    void * base = nullptr; // mapped range, nullptr for a plain buffer
    size_t mapped = 0;
    bool host = false;
    bool no_alloc = false;
    ggml_backend_buffer_ptr buf;
};

class kvl_pool {
  public:
    static constexpr uint32_t NONE = UINT32_MAX;

    // no_alloc: pages are counted, but hold nothing
    kvl_pool(ggml_backend_buffer_type_t buft, uint32_t d_k, uint32_t d_v, uint32_t n_pages, kvl_row k_row = KVL_ROW_F16,
             kvl_row v_row = KVL_ROW_F16, bool no_alloc = false);

    bool matches(ggml_backend_buffer_type_t buft, uint32_t d_k, uint32_t d_v) const;

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
    // a private copy of the first n slots of a shared page; the caller's reference moves to the copy. Not of groups:
    // nobody writes to them
    uint32_t unshare(uint32_t page, uint32_t n);

    // give dropped pages back to the operating system
    void trim();

    uint32_t size() const { return n_pages; }
    uint32_t n_free() const { return n_pages - n_taken; }
    uint64_t allocated_bytes() const { return uint64_t(n_taken) * KVL_PAGE_SLOTS * slot_bytes(); }
    uint64_t used_bytes() const { return n_held * slot_bytes(); }
    uint64_t reserved_bytes() const { return uint64_t(n_pages) * KVL_PAGE_SLOTS * slot_bytes(); }
    uint64_t slot_bytes() const { return kvl_row_bytes(k_row, int(d_k)) + kvl_row_bytes(v_row, int(d_v)); }
    bool is_host() const { return k_mem.is_host(); }
    ggml_backend_buffer_type_t type() const { return buft; }

    // move slot rows within or between pages: dst and src are row numbers (page * 32 + slot)
    void move_rows(uint64_t dst, uint64_t src, uint32_t n);
    void read_rows(uint64_t row, uint32_t n, float * k_out, float * v_out) const;
    void write_keys(uint64_t row, uint32_t n, const float * keys);

    const uint32_t d_k;
    const uint32_t d_v;
    const kvl_row k_row;
    const kvl_row v_row;
    // pages of one kivi group (else 1): taken, shared and dropped together; the first page number is a multiple of it
    const uint32_t n_together;

    ggml_tensor * k = nullptr; // f16 [d_k, n_pages*32], or i8 [bytes of a row, n_pages*32]
    ggml_tensor * v = nullptr;

  private:
    ggml_backend_buffer_type_t buft;
    uint32_t n_pages;
    uint32_t n_taken = 0;
    uint32_t hint = 0; // no free page below this one

    std::vector<uint32_t> refs;
    std::vector<uint32_t> held; // bits per page: slots in use
    uint64_t n_held = 0;
    bool is_stale = false;
    std::vector<uint32_t> dropped; // pages to give back in trim()

    ggml_context_ptr ctx;
    kvl_region k_mem;
    kvl_region v_mem;
};
