// Sequences that share pages, and the ends that are cut off them.

#include "cache/memory.h"

#include <algorithm>
#include <map>

void llama_kv_paged::cut(kvl_layer & layer, kvl_head & head, uint32_t n) {
    const uint32_t n_pages = (n + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS;
    while (head.pages.size() > n_pages) {
        layer.pool->drop(head.pages.back());
        head.pages.pop_back();
        head.live.pop_back();
    }
    drop_mass(layer, head, n_pages);
    if (n % KVL_PAGE_SLOTS != 0) {
        head.live.back() |= UINT32_MAX << n % KVL_PAGE_SLOTS; // whoever comes next is seen
        if (!head.mass.empty()) {
            layer.arena->mass.clear(head.mass.back(), n % KVL_PAGE_SLOTS);
        }
    }
    head.count_listed();
    head.pos.resize(n);
    note_held(layer, head);
}

bool llama_kv_paged::truncate(llama_seq_id seq_id, llama_pos p0) {
    kvl_sequence & seq = seqs[seq_id];
    p0 = std::max(p0, 0);
    if (p0 >= seq.n_seen) {
        return true;
    }
    const auto rest_of = [&](const kvl_head & head) {
        std::vector<uint32_t> slots;
        for (uint32_t i = 0; i < head.n(); i++) {
            if (head.pos[i] != kvl_head::HOLE && head.pos[i] < p0) {
                slots.push_back(i);
            }
        }
        return slots;
    };
    // what is left moves together, which takes a page of its own where one is shared: check before the first move
    std::map<const kvl_pool *, uint32_t> need;
    for (size_t l = 0; l < layers.size(); l++) {
        std::vector<uint32_t> copies(layers[l].pools.size(), 0);
        for (const kvl_head & head : seq.heads[l]) {
            if (!head.plain()) {
                count_copies(layers[l], head, rest_of(head), copies);
            }
        }
        for (size_t f = 0; f < copies.size(); f++) {
            need[layers[l].pools[f]] += copies[f];
        }
    }
    for (const auto & [pool, n] : need) {
        if (n > 0 && n > pool->n_free()) {
            kvl_set_error("no room to separate a shared branch before cutting it: " + std::to_string(n) +
                          " pages needed, " + std::to_string(pool->n_free()) + " free; use a larger context (-c)");
            return false;
        }
    }
    for (uint32_t l = 0; l < layers.size(); l++) {
        std::vector<kvl_head> & heads = seq.heads[l];
        if (!std::all_of(heads.begin(), heads.end(), [](const kvl_head & head) {
                return head.plain();
            })) {
            std::vector<std::vector<uint32_t>> rest;
            for (const kvl_head & head : heads) {
                rest.push_back(rest_of(head));
            }
            compact(seq_id, l, rest);
            continue;
        }
        for (kvl_head & head : heads) {
            const auto it = std::lower_bound(head.pos.begin(), head.pos.end(), p0);
            cut(layers[l], head, uint32_t(it - head.pos.begin()));
        }
    }
    seq.n_seen = p0;
    if (p0 == 0) {
        for (auto & mu : seq.mu) {
            mu.clear();
        }
    }
    trim();
    return true;
}

bool llama_kv_paged::branch(llama_seq_id src, llama_seq_id dst) {
    if (src == dst) {
        return true;
    }
    truncate(dst, 0);
    kvl_sequence & to = seqs[dst];
    const kvl_sequence & from = seqs[src];
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : from.heads[l]) {
            for (const uint32_t entry : head.pages) {
                layers[l].pools[kvl_head::page_format(entry)]->share(kvl_head::page_number(entry));
            }
        }
    }
    to.heads = from.heads;
    to.mu = from.mu;
    to.window = from.window;
    to.n_seen = from.n_seen;
    for (uint32_t l = 0; l < layers.size(); l++) {
        upload_mean(dst, l);
        for (size_t h = 0; h < to.heads[l].size(); h++) {
            to.heads[l][h].mass.clear();
            write_mass(layers[l], to.heads[l][h], read_mass(layers[l], from.heads[l][h]));
        }
    }
    if (params.n_window > 0 && !no_alloc()) {
        std::vector<uint8_t> tmp;
        for (const kvl_layer & layer : layers) {
            const size_t size = layer.queries->nb[1] * size_t(params.n_window);
            tmp.resize(size);
            ggml_backend_tensor_get(layer.queries, tmp.data(), size * size_t(src), size);
            ggml_backend_tensor_set(layer.queries, tmp.data(), size * size_t(dst), size);
        }
    }
    return true;
}

bool llama_kv_paged::own_pages(llama_seq_id seq_id) {
    kvl_sequence & seq = seqs[seq_id];
    std::map<const kvl_pool *, uint32_t> need;
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : seq.heads[l]) {
            if (!head.plain()) {
                kvl_set_error("slots that are not stored in f16 cannot be given other positions");
                return false;
            }
            need[layers[l].pool] += uint32_t(std::count_if(head.pages.begin(), head.pages.end(), [&](uint32_t page) {
                return layers[l].pool->shared(page);
            }));
        }
    }
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            kvl_set_error("the KV pool is full: a sequence needs " + std::to_string(n) + " pages of its own, " +
                          std::to_string(pool->n_free()) + " are free; use a larger context (-c)");
            return false;
        }
    }
    for (size_t l = 0; l < layers.size(); l++) {
        std::vector<kvl_row_move> moves;
        for (kvl_head & head : seq.heads[l]) {
            for (uint32_t p = 0; p < head.pages.size(); p++) {
                if (layers[l].pool->shared(head.pages[p])) {
                    const uint32_t n = std::min<uint32_t>(head.n() - p * KVL_PAGE_SLOTS, KVL_PAGE_SLOTS);
                    head.pages[p] = layers[l].pool->unshare(head.pages[p], n, moves);
                }
            }
            note_held(layers[l], head);
        }
        if (!layers[l].arena->move(*layers[l].pool, moves)) {
            return false;
        }
    }
    note_peak();
    return true;
}
