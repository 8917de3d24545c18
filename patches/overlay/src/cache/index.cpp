// The index of a sequence: units are closed, and keys taken up into what stands for them.

#include "cache/index.h"

#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>
#include <cmath>

void kvl_index::clear() {
    heads.clear();
    chosen.clear();
    chosen_at = attended_at = -1;
    n_asked = 0;
    n_indexed = 0;
    evicted = false;
}

void kvl_index::cut(llama_pos n_tokens, bool archived) {
    while (!ends.empty() && (ends.back() > n_tokens || (ends.back() == n_tokens && !archived))) {
        ends.pop_back();
    }
    for (auto & layer : heads) {
        for (kvl_head_index & head : layer) {
            const size_t size = head.held.empty() ? 0 : head.rows.size() / head.held.size();
            const size_t n = std::min(head.held.size(), ends.size());
            head.rows.resize(n * size);
            head.held.resize(n);
            head.open.clear();
            head.n_open = 0;
        }
    }
    for (auto & layer : chosen) {
        for (std::vector<uint8_t> & units : layer) {
            units.resize(std::min(units.size(), ends.size()));
        }
    }
    n_asked = 0;
    chosen_at = attended_at = -1;
    n_indexed = std::min(n_indexed, open_begin());
}

uint64_t kvl_index::bytes() const {
    uint64_t n = ends.size() * sizeof(llama_pos);
    for (const auto & layer : heads) {
        for (const kvl_head_index & head : layer) {
            n += head.rows.size() * sizeof(ggml_fp16_t) + head.held.size() * sizeof(uint32_t) +
                 head.open.size() * sizeof(float);
        }
    }
    return n;
}

namespace {

// Values that stand for a unit.
size_t summary_size(int32_t summary, uint32_t d_k) {
    return summary == KVL_SUMMARY_BOUNDS ? 2 * size_t(d_k) : summary == KVL_SUMMARY_MEAN ? size_t(d_k) : 0;
}

class updater {
  public:
    updater(llama_kv_paged & kv, llama_seq_id seq, uint32_t layer, uint32_t head)
        : kv(kv), seq(seq), layer(layer), head(head), index(kv.seqs[seq].index), to(index.heads[layer][head]),
          d_k(kv.layers[layer].pool->d_k), slots(kv.seqs[seq].heads[layer][head]) {}

    void run() {
        // slots of positions that are not in it yet, by position; what is not f16 lies in no order
        std::vector<uint32_t> fresh;
        const uint32_t f16 = slots.f16_begin();
        const auto add = [&](uint32_t slot) {
            if (slots.pos[slot] >= index.n_indexed) {
                fresh.push_back(slot);
            }
        };
        for (uint32_t slot = 0; slot < f16; slot++) {
            add(slot);
        }
        const auto begin = std::lower_bound(slots.pos.begin() + f16, slots.pos.end(), index.n_indexed);
        for (auto slot = uint32_t(begin - slots.pos.begin()); slot < slots.n(); slot++) {
            add(slot);
        }
        if (f16 > 0) {
            std::sort(fresh.begin(), fresh.end(), [&](uint32_t a, uint32_t b) {
                return slots.pos[a] < slots.pos[b];
            });
        }
        if (summary_size(index.summary, d_k) == 0 || kv.no_alloc()) { // there are no keys to take up
            for (const uint32_t slot : fresh) {
                close_before(slots.pos[slot]);
                to.n_open++;
            }
        } else {
            kv.for_slots(seq, layer, head, fresh, true, [&](uint32_t slot, const float * key) {
                close_before(slots.pos[slot]);
                take_up(key);
            });
        }
        close_before(kv.seqs[seq].n_seen);
    }

    // count anew what is held
    void count() {
        std::fill(to.held.begin(), to.held.end(), 0);
        for (const llama_pos pos : slots.pos) {
            const auto unit = size_t(std::upper_bound(index.ends.begin(), index.ends.end(), pos) - index.ends.begin());
            if (pos != kvl_head::HOLE && unit < to.held.size()) {
                to.held[unit]++;
            }
        }
    }

  private:
    // units that end at or before a position are closed
    void close_before(llama_pos pos) {
        while (to.held.size() < index.ends.size() && index.ends[to.held.size()] <= pos) {
            const size_t size = summary_size(index.summary, d_k);
            const size_t at = to.rows.size();
            to.rows.resize(at + size);
            // of no keys: zero, not what is left of the unit before; in a model without weights keys are only counted
            if (to.n_open == 0 || to.open.size() < size) {
                to.open.assign(size, 0.0f);
            }
            if (index.summary == KVL_SUMMARY_MEAN) {
                for (float & x : to.open) {
                    x /= float(std::max(to.n_open, 1u));
                }
            }
            ggml_fp32_to_fp16_row(to.open.data(), to.rows.data() + at, int64_t(size));
            to.held.push_back(to.n_open);
            to.n_open = 0;
        }
    }

    void take_up(const float * key) {
        if (index.summary == KVL_SUMMARY_MEAN) {
            to.open.resize(d_k);
            if (to.n_open == 0) {
                std::fill(to.open.begin(), to.open.end(), 0.0f);
            }
            for (uint32_t c = 0; c < d_k; c++) {
                to.open[c] += key[c];
            }
        } else {
            to.open.resize(2 * size_t(d_k));
            if (to.n_open == 0) {
                std::fill_n(to.open.begin(), d_k, -INFINITY);
                std::fill_n(to.open.begin() + d_k, d_k, INFINITY);
            }
            for (uint32_t c = 0; c < d_k; c++) {
                to.open[c] = std::max(to.open[c], key[c]);
                to.open[d_k + c] = std::min(to.open[d_k + c], key[c]);
            }
        }
        to.n_open++;
    }

    llama_kv_paged & kv;
    const llama_seq_id seq;
    const uint32_t layer, head;
    kvl_index & index;
    kvl_head_index & to;
    const uint32_t d_k;
    const kvl_head & slots;
};

} // namespace

bool kvl_update_index(llama_kv_paged & kv, llama_seq_id seq_id, int32_t summary, const llama_pos * ends, int32_t n_ends,
                      int n_threads) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_index & index = seq.index;
    for (int32_t i = 0; i < n_ends; i++) {
        const llama_pos before = i > 0 ? ends[i - 1] : index.open_begin();
        if (ends[i] <= before || ends[i] >= seq.n_seen + (seq.archive.on() ? 1 : 0)) {
            kvl_set_error("a unit that ends at token " + std::to_string(ends[i]) +
                          " does not lie between the one before, "
                          "which ends at " +
                          std::to_string(before) + ", and the last of " + std::to_string(seq.n_seen) + " tokens");
            return false;
        }
    }
    if (index.summary != summary) {
        index.clear();
        index.summary = summary;
    }
    index.ends.insert(index.ends.end(), ends, ends + n_ends);
    index.n_asked = n_ends > 0 ? 0 : index.n_asked;
    if (index.heads.empty()) {
        for (uint32_t l = 0; l < kv.n_open; l++) {
            index.heads.emplace_back(kv.layers[l].n_head_kv);
        }
    }
    const bool on_host = kv.all_host();
    const bool much = seq.n_seen - index.n_indexed > 64 || index.evicted;
    try {
        kvl_parallel_for(int(kv.n_open), on_host && much ? n_threads : 1, [&](int l) {
            for (uint32_t h = 0; h < kv.layers[size_t(l)].n_head_kv; h++) {
                updater(kv, seq_id, uint32_t(l), h).run();
                if (index.evicted) {
                    updater(kv, seq_id, uint32_t(l), h).count();
                }
            }
        });
    } catch (...) {
        index.clear();
        throw;
    }
    index.n_indexed = seq.n_seen;
    index.evicted = false;
    kvl_archive_units(kv, seq_id, n_threads);
    return true;
}
