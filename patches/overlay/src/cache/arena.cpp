// The tensors of an arena, and slots that are read, written and moved from outside a graph.

#include "cache/arena.h"

#include "error.h"

#include <algorithm>
#include <functional>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

// Bytes of all pools, and where each begins.
static size_t place_pools(const std::vector<std::unique_ptr<kvl_pool>> & pools,
                          const std::function<void(kvl_pool &, size_t)> & f) {
    size_t end = 0;
    for (const auto & pool : pools) {
        if (pool) {
            f(*pool, end);
            end += GGML_PAD(pool->reserved_bytes(), KVL_POOL_ALIGNMENT);
        }
    }
    return end;
}

static size_t bytes_of(const std::vector<std::unique_ptr<kvl_pool>> & pools) {
    return place_pools(pools, [](kvl_pool &, size_t) {});
}

// Stock operators take all f16 pages as one tensor, for which a device may have a limit.
static void check_size(ggml_backend_dev_t device, ggml_tensor * rows) {
    ggml_init_params params = {4 * ggml_tensor_overhead(), nullptr, true};
    ggml_context_ptr ctx(ggml_init(params));
    if (!ctx) {
        throw std::bad_alloc();
    }
    ggml_tensor * index = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
    ggml_tensor * row = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, rows->ne[0], 1);
    for (const ggml_tensor * op : {ggml_get_rows(ctx.get(), rows, index), ggml_set_rows(ctx.get(), rows, row, index)}) {
        if (!ggml_backend_dev_supports_op(device, op)) {
            throw std::runtime_error(
                "the KV pages take " + std::to_string(ggml_nbytes(rows) >> 20) + " MiB, which " +
                ggml_backend_dev_name(device) +
                " cannot use as one tensor; use a smaller context (-c), or fewer layers there (-ngl)");
        }
    }
}

kvl_arena::kvl_arena(const kvl_shape & shape, uint32_t n_seqs, std::vector<std::unique_ptr<kvl_pool>> all,
                     bool portable, bool no_alloc)
    : shape(shape), kernels(portable ? nullptr : kvl_find_kernels(kvl_device_of(shape.buft))), pools(std::move(all)),
      mass(shape.buft, shape.group, pools[KVL_FORMAT_F16]->size(), no_alloc), row_size(std::gcd(shape.d_k, shape.d_v)),
      k_parts(shape.d_k / row_size), v_parts(shape.d_v / row_size), mem(shape.buft, bytes_of(pools), no_alloc),
      mean_mem(shape.buft, size_t(n_seqs) * shape.n_heads * shape.d_k * sizeof(float), no_alloc) {
    ggml_init_params params = {4 * ggml_tensor_overhead(), nullptr, true};
    ctx.reset(ggml_init(params));
    if (!ctx) {
        throw std::bad_alloc();
    }
    const kvl_pool & f16 = *pools[KVL_FORMAT_F16];
    const int64_t n_rows = int64_t(f16.size()) * KVL_PAGE_SLOTS * slot_parts();
    const int64_t n_before = shape.latent ? 0 : int64_t(KVL_PAGE_SLOTS) * k_parts; // parts of page 0 before its values
    pages = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, int64_t(bytes_of(pools)));
    k_rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, row_size, n_rows);
    v_rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, row_size, n_rows - n_before);
    means = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, shape.d_k, int64_t(n_seqs) * shape.n_heads);
    ggml_set_name(pages, "kvl_pages");
    ggml_set_name(k_rows, "kvl_k_rows");
    ggml_set_name(v_rows, "kvl_v_rows");
    ggml_set_name(means, "kvl_means");
    if (!is_host() && !kernels) {
        check_size(kvl_device_of(shape.buft), k_rows);
    }
    if (!mem.place(pages, 0) || !mem.place(k_rows, 0) || !mem.place(v_rows, size_t(n_before) * k_rows->nb[1]) ||
        !mean_mem.place(means, 0)) {
        throw std::runtime_error("cannot place the KV pages in a buffer of " +
                                 std::string(ggml_backend_buft_name(shape.buft)));
    }
    place_pools(pools, [&](kvl_pool & pool, size_t at) {
        pool.place(mem, pages, at);
    });
}

ggml_backend_t kvl_arena::device_backend() {
    if (!backend) {
        backend.reset(ggml_backend_dev_init(kvl_device_of(shape.buft), nullptr));
    }
    return backend.get();
}

std::vector<int32_t> kvl_arena::parts(const std::vector<uint64_t> & rows, bool keys) const {
    std::vector<int32_t> out;
    out.reserve(rows.size() * (keys ? k_parts : v_parts));
    for (const uint64_t row : rows) {
        for (uint32_t i = 0; i < (keys ? k_parts : v_parts); i++) {
            out.push_back((keys ? k_part(row) : v_part(row)) + int32_t(i));
        }
    }
    return out;
}

namespace {

// A small graph of stock operators on a device.
class transfer {
  public:
    explicit transfer(ggml_backend_t backend) : backend(backend) {
        constexpr size_t n_nodes = 16;
        ggml_init_params params = {n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
                                   nullptr, true};
        owner.reset(ggml_init(params));
        if (owner) {
            ctx = owner.get();
            graph = ggml_new_graph_custom(ctx, n_nodes, false);
        }
    }

    ggml_tensor * index(const std::vector<int32_t> & values) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, int64_t(values.size()));
        inputs.emplace_back(t, values.data());
        return t;
    }
    ggml_tensor * values(const float * x, int64_t n0, int64_t n1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n0, n1);
        inputs.emplace_back(t, x);
        return t;
    }
    void want(ggml_tensor * t) { ggml_build_forward_expand(graph, t); }

    bool run() {
        if (!backend) {
            kvl_set_error("cannot create a backend of the device that holds the KV cache");
            return false;
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx, backend));
        if (!buffer) {
            kvl_set_error("the device that holds the KV cache has no memory for moving slots");
            return false;
        }
        for (const auto & [t, data] : inputs) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            kvl_set_error("the device that holds the KV cache failed to move slots");
            return false;
        }
        return true;
    }

    ggml_context * ctx = nullptr;

  private:
    ggml_backend_t backend;
    ggml_context_ptr owner;
    ggml_cgraph * graph = nullptr;
    ggml_backend_buffer_ptr buffer;
    std::vector<std::pair<ggml_tensor *, const void *>> inputs;
};

constexpr size_t STEP = 16384; // slots of a graph: bounds its memory

} // namespace

bool kvl_arena::read(const std::vector<uint64_t> & rows, float * k, float * v) {
    const kvl_pool & pool = *pools[KVL_FORMAT_F16];
    const auto on_host = [&](uint64_t row, bool keys, float * to) {
        const size_t at = keys ? pool.k_at(row) : pool.v_at(row);
        ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t *>(pool.host_at(at)), to,
                              keys ? shape.d_k : shape.d_v);
    };
    for (size_t i = 0; is_host() && i < rows.size(); i++) {
        if (k) {
            on_host(rows[i], true, k + i * shape.d_k);
        }
        if (v) {
            on_host(rows[i], false, v + i * shape.d_v);
        }
    }
    for (size_t i = 0; !is_host() && i < rows.size(); i += STEP) {
        const std::vector<uint64_t> some(rows.begin() + int64_t(i),
                                         rows.begin() + int64_t(std::min(rows.size(), i + STEP)));
        transfer t(device_backend());
        const std::vector<int32_t> k_index = parts(some, true);
        const std::vector<int32_t> v_index = parts(some, false);
        ggml_tensor * keys = k ? ggml_get_rows(t.ctx, k_rows, t.index(k_index)) : nullptr;
        ggml_tensor * values = v ? ggml_get_rows(t.ctx, v_rows, t.index(v_index)) : nullptr;
        for (ggml_tensor * wanted : {keys, values}) {
            if (wanted) {
                t.want(wanted);
            }
        }
        if (!t.run()) {
            return false;
        }
        if (keys) {
            ggml_backend_tensor_get(keys, k + i * shape.d_k, 0, ggml_nbytes(keys));
        }
        if (values) {
            ggml_backend_tensor_get(values, v + i * shape.d_v, 0, ggml_nbytes(values));
        }
    }
    return true;
}

bool kvl_arena::write_keys(const std::vector<uint64_t> & rows, const float * k) {
    const kvl_pool & pool = *pools[KVL_FORMAT_F16];
    for (size_t i = 0; is_host() && i < rows.size(); i++) {
        ggml_fp32_to_fp16_row(k + i * shape.d_k, reinterpret_cast<ggml_fp16_t *>(pool.host_at(pool.k_at(rows[i]))),
                              shape.d_k);
    }
    for (size_t i = 0; !is_host() && i < rows.size(); i += STEP) {
        const std::vector<uint64_t> some(rows.begin() + int64_t(i),
                                         rows.begin() + int64_t(std::min(rows.size(), i + STEP)));
        transfer t(device_backend());
        const std::vector<int32_t> index = parts(some, true);
        ggml_tensor * x = t.values(k + i * shape.d_k, row_size, int64_t(index.size()));
        t.want(ggml_set_rows(t.ctx, k_rows, x, t.index(index)));
        if (!t.run()) {
            return false;
        }
    }
    return true;
}

bool kvl_arena::move(kvl_pool & pool, const std::vector<kvl_row_move> & moves) {
    if (!pages->data || moves.empty()) { // without weights there is nothing to move
        return true;
    }
    if (is_host()) {
        pool.move_rows(moves);
        return true;
    }
    return kernels ? move_by_kernel(pool, moves) : move_by_stock(moves);
}

bool kvl_arena::move_by_kernel(const kvl_pool & pool, const std::vector<kvl_row_move> & moves) {
    std::vector<int32_t> items;
    for (const kvl_row_move & m : moves) {
        items.insert(items.end(), {int32_t(pool.base_ref()), int32_t(m.to), int32_t(m.from), int32_t(m.n)});
    }
    transfer t(device_backend());
    ggml_tensor * list = t.index(items);
    list = ggml_reshape_2d(t.ctx, list, 4, int64_t(moves.size()));
    ggml_tensor * op = ggml_custom_inplace(t.ctx, pages, &list, 1, kernels->move, GGML_N_TASKS_MAX, nullptr);
    const kvl_move_params params = {pool.k_row, pool.v_row, int32_t(shape.d_k), int32_t(shape.d_v)};
    kvl_set_params(op, &params, sizeof(params));
    t.want(op);
    return t.run();
}

bool kvl_arena::move_by_stock(const std::vector<kvl_row_move> & moves) {
    std::vector<uint64_t> to, from;
    for (const kvl_row_move & m : moves) {
        for (uint32_t i = 0; i < m.n; i++) {
            to.push_back(m.to + i);
            from.push_back(m.from + i);
        }
    }
    for (size_t i = 0; i < to.size(); i += STEP) {
        const auto some = [&](const std::vector<uint64_t> & rows) {
            return std::vector<uint64_t>(rows.begin() + int64_t(i),
                                         rows.begin() + int64_t(std::min(rows.size(), i + STEP)));
        };
        transfer t(device_backend());
        // all are read before the first is written: no slot is overwritten before it has moved, so this is the same
        std::vector<int32_t> index[4];
        for (const bool keys : {true, false}) {
            if (!keys && shape.latent) {
                continue;
            }
            std::vector<int32_t> & source = index[keys ? 0 : 1] = parts(some(from), keys);
            std::vector<int32_t> & target = index[keys ? 2 : 3] = parts(some(to), keys);
            ggml_tensor * rows = keys ? k_rows : v_rows;
            t.want(ggml_set_rows(t.ctx, rows, ggml_get_rows(t.ctx, rows, t.index(source)), t.index(target)));
        }
        if (!t.run()) {
            return false;
        }
    }
    return true;
}
