// Units come back from the archive, and go again.

#include "cache/recall.h"

#include "cache/memory.h"

#include <algorithm>
#include <bitset>
#include <cstring>

namespace {

// Rows are in use, or no more; a page without any is given back.
void note_rows(const kvl_layer & layer, kvl_recalled & of) {
    for (size_t p = 0; p < of.pages.size(); p++) {
        if (of.pages[p] == kvl_pool::NONE) {
            continue;
        }
        layer.pool->hold(of.pages[p], of.used[p]);
        if (of.used[p] == 0) {
            layer.pool->drop(of.pages[p]);
            of.pages[p] = kvl_pool::NONE;
            if (p < of.mass.size()) {
                layer.arena->mass.drop(of.mass[p]);
            }
        }
    }
    while (!of.pages.empty() && of.pages.back() == kvl_pool::NONE) {
        of.pages.pop_back();
        of.used.pop_back();
        of.mass.resize(std::min(of.mass.size(), of.pages.size()));
    }
}

// Drop some of the units, those from `gone` on.
void drop(const kvl_layer & layer, kvl_recalled & of, std::vector<kvl_recalled_unit>::iterator gone) {
    for (auto unit = gone; unit != of.units.end(); unit++) {
        for (const uint32_t row : unit->rows) {
            of.used[row / KVL_PAGE_SLOTS] &= ~(1u << row % KVL_PAGE_SLOTS);
        }
    }
    of.units.erase(gone, of.units.end());
    note_rows(layer, of);
}

// rows for the tokens of a unit; false: there are not enough pages
bool take_rows(llama_kv_paged & kv, const kvl_layer & layer, kvl_recalled & of, kvl_recalled_unit & unit) {
    uint32_t n_free = 0;
    for (size_t p = 0; p < of.pages.size(); p++) {
        n_free += of.pages[p] == kvl_pool::NONE ? 0 : KVL_PAGE_SLOTS - uint32_t(std::bitset<32>(of.used[p]).count());
    }
    const auto n = uint32_t(unit.pos.size());
    const uint32_t n_pages = n > n_free ? kvl_pages_for(n - n_free) : 0;
    // a page for every head stays for the text that goes on
    if (n_pages > 0 && layer.pool->n_free() < n_pages + layer.arena->shape.n_heads) {
        return false;
    }
    if (kv.has_mass(layer)) {
        layer.arena->mass.reserve(n_pages);
    }
    for (size_t p = 0; unit.rows.size() < n; p++) {
        if (p == of.pages.size()) {
            of.pages.push_back(kvl_pool::NONE);
            of.used.push_back(0);
        }
        if (of.pages[p] == kvl_pool::NONE) {
            of.pages[p] = layer.pool->take();
            if (kv.has_mass(layer)) {
                of.mass.resize(of.pages.size());
                of.mass[p] = layer.arena->mass.take();
            }
        }
        for (uint32_t i = 0; i < KVL_PAGE_SLOTS && unit.rows.size() < n; i++) {
            if (!(of.used[p] >> i & 1)) {
                of.used[p] |= 1u << i;
                unit.rows.push_back(uint32_t(p) * KVL_PAGE_SLOTS + i);
            }
        }
    }
    note_rows(layer, of);
    return true;
}

// The positions of a unit that a head does not hold in f16.
std::vector<llama_pos> missing(const kvl_head & head, const kvl_archived & unit) {
    std::vector<llama_pos> out;
    auto it = std::lower_bound(head.pos.begin() + head.f16_begin(), head.pos.end(), unit.begin);
    for (llama_pos p = unit.begin; p < unit.end; p++) {
        if (it != head.pos.end() && *it == p) {
            it++;
        } else {
            out.push_back(p);
        }
    }
    return out;
}

// Hide or show the tokens of some units where they lie on a lower rung: one that was brought back is seen once. Returns
// how many are hidden or shown by that.
uint32_t show_copies(kvl_head & head, const std::vector<kvl_recalled_unit> & units, bool shown) {
    std::vector<llama_pos> pos;
    for (const kvl_recalled_unit & unit : units) {
        pos.insert(pos.end(), unit.pos.begin(), unit.pos.end());
    }
    const uint32_t n = pos.empty() ? 0 : head.f16_begin();
    std::sort(pos.begin(), pos.end());
    uint32_t n_changed = 0;
    for (uint32_t slot = 0; slot < n; slot++) {
        if (head.pos[slot] != kvl_head::HOLE && head.is_live(slot) != shown &&
            std::binary_search(pos.begin(), pos.end(), head.pos[slot])) {
            head.live[slot / KVL_PAGE_SLOTS] ^= 1u << slot % KVL_PAGE_SLOTS;
            n_changed++;
        }
    }
    if (n_changed > 0) {
        head.count_listed();
    }
    return n_changed;
}

} // namespace

uint32_t kvl_recalled::n_pages() const {
    return uint32_t(pages.size() - size_t(std::count(pages.begin(), pages.end(), kvl_pool::NONE)));
}

uint32_t kvl_recalled::n() const {
    size_t n = 0;
    for (const kvl_recalled_unit & unit : units) {
        n += unit.pos.size();
    }
    return uint32_t(n);
}

void kvl_give_back(llama_kv_paged & kv, llama_seq_id seq_id, llama_pos behind) {
    kvl_sequence & seq = kv.seqs[seq_id];
    seq.loads.erase(std::remove_if(seq.loads.begin(), seq.loads.end(),
                                   [&](const std::shared_ptr<kvl_load> & load) {
                                       return load->from.end > behind;
                                   }),
                    seq.loads.end());
    for (uint32_t l = 0; l < seq.recalled.size(); l++) {
        for (uint32_t h = 0; h < seq.recalled[l].size(); h++) {
            kvl_recalled & of = seq.recalled[l][h];
            const auto gone = std::partition(of.units.begin(), of.units.end(), [&](const kvl_recalled_unit & unit) {
                return seq.archive.units[unit.unit].end <= behind;
            });
            show_copies(seq.heads[l][h], {gone, of.units.end()}, true);
            drop(kv.layers[l], of, gone);
        }
    }
}

void kvl_see_all(llama_kv_paged & kv, llama_seq_id seq_id) {
    kvl_sequence & seq = kv.seqs[seq_id];
    for (uint32_t l = 0; l < kv.n_open; l++) {
        for (uint32_t h = 0; h < kv.layers[l].n_head_kv; h++) {
            seq.heads[l][h].see_all();
            if (!seq.recalled.empty()) {
                show_copies(seq.heads[l][h], seq.recalled[l][h].units, false);
            }
        }
    }
}

// Gives the heads that want it, and have pages for it, a unit that was read.
static void install(llama_kv_paged & kv, kvl_sequence & seq, const kvl_load & load,
                    const std::vector<std::vector<uint8_t>> & wanted) {
    const kvl_layer & layer = kv.layers[load.layer];
    const kvl_pool & pool = *layer.pool;
    for (uint32_t h = 0; h < layer.n_head_kv; h++) {
        kvl_recalled & of = seq.recalled[load.layer][h];
        const bool there = std::any_of(of.units.begin(), of.units.end(), [&](const kvl_recalled_unit & unit) {
            return unit.unit == load.unit;
        });
        kvl_recalled_unit unit;
        unit.unit = load.unit;
        if (there || load.unit >= wanted[h].size() || !wanted[h][load.unit]) {
            continue;
        }
        unit.pos = missing(seq.heads[load.layer][h], load.from);
        if (unit.pos.empty()) {
            continue;
        }
        if (!take_rows(kv, layer, of, unit)) {
            continue;
        }
        for (size_t t = 0; !load.rows.bytes.empty() && t < unit.pos.size(); t++) {
            const auto token = uint32_t(unit.pos[t] - load.from.begin);
            const uint64_t row = of.row(unit.rows[t]);
            memcpy(pool.host_at(pool.k_at(row)), load.rows.k(layer, h, token), pool.k_bytes);
            if (pool.v_bytes > 0) {
                memcpy(pool.host_at(pool.v_at(row)), load.rows.v(layer, h, token), pool.v_bytes);
            }
        }
        of.units.push_back(std::move(unit));
    }
}

void kvl_bring_back(llama_kv_paged & kv, llama_seq_id seq_id,
                    const std::vector<std::vector<std::vector<uint8_t>>> & wanted, bool now,
                    kvl_retrieval_stats & out) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_archive & archive = seq.archive;
    kvl_flush_archive(seq);
    if (seq.recalled.empty()) {
        for (uint32_t l = 0; l < kv.n_open; l++) {
            seq.recalled.emplace_back(kv.layers[l].n_head_kv);
        }
    }
    const auto take_in = [&] {
        kv.readers().wait(seq.loads);
        for (const std::shared_ptr<kvl_load> & load : seq.loads) {
            if (!load->why.empty()) { // it is not tried again
                archive.lose(load->unit, load->why);
                continue;
            }
            install(kv, seq, *load, wanted[load->layer]);
            out.read_bytes += load->rows.bytes.size();
        }
        seq.loads.clear();
    };
    // what is no longer wanted goes, and what is more of it missing than was
    for (uint32_t l = 0; l < kv.n_open; l++) {
        for (uint32_t h = 0; h < kv.layers[l].n_head_kv; h++) {
            kvl_recalled & of = seq.recalled[l][h];
            const std::vector<uint8_t> & want = wanted[l][h];
            const auto gone = std::partition(of.units.begin(), of.units.end(), [&](const kvl_recalled_unit & unit) {
                return unit.unit < want.size() && want[unit.unit] && archive.units[unit.unit].file &&
                       unit.pos == missing(seq.heads[l][h], archive.units[unit.unit]);
            });
            drop(kv.layers[l], of, gone);
        }
    }
    take_in(); // what was begun a token ago
    double n_missed = 0, n_recalled = 0, n_hidden = 0, n_loaded = 0;
    for (uint32_t l = 0; l < kv.n_open; l++) {
        std::vector<uint8_t> begun(archive.units.size(), 0);
        for (uint32_t h = 0; h < kv.layers[l].n_head_kv; h++) {
            const std::vector<uint8_t> & want = wanted[l][h];
            std::vector<uint8_t> have(want.size(), 0);
            for (const kvl_recalled_unit & unit : seq.recalled[l][h].units) {
                have[unit.unit] = 1;
            }
            for (size_t u = 0; u < std::min(want.size(), archive.units.size()); u++) {
                if (want[u] && !have[u] && !begun[u] && archive.units[u].file &&
                    !missing(seq.heads[l][h], archive.units[u]).empty()) {
                    begun[u] = 1;
                    n_loaded += double(archive.units[u].end - archive.units[u].begin);
                    seq.loads.push_back(std::make_shared<kvl_load>());
                    kvl_load & load = *seq.loads.back();
                    load.layer = l;
                    load.unit = u;
                    load.from = archive.units[u];
                    load.format = archive.format;
                    kv.readers().start(seq.loads.back());
                }
            }
        }
    }
    if (now) {
        take_in();
    }
    for (uint32_t l = 0; l < kv.n_open; l++) {
        const double share = 1.0 / kv.layers[l].n_head_kv;
        for (uint32_t h = 0; h < kv.layers[l].n_head_kv; h++) {
            kvl_recalled & of = seq.recalled[l][h];
            std::vector<uint8_t> have(wanted[l][h].size(), 0);
            for (const kvl_recalled_unit & unit : of.units) {
                have[unit.unit] = 1;
            }
            for (size_t u = 0; u < std::min(have.size(), archive.units.size()); u++) {
                if (wanted[l][h][u] && !have[u]) {
                    n_missed += double(missing(seq.heads[l][h], archive.units[u]).size()) * share;
                }
            }
            n_recalled += of.n() * share;
            n_hidden += show_copies(seq.heads[l][h], of.units, false) * share;
        }
    }
    out.n_recalled = float(n_recalled / kv.n_open);
    out.n_read = float((n_recalled - n_hidden) / kv.n_open);
    out.n_loaded = float(n_loaded / kv.n_open);
    out.n_missed = float(n_missed / kv.n_open);
    kv.note_peak();
}
