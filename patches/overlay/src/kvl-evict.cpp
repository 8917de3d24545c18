// What removes or shares slots: keep, truncate, branch, clear, and the sequence operations of llama_memory_i.

#include "llama-impl.h"
#include "llama-kv-paged.h"

#include "ggml.h"

#include <algorithm>
#include <map>
#include <stdexcept>

void llama_kv_paged::trim() {
    for (auto & pool : pools) {
        if (pool) {
            pool->trim();
        }
    }
}

void llama_kv_paged::cut(kvl_layer & layer, kvl_head & head, uint32_t n) {
    const uint32_t n_pages = (n + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS;
    while (head.pages.size() > n_pages) {
        layer.pool->drop(head.pages.back());
        head.pages.pop_back();
        head.live.pop_back();
    }
    if (n % KVL_PAGE_SLOTS != 0) {
        head.live.back() |= UINT32_MAX << n % KVL_PAGE_SLOTS; // whoever comes next is seen
    }
    head.pos.resize(n);
    for (auto & mass : head.mass) {
        mass.resize(n);
    }
    note_held(layer, head);
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
        for (kvl_head & head : seq.heads[l]) {
            for (uint32_t p = 0; p < head.pages.size(); p++) {
                if (layers[l].pool->shared(head.pages[p])) {
                    const uint32_t n = std::min<uint32_t>(head.n() - p * KVL_PAGE_SLOTS, KVL_PAGE_SLOTS);
                    head.pages[p] = layers[l].pool->unshare(head.pages[p], n);
                }
            }
            note_held(layers[l], head);
        }
    }
    note_peak();
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
    for (size_t l = 0; l < layers.size(); l++) {
        for (kvl_head & head : seq.heads[l]) {
            if (head.plain()) {
                const auto it = std::lower_bound(head.pos.begin(), head.pos.end(), p0);
                cut(layers[l], head, uint32_t(it - head.pos.begin()));
            } else {
                compact(layers[l], head, rest_of(head));
            }
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

//
// llama_memory_i
//

void llama_kv_paged::clear(bool data) {
    GGML_UNUSED(data);
    for (size_t s = 0; s < seqs.size(); s++) {
        truncate(llama_seq_id(s), 0);
    }
}

bool llama_kv_paged::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !valid_seq(seq_id)) {
        return true; // an unknown sequence holds nothing
    }
    bool ok = true;
    for (size_t s = 0; s < seqs.size(); s++) {
        if (seq_id >= 0 && size_t(seq_id) != s) {
            continue;
        }
        if (p1 >= 0 && p1 < seqs[s].n_seen && std::max(p0, 0) < p1) {
            kvl_set_error("the paged cache removes only the tail of a sequence: [" + std::to_string(p0) + ", " +
                          std::to_string(p1) + ") ends before position " + std::to_string(seqs[s].n_seen) +
                          "; use kvl_keep to drop slots in the middle");
            ok = false;
            continue;
        }
        if (p1 < 0 || std::max(p0, 0) < p1) {
            ok = truncate(llama_seq_id(s), p0) && ok;
        }
    }
    return ok;
}

void llama_kv_paged::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (!valid_seq(src) || !valid_seq(dst) || p0 > 0) {
        kvl_set_error("seq_cp copies a sequence from its beginning into a sequence below n_seq_max = " +
                      std::to_string(seqs.size()));
        LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
        return;
    }
    if (branch(src, dst) && p1 >= 0 && src != dst && !truncate(dst, p1)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
        truncate(dst, 0);
    }
}

void llama_kv_paged::seq_keep(llama_seq_id seq_id) {
    for (size_t s = 0; s < seqs.size(); s++) {
        if (size_t(seq_id) != s) {
            truncate(llama_seq_id(s), 0);
        }
    }
}

void llama_kv_paged::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    GGML_UNUSED(shift);
    kvl_set_error("the paged cache keeps true positions and cannot shift them (seq_add); evict instead");
    LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
}

void llama_kv_paged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    GGML_UNUSED(d);
    kvl_set_error("the paged cache keeps true positions and cannot divide them (seq_div)");
    LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
}

llama_pos llama_kv_paged::seq_pos_min(llama_seq_id seq_id) const {
    if (!valid_seq(seq_id) || seqs[seq_id].n_seen == 0) {
        return -1;
    }
    llama_pos p = seqs[seq_id].n_seen - 1;
    for (const auto & heads : seqs[seq_id].heads) {
        for (const kvl_head & head : heads) {
            // only slots of f16 are in order
            const auto end = head.pos.begin() + std::min(head.n(), head.f16_begin() + 1);
            std::for_each(head.pos.begin(), end, [&](llama_pos pos) {
                p = pos == kvl_head::HOLE ? p : std::min(p, pos);
            });
        }
    }
    return p;
}

llama_pos llama_kv_paged::seq_pos_max(llama_seq_id seq_id) const {
    return valid_seq(seq_id) ? seqs[seq_id].n_seen - 1 : -1;
}
