// Attention over pages as ggml operators: what libllama and a backend agree on.
//
// The operators are GGML_OP_CUSTOM nodes, whose functions come from the table of procedures of the device on which the
// pages lie, so that ggml's own operator list stays untouched. A backend knows its operators by the addresses of these
// functions. Everything that an operator reads is a source, what it writes is its result or the tensor that its result
// is a view of, and launch scalars lie in op_params: nothing is read from behind a pointer of the host.

#pragma once

#include "ggml.h"
#include "kvl-format.h"

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ATTN_PROC "kvl_attn_compute"         // attention, partial or final
#define KVL_ATTN_MERGE_PROC "kvl_attn_merge"     // joins the parts of a split
#define KVL_ATTN_MASS_PROC "kvl_attn_mass"       // adds up what each slot received
#define KVL_ATTN_SCORES_PROC "kvl_attn_scores"   // attention of window queries
#define KVL_ATTN_ROTATE_PROC "kvl_attn_rotate"   // Walsh-Hadamard transform of rows
#define KVL_PAGES_APPEND_PROC "kvl_pages_append" // stores the keys and values of new tokens
#define KVL_PAGES_WINDOW_PROC "kvl_pages_window" // remembers the queries of the newest tokens
#define KVL_PAGES_MOVE_PROC "kvl_pages_move"     // moves slots within and between pages

#define KVL_PAGE_SLOTS 32

// A page is KVL_PAGE_SLOTS rows of K, then as many of V (none where V is KVL_ROW_OF_K). Pages whose slots share scales
// (kivi groups of 64: two pages) lie in one unit: the rows of K of all of them, then those of V. Units of one format
// are a pool; all pools of a shape of heads on a device lie in one tensor, `pages`: i8 [bytes].
struct kvl_pool_ref {
    int32_t rows;  // kvl_row of K, kvl_row of V << 8
    uint32_t base; // where page 0 begins, in units of KVL_POOL_ALIGNMENT bytes
};
#define KVL_POOL_ALIGNMENT 4096

// A stream is a (sequence s, KV head h) pair, number s*n_head_kv + h.
struct kvl_stream_ref {
    int32_t n_slots; // slots up to the last new token, seen or not
    int32_t first;   // its pages in the list of the layer
    int32_t n_pages; // how many: all that hold a slot that is seen, in the order of their slots
    int32_t mean;    // row of `means` that its keys lack in all formats but f16, -1: they lack nothing
    int32_t number;  // position + 1 of the first new token
    int32_t window;  // first row of its sequence in the tensor of window queries
    int32_t n_swa;   // sliding window, see below; its slots are then those of consecutive positions. 0: none
    int32_t reserved;
};

struct kvl_page_ref {
    uint32_t entry; // pool << KVL_PAGE_POOL_SHIFT | page
    uint32_t live;  // bit j: slot j of the page can be seen
    int32_t slot;   // number of the page's first slot in its stream
    int32_t mass;   // row of `mass` where what its slots receive is added up
};

#define KVL_PAGE_POOL_SHIFT 27
#define KVL_PAGE_NUMBER ((1u << KVL_PAGE_POOL_SHIFT) - 1)
#define KVL_PAGE_POOLS 32

// The table, i32: for every layer, at op_params' `table`, kvl_pool_ref[n_pools rounded up to even], then
// kvl_stream_ref[n_seqs*n_head_kv], then the pages of all streams, kvl_page_ref[]. All of them begin at a multiple of
// 16 bytes. One tensor serves all layers of a graph.
static inline struct kvl_pool_ref * kvl_table_pools(void * layer) {
    return (struct kvl_pool_ref *)layer;
}
static inline struct kvl_stream_ref * kvl_table_streams(void * layer, int n_pools) {
    return (struct kvl_stream_ref *)(kvl_table_pools(layer) + n_pools + n_pools % 2);
}
static inline struct kvl_page_ref * kvl_table_pages(void * layer, int n_pools, int n_streams) {
    return (struct kvl_page_ref *)(kvl_table_streams(layer, n_pools) + n_streams);
}
// Its size for a layer, in numbers of 32 bits.
static inline int64_t kvl_table_size(int64_t n_pools, int64_t n_streams, int64_t n_pages) {
    return 2 * (n_pools + n_pools % 2) + 8 * n_streams + 4 * n_pages;
}

// What a slot is given per query head of its group, a kvl_mass of kvl.h.
#define KVL_ATTN_MASS_SUM 1
#define KVL_ATTN_MASS_LAST 2 // position + 1 of the last query with p >= 1 / (slots that it saw)

// Launch scalars, in op_params behind those of GGML_OP_CUSTOM.
struct kvl_attn_params {
    int32_t table; // where the layer's part of the table begins, in numbers of 32 bits
    int32_t n_pools;
    int32_t n_seqs;
    int32_t n_head_kv;
    int32_t n_split; // parts into which each stream's pages are cut
    int32_t n_kv;    // room for slots per stream in a result that has one value per slot: at least pages listed x
                     // KVL_PAGE_SLOTS. kvl_pages_window: queries remembered per sequence
    float scale;
    float soft_cap; // 0: none
    int32_t d_v;
    int32_t flags; // KVL_ATTN_MASS_*, KVL_ATTN_RMS
};
#define KVL_ATTN_MASS_MASK 3
#define KVL_ATTN_RMS 4 // kvl_attn_scores: root mean square over the tokens instead of the mean

struct kvl_move_params {
    int32_t k_row, v_row; // kvl_row
    int32_t d_k, d_v;
};

#define KVL_PARAMS_AT 24
static inline void kvl_set_params(struct ggml_tensor * op, const void * params, size_t size) {
    memcpy((char *)op->op_params + KVL_PARAMS_AT, params, size);
}
static inline const void * kvl_get_params(const struct ggml_tensor * op) {
    return (const char *)op->op_params + KVL_PARAMS_AT;
}

// group = n_head / n_head_kv, n_seq_tokens = (rows of q) / n_seqs; a row is a (token t, query head g of the group)
// pair, row t*group + g. A slot is seen by token t of its sequence if its number is at most n_slots - n_seq_tokens + t
// (what is cached lies before the new tokens, which lie in order) and it is live. With n_swa > 0 a token sees the last
// n_swa slots up to its own, with n_swa < 0 those from the last position on that is a multiple of -n_swa.
//
//     q      f32 [d_k, n_head, n_seq_tokens*n_seqs], contiguous
//     means  f32 [d_k, n]
//     mass   f32 [KVL_PAGE_SLOTS * (most query heads of a group), n]: row of a page, 32 values per query head
//     sinks  f32 [n_head]: a logit that takes part in the softmax of a query head and has no value; may be missing
//
// kvl_attn_compute: q, table, pages, means, sinks
//     up to KVL_ATTN_FEW_ROWS rows, with n_split > 1 or mass: dst f32 parts [d_v + 2, n_rows, n_split, n_stream]
//     (unnormalized output, maximum, sum); with mass, then logits [n_kv, n_rows, n_stream]
//     otherwise: dst f32 [d_v, n_head, n_seq_tokens*n_seqs]; with mass, then maximum and sum [2, n_rows, n_stream]
//
// kvl_attn_merge: the parts; dst f32 [d_v, n_head, n_seq_tokens*n_seqs]
//
// kvl_attn_mass: mass, the result of kvl_attn_compute, q, table, pages, means, sinks; dst is a view of mass
//
// kvl_attn_scores: q, table, pages, means, sinks (or NULL), visible, blind; one sequence without a sliding window
//     visible i32 [n_seq_tokens, n_head_kv], slots seen, never fewer than by the token before; blind i32 [n_kv,
//     n_head_kv], how many of the first tokens do not see a slot though it is among these; every page is listed.
//     dst f32 [n_kv, n_head], softmax over the slots seen, mean (or root mean square) over the tokens, 0 beyond
//
// kvl_attn_rotate: f32 [d, n], contiguous; dst f32 of the same shape: every row as by kvl_row_rotate
//
// kvl_pages_append: pages, k f32 [d_k, n_head_kv, n_seq_tokens*n_seqs], v f32 [d_v, ...], table; dst is a view of
//     pages. Where V is KVL_ROW_OF_K, v is k and not read.
//     Token t of a sequence is slot n_slots - n_seq_tokens + t of each of its heads, in pool 0, which is f16
//
// kvl_pages_window: queries f32 [d_k*n_head, n], q, table; dst is a view of queries. Of every sequence the last n_kv
//     tokens (all, if they are fewer): position p goes to row window + p % n_kv
//
// kvl_pages_move: pages, list i32 [4, n]; dst is a view of pages; kvl_move_params. An item is {base of the pool as in
//     kvl_pool_ref, row to, row from, rows}; a row is KVL_PAGE_SLOTS * page + slot (unsigned), and neither side of an
//     item crosses a page. Items are done one after the other

// Rows up to which a stream's pages are split among threads.
#define KVL_ATTN_FEW_ROWS 24

void kvl_attn_compute(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_merge(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_mass(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_scores(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_rotate(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_pages_append(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_pages_window(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_pages_move(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// kvl_set_params, for whoever builds nodes from elsewhere than C.
void kvl_set_op_params(struct ggml_tensor * op, const void * params, size_t size);

// The CPU backend's functions by the names above, NULL for others.
void * kvl_cpu_proc_address(const char * name);

#ifdef __cplusplus
}
#endif
