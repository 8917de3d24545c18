// Pages of several formats in one head: compaction within each, and moving slots from one to another.

#include "kvl-api.h"
#include "llama-kv-paged.h"

#include <algorithm>
#include <map>

using kvl_api::fail;

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

uint32_t entry(uint32_t format, uint32_t number) {
    return format << KVL_PAGE_FORMAT_SHIFT | number;
}

} // namespace

void llama_kv_paged::count_copies(const kvl_layer & layer, const kvl_head & head, const std::vector<uint32_t> & slots,
                                  std::vector<uint32_t> & copies) const {
    for (const page_group & g : groups_of(head, slots)) {
        for (uint32_t q = 0; q * KVL_PAGE_SLOTS < g.n; q++) {
            const uint32_t page = kvl_head::page_number(head.pages[g.begin + q]);
            copies[g.format] += page_moves(g, slots, q) && layer.pools[g.format]->shared(page) ? 1 : 0;
        }
    }
}

void llama_kv_paged::compact(kvl_layer & layer, kvl_head & head, const std::vector<uint32_t> & slots) {
    kvl_head out;
    out.mass.resize(head.mass.size());
    std::vector<std::pair<kvl_pool *, uint32_t>> gone;
    for (const page_group & g : groups_of(head, slots)) {
        kvl_pool & pool = *layer.pools[g.format];
        const uint32_t n_pages = uint32_t((g.n + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS);
        // sources are never behind their destination, so pages can be rewritten in ascending order; a page that is
        // still shared is read from the old table after a new page has taken its place
        for (uint32_t q = 0; q < n_pages; q++) {
            uint32_t page = kvl_head::page_number(head.pages[g.begin + q]);
            if (page_moves(g, slots, q)) {
                if (pool.shared(page)) {
                    gone.emplace_back(&pool, page);
                    page = pool.take();
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
                        pool.move_rows(to, head.row(from), run);
                    }
                    i += run;
                }
            }
            out.pages.push_back(entry(g.format, page));
        }
        for (uint32_t p = g.begin + n_pages; p < g.end; p++) {
            gone.emplace_back(&pool, kvl_head::page_number(head.pages[p]));
        }
        for (size_t i = 0; i < g.n; i++) {
            const uint32_t slot = slots[g.first + i];
            out.pos.push_back(head.pos[slot]);
            for (size_t m = 0; m < head.mass.size(); m++) {
                out.mass[m].push_back(head.mass[m][slot]);
            }
        }
        if (g.format != KVL_FORMAT_F16) {
            const size_t full = size_t(out.pages.size()) * KVL_PAGE_SLOTS;
            out.n_holes += uint32_t(full - out.pos.size());
            out.pos.resize(full, kvl_head::HOLE);
            for (auto & mass : out.mass) {
                mass.resize(full, 0.0f);
            }
        }
    }
    note_peak();
    for (const auto & [pool, page] : gone) {
        pool->drop(page);
    }
    for (uint32_t p = 0; p < out.pages.size(); p++) {
        out.live.push_back(out.all_live(p));
    }
    head = std::move(out);
}

void llama_kv_paged::read_slot(llama_seq_id seq, uint32_t layer_id, uint32_t h, uint32_t slot, float * k,
                               float * v) const {
    const kvl_layer & layer = layers[layer_id];
    const kvl_head & head = seqs[seq].heads[layer_id][h];
    const uint32_t format = head.format(slot);
    const kvl_pool & pool = *layer.pools[format];
    if (format == KVL_FORMAT_F16) {
        pool.read_rows(head.row(slot), 1, k, v);
        return;
    }
    const auto decode = [&](const ggml_tensor * t, kvl_row row, uint32_t d, float * out) {
        if (out) {
            attn.decode(row, static_cast<const char *>(t->data) + head.row(slot) * t->nb[1], int(d), out);
        }
    };
    decode(pool.k, pool.k_row, pool.d_k, k);
    decode(pool.v, pool.v_row, pool.d_v, v);
    const std::vector<float> & mu = seqs[seq].mu[layer_id];
    for (uint32_t c = 0; k && !mu.empty() && c < pool.d_k; c++) {
        k[c] += mu[h * pool.d_k + c];
    }
}

// New slots of a format behind those that are there.
void llama_kv_paged::insert(kvl_layer & layer, kvl_head & head, uint32_t format, const std::vector<llama_pos> & pos,
                            const std::vector<std::vector<float>> & mass, const std::vector<float> & k,
                            const std::vector<float> & v) {
    kvl_pool & pool = *layer.pools[format];
    uint32_t p = 0; // first page behind the group
    while (p < head.pages.size() && kvl_head::page_format(head.pages[p]) >= format) {
        p++;
    }
    uint32_t slot = p * KVL_PAGE_SLOTS;
    const bool exists = p > 0 && kvl_head::page_format(head.pages[p - 1]) == format;
    while (exists && head.pos[slot - 1] == kvl_head::HOLE) {
        slot--;
    }
    for (size_t i = 0; i < pos.size(); i++, slot++) {
        if (slot == p * KVL_PAGE_SLOTS) {
            head.pages.insert(head.pages.begin() + p, entry(format, pool.take()));
            head.live.insert(head.live.begin() + p, 0);
            head.pos.insert(head.pos.begin() + slot, KVL_PAGE_SLOTS, kvl_head::HOLE);
            for (auto & m : head.mass) {
                m.insert(m.begin() + slot, KVL_PAGE_SLOTS, 0.0f);
            }
            head.n_holes += KVL_PAGE_SLOTS;
            p++;
        } else if (i == 0) {
            uint32_t & page = head.pages[slot / KVL_PAGE_SLOTS];
            if (pool.shared(kvl_head::page_number(page))) {
                page = entry(format, pool.unshare(kvl_head::page_number(page), slot % KVL_PAGE_SLOTS));
            }
        }
        head.pos[slot] = pos[i];
        head.n_holes--;
        for (size_t m = 0; m < head.mass.size(); m++) {
            head.mass[m][slot] = mass[m][i];
        }
        const auto encode = [&](ggml_tensor * t, kvl_row row, uint32_t d, const float * x) {
            attn.encode(row, x + i * d, int(d), static_cast<char *>(t->data) + head.row(slot) * t->nb[1]);
        };
        encode(pool.k, pool.k_row, pool.d_k, k.data());
        encode(pool.v, pool.v_row, pool.d_v, v.data());
    }
    for (uint32_t q = 0; q < head.pages.size(); q++) {
        head.live[q] = head.all_live(q);
    }
    note_peak();
}

int32_t llama_kv_paged::demote(llama_seq_id seq_id, uint32_t layer_id, uint32_t format, const int32_t * n_demote,
                               const int32_t * slots) {
    kvl_layer & layer = layers[layer_id];
    std::vector<kvl_head> & heads = seqs[seq_id].heads[layer_id];
    if (format == KVL_FORMAT_F16 || format >= KVL_FORMAT_COUNT || !layer.pools[format]) {
        return fail(KVL_ERR_ARGUMENT, "format " + std::to_string(format) + " was not asked for in kvl_params.formats");
    }
    if (!check_slots(seq_id, layer_id, n_demote, slots, true)) {
        return KVL_ERR_ARGUMENT;
    }
    kvl_pool & pool = *layer.pools[format];
    const std::vector<float> & mu = seqs[seq_id].mu[layer_id];
    struct move {
        std::vector<uint32_t> rest;
        std::vector<llama_pos> pos;
        std::vector<std::vector<float>> mass;
        std::vector<float> k, v;
    };
    std::vector<move> moves(heads.size());
    std::vector<uint32_t> need(layer.pools.size(), 0);
    for (uint32_t h = 0; h < heads.size(); slots += n_demote[h], h++) {
        const kvl_head & head = heads[h];
        move & m = moves[h];
        const std::vector<uint32_t> order = head.order();
        std::vector<bool> goes(head.n(), false);
        m.mass.resize(head.mass.size());
        for (int32_t i = 0; i < n_demote[h]; i++) {
            const uint32_t slot = order[slots[i]];
            if (head.format(slot) == format) {
                continue; // it is there already
            }
            goes[slot] = true;
            m.pos.push_back(head.pos[slot]);
            for (size_t g = 0; g < head.mass.size(); g++) {
                m.mass[g].push_back(head.mass[g][slot]);
            }
            m.k.resize(m.k.size() + pool.d_k);
            m.v.resize(m.v.size() + pool.d_v);
            float * k = m.k.data() + m.k.size() - pool.d_k;
            read_slot(seq_id, layer_id, h, slot, k, m.v.data() + m.v.size() - pool.d_v);
            for (uint32_t c = 0; !mu.empty() && c < pool.d_k; c++) {
                k[c] -= mu[h * pool.d_k + c];
            }
        }
        for (uint32_t slot = 0; slot < head.n(); slot++) {
            if (!goes[slot] && head.pos[slot] != kvl_head::HOLE) {
                m.rest.push_back(slot);
            }
        }
        count_copies(layer, head, m.rest, need);
        need[format] += m.pos.empty() ? 0 : uint32_t(m.pos.size() / KVL_PAGE_SLOTS) + 2;
    }
    for (uint32_t f = 0; f < need.size(); f++) {
        if (need[f] > 0 && need[f] > layer.pools[f]->n_free()) {
            return fail(KVL_ERR_MEMORY, "the KV pool is full: up to " + std::to_string(need[f]) + " pages needed, " +
                                            std::to_string(layer.pools[f]->n_free()) + " free");
        }
    }
    for (uint32_t h = 0; h < heads.size(); h++) {
        move & m = moves[h];
        if (!m.pos.empty()) {
            compact(layer, heads[h], m.rest);
            insert(layer, heads[h], format, m.pos, m.mass, m.k, m.v);
        }
    }
    trim();
    return KVL_OK;
}

int32_t llama_kv_paged::set_mu(llama_seq_id seq_id, uint32_t layer_id, const float * mu) {
    for (const kvl_head & head : seqs[seq_id].heads[layer_id]) {
        if (!head.plain()) {
            return fail(KVL_ERR_ARGUMENT, "slots of the layer are stored without the mean of the keys that is set now");
        }
    }
    const kvl_layer & layer = layers[layer_id];
    std::vector<float> & to = seqs[seq_id].mu[layer_id];
    const uint32_t d_k = layer.pool->d_k;
    to.assign(mu, mu + size_t(layer.n_head_kv) * d_k);
    for (uint32_t h = 0; params.rotate && h < layer.n_head_kv; h++) {
        rotate_row(to.data() + h * d_k, d_k);
    }
    return KVL_OK;
}
