// What slots received, in pages of [query heads of a group][32]: every page of every sequence has one of its own, since
// sequences that share a page give its slots different attention.

#pragma once

#include "cache/region.h"
#include "kvl-attn.h"

#include <cstdint>
#include <memory>
#include <vector>

class kvl_mass_pages {
  public:
    // group: most query heads of a KV head; n_pages: pages at first, there may be more
    kvl_mass_pages(ggml_backend_buffer_type_t buft, uint32_t group, uint32_t n_pages, bool no_alloc)
        : buft(buft), group(group), n_first(n_pages), no_alloc(no_alloc) {}

    // room for n more pages, so that the next n calls of take() cannot fail; throws when there is no memory
    void reserve(uint64_t n);
    uint32_t take(); // all zero
    void drop(uint32_t page);
    // give memory back once no page is taken
    void trim();
    // forget everything
    void clear();

    uint64_t allocated_bytes() const { return (n_used - free.size()) * page_bytes(); }

    // values of a query head in a page, from slot `first` on
    void read(uint32_t page, uint32_t g, uint32_t first, uint32_t n, float * out) const;
    void write(uint32_t page, uint32_t g, uint32_t first, uint32_t n, const float * values);
    void clear(uint32_t page, uint32_t first);

    // f32 [32 * group, pages], another one after every change of the version; nullptr before reserve()
    ggml_tensor * tensor() const { return t; }
    size_t page_bytes() const { return size_t(KVL_PAGE_SLOTS) * group * sizeof(float); }
    uint32_t version() const { return n_grown; }

  private:
    void grow(uint32_t n);
    size_t at(uint32_t page, uint32_t g, uint32_t first) const;

    ggml_backend_buffer_type_t buft;
    uint32_t group;
    uint32_t n_first;
    bool no_alloc;
    uint32_t n_grown = 0;
    uint32_t n_pages = 0;
    uint32_t n_used = 0; // pages below were taken once
    std::vector<uint32_t> free;
    ggml_context_ptr ctx;
    std::unique_ptr<kvl_region> mem;
    ggml_tensor * t = nullptr;
};
