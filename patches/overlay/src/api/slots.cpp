// The C API: the slots of a sequence, reading them, what they receive, keeping, selecting, branching, cutting.

#include "api/arguments.h"
#include "graph/rope.h"
#include "graph/scores.h"
#include "llama-context.h"

#include <algorithm>

using namespace kvl_api;

//
// read
//

int32_t kvl_slots(const llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t * n, int64_t room, int32_t * pos,
                  int32_t * format, int32_t * page) {
    const auto * kv = memory_of(ctx, seq, layer);
    if (!kv || !given(n)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        int64_t n_held = 0;
        for (const kvl_head & head : kv->seqs[seq].heads[layer]) {
            *n++ = int32_t(head.held());
            n_held += head.held();
        }
        if (!pos && !format && !page) {
            return int32_t(KVL_OK);
        }
        if (n_held > room) {
            return kvl_fail(KVL_ERR_ARGUMENT, "the layer holds " + std::to_string(n_held) +
                                                  " slots, the arrays have room for " + std::to_string(room));
        }
        for (const kvl_head & head : kv->seqs[seq].heads[layer]) {
            for (const uint32_t slot : head.order()) {
                if (pos) {
                    *pos++ = head.pos[slot];
                }
                if (format) {
                    *format++ = int32_t(head.format(slot));
                }
                if (page) {
                    *page++ = int32_t(slot / KVL_PAGE_SLOTS);
                }
            }
        }
        return int32_t(KVL_OK);
    });
}

int32_t kvl_window_scores(llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries, int32_t rms,
                          float * out, int64_t stride) {
    auto * kv = contents_of(ctx, seq, layer);
    if (!kv || !given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    if (n_queries < 0) {
        return kvl_fail(KVL_ERR_ARGUMENT,
                        "there are no " + std::to_string(n_queries) + " queries; the number must be 0 or more");
    }
    return guarded([&] {
        const int64_t t0 = ggml_time_us();
        ctx->synchronize();
        const int n_threads = int(ctx->n_threads_batch());
        const int32_t rc =
            kvl_compute_window_scores(*kv, seq, uint32_t(layer), n_queries, rms != 0, n_threads, out, stride);
        kv->score_us += uint64_t(ggml_time_us() - t0);
        return rc;
    });
}

int32_t kvl_set_mass(llama_context * ctx, int32_t kind) {
    auto * kv = memory_of(ctx);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    if (kind < KVL_MASS_NONE || kind > KVL_MASS_LAST) {
        return kvl_fail(KVL_ERR_ARGUMENT, "there is no kvl_mass " + std::to_string(kind));
    }
    return guarded([&] {
        ctx->synchronize();
        return int32_t(kv->set_mass(kvl_mass(kind)) ? KVL_OK : KVL_ERR_UNSUPPORTED);
    });
}

int32_t kvl_slot_mass(llama_context * ctx, llama_seq_id seq, int32_t layer, float * mass, int64_t stride, bool write) {
    auto * kv = memory_of(ctx, seq, layer);
    if (!kv || !given(mass)) {
        return KVL_ERR_ARGUMENT;
    }
    if (!kv->has_mass()) {
        return kvl_fail(KVL_ERR_ARGUMENT, "attention mass is not accumulated; call kvl_set_mass first");
    }
    return guarded([&] {
        const kvl_layer & shape = kv->layers[layer];
        std::vector<kvl_head> & heads = kv->seqs[seq].heads[layer];
        for (const kvl_head & head : heads) {
            if (int64_t(head.held()) > stride) {
                return kvl_fail(KVL_ERR_ARGUMENT, "a head holds " + std::to_string(head.held()) +
                                                      " slots, the array has room for " + std::to_string(stride));
            }
        }
        ctx->synchronize();
        for (kvl_head & head : heads) {
            const std::vector<uint32_t> order = head.order();
            std::vector<std::vector<float>> stored = kv->read_mass(shape, head);
            for (std::vector<float> & row : stored) {
                for (size_t i = 0; i < order.size(); i++) {
                    (write ? row[order[i]] : mass[i]) = write ? mass[i] : row[order[i]];
                }
                if (!write) {
                    std::fill(mass + order.size(), mass + stride, 0.0f);
                }
                mass += stride;
            }
            if (write) {
                kv->write_mass(shape, head, stored);
            }
        }
        return int32_t(KVL_OK);
    });
}

int32_t kvl_read_kv(llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t head, float * k, float * v) {
    auto * kv = contents_of(ctx, seq, layer);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    if (head < 0 || uint32_t(head) >= kv->layers[layer].n_head_kv) {
        return kvl_fail(KVL_ERR_ARGUMENT, "KV head " + std::to_string(head) + " does not exist");
    }
    return guarded([&] {
        ctx->synchronize();
        const std::vector<uint32_t> order = kv->seqs[seq].heads[layer][head].order();
        const auto read = [&](bool keys, uint32_t d, float * out) {
            kv->for_slots(seq, uint32_t(layer), uint32_t(head), order, keys, [&](uint32_t, const float * x) {
                std::copy_n(x, d, out);
                if (kv->params.rotate) {
                    kv->rotate_row(out, d);
                }
                out += d;
            });
        };
        if (k) {
            read(true, kv->layers[layer].pool->d_k, k);
        }
        if (v && !kv->layers[layer].latent()) {
            read(false, kv->layers[layer].pool->d_v, v);
        }
        return int32_t(KVL_OK);
    });
}

int32_t kvl_value_norms(llama_context * ctx, llama_seq_id seq, int32_t layer, float * out) {
    auto * kv = contents_of(ctx, seq, layer);
    if (!kv || !given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        kv->value_norms(seq, uint32_t(layer), int(ctx->n_threads_batch()), out);
        return int32_t(KVL_OK);
    });
}

int32_t kvl_read_queries(llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries, float * q) {
    auto * kv = contents_of(ctx, seq, layer);
    if (!kv || !given(q)) {
        return KVL_ERR_ARGUMENT;
    }
    if (n_queries < 0) {
        return kvl_fail(KVL_ERR_ARGUMENT,
                        "there are no " + std::to_string(n_queries) + " queries; the number must be 0 or more");
    }
    return guarded([&] {
        ctx->synchronize();
        const ggml_tensor * t = kv->layers[layer].queries;
        const std::vector<int32_t> rows = kv->window_rows(seq);
        const size_t n = std::min(rows.size(), size_t(n_queries));
        for (size_t i = rows.size() - n; i < rows.size(); i++) {
            ggml_backend_tensor_get(t, q, t->nb[1] * size_t(rows[i]), t->nb[1]);
            const uint32_t d_k = kv->layers[layer].pool->d_k;
            for (float * head = q; kv->params.rotate && head < q + t->ne[0]; head += d_k) {
                kv->rotate_row(head, d_k);
            }
            q += t->ne[0];
        }
        return int32_t(n);
    });
}

int32_t kvl_rotate(llama_context * ctx, int32_t layer, int32_t n, float * x, const int32_t * pos) {
    auto * kv = contents_of(ctx, 0, layer);
    if (!kv || (n > 0 && !given(x, pos))) {
        return KVL_ERR_ARGUMENT;
    }
    if (n < 0) {
        return kvl_fail(KVL_ERR_ARGUMENT, "cannot turn " + std::to_string(n) + " rows");
    }
    return guarded([&] {
        return kvl_rotate_rows(*ctx, *kv, uint32_t(layer), n, x, pos);
    });
}

//
// change
//

int32_t kvl_keep(llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_keep, const int32_t * slots) {
    auto * kv = memory_of(ctx, seq, layer);
    if (!kv || !given(n_keep, slots)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        const int64_t t0 = ggml_time_us();
        ctx->synchronize();
        const bool ok = kv->keep(seq, uint32_t(layer), n_keep, slots);
        kv->keep_us += uint64_t(ggml_time_us() - t0);
        return int32_t(ok ? KVL_OK : KVL_ERR_ARGUMENT);
    });
}

int32_t kvl_demote(llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t format, const int32_t * n_demote,
                   const int32_t * which, int32_t n_positions, int32_t n_most) {
    auto * kv = memory_of(ctx, seq, layer);
    if (!kv || ((n_demote || n_positions > 0) && !given(which))) {
        return KVL_ERR_ARGUMENT;
    }
    if (!n_demote && (n_positions < 0 || n_most < 0 || !std::is_sorted(which, which + n_positions))) {
        return kvl_fail(KVL_ERR_ARGUMENT,
                        "positions to demote must be ascending, their number and n_most not negative");
    }
    return guarded([&] {
        ctx->synchronize();
        const int n_threads = int(ctx->n_threads_batch());
        return n_demote ? kv->demote(seq, uint32_t(layer), uint32_t(format), n_demote, which, n_threads)
                        : kv->demote_due(seq, uint32_t(layer), uint32_t(format), n_positions, which, n_most, n_threads);
    });
}

int32_t kvl_set_mean(llama_context * ctx, llama_seq_id seq, int32_t layer, const float * mean, llama_pos p0,
                     llama_pos p1, int32_t n_least) {
    auto * kv = memory_of(ctx, seq, layer);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        return mean ? kv->set_mu(seq, uint32_t(layer), mean)
                    : kv->centre(seq, uint32_t(layer), p0, p1, n_least, int(ctx->n_threads_batch()));
    });
}

int32_t kvl_select(llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_select,
                   const int32_t * slots) {
    auto * kv = memory_of(ctx, seq, layer);
    if (!kv || (n_select && !given(slots))) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        return int32_t(kv->select(seq, uint32_t(layer), n_select, slots) ? KVL_OK : KVL_ERR_ARGUMENT);
    });
}

int32_t kvl_branch(llama_context * ctx, llama_seq_id src, llama_seq_id dst) {
    auto * kv = memory_of(ctx, src);
    if (!kv || !memory_of(ctx, dst)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        return int32_t(kv->branch(src, dst) ? KVL_OK : KVL_ERR_ARGUMENT);
    });
}

int32_t kvl_truncate(llama_context * ctx, llama_seq_id seq, llama_pos p0) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        if (kv->truncate(seq, p0)) {
            return int32_t(KVL_OK);
        }
        return int32_t(kv->reach(seq, p0) == p0 ? KVL_ERR_MEMORY : KVL_ERR_UNSUPPORTED);
    });
}

int32_t kvl_mark(llama_context * ctx, llama_seq_id seq) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        kv->mark(seq);
        return int32_t(KVL_OK);
    });
}

llama_pos kvl_reach(const llama_context * ctx, llama_seq_id seq, llama_pos p) {
    const auto * kv = memory_of(ctx, seq);
    return kv ? kv->reach(seq, p) : KVL_ERR_ARGUMENT;
}

int32_t kvl_roll(llama_context * ctx, llama_seq_id seq) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        ctx->synchronize();
        return kvl_roll_sequence(*ctx, *kv, seq);
    });
}
