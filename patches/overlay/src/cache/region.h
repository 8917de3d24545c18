// Memory for tensors of the cache.

#pragma once

#include "ggml-cpp.h"

#include <cstddef>

// On the CPU an address range that the system commits on first touch and takes back page by page; elsewhere a plain
// buffer of the device. With no_alloc, as llama.cpp means it: an empty buffer, and tensors that have no data.
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

    bool is_host() const { return host; }

    static size_t os_page_size();

  private:
    void * base = nullptr; // mapped range, nullptr for a plain buffer
    size_t mapped = 0;
    bool host = false;
    bool no_alloc = false;
    ggml_backend_buffer_ptr buf;
};
