// Which units a layer reads or recalls: scores, and the best of them that fit.

#pragma once

#include "cache/memory.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

// Of one layer and sequence; kvl_index::chosen has a set per KV head, or one for all.
class kvl_chooser {
  public:
    kvl_chooser(llama_kv_paged & kv, llama_seq_id seq_id, uint32_t l, const kvl_retrieval & params)
        : kv(kv), seq(kv.seqs[seq_id]), layer(kv.layers[l]), params(params), index(seq.index.heads[l]),
          ends(seq.index.ends), chosen(seq.index.chosen[l]), heads(seq.heads[l]),
          first(std::min(params.sink, seq.n_seen)), last(std::max(first, seq.n_seen + 1 - params.recent)) {}

    // what is to be recalled, beside all that is held: the units with most of the attention per
    // token that is missing, [KV head][unit]
    void run_recall(const std::vector<std::vector<float>> & attention) {
        const uint32_t n_sets = params.per_head ? layer.n_head_kv : 1;
        chosen.assign(n_sets, std::vector<uint8_t>(ends.size(), 0));
        for (uint32_t s = 0; s < n_sets; s++) {
            size.assign(ends.size(), 0.0f);
            for (uint32_t h = first_head(s); h < first_head(s) + n_heads(); h++) {
                for (size_t u = 0; u < ends.size(); u++) {
                    size[u] += archived(u) ? float(missing(h, u)) / float(n_heads()) : 0.0f;
                }
            }
            scores.assign(ends.size(), 0.0f);
            for (uint32_t h = first_head(s); h < first_head(s) + n_heads(); h++) {
                for (size_t u = 0; u < attention[h].size(); u++) {
                    scores[u] += size[u] > 0 ? attention[h][u] / size[u] : 0.0f;
                }
            }
            for (size_t u = 0; u < ends.size(); u++) {
                size[u] = scores[u] > 0 ? size[u] : 0.0f; // nobody asks for it
            }
            take(s);
        }
    }
    // what gets most of the attention per token, [n_head][stride] of the slots by position
    void run_attention(const std::vector<float> & attention, size_t stride) {
        const uint32_t n_sets = params.per_head ? layer.n_head_kv : 1;
        chosen.assign(n_sets, std::vector<uint8_t>(ends.size(), 0));
        for (uint32_t s = 0; s < n_sets; s++) {
            measure(s);
            part = -1;
            if (total <= room()) {
                chosen[s].assign(ends.size(), 1);
                show(s);
                continue;
            }
            scores.assign(ends.size(), 0.0f);
            for (uint32_t h = first_head(s); h < first_head(s) + n_heads(); h++) {
                const std::vector<uint32_t> order = heads[h].order();
                size_t u = 0;
                for (size_t i = 0; i < order.size(); i++) {
                    const llama_pos pos = heads[h].pos[order[i]];
                    while (u < ends.size() && ends[u] <= pos) {
                        u++;
                    }
                    for (uint32_t g = 0; u < ends.size() && pos >= first && pos < last && g < layer.group(); g++) {
                        scores[u] += attention[(h * layer.group() + g) * stride + i] / std::max(size[u], 1.0f);
                    }
                }
            }
            take(s);
            show(s);
        }
    }
    // the sum of some queries, [n_head][d_k]; stay: what was chosen last stays if it still fits
    void run(const std::vector<float> & queries, bool stay) {
        const uint32_t n_sets = params.per_head ? layer.n_head_kv : 1;
        chosen.resize(n_sets);
        const std::vector<float> sums = summed(queries);
        for (uint32_t s = 0; s < n_sets; s++) {
            measure(s);
            part = -1;
            chosen[s].resize(ends.size(), 0);
            if (total <= room() || ends.empty()) {
                chosen[s].assign(ends.size(), 1);
            } else if (!stay || chosen_size(s) == 0 || chosen_size(s) > room()) {
                score(s, sums);
                take(s);
            } else {
                n_wanted += chosen_size(s) * part_of_heads();
                n_kept += chosen_size(s) * part_of_heads();
            }
            show(s);
        }
    }

    double n_wanted = 0, n_kept = 0, n_read = 0; // tokens per head

  private:
    double room() const {
        return params.recall == KVL_RECALL_TURN ? params.budget
                                                : std::max(params.budget - params.sink - params.recent, 0);
    }
    // whether a unit can be read from the archive
    bool archived(size_t u) const {
        return params.recall != KVL_RECALL_OFF && u < seq.archive.units.size() && seq.archive.units[u].file;
    }
    // tokens of a unit that a head does not hold in f16
    uint32_t missing(uint32_t h, size_t u) const {
        const std::vector<llama_pos> & pos = heads[h].pos;
        const auto f16 = pos.begin() + heads[h].f16_begin();
        const auto first = std::lower_bound(f16, pos.end(), begin_of(u));
        return uint32_t(ends[u] - begin_of(u)) - uint32_t(std::lower_bound(first, pos.end(), ends[u]) - first);
    }
    llama_pos begin_of(size_t unit) const { return unit == 0 ? 0 : ends[unit - 1]; }
    uint32_t first_head(uint32_t set) const { return params.per_head ? set : 0; }
    uint32_t n_heads() const { return params.per_head ? 1 : layer.n_head_kv; }

    // of all heads, those that read this set
    double part_of_heads() const { return double(n_heads()) / layer.n_head_kv; }
    double chosen_size(uint32_t set) const {
        double n = 0;
        for (size_t u = 0; u < ends.size(); u++) {
            n += chosen[set][u] ? size[u] : 0;
        }
        return n;
    }

    // tokens of every unit, per head, that are read only if it is chosen
    void measure(uint32_t set) {
        size.assign(ends.size(), 0.0f);
        total = 0;
        for (size_t u = 0; u < ends.size(); u++) {
            const llama_pos p0 = std::max(begin_of(u), first);
            const llama_pos p1 = std::min(ends[u], last);
            uint64_t held = 0;
            for (uint32_t h = first_head(set); h < first_head(set) + n_heads() && p0 < p1; h++) {
                const uint32_t all = archived(u) ? uint32_t(ends[u] - begin_of(u)) : index[h].held[u];
                // what lies in it of sink and recent does not count: where nothing is missing, by the positions
                const bool cut = p1 - p0 < ends[u] - begin_of(u);
                held += !cut ? all : all == uint32_t(ends[u] - begin_of(u)) ? uint32_t(p1 - p0) : count(h, p0, p1);
            }
            size[u] = float(held) / float(n_heads());
            total += size[u];
        }
    }

    // slots of a head at the positions p0 <= p < p1
    uint32_t count(uint32_t h, llama_pos p0, llama_pos p1) const {
        const std::vector<llama_pos> & pos = heads[h].pos;
        const auto f16 = pos.begin() + heads[h].f16_begin(); // from here on in order
        const auto in = std::count_if(pos.begin(), f16, [&](llama_pos p) {
            return p >= p0 && p < p1;
        });
        return uint32_t(in + (std::lower_bound(f16, pos.end(), p1) - std::lower_bound(f16, pos.end(), p0)));
    }

    // what the summaries are multiplied with, per KV head: the queries of its group, added up
    std::vector<float> summed(const std::vector<float> & queries) const {
        const size_t d = layer.pool->d_k;
        const bool bounds = params.summary == KVL_SUMMARY_BOUNDS;
        const size_t width = bounds ? 2 * d : d;
        std::vector<float> out(layer.n_head_kv * width, 0.0f);
        for (size_t g = 0; g < layer.n_head; g++) {
            float * to = out.data() + g / layer.group() * width;
            for (size_t c = 0; c < d; c++) {
                const float q = queries[g * d + c];
                if (bounds) { // the largest product that a key within the bounds can have
                    to[c] += std::max(q, 0.0f);
                    to[d + c] += std::min(q, 0.0f);
                } else {
                    to[c] += q;
                }
            }
        }
        return out;
    }

    void score(uint32_t set, const std::vector<float> & sums) {
        const size_t n = ends.size();
        const size_t width = sums.size() / layer.n_head_kv;
        scores.assign(n, 0.0f);
        std::vector<float> of_head(n);
        for (uint32_t h = first_head(set); h < first_head(set) + n_heads(); h++) {
            if (params.summary == KVL_SUMMARY_NONE) {
                std::iota(of_head.begin(), of_head.end(), 0.0f); // the newest
            } else {
                kv.rows.dot(index[h].rows.data(), int64_t(n), int(width), sums.data() + h * width, of_head.data());
            }
            // heads on one scale: less their mean over the units, in units of their deviation
            double sum = 0, square = 0;
            for (const float x : of_head) {
                sum += x;
                square += double(x) * x;
            }
            const double mean = sum / double(n);
            const double deviation = std::sqrt(std::max(square / double(n) - mean * mean, 0.0));
            for (size_t u = 0; u < n && deviation > 0; u++) {
                scores[u] += float((of_head[u] - mean) / deviation);
            }
        }
        for (size_t u = 0; u < n; u++) {
            scores[u] += chosen[set][u] ? params.hysteresis * float(n_heads()) : 0.0f;
        }
    }

    // the best that fit, in turn; of equal ones the first
    void take(uint32_t set) {
        std::vector<uint32_t> left;
        for (uint32_t u = 0; u < ends.size(); u++) {
            if (size[u] > 0) {
                left.push_back(u);
            }
        }
        const auto worse = [&](uint32_t a, uint32_t b) {
            return scores[a] != scores[b] ? scores[a] < scores[b] : a > b;
        };
        std::make_heap(left.begin(), left.end(), worse);
        std::vector<uint8_t> now(ends.size(), 0);
        double free = room();
        while (!left.empty() && free >= params.min_unit) {
            std::pop_heap(left.begin(), left.end(), worse);
            const uint32_t u = left.back();
            left.pop_back();
            if (size[u] > free) {
                if (params.partial) {
                    part = int64_t(u);
                    n_part = llama_pos(free);
                    break;
                }
                continue;
            }
            free -= size[u];
            now[u] = 1;
            n_kept += chosen[set][u] ? size[u] * part_of_heads() : 0;
            n_wanted += size[u] * part_of_heads();
        }
        chosen[set] = std::move(now);
    }

    void show(uint32_t set) {
        std::vector<uint32_t> bits(size_t(seq.n_seen) / 32 + 2, 0);
        const auto see = [&](llama_pos p0, llama_pos p1) {
            for (llama_pos p = p0; p < std::min(p1, seq.n_seen);) {
                const llama_pos next = std::min({(p / 32 + 1) * 32, p1, seq.n_seen});
                const uint32_t n = uint32_t(next - p);
                bits[size_t(p) / 32] |= (n < 32 ? (1u << n) - 1 : UINT32_MAX) << p % 32;
                p = next;
            }
        };
        see(0, first);
        see(last, seq.n_seen);
        see(seq.index.open_begin(), seq.n_seen);
        for (size_t u = 0; u < ends.size(); u++) {
            if (chosen[set][u]) {
                see(begin_of(u), ends[u]);
            } else if (int64_t(u) == part) {
                const llama_pos p0 = std::max(begin_of(u), first);
                see(p0, std::min(p0 + n_part, ends[u]));
            }
        }
        for (uint32_t h = first_head(set); h < first_head(set) + n_heads(); h++) {
            n_read += double(heads[h].see_positions(bits)) / layer.n_head_kv;
        }
    }

    llama_kv_paged & kv;
    kvl_sequence & seq;
    const kvl_layer & layer;
    const kvl_retrieval & params;
    const std::vector<kvl_head_index> & index;
    const std::vector<llama_pos> & ends;
    std::vector<std::vector<uint8_t>> & chosen;
    std::vector<kvl_head> & heads;
    const llama_pos first, last; // positions before and from these on are always read

    std::vector<float> size, scores;
    double total = 0;
    int64_t part = -1; // the unit of which only n_part tokens are read
    llama_pos n_part = 0;
};
