#include "llama-kv-paged.h"

#include "kvl-attn.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>

static uint32_t pages_for(uint32_t n_slots) {
    return (n_slots + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS;
}

//
// construction
//

llama_kv_paged::llama_kv_paged(const llama_model & model, const llama_cparams & cparams, const kvl_params & params)
    : hparams(model.hparams), params(params),
      n_ctx(params.n_pool_ctx > 0 ? uint32_t(params.n_pool_ctx) : cparams.n_ctx_seq), seqs(cparams.n_seq_max) {
    const uint32_t n_layer = hparams.n_layer();
    layer_of.assign(n_layer, -1);

    // pools are sized by what their layers can hold, so count the heads of each shape first
    struct shape {
        ggml_backend_buffer_type_t buft;
        uint32_t d_k, d_v, n_heads;
    };
    std::vector<shape> shapes;
    std::vector<size_t> pool_of(n_layer, 0);
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }
        ggml_backend_buffer_type_t buft =
            cparams.offload_kqv ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
        const uint32_t d_k = hparams.n_embd_head_k(il);
        const uint32_t d_v = hparams.n_embd_head_v(il);
        auto it = std::find_if(shapes.begin(), shapes.end(), [&](const shape & s) {
            return s.buft == buft && s.d_k == d_k && s.d_v == d_v;
        });
        if (it == shapes.end()) {
            it = shapes.insert(shapes.end(), {buft, d_k, d_v, 0});
        }
        it->n_heads += hparams.n_head_kv(il);
        pool_of[il] = size_t(it - shapes.begin());
        layer_of[il] = int32_t(layers.size());
        layers.push_back({il, hparams.n_head(il), hparams.n_head_kv(il), nullptr, {}, {}, nullptr});
    }
    if (layers.empty()) {
        throw std::runtime_error("the model has no attention layers");
    }
    for (const shape & s : shapes) {
        // one page per head beyond the context: an unshared tail
        const uint64_t n_pages = uint64_t(s.n_heads) * seqs.size() * (pages_for(n_ctx) + 1);
        if (n_pages * KVL_PAGE_SLOTS > INT32_MAX) {
            throw std::runtime_error("a context of " + std::to_string(n_ctx) + " tokens x " +
                                     std::to_string(seqs.size()) +
                                     " sequences needs more slots than an index can address; use a smaller -c");
        }
        for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
            const auto [k_row, v_row] = kvl_rows_of(f, params);
            const bool wanted = f == KVL_FORMAT_F16 || params.formats >> f & 1;
            if (const std::string why = wanted ? kvl_block_refusal(k_row, v_row, s.d_k, s.d_v) : ""; !why.empty()) {
                throw std::runtime_error(why);
            }
            pools.push_back(wanted ? std::make_unique<kvl_pool>(s.buft, s.d_k, s.d_v, uint32_t(n_pages), k_row, v_row,
                                                                hparams.no_alloc)
                                   : nullptr);
        }
    }

    if (params.n_window > 0) {
        ggml_init_params ip = {(layers.size() + 1) * ggml_tensor_overhead(), nullptr, true};
        query_ctx.reset(ggml_init(ip));
    }
    for (kvl_layer & layer : layers) {
        for (uint32_t f = 0; f < KVL_PAGE_FORMATS; f++) {
            const bool known = f < KVL_FORMAT_COUNT;
            kvl_pool * pool = known ? pools[pool_of[layer.il] * KVL_FORMAT_COUNT + f].get() : nullptr;
            const auto [k_row, v_row] = kvl_rows_of(f, params);
            layer.pools.push_back(pool);
            layer.formats.push_back({k_row, v_row, pool ? static_cast<const char *>(pool->k->data) : nullptr,
                                     pool ? static_cast<const char *>(pool->v->data) : nullptr});
        }
        layer.pool = layer.pools[KVL_FORMAT_F16];
        if (params.n_window > 0) {
            layer.queries = ggml_new_tensor_2d(query_ctx.get(), GGML_TYPE_F32, layer.pool->d_k * layer.n_head,
                                               int64_t(params.n_window) * int64_t(seqs.size()));
            query_mem.push_back(
                std::make_unique<kvl_region>(layer.pool->type(), ggml_nbytes(layer.queries), hparams.no_alloc));
            if (!query_mem.back()->place(layer.queries, 0)) {
                throw std::runtime_error("cannot place the window queries");
            }
            query_bytes += ggml_nbytes(layer.queries);
        }
    }
    for (kvl_sequence & seq : seqs) {
        seq.window.assign(params.n_window, -1);
        for (const kvl_layer & layer : layers) {
            seq.heads.emplace_back(layer.n_head_kv);
        }
        seq.mu.resize(layers.size());
    }
    if (all_host() && !params.portable) {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        ggml_backend_reg_t reg = cpu ? ggml_backend_dev_backend_reg(cpu) : nullptr;
        const auto find = [&](const char * name, auto & to) {
            void * proc = reg ? ggml_backend_reg_get_proc_address(reg, name) : nullptr;
            to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(proc);
        };
        find(KVL_ATTN_PROC, attn.compute);
        find(KVL_ATTN_MERGE_PROC, attn.merge);
        find(KVL_ATTN_MASS_PROC, attn.mass);
        find(KVL_ATTN_SCORES_PROC, attn.scores);
        find(KVL_ATTN_ROTATE_PROC, attn.rotate);
        find(KVL_ROWS_ENCODE_PROC, attn.encode);
        find(KVL_ROWS_DECODE_PROC, attn.decode);
        find(KVL_ROW_ROTATE_PROC, attn.rotate_row);
    }
    if ((params.formats != 0 || params.rotate) && !fused()) {
        throw std::runtime_error("storage formats other than f16 need the page kernels, which run on the CPU only");
    }
    LLAMA_LOG_INFO("%s: %zu layers, %zu pools, %u tokens x %zu sequences, address space %.2f MiB\n", __func__,
                   layers.size(), pools.size(), n_ctx, seqs.size(), [this] {
                       kvl_stats s;
                       get_stats(s);
                       return double(s.reserved_bytes) / 1048576.0;
                   }());
}

//
// batches
//

bool kvl_positions_check::add(int32_t n_seq_id, const llama_seq_id * seq_id, llama_pos pos) {
    if (n_seq_id != 1 || !seq_id || !kv.valid_seq(seq_id[0])) {
        kvl_set_error("every token must belong to exactly one sequence below n_seq_max = " +
                      std::to_string(kv.seqs.size()) + "; use kvl_branch to share a prefix");
        return false;
    }
    const llama_pos n_seen = kv.seqs[seq_id[0]].n_seen;
    llama_pos & want = next[size_t(seq_id[0])];
    if (want < 0) {
        want = n_seen > 0 ? n_seen : pos; // a sequence may begin anywhere
    }
    if (pos != want || pos < 0) {
        kvl_set_error("position " + std::to_string(pos) + " does not continue sequence " + std::to_string(seq_id[0]) +
                      (pos < 0 ? ": it is negative" : ", whose next one is " + std::to_string(want)));
        return false;
    }
    if (pos >= KVL_POS_END) {
        kvl_set_error("position " + std::to_string(pos) + " of sequence " + std::to_string(seq_id[0]) +
                      " is not below " + std::to_string(KVL_POS_END));
        return false;
    }
    want++;
    return true;
}

llama_memory_context_ptr llama_kv_paged::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);
    balloc.split_reset();
    std::vector<llama_ubatch> ubatches;
    kvl_positions_check positions(*this);
    for (;;) {
        llama_ubatch ubatch = balloc.split_equal(n_ubatch, false, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        for (uint32_t i = 0; i < ubatch.n_tokens; i++) {
            if (!positions.add(ubatch.n_seq_id[i], ubatch.seq_id[i], ubatch.pos[i])) {
                return std::make_unique<llama_kv_paged_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
            }
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens() || !pages_fit(ubatches)) {
        return std::make_unique<llama_kv_paged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return std::make_unique<llama_kv_paged_context>(this, std::move(ubatches));
}

llama_memory_context_ptr llama_kv_paged::init_full() {
    return std::make_unique<llama_kv_paged_context>(this);
}

llama_memory_context_ptr llama_kv_paged::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(lctx);
    GGML_UNUSED(optimize);
    return std::make_unique<llama_kv_paged_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

// A page is needed for every 32 new slots of a head, and for a tail that is still shared with a branch.
static uint32_t pages_needed(const kvl_pool & pool, const kvl_head & head, uint32_t n) {
    uint32_t need = pages_for(head.n() + n) - uint32_t(head.pages.size());
    if (n > 0 && head.n() % KVL_PAGE_SLOTS != 0 && pool.shared(head.pages.back())) {
        need++;
    }
    return need;
}

bool llama_kv_paged::pages_fit(const std::vector<llama_ubatch> & ubatches) {
    std::map<llama_seq_id, uint32_t> n_new;
    for (const llama_ubatch & ub : ubatches) {
        for (uint32_t i = 0; i < ub.n_tokens; i++) {
            n_new[ub.seq_id[i][0]]++;
        }
    }
    std::map<const kvl_pool *, uint64_t> need;
    for (const auto & [seq, n] : n_new) {
        for (size_t l = 0; l < layers.size(); l++) {
            for (const kvl_head & head : seqs[seq].heads[l]) {
                need[layers[l].pool] += pages_needed(*layers[l].pool, head, n);
            }
        }
    }
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            kvl_set_error("the KV pool is full: the batch needs " + std::to_string(n) + " pages, " +
                          std::to_string(pool->n_free()) + " of " +
                          std::to_string(pool->reserved_bytes() / (KVL_PAGE_SLOTS * pool->slot_bytes())) +
                          " are free; use a larger context (-c), a smaller budget or --prefill chunked");
            return false;
        }
    }
    return true;
}

bool llama_kv_paged::append(llama_seq_id seq_id, const llama_pos * pos, uint32_t n) {
    kvl_sequence & seq = seqs[seq_id];
    std::map<const kvl_pool *, uint64_t> need;
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : seq.heads[l]) {
            need[layers[l].pool] += pages_needed(*layers[l].pool, head, n);
        }
    }
    for (const auto & [pool, n_pages] : need) {
        if (n_pages > pool->n_free()) {
            return false;
        }
    }
    for (uint32_t done = 0; done < n;) {
        // block by block over all heads: pages of one stretch of text lie together, so what eviction frees is
        // contiguous
        uint32_t step = n - done;
        for (size_t l = 0; l < layers.size(); l++) {
            for (const kvl_head & head : seq.heads[l]) {
                step = std::min(step, KVL_PAGE_SLOTS - (head.n() % KVL_PAGE_SLOTS));
            }
        }
        for (size_t l = 0; l < layers.size(); l++) {
            kvl_pool & pool = *layers[l].pool;
            for (kvl_head & head : seq.heads[l]) {
                if (head.n() % KVL_PAGE_SLOTS == 0) {
                    head.pages.push_back(pool.take());
                    head.live.push_back(UINT32_MAX);
                    head.page_bytes += KVL_PAGE_SLOTS * pool.slot_bytes();
                } else if (pool.shared(head.pages.back())) {
                    head.pages.back() = pool.unshare(head.pages.back(), head.n() % KVL_PAGE_SLOTS);
                }
                head.pos.insert(head.pos.end(), pos + done, pos + done + step);
                head.used_bytes += step * pool.slot_bytes();
                pool.hold(head.pages.back(), head.held_bits(uint32_t(head.pages.size()) - 1));
                for (auto & mass : head.mass) {
                    mass.resize(head.pos.size(), 0.0f);
                }
            }
        }
        done += step;
    }
    seq.n_seen = pos[n - 1] + 1;
    const uint32_t w = params.n_window;
    for (uint32_t i = n > w ? n - w : 0; i < n; i++) {
        seq.window[pos[i] % w] = pos[i];
    }
    note_peak();
    return true;
}

std::vector<int32_t> llama_kv_paged::window_rows(llama_seq_id seq_id) const {
    const kvl_sequence & seq = seqs[seq_id];
    const int32_t w = params.n_window;
    std::vector<int32_t> rows;
    for (llama_pos p = seq.n_seen - 1; p >= 0 && int32_t(rows.size()) < w && seq.window[p % w] == p; p--) {
        rows.push_back(seq_id * w + p % w);
    }
    std::reverse(rows.begin(), rows.end());
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

//
// llama_kv_paged_context
//

llama_kv_paged_context::llama_kv_paged_context(llama_memory_status status) : status(status) {}

llama_kv_paged_context::llama_kv_paged_context(llama_kv_paged * kv)
    : kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), worst_case(true) {}

llama_kv_paged_context::llama_kv_paged_context(llama_kv_paged * kv, std::vector<llama_ubatch> ubatches)
    : kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS), ubatches(std::move(ubatches)) {}

bool llama_kv_paged_context::next() {
    return ++i_cur < ubatches.size();
}

bool llama_kv_paged_context::apply() {
    if (worst_case || status != LLAMA_MEMORY_STATUS_SUCCESS) {
        return status == LLAMA_MEMORY_STATUS_SUCCESS;
    }
    const llama_ubatch & ub = ubatches[i_cur];
    for (uint32_t s = 0; s < ub.n_seqs; s++) {
        const uint32_t i0 = s * ub.n_seq_tokens;
        if (!kv->append(ub.seq_id[i0][0], ub.pos + i0, ub.n_seq_tokens)) {
            kvl_set_error("the KV pool is full in the middle of a batch");
            return false;
        }
    }
    return true;
}

kvl_layer_shape llama_kv_paged_context::shape(uint32_t layer, uint32_t n_seq_tokens, const llama_ubatch & ub) const {
    // a graph is used again until a head crosses a multiple of this; accelerators want it larger
    const uint32_t pad = kv->all_host() && !kv->fused() ? 2 * KVL_PAGE_SLOTS : 256;
    if (worst_case) {
        return {GGML_PAD(std::max(n_seq_tokens, kv->n_ctx / ub.n_seqs), pad), false, kv->mass()};
    }
    bool all_live = true;
    uint32_t n_min = UINT32_MAX;
    uint32_t n_max = 0;
    for (uint32_t s = 0; s < ub.n_seqs; s++) {
        for (const kvl_head & head : kv->seqs[ub.seq_id[s * n_seq_tokens][0]].heads[layer]) {
            n_min = std::min(n_min, head.n());
            n_max = std::max(n_max, head.n());
            all_live = all_live && (kv->fused() || std::all_of(head.live.begin(), head.live.end(), [](uint32_t bits) {
                                        return bits == UINT32_MAX;
                                    }));
        }
    }
    return {GGML_PAD(n_max, pad), n_min == n_max && all_live && !kv->fused(), kv->mass()};
}

//
// creation hook
//

static thread_local const kvl_params * requested = nullptr;

void kvl_request_memory(const kvl_params * params) {
    requested = params;
}

llama_memory_i * kvl_create_memory(const llama_model & model, const llama_cparams & cparams) {
    if (!requested) {
        return nullptr;
    }
    try {
        return new llama_kv_paged(model, cparams, *requested);
    } catch (const std::exception & e) {
        kvl_set_error(e.what()); // upstream only logs it
        throw;
    }
}
