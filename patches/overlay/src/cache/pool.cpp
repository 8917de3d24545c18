// Memory that the system commits on first touch, and the pages in it.

#include "cache/pool.h"

#include "ggml-backend.h"

#include <algorithm>
#include <bitset>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#define KVL_HAVE_MMAP
#include <sys/mman.h>
#include <unistd.h>
#endif

//
// kvl_region
//

static size_t os_page_size() {
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

//
// kvl_pool
//

kvl_pool::kvl_pool(ggml_backend_buffer_type_t buft, uint32_t d_k, uint32_t d_v, uint32_t n_pages, kvl_row k_row,
                   kvl_row v_row, bool no_alloc)
    : d_k(d_k), d_v(d_v), k_row(k_row), v_row(v_row),
      n_together(std::max<uint32_t>(uint32_t(kvl_row_slots(k_row)) / KVL_PAGE_SLOTS, 1)), buft(buft),
      n_pages((n_pages + n_together - 1) / n_together * n_together), refs(this->n_pages, 0), held(this->n_pages, 0),
      k_mem(buft, size_t(this->n_pages) * KVL_PAGE_SLOTS * kvl_row_bytes(k_row, int(d_k)), no_alloc),
      v_mem(buft, size_t(this->n_pages) * KVL_PAGE_SLOTS * kvl_row_bytes(v_row, int(d_v)), no_alloc) {
    ggml_init_params params = {2 * ggml_tensor_overhead(), nullptr, true};
    ctx.reset(ggml_init(params));
    if (!ctx) {
        throw std::bad_alloc();
    }
    const int64_t n_rows = int64_t(this->n_pages) * KVL_PAGE_SLOTS;
    const auto rows = [&](kvl_row row, uint32_t d) {
        return row == KVL_ROW_F16
                   ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, d, n_rows)
                   : ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I8, int64_t(kvl_row_bytes(row, int(d))), n_rows);
    };
    k = rows(k_row, d_k);
    v = rows(v_row, d_v);
    ggml_set_name(k, "kvl_pool_k");
    ggml_set_name(v, "kvl_pool_v");
    if (!k_mem.place(k, 0) || !v_mem.place(v, 0)) {
        throw std::runtime_error("cannot place the KV pages in a buffer of " +
                                 std::string(ggml_backend_buft_name(buft)));
    }
}

bool kvl_pool::matches(ggml_backend_buffer_type_t b, uint32_t dk, uint32_t dv) const {
    return buft == b && d_k == dk && d_v == dv;
}

uint32_t kvl_pool::take() {
    const auto is_free = [&] {
        return std::all_of(refs.begin() + hint, refs.begin() + hint + n_together, [](uint32_t n) {
            return n == 0;
        });
    };
    while (hint < n_pages && !is_free()) {
        hint += n_together;
    }
    if (hint == n_pages) {
        return NONE;
    }
    const uint32_t page = hint;
    hint += n_together;
    std::fill_n(refs.begin() + page, n_together, 1);
    n_taken += n_together;
    for (const auto & [mem, t] : {std::pair<kvl_region *, ggml_tensor *>{&k_mem, k}, {&v_mem, v}}) {
        mem->take_again(page * KVL_PAGE_SLOTS * t->nb[1], (page + n_together) * KVL_PAGE_SLOTS * t->nb[1]);
    }
    return page;
}

void kvl_pool::drop(uint32_t page) {
    if (--refs[page] > 0) {
        is_stale = true; // what this owner alone held is gone
        return;
    }
    hold(page, 0);
    n_taken--;
    hint = std::min(hint, page / n_together * n_together);
    dropped.push_back(page);
}

static int64_t n_bits(uint32_t bits) {
    return int64_t(std::bitset<KVL_PAGE_SLOTS>(bits).count());
}

void kvl_pool::hold(uint32_t page, uint32_t bits) {
    const uint32_t all = shared(page) ? held[page] | bits : bits;
    is_stale = is_stale || all != bits;
    n_held += uint64_t(n_bits(all) - n_bits(held[page]));
    held[page] = all;
}

void kvl_pool::forget() {
    std::fill(held.begin(), held.end(), 0);
    n_held = 0;
    is_stale = false;
}

void kvl_pool::count(uint32_t page, uint32_t bits) {
    n_held += uint64_t(n_bits(held[page] | bits) - n_bits(held[page]));
    held[page] |= bits;
}

uint32_t kvl_pool::unshare(uint32_t page, uint32_t n) {
    const uint32_t copy = take();
    if (copy != NONE) {
        move_rows(uint64_t(copy) * KVL_PAGE_SLOTS, uint64_t(page) * KVL_PAGE_SLOTS, n);
        drop(page);
    }
    return copy;
}

void kvl_pool::trim() {
    if (k_mem.is_host()) {
        std::sort(dropped.begin(), dropped.end());
        const size_t k_page = KVL_PAGE_SLOTS * k->nb[1];
        const size_t v_page = KVL_PAGE_SLOTS * v->nb[1];
        // a system page may straddle two of ours: let a run grow over free neighbours so that it can go as well
        const uint32_t reach = uint32_t(os_page_size() / std::min(k_page, v_page)) + 1;
        for (size_t i = 0; i < dropped.size();) {
            uint32_t lo = dropped[i];
            if (refs[lo] != 0) {
                i++;
                continue;
            }
            uint32_t hi = lo + 1;
            for (i++; i < dropped.size() && (dropped[i] == hi || dropped[i] == hi - 1) && refs[dropped[i]] == 0; i++) {
                hi = dropped[i] + 1;
            }
            for (uint32_t r = 0; r < reach && lo > 0 && refs[lo - 1] == 0; r++) {
                lo--;
            }
            for (uint32_t r = 0; r < reach && hi < n_pages && refs[hi] == 0; r++) {
                hi++;
            }
            k_mem.give_back(lo * k_page, hi * k_page);
            v_mem.give_back(lo * v_page, hi * v_page);
        }
    }
    dropped.clear();
}

void kvl_pool::move_rows(uint64_t dst, uint64_t src, uint32_t n) {
    if (!k->data) {
        return; // no_alloc
    }
    std::vector<uint8_t> tmp;
    for (ggml_tensor * t : {k, v}) {
        const size_t row = t->nb[1];
        if (is_host()) {
            char * data = static_cast<char *>(t->data);
            memmove(data + dst * row, data + src * row, n * row);
        } else {
            tmp.resize(n * row);
            ggml_backend_tensor_get(t, tmp.data(), src * row, n * row);
            ggml_backend_tensor_set(t, tmp.data(), dst * row, n * row);
        }
    }
}

void kvl_pool::read_rows(uint64_t row, uint32_t n, float * k_out, float * v_out) const {
    std::vector<ggml_fp16_t> tmp;
    for (const auto & [t, out] : {std::pair<ggml_tensor *, float *>{k, k_out}, {v, v_out}}) {
        if (out) {
            tmp.resize(n * t->ne[0]);
            ggml_backend_tensor_get(t, tmp.data(), row * t->nb[1], n * t->nb[1]);
            ggml_fp16_to_fp32_row(tmp.data(), out, int64_t(tmp.size()));
        }
    }
}

void kvl_pool::write_keys(uint64_t row, uint32_t n, const float * keys) {
    std::vector<ggml_fp16_t> tmp(size_t(n) * d_k);
    ggml_fp32_to_fp16_row(keys, tmp.data(), int64_t(tmp.size()));
    ggml_backend_tensor_set(k, tmp.data(), row * k->nb[1], n * k->nb[1]);
}
