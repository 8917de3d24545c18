// A sequence as it is saved: in which order its pages are, and what must hold of what is read.

#pragma once

#include "cache/memory.h"

#include <algorithm>
#include <string>
#include <vector>

// A page of a sequence: its entry in the page table, where it lies, and its rank among the pages of its group.
struct kvl_state_page {
    uint32_t * entry;
    kvl_pool * pool;
    size_t order; // of the pool, among those of the group
    uint32_t rank;

    uint32_t number() const { return kvl_head::page_number(*entry); }
};

// All pages of a shape of heads and a format, on whatever devices they lie.
struct kvl_state_group {
    std::vector<kvl_pool *> pools; // {nullptr}: this format is not there
    std::vector<kvl_state_page> pages;
};

// The pages of a sequence by group, in an order that depends on the model only. Ranks are not set.
std::vector<kvl_state_group> kvl_groups_of(const llama_kv_paged & kv, kvl_sequence & seq);
// Sorts them by where they lie and ranks them so: neighbours are written and read together.
void kvl_rank(std::vector<kvl_state_group> & groups);
// Sorts them by their ranks, read from elsewhere: whether each is there once, and pages that share scales lie together.
bool kvl_ranks_fit(std::vector<kvl_state_group> & groups);
// Empty, or what is wrong with a head that claims to have seen n_seen tokens. What the checks let through keeps the
// invariants of kvl_head, whoever wrote it.
std::string kvl_fault_of(const kvl_layer & layer, kvl_head & head, llama_pos n_seen);

// f(tensor, offset in it, bytes) for runs of neighbours, at most some MiB each; units are whole.
template <typename F> void for_runs(const std::vector<kvl_state_group> & groups, F && f) {
    for (const kvl_state_group & g : groups) {
        for (size_t i = 0; i < g.pages.size();) {
            const size_t first = i;
            const kvl_pool & pool = *g.pages[first].pool;
            const size_t most = first + std::max<size_t>((size_t(4) << 20) / pool.unit_bytes(), 1) * pool.n_together;
            while (i < std::min(most, g.pages.size()) && g.pages[i].pool == &pool &&
                   g.pages[i].number() == g.pages[first].number() + (i - first)) {
                i++;
            }
            f(pool.pages, pool.base() + g.pages[first].number() * pool.page_bytes(), (i - first) * pool.page_bytes());
        }
    }
}
