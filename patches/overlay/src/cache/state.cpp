// Saving a sequence and restoring it, through llama_state_seq_*: its page tables, positions and pages as they are.
//
// Everything but the pages comes first and is checked before anything is changed. What the checks let through keeps the
// invariants of kvl_head, whoever wrote it.

#include "llama-io.h"
#include "cache/memory.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

namespace {

constexpr uint32_t VERSION = 1;

// What must be the same where a sequence is restored.
struct kvl_state_header {
    uint32_t version = VERSION;
    uint32_t n_layers = 0;
    uint32_t rotate = 0;
    uint32_t kivi_bits = 0;
    uint32_t kivi_group = 0;
    uint32_t mass = 0;
};

struct kvl_state_layer {
    uint32_t n_head = 0;
    uint32_t n_head_kv = 0;
    uint32_t d_k = 0;
    uint32_t d_v = 0;
    uint32_t n_mu = 0;
};

struct kvl_state_head {
    uint32_t n_pages = 0;
    uint32_t n_slots = 0;
    uint32_t n_mass = 0;
};

// llama_context turns it into an error return of llama_state_*.
[[noreturn]] void refuse(const std::string & what) {
    kvl_set_error(what);
    throw std::runtime_error(what);
}

template <typename T> void write(llama_io_write_i & io, const T & x) {
    io.write(&x, sizeof(x));
}

template <typename T> void write(llama_io_write_i & io, const std::vector<T> & x) {
    if (!x.empty()) { // whose data may be NULL
        io.write(x.data(), x.size() * sizeof(T));
    }
}

template <typename T> void read(llama_io_read_i & io, T & x) {
    io.read(&x, sizeof(x));
}

template <typename T> void read(llama_io_read_i & io, std::vector<T> & x, size_t n) {
    x.resize(n);
    if (n > 0) {
        io.read(x.data(), n * sizeof(T));
    }
}

kvl_state_header header_of(const llama_kv_paged & kv) {
    kvl_state_header out;
    out.n_layers = uint32_t(kv.layers.size());
    out.rotate = uint32_t(kv.params.rotate);
    out.kivi_bits = uint32_t(kv.params.kivi_bits);
    out.kivi_group = uint32_t(kv.params.kivi_group);
    out.mass = uint32_t(kv.mass());
    return out;
}

kvl_state_layer shape_of(const kvl_layer & layer) {
    kvl_state_layer out;
    out.n_head = layer.n_head;
    out.n_head_kv = layer.n_head_kv;
    out.d_k = layer.pool->d_k;
    out.d_v = layer.pool->d_v;
    return out;
}

size_t page_bytes(const ggml_tensor * t) {
    return KVL_PAGE_SLOTS * t->nb[1];
}

// f(tensor, offset in it, bytes) for K and V of every page of a sequence.
template <typename F> void for_pages(const llama_kv_paged & kv, const kvl_sequence & seq, F && f) {
    for (size_t l = 0; l < kv.layers.size(); l++) {
        for (const kvl_head & head : seq.heads[l]) {
            for (const uint32_t entry : head.pages) {
                const kvl_pool & pool = *kv.layers[l].pools[kvl_head::page_format(entry)];
                for (ggml_tensor * t : {pool.k, pool.v}) {
                    f(t, kvl_head::page_number(entry) * page_bytes(t), page_bytes(t));
                }
            }
        }
    }
}

// Which holes a page may have: none but at the end of its format, and in kivi any.
bool holes_allowed(const kvl_head & head, uint32_t p) {
    const uint32_t format = kvl_head::page_format(head.pages[p]);
    if (format == KVL_FORMAT_KIVI) {
        return true;
    }
    const uint32_t n = std::min(head.n() - p * KVL_PAGE_SLOTS, uint32_t(KVL_PAGE_SLOTS));
    const auto begin = head.pos.begin() + p * KVL_PAGE_SLOTS;
    const auto hole = std::find(begin, begin + n, kvl_head::HOLE);
    const bool last = p + 1 == head.pages.size() || kvl_head::page_format(head.pages[p + 1]) != format;
    const bool rest = std::all_of(hole, begin + n, [](llama_pos pos) {
        return pos == kvl_head::HOLE;
    });
    return hole == begin + n || (last && format != KVL_FORMAT_F16 && hole != begin && rest);
}

void check_finite(const float * x, size_t n) {
    if (!std::all_of(x, x + n, [](float value) {
            return std::isfinite(value);
        })) {
        refuse("the saved sequence is damaged: it holds values that are no numbers");
    }
}

// Empty, or what is wrong with a head that claims to have seen n_seen tokens; pages hold formats, not numbers.
std::string fault_of(const kvl_layer & layer, kvl_head & head, llama_pos n_seen) {
    if (head.pages.size() != (size_t(head.n()) + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS) {
        return "it has " + std::to_string(head.pages.size()) + " pages for " + std::to_string(head.n()) + " slots";
    }
    if (head.n() % KVL_PAGE_SLOTS != 0 && kvl_head::page_format(head.pages.back()) != KVL_FORMAT_F16) {
        return "its last page is not f16, and not whole";
    }
    std::vector<uint32_t> n_pages(KVL_FORMAT_COUNT, 0);
    for (size_t p = 0; p < head.pages.size(); p++) {
        const uint32_t format = kvl_head::page_format(head.pages[p]);
        if (format >= KVL_FORMAT_COUNT || !layer.pools[format]) {
            return "page format " + std::to_string(format) + " is not one of this context's";
        }
        if (p > 0 && format > kvl_head::page_format(head.pages[p - 1])) {
            return "its pages are not in the order of their formats";
        }
        n_pages[format]++;
    }
    for (uint32_t f = 0; f < KVL_FORMAT_COUNT; f++) {
        if (n_pages[f] > 0 && n_pages[f] % layer.pools[f]->n_together != 0) {
            return "a group of kivi lacks a page";
        }
    }
    std::vector<llama_pos> held;
    for (const llama_pos pos : head.pos) {
        if (pos < kvl_head::HOLE || pos >= n_seen) {
            return "position " + std::to_string(pos) + " is not below " + std::to_string(n_seen);
        }
        if (pos != kvl_head::HOLE) {
            held.push_back(pos);
        }
    }
    head.n_holes = head.n() - uint32_t(held.size());
    const auto f16 = head.pos.begin() + head.f16_begin();
    std::sort(held.begin(), held.end());
    if (!std::is_sorted(f16, head.pos.end()) || std::adjacent_find(held.begin(), held.end()) != held.end()) {
        return "its positions are not in order";
    }
    for (uint32_t p = 0; p < head.pages.size(); p++) {
        if ((head.live[p] & ~head.all_live(p)) != 0 || !holes_allowed(head, p)) {
            return "page " + std::to_string(p) + " has holes where none can be";
        }
    }
    const uint32_t together = n_pages[KVL_FORMAT_KIVI] > 0 ? layer.pools[KVL_FORMAT_KIVI]->n_together : 1;
    for (uint32_t p = 0, n_held = 0; p < head.pages.size(); p++) {
        n_held += head.in_page(p);
        const bool kivi = kvl_head::page_format(head.pages[p]) == KVL_FORMAT_KIVI;
        const uint32_t first = n_pages[KVL_FORMAT_TOKEN2]; // only these come before
        if (kivi && (p - first + 1) % together == 0 && n_held == 0) {
            return "a group of kivi holds nothing";
        }
        n_held = kivi && (p - first + 1) % together != 0 ? n_held : 0;
    }
    // rows for slots to come are seen
    if (head.n() % KVL_PAGE_SLOTS != 0) {
        head.live.back() |= UINT32_MAX << head.n() % KVL_PAGE_SLOTS;
    }
    return "";
}

} // namespace

void llama_kv_paged::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (no_alloc()) {
        refuse("the model was loaded without its weights, so that there is nothing to save");
    }
    if (!valid_seq(seq_id) || flags != 0) {
        refuse("a paged cache is saved sequence by sequence, whole: use llama_state_seq_get_data without flags");
    }
    const kvl_sequence & seq = seqs[seq_id];
    const std::vector<int32_t> rows = window_rows(seq_id);
    write(io, header_of(*this));
    write(io, seq.n_seen);
    write(io, uint32_t(rows.size()));
    for (size_t l = 0; l < layers.size(); l++) {
        kvl_state_layer layer = shape_of(layers[l]);
        layer.n_mu = uint32_t(seq.mu[l].size());
        write(io, layer);
        write(io, seq.mu[l]);
        for (const kvl_head & head : seq.heads[l]) {
            write(io, kvl_state_head{uint32_t(head.pages.size()), head.n(), uint32_t(head.mass.size())});
            for (const uint32_t entry : head.pages) {
                write(io, kvl_head::page_format(entry));
            }
            write(io, head.live);
            write(io, head.pos);
            for (const auto & mass : head.mass) {
                write(io, mass);
            }
        }
    }
    for (const kvl_layer & layer : layers) {
        for (const int32_t row : rows) {
            const size_t n = layer.queries->nb[1];
            io.write_tensor(layer.queries, n * size_t(row), n);
        }
    }
    for_pages(*this, seq, [&](ggml_tensor * t, size_t offset, size_t n) {
        io.write_tensor(t, offset, n);
    });
}

void llama_kv_paged::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (no_alloc()) {
        refuse("the model was loaded without its weights, so that there is no place for what was saved");
    }
    if (!valid_seq(seq_id) || flags != 0) {
        refuse("a paged cache is restored sequence by sequence, whole: use llama_state_seq_set_data without flags");
    }
    kvl_state_header header;
    kvl_sequence seq;
    uint32_t n_rows = 0;
    read(io, header);
    read(io, seq.n_seen);
    read(io, n_rows);
    const kvl_state_header want = header_of(*this);
    if (header.version != want.version || header.n_layers != want.n_layers || header.rotate != want.rotate ||
        header.kivi_bits != want.kivi_bits || header.kivi_group != want.kivi_group || header.mass != want.mass) {
        refuse("the saved sequence is of a cache with other settings");
    }
    if (seq.n_seen < 0 || seq.n_seen > KVL_POS_END || n_rows > uint32_t(params.n_window) ||
        n_rows > uint32_t(seq.n_seen)) {
        refuse("the saved sequence claims " + std::to_string(seq.n_seen) + " tokens and " + std::to_string(n_rows) +
               " window queries; this context remembers " + std::to_string(params.n_window));
    }
    std::map<kvl_pool *, uint64_t> need;
    for (size_t l = 0; l < layers.size(); l++) {
        kvl_state_layer layer;
        read(io, layer);
        const kvl_state_layer ours = shape_of(layers[l]);
        if (layer.n_head != ours.n_head || layer.n_head_kv != ours.n_head_kv || layer.d_k != ours.d_k ||
            layer.d_v != ours.d_v || (layer.n_mu != 0 && layer.n_mu != ours.n_head_kv * ours.d_k)) {
            refuse("the saved sequence is of another model: layer " + std::to_string(l) + " has other shapes");
        }
        read(io, seq.mu.emplace_back(), layer.n_mu);
        check_finite(seq.mu.back().data(), seq.mu.back().size());
        seq.heads.emplace_back(layers[l].n_head_kv);
        for (kvl_head & head : seq.heads.back()) {
            kvl_state_head sizes;
            read(io, sizes);
            const kvl_head & mine = seqs[seq_id].heads[l][0];
            if (sizes.n_slots > layers[l].pool->size() * KVL_PAGE_SLOTS || sizes.n_pages > layers[l].pool->size() ||
                sizes.n_mass != mine.mass.size()) {
                refuse("the saved sequence does not fit: layer " + std::to_string(l) + " claims " +
                       std::to_string(sizes.n_slots) + " slots in " + std::to_string(sizes.n_pages) + " pages");
            }
            read(io, head.pages, sizes.n_pages);
            read(io, head.live, sizes.n_pages);
            read(io, head.pos, sizes.n_slots);
            head.mass.resize(sizes.n_mass);
            for (auto & mass : head.mass) {
                read(io, mass, sizes.n_slots);
                check_finite(mass.data(), mass.size());
            }
            for (uint32_t & entry : head.pages) {
                entry = kvl_head::page_entry(std::min<uint32_t>(entry, KVL_PAGE_FORMATS - 1), 0);
            }
            if (const std::string fault = fault_of(layers[l], head, seq.n_seen); !fault.empty()) {
                refuse("the saved sequence is damaged: a head of layer " + std::to_string(l) + " is wrong, " + fault);
            }
            for (const uint32_t entry : head.pages) {
                need[layers[l].pools[kvl_head::page_format(entry)]]++;
            }
        }
    }
    truncate(seq_id, 0);
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            refuse("the KV pool is full: the saved sequence needs " + std::to_string(n) + " pages, " +
                   std::to_string(pool->n_free()) + " are free; use a larger context (-c)");
        }
    }
    seq.window.assign(size_t(params.n_window), -1);
    for (llama_pos pos = seq.n_seen - llama_pos(n_rows); pos < seq.n_seen; pos++) {
        seq.window[size_t(pos) % size_t(params.n_window)] = pos;
    }
    for (size_t l = 0; l < layers.size(); l++) {
        for (kvl_head & head : seq.heads[l]) {
            for (size_t p = 0; p < head.pages.size();) {
                const uint32_t format = kvl_head::page_format(head.pages[p]);
                kvl_pool & pool = *layers[l].pools[format];
                const uint32_t first = pool.take();
                for (uint32_t i = 0; i < pool.n_together; i++) {
                    head.pages[p++] = kvl_head::page_entry(format, first + i);
                }
            }
            note_held(layers[l], head);
        }
    }
    seqs[seq_id] = std::move(seq);
    note_peak();
    kvl_set_error("");
    try {
        // by way of main memory: upstream defers what is read into tensors, and it is checked here
        std::vector<uint8_t> bytes;
        const auto read_into = [&](ggml_tensor * t, size_t offset, size_t n) {
            read(io, bytes, n);
            ggml_backend_tensor_set(t, bytes.data(), offset, n);
        };
        for (const kvl_layer & layer : layers) {
            for (const int32_t row : window_rows(seq_id)) {
                const size_t n = layer.queries->nb[1];
                read_into(layer.queries, n * size_t(row), n);
                check_finite(reinterpret_cast<const float *>(bytes.data()), n / sizeof(float));
            }
        }
        for_pages(*this, seqs[seq_id], read_into);
        check_pages(seq_id);
    } catch (...) {
        truncate(seq_id, 0);
        if (*kvl_last_error() == 0) {
            kvl_set_error("the saved sequence ends too early");
        }
        throw;
    }
}

void llama_kv_paged::check_pages(llama_seq_id seq_id) const {
    std::vector<float> x;
    for (size_t l = 0; l < layers.size(); l++) {
        for (const kvl_head & head : seqs[seq_id].heads[l]) {
            for (uint32_t p = 0; p < head.pages.size();) {
                const kvl_pool & pool = *layers[l].pools[kvl_head::page_format(head.pages[p])];
                const int n = int(pool.n_together * KVL_PAGE_SLOTS);
                x.resize(size_t(n) * std::max(pool.d_k, pool.d_v));
                const uint64_t row = head.row(p * KVL_PAGE_SLOTS);
                const auto check = [&](const ggml_tensor * t, kvl_row kind, uint32_t d) {
                    if (attn.decode) {
                        attn.decode(kind, static_cast<const char *>(t->data) + row * t->nb[1], 0, n, int(d), x.data(),
                                    int(d));
                    } else {
                        pool.read_rows(row, uint32_t(n), t == pool.k ? x.data() : nullptr,
                                       t == pool.v ? x.data() : nullptr);
                    }
                    check_finite(x.data(), size_t(n) * d);
                };
                check(pool.k, pool.k_row, pool.d_k);
                check(pool.v, pool.v_row, pool.d_v);
                p += pool.n_together;
            }
        }
    }
}
