// Which units a question asks for: its own attention over all that is on disk.

#include "cache/archive.h"
#include "cache/memory.h"

#include <algorithm>
#include <cmath>

uint64_t kvl_archive_scores(const llama_kv_paged & kv, const kvl_archive & archive, uint32_t l,
                            const std::vector<float> & queries, std::vector<std::vector<float>> & out,
                            std::vector<std::string> & why) {
    const kvl_layer & layer = kv.layers[l];
    const size_t d = layer.pool->d_k;
    const size_t n_rows = queries.size() / d; // [query][query head]
    const size_t n_units = archive.units.size();
    // per row and unit the logarithm of the sum of the exponents
    std::vector<float> sums(n_rows * n_units, -INFINITY);
    std::vector<float> logits;
    kvl_archive_rows keys;
    uint64_t n_bytes = 0;
    why.assign(n_units, "");
    for (size_t u = 0; u < n_units; u++) {
        if (!archive.units[u].file || !kvl_read_archived(kv, l, archive.units[u], archive.format, true, keys, why[u])) {
            continue;
        }
        n_bytes += keys.bytes.size();
        logits.resize(keys.n);
        for (size_t r = 0; r < n_rows; r++) {
            const auto head = uint32_t(r % layer.n_head / layer.group());
            kv.rows.dot(reinterpret_cast<const uint16_t *>(keys.k(layer, head, 0)), keys.n, int(d),
                        queries.data() + r * d, logits.data());
            float most = -INFINITY;
            for (float & z : logits) {
                z *= layer.kq_scale;
                z = layer.soft_cap > 0.0f ? layer.soft_cap * tanhf(z / layer.soft_cap) : z;
                most = std::max(most, z);
            }
            float sum = 0.0f;
            for (const float z : logits) {
                sum += expf(z - most);
            }
            sums[r * n_units + u] = most + logf(sum);
        }
    }
    out.assign(layer.n_head_kv, std::vector<float>(n_units, 0.0f));
    for (size_t r = 0; r < n_rows && n_units > 0; r++) {
        const float * of = sums.data() + r * n_units;
        const float most = *std::max_element(of, of + n_units);
        double total = 0;
        for (size_t u = 0; u < n_units && most > -INFINITY; u++) {
            total += exp(double(of[u] - most));
        }
        std::vector<float> & to = out[r % layer.n_head / layer.group()];
        for (size_t u = 0; u < n_units && total > 0; u++) {
            to[u] += float(exp(double(of[u] - most)) / total);
        }
    }
    return n_bytes;
}
