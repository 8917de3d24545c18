// What is measured of stored keys and values: their mean, which demoted keys lack, and norms.

#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>
#include <cmath>

int32_t llama_kv_paged::set_mu(llama_seq_id seq_id, uint32_t layer_id, const float * mu) {
    for (const kvl_head & head : seqs[seq_id].heads[layer_id]) {
        if (!head.plain()) {
            return kvl_fail(KVL_ERR_ARGUMENT,
                            "slots of the layer are stored without the mean of the keys that is set now");
        }
    }
    const kvl_layer & layer = layers[layer_id];
    if (!std::all_of(mu, mu + size_t(layer.n_head_kv) * layer.pool->d_k, [](float x) {
            return std::isfinite(x);
        })) {
        return kvl_fail(KVL_ERR_ARGUMENT, "the mean of the keys holds values that are no numbers");
    }
    std::vector<float> & to = seqs[seq_id].mu[layer_id];
    const uint32_t d_k = layer.pool->d_k;
    to.assign(mu, mu + size_t(layer.n_head_kv) * d_k);
    for (uint32_t h = 0; params.rotate && h < layer.n_head_kv; h++) {
        rotate_row(to.data() + h * d_k, d_k);
    }
    return KVL_OK;
}

int32_t llama_kv_paged::centre(llama_seq_id seq_id, uint32_t layer_id, llama_pos p0, llama_pos p1, int32_t n_least,
                               int n_threads) {
    kvl_sequence & seq = seqs[seq_id];
    const std::vector<kvl_head> & heads = seq.heads[layer_id];
    const uint32_t d_k = layers[layer_id].pool->d_k;
    std::vector<float> mean(heads.size() * d_k, 0.0f);
    std::vector<int32_t> counts(heads.size(), 0);
    std::vector<float> rows(heads.size() * d_k);
    if (!seq.mu[layer_id].empty()) {
        return n_least;
    }
    kvl_parallel_for(int(heads.size()), n_threads, [&](int h) {
        const kvl_head & head = heads[size_t(h)];
        float * sum = mean.data() + size_t(h) * d_k;
        float * key = rows.data() + size_t(h) * d_k;
        for (uint32_t slot = head.f16_begin(); slot < head.n(); slot++) {
            if (head.pos[slot] < p0 || head.pos[slot] >= p1) {
                continue;
            }
            counts[size_t(h)]++;
            if (no_alloc()) {
                continue;
            }
            read_slot(seq_id, layer_id, uint32_t(h), slot, key, nullptr);
            for (uint32_t c = 0; c < d_k; c++) {
                sum[c] += key[c];
            }
        }
        for (uint32_t c = 0; c < d_k; c++) {
            sum[c] /= float(std::max(counts[size_t(h)], 1));
        }
    });
    const int32_t most = *std::max_element(counts.begin(), counts.end());
    if (most < n_least) {
        return most;
    }
    // keys lie there rotated, as set_mu wants to make them
    for (uint32_t h = 0; params.rotate && h < heads.size(); h++) {
        rotate_row(mean.data() + h * d_k, d_k);
    }
    const int32_t rc = set_mu(seq_id, layer_id, mean.data());
    return rc == KVL_OK ? most : rc;
}

void llama_kv_paged::value_norms(llama_seq_id seq_id, uint32_t layer_id, int n_threads, float * out) const {
    const std::vector<kvl_head> & heads = seqs[seq_id].heads[layer_id];
    const kvl_pool & pool = *layers[layer_id].pool;
    const uint32_t d_v = pool.d_v;
    std::vector<float *> to;
    std::vector<std::vector<float>> norms;
    for (const kvl_head & head : heads) {
        to.push_back(out);
        norms.emplace_back(head.n());
        out += head.held();
    }
    // a page at a time: from an accelerator every read costs the same
    const size_t page = size_t(KVL_PAGE_SLOTS) * d_v;
    std::vector<float> rows(heads.size() * page);
    kvl_parallel_for(int(heads.size()), pool.is_host() ? n_threads : 1, [&](int i) {
        const uint32_t h = uint32_t(i);
        const kvl_head & head = heads[h];
        float * values = rows.data() + h * page;
        for (uint32_t first = 0; first < head.n(); first += KVL_PAGE_SLOTS) {
            const uint32_t n = std::min<uint32_t>(head.n() - first, KVL_PAGE_SLOTS);
            if (head.format(first) == KVL_FORMAT_F16) {
                pool.read_rows(head.row(first), n, nullptr, values);
            }
            for (uint32_t j = 0; j < n; j++) {
                float * value = values + j * d_v;
                if (head.format(first) != KVL_FORMAT_F16) {
                    read_slot(seq_id, layer_id, h, first + j, nullptr, value);
                }
                float sum = 0.0f;
                for (uint32_t c = 0; c < d_v; c++) {
                    sum += value[c] * value[c];
                }
                norms[h][first + j] = sqrtf(sum);
            }
        }
        float * next = to[h];
        for (const uint32_t slot : head.order()) {
            *next++ = norms[h][slot];
        }
    });
}
