// A sequence as it is saved: in which order its pages are, and what must hold of what is read.

#pragma once

#include "cache/memory.h"

#include <algorithm>
#include <string>
#include <vector>

// A page of a sequence: its entry in the page table, and its rank among the pages that the sequence has in that pool.
struct kvl_state_page {
    uint32_t * entry;
    uint32_t rank;

    uint32_t number() const { return kvl_head::page_number(*entry); }
};

struct kvl_state_pool {
    kvl_pool * pool;
    std::vector<kvl_state_page> pages;
};

// The pages of a sequence by pool, in an order that depends on the model only. Ranks are not set.
std::vector<kvl_state_pool> kvl_pools_of(const llama_kv_paged & kv, kvl_sequence & seq);
// Sorts them by where they lie and ranks them so: neighbours are written and read together.
void kvl_rank(std::vector<kvl_state_pool> & pools);
// Whether the ranks, read from elsewhere, are each there once, and groups lie together; sorts them by rank.
bool kvl_ranks_fit(std::vector<kvl_state_pool> & pools);
// Empty, or what is wrong with a head that claims to have seen n_seen tokens. What the checks let through keeps the
// invariants of kvl_head, whoever wrote it.
std::string kvl_fault_of(const kvl_layer & layer, kvl_head & head, llama_pos n_seen);

// f(tensor, offset in it, bytes) for runs of neighbours, at most some MiB each; units are whole.
template <typename F> void for_runs(const std::vector<kvl_state_pool> & pools, F && f) {
    for (const kvl_state_pool & p : pools) {
        for (size_t i = 0; i < p.pages.size();) {
            const size_t first = i;
            const size_t most =
                first + std::max<size_t>((size_t(4) << 20) / p.pool->unit_bytes(), 1) * p.pool->n_together;
            while (i < std::min(most, p.pages.size()) && p.pages[i].number() == p.pages[first].number() + (i - first)) {
                i++;
            }
            f(p.pool->pages, p.pool->base() + p.pages[first].number() * p.pool->page_bytes(),
              (i - first) * p.pool->page_bytes());
        }
    }
}
