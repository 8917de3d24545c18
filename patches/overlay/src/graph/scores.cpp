// Window scores: by the page kernel in main memory, by stock operators over what lies on an accelerator.

#include "graph/scores.h"

#include "graph/graph.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// A scheduler over the backends that a graph over this layer's pages needs: their device and the CPU. nullptr: there is
// none.
ggml_backend_sched_ptr make_scheduler(llama_kv_paged & kv, kvl_arena & arena, int n_threads, size_t n_nodes) {
    std::vector<ggml_backend_t> backends;
    if (!arena.is_host()) {
        backends.push_back(arena.device_backend());
    }
    backends.push_back(kv.host_backend(n_threads));
    if (std::find(backends.begin(), backends.end(), nullptr) != backends.end()) {
        return nullptr;
    }
    return ggml_backend_sched_ptr(
        ggml_backend_sched_new(backends.data(), nullptr, int(backends.size()), n_nodes, false, true));
}

struct chunk {
    uint32_t h0, n_heads; // KV heads
    int64_t n_slots;      // longest head
};

std::vector<float> read_sinks(const kvl_layer & layer) {
    std::vector<float> out(layer.n_head);
    ggml_backend_tensor_get(layer.sinks, out.data(), 0, out.size() * sizeof(float));
    return out;
}

// Heads that fit the scratch bound together, at least one.
std::vector<chunk> split_heads(const std::vector<kvl_head> & heads, int64_t bytes_per_slot, int64_t bound) {
    std::vector<chunk> out;
    for (uint32_t h = 0; h < heads.size(); h++) {
        const int64_t n = heads[h].n();
        if (!out.empty()) {
            chunk & c = out.back();
            const int64_t n_max = std::max(c.n_slots, n);
            if (n_max * (c.n_heads + 1) * bytes_per_slot <= bound) {
                c.n_heads++;
                c.n_slots = n_max;
                continue;
            }
        }
        out.push_back({h, 1, n});
    }
    return out;
}

} // namespace

static int32_t compute_chunk(llama_kv_paged & kv, llama_seq_id seq, uint32_t layer_id, const chunk & c,
                             const std::vector<int32_t> & query_rows, bool rms, int n_threads, float * out,
                             int64_t stride) {
    const kvl_layer & layer = kv.layers[layer_id];
    const auto & heads = kv.seqs[seq].heads[layer_id];
    const int64_t n = c.n_slots;
    const int64_t w = int64_t(query_rows.size());
    const int64_t G = layer.n_head / layer.n_head_kv;
    const int64_t d = layer.pool->d_k;
    const int64_t H = c.n_heads;

    constexpr size_t n_nodes = 64;
    const ggml_backend_sched_ptr sched = make_scheduler(kv, *layer.arena, n_threads, n_nodes);
    if (!sched) {
        kvl_set_error("cannot create the backend for window scores");
        return KVL_ERR_COMPUTE;
    }
    ggml_init_params ip = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr,
                           true};
    ggml_context_ptr ctx_owner(ggml_init(ip));
    ggml_context * ctx = ctx_owner.get();
    ggml_cgraph * gf = ggml_new_graph_custom(ctx, n_nodes, false);

    const int64_t n_parts = layer.arena->k_parts;
    ggml_tensor * gather = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n * H * n_parts);
    ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, w);
    const int64_t n_col = n + (layer.sinks ? 1 : 0); // a sink takes part in the softmax, as a column of its own
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_col, w, 1, H);
    ggml_tensor * mean = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 1, w, G, H);
    ggml_tensor * sinks = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 1, w, G, H);
    for (ggml_tensor * t : {gather, rows, mask, mean, sinks}) {
        ggml_set_input(t);
    }

    ggml_tensor * k = ggml_reshape_4d(ctx, ggml_get_rows(ctx, layer.arena->k_rows, gather), d, n, 1, H);
    ggml_tensor * q = ggml_get_rows(ctx, layer.queries, rows); // [d*n_head, w]
    q = ggml_view_4d(ctx, q, d, w, G, H, q->nb[1], d * sizeof(float), d * G * sizeof(float),
                     c.h0 * G * d * sizeof(float));
    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_cont(ctx, q)); // [n, w, G, H]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    float scale = layer.kq_scale;
    if (layer.soft_cap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / layer.soft_cap)), layer.soft_cap);
        scale = 1.0f;
    }
    if (layer.sinks) {
        kq = ggml_concat(ctx, kq, sinks, 0);
    }
    ggml_tensor * p = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
    if (rms) {
        p = ggml_sqr_inplace(ctx, p);
    }
    ggml_tensor * mass = ggml_out_prod(ctx, p, mean); // [n_col, 1, G, H]: sum over the window
    ggml_set_output(mass);
    ggml_build_forward_expand(gf, mass);

    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        kvl_set_error("no memory for window scores over " + std::to_string(n) + " slots");
        return KVL_ERR_MEMORY;
    }

    std::vector<int32_t> gather_data;
    std::vector<float> mask_data(n_col * w * H, -INFINITY);
    for (int64_t h = 0; h < H; h++) {
        const kvl_head & head = heads[c.h0 + h];
        for (int64_t i = 0; i < n; i++) {
            const int32_t first = layer.arena->k_part(head.row(uint32_t(std::min<int64_t>(i, head.n() - 1))));
            for (int64_t part = 0; part < n_parts; part++) {
                gather_data.push_back(first + int32_t(part));
            }
        }
        for (int64_t i = 0; i < w; i++) {
            const llama_pos pos = kv.seqs[seq].n_seen - llama_pos(w - i);
            const auto end = std::upper_bound(head.pos.begin(), head.pos.end(), pos);
            const auto row = mask_data.begin() + (h * w + i) * n_col;
            std::fill_n(row, end - head.pos.begin(), 0.0f);
            std::fill_n(row + n, n_col - n, 0.0f);
        }
    }
    const std::vector<float> mean_data(w * G * H, 1.0f / float(w));
    ggml_backend_tensor_set(gather, gather_data.data(), 0, ggml_nbytes(gather));
    ggml_backend_tensor_set(rows, query_rows.data(), 0, ggml_nbytes(rows));
    ggml_backend_tensor_set(mask, mask_data.data(), 0, ggml_nbytes(mask));
    ggml_backend_tensor_set(mean, mean_data.data(), 0, ggml_nbytes(mean));
    if (layer.sinks) {
        const std::vector<float> logits = read_sinks(layer);
        std::vector<float> columns;
        for (int64_t h = 0; h < G * H; h++) {
            columns.insert(columns.end(), size_t(w), logits[size_t(c.h0 * G + h)] / scale);
        }
        ggml_backend_tensor_set(sinks, columns.data(), 0, ggml_nbytes(sinks));
    }

    if (ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
        kvl_set_error("the graph of the window scores failed in layer " + std::to_string(layer.il));
        return KVL_ERR_COMPUTE;
    }
    std::vector<float> result(n_col * G * H);
    ggml_backend_tensor_get(mass, result.data(), 0, result.size() * sizeof(float));
    for (float & value : result) {
        value = rms ? std::sqrt(value) : value;
    }
    for (int64_t h = 0; h < G * H; h++) {
        float * row = out + (c.h0 * G + h) * stride;
        const int64_t len = heads[c.h0 + h / G].n();
        std::copy_n(result.begin() + h * n_col, len, row);
        std::fill(row + len, row + stride, 0.0f);
    }
    return KVL_OK;
}

// The page kernel: one operator, on a backend that is made once.
static int32_t compute_fused(llama_kv_paged & kv, llama_seq_id seq, uint32_t layer_id,
                             const std::vector<int32_t> & query_rows, bool rms, int n_threads, float * out,
                             int64_t stride) {
    const kvl_layer & layer = kv.layers[layer_id];
    const auto & heads = kv.seqs[seq].heads[layer_id];
    const int64_t w = int64_t(query_rows.size());
    const int64_t H = layer.n_head_kv;
    ggml_backend_t cpu = kv.host_backend(n_threads);
    if (!cpu) {
        kvl_set_error("cannot create the backend for window scores");
        return KVL_ERR_COMPUTE;
    }

    int64_t n_pages = 0;
    int64_t n_slots = 0; // holes and what the last page has to spare included
    for (const kvl_head & head : heads) {
        n_pages += int64_t(head.pages.size());
        n_slots = std::max<int64_t>(n_slots, GGML_PAD(head.n(), KVL_PAGE_SLOTS));
    }
    constexpr size_t n_nodes = 8;
    ggml_init_params ip = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr,
                           true};
    ggml_context_ptr ctx_owner(ggml_init(ip));
    ggml_context * ctx = ctx_owner.get();
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.pool->d_k, layer.n_head, w);
    ggml_tensor * table = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, kvl_table_size(KVL_FORMAT_COUNT, H, n_pages));
    ggml_tensor * visible = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, w, H);
    ggml_tensor * blind = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_slots, H);
    const kvl_arena & arena = *layer.arena;
    const kvl_attn_params params = {0,
                                    KVL_FORMAT_COUNT,
                                    1,
                                    int32_t(H),
                                    1,
                                    int32_t(n_slots),
                                    layer.kq_scale,
                                    layer.soft_cap,
                                    int32_t(layer.pool->d_v),
                                    rms ? KVL_ATTN_RMS : 0};
    ggml_tensor * sinks = layer.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, layer.n_head) : nullptr;
    ggml_tensor * args[] = {q, table, arena.pages, arena.means, sinks, visible, blind};
    ggml_tensor * scores = kvl_with_params(ggml_custom_4d(ctx, GGML_TYPE_F32, n_slots, layer.n_head, 1, 1, args, 7,
                                                          arena.kernels->scores, GGML_N_TASKS_MAX, nullptr),
                                           params);
    ggml_cgraph * gf = ggml_new_graph_custom(ctx, n_nodes, false);
    ggml_build_forward_expand(gf, scores);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, cpu));
    if (!buffer) {
        kvl_set_error("no memory for window scores over " + std::to_string(n_slots) + " slots");
        return KVL_ERR_MEMORY;
    }

    for (int64_t i = 0; i < w; i++) {
        const size_t row = layer.queries->nb[1];
        ggml_backend_tensor_get(layer.queries, static_cast<char *>(q->data) + i * q->nb[2], row * query_rows[i], row);
    }
    const kvl_recalled nothing; // scores are of what is held
    std::vector<kvl_table_stream> streams;
    for (int64_t h = 0; h < H; h++) {
        streams.push_back({&heads[h], kv.mean_row(seq, layer_id, uint32_t(h)), 0, 0, nothing});
    }
    kvl_write_table(table->data, layer, streams, true);
    if (sinks) {
        std::copy_n(read_sinks(layer).data(), layer.n_head, static_cast<float *>(sinks->data));
    }
    auto * v = static_cast<int32_t *>(visible->data);
    for (int64_t h = 0; h < H; h++) {
        const kvl_head & head = heads[h];
        // what is not f16 lies before, in no order
        const auto begin = head.pos.begin() + head.f16_begin();
        auto * not_yet = static_cast<int32_t *>(blind->data) + h * n_slots;
        const llama_pos first_query = kv.seqs[seq].n_seen - llama_pos(w);
        std::fill_n(not_yet, n_slots, 0);
        for (uint32_t slot = 0; slot < head.f16_begin(); slot++) {
            not_yet[slot] = std::max(head.pos[slot] - first_query, 0);
        }
        for (int64_t i = 0; i < w; i++) {
            const llama_pos pos = kv.seqs[seq].n_seen - llama_pos(w - i);
            *v++ = int32_t(std::upper_bound(begin, head.pos.end(), pos) - head.pos.begin());
        }
    }
    if (ggml_backend_graph_compute(cpu, gf) != GGML_STATUS_SUCCESS) {
        kvl_set_error("the window scores failed in layer " + std::to_string(layer.il));
        return KVL_ERR_COMPUTE;
    }
    for (uint32_t h = 0; h < layer.n_head; h++) {
        const auto * from = static_cast<const float *>(scores->data) + h * n_slots;
        const std::vector<uint32_t> order = heads[h / (layer.n_head / H)].order();
        for (int64_t i = 0; i < stride; i++) {
            out[h * stride + i] = size_t(i) < order.size() ? from[order[i]] : 0.0f;
        }
    }
    return int32_t(w);
}

int32_t kvl_compute_window_scores(llama_kv_paged & kv, llama_seq_id seq, uint32_t layer_id, int32_t n_queries, bool rms,
                                  int n_threads, float * out, int64_t stride) {
    const kvl_layer & layer = kv.layers[layer_id];
    const auto & heads = kv.seqs[seq].heads[layer_id];
    std::vector<int32_t> rows = kv.window_rows(seq);
    if (n_queries > 0 && rows.size() > size_t(n_queries)) {
        rows.erase(rows.begin(), rows.end() - n_queries);
    }
    if (rows.empty()) {
        kvl_set_error("no window queries: the sequence is empty, was cut back past its window, or n_window is 0");
        return KVL_ERR_ARGUMENT;
    }
    for (const kvl_head & head : heads) {
        if (head.held() == 0 || head.held() > stride) {
            kvl_set_error("a head holds " + std::to_string(head.held()) + " slots, the output has room for " +
                          std::to_string(stride));
            return KVL_ERR_ARGUMENT;
        }
        // a query whose slots are all later than itself would have nothing to attend to
        const llama_pos first_query = kv.seqs[seq].n_seen - llama_pos(rows.size());
        if (std::all_of(head.pos.begin(), head.pos.end(), [&](llama_pos pos) {
                return pos > first_query || pos == kvl_head::HOLE;
            })) {
            kvl_set_error("the slots of a head begin inside the window; scores are undefined");
            return KVL_ERR_ARGUMENT;
        }
    }
    if (layer.kernels() && layer.arena->is_host()) {
        return compute_fused(kv, seq, layer_id, rows, rms, n_threads, out, stride);
    }
    const int64_t G = layer.n_head / layer.n_head_kv;
    // gathered keys, logits and softmax of a group, and the mask
    const int64_t bytes_per_slot = 4 * (layer.pool->d_k + int64_t(rows.size()) * (2 * G + 1));
    for (const chunk & c : split_heads(heads, bytes_per_slot, std::max<int64_t>(kv.params.score_bytes, 1))) {
        const int32_t rc = compute_chunk(kv, seq, layer_id, c, rows, rms, n_threads, out, stride);
        if (rc != KVL_OK) {
            return rc;
        }
    }
    return int32_t(rows.size());
}
