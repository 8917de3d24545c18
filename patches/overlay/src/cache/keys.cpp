// What is measured of stored keys and values: their mean, which demoted keys lack, and norms.

#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

void llama_kv_paged::for_slots(llama_seq_id seq_id, uint32_t layer_id, uint32_t h, const std::vector<uint32_t> & slots,
                               bool keys, const std::function<void(uint32_t, const float *)> & f) const {
    const kvl_layer & layer = layers[layer_id];
    const kvl_head & head = seqs[seq_id].heads[layer_id][h];
    const uint32_t d = keys ? layer.pool->d_k : layer.pool->d_v;
    const size_t step = layer.arena->is_host() ? 1 : 4096; // every read from an accelerator costs the same
    std::vector<float> x(std::min(step, slots.size()) * d);
    for (size_t i = 0; i < slots.size() && !no_alloc(); i += step) {
        const size_t n = std::min(step, slots.size() - i);
        if (step == 1) {
            read_slot(seq_id, layer_id, h, slots[i], keys ? x.data() : nullptr, keys ? nullptr : x.data());
        } else {
            std::vector<uint64_t> rows;
            for (size_t j = i; j < i + n; j++) {
                rows.push_back(head.row(slots[j]));
            }
            if (!layer.arena->read(rows, keys ? x.data() : nullptr, keys ? nullptr : x.data())) {
                throw std::runtime_error(kvl_last_error());
            }
        }
        for (size_t j = 0; j < n; j++) {
            f(slots[i + j], x.data() + j * d);
        }
    }
}

int32_t llama_kv_paged::set_mu(llama_seq_id seq_id, uint32_t layer_id, const float * mu) {
    if (layers[layer_id].latent()) {
        return kvl_fail(KVL_ERR_UNSUPPORTED, "keys that hold the values (MLA) are stored with their mean");
    }
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
    upload_mean(seq_id, layer_id);
    return KVL_OK;
}

void llama_kv_paged::upload_mean(llama_seq_id seq_id, uint32_t layer_id) const {
    const std::vector<float> & mean = seqs[seq_id].mu[layer_id];
    const kvl_layer & layer = layers[layer_id];
    if (!mean.empty() && !no_alloc()) {
        ggml_tensor * to = layer.arena->means;
        const uint32_t row = layer.arena->mean_row(uint32_t(seq_id), layer.first_head);
        ggml_backend_tensor_set(to, mean.data(), row * to->nb[1], mean.size() * sizeof(float));
    }
}

int32_t llama_kv_paged::centre(llama_seq_id seq_id, uint32_t layer_id, llama_pos p0, llama_pos p1, int32_t n_least,
                               int n_threads) {
    kvl_sequence & seq = seqs[seq_id];
    const std::vector<kvl_head> & heads = seq.heads[layer_id];
    const uint32_t d_k = layers[layer_id].pool->d_k;
    std::vector<float> mean(heads.size() * d_k, 0.0f);
    std::vector<int32_t> counts(heads.size(), 0);
    if (!seq.mu[layer_id].empty() || layers[layer_id].latent()) {
        return n_least;
    }
    kvl_parallel_for(int(heads.size()), layers[layer_id].arena->is_host() ? n_threads : 1, [&](int h) {
        const kvl_head & head = heads[size_t(h)];
        std::vector<uint32_t> slots;
        for (uint32_t slot = head.f16_begin(); slot < head.n(); slot++) {
            if (head.pos[slot] >= p0 && head.pos[slot] < p1) {
                slots.push_back(slot);
            }
        }
        counts[size_t(h)] = int32_t(slots.size());
        float * sum = mean.data() + size_t(h) * d_k;
        for_slots(seq_id, layer_id, uint32_t(h), slots, true, [&](uint32_t, const float * key) {
            for (uint32_t c = 0; c < d_k; c++) {
                sum[c] += key[c];
            }
        });
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
    std::vector<float *> to;
    for (const kvl_head & head : heads) {
        to.push_back(out);
        out += head.held();
    }
    kvl_parallel_for(int(heads.size()), layers[layer_id].arena->is_host() ? n_threads : 1, [&](int i) {
        const uint32_t h = uint32_t(i);
        float * next = to[h];
        for_slots(seq_id, layer_id, h, heads[h].order(), false, [&](uint32_t, const float * value) {
            float sum = 0.0f;
            for (uint32_t c = 0; c < layers[layer_id].d_value; c++) {
                sum += value[c] * value[c];
            }
            *next++ = sqrtf(sum);
        });
    });
}
