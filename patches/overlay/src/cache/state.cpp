// Saving a sequence and restoring it, through llama_state_seq_*: its page tables, positions and pages as they are.
//
// Page tables, positions and mass come first and are checked before anything is changed. Then the sequence gives up
// what it held, and is empty if there is no room, or if the queries and pages that follow are damaged.

#include "cache/saved.h"
#include "llama-io.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

namespace {

constexpr uint32_t VERSION = 3;

// What must be the same where a sequence is restored.
struct kvl_state_header {
    uint32_t version = VERSION;
    uint32_t n_layers = 0;
    uint32_t rotate = 0;
    uint32_t kivi_bits = 0;
    uint32_t kivi_group = 0;
    uint32_t mass = 0;
    uint32_t window_format = 0;
};

struct kvl_state_layer {
    uint32_t n_head = 0;
    uint32_t n_head_kv = 0;
    uint32_t d_k = 0;
    uint32_t d_v = 0;
    uint32_t n_mu = 0;
    int32_t n_swa = 0;
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

void check_finite(const float * x, size_t n) {
    if (!std::all_of(x, x + n, [](float value) {
            return std::isfinite(value);
        })) {
        refuse("the saved sequence is damaged: it holds values that are no numbers");
    }
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
    out.window_format = uint32_t(kv.params.window_format);
    return out;
}

kvl_state_layer shape_of(const kvl_layer & layer) {
    kvl_state_layer out;
    out.n_head = layer.n_head;
    out.n_head_kv = layer.n_head_kv;
    out.d_k = layer.pool->d_k;
    out.d_v = layer.pool->d_v;
    out.n_swa = layer.n_swa;
    return out;
}

} // namespace

void llama_kv_paged::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (no_alloc()) {
        refuse("the model was loaded without its weights, so that there is nothing to save");
    }
    if (!valid_seq(seq_id) || flags != 0) {
        refuse("a paged cache is saved sequence by sequence, whole: use llama_state_seq_get_data without flags");
    }
    kvl_sequence seq = seqs[seq_id];
    std::vector<kvl_state_group> groups = kvl_groups_of(*this, seq);
    kvl_rank(groups);
    std::map<const uint32_t *, uint32_t> ranks;
    for (const kvl_state_group & g : groups) {
        for (const kvl_state_page & page : g.pages) {
            ranks[page.entry] = page.rank;
        }
    }
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
            const std::vector<std::vector<float>> mass = read_mass(layers[l], head);
            write(io, kvl_state_head{uint32_t(head.pages.size()), head.n(), uint32_t(mass.size())});
            for (const uint32_t & entry : head.pages) {
                write(io, kvl_head::page_entry(kvl_head::page_format(entry), ranks[&entry]));
            }
            write(io, head.live);
            write(io, head.pos);
            for (const std::vector<float> & row : mass) {
                write(io, row);
            }
        }
    }
    const std::vector<uint8_t> state = read_state(seq_id);
    write(io, uint64_t(state.size()));
    write(io, state);
    for (uint32_t l = 0; l < n_open; l++) {
        for (const int32_t row : rows) {
            const size_t n = layers[l].queries->nb[1];
            io.write_tensor(layers[l].queries, n * size_t(row), n);
        }
    }
    for_runs(groups, [&](ggml_tensor * t, size_t offset, size_t n) {
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
        header.kivi_bits != want.kivi_bits || header.kivi_group != want.kivi_group || header.mass != want.mass ||
        header.window_format != want.window_format) {
        refuse("the saved sequence is of a cache with other settings");
    }
    if (seq.n_seen < 0 || seq.n_seen > KVL_POS_END || n_rows > uint32_t(seq.n_seen)) {
        refuse("the saved sequence is damaged: it claims " + std::to_string(seq.n_seen) + " tokens and " +
               std::to_string(n_rows) + " window queries");
    }
    // a context that remembers fewer queries takes the newest
    const uint32_t n_kept = std::min(n_rows, uint32_t(std::max(params.n_window, 0)));
    std::vector<std::vector<std::vector<std::vector<float>>>> mass(layers.size()); // [layer][KV head]
    for (size_t l = 0; l < layers.size(); l++) {
        kvl_state_layer layer;
        read(io, layer);
        const kvl_state_layer ours = shape_of(layers[l]);
        if (layer.n_head != ours.n_head || layer.n_head_kv != ours.n_head_kv || layer.d_k != ours.d_k ||
            layer.d_v != ours.d_v || layer.n_swa != ours.n_swa ||
            (layer.n_mu != 0 && layer.n_mu != ours.n_head_kv * ours.d_k)) {
            refuse("the saved sequence is of another model: layer " + std::to_string(l) + " has other shapes");
        }
        read(io, seq.mu.emplace_back(), layer.n_mu);
        check_finite(seq.mu.back().data(), seq.mu.back().size());
        seq.heads.emplace_back(layers[l].n_head_kv);
        for (kvl_head & head : seq.heads.back()) {
            kvl_state_head sizes;
            read(io, sizes);
            if (sizes.n_slots > layers[l].pool->size() * KVL_PAGE_SLOTS || sizes.n_pages > layers[l].pool->size() ||
                sizes.n_mass != (has_mass(layers[l]) ? layers[l].group() : 0)) {
                refuse("the saved sequence does not fit: layer " + std::to_string(l) + " claims " +
                       std::to_string(sizes.n_slots) + " slots in " + std::to_string(sizes.n_pages) + " pages");
            }
            read(io, head.pages, sizes.n_pages);
            read(io, head.live, sizes.n_pages);
            read(io, head.pos, sizes.n_slots);
            mass[l].emplace_back(sizes.n_mass);
            for (std::vector<float> & row : mass[l].back()) {
                read(io, row, sizes.n_slots);
                check_finite(row.data(), row.size());
            }
            if (const std::string fault = kvl_fault_of(layers[l], head, seq.n_seen); !fault.empty()) {
                refuse("the saved sequence is damaged: a head of layer " + std::to_string(l) + " is wrong, " + fault);
            }
        }
    }
    uint64_t n_state = 0;
    std::vector<uint8_t> state;
    read(io, n_state);
    if (n_state > state_bytes() / std::max<size_t>(seqs.size(), 1) + 4096) { // with what describes it
        refuse("the saved sequence is damaged: it claims a recurrent state of " + std::to_string(n_state) + " bytes");
    }
    read(io, state, n_state);
    check_state(state, seq.n_seen);
    std::vector<kvl_state_group> groups = kvl_groups_of(*this, seq);
    std::map<const kvl_pool *, uint64_t> need;
    for (kvl_state_group & g : groups) {
        for (kvl_state_page & page : g.pages) {
            page.rank = page.number(); // until it has a number here
            need[page.pool]++;
        }
    }
    if (!kvl_ranks_fit(groups)) {
        refuse("the saved sequence is damaged: its pages are not in order");
    }
    truncate(seq_id, 0);
    for (const auto & [pool, n] : need) {
        if (n > pool->n_free()) {
            refuse("the KV pool is full: the saved sequence needs " + std::to_string(n) + " pages, " +
                   std::to_string(pool->n_free()) + " are free; use a larger context (-c)");
        }
    }
    std::map<kvl_arena *, uint64_t> n_mass;
    for (size_t l = 0; l < layers.size(); l++) {
        for (kvl_head & head : seq.heads[l]) {
            n_mass[layers[l].arena] += has_mass(layers[l]) ? head.pages.size() : 0;
            head.mass.reserve(has_mass(layers[l]) ? head.pages.size() : 0);
        }
    }
    for (const auto & [arena, n] : n_mass) { // before the first page is taken
        if (n > 0) {
            arena->mass.reserve(n);
        }
    }
    seq.window.assign(size_t(params.n_window), -1);
    for (llama_pos pos = seq.n_seen - llama_pos(n_kept); pos < seq.n_seen; pos++) {
        seq.window[size_t(pos) % size_t(params.n_window)] = pos;
    }
    for (const kvl_state_group & g : groups) {
        for (size_t i = 0; i < g.pages.size();) {
            kvl_pool & pool = *g.pages[i].pool;
            const uint32_t first = pool.take(); // the lowest free one: they are in order here as well
            for (uint32_t j = 0; j < pool.n_together; j++, i++) {
                uint32_t & entry = *g.pages[i].entry;
                entry = kvl_head::page_entry(kvl_head::page_format(entry), first + j);
            }
        }
    }
    seq.archive = seqs[seq_id].archive; // empty now, but it says where to
    seqs[seq_id] = std::move(seq);
    for (uint32_t l = 0; l < layers.size(); l++) {
        for (size_t h = 0; h < mass[l].size(); h++) {
            kvl_head & head = seqs[seq_id].heads[l][h];
            note_held(layers[l], head);
            write_mass(layers[l], head, mass[l][h]);
        }
        upload_mean(seq_id, l);
    }
    note_peak();
    kvl_set_error("");
    try {
        // by way of main memory: upstream defers what is read into tensors, and it is checked here
        std::vector<uint8_t> bytes;
        const auto read_into = [&](ggml_tensor * t, size_t offset, size_t n) {
            read(io, bytes, n);
            ggml_backend_tensor_set(t, bytes.data(), offset, n);
        };
        write_state(seq_id, state);
        for (uint32_t l = 0; l < n_open; l++) {
            const kvl_layer & layer = layers[l];
            const size_t n = size_t(layer.pool->d_k) * layer.n_head;
            std::vector<float> query(n);
            for (uint32_t i = 0; i < n_rows - n_kept; i++) {
                read(io, query, n);
            }
            for (const int32_t row : window_rows(seq_id)) {
                read(io, query, n);
                check_finite(query.data(), n);
                ggml_backend_tensor_set(layer.queries, query.data(), layer.queries->nb[1] * size_t(row),
                                        n * sizeof(float));
            }
        }
        for_runs(groups, read_into);
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
    for (uint32_t l = 0; l < layers.size(); l++) {
        for (uint32_t h = 0; h < layers[l].n_head_kv; h++) {
            const kvl_head & head = seqs[seq_id].heads[l][h];
            // holes and rows for slots to come may be read as well: all rows of the pages
            std::vector<uint32_t> slots(head.pages.size() * KVL_PAGE_SLOTS);
            std::iota(slots.begin(), slots.end(), 0);
            for (const bool keys : {true, false}) {
                const size_t d = keys ? layers[l].pool->d_k : layers[l].pool->d_v;
                for_slots(seq_id, l, h, slots, keys, [&](uint32_t, const float * x) {
                    check_finite(x, d);
                });
            }
        }
    }
}
