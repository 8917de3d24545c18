// What of a sequence does not grow: layers with a sliding window, and recurrent states. They cannot be cut back as the
// others can, so that ways back are marked.

#include "cache/memory.h"
#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-io.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <cstring>
#include <numeric>
#include <stdexcept>

//
// which layers
//

bool kvl_owns_cache(const llama_model & model, uint32_t il) {
    const llama_hparams & hp = model.hparams;
    if (!hp.has_kv(il) || hp.n_head_kv(il) == 0) {
        return false;
    }
    // a layer of falcon-h1 is both
    return !llm_arch_is_hybrid(model.arch) || model.arch == LLM_ARCH_FALCON_H1 || !hp.is_recr(il);
}

int32_t kvl_shares_cache(const llama_model & model, uint32_t il) {
    const llama_hparams & hp = model.hparams;
    if (hp.n_layer_kv_from_start < 2 || hp.has_kv(il)) {
        return -1;
    }
    return hp.n_layer_kv_from_start - (hp.is_swa(il) ? 2 : 1);
}

// Whether a layer has a recurrent state.
static bool owns_state(const llama_model & model, uint32_t il) {
    const llama_hparams & hp = model.hparams;
    if (!llm_arch_is_hybrid(model.arch) || il >= hp.n_layer()) {
        return false;
    }
    const bool nemotron = model.arch == LLM_ARCH_NEMOTRON_H || model.arch == LLM_ARCH_NEMOTRON_H_MOE;
    return (model.arch == LLM_ARCH_FALCON_H1 || hp.is_recr(il)) && (!nemotron || hp.n_ff(il) == 0);
}

uint64_t kvl_full_bytes(const llama_model & model, uint64_t n_seen) {
    const llama_hparams & hp = model.hparams;
    uint64_t n = 0;
    for (uint32_t il = 0; il < hp.n_layer(); il++) {
        const uint64_t held = hp.is_swa(il) ? std::min<uint64_t>(n_seen, hp.n_swa) : n_seen;
        const uint64_t row = hp.n_embd_k_gqa(il) + (hp.is_mla() ? 0 : hp.n_embd_v_gqa(il));
        n += kvl_owns_cache(model, il) ? held * row * sizeof(ggml_fp16_t) : 0;
        n += n_seen > 0 && owns_state(model, il) ? (hp.n_embd_r() + hp.n_embd_s()) * sizeof(float) : 0;
    }
    return n;
}

std::unique_ptr<llama_memory_recurrent> kvl_create_recurrent(const llama_model & model, const llama_cparams & cparams) {
    if (!llm_arch_is_hybrid(model.arch)) {
        return nullptr;
    }
    const auto filter = [&model](int32_t il) {
        return owns_state(model, uint32_t(il));
    };
    return std::make_unique<llama_memory_recurrent>(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv,
                                                    cparams.n_seq_max, cparams.n_seq_max, 0, filter);
}

//
// sliding windows
//

uint32_t llama_kv_paged::window_pages(const kvl_layer & layer) const {
    return kvl_pages_for(layer.most_seen(n_ubatch, n_ctx) + KVL_PAGE_SLOTS - 1) + 1;
}

void llama_kv_paged::slide(llama_seq_id seq_id) {
    for (size_t l = n_open; l < layers.size(); l++) {
        const llama_pos first = layers[l].first_seen(seqs[seq_id].n_seen);
        for (kvl_head & head : seqs[seq_id].heads[l]) {
            const size_t n = size_t(std::lower_bound(head.pos.begin(), head.pos.end(), first) - head.pos.begin());
            const auto n_pages = int64_t(n / KVL_PAGE_SLOTS);
            if (n_pages == 0) {
                continue;
            }
            for (int64_t p = 0; p < n_pages; p++) {
                layers[l].pools[kvl_head::page_format(head.pages[p])]->drop(kvl_head::page_number(head.pages[p]));
            }
            head.pages.erase(head.pages.begin(), head.pages.begin() + n_pages);
            head.live.erase(head.live.begin(), head.live.begin() + n_pages);
            head.pos.erase(head.pos.begin(), head.pos.begin() + n_pages * KVL_PAGE_SLOTS);
            head.count_listed();
            note_held(layers[l], head);
        }
    }
}

void llama_kv_paged::store_windows(llama_seq_id seq_id, int n_threads) {
    for (uint32_t l = n_open; l < layers.size() && params.window_format != KVL_FORMAT_F16; l++) {
        std::vector<std::vector<uint32_t>> slots;
        size_t n = 0;
        for (const kvl_head & head : seqs[seq_id].heads[l]) {
            const uint32_t begin = head.f16_begin();
            slots.emplace_back((head.n() - begin) / KVL_PAGE_SLOTS * KVL_PAGE_SLOTS);
            std::iota(slots.back().begin(), slots.back().end(), begin);
            n += slots.back().size();
        }
        if (n > 0) {
            demote(seq_id, l, uint32_t(params.window_format), slots, n_threads);
        }
    }
}

//
// ways back
//

const kvl_marked * llama_kv_paged::find_mark(llama_seq_id seq_id, llama_pos p) const {
    for (const kvl_marked & mark : seqs[seq_id].marks) {
        if (mark.pos == p) {
            return &mark;
        }
    }
    return nullptr;
}

llama_pos llama_kv_paged::reach(llama_seq_id seq_id, llama_pos p) const {
    const kvl_sequence & seq = seqs[seq_id];
    if (p >= seq.n_seen || !has_bounded()) {
        return std::max(std::min(p, seq.n_seen), 0);
    }
    bool windows = !recr;
    for (size_t l = n_open; l < layers.size() && windows; l++) {
        for (const kvl_head & head : seq.heads[l]) {
            // pages in another format stay whole: slot numbers are those of consecutive positions
            const uint32_t f16 = head.f16_begin();
            windows = windows && !head.pos.empty() && head.pos.front() <= layers[l].first_seen(p) &&
                      (f16 == 0 || p > head.pos[f16 - 1]);
        }
    }
    if (windows) {
        return std::max(p, 0);
    }
    llama_pos best = 0;
    for (const kvl_marked & mark : seq.marks) {
        best = mark.pos <= p ? std::max(best, mark.pos) : best;
    }
    return best;
}

void llama_kv_paged::drop_mark(kvl_marked & mark) {
    for (size_t i = 0; i < mark.windows.size(); i++) {
        for (const kvl_head & head : mark.windows[i]) {
            for (const uint32_t entry : head.pages) {
                layers[n_open + i].pools[kvl_head::page_format(entry)]->drop(kvl_head::page_number(entry));
            }
        }
    }
    mark.windows.clear();
}

void llama_kv_paged::mark(llama_seq_id seq_id) {
    kvl_sequence & seq = seqs[seq_id];
    if (!has_bounded() || seq.n_seen == 0 || find_mark(seq_id, seq.n_seen)) {
        return;
    }
    // what can fail comes before the first page is shared
    kvl_marked mark = {seq.n_seen, {seq.heads.begin() + n_open, seq.heads.end()}, read_state(seq_id)};
    seq.marks.reserve(MARKS + 1);
    for (size_t i = 0; i < mark.windows.size(); i++) {
        for (const kvl_head & head : mark.windows[i]) {
            for (const uint32_t entry : head.pages) {
                layers[n_open + i].pools[kvl_head::page_format(entry)]->share(kvl_head::page_number(entry));
            }
        }
    }
    seq.marks.push_back(std::move(mark));
    if (seq.marks.size() > MARKS) {
        drop_mark(seq.marks.front());
        seq.marks.erase(seq.marks.begin());
    }
    note_peak();
}

void llama_kv_paged::go_back(llama_seq_id seq_id, const kvl_marked & mark) {
    kvl_sequence & seq = seqs[seq_id];
    std::vector<std::vector<kvl_head>> heads = mark.windows;
    for (size_t i = 0; i < heads.size(); i++) {
        kvl_layer & layer = layers[n_open + i];
        for (size_t h = 0; h < heads[i].size(); h++) {
            for (const uint32_t entry : heads[i][h].pages) {
                layer.pools[kvl_head::page_format(entry)]->share(kvl_head::page_number(entry));
            }
            for (const uint32_t entry : seq.heads[n_open + i][h].pages) {
                layer.pools[kvl_head::page_format(entry)]->drop(kvl_head::page_number(entry));
            }
            seq.heads[n_open + i][h] = std::move(heads[i][h]);
            note_held(layer, seq.heads[n_open + i][h]);
        }
    }
    write_state(seq_id, mark.state);
}

//
// recurrent states
//

namespace {

class to_bytes : public llama_io_write_i {
  public:
    void write(const void * src, size_t size) override {
        const auto * from = static_cast<const uint8_t *>(src);
        bytes.insert(bytes.end(), from, from + size);
    }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        bytes.resize(bytes.size() + size);
        ggml_backend_tensor_get(tensor, bytes.data() + bytes.size() - size, offset, size);
    }
    size_t n_bytes() override { return bytes.size(); }

    std::vector<uint8_t> bytes;
};

class from_bytes : public llama_io_read_i {
  public:
    explicit from_bytes(const std::vector<uint8_t> & bytes) : bytes(bytes) {}

    void read(void * dst, size_t size) override { memcpy(dst, take(size), size); }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }
    size_t n_bytes() override { return at; }

  private:
    const uint8_t * take(size_t size) {
        if (size > bytes.size() - at) {
            throw std::runtime_error("a recurrent state ends too early");
        }
        at += size;
        return bytes.data() + at - size;
    }

    const std::vector<uint8_t> & bytes;
    size_t at = 0;
};

} // namespace

std::vector<uint8_t> llama_kv_paged::read_state(llama_seq_id seq_id) const {
    to_bytes out;
    if (recr && !no_alloc()) {
        recr->state_write(out, seq_id);
    }
    return std::move(out.bytes);
}

void llama_kv_paged::write_state(llama_seq_id seq_id, const std::vector<uint8_t> & state) {
    if (recr && !no_alloc()) {
        from_bytes in(state);
        recr->state_read(in, seq_id);
    }
}

void llama_kv_paged::check_state(const std::vector<uint8_t> & state, llama_pos n_seen) const {
    // as llama_memory_recurrent::state_write begins: cells, and of each its position and number of sequences
    uint32_t head[3] = {0, 0, 0};
    const bool empty = !recr || n_seen == 0;
    memcpy(head, state.data(), std::min(sizeof(head), state.size()));
    const bool fits =
        empty ? head[0] == 0
              : state.size() > sizeof(head) && head[0] == 1 && head[1] == uint32_t(n_seen - 1) && head[2] == 0;
    if (!fits || (!recr && !state.empty())) {
        kvl_set_error("the saved sequence is damaged: its recurrent state is not that of " + std::to_string(n_seen) +
                      " tokens");
        throw std::runtime_error(kvl_last_error());
    }
}

uint64_t llama_kv_paged::state_bytes() const {
    uint64_t n = 0;
    if (recr) {
        for (const auto & [buft, bytes] : recr->memory_breakdown()) {
            n += bytes;
        }
    }
    return n;
}
