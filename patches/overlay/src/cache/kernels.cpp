// Which devices have page kernels: their tables of procedures are asked once.

#include "cache/kernels.h"

#include "cache/memory.h"

#include <map>
#include <memory>
#include <mutex>
#include <type_traits>

template <typename F> static bool find(ggml_backend_reg_t reg, const char * name, F & to) {
    to = reg ? reinterpret_cast<F>(ggml_backend_reg_get_proc_address(reg, name)) : nullptr;
    return to != nullptr;
}

ggml_backend_dev_t kvl_device_of(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_is_host(buft) ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)
                                           : ggml_backend_buft_get_device(buft);
}

const kvl_kernels * kvl_find_kernels(ggml_backend_dev_t device) {
    static std::mutex mutex;
    static std::map<ggml_backend_reg_t, std::unique_ptr<kvl_kernels>> known;
    ggml_backend_reg_t reg = device ? ggml_backend_dev_backend_reg(device) : nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    auto it = known.find(reg);
    if (it == known.end()) {
        auto k = std::make_unique<kvl_kernels>();
        const bool all = find(reg, KVL_ATTN_PROC, k->compute) && find(reg, KVL_ATTN_MERGE_PROC, k->merge) &&
                         find(reg, KVL_ATTN_MASS_PROC, k->mass) && find(reg, KVL_ATTN_SCORES_PROC, k->scores) &&
                         find(reg, KVL_ATTN_ROTATE_PROC, k->rotate) && find(reg, KVL_PAGES_APPEND_PROC, k->append) &&
                         find(reg, KVL_PAGES_WINDOW_PROC, k->window) && find(reg, KVL_PAGES_MOVE_PROC, k->move);
        it = known.emplace(reg, all ? std::move(k) : nullptr).first;
    }
    return it->second.get();
}

std::string kvl_lacks_kernels(ggml_backend_dev_t device) {
    return std::string(device ? ggml_backend_dev_name(device) : "the device of a layer") +
           " lacks; keep all layers in main memory (-ngl 0)";
}

const kvl_row_functions & kvl_find_rows() {
    static const kvl_row_functions rows = [] {
        kvl_row_functions out = {};
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        ggml_backend_reg_t reg = cpu ? ggml_backend_dev_backend_reg(cpu) : nullptr;
        find(reg, KVL_ROWS_ENCODE_PROC, out.encode);
        find(reg, KVL_ROWS_DECODE_PROC, out.decode);
        find(reg, KVL_ROW_ROTATE_PROC, out.rotate);
        find(reg, KVL_ROWS_DOT_PROC, out.dot);
        return out;
    }();
    return rows;
}

void kvl_set_threads(ggml_backend_t cpu, int n_threads) {
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    auto * set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set) {
        set(cpu, n_threads);
    }
}

ggml_backend_t llama_kv_paged::host_backend(int n_threads) {
    if (!host) {
        host.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    }
    if (host) {
        kvl_set_threads(host.get(), n_threads);
    }
    return host.get();
}
