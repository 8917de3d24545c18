// New tokens: do they continue their sequences, are there pages for them, and which rows they get.

#include "cache/memory.h"

#include <algorithm>
#include <map>
#include <stdexcept>

bool kvl_positions_check::add(int32_t n_seq_id, const llama_seq_id * seq_id, llama_pos pos) {
    if (n_seq_id != 1 || !seq_id || !kv.valid_seq(seq_id[0])) {
        kvl_set_error("every token must belong to exactly one sequence below n_seq_max = " +
                      std::to_string(kv.seqs.size()) + "; use kvl_branch to share a prefix");
        return false;
    }
    const llama_pos n_seen = kv.seqs[seq_id[0]].n_seen;
    llama_pos & want = next[size_t(seq_id[0])];
    if (want < 0) {
        want = n_seen > 0 ? n_seen : pos; // a sequence may begin anywhere
    }
    if (pos != want || pos < 0) {
        kvl_set_error("position " + std::to_string(pos) + " does not continue sequence " + std::to_string(seq_id[0]) +
                      (pos < 0 ? ": it is negative" : ", whose next one is " + std::to_string(want)));
        return false;
    }
    if (pos >= KVL_POS_END) {
        kvl_set_error("position " + std::to_string(pos) + " of sequence " + std::to_string(seq_id[0]) +
                      " is not below " + std::to_string(KVL_POS_END));
        return false;
    }
    want++;
    return true;
}

// A page is needed for every 32 new slots of a head, and for a tail that is still shared with a branch.
uint32_t llama_kv_paged::pages_needed(const kvl_layer & layer, const kvl_head & head, uint32_t n) const {
    uint32_t need = kvl_pages_for(head.n() + n) - uint32_t(head.pages.size());
    if (n > 0 && head.n() % KVL_PAGE_SLOTS != 0 && layer.pool->shared(head.pages.back())) {
        need++;
    }
    return layer.open() ? need : std::min(need, window_pages(layer)); // more are given up on the way
}

bool llama_kv_paged::pages_fit(const std::vector<llama_ubatch> & ubatches) {
    std::map<llama_seq_id, uint32_t> n_new;
    for (const llama_ubatch & ub : ubatches) {
        for (uint32_t i = 0; i < ub.n_tokens; i++) {
            n_new[ub.seq_id[i][0]]++;
        }
    }
    std::map<const kvl_pool *, uint64_t> need;
    for (const auto & [seq, n] : n_new) {
        for (size_t l = 0; l < layers.size(); l++) {
            for (const kvl_head & head : seqs[seq].heads[l]) {
                need[layers[l].pool] += pages_needed(layers[l], head, n);
            }
        }
    }
    const auto lacks = [&](const auto & of_pool) {
        return of_pool.second > of_pool.first->n_free();
    };
    for (auto it = n_new.begin(); it != n_new.end() && std::any_of(need.begin(), need.end(), lacks); it++) {
        kvl_give_back(*this, it->first); // it can be recalled again
    }
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            kvl_set_error("the KV pool is full: the batch needs " + std::to_string(n) + " pages, " +
                          std::to_string(pool->n_free()) + " of " +
                          std::to_string(pool->reserved_bytes() / (KVL_PAGE_SLOTS * pool->slot_bytes())) +
                          " are free; use a larger context (-c), a smaller budget or --prefill chunked");
            return false;
        }
    }
    return true;
}

// Room for n more entries, so that they can be added without fail; grows as push_back would.
template <typename T> static void make_room(std::vector<T> & values, size_t n) {
    if (values.capacity() < values.size() + n) {
        values.reserve(std::max(values.size() + n, 2 * values.capacity()));
    }
}

bool llama_kv_paged::append(llama_seq_id seq_id, const llama_pos * pos, uint32_t n) {
    kvl_sequence & seq = seqs[seq_id];
    slide(seq_id);
    std::map<const kvl_pool *, uint64_t> need;
    std::map<kvl_arena *, uint64_t> n_mass;
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : seq.heads[l]) {
            need[layers[l].pool] += pages_needed(layers[l], head, n);
            n_mass[layers[l].arena] += has_mass(layers[l]) ? kvl_pages_for(head.n() + n) - head.pages.size() : 0;
        }
    }
    for (const auto & [pool, n_pages] : need) {
        if (n_pages > pool->n_free()) {
            return false;
        }
    }
    // what can fail comes first
    for (const auto & [arena, n_pages] : n_mass) {
        if (n_pages > 0) {
            arena->mass.reserve(n_pages);
        }
    }
    for (size_t l = 0; l < layers.size(); l++) {
        for (kvl_head & head : seq.heads[l]) {
            make_room(head.pos, n);
            const uint32_t n_pages = kvl_pages_for(head.n() + n) - uint32_t(head.pages.size());
            make_room(head.pages, n_pages);
            make_room(head.live, n_pages);
            make_room(head.mass, has_mass(layers[l]) ? n_pages : 0);
        }
    }
    if (!own_pages(seq_id, true)) {
        throw std::runtime_error(kvl_last_error());
    }
    for (uint32_t done = 0; done < n;) {
        // block by block over all heads: pages of one stretch of text lie together, so what eviction frees is
        // contiguous
        uint32_t step = n - done;
        for (size_t l = 0; l < layers.size(); l++) {
            for (const kvl_head & head : seq.heads[l]) {
                step = std::min(step, KVL_PAGE_SLOTS - (head.n() % KVL_PAGE_SLOTS));
            }
        }
        for (size_t l = 0; l < layers.size(); l++) {
            kvl_pool & pool = *layers[l].pool;
            for (kvl_head & head : seq.heads[l]) {
                if (head.n() % KVL_PAGE_SLOTS == 0) {
                    head.pages.push_back(pool.take());
                    head.live.push_back(UINT32_MAX);
                    head.n_listed++;
                    if (has_mass(layers[l])) {
                        head.mass.push_back(layers[l].arena->mass.take());
                    }
                    head.page_bytes += KVL_PAGE_SLOTS * pool.slot_bytes();
                }
                head.pos.insert(head.pos.end(), pos + done, pos + done + step);
                head.used_bytes += step * pool.slot_bytes();
                pool.hold(head.pages.back(), head.held_bits(uint32_t(head.pages.size()) - 1));
            }
        }
        done += step;
    }
    seq.n_seen = pos[n - 1] + 1;
    const uint32_t w = params.n_window;
    for (uint32_t i = n > w ? n - w : 0; i < n; i++) {
        seq.window[pos[i] % w] = pos[i];
    }
    note_peak();
    return true;
}

std::vector<int32_t> llama_kv_paged::window_rows(llama_seq_id seq_id) const {
    const kvl_sequence & seq = seqs[seq_id];
    const int32_t w = params.n_window;
    std::vector<int32_t> rows;
    for (llama_pos p = seq.n_seen - 1; p >= 0 && int32_t(rows.size()) < w && seq.window[p % w] == p; p--) {
        rows.push_back(seq_id * w + p % w);
    }
    std::reverse(rows.begin(), rows.end());
    return rows;
}
