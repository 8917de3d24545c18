// Some slots of a head are kept: within the pages of each format they move together, and what is left over goes.

#include "cache/memory.h"

#include <algorithm>
#include <stdexcept>
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
// one. Pages of the others go.
void keep_groups(const kvl_head & head, const page_group & g, const std::vector<uint32_t> & slots, kvl_pool & pool,
                 kvl_rebuilt & out, kvl_compaction & work) {
    const uint32_t n = pool.n_together;
    for (uint32_t p = g.begin; p < g.end; p += n) {
        const auto first = std::lower_bound(slots.begin(), slots.end(), p * KVL_PAGE_SLOTS);
        const auto last = std::lower_bound(first, slots.end(), (p + n) * KVL_PAGE_SLOTS);
        if (first == last) {
            for (uint32_t i = p; i < p + n; i++) {
                work.gone.emplace_back(&pool, kvl_head::page_number(head.pages[i]));
            }
            continue;
        }
        const size_t begin = out.from.size();
        out.pages.insert(out.pages.end(), head.pages.begin() + p, head.pages.begin() + p + n);
        out.from.resize(begin + n * KVL_PAGE_SLOTS, -1);
        for (auto slot = first; slot != last; slot++) {
            out.from[begin + (*slot - p * KVL_PAGE_SLOTS)] = int32_t(*slot);
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

kvl_rebuilt llama_kv_paged::compacted(const kvl_layer & layer, const kvl_head & head,
                                      const std::vector<uint32_t> & slots, kvl_compaction & work) const {
    kvl_rebuilt out;
    for (const page_group & g : groups_of(head, slots)) {
        kvl_pool & pool = *layer.pools[g.format];
        if (g.format == KVL_FORMAT_KIVI) {
            keep_groups(head, g, slots, pool, out, work);
            continue;
        }
        const uint32_t n_pages = uint32_t((g.n + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS);
        // sources are never behind their destination, so pages can be rewritten in ascending order; a page that is
        // still shared is read after a new page has taken its place
        for (uint32_t q = 0; q < n_pages; q++) {
            uint32_t page = kvl_head::page_number(head.pages[g.begin + q]);
            if (page_moves(g, slots, q)) {
                if (pool.shared(page)) {
                    work.gone.emplace_back(&pool, page);
                    work.taken.emplace_back(&pool, page); // what may throw comes before what is taken
                    page = work.taken.back().second = pool.take();
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
                        work.moves[g.format].push_back({to, head.row(from), run});
                    }
                    i += run;
                }
            }
            out.pages.push_back(kvl_head::page_entry(g.format, page));
        }
        for (uint32_t p = g.begin + n_pages; p < g.end; p++) {
            work.gone.emplace_back(&pool, kvl_head::page_number(head.pages[p]));
        }
        out.from.insert(out.from.end(), slots.begin() + int64_t(g.first), slots.begin() + int64_t(g.first + g.n));
        if (g.format != KVL_FORMAT_F16) {
            out.from.resize(out.pages.size() * KVL_PAGE_SLOTS, -1);
        }
    }
    return out;
}

void llama_kv_paged::carry_out(const kvl_layer & layer, kvl_compaction & work, uint64_t n_mass) {
    if (has_mass()) {
        layer.arena->mass.reserve(n_mass);
    }
    note_peak();
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        if (layer.pools[f] && !layer.arena->move(*layer.pools[f], work.moves[f])) {
            throw std::runtime_error(kvl_last_error());
        }
    }
    work.taken.clear();
    for (const auto & [pool, page] : work.gone) {
        pool->drop(page);
    }
}

kvl_renewed llama_kv_paged::renewed(const kvl_layer & layer, const kvl_head & head, kvl_rebuilt && rebuilt) const {
    kvl_renewed out;
    out.head.pages = std::move(rebuilt.pages);
    std::vector<uint32_t> seen;
    for (size_t i = 0; i < rebuilt.from.size(); i++) {
        const int32_t from = rebuilt.from[i];
        out.head.pos.push_back(from < 0 ? kvl_head::HOLE : head.pos[size_t(from)]);
        out.head.n_holes += from < 0 ? 1 : 0;
        if (from >= 0 && head.is_live(uint32_t(from))) {
            seen.push_back(uint32_t(i));
        }
    }
    out.head.see(seen);
    for (const std::vector<float> & row : read_mass(layer, head)) {
        std::vector<float> & moved = out.mass.emplace_back();
        for (const int32_t from : rebuilt.from) {
            moved.push_back(from < 0 ? 0.0f : row[size_t(from)]);
        }
    }
    out.head.mass.reserve(std::max(head.mass.size(), out.head.pages.size()));
    out.head.mass = head.mass;
    return out;
}

void llama_kv_paged::replace(const kvl_layer & layer, kvl_head & head, kvl_renewed && by) {
    head = std::move(by.head);
    write_mass(layer, head, by.mass);
    note_held(layer, head);
}

void llama_kv_paged::compact(llama_seq_id seq, uint32_t layer_id, const std::vector<std::vector<uint32_t>> & slots) {
    const kvl_layer & layer = layers[layer_id];
    kvl_compaction work;
    std::vector<kvl_renewed> heads;
    for (size_t h = 0; h < slots.size(); h++) {
        const kvl_head & head = seqs[seq].heads[layer_id][h];
        heads.push_back(renewed(layer, head, compacted(layer, head, slots[h], work)));
    }
    carry_out(layer, work, 0); // no head has more pages than before
    for (size_t h = 0; h < slots.size(); h++) {
        replace(layer, seqs[seq].heads[layer_id][h], std::move(heads[h]));
    }
}
