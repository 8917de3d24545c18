// Memory that the system commits on first touch.

#include "cache/region.h"

#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#define KVL_HAVE_MMAP
#include <sys/mman.h>
#include <unistd.h>
#endif

size_t kvl_region::os_page_size() {
#ifdef KVL_HAVE_MMAP
    static const size_t size = size_t(sysconf(_SC_PAGESIZE));
    return size;
#else
    return 4096;
#endif
}

kvl_region::kvl_region(ggml_backend_buffer_type_t buft, size_t size, bool no_alloc)
    : host(ggml_backend_buft_is_host(buft)), no_alloc(no_alloc) {
    if (no_alloc) {
        buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        return;
    }
#ifdef KVL_HAVE_MMAP
    if (host) {
        mapped = size + os_page_size();
        void * p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            throw std::runtime_error("cannot reserve " + std::to_string(mapped >> 20) +
                                     " MiB of address space for the KV cache; use a smaller context (-c)");
        }
        base = p;
        buf.reset(ggml_backend_cpu_buffer_from_ptr(base, mapped));
        return;
    }
#endif
    buf.reset(ggml_backend_buft_alloc_buffer(buft, size));
    if (!buf) {
        throw std::runtime_error("cannot allocate " + std::to_string(size >> 20) + " MiB on " +
                                 ggml_backend_buft_name(buft) + " for the KV cache; use a smaller context (-c)");
    }
    ggml_backend_buffer_clear(buf.get(), 0);
}

kvl_region::~kvl_region() {
    buf.reset();
#ifdef KVL_HAVE_MMAP
    if (base) {
        munmap(base, mapped);
    }
#endif
}

bool kvl_region::place(ggml_tensor * t, size_t offset) {
    if (no_alloc) {
        t->buffer = buf.get(); // the scheduler then does not ask for memory
        return true;
    }
    char * addr = static_cast<char *>(ggml_backend_buffer_get_base(buf.get())) + offset;
    return ggml_backend_tensor_alloc(buf.get(), t, addr) == GGML_STATUS_SUCCESS;
}

void kvl_region::give_back(size_t begin, size_t end) {
#ifdef KVL_HAVE_MMAP
    if (!base) {
        return;
    }
    const size_t page = os_page_size();
    const size_t lo = (begin + page - 1) / page * page;
    const size_t hi = end / page * page;
    if (hi > lo) {
#ifdef __APPLE__
        // MADV_FREE leaves them in the resident size of the process until memory runs short
        madvise(static_cast<char *>(base) + lo, hi - lo, MADV_FREE_REUSABLE);
#else
        madvise(static_cast<char *>(base) + lo, hi - lo, MADV_DONTNEED);
#endif
    }
#else
    (void)begin;
    (void)end;
#endif
}

void kvl_region::take_again(size_t begin, size_t end) {
#ifdef __APPLE__
    if (base) { // what was reusable counts again
        const size_t lo = begin / os_page_size() * os_page_size();
        madvise(static_cast<char *>(base) + lo, std::min(end, mapped) - lo, MADV_FREE_REUSE);
    }
#else
    (void)begin;
    (void)end;
#endif
}
