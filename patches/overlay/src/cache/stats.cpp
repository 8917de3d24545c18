// Accounting: what sequences hold, what pools have given, in bytes.

#include "cache/memory.h"
#include "llama-hparams.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <bitset>

uint64_t llama_kv_paged::allocated_bytes() const {
    uint64_t n = 0;
    for_pools([&](const kvl_pool & pool) {
        n += pool.allocated_bytes();
    });
    for (const kvl_sequence & seq : seqs) {
        for (const kvl_marked & mark : seq.marks) {
            n += mark.state.size();
        }
    }
    return n + state_bytes();
}

void llama_kv_paged::note_peak() {
    peak_bytes = std::max(peak_bytes, allocated_bytes());
}

bool llama_kv_paged::no_alloc() const {
    return hparams.no_alloc;
}

bool llama_kv_paged::all_host() const {
    return std::all_of(arenas.begin(), arenas.end(), [](const auto & arena) {
        return arena->is_host();
    });
}

bool llama_kv_paged::all_fused() const {
    return std::all_of(arenas.begin(), arenas.end(), [](const auto & arena) {
        return arena->kernels != nullptr;
    });
}

std::string llama_kv_paged::without_kernels() const {
    if (params.portable) {
        return "a portable context does without; use --kernels auto";
    }
    for (const auto & arena : arenas) {
        if (!arena->kernels) {
            return kvl_lacks_kernels(kvl_device_of(arena->shape.buft));
        }
    }
    return "";
}

void llama_kv_paged::note_held(const kvl_layer & layer, kvl_head & head) const {
    head.used_bytes = 0;
    head.page_bytes = 0;
    for (uint32_t p = 0; p < head.pages.size(); p++) {
        kvl_pool & pool = *layer.pools[kvl_head::page_format(head.pages[p])];
        const uint32_t bits = head.held_bits(p);
        pool.hold(kvl_head::page_number(head.pages[p]), bits);
        head.used_bytes += std::bitset<KVL_PAGE_SLOTS>(bits).count() * pool.slot_bytes();
        head.page_bytes += KVL_PAGE_SLOTS * pool.slot_bytes();
    }
}

void llama_kv_paged::recount() const {
    for_pools([&](kvl_pool & pool) {
        if (!pool.stale()) {
            return;
        }
        pool.forget();
        for (const kvl_sequence & seq : seqs) {
            for (size_t l = 0; l < layers.size(); l++) {
                for (const kvl_head & head : seq.heads[l]) {
                    for (uint32_t p = 0; p < head.pages.size(); p++) {
                        if (layers[l].pools[kvl_head::page_format(head.pages[p])] == &pool) {
                            pool.count(kvl_head::page_number(head.pages[p]), head.held_bits(p));
                        }
                    }
                }
            }
            for (size_t l = 0; l < seq.recalled.size(); l++) {
                for (const kvl_recalled & of : seq.recalled[l]) {
                    for (size_t p = 0; p < of.pages.size() && layers[l].pool == &pool; p++) {
                        if (of.pages[p] != kvl_pool::NONE) {
                            pool.count(of.pages[p], of.used[p]);
                        }
                    }
                }
            }
            for_marks(seq, [&](const kvl_layer & layer, const kvl_head & head, uint32_t p) {
                if (layer.pools[kvl_head::page_format(head.pages[p])] == &pool) {
                    pool.count(kvl_head::page_number(head.pages[p]), head.held_bits(p));
                }
            });
        }
    });
}

uint64_t llama_kv_paged::mark_bytes(const kvl_sequence & seq) const {
    uint64_t n = 0;
    for (const kvl_marked & mark : seq.marks) {
        n += mark.state.size();
        for (size_t i = 0; i < mark.windows.size(); i++) {
            const std::vector<kvl_head> & heads = seq.heads[n_open + i];
            for (size_t h = 0; h < heads.size(); h++) { // what the sequence itself holds no more
                const llama_pos first = heads[h].pos.empty() ? 0 : heads[h].pos.front();
                const std::vector<llama_pos> & pos = mark.windows[i][h].pos;
                n += uint64_t(std::lower_bound(pos.begin(), pos.end(), first) - pos.begin()) *
                     layers[n_open + i].pool->slot_bytes();
            }
        }
    }
    return n;
}

uint64_t llama_kv_paged::recalled_bytes(const kvl_sequence & seq) const {
    uint64_t n = 0;
    for (size_t l = 0; l < seq.recalled.size(); l++) {
        for (const kvl_recalled & of : seq.recalled[l]) {
            n += of.n() * layers[l].pool->slot_bytes();
        }
    }
    return n;
}

void llama_kv_paged::get_seq_stats(llama_seq_id seq_id, kvl_seq_stats & out) const {
    const kvl_sequence & seq = seqs[seq_id];
    out = {};
    out.n_seen = seq.n_seen;
    out.held_min = INT64_MAX;
    for (size_t l = n_open; l < layers.size(); l++) {
        for (const kvl_head & head : seq.heads[l]) {
            out.fixed_bytes += head.used_bytes;
        }
        const uint64_t most = std::min<uint64_t>(uint64_t(std::abs(layers[l].n_swa)) + KVL_PAGE_SLOTS - 1, n_ctx);
        const uint64_t f16 = layers[l].pool->slot_bytes();
        const uint64_t stored = layers[l].pools[size_t(params.window_format)]->slot_bytes();
        out.fixed_limit += layers[l].n_head_kv * (most * stored + KVL_PAGE_SLOTS * (f16 - stored));
    }
    out.full_bytes = kvl_full_bytes(model, uint64_t(seq.n_seen));
    const uint64_t state = state_bytes() / seqs.size();
    out.fixed_bytes += mark_bytes(seq) + (seq.n_seen > 0 ? state : 0);
    out.fixed_limit += state;
    out.recalled_bytes = recalled_bytes(seq);
    out.archive_bytes = seq.archive.bytes();
    out.used_bytes = out.fixed_bytes + out.recalled_bytes;
    for (size_t l = 0; l < n_open; l++) {
        for (const kvl_head & head : seq.heads[l]) {
            out.n_slots += head.held();
            out.n_heads++;
            out.held_min = std::min<int64_t>(out.held_min, head.held());
            out.held_max = std::max<int64_t>(out.held_max, head.held());
            out.used_bytes += head.used_bytes;
            out.page_bytes += head.page_bytes;
        }
    }
}

void llama_kv_paged::get_stats(kvl_stats & out) const {
    out = {};
    out.peak_bytes = peak_bytes;
    out.n_evict = n_evict;
    out.score_us = score_us;
    out.keep_us = keep_us;
    recount();
    for_pools([&](const kvl_pool & pool) {
        out.used_bytes += pool.used_bytes();
        out.reserved_bytes += pool.reserved_bytes();
    });
    out.allocated_bytes = allocated_bytes();
    for (size_t s = 0; s < seqs.size(); s++) {
        kvl_seq_stats st;
        get_seq_stats(llama_seq_id(s), st);
        out.full_bytes += st.full_bytes;
        out.fixed_bytes += st.fixed_bytes;
        out.used_bytes += st.n_seen > 0 ? state_bytes() / seqs.size() : 0;
        for (const kvl_marked & mark : seqs[s].marks) {
            out.used_bytes += mark.state.size();
        }
        out.index_bytes += seqs[s].index.bytes();
        out.recalled_bytes += st.recalled_bytes;
        out.archive_bytes += st.archive_bytes;
        out.query_bytes += st.n_seen > 0 ? query_bytes / seqs.size() : 0;
        for (size_t l = 0; l < layers.size(); l++) {
            for (const kvl_head & head : seqs[s].heads[l]) {
                out.table_bytes += head.pages.size() * 2 * sizeof(uint32_t);
                out.table_bytes += head.n() * sizeof(llama_pos) + head.mass.size() * layers[l].arena->mass.page_bytes();
            }
        }
    }
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_paged::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> out;
    for (const auto & arena : arenas) {
        for (const auto & pool : arena->pools) {
            if (pool) { // in main memory it is address space until it is used; a device's buffer is taken whole
                out[arena->shape.buft] += arena->is_host() ? pool->allocated_bytes() : pool->reserved_bytes();
            }
        }
    }
    for (const auto & arena : arenas) {
        if (!arena->is_host()) {
            ggml_tensor * mass = arena->mass.tensor();
            out[arena->shape.buft] += ggml_nbytes(arena->means) + (mass ? ggml_nbytes(mass) : 0);
        }
    }
    for (const kvl_layer & layer : layers) {
        if (layer.queries) {
            out[layer.arena->shape.buft] += ggml_nbytes(layer.queries);
        }
    }
    if (recr) {
        for (const auto & [buft, bytes] : recr->memory_breakdown()) {
            out[buft] += bytes;
        }
    }
    return out;
}
