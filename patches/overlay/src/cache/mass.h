// What slots received, in pages of [query heads of a group][32]: every page of every sequence has one of its own, since
// sequences that share a page give its slots different attention.

#pragma once

#include "cache/region.h"

#include <cstdint>
#include <memory>
#include <vector>

class kvl_mass_pages {
  public:
    // group: most query heads of a KV head; n_pages: pages at first, there may be more
    kvl_mass_pages(ggml_backend_buffer_type_t buft, uint32_t group, uint32_t n_pages, bool no_alloc)
        : buft(buft), group(group), n_first(n_pages), no_alloc(no_alloc) {}

    void prepare();  // for the first page
    uint32_t take(); // all zero; throws when there is no memory
    void drop(uint32_t page);

    // values of a query head in a page, from slot `first` on
    void read(uint32_t page, uint32_t g, uint32_t first, uint32_t n, float * out) const;
    void write(uint32_t page, uint32_t g, uint32_t first, uint32_t n, const float * values);
    void clear(uint32_t page, uint32_t first);

    // f32 [32 * group, pages], another one after every change of the version; nullptr before prepare()
    ggml_tensor * tensor() const { return t; }
    uint32_t version() const { return n_grown; }

  private:
    void grow();
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
