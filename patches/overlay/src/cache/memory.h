// The paged memory: page tables per (sequence, layer, KV head) over shared page pools.

#pragma once

#include "cache/arena.h"
#include "cache/readers.h"
#include "cache/sequence.h"
#include "error.h"
#include "ggml-cpp.h"
#include "kvl-attn.h"
#include "kvl.h"
#include "llama-batch.h"
#include "llama-memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;
class llama_kv_paged_context;
class llama_memory_recurrent;
class llama_memory_recurrent_context;
struct kvl_move;

// A head's pages to be, and per slot of them the slot that it was, -1: a hole.
struct kvl_rebuilt {
    std::vector<uint32_t> pages;
    std::vector<int32_t> from;
};

struct kvl_renewed {
    kvl_head head;
    std::vector<std::vector<float>> mass; // per query head of the group
};

// What is left to do when heads have been compacted: slots to move, by format, and pages to drop then. Pages that were
// taken for it go back unless it is done.
struct kvl_compaction {
    std::vector<std::vector<kvl_row_move>> moves = std::vector<std::vector<kvl_row_move>>(KVL_FORMAT_COUNT);
    std::vector<std::pair<kvl_pool *, uint32_t>> gone, taken;

    kvl_compaction() = default;
    kvl_compaction(const kvl_compaction &) = delete;
    kvl_compaction & operator=(const kvl_compaction &) = delete;
    ~kvl_compaction() {
        for (const auto & [pool, page] : taken) {
            if (page != kvl_pool::NONE) {
                pool->drop(page);
            }
        }
    }
};

// pages that so many slots take
inline uint32_t kvl_pages_for(uint32_t n_slots) {
    return (n_slots + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS;
}

void kvl_set_threads(ggml_backend_t cpu, int n_threads);

// Row formats of K and V of a page format; latent: of multi-head latent attention, whose values lie in its keys.
std::pair<kvl_row, kvl_row> kvl_rows_of(uint32_t format, const kvl_params & params, bool latent);
// The code that stores rows in other formats works in main memory.
constexpr const char * KVL_FORMATS_ON_HOST =
    "storage formats other than f16 (--kv) are written in main memory only; keep "
    "all layers there (-ngl 0)";
// Why rows cannot be stored in these, empty if they can.
std::string kvl_block_refusal(kvl_row k_row, kvl_row v_row, uint32_t d_k, uint32_t d_v);

struct kvl_layer {
    uint32_t il;
    uint32_t n_head;
    uint32_t n_head_kv;
    kvl_arena * arena;
    uint32_t first_head;             // number of its first KV head among those of the arena
    kvl_pool * pool = nullptr;       // of f16 pages
    std::vector<kvl_pool *> pools;   // by format, nullptr: not asked for
    ggml_tensor * queries = nullptr; // f32 [d_k*n_head, n_window*n_seq_max], nullptr: none are remembered
    int32_t n_swa = 0;               // sliding window, as in kvl-attn.h; 0: the layer is open
    uint32_t d_value = 0;            // first values of a row of V that are a value: all, unless they lie in K

    // recorded when the graph is built: window scores must use the same
    float kq_scale = 0.0f;
    float soft_cap = 0.0f;
    const ggml_tensor * sinks = nullptr;

    uint32_t group() const { return n_head / n_head_kv; } // query heads of a KV head
    bool open() const { return n_swa == 0; }
    bool latent() const { return pool->v_row == KVL_ROW_OF_K; }
    // first position that the token at pos sees
    llama_pos first_seen(llama_pos pos) const {
        return n_swa == 0 ? 0 : n_swa > 0 ? std::max(pos - n_swa + 1, 0) : pos - pos % -n_swa;
    }
    // most slots that so many new tokens see
    uint32_t most_seen(uint32_t n_tokens, uint32_t n_ctx) const {
        const uint32_t n_seen = n_swa == 0 ? n_ctx : std::min(n_ctx, uint32_t(std::abs(n_swa)) + n_tokens);
        return std::max(n_seen, n_tokens);
    }
    const kvl_kernels * kernels() const { return arena->kernels; }
};

// Whether a layer of the model stores keys and values; the layer whose keys and values it reads instead, -1: none.
bool kvl_owns_cache(const llama_model & model, uint32_t il);
int32_t kvl_shares_cache(const llama_model & model, uint32_t il);
// What llama.cpp's own cache holds of a sequence after n_seen tokens, in f16.
uint64_t kvl_full_bytes(const llama_model & model, uint64_t n_seen);
std::unique_ptr<llama_memory_recurrent> kvl_create_recurrent(const llama_model & model, const llama_cparams & cparams);

// Positions stay below this, so that sums of two of them are numbers of 32 bits.
constexpr llama_pos KVL_POS_END = INT32_MAX / 2;

class llama_kv_paged : public llama_memory_i {
  public:
    llama_kv_paged(const llama_model & model, const llama_cparams & cparams, const kvl_params & params);
    ~llama_kv_paged() override;

    // the reason why the paged memory cannot serve this model, empty if it can
    static std::string unsupported(const llama_model & model);
    // likewise for one of its formats
    static std::string unsupported(const llama_model & model, kvl_format format);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    //
    // paged
    //

    // append n positions from p0 to every head, windows slide before; false when a pool is exhausted (nothing is added)
    bool append(llama_seq_id seq, const llama_pos * pos, uint32_t n);
    // compact to the given slots; false with the error set, and nothing changed
    bool keep(llama_seq_id seq, uint32_t layer, const int32_t * n_keep, const int32_t * slots);
    // store the given slots in another format; how many that were not, or a kvl_status with the error set, and nothing
    // changed
    int32_t demote(llama_seq_id seq, uint32_t layer, uint32_t format, const int32_t * n_demote, const int32_t * slots,
                   int n_threads);
    // likewise the f16 slots of every head whose positions are given, ascending, the first n_most of them (0: all), of
    // kivi whole groups
    int32_t demote_due(llama_seq_id seq, uint32_t layer, uint32_t format, int32_t n, const llama_pos * positions,
                       int32_t n_most, int n_threads);
    int32_t set_mu(llama_seq_id seq, uint32_t layer, const float * mu);
    int32_t centre(llama_seq_id seq, uint32_t layer, llama_pos p0, llama_pos p1, int32_t n_least, int n_threads);
    void value_norms(llama_seq_id seq, uint32_t layer, int n_threads, float * out) const;
    // key and value of a slot in main memory as they were before they were stored, rotated or not
    void read_slot(llama_seq_id seq, uint32_t layer, uint32_t head, uint32_t slot, float * k, float * v) const;
    // what kvl_attn_rotate does to a row, and undoes
    void rotate_row(float * x, uint32_t d) const { rows.rotate(x, int(d)); }
    // row of a head's key mean in its arena's means, -1: there is none
    int32_t mean_row(llama_seq_id seq, uint32_t layer, uint32_t head) const {
        const kvl_arena & arena = *layers[layer].arena;
        return seqs[seq].mu[layer].empty() ? -1
                                           : int32_t(arena.mean_row(uint32_t(seq), layers[layer].first_head + head));
    }
    // f(slot, key or value) for some slots of a head
    void for_slots(llama_seq_id seq, uint32_t layer, uint32_t head, const std::vector<uint32_t> & slots, bool keys,
                   const std::function<void(uint32_t, const float *)> & f) const;
    bool branch(llama_seq_id src, llama_seq_id dst);
    bool truncate(llama_seq_id seq, llama_pos p0);
    // make only the given slots visible, nullptr: all; false with the error set, and nothing changed
    bool select(llama_seq_id seq, uint32_t layer, const int32_t * n_select, const int32_t * slots);
    // accumulate what every slot receives from now on; false with the error set
    bool set_mass(kvl_mass kind);
    // what the slots of a head received, per query head of its group: empty unless it is accumulated; written after its
    // pages have changed
    std::vector<std::vector<float>> read_mass(const kvl_layer & layer, const kvl_head & head) const;
    void write_mass(const kvl_layer & layer, kvl_head & head, const std::vector<std::vector<float>> & values);
    // copy the pages that a sequence shares with others, or only those at the end of its heads that new tokens go to;
    // false with the error set, and nothing changed
    bool own_pages(llama_seq_id seq, bool tails = false);
    // remembered queries of the newest tokens without a gap: ring rows, oldest first
    std::vector<int32_t> window_rows(llama_seq_id seq) const;

    // give up what the next token does not see of a sliding window, page by page
    void slide(llama_seq_id seq);
    // store whole pages of sliding windows in kvl_params.window_format; where it cannot be nothing changes
    void store_windows(llama_seq_id seq, int n_threads);
    // the most tokens up to p that a sequence can be cut to and go on from there
    llama_pos reach(llama_seq_id seq, llama_pos p) const;
    // remember the way back to here; the oldest of more than MARKS is forgotten
    void mark(llama_seq_id seq);
    static constexpr size_t MARKS = 2;
    // layers whose slots are not chosen from outside, or a recurrent state
    bool has_bounded() const { return n_open < layers.size() || recr; }

    void get_stats(kvl_stats & out) const;
    void get_seq_stats(llama_seq_id seq, kvl_seq_stats & out) const;
    void note_peak();
    void reset_peak() { peak_bytes = allocated_bytes(); }

    bool valid_seq(llama_seq_id seq) const { return seq >= 0 && size_t(seq) < seqs.size(); }
    int32_t find_layer(int32_t il) const { return il < int32_t(layer_of.size()) ? layer_of[il] : -1; }
    bool all_host() const;
    // the model was loaded without its weights: pages are counted, but hold nothing
    bool no_alloc() const;
    // every layer has page kernels
    bool all_fused() const;
    // why a layer has none, and what to do: how a sentence about them goes on after "which"; empty: all have
    std::string without_kernels() const;
    bool has_mass() const { return mass_kind != KVL_MASS_NONE; }
    bool has_mass(const kvl_layer & layer) const { return has_mass() && layer.open(); }
    kvl_mass mass() const { return mass_kind; }

    const llama_model & model;
    const llama_hparams & hparams;
    const kvl_params params;
    const uint32_t n_ctx;    // tokens per sequence the pool was sized for
    const uint32_t n_ubatch; // most tokens that are computed together

    std::vector<kvl_layer> layers; // those that are open, whose slots are chosen from outside, come first
    uint32_t n_open = 0;
    std::vector<kvl_sequence> seqs;

    const std::unique_ptr<llama_memory_recurrent> recr; // nullptr: the model has no recurrent layers

    const kvl_row_functions rows; // of the CPU
    // for what is computed outside the model's graph, made once; nullptr: it cannot be
    ggml_backend_t host_backend(int n_threads);

    // of archives
    kvl_readers & readers() { return read_ahead; }

    uint64_t n_evict = 0;
    uint64_t score_us = 0;
    uint64_t keep_us = 0;

  private:
    template <typename F> void for_pools(F && f) const {
        for (const auto & arena : arenas) {
            for (const auto & pool : arena->pools) {
                if (pool) {
                    f(*pool);
                }
            }
        }
    }
    int32_t demote(llama_seq_id seq, uint32_t layer, uint32_t format, const std::vector<std::vector<uint32_t>> & slots,
                   int n_threads);
    uint64_t allocated_bytes() const;
    bool check_slots(llama_seq_id seq, uint32_t layer, const int32_t * counts, const int32_t * slots, bool empty) const;
    void cut(kvl_layer & layer, kvl_head & head, uint32_t n); // drop the slots from n on (a plain head)
    // Some slots of a head, ascending, in as few pages of their formats as they need; head itself stays as it is.
    kvl_rebuilt compacted(const kvl_layer & layer, const kvl_head & head, const std::vector<uint32_t> & slots,
                          kvl_compaction & work) const;
    // what compacted() has left to do in a layer, with room for so many more pages of mass; throws when it cannot be
    // done, and nothing has changed then unless a device failed
    void carry_out(const kvl_layer & layer, kvl_compaction & work, uint64_t n_mass);
    // the head as rebuilt: positions, what is seen and mass go with the slots; it takes the place of the old one once
    // carry_out() has moved them
    kvl_renewed renewed(const kvl_layer & layer, const kvl_head & head, kvl_rebuilt && rebuilt) const;
    void replace(const kvl_layer & layer, kvl_head & head, kvl_renewed && by);
    // keep these slots of every head of a layer, ascending, each in its format
    void compact(llama_seq_id seq, uint32_t layer, const std::vector<std::vector<uint32_t>> & slots);
    // pages that compacted() must copy, by format
    void count_copies(const kvl_layer & layer, const kvl_head & head, const std::vector<uint32_t> & slots,
                      std::vector<uint32_t> & copies) const;
    // the steps of a demotion of one head: encode the slots where they will be, then enter them in the page table
    void encode_slots(llama_seq_id seq, uint32_t layer, uint32_t head, const kvl_pool & pool, kvl_move & move) const;
    kvl_rebuilt move_slots(const kvl_layer & layer, const kvl_head & head, uint32_t format, const kvl_move & move,
                           kvl_compaction & work) const;
    void trim();
    // throws if a page of a sequence holds what is no number
    void check_pages(llama_seq_id seq) const;
    void drop_mass(const kvl_layer & layer, kvl_head & head, size_t n_pages);
    // the key mean of a sequence, as the kernels read it
    void upload_mean(llama_seq_id seq, uint32_t layer) const;
    // after a head has changed otherwise than by append: its bytes, and what its pages hold
    void note_held(const kvl_layer & layer, kvl_head & head) const;
    // of pages that were shared, what is held now: costs nothing unless an owner has let go
    void recount() const;
    bool pages_fit(const std::vector<llama_ubatch> & ubatches);
    // pages that a head of a layer needs for n new tokens
    uint32_t pages_needed(const kvl_layer & layer, const kvl_head & head, uint32_t n) const;
    // most pages of a head with a sliding window
    uint32_t window_pages(const kvl_layer & layer) const;
    // the mark at a position, nullptr: none
    const kvl_marked * find_mark(llama_seq_id seq, llama_pos p) const;
    void drop_mark(kvl_marked & mark);
    // bounded layers as they were at a mark; throws with the sequence in between when it cannot be
    void go_back(llama_seq_id seq, const kvl_marked & mark);
    std::vector<uint8_t> read_state(llama_seq_id seq) const;
    void write_state(llama_seq_id seq, const std::vector<uint8_t> & state);
    // throws if what was read is no recurrent state after n_seen tokens
    void check_state(const std::vector<uint8_t> & state, llama_pos n_seen) const;
    uint64_t state_bytes() const; // of all sequences
    // what the marks of a sequence hold that it does not hold itself
    uint64_t mark_bytes(const kvl_sequence & seq) const;
    uint64_t recalled_bytes(const kvl_sequence & seq) const;
    // f(layer, head, page) for the pages of its marks
    template <typename F> void for_marks(const kvl_sequence & seq, F && f) const {
        for (const kvl_marked & mark : seq.marks) {
            for (size_t i = 0; i < mark.windows.size(); i++) {
                for (const kvl_head & head : mark.windows[i]) {
                    for (uint32_t p = 0; p < head.pages.size(); p++) {
                        f(layers[n_open + i], head, p);
                    }
                }
            }
        }
    }

    std::vector<int32_t> layer_of; // model layer -> index in layers, -1: no cache
    std::vector<std::unique_ptr<kvl_arena>> arenas;
    std::vector<std::unique_ptr<kvl_region>> query_mem;
    ggml_context_ptr query_ctx;
    uint64_t query_bytes = 0;
    uint64_t peak_bytes = 0;
    kvl_mass mass_kind = KVL_MASS_NONE;
    ggml_backend_ptr host;
    kvl_readers read_ahead{*this}; // last: it reads what lies above
};

// Whether the tokens of a batch continue their sequences: each belongs to one, whose positions come one after another.
class kvl_positions_check {
  public:
    explicit kvl_positions_check(const llama_kv_paged & kv) : kv(kv), next(kv.seqs.size(), -1) {}

    // the next token of the batch; false with the error set
    bool add(int32_t n_seq_id, const llama_seq_id * seq_id, llama_pos pos);

  private:
    const llama_kv_paged & kv;
    std::vector<llama_pos> next; // expected of each sequence, -1: it has no token in the batch yet
};

// What the graph needs to know about one layer in the current ubatch.
struct kvl_layer_shape {
    uint32_t n_kv;         // room for slots per head: those of the pages listed, padding included
    bool uniform;          // stock operators: every head of every stream has the same number of slots, all of them live
    kvl_mass mass;         // what is accumulated
    uint32_t mass_version; // of the tensor where it is

    bool operator==(const kvl_layer_shape & o) const {
        return n_kv == o.n_kv && uniform == o.uniform && mass == o.mass && mass_version == o.mass_version;
    }
};

class llama_kv_paged_context : public llama_memory_context_i {
  public:
    explicit llama_kv_paged_context(llama_memory_status status);                     // error or no update
    explicit llama_kv_paged_context(llama_kv_paged * kv);                            // worst case
    llama_kv_paged_context(llama_kv_paged * kv, std::vector<llama_ubatch> ubatches); // a batch
    ~llama_kv_paged_context() override;

    bool next() override;
    bool apply() override;
    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }
    llama_memory_status get_status() const override { return status; }

    kvl_layer_shape shape(uint32_t layer, uint32_t n_seq_tokens, const llama_ubatch & ubatch) const;

    llama_kv_paged * kv = nullptr;
    std::unique_ptr<llama_memory_recurrent_context> recr;

  private:
    llama_memory_status status;
    bool worst_case = false;
    size_t i_cur = 0;
    std::vector<llama_ubatch> ubatches;
};

// What kvl_init_from_model asks for around the construction of a context on this thread; NULL: the stock cache.
void kvl_request_memory(const kvl_params * params);
