// Pages of attention mass: taken and dropped with the pages of a head, and what a head's slots received.

#include "cache/mass.h"

#include "cache/memory.h"

#include <algorithm>
#include <map>
#include <new>
#include <stdexcept>

void kvl_mass_pages::reserve(uint64_t n) {
    const uint64_t need = n_used - free.size() + n;
    if (need > n_pages || n_pages == 0) {
        uint64_t size = std::max<uint64_t>(n_pages, n_first);
        while (size < need) {
            size *= 2;
        }
        if (size > INT32_MAX) {
            throw std::runtime_error("the attention mass needs more pages than an index can address");
        }
        grow(uint32_t(size));
    }
    free.reserve(n_pages); // drop() cannot fail either
}

uint32_t kvl_mass_pages::take() {
    uint32_t page;
    if (free.empty()) {
        page = n_used++;
    } else {
        page = free.back();
        free.pop_back();
    }
    clear(page, 0);
    return page;
}

void kvl_mass_pages::drop(uint32_t page) {
    free.push_back(page);
}

void kvl_mass_pages::trim() {
    if (t && free.size() == n_used) {
        mem->give_back(0, ggml_nbytes(t));
        n_used = 0;
        free.clear();
    }
}

void kvl_mass_pages::clear() {
    t = nullptr;
    mem.reset();
    ctx.reset();
    n_pages = n_used = 0;
    free.clear();
}

void kvl_mass_pages::grow(uint32_t n) {
    ggml_init_params params = {ggml_tensor_overhead(), nullptr, true};
    ggml_context_ptr new_ctx(ggml_init(params));
    if (!new_ctx) {
        throw std::bad_alloc();
    }
    ggml_tensor * larger = ggml_new_tensor_2d(new_ctx.get(), GGML_TYPE_F32, int64_t(KVL_PAGE_SLOTS) * group, n);
    ggml_set_name(larger, "kvl_mass");
    auto new_mem = std::make_unique<kvl_region>(buft, ggml_nbytes(larger), no_alloc);
    if (!new_mem->place(larger, 0)) {
        throw std::runtime_error("cannot place the attention mass");
    }
    if (t && t->data) {
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
        ggml_backend_tensor_set(larger, bytes.data(), 0, bytes.size());
    }
    t = larger;
    mem = std::move(new_mem);
    ctx = std::move(new_ctx);
    n_pages = n;
    n_grown++;
}

size_t kvl_mass_pages::at(uint32_t page, uint32_t g, uint32_t first) const {
    return page * t->nb[1] + (g * KVL_PAGE_SLOTS + first) * sizeof(float);
}

void kvl_mass_pages::read(uint32_t page, uint32_t g, uint32_t first, uint32_t n, float * out) const {
    if (t->data) { // else there are no weights, and nothing was received
        ggml_backend_tensor_get(t, out, at(page, g, first), n * sizeof(float));
    }
}

void kvl_mass_pages::write(uint32_t page, uint32_t g, uint32_t first, uint32_t n, const float * values) {
    if (t->data) {
        ggml_backend_tensor_set(t, values, at(page, g, first), n * sizeof(float));
    }
}

void kvl_mass_pages::clear(uint32_t page, uint32_t first) {
    for (uint32_t g = 0; t->data && g < group; g++) {
        ggml_backend_tensor_memset(t, 0, at(page, g, first), (KVL_PAGE_SLOTS - first) * sizeof(float));
    }
}

//
// of a head
//

std::vector<std::vector<float>> llama_kv_paged::read_mass(const kvl_layer & layer, const kvl_head & head) const {
    std::vector<std::vector<float>> out(has_mass(layer) ? layer.group() : 0, std::vector<float>(head.n(), 0.0f));
    for (uint32_t g = 0; g < out.size(); g++) {
        for (uint32_t p = 0; p < head.pages.size(); p++) {
            const uint32_t first = p * KVL_PAGE_SLOTS;
            layer.arena->mass.read(head.mass[p], g, 0, std::min<uint32_t>(head.n() - first, KVL_PAGE_SLOTS),
                                   out[g].data() + first);
        }
    }
    return out;
}

void llama_kv_paged::drop_mass(const kvl_layer & layer, kvl_head & head, size_t n_pages) {
    while (head.mass.size() > n_pages) {
        layer.arena->mass.drop(head.mass.back());
        head.mass.pop_back();
    }
}

void llama_kv_paged::write_mass(const kvl_layer & layer, kvl_head & head,
                                const std::vector<std::vector<float>> & values) {
    kvl_mass_pages & mass = layer.arena->mass;
    if (values.empty()) {
        return;
    }
    drop_mass(layer, head, head.pages.size());
    mass.reserve(head.pages.size() - head.mass.size()); // nothing is left to do where the caller has done it
    head.mass.reserve(head.pages.size());
    while (head.mass.size() < head.pages.size()) {
        head.mass.push_back(mass.take());
    }
    for (uint32_t p = 0; p < head.pages.size(); p++) {
        const uint32_t first = p * KVL_PAGE_SLOTS;
        const uint32_t n = std::min<uint32_t>(head.n() - first, KVL_PAGE_SLOTS);
        for (uint32_t g = 0; g < values.size(); g++) {
            mass.write(head.mass[p], g, 0, n, values[g].data() + first);
        }
        if (n < KVL_PAGE_SLOTS) {
            mass.clear(head.mass[p], n);
        }
    }
}

bool llama_kv_paged::set_mass(kvl_mass kind) {
    const bool on = kind != KVL_MASS_NONE;
    if (on && !all_fused()) {
        kvl_set_error("attention mass needs the page kernels, which " + without_kernels());
        return false;
    }
    mass_kind = KVL_MASS_NONE;
    std::map<kvl_arena *, uint64_t> n_pages;
    for (size_t s = 0; s < seqs.size(); s++) {
        kvl_give_back(*this, llama_seq_id(s)); // its pages have no mass, or some that is not wanted
    }
    for (kvl_sequence & seq : seqs) {
        for (size_t l = 0; l < layers.size(); l++) {
            for (kvl_head & head : seq.heads[l]) {
                drop_mass(layers[l], head, 0);
                n_pages[layers[l].arena] += layers[l].open() ? head.pages.size() : 0;
            }
        }
    }
    for (const auto & [arena, n] : n_pages) {
        if (on) {
            arena->mass.reserve(n);
        } else {
            arena->mass.clear();
        }
    }
    mass_kind = kind;
    for (kvl_sequence & seq : seqs) {
        for (size_t l = 0; l < layers.size(); l++) {
            for (kvl_head & head : seq.heads[l]) {
                const uint32_t group = has_mass(layers[l]) ? layers[l].group() : 0;
                write_mass(layers[l], head, {group, std::vector<float>(head.n(), 0.0f)});
            }
        }
    }
    return true;
}
