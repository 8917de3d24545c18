// What the next token reads: its sinks, the newest tokens, the unit that is open, and the units whose keys answer its
// query best. SentenceKV (arXiv 2504.00970) scores sentences by their mean keys, Quest (arXiv 2406.10774) pages by the
// bounds of theirs.

#include "cache/chooser.h"
#include "cache/parallel.h"
#include "graph/scores.h"

#include <numeric>
#include <stdexcept>

namespace {

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

// tokens that a head holds, on average
double held(const std::vector<kvl_head> & heads) {
    double n = 0;
    for (const kvl_head & head : heads) {
        n += head.held();
    }
    return n / double(heads.size());
}

// Let a layer read what gets most of the attention of the newest queries, or what it read, and the token that was
// added.
void attend(llama_kv_paged & kv, llama_seq_id seq_id, uint32_t l, const kvl_retrieval & params, bool held_on,
            int n_threads) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_choice & choice = seq.index.choices[l];
    if (l < uint32_t(params.dense_layers)) {
        for (kvl_head & head : seq.heads[l]) {
            head.see_all();
        }
        choice = {0, 0, 0, held(seq.heads[l])};
        return;
    }
    if (held_on) {
        choice.kept = choice.wanted;
        choice.read++;
        return;
    }
    size_t stride = 1;
    for (const kvl_head & head : seq.heads[l]) {
        stride = std::max<size_t>(stride, head.held());
    }
    std::vector<float> attention(stride * kv.layers[l].n_head);
    const int32_t n =
        kvl_compute_window_scores(kv, seq_id, l, params.n_queries, false, n_threads, attention.data(), int64_t(stride));
    if (n < 0) {
        throw std::runtime_error(kvl_last_error());
    }
    kvl_chooser c(kv, seq_id, l, params);
    c.run_attention(attention, stride);
    choice = {size_t(n), c.n_wanted, c.n_kept, c.n_read};
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
    const bool attends = params.summary == KVL_SUMMARY_ATTENTION && !turn && !full;
    const bool held_on = attends && before && index.chosen_at >= 0 && seq.n_seen == index.chosen_at + 1 &&
                         (params.every == 0 || seq.n_seen - index.attended_at < params.every);
    std::vector<std::vector<std::string>> lost(kv.n_open); // [layer][unit], why
    std::vector<uint64_t> read(kv.n_open, 0);
    if (turn) {
        kvl_flush_archive(seq);
    }
    if (attends) { // by graphs, which have threads of their own
        index.attended_at = held_on ? index.attended_at : seq.n_seen;
        for (uint32_t l = 0; l < kv.n_open; l++) {
            attend(kv, seq_id, l, params, held_on, n_threads);
        }
    }
    const bool much = turn || index.ends.size() * kv.n_open > 8192;
    kvl_parallel_for(attends ? 0 : int(kv.n_open), kv.all_host() && much ? n_threads : 1, [&](int i) {
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
            kvl_chooser c(kv, seq_id, l, params);
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
        kvl_chooser c(kv, seq_id, l, params);
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
        kvl_bring_back(kv, seq_id, wanted, turn, recalled);
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
