// kvl: a paged KV cache with its own page table in every (sequence, layer, KV head).
//
// Mechanism only: which slots stay is decided by the caller. Plain C, versioned by kvl_abi_version().
// Every function checks its arguments; on failure it returns a negative kvl_status (or NULL) and
// kvl_last_error() holds one sentence, per thread. Nothing here ends the process.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ABI_VERSION 6
#define KVL_PAGE_SLOTS 32

typedef enum kvl_status {
    KVL_OK = 0,
    KVL_ERR_ARGUMENT = -1,    // an argument is out of range
    KVL_ERR_UNSUPPORTED = -2, // the model or the operation is not supported
    KVL_ERR_MEMORY = -3,      // the pool or the machine has no room
    KVL_ERR_COMPUTE = -4,     // a graph failed
    KVL_ERR_HOOK = -5,        // the evict hook reported a failure
} kvl_status;

// When the evict hook is called.
typedef enum kvl_event {
    KVL_EVENT_NONE = 0,   // nothing special: only the limit is watched
    KVL_EVENT_CHUNK = 1,  // end of a prompt chunk
    KVL_EVENT_PROMPT = 2, // end of the prompt
    KVL_EVENT_LIMIT = 3,  // a sequence has passed its limit
} kvl_event;

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

typedef struct kvl_params {
    int32_t n_window;    // queries remembered per layer and sequence for window scores (0: none)
    int32_t n_pool_ctx;  // tokens per head and sequence the pool can hold (0: the context size)
    int32_t score_bytes; // upper bound of the scratch memory of kvl_window_scores, bytes
    int32_t portable;    // 1: attention with stock operators only (the reference), even where a kernel exists
    int32_t formats;     // formats that kvl_demote may use beside f16: bits 1 << kvl_format
    int32_t rotate;      // 1: K and V are rotated before they are stored, so that their values are about normal
    int32_t kivi_bits;   // per code of KVL_FORMAT_KIVI: 2 or 4 (0: 2)
    int32_t kivi_group;  // slots (of K) and channels (of V) that share a scale there: 32 or 64 (0: 32)
} kvl_params;

typedef struct kvl_stats {
    uint64_t used_bytes;      // K and V of the slots held; what branches share counts once
    uint64_t allocated_bytes; // pages taken from the pools, page waste included
    uint64_t peak_bytes;      // largest allocated_bytes so far
    uint64_t full_bytes;      // what a full f16 cache would take for the tokens seen
    uint64_t reserved_bytes;  // address space of the pools (committed only where used)
    uint64_t table_bytes;     // page tables and positions
    uint64_t query_bytes;     // window queries
    uint64_t n_evict;         // calls of kvl_keep that dropped slots
    uint64_t score_us;        // time in kvl_window_scores
    uint64_t keep_us;         // time in kvl_keep
} kvl_stats;

typedef struct kvl_seq_stats {
    int64_t n_seen;      // tokens seen: the next token gets this position
    int64_t n_slots;     // slots held, summed over layers and KV heads
    int64_t held_min;    // smallest number of slots in a head
    int64_t held_max;    // largest number of slots in a head
    int64_t n_heads;     // layers x KV heads
    uint64_t used_bytes; // K and V of the slots held, shared with other sequences or not
    uint64_t page_bytes; // of the pages they lie in
    uint64_t full_bytes; // what a full f16 cache would take for n_seen tokens
} kvl_seq_stats;

typedef struct kvl_layer_info {
    int32_t il;        // layer index in the model
    int32_t n_head;    // query heads
    int32_t n_head_kv; // KV heads
    int32_t d_k;       // key size per head
    int32_t d_v;       // value size per head
    int32_t on_device; // 1: the pages live on an accelerator
    float kq_scale;    // what attention logits are multiplied with
} kvl_layer_info;

// What a context takes of main memory, or of accelerators, bytes.
typedef struct kvl_breakdown {
    uint64_t model_bytes;   // weights
    uint64_t context_bytes; // cache and window queries: pages in main memory as far as they are taken, else all
    uint64_t compute_bytes; // buffers of the graph
    uint64_t free_bytes;    // of accelerators, as their backends say; 0 of main memory: the system knows better
} kvl_breakdown;

// Called after a decode step has been computed: it still saw everything. Non-zero: failure.
typedef int32_t (*kvl_evict_hook)(struct llama_context * ctx, llama_seq_id seq, int32_t event, void * user);

LLAMA_API int32_t kvl_abi_version(void);
LLAMA_API const char * kvl_llama_commit(void);
LLAMA_API const char * kvl_last_error(void);
// Size in bytes of a struct of this ABI by name ("kvl_params", "llama_context_params", ...), 0 if unknown.
LLAMA_API size_t kvl_struct_size(const char * name);

LLAMA_API kvl_params kvl_default_params(void);
// 0 if the paged cache can serve this model; else KVL_ERR_UNSUPPORTED, the reason in kvl_last_error().
LLAMA_API int32_t kvl_model_check(const struct llama_model * model);
// 0 if its keys and values can be stored in a kvl_format; else KVL_ERR_UNSUPPORTED, the reason in kvl_last_error().
LLAMA_API int32_t kvl_format_check(const struct llama_model * model, int32_t format);
// llama_model_load_from_file, but where a damaged file breaks what the loader takes for granted that is a failure too,
// and not the end of the process. NULL on failure, the reason in llama.cpp's log or kvl_last_error().
LLAMA_API struct llama_model * kvl_load_model(const char * path, struct llama_model_params params);
// Like llama_init_from_model, with paged memory. NULL on failure.
LLAMA_API struct llama_context * kvl_init_from_model(struct llama_model * model, struct llama_context_params params,
                                                     const kvl_params * kvl);
LLAMA_API bool kvl_is_paged(const struct llama_context * ctx);

// Attention layers: index 0 .. kvl_n_layer()-1 counts only layers that own a cache.
LLAMA_API int32_t kvl_n_layer(const struct llama_context * ctx);
LLAMA_API int32_t kvl_get_layer(const struct llama_context * ctx, int32_t layer, kvl_layer_info * out);

// llama_decode, then the evict hook: with `event` for every sequence of the batch, or with KVL_EVENT_LIMIT for those
// past their limit. Returns llama_decode's code when that is not 0, else a kvl_status.
LLAMA_API int32_t kvl_decode(struct llama_context * ctx, struct llama_batch batch, int32_t event);
// What llama_decode does to the cache, without computing anything, for a model that was loaded with no_alloc: cells or
// pages are taken, and hold nothing. kvl_decode does the same of such a model, and calls the hook. Over a stock context
// as well. Returns llama_decode's codes or a kvl_status.
LLAMA_API int32_t kvl_append(struct llama_context * ctx, struct llama_batch batch);
LLAMA_API int32_t kvl_set_evict_hook(struct llama_context * ctx, kvl_evict_hook hook, void * user);
// Slots per head, on average, past which the hook is called with KVL_EVENT_LIMIT (0: never).
LLAMA_API int32_t kvl_set_limit(struct llama_context * ctx, llama_seq_id seq, int32_t n_slots);

// Slots held per KV head: out[n_head_kv].
LLAMA_API int32_t kvl_lengths(const struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t * out);
// Positions of all heads of a layer, head after head: out[sum of lengths].
LLAMA_API int32_t kvl_positions(const struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t * out);
// How the slots that kvl_positions names are stored, and where: format[i] is a kvl_format, page[i] the index of the
// slot's page among those of its head (either may be NULL). A head's kivi pages come right behind its token2 pages, of
// which none is empty; with kivi_group = 64, two of them in turn are a group.
LLAMA_API int32_t kvl_slot_pages(const struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t * format,
                                 int32_t * page);
// Attention of the last n_queries remembered window queries (0: of all): f32 out[n_head][stride], softmax in f32 over
// all slots of the head, mean over the queries (rms: root mean square), zero beyond the head's length; stride >= the
// longest head. Returns the number of queries used.
LLAMA_API int32_t kvl_window_scores(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries,
                                    int32_t rms, float * out, int64_t stride);
// Accumulate from now on what every slot receives, starting at 0, or stop and forget (a kvl_mass). Needs the page
// kernels. Truncation does not undo what the tokens removed had given to others.
LLAMA_API int32_t kvl_set_mass(struct llama_context * ctx, int32_t kind);
// What was accumulated: f32 [n_head][stride], zero beyond the head's length when read; stride >= the longest head.
LLAMA_API int32_t kvl_read_mass(const struct llama_context * ctx, llama_seq_id seq, int32_t layer, float * out,
                                int64_t stride);
LLAMA_API int32_t kvl_write_mass(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const float * in,
                                 int64_t stride);
// Keys or values as stored, converted to f32: k[len][d_k], v[len][d_v] (either may be NULL).
LLAMA_API int32_t kvl_read_kv(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t head, float * k,
                              float * v);
// Euclidean norms of the values, head after head in the order of kvl_positions: out[sum of lengths].
LLAMA_API int32_t kvl_value_norms(struct llama_context * ctx, llama_seq_id seq, int32_t layer, float * out);
// The last n_queries window queries, oldest first: q[n][n_head][d_k] with room for n_queries. Returns n, which is less
// if fewer are remembered.
LLAMA_API int32_t kvl_read_queries(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t n_queries,
                                   float * q);

// Apply a layer's rotary embedding to rows x[n][d_k] at positions pos[n], in place; negative positions turn back. Only
// the angle: a magnitude that the model scales along with it is left alone. A layer without RoPE changes nothing.
LLAMA_API int32_t kvl_rotate(struct llama_context * ctx, int32_t layer, int32_t n, float * x, const int32_t * pos);

// Keep these slots of every KV head of a layer and give the rest back: n_keep[n_head_kv] counts, slots concatenated,
// strictly ascending within a head. All or nothing. A kivi group is given back once none of its slots is left.
LLAMA_API int32_t kvl_keep(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_keep,
                           const int32_t * slots);
// Store these slots of every KV head of a layer in another format: n_demote[n_head_kv] counts, slots as for kvl_keep.
// Slots that are in this format stay as they are. Needs the page kernels and a format named in kvl_params. All or
// nothing. To kivi go multiples of kivi_group slots per head, a group being the next kivi_group of them by position;
// from kivi there is no way to another format.
LLAMA_API int32_t kvl_demote(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t format,
                             const int32_t * n_demote, const int32_t * slots);
// Store in another format what a head has in f16 at these positions, n of them, ascending: the earliest first, n_most
// per head at most (0: all), for kivi whole groups only. Looks at f16 slots alone, so it costs little while a long
// sequence grows. Returns how many slots were demoted. All or nothing.
LLAMA_API int32_t kvl_demote_due(struct llama_context * ctx, llama_seq_id seq, int32_t layer, int32_t format, int32_t n,
                                 const int32_t * positions, int32_t n_most);
// f32 [n_head_kv][d_k], as keys are read: taken from them before they are stored in any format but f16, and given back
// by attention. Only while no slot of the layer is in such a format.
LLAMA_API int32_t kvl_set_mu(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const float * mu);
// kvl_set_mu with the mean of the keys that are f16 at positions p0 <= p < p1, unless a mean is set already. Returns
// the most slots that a head had there, n_least if a mean was set already; if they are fewer, none is set.
LLAMA_API int32_t kvl_centre(struct llama_context * ctx, llama_seq_id seq, int32_t layer, llama_pos p0, llama_pos p1,
                             int32_t n_least);
// Let attention see only these slots of every KV head of a layer, and what is appended later, until the next call or
// kvl_keep: n_select[n_head_kv] counts, slots as for kvl_keep. NULL: all slots. Nothing moves.
LLAMA_API int32_t kvl_select(struct llama_context * ctx, llama_seq_id seq, int32_t layer, const int32_t * n_select,
                             const int32_t * slots);
// Share all pages of src with dst, copy-on-write. dst is emptied first.
LLAMA_API int32_t kvl_branch(struct llama_context * ctx, llama_seq_id src, llama_seq_id dst);
// Renumber: slot i of every head gets position i, its key is turned there, and the next token comes after the last of
// them. All heads must hold the same number of slots. Window queries are forgotten.
LLAMA_API int32_t kvl_roll(struct llama_context * ctx, llama_seq_id seq);
// Remove the tokens at positions >= p0 from every head.
LLAMA_API int32_t kvl_truncate(struct llama_context * ctx, llama_seq_id seq, llama_pos p0);

// Also over a stock context: allocated, reserved and peak are its buffers, used the share of its tokens.
LLAMA_API int32_t kvl_get_stats(const struct llama_context * ctx, kvl_stats * out);
// Of main memory, or of all accelerators together; what it would be, if the model was loaded with no_alloc. Also over a
// stock context.
LLAMA_API int32_t kvl_get_breakdown(const struct llama_context * ctx, bool on_device, kvl_breakdown * out);
LLAMA_API int32_t kvl_get_seq_stats(const struct llama_context * ctx, llama_seq_id seq, kvl_seq_stats * out);
// Give the scratch memory of an eviction back to the operating system too: the allocator would hold on to it.
LLAMA_API int32_t kvl_trim(struct llama_context * ctx);
LLAMA_API int32_t kvl_reset_peak(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
