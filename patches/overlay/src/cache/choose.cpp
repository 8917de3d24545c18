// What the next token reads: its sinks, the newest tokens, the unit that is open, and the units whose keys answer its
// query best. SentenceKV (arXiv 2504.00970) scores sentences by their mean keys, Quest (arXiv 2406.10774) pages by the
// bounds of theirs.

#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

// Of one layer.
class chooser {
  public:
    chooser(llama_kv_paged & kv, llama_seq_id seq_id, uint32_t l, const kvl_retrieval & params)
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

// The last n remembered queries of a layer, [n][n_head][d_k].
std::vector<float> last_queries(const kvl_layer & layer, const std::vector<int32_t> & rows, size_t n) {
    const size_t width = size_t(layer.queries->ne[0]);
    std::vector<float> out(n * width);
    for (size_t i = 0; i < n; i++) {
        ggml_backend_tensor_get(layer.queries, out.data() + i * width,
                                size_t(rows[rows.size() - n + i]) * layer.queries->nb[1], width * sizeof(float));
    }
    return out;
}

// Adds the last n remembered queries of a layer to a sum, [n_head][d_k].
void add_queries(const kvl_layer & layer, const std::vector<int32_t> & rows, size_t n, std::vector<float> & sum) {
    if (n == 0) {
        return;
    }
    const size_t width = size_t(layer.queries->ne[0]);
    std::vector<float> query(width);
    sum.resize(width, 0.0f);
    for (size_t i = rows.size() - n; i < rows.size(); i++) {
        ggml_backend_tensor_get(layer.queries, query.data(), size_t(rows[i]) * layer.queries->nb[1],
                                width * sizeof(float));
        for (size_t c = 0; c < width; c++) {
            sum[c] += query[c];
        }
    }
}

double held(const std::vector<kvl_head> & heads) {
    double n = 0;
    for (const kvl_head & head : heads) {
        n += head.held();
    }
    return n / double(heads.size());
}

} // namespace

void kvl_choose(llama_kv_paged & kv, llama_seq_id seq_id, const kvl_retrieval & params, int n_threads,
                kvl_retrieval_stats & out) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_index & index = seq.index;
    kvl_retrieval_stats recalled = {};
    const std::vector<int32_t> rows = kv.window_rows(seq_id);
    const size_t n_open = size_t(seq.n_seen - index.open_begin());
    if (params.recall == KVL_RECALL_TURN) {
        index.chosen.clear();
        index.chosen_at = -1;
    }
    const bool before = !index.chosen.empty();
    index.chosen.resize(kv.n_open);
    // what the open unit asks; at its beginning that is not clear yet, and what was chosen before stays
    const bool begins = params.n_queries == 0 && n_open < 2;
    size_t n = params.n_queries > 0 ? size_t(params.n_queries) : begins ? KVL_PAGE_SLOTS : n_open;
    n = std::min(n, rows.size());
    // of the same unit as in the last step, one is added to those that were added up
    const bool goes_on = index.n_asked > 0 && params.n_queries == 0 && n == n_open && index.n_asked + 1 == n;
    index.asked.resize(kv.n_open);
    const bool full = n_open < size_t(params.full_below);
    index.choices.resize(kv.n_open);
    // one token after the last choice, and nothing else: what was chosen then may still do
    const bool next = params.drift > 0 && index.chosen_at >= 0 && seq.n_seen == index.chosen_at + 1 && !full;
    const bool turn = params.recall == KVL_RECALL_TURN;
    std::vector<std::vector<std::string>> lost(kv.n_open); // [layer][unit], why
    std::vector<uint64_t> read(kv.n_open, 0);
    if (turn) {
        kvl_flush_archive(seq);
    }
    const bool much = turn || index.ends.size() * kv.n_open > 8192;
    kvl_parallel_for(int(kv.n_open), kv.all_host() && much ? n_threads : 1, [&](int i) {
        const auto l = uint32_t(i);
        kvl_choice & choice = index.choices[l];
        if (full || l < uint32_t(params.dense_layers)) {
            choice = {};
            for (kvl_head & head : seq.heads[l]) {
                head.see_all();
            }
            choice.read = held(seq.heads[l]);
            return;
        }
        if (params.recall == KVL_RECALL_TURN) {
            chooser c(kv, seq_id, l, params);
            std::vector<std::vector<float>> attention;
            read[l] = kvl_archive_scores(kv, seq.archive, l, last_queries(kv.layers[l], rows, n), attention, lost[l]);
            c.run_recall(attention);
            choice = {n, c.n_wanted, 0, held(seq.heads[l])};
            return;
        }
        std::vector<float> & sum = index.asked[l];
        if (!goes_on) {
            sum.assign(size_t(kv.layers[l].n_head) * kv.layers[l].pool->d_k, 0.0f);
        }
        add_queries(kv.layers[l], rows, goes_on ? 1 : n, sum);
        if (next && (begins || (goes_on && double(n) < double(choice.n_queries) * (1 + params.drift)))) {
            choice.kept = choice.wanted;
            choice.read++;
            return;
        }
        chooser c(kv, seq_id, l, params);
        c.run(sum, begins && before);
        choice = {n, c.n_wanted, c.n_kept, c.n_read};
    });
    for (const std::vector<std::string> & of_layer : lost) {
        for (size_t u = 0; u < of_layer.size(); u++) {
            if (!of_layer[u].empty()) {
                seq.archive.lose(u, of_layer[u]);
            }
        }
    }
    if (params.recall != KVL_RECALL_OFF) {
        std::vector<std::vector<std::vector<uint8_t>>> wanted(kv.n_open);
        for (uint32_t l = 0; l < kv.n_open; l++) {
            for (uint32_t h = 0; h < kv.layers[l].n_head_kv; h++) {
                const bool none = l >= index.chosen.size() || index.chosen[l].empty();
                wanted[l].push_back(none ? std::vector<uint8_t>() : index.chosen[l][params.per_head ? h : 0]);
            }
        }
        kvl_bring_back(kv, seq_id, wanted, recalled);
    }
    index.chosen_at = seq.n_seen;
    index.n_asked = full || params.n_queries > 0 || begins ? 0 : n;
    const auto mean = [&](double kvl_choice::*what) {
        double sum = 0;
        for (const kvl_choice & choice : index.choices) {
            sum += choice.*what;
        }
        return float(sum / double(std::max(kv.n_open, 1u)));
    };
    if (params.recall == KVL_RECALL_TURN) {
        kvl_see_all(kv, seq_id);
        index.chosen_at = -1;
    }
    out = recalled;
    out.read_bytes = std::accumulate(read.begin(), read.end(), out.read_bytes);
    out.n_units = int64_t(index.ends.size());
    out.index_bytes = index.bytes();
    out.n_read = mean(&kvl_choice::read) + recalled.n_read;
    out.n_wanted = mean(&kvl_choice::wanted);
    out.n_kept = mean(&kvl_choice::kept);
    out.full = full ? 1 : 0;
}
