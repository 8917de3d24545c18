// Some slots of a head are kept: within the pages of each format they move together, and what is left over goes.

#include "cache/memory.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace {

// Pages [begin, end) of one format, and which of the given slots lie in them.
struct page_group {
    uint32_t format, begin, end;
    size_t first, n; // slots[first .. first + n)
};

std::vector<page_group> groups_of(const kvl_head & head, const std::vector<uint32_t> & slots) {
    std::vector<page_group> out;
    size_t first = 0;
    for (uint32_t p = 0; p < head.pages.size();) {
        const uint32_t format = kvl_head::page_format(head.pages[p]);
        page_group g = {format, p, p, first, 0};
        while (g.end < head.pages.size() && kvl_head::page_format(head.pages[g.end]) == format) {
            g.end++;
        }
        const auto last = std::lower_bound(slots.begin() + int64_t(first), slots.end(), g.end * KVL_PAGE_SLOTS);
        g.n = size_t(last - slots.begin()) - first;
        first += g.n;
        p = g.end;
        out.push_back(g);
    }
    return out;
}

// Whether some slot of the group's page q comes from elsewhere.
bool page_moves(const page_group & g, const std::vector<uint32_t> & slots, uint32_t q) {
    const size_t last = std::min(g.n, size_t(q + 1) * KVL_PAGE_SLOTS) - 1;
    return slots[g.first + last] != g.begin * KVL_PAGE_SLOTS + last;
}

// Takes over the groups of kivi pages that keep a slot, as they are: what is not kept becomes a hole, or already is
// one. Pages of the others are added to gone.
void keep_groups(const kvl_head & head, const page_group & g, const std::vector<uint32_t> & slots, kvl_pool & pool,
                 kvl_head & out, std::vector<std::pair<kvl_pool *, uint32_t>> & gone) {
    const uint32_t n = pool.n_together;
    for (uint32_t p = g.begin; p < g.end; p += n) {
        const auto first = std::lower_bound(slots.begin(), slots.end(), p * KVL_PAGE_SLOTS);
        const auto last = std::lower_bound(first, slots.end(), (p + n) * KVL_PAGE_SLOTS);
        if (first == last) {
            for (uint32_t i = p; i < p + n; i++) {
                gone.emplace_back(&pool, kvl_head::page_number(head.pages[i]));
            }
            continue;
        }
        const size_t begin = out.pos.size();
        const size_t end = begin + n * KVL_PAGE_SLOTS;
        out.pages.insert(out.pages.end(), head.pages.begin() + p, head.pages.begin() + p + n);
        out.n_holes += n * KVL_PAGE_SLOTS - uint32_t(last - first);
        out.pos.resize(end, kvl_head::HOLE);
        for (auto & mass : out.mass) {
            mass.resize(end, 0.0f);
        }
        for (auto slot = first; slot != last; slot++) {
            const size_t to = begin + (*slot - p * KVL_PAGE_SLOTS);
            out.pos[to] = head.pos[*slot];
            for (size_t m = 0; m < head.mass.size(); m++) {
                out.mass[m][to] = head.mass[m][*slot];
            }
        }
    }
}

} // namespace

void llama_kv_paged::count_copies(const kvl_layer & layer, const kvl_head & head, const std::vector<uint32_t> & slots,
                                  std::vector<uint32_t> & copies) const {
    for (const page_group & g : groups_of(head, slots)) {
        for (uint32_t q = 0; g.format != KVL_FORMAT_KIVI && q * KVL_PAGE_SLOTS < g.n; q++) {
            const uint32_t page = kvl_head::page_number(head.pages[g.begin + q]);
            copies[g.format] += page_moves(g, slots, q) && layer.pools[g.format]->shared(page) ? 1 : 0;
        }
    }
}

void llama_kv_paged::compact(kvl_layer & layer, kvl_head & head, const std::vector<uint32_t> & slots) {
    kvl_head out;
    out.mass.resize(head.mass.size());
    std::vector<std::pair<kvl_pool *, uint32_t>> gone;
    for (const page_group & g : groups_of(head, slots)) {
        kvl_pool & pool = *layer.pools[g.format];
        if (g.format == KVL_FORMAT_KIVI) {
            keep_groups(head, g, slots, pool, out, gone);
            continue;
        }
        const uint32_t n_pages = uint32_t((g.n + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS);
        // sources are never behind their destination, so pages can be rewritten in ascending order; a page that is
        // still shared is read from the old table after a new page has taken its place
        for (uint32_t q = 0; q < n_pages; q++) {
            uint32_t page = kvl_head::page_number(head.pages[g.begin + q]);
            if (page_moves(g, slots, q)) {
                if (pool.shared(page)) {
                    gone.emplace_back(&pool, page);
                    page = pool.take();
                }
                const size_t end = std::min(g.n, size_t(q + 1) * KVL_PAGE_SLOTS);
                for (size_t i = size_t(q) * KVL_PAGE_SLOTS; i < end;) {
                    // one move for a run of neighbours within one source page
                    const uint32_t from = slots[g.first + i];
                    uint32_t run = 1;
                    while (i + run < end && slots[g.first + i + run] == from + run &&
                           (from + run) / KVL_PAGE_SLOTS == from / KVL_PAGE_SLOTS) {
                        run++;
                    }
                    const uint64_t to = uint64_t(page) * KVL_PAGE_SLOTS + i % KVL_PAGE_SLOTS;
                    if (head.row(from) != to) {
                        pool.move_rows(to, head.row(from), run);
                    }
                    i += run;
                }
            }
            out.pages.push_back(kvl_head::page_entry(g.format, page));
        }
        for (uint32_t p = g.begin + n_pages; p < g.end; p++) {
            gone.emplace_back(&pool, kvl_head::page_number(head.pages[p]));
        }
        for (size_t i = 0; i < g.n; i++) {
            const uint32_t slot = slots[g.first + i];
            out.pos.push_back(head.pos[slot]);
            for (size_t m = 0; m < head.mass.size(); m++) {
                out.mass[m].push_back(head.mass[m][slot]);
            }
        }
        if (g.format != KVL_FORMAT_F16) {
            const size_t full = size_t(out.pages.size()) * KVL_PAGE_SLOTS;
            out.n_holes += uint32_t(full - out.pos.size());
            out.pos.resize(full, kvl_head::HOLE);
            for (auto & mass : out.mass) {
                mass.resize(full, 0.0f);
            }
        }
    }
    note_peak();
    for (const auto & [pool, page] : gone) {
        pool->drop(page);
    }
    for (uint32_t p = 0; p < out.pages.size(); p++) {
        out.live.push_back(out.all_live(p));
    }
    head = std::move(out);
    note_held(layer, head);
}
