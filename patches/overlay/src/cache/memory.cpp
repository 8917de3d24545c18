// The paged memory as llama.cpp sees it (llama_memory_i): created, given batches, asked for its sequences.

#include "cache/memory.h"

#include "kvl-hooks.h"
#include "llama-memory-recurrent.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

//
// construction
//

// A pool per format that is asked for; throws if heads of this shape cannot be stored so.
static std::vector<std::unique_ptr<kvl_pool>> make_pools(const kvl_shape & shape, uint64_t n_pages,
                                                         const kvl_params & params) {
    std::vector<std::unique_ptr<kvl_pool>> out(KVL_FORMAT_COUNT);
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        const auto [k_row, v_row] = kvl_rows_of(f, params, shape.latent);
        const bool wanted =
            (shape.open && (params.formats >> f & 1)) || (shape.windows && int(f) == params.window_format);
        if (f != KVL_FORMAT_F16 && !wanted) {
            continue;
        }
        if (const std::string why = kvl_block_refusal(k_row, v_row, shape.d_k, shape.d_v); !why.empty()) {
            throw std::runtime_error(why);
        }
        out[f] = std::make_unique<kvl_pool>(shape.d_k, shape.d_v, uint32_t(n_pages), k_row, v_row);
    }
    return out;
}

llama_kv_paged::llama_kv_paged(const llama_model & model, const llama_cparams & cparams, const kvl_params & params)
    : model(model), hparams(model.hparams), params(params),
      n_ctx(params.n_pool_ctx > 0 ? uint32_t(params.n_pool_ctx) : cparams.n_ctx_seq), n_ubatch(cparams.n_ubatch),
      seqs(cparams.n_seq_max), recr(kvl_create_recurrent(model, cparams)), rows(kvl_find_rows()) {
    const uint32_t n_layer = hparams.n_layer();
    layer_of.assign(n_layer, -1);
    std::vector<uint32_t> with_cache; // open ones first
    for (const bool open : {true, false}) {
        for (uint32_t il = 0; il < n_layer; il++) {
            if (kvl_owns_cache(model, il) && open != hparams.is_swa(il)) {
                with_cache.push_back(il);
            }
        }
        n_open = open ? uint32_t(with_cache.size()) : n_open;
    }

    // an arena is sized by what its layers can hold, so count the heads of each shape first
    std::vector<kvl_shape> shapes;
    std::vector<size_t> shape_of;
    for (const uint32_t il : with_cache) {
        ggml_backend_buffer_type_t buft =
            cparams.offload_kqv ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
        const uint32_t d_k = hparams.n_embd_head_k(il);
        const bool latent = hparams.is_mla();
        const uint32_t d_v = latent ? d_k : hparams.n_embd_head_v(il);
        auto it = std::find_if(shapes.begin(), shapes.end(), [&](const kvl_shape & s) {
            return s.is(buft, d_k, d_v);
        });
        if (it == shapes.end()) {
            it = shapes.insert(shapes.end(), {buft, d_k, d_v, latent, 0, 0, 0, false, false});
        }
        kvl_layer layer = {};
        layer.il = il;
        layer.n_head = hparams.n_head(il);
        layer.d_value = hparams.n_embd_head_v(il);
        layer.n_head_kv = hparams.n_head_kv(il);
        layer.n_swa = !hparams.is_swa(il)                          ? 0
                      : hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED ? -int32_t(hparams.n_swa)
                                                                   : int32_t(hparams.n_swa);
        layer.first_head = it->n_heads;
        it->n_heads += layer.n_head_kv;
        // of an open head one page beyond the context: an unshared tail; of one with a window also what a batch and the
        // branches of a sequence may hold beside it
        const uint64_t n_pages = layer.open() ? kvl_pages_for(n_ctx) + 1 : 4 * uint64_t(window_pages(layer));
        it->n_pages += layer.n_head_kv * seqs.size() * n_pages;
        it->open = it->open || layer.open();
        it->windows = it->windows || !layer.open();
        it->group = std::max(it->group, layer.group());
        shape_of.push_back(size_t(it - shapes.begin()));
        layer_of[il] = int32_t(layers.size());
        layers.push_back(layer);
    }
    if (layers.empty()) {
        throw std::runtime_error("the model has no attention layers");
    }
    // the model's layers that read what another one stores
    for (uint32_t il = 0; il < n_layer; il++) {
        if (const int32_t from = kvl_shares_cache(model, il); from >= 0) {
            layer_of[il] = layer_of[size_t(from)];
        }
    }
    for (const kvl_shape & s : shapes) {
        const uint64_t n_pages = s.n_pages;
        const bool kernels = !params.portable && kvl_find_kernels(kvl_device_of(s.buft));
        const uint64_t n_parts = n_pages * KVL_PAGE_SLOTS * (s.d_k + (s.latent ? 0 : s.d_v)) / std::gcd(s.d_k, s.d_v);
        // stock operators count parts of slots, the kernels pages
        if (n_pages > KVL_PAGE_NUMBER || (!kernels && n_parts > INT32_MAX)) {
            throw std::runtime_error("a context of " + std::to_string(n_ctx) + " tokens x " +
                                     std::to_string(seqs.size()) +
                                     " sequences needs more slots than an index can address; use a smaller -c");
        }
        arenas.push_back(std::make_unique<kvl_arena>(s, uint32_t(seqs.size()), make_pools(s, n_pages, params),
                                                     params.portable != 0, hparams.no_alloc));
    }
    const bool stores = params.formats != 0 || params.window_format != KVL_FORMAT_F16;
    if ((stores || params.rotate) && !all_fused()) {
        throw std::runtime_error("storage formats other than f16 (--kv) need the page kernels, which " +
                                 without_kernels());
    }
    if (stores && !all_host()) {
        throw std::runtime_error(KVL_FORMATS_ON_HOST);
    }

    if (params.n_window > 0) {
        ggml_init_params ip = {(layers.size() + 1) * ggml_tensor_overhead(), nullptr, true};
        query_ctx.reset(ggml_init(ip));
    }
    for (size_t l = 0; l < layers.size(); l++) {
        kvl_layer & layer = layers[l];
        layer.arena = arenas[shape_of[l]].get();
        for (const auto & pool : layer.arena->pools) {
            layer.pools.push_back(pool.get());
        }
        layer.pool = layer.pools[KVL_FORMAT_F16];
        if (params.n_window > 0 && layer.open()) {
            layer.queries = ggml_new_tensor_2d(query_ctx.get(), GGML_TYPE_F32, layer.pool->d_k * layer.n_head,
                                               int64_t(params.n_window) * int64_t(seqs.size()));
            query_mem.push_back(
                std::make_unique<kvl_region>(layer.arena->shape.buft, ggml_nbytes(layer.queries), hparams.no_alloc));
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
    LLAMA_LOG_INFO("%s: %zu layers, %zu shapes of heads, %u tokens x %zu sequences, address space %.2f MiB\n", __func__,
                   layers.size(), arenas.size(), n_ctx, seqs.size(), [this] {
                       kvl_stats s;
                       get_stats(s);
                       return double(s.reserved_bytes) / 1048576.0;
                   }());
}

llama_kv_paged::~llama_kv_paged() = default;

//
// batches
//

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
    if (balloc.get_n_used() < balloc.get_n_tokens() || !pages_fit(ubatches) || (recr && !recr->prepare(ubatches))) {
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

//
// llama_memory_i
//

void llama_kv_paged::clear(bool data) {
    if (recr) {
        recr->clear(data);
    }
    for (size_t s = 0; s < seqs.size(); s++) {
        truncate(llama_seq_id(s), 0);
    }
}

bool llama_kv_paged::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !valid_seq(seq_id)) {
        return true; // an unknown sequence holds nothing
    }
    bool ok = true;
    for (size_t s = 0; s < seqs.size(); s++) {
        if (seq_id >= 0 && size_t(seq_id) != s) {
            continue;
        }
        if (p1 >= 0 && p1 < seqs[s].n_seen && std::max(p0, 0) < p1) {
            kvl_set_error("the paged cache removes only the tail of a sequence: [" + std::to_string(p0) + ", " +
                          std::to_string(p1) + ") ends before position " + std::to_string(seqs[s].n_seen) +
                          "; use kvl_keep to drop slots in the middle");
            ok = false;
            continue;
        }
        if (p1 < 0 || std::max(p0, 0) < p1) {
            ok = truncate(llama_seq_id(s), p0) && ok;
        }
    }
    return ok;
}

void llama_kv_paged::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (!valid_seq(src) || !valid_seq(dst) || p0 > 0) {
        kvl_set_error("seq_cp copies a sequence from its beginning into a sequence below n_seq_max = " +
                      std::to_string(seqs.size()));
        LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
        return;
    }
    if (branch(src, dst) && p1 >= 0 && src != dst && !truncate(dst, p1)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
        truncate(dst, 0);
    }
}

void llama_kv_paged::seq_keep(llama_seq_id seq_id) {
    for (size_t s = 0; s < seqs.size(); s++) {
        if (size_t(seq_id) != s) {
            truncate(llama_seq_id(s), 0);
        }
    }
}

void llama_kv_paged::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    GGML_UNUSED(shift);
    kvl_set_error("the paged cache keeps true positions and cannot shift them (seq_add); evict instead");
    LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
}

void llama_kv_paged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    GGML_UNUSED(d);
    kvl_set_error("the paged cache keeps true positions and cannot divide them (seq_div)");
    LLAMA_LOG_ERROR("%s: %s\n", __func__, kvl_last_error());
}

llama_pos llama_kv_paged::seq_pos_min(llama_seq_id seq_id) const {
    if (!valid_seq(seq_id) || seqs[seq_id].n_seen == 0) {
        return -1;
    }
    llama_pos p = seqs[seq_id].n_seen - 1;
    for (const auto & heads : seqs[seq_id].heads) {
        for (const kvl_head & head : heads) {
            // only slots of f16 are in order
            const auto end = head.pos.begin() + std::min(head.n(), head.f16_begin() + 1);
            std::for_each(head.pos.begin(), end, [&](llama_pos pos) {
                p = pos == kvl_head::HOLE ? p : std::min(p, pos);
            });
        }
    }
    return p;
}

llama_pos llama_kv_paged::seq_pos_max(llama_seq_id seq_id) const {
    return valid_seq(seq_id) ? seqs[seq_id].n_seen - 1 : -1;
}

//
// llama_kv_paged_context
//

llama_kv_paged_context::llama_kv_paged_context(llama_memory_status status) : status(status) {}

llama_kv_paged_context::llama_kv_paged_context(llama_kv_paged * kv)
    : kv(kv), recr(kv->recr ? new llama_memory_recurrent_context(kv->recr.get()) : nullptr),
      status(LLAMA_MEMORY_STATUS_SUCCESS), worst_case(true) {}

llama_kv_paged_context::llama_kv_paged_context(llama_kv_paged * kv, std::vector<llama_ubatch> all)
    : kv(kv), recr(kv->recr ? new llama_memory_recurrent_context(kv->recr.get(), all) : nullptr),
      status(LLAMA_MEMORY_STATUS_SUCCESS), ubatches(std::move(all)) {}

llama_kv_paged_context::~llama_kv_paged_context() = default;

bool llama_kv_paged_context::next() {
    if (recr) {
        recr->next();
    }
    return ++i_cur < ubatches.size();
}

bool llama_kv_paged_context::apply() {
    if (recr && !recr->apply()) {
        return false;
    }
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

kvl_layer_shape llama_kv_paged_context::shape(uint32_t layer_id, uint32_t n_seq_tokens, const llama_ubatch & ub) const {
    const kvl_layer & layer = kv->layers[layer_id];
    const bool fused = layer.kernels() != nullptr;
    // a graph is used again until a head crosses a multiple of this; accelerators want it larger
    uint32_t pad = layer.arena->is_host() && !fused ? 2 * KVL_PAGE_SLOTS : 256;
    const uint32_t version = kv->has_mass() ? layer.arena->mass.version() : 0;
    const kvl_mass mass = layer.open() ? kv->mass() : KVL_MASS_NONE;
    // a window and what is left of its first page; a page more, lest it is another graph whenever a page is given up
    const uint32_t n_most = layer.most_seen(n_seq_tokens, kv->n_ctx) + (layer.open() ? 0 : 2 * KVL_PAGE_SLOTS);
    if (worst_case) {
        return {GGML_PAD(std::max(n_seq_tokens, n_most / ub.n_seqs), pad), false, mass, version};
    }
    bool uniform = !fused;
    uint32_t n_pages = 0;
    const uint32_t n = kv->seqs[ub.seq_id[0][0]].heads[layer_id][0].n();
    for (uint32_t s = 0; s < ub.n_seqs; s++) {
        const kvl_sequence & seq = kv->seqs[ub.seq_id[s * n_seq_tokens][0]];
        for (size_t h = 0; h < layer.n_head_kv; h++) {
            const kvl_head & head = seq.heads[layer_id][h];
            const uint32_t n_recalled = seq.recalled_of(layer_id, h).n_pages();
            n_pages = std::max(n_pages, head.n_listed + n_recalled);
            uniform = uniform && n_recalled == 0;
            if (fused && (head.n_listed < head.pages.size() || n_recalled > 0)) { // chosen anew: now more, now less
                pad = 2048;
            }
            uniform = uniform && head.n() == n && std::all_of(head.live.begin(), head.live.end(), [](uint32_t bits) {
                          return bits == UINT32_MAX;
                      });
        }
    }
    uint32_t n_kv = n_pages * KVL_PAGE_SLOTS;
    if (!layer.open() && n_kv > uint32_t(std::abs(layer.n_swa))) {
        n_kv = std::max(n_kv, n_most);
    }
    return {GGML_PAD(n_kv, pad), uniform, mass, version};
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
