// What stays of a layer: keep drops slots, select hides them. And what slots receive, which starts anew.

#include "cache/memory.h"

#include <algorithm>

void llama_kv_paged::trim() {
    for (auto & pool : pools) {
        if (pool) {
            pool->trim();
        }
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
    kvl_layer & layer = layers[layer_id];
    std::vector<kvl_head> & heads = seqs[seq_id].heads[layer_id];

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
        compact(layer, heads[h], kept[h]);
    }
    n_evict += dropped ? 1 : 0;
    trim();
    return true;
}

bool llama_kv_paged::select(llama_seq_id seq_id, uint32_t layer_id, const int32_t * n_select, const int32_t * slots) {
    if (n_select && !check_slots(seq_id, layer_id, n_select, slots, true)) {
        return false;
    }
    for (uint32_t h = 0; h < layers[layer_id].n_head_kv; h++) {
        kvl_head & head = seqs[seq_id].heads[layer_id][h];
        for (uint32_t p = 0; p < head.pages.size(); p++) {
            head.live[p] = n_select ? 0 : head.all_live(p);
        }
        if (!n_select) {
            continue;
        }
        for (const uint32_t slot : inner_slots(head, slots, n_select[h])) {
            head.live[slot / KVL_PAGE_SLOTS] |= 1u << slot % KVL_PAGE_SLOTS;
        }
        slots += n_select[h];
        if (head.n() % KVL_PAGE_SLOTS != 0) {
            head.live.back() |= UINT32_MAX << head.n() % KVL_PAGE_SLOTS; // whoever comes next is seen
        }
    }
    return true;
}

bool llama_kv_paged::set_mass(kvl_mass kind) {
    const bool on = kind != KVL_MASS_NONE;
    if (on && !fused()) {
        kvl_set_error("attention mass needs the page kernels, which run on the CPU only");
        return false;
    }
    mass_kind = kind;
    for (kvl_sequence & seq : seqs) {
        for (size_t l = 0; l < layers.size(); l++) {
            for (kvl_head & head : seq.heads[l]) {
                head.mass.assign(on ? layers[l].n_head / layers[l].n_head_kv : 0, std::vector<float>(head.n(), 0.0f));
            }
        }
    }
    return true;
}
