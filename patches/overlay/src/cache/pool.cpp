// Pages of one format: taking, sharing, counting, giving back.

#include "cache/pool.h"

#include <algorithm>
#include <bitset>
#include <cstring>

kvl_pool::kvl_pool(uint32_t d_k, uint32_t d_v, uint32_t n_pages, kvl_row k_row, kvl_row v_row)
    : d_k(d_k), d_v(d_v), k_row(k_row), v_row(v_row), k_bytes(kvl_row_bytes(k_row, int(d_k))),
      v_bytes(kvl_row_bytes(v_row, int(d_v))),
      n_together(std::max<uint32_t>(uint32_t(kvl_row_slots(k_row)) / KVL_PAGE_SLOTS, 1)),
      n_pages((n_pages + n_together - 1) / n_together * n_together), refs(this->n_pages, 0), held(this->n_pages, 0) {}

void kvl_pool::place(kvl_region & region, ggml_tensor * tensor, size_t at) {
    mem = &region;
    pages = tensor;
    begin = at;
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
    mem->take_again(unit_at(page), unit_at(page) + unit_bytes());
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

uint32_t kvl_pool::unshare(uint32_t page, uint32_t n, std::vector<kvl_row_move> & moves) {
    const uint32_t copy = take();
    if (copy != NONE) {
        moves.push_back({uint64_t(copy) * KVL_PAGE_SLOTS, uint64_t(page) * KVL_PAGE_SLOTS, n});
        drop(page);
    }
    return copy;
}

void kvl_pool::trim() {
    if (is_host()) {
        std::sort(dropped.begin(), dropped.end());
        // a system page may straddle two of ours: let a run grow over free neighbours so that it can go as well
        const uint32_t reach = uint32_t(kvl_region::os_page_size() / page_bytes()) + 1;
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
            mem->give_back(begin + lo * page_bytes(), begin + hi * page_bytes());
        }
    }
    dropped.clear();
}

void kvl_pool::move_rows(const std::vector<kvl_row_move> & moves) {
    for (const kvl_row_move & move : moves) {
        memmove(host_at(k_at(move.to)), host_at(k_at(move.from)), move.n * k_bytes);
        memmove(host_at(v_at(move.to)), host_at(v_at(move.from)), move.n * v_bytes);
    }
}
