// kvl: a paged KV cache with its own page table in every (sequence, layer, KV head).
//
// The caller decides which slots stay. Every function checks its arguments. On failure it returns a negative kvl_status
// (or NULL), and kvl_last_error() holds one sentence, per thread. Functions return 0 where nothing else is said.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ABI_VERSION 11
#define KVL_PAGE_SLOTS 32

typedef enum kvl_status {
    KVL_OK = 0,
    KVL_ERR_ARGUMENT = -1,    // an argument is out of range
    KVL_ERR_UNSUPPORTED = -2, // the model or the operation is not supported
    KVL_ERR_MEMORY = -3,      // the pool or the machine has no room
    KVL_ERR_COMPUTE = -4,     // a graph failed
} kvl_status;

// What is accumulated per query head and slot.
typedef enum kvl_mass {
    KVL_MASS_NONE = 0,
    KVL_MASS_SUM = 1,  // attention received, summed over all queries
    KVL_MASS_LAST = 2, // position + 1 of the last query that gave it at least 1 / (slots that the query saw), 0: none
} kvl_mass;

// How a page stores its slots: rows of K and of V (kvl-format.h).
typedef enum kvl_format {
    KVL_FORMAT_F16 = 0,
    KVL_FORMAT_Q8 = 1,
    KVL_FORMAT_Q4 = 2,
    KVL_FORMAT_KV3 = 3, // K in kv3, V in kv2
    KVL_FORMAT_KV2 = 4,
    KVL_FORMAT_KIVI = 5,   // K per channel over groups of kivi_group slots, V per slot
    KVL_FORMAT_TOKEN2 = 6, // 2 bits per slot with an integer zero point, as LogQuant's code has it
    KVL_FORMAT_COUNT = 7,
} kvl_format;

// What stands for the keys of a unit of text, per KV head.
typedef enum kvl_summary {
    KVL_SUMMARY_NONE = 0,   // nothing: the newest units are read
    KVL_SUMMARY_MEAN = 1,   // their mean
    KVL_SUMMARY_BOUNDS = 2, // their largest and smallest value per channel
    // nothing: the units are read that get most of the attention of the newest n_queries queries, per token; chosen
    // anew when more than one token was added, or after `every` of them, and held in between
    KVL_SUMMARY_ATTENTION = 3,
} kvl_summary;

// What of the archive is brought back, exact, beside what is held.
typedef enum kvl_recall {
    KVL_RECALL_OFF = 0,  // nothing
    KVL_RECALL_STEP = 1, // what of the units that are read is not held in f16
    // beside all that is held, which is read as a whole, the units that get most of the attention of the newest
    // n_queries queries over all that is archived, per token that is not held in f16; no summary is needed for it
    KVL_RECALL_TURN = 2,
} kvl_recall;

// How rows are written to an archive.
typedef enum kvl_archive_format {
    KVL_ARCHIVE_F16 = 0,
    KVL_ARCHIVE_Q8 = 1, // where rows are whole blocks of 32 values
} kvl_archive_format;

typedef struct kvl_params {
    int32_t n_window;    // queries remembered per layer and sequence for window scores (0: none)
    int32_t n_pool_ctx;  // tokens per head and sequence the pool can hold (0: the context size)
    int32_t score_bytes; // upper bound of the scratch memory of kvl_window_scores, bytes
    int32_t portable;    // 1: attention with stock operators only (the reference), even where a kernel exists
    int32_t formats;     // formats that kvl_demote may use beside f16: bits 1 << kvl_format
    int32_t rotate;      // 1: K and V are rotated before they are stored, so that their values are about normal
    int32_t kivi_bits;   // per code of KVL_FORMAT_KIVI: 2 or 4 (0: 2)
    int32_t kivi_group;  // slots (of K) and channels (of V) that share a scale there: 32 or 64 (0: 32)
    int32_t
        window_format; // how whole pages of layers with a sliding window are stored: KVL_FORMAT_F16 or KVL_FORMAT_Q8
} kvl_params;

typedef struct kvl_stats {
    uint64_t used_bytes;      // K and V of the slots held, and fixed_bytes; what branches share counts once
    uint64_t allocated_bytes; // pages taken from the pools, page waste included
    uint64_t peak_bytes;      // largest allocated_bytes so far
    uint64_t full_bytes;      // what llama.cpp's own cache would hold for the tokens seen, in f16
    uint64_t fixed_bytes;     // part of used_bytes that no budget changes: sliding windows, recurrent states, marks
    uint64_t reserved_bytes;  // address space of the pools (committed only where used)
    uint64_t table_bytes;     // page tables and positions
    uint64_t query_bytes;     // window queries
    uint64_t index_bytes;     // what stands for units of text (kvl_retrieve)
    uint64_t recalled_bytes;  // part of used_bytes: what was brought back from archives
    uint64_t archive_bytes;   // of archives, on disk
    uint64_t n_evict;         // calls of kvl_keep that dropped slots
    uint64_t score_us;        // time in kvl_window_scores
    uint64_t keep_us;         // time in kvl_keep
} kvl_stats;

typedef struct kvl_seq_stats {
    int64_t n_seen;          // tokens seen: the next token gets this position
    int64_t n_slots;         // slots held, summed over layers and KV heads
    int64_t held_min;        // smallest number of slots in a head
    int64_t held_max;        // largest number of slots in a head
    int64_t n_heads;         // layers x KV heads
    uint64_t used_bytes;     // K and V of the slots held, shared with other sequences or not, of what was recalled, and
                             // fixed_bytes
    uint64_t page_bytes;     // of the pages they lie in
    uint64_t full_bytes;     // what llama.cpp's own cache would hold for n_seen tokens, in f16
    uint64_t fixed_bytes;    // what no budget changes: sliding windows, recurrent state, marks
    uint64_t fixed_limit;    // most bytes that they take after a token, without the marks
    uint64_t recalled_bytes; // of what was brought back from the archive
    uint64_t archive_bytes;  // of the archive, on disk
} kvl_seq_stats;

typedef struct kvl_layer_info {
    int32_t il;          // layer index in the model
    int32_t n_head;      // query heads
    int32_t n_head_kv;   // KV heads
    int32_t d_k;         // key size per head
    int32_t d_v;         // value size per head; 0: values lie in the keys (multi-head latent attention)
    int32_t on_device;   // 1: the pages live on an accelerator
    int32_t kernels;     // 1: page kernels read them, 0: stock operators
    float kq_scale;      // what attention logits are multiplied with
    const char * device; // in whose memory the pages lie, as ggml_backend_dev_name has it
} kvl_layer_info;

// How a part of a sequence is read.
typedef struct kvl_retrieval {
    int32_t summary;      // a kvl_summary
    int32_t budget;       // tokens per head that a token reads, sink and recent included, besides the unit that is open
    int32_t sink;         // first tokens, always read
    int32_t recent;       // last tokens, always read, the one that reads included
    int32_t n_queries;    // newest queries whose mean is compared (0: those of the open unit)
    int32_t min_unit;     // no unit is looked for once fewer tokens are left of the budget
    int32_t per_head;     // 1: every KV head chooses for itself, 0: all of a layer together
    int32_t partial;      // 1: of the first unit that does not fit the beginning is read, 0: others that fit are
    int32_t dense_layers; // first layers that read everything
    int32_t full_below;   // everything is read while the open unit has fewer tokens
    int32_t recall;       // a kvl_recall; with KVL_RECALL_TURN `budget` is of what is brought back
    int32_t every;        // with KVL_SUMMARY_ATTENTION: tokens after which is chosen anew (0: when a text was added)
    // with n_queries 0: a layer chooses anew once the open unit has so much more queries, as a share
    float drift;
    float hysteresis; // by how many standard deviations a unit must be better to take the place of one that was read
} kvl_retrieval;

typedef struct kvl_retrieval_stats {
    int64_t n_units;      // closed
    uint64_t index_bytes; // of what stands for them
    uint64_t us;          // time it took
    float n_read;         // tokens per head that the next token reads, mean over the open layers
    float n_wanted;       // of these chosen by score
    float n_kept;         // of these read before
    int32_t full;         // 1: everything is read
    float n_recalled;     // tokens per head that were brought back, likewise
    float n_loaded;       // tokens of the units that were read from the archive for it now, per layer
    float n_missed;       // tokens per head that were to be brought back and are not there (yet)
    uint64_t read_bytes;  // of the units that were read
} kvl_retrieval_stats;

typedef struct kvl_archive_stats {
    int64_t n_units;    // written
    int64_t n_lost;     // of these that cannot be read (any more)
    uint64_t bytes;     // of the files that they lie in
    const char * error; // what went wrong last, a sentence; empty: nothing. Until the next call
} kvl_archive_stats;

// What a context takes of main memory, or of accelerators, bytes.
typedef struct kvl_breakdown {
    uint64_t model_bytes;   // weights
    uint64_t context_bytes; // cache and window queries: pages in main memory as far as they are taken, else all
    uint64_t compute_bytes; // buffers of the graph
    uint64_t free_bytes;    // of accelerators, as their backends say; 0 of main memory: the system knows better
} kvl_breakdown;

//
// library
//

LLAMA_API int32_t kvl_abi_version(void);
LLAMA_API const char * kvl_llama_commit(void);
LLAMA_API const char * kvl_last_error(void);
// Size in bytes of a struct by name ("kvl_params", "llama_context_params", ...), 0 if unknown.
LLAMA_API size_t kvl_struct_size(const char * name);

// 1 if page kernels read the pages that layers on a device have, else 0.
LLAMA_API int32_t kvl_has_kernels(ggml_backend_dev_t device);

//
// models
//

// Load a model file. NULL if it is damaged, or describes a model that llama.cpp cannot run; the reason is in
// kvl_last_error() or llama.cpp's log.
LLAMA_API struct llama_model * kvl_load_model(const char * path, struct llama_model_params params);
// 0 if the paged cache can serve this model, else KVL_ERR_UNSUPPORTED.
LLAMA_API int32_t kvl_model_check(const struct llama_model * model);
// 0 if the paged cache can store its keys and values in a kvl_format, else KVL_ERR_UNSUPPORTED.
LLAMA_API int32_t kvl_format_check(const struct llama_model * model, int32_t format);

//
// contexts
//

LLAMA_API kvl_params kvl_default_params(void);
// Create a context with a paged cache, or with llama.cpp's own if kvl is NULL. NULL on failure, the reason in
// kvl_last_error() or llama.cpp's log.
LLAMA_API struct llama_context * kvl_init_from_model(struct llama_model * model, struct llama_context_params params,
                                                     const kvl_params * kvl);
LLAMA_API bool kvl_is_paged(const struct llama_context * ctx);
// Number of open layers: with a cache that grows with the text. Functions count layers among these. What others hold,
// with a sliding window or a recurrent state, is bounded by itself (fixed_bytes).
LLAMA_API int32_t kvl_n_layer(const struct llama_context * ctx);
LLAMA_API int32_t kvl_get_layer(const struct llama_context * ctx, int32_t layer, kvl_layer_info * out);

// Compute a batch, on either kind of cache. With a model loaded with no_alloc: take cells or pages for the batch and
// compute nothing. Returns llama_decode's code or a kvl_status.
LLAMA_API int32_t kvl_decode(struct llama_context * ctx, struct llama_batch batch);

// Bytes, each into a struct or NULL: of all sequences; of sequence seq; of main memory; of all accelerators together.
// Cheap but for the last two. On llama.cpp's own cache `one` must be NULL; allocated, reserved and peak are then its
// buffers, used is the share of its tokens.
LLAMA_API int32_t kvl_get_stats(const struct llama_context * ctx, kvl_stats * all, llama_seq_id seq,
                                kvl_seq_stats * one, kvl_breakdown * host, kvl_breakdown * device);
// Start the peak anew from what is allocated.
LLAMA_API int32_t kvl_reset_peak(struct llama_context * ctx);
// Return free heap memory of the process to the operating system, as after the scratch of an eviction.
LLAMA_API int32_t kvl_trim(struct llama_context * ctx);

//
// slots of a sequence in a layer: read
//
// The slots of a head are numbered in the order of their positions. Arrays over the slots of all heads hold one head
// after the other.
//

// Read the number of slots of every KV head, n[n_head_kv], and of every slot its position, its kvl_format and the index
// of its page among those of the head. The last three have room for `room` slots, or are NULL. A head's kivi pages come
// right behind its token2 pages, of which none is empty; with kivi_group = 64, two of them in turn are a group.
LLAMA_API int32_t kvl_slots(const struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t * n,
                            int64_t room, int32_t * pos, int32_t * format, int32_t * page);
// Read the keys and values of a KV head as f32: k[n][d_k], v[n][d_v] (either may be NULL).
LLAMA_API int32_t kvl_read_kv(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t head, float * k,
                              float * v);
// Compute the Euclidean norm of every value: out[sum of n].
LLAMA_API int32_t kvl_value_norms(struct llama_context * ctx, llama_seq_id seq, int32_t layer, float * out);
// Read the last n_queries remembered window queries, oldest first: q[n_queries][n_head][d_k]. Returns how many there
// are.
LLAMA_API int32_t kvl_read_queries(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries,
                                   float * q);
// Compute the attention of the last n_queries window queries (0: of all): f32 out[n_head][stride], softmax over the
// slots of the head, mean over the queries (rms: root mean square), zero beyond the head's slots; stride >= the longest
// head. Returns the number of queries used.
LLAMA_API int32_t kvl_window_scores(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries,
                                    int32_t rms, float * out, int64_t stride);
// Accumulate what every slot receives from now on (a kvl_mass), from 0; KVL_MASS_NONE stops and forgets. Needs the page
// kernels. Truncation does not undo what the tokens removed had given to others.
LLAMA_API int32_t kvl_set_mass(struct llama_context * ctx, int32_t kind);
// Read, or write, what was accumulated: f32 mass[n_head][stride], zero beyond the head's slots when read; stride >= the
// longest head.
LLAMA_API int32_t kvl_slot_mass(struct llama_context * ctx, llama_seq_id seq, int32_t layer, float * mass,
                                int64_t stride, bool write);
// Turn rows x[n][d_k] by a layer's rotary embedding to positions pos[n], in place; negative positions turn back.
// Changes angles only, not the magnitude that YaRN scales; nothing in a layer without RoPE.
LLAMA_API int32_t kvl_rotate(struct llama_context * ctx, int32_t layer, int32_t n, float * x, const int32_t * pos);

//
// slots of a sequence in a layer: change
//
// Chosen slots are counts per KV head, n[n_head_kv], and one array of slots, strictly ascending within a head. All or
// nothing.
//

// Keep these slots and free the rest, at least one per head. A kivi group is freed once none of its slots is left.
LLAMA_API int32_t kvl_keep(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_keep,
                           const int32_t * slots);
// Let attention see only these slots and what is appended later, until the next kvl_select; slots stay hidden or seen
// when others are dropped, demoted or cut off. n_select NULL: all slots.
LLAMA_API int32_t kvl_select(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_select,
                             const int32_t * slots);
// Choose what the next tokens read of every open layer, until the next call or kvl_select: the units of text whose keys
// answer the newest queries best, beside sink, recent and the unit that is open. ends: positions behind units that have
// closed since the last call, ascending and before the last token; keys of new tokens are taken up as they are stored
// now. When a sequence is cut, units that ended at its new length or later are open again. out NULL: nothing is chosen
// yet; params NULL: everything is read.
LLAMA_API int32_t kvl_retrieve(struct llama_context * ctx, llama_seq_id seq, const kvl_retrieval * params,
                               const llama_pos * ends, int32_t n_ends, kvl_retrieval_stats * out);
// Write the units of a sequence to a file in a folder from now on, exact, when kvl_retrieve closes them; folder NULL:
// no more. The file has no name and is gone with the process; branches share it. Nothing is dropped or demoted before
// it is written. A unit that a head did not hold in f16 when it closed, or whose record is damaged, is lost to the
// archive, not to what is held. Needs pages in main memory.
LLAMA_API int32_t kvl_archive_to(struct llama_context * ctx, llama_seq_id seq, const char * folder, int32_t format);
// Write the archive of a sequence to the file beside its session: a new one, or what is not yet in the one that it was
// saved to or loaded from. tag: 32 characters, the same ones to load it. Returns 0, and nothing has changed, if
// somebody else has added to the file, else 1.
LLAMA_API int32_t kvl_save_archive(struct llama_context * ctx, llama_seq_id seq, const char * path, const char * tag);
// Take it from there, for a sequence that was restored since kvl_archive_to. table: what kvl_archive_table said when it
// was saved. Nothing has changed when it fails.
LLAMA_API int32_t kvl_load_archive(struct llama_context * ctx, llama_seq_id seq, const char * path, const char * tag,
                                   const int64_t * table, int32_t n);
// Read table[n][3]: of every unit its first position, the one behind its last, and where its records are in the file,
// -1: it is lost. table NULL: nothing. Returns how many there are.
LLAMA_API int32_t kvl_archive_table(const struct llama_context * ctx, llama_seq_id seq, int64_t * table, int32_t n);
LLAMA_API int32_t kvl_get_archive(struct llama_context * ctx, llama_seq_id seq, kvl_archive_stats * out);
// Store slots in another format named in kvl_params.formats; returns how many were not in it before. With n_demote:
// these slots. With n_demote NULL: of every head the f16 slots at the n_positions ascending positions in `which`, the
// earliest n_most (0: all). Needs the page kernels. To kivi go whole groups: kivi_group slots in the order of their
// positions; from kivi there is no way to another format.
LLAMA_API int32_t kvl_demote(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t format,
                             const int32_t * n_demote, const int32_t * which, int32_t n_positions, int32_t n_most);
// Key mean per head, f32 mean[n_head_kv][d_k]. Formats other than f16 store key - mean; attention adds it back. Fails
// once a slot is stored in such a format. With mean NULL: the mean of the f16 keys at positions p0 <= p < p1, unless
// one is set; returns the most such keys of a head (n_least if a mean is set), and sets none if they are fewer than
// n_least.
LLAMA_API int32_t kvl_set_mean(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const float * mean,
                               llama_pos p0, llama_pos p1, int32_t n_least);

//
// sequences
//

// Empty dst, then share all pages of src with it, copy-on-write.
LLAMA_API int32_t kvl_branch(struct llama_context * ctx, llama_seq_id src, llama_seq_id dst);
// Remove the tokens at positions >= p0 from every head. KVL_ERR_UNSUPPORTED, and nothing has changed, if kvl_reach says
// that there is no way back to p0.
LLAMA_API int32_t kvl_truncate(struct llama_context * ctx, llama_seq_id seq, llama_pos p0);
// Remember the way back to here, of the two latest calls: a recurrent state, or a sliding window that has gone on,
// cannot be cut otherwise. Costs nothing where neither is.
LLAMA_API int32_t kvl_mark(struct llama_context * ctx, llama_seq_id seq);
// The largest number of tokens up to p that kvl_truncate can cut the sequence to; p itself if the model has neither a
// sliding window nor a recurrent state.
LLAMA_API llama_pos kvl_reach(const struct llama_context * ctx, llama_seq_id seq, llama_pos p);
// Give slot i of every head position i and turn its key there; the next token comes after the last. All heads must hold
// the same number of slots, all in f16. Forgets the window queries.
LLAMA_API int32_t kvl_roll(struct llama_context * ctx, llama_seq_id seq);

#ifdef __cplusplus
}
#endif
