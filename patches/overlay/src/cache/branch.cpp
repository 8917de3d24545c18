// Sequences that share pages, and the ends that are cut off them.

#include "cache/memory.h"
#include "llama-memory-recurrent.h"

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
    head.starts.resize(std::min<size_t>(head.starts.size(), n / KVL_PAGE_SLOTS));
    note_held(layer, head);
}

bool llama_kv_paged::truncate(llama_seq_id seq_id, llama_pos p0) {
    kvl_sequence & seq = seqs[seq_id];
    p0 = std::max(p0, 0);
    if (p0 >= seq.n_seen) {
        return true;
    }
    const llama_pos reached = reach(seq_id, p0);
    if (reached != p0) {
        kvl_set_error("the sequence cannot go back to token " + std::to_string(p0) + ": layers with a " +
                      (recr ? "recurrent state" : "sliding window") + " have gone on; it can go back to token " +
                      std::to_string(reached));
        return false;
    }
    const kvl_marked * mark = find_mark(seq_id, p0);
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
    for (uint32_t l = 0; l < (mark ? n_open : layers.size()); l++) {
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
    kvl_give_back(*this, seq_id, p0);
    seq.index.cut(p0, seq.archive.on());
    seq.archive.cut(seq.index.ends.size());
    if (mark) {
        go_back(seq_id, *mark);
    } else if (recr) {
        recr->seq_rm(seq_id, -1, -1);
    }
    while (!seq.marks.empty() && seq.marks.back().pos > p0) {
        drop_mark(seq.marks.back());
        seq.marks.pop_back();
    }
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
    // what can fail comes before the first page is shared
    std::vector<std::vector<kvl_head>> heads = from.heads;
    std::vector<std::vector<float>> mu = from.mu;
    kvl_index index = from.index;
    kvl_archive archive = from.archive;
    std::vector<std::vector<std::vector<std::vector<float>>>> mass(layers.size()); // [layer][KV head]
    std::map<kvl_arena *, uint64_t> n_mass;
    for (size_t l = 0; l < layers.size(); l++) {
        for (kvl_head & head : heads[l]) {
            mass[l].push_back(read_mass(layers[l], head));
            n_mass[layers[l].arena] += head.mass.size();
            head.mass.clear(); // it gets its own; the room for their numbers stays
        }
    }
    for (const auto & [arena, n] : n_mass) {
        arena->mass.reserve(n);
    }
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : from.heads[l]) {
            for (const uint32_t entry : head.pages) {
                layers[l].pools[kvl_head::page_format(entry)]->share(kvl_head::page_number(entry));
            }
        }
    }
    to.heads = std::move(heads);
    to.mu = std::move(mu);
    to.index = std::move(index);
    to.archive = std::move(archive);
    to.window = from.window; // of the same length
    to.n_seen = from.n_seen;
    if (recr) {
        recr->seq_cp(src, dst, -1, -1);
    }
    for (uint32_t l = 0; l < layers.size(); l++) {
        upload_mean(dst, l);
        for (size_t h = 0; h < to.heads[l].size(); h++) {
            write_mass(layers[l], to.heads[l][h], mass[l][h]);
        }
    }
    if (params.n_window > 0 && !no_alloc()) {
        std::vector<uint8_t> tmp;
        for (uint32_t l = 0; l < n_open; l++) {
            const kvl_layer & layer = layers[l];
            const size_t size = layer.queries->nb[1] * size_t(params.n_window);
            tmp.resize(size);
            ggml_backend_tensor_get(layer.queries, tmp.data(), size * size_t(src), size);
            ggml_backend_tensor_set(layer.queries, tmp.data(), size * size_t(dst), size);
        }
    }
    return true;
}

bool llama_kv_paged::own_pages(llama_seq_id seq_id, bool tails) {
    struct copied {
        kvl_head * head;
        uint32_t at;
        kvl_pool * pool;
        uint32_t number;
    };
    kvl_sequence & seq = seqs[seq_id];
    std::vector<copied> copies;
    std::map<kvl_pool *, uint32_t> need;
    for (size_t l = 0; l < layers.size(); l++) {
        kvl_pool * pool = layers[l].pool;
        for (kvl_head & head : seq.heads[l]) {
            const uint32_t n = uint32_t(head.pages.size());
            const uint32_t last = n - (head.n() % KVL_PAGE_SLOTS != 0 ? 1 : 0);
            for (uint32_t p = tails ? last : 0; p < n; p++) {
                if (pool->shared(kvl_head::page_number(head.pages[p]))) {
                    copies.push_back({&head, p, pool, kvl_pool::NONE});
                    need[pool]++;
                }
            }
        }
    }
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            kvl_set_error("the KV pool is full: a sequence needs " + std::to_string(n) + " pages of its own, " +
                          std::to_string(pool->n_free()) + " are free; use a larger context (-c)");
            return false;
        }
    }
    // copied first, entered in the page tables then: what fails changes nothing
    kvl_compaction work;
    std::map<kvl_pool *, std::vector<kvl_row_move>> moves;
    for (copied & c : copies) {
        const uint32_t n = std::min<uint32_t>(c.head->n() - c.at * KVL_PAGE_SLOTS, KVL_PAGE_SLOTS);
        const uint64_t from = uint64_t(kvl_head::page_number(c.head->pages[c.at])) * KVL_PAGE_SLOTS;
        std::vector<kvl_row_move> & of_pool = moves[c.pool];
        of_pool.push_back({0, from, n});
        work.taken.emplace_back(c.pool, kvl_pool::NONE);
        c.number = work.taken.back().second = c.pool->take();
        of_pool.back().to = uint64_t(c.number) * KVL_PAGE_SLOTS;
    }
    for (const auto & arena : arenas) {
        kvl_pool & pool = *arena->pools[KVL_FORMAT_F16];
        if (moves.count(&pool) > 0 && !arena->move(pool, moves[&pool])) {
            return false;
        }
    }
    note_peak();
    work.taken.clear();
    for (const copied & c : copies) {
        c.pool->drop(kvl_head::page_number(c.head->pages[c.at]));
        c.head->pages[c.at] = kvl_head::page_entry(KVL_FORMAT_F16, c.number);
        c.pool->hold(c.number, c.head->held_bits(c.at));
    }
    return true;
}
