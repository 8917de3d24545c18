// The order of a saved sequence's pages, and the checks of what is read.

#include "cache/saved.h"

std::vector<kvl_state_group> kvl_groups_of(const llama_kv_paged & kv, kvl_sequence & seq) {
    std::vector<kvl_state_group> out;
    for (size_t l = 0; l < kv.layers.size(); l++) {
        const std::vector<kvl_pool *> & pools = kv.layers[l].pools;
        auto first = std::find_if(out.begin(), out.end(), [&](const kvl_state_group & g) {
            return g.pools[0] && g.pools[0]->d_k == pools[KVL_FORMAT_F16]->d_k &&
                   g.pools[0]->d_v == pools[KVL_FORMAT_F16]->d_v;
        });
        if (first == out.end()) {
            const size_t at = out.size();
            out.resize(at + pools.size());
            first = out.begin() + int64_t(at);
        }
        for (size_t f = 0; f < pools.size(); f++) {
            std::vector<kvl_pool *> & known = first[int64_t(f)].pools;
            if (std::find(known.begin(), known.end(), pools[f]) == known.end()) {
                known.push_back(pools[f]);
            }
        }
        for (kvl_head & head : seq.heads[l]) {
            for (uint32_t & entry : head.pages) {
                const uint32_t format = kvl_head::page_format(entry);
                kvl_state_group & g = first[format];
                const auto pool = std::find(g.pools.begin(), g.pools.end(), pools[format]);
                g.pages.push_back({&entry, *pool, size_t(pool - g.pools.begin()), 0});
            }
        }
    }
    return out;
}

void kvl_rank(std::vector<kvl_state_group> & groups) {
    for (kvl_state_group & g : groups) {
        std::sort(g.pages.begin(), g.pages.end(), [](const kvl_state_page & a, const kvl_state_page & b) {
            return a.order != b.order ? a.order < b.order : a.number() < b.number();
        });
        for (size_t i = 0; i < g.pages.size(); i++) {
            g.pages[i].rank = uint32_t(i);
        }
    }
}

bool kvl_ranks_fit(std::vector<kvl_state_group> & groups) {
    for (kvl_state_group & g : groups) {
        const uint32_t n = g.pages.empty() ? 1 : g.pages[0].pool->n_together;
        for (size_t i = 0; i < g.pages.size(); i += n) {
            for (uint32_t j = 0; j < n; j++) { // they come one after the other
                if (g.pages[i + j].rank != g.pages[i].rank + j || g.pages[i].rank % n != 0) {
                    return false;
                }
            }
        }
        std::sort(g.pages.begin(), g.pages.end(), [](const kvl_state_page & a, const kvl_state_page & b) {
            return a.rank < b.rank;
        });
        for (size_t i = 0; i < g.pages.size(); i++) {
            if (g.pages[i].rank != i) {
                return false;
            }
        }
    }
    return true;
}

// Which holes a page may have: none but at the end of its format, and in kivi any.
static bool holes_allowed(const kvl_head & head, uint32_t p) {
    const uint32_t format = kvl_head::page_format(head.pages[p]);
    if (format == KVL_FORMAT_KIVI) {
        return true;
    }
    const uint32_t n = std::min(head.n() - p * KVL_PAGE_SLOTS, uint32_t(KVL_PAGE_SLOTS));
    const auto begin = head.pos.begin() + p * KVL_PAGE_SLOTS;
    const auto hole = std::find(begin, begin + n, kvl_head::HOLE);
    const bool last = p + 1 == head.pages.size() || kvl_head::page_format(head.pages[p + 1]) != format;
    const bool rest = std::all_of(hole, begin + n, [](llama_pos pos) {
        return pos == kvl_head::HOLE;
    });
    return hole == begin + n || (last && format != KVL_FORMAT_F16 && hole != begin && rest);
}

std::string kvl_fault_of(const kvl_layer & layer, kvl_head & head, llama_pos n_seen) {
    if (head.pages.size() != (size_t(head.n()) + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS) {
        return "it has " + std::to_string(head.pages.size()) + " pages for " + std::to_string(head.n()) + " slots";
    }
    if (head.n() % KVL_PAGE_SLOTS != 0 && kvl_head::page_format(head.pages.back()) != KVL_FORMAT_F16) {
        return "its last page is not f16, and not whole";
    }
    std::vector<uint32_t> n_pages(KVL_FORMAT_COUNT, 0);
    for (size_t p = 0; p < head.pages.size(); p++) {
        const uint32_t format = kvl_head::page_format(head.pages[p]);
        if (format >= KVL_FORMAT_COUNT || !layer.pools[format]) {
            return "page format " + std::to_string(format) + " is not one of this context's";
        }
        if (p > 0 && format > kvl_head::page_format(head.pages[p - 1])) {
            return "its pages are not in the order of their formats";
        }
        n_pages[format]++;
    }
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        if (n_pages[f] > 0 && n_pages[f] % layer.pools[f]->n_together != 0) {
            return "a group of kivi lacks a page";
        }
    }
    std::vector<llama_pos> held;
    for (const llama_pos pos : head.pos) {
        if (pos < kvl_head::HOLE || pos >= n_seen) {
            return "position " + std::to_string(pos) + " is not below " + std::to_string(n_seen);
        }
        if (pos != kvl_head::HOLE) {
            held.push_back(pos);
        }
    }
    head.n_holes = head.n() - uint32_t(held.size());
    const auto f16 = head.pos.begin() + head.f16_begin();
    std::sort(held.begin(), held.end());
    if (!std::is_sorted(f16, head.pos.end()) || std::adjacent_find(held.begin(), held.end()) != held.end()) {
        return "its positions are not in order";
    }
    for (uint32_t p = 0; p < head.pages.size(); p++) {
        if ((head.live[p] & ~head.all_live(p)) != 0 || !holes_allowed(head, p)) {
            return "page " + std::to_string(p) + " has holes where none can be";
        }
    }
    const uint32_t together = n_pages[KVL_FORMAT_KIVI] > 0 ? layer.pools[KVL_FORMAT_KIVI]->n_together : 1;
    for (uint32_t p = 0, n_held = 0; p < head.pages.size(); p++) {
        n_held += head.in_page(p);
        const bool kivi = kvl_head::page_format(head.pages[p]) == KVL_FORMAT_KIVI;
        const uint32_t first = n_pages[KVL_FORMAT_TOKEN2]; // only these come before
        if (kivi && (p - first + 1) % together == 0 && n_held == 0) {
            return "a group of kivi holds nothing";
        }
        n_held = kivi && (p - first + 1) % together != 0 ? n_held : 0;
    }
    if (!layer.open()) {
        bool whole = head.pos.empty() ? n_seen == 0 : head.pos.back() == n_seen - 1;
        whole = whole && (head.pos.empty() || head.pos.front() <= layer.first_seen(n_seen));
        for (size_t i = 1; i < head.pos.size(); i++) {
            whole = whole && head.pos[i] == head.pos[i - 1] + 1;
        }
        if (!whole || head.n_holes > 0) {
            return "it does not hold its sliding window";
        }
    }
    // rows for slots to come are seen
    if (head.n() % KVL_PAGE_SLOTS != 0) {
        head.live.back() |= UINT32_MAX << head.n() % KVL_PAGE_SLOTS;
    }
    head.count_listed();
    return "";
}
