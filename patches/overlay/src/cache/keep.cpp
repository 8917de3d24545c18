// What stays of a layer: keep drops slots, select hides them.

#include "cache/memory.h"

#include <algorithm>

void llama_kv_paged::trim() {
    for_pools([](kvl_pool & pool) {
        pool.trim();
    });
    for (const auto & arena : arenas) {
        arena->mass.trim();
    }
}

// Slots as counted from outside, by position and without holes, to those of the head, ascending.
static std::vector<uint32_t> inner_slots(const kvl_head & head, const int32_t * slots, int32_t n) {
    std::vector<uint32_t> out(slots, slots + n);
    if (!head.plain()) {
        const std::vector<uint32_t> order = head.order();
        for (uint32_t & slot : out) {
            slot = order[slot];
        }
        std::sort(out.begin(), out.end());
    }
    return out;
}

bool llama_kv_paged::check_slots(llama_seq_id seq_id, uint32_t layer_id, const int32_t * counts, const int32_t * s,
                                 bool empty) const {
    for (uint32_t h = 0; h < layers[layer_id].n_head_kv; s += counts[h], h++) {
        const kvl_head & head = seqs[seq_id].heads[layer_id][h];
        const std::string where = " (layer " + std::to_string(layer_id) + ", KV head " + std::to_string(h) + ")";
        if (counts[h] < 0 || uint32_t(counts[h]) > head.held() || (counts[h] == 0 && head.held() > 0 && !empty)) {
            kvl_set_error("cannot take " + std::to_string(counts[h]) + " of " + std::to_string(head.held()) + " slots" +
                          (empty ? "" : "; every head keeps at least one") + where);
            return false;
        }
        for (int32_t i = 0; i < counts[h]; i++) {
            if (s[i] < 0 || uint32_t(s[i]) >= head.held() || (i > 0 && s[i] <= s[i - 1])) {
                kvl_set_error("slot indices must be ascending and below " + std::to_string(head.held()) + ", got " +
                              std::to_string(s[i]) + where);
                return false;
            }
        }
    }
    return true;
}

bool llama_kv_paged::keep(llama_seq_id seq_id, uint32_t layer_id, const int32_t * n_keep, const int32_t * slots) {
    const kvl_layer & layer = layers[layer_id];
    const std::vector<kvl_head> & heads = seqs[seq_id].heads[layer_id];

    // check everything before the first move: all or nothing
    if (!check_slots(seq_id, layer_id, n_keep, slots, false)) {
        return false;
    }
    std::vector<std::vector<uint32_t>> kept(heads.size());
    std::vector<uint32_t> copies(layer.pools.size(), 0);
    for (uint32_t h = 0; h < heads.size(); slots += n_keep[h], h++) {
        kept[h] = inner_slots(heads[h], slots, n_keep[h]);
        count_copies(layer, heads[h], kept[h], copies);
    }
    for (uint32_t f = 0; f < copies.size(); f++) {
        if (copies[f] > 0 && copies[f] > layer.pools[f]->n_free()) {
            kvl_set_error("no room to separate a shared branch before evicting: " + std::to_string(copies[f]) +
                          " pages needed, " + std::to_string(layer.pools[f]->n_free()) + " free");
            return false;
        }
    }
    bool dropped = false;
    for (uint32_t h = 0; h < heads.size(); h++) {
        dropped = dropped || kept[h].size() < heads[h].held();
    }
    if (dropped) {
        kvl_flush_archive(seqs[seq_id]);
    }
    compact(seq_id, layer_id, kept);
    seqs[seq_id].index.evicted = seqs[seq_id].index.evicted || dropped;
    n_evict += dropped ? 1 : 0;
    trim();
    return true;
}

bool llama_kv_paged::select(llama_seq_id seq_id, uint32_t layer_id, const int32_t * n_select, const int32_t * slots) {
    if (n_select && !check_slots(seq_id, layer_id, n_select, slots, true)) {
        return false;
    }
    std::vector<std::vector<uint32_t>> chosen;
    for (const kvl_head & head : seqs[seq_id].heads[layer_id]) {
        if (n_select) {
            const int32_t n = n_select[chosen.size()];
            chosen.push_back(inner_slots(head, slots, n));
            slots += n;
        }
    }
    for (uint32_t h = 0; h < layers[layer_id].n_head_kv; h++) {
        kvl_head & head = seqs[seq_id].heads[layer_id][h];
        n_select ? head.see(chosen[h]) : head.see_all();
    }
    return true;
}
