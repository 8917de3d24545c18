// Attention over pages as ggml operators: what libllama and a backend agree on.
//
// The operators are GGML_OP_CUSTOM nodes, whose functions come from the backend's table of procedures, so that ggml's
// own operator list stays untouched.

#pragma once

#include "ggml.h"
#include "kvl-format.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ATTN_PROC "kvl_attn_compute"       // attention, partial or final
#define KVL_ATTN_MERGE_PROC "kvl_attn_merge"   // joins the parts of a split
#define KVL_ATTN_MASS_PROC "kvl_attn_mass"     // adds up what each slot received
#define KVL_ATTN_SCORES_PROC "kvl_attn_scores" // attention of window queries
#define KVL_ATTN_ROTATE_PROC "kvl_attn_rotate" // Walsh-Hadamard transform of rows

// Pages of one format, where they lie; page p is rows 32p .. 32p+31.
struct kvl_attn_format {
    kvl_row k_row, v_row;
    const char * k;
    const char * v;
};

// An entry of a page table: the page's format above, its number below. Format 0 is f16, in the tensors src[1], src[2].
#define KVL_PAGE_FORMAT_SHIFT 28
#define KVL_PAGE_FORMATS 8

// User data of the operators; must live as long as the graph.
struct kvl_attn_params {
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_seqs;
    int32_t n_seq_tokens;
    int32_t n_split; // parts into which each stream's pages are cut
    int32_t n_kv;    // room for slots per stream in what is kept for the mass
    float scale;
    float soft_cap; // 0: none
    // attention mass per stream and query head of its group, f32 [n_slots]: added to. NULL: not asked for
    float * const * mass;
    // NULL: sum probabilities. Else record for each slot the number of the last query with p >= 1 / (slots seen), where
    // last[s] is the number of the first new token of sequence s: its 1-based position
    const int32_t * last;
    // [KVL_PAGE_FORMATS], the first one unused. NULL: all pages are f16
    const struct kvl_attn_format * formats;
    // f32 [d_k] per stream, what was taken from the keys of all pages but f16 ones before they were stored; entries may
    // be NULL. NULL: nothing was
    const float * const * mu;
    int32_t rms; // kvl_attn_scores: root mean square over the tokens instead of the mean
};

// Streams are (sequence s, KV head h) pairs, stream s*n_head_kv + h; group = n_head / n_head_kv; a row is a (token,
// query head of the group) pair, row t*group + g. A slot is seen by token t of its sequence if its index is at most
// n_slots - n_seq_tokens + t (what is cached lies before the new tokens, which lie in order) and it is live.
//
// Tensors that all of them read:
//     src[0] q     f32 [d_k, n_head, n_seq_tokens*n_seqs], contiguous
//     src[1] k     f16 [d_k, n_rows], src[2] v f16 [d_v, n_rows]: the pool; page p is rows 32p .. 32p+31
//     src[3] table i32: n_slots[n_stream], first[n_stream], page[n] (entries), live[n] with room for n: stream i has
//                  ceil(n_slots[i]/32) of them from first[i] on; bit j of live: slot j of the page can be seen
//
// kvl_attn_compute
//     up to KVL_ATTN_FEW_ROWS rows, with n_split > 1 or mass: dst f32 parts [d_v + 2, n_rows, n_split, n_stream]
//     (unnormalized output, maximum, sum); with mass, then logits [n_kv, n_rows, n_stream]
//     otherwise: dst f32 [d_v, n_head, n_seq_tokens*n_seqs]; with mass, then maximum and sum [2, n_rows, n_stream]
//
// kvl_attn_merge
//     src[0] the parts (and logits), src[1] table; dst f32 [d_v, n_head, n_seq_tokens*n_seqs]; adds to the mass
//
// kvl_attn_mass
//     for more than KVL_ATTN_FEW_ROWS rows: src[4] the result of kvl_attn_compute; dst is not written
//
// kvl_attn_scores
//     one sequence: src[4] i32 [n_seq_tokens, n_head_kv], slots seen, never fewer than by the token before; src[5] i32
//     [n_kv, n_head_kv], how many of the first tokens do not see a slot though it is among these; dst f32 [n_kv,
//     n_head], softmax over the slots seen, mean (or root mean square) over the tokens, 0 beyond

// Rows up to which a stream's pages are split among threads.
#define KVL_ATTN_FEW_ROWS 24

// kvl_attn_rotate
//     src[0] f32 [d, n], contiguous; dst f32 of the same shape: every row as by kvl_row_rotate

void kvl_attn_compute(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_merge(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_mass(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_scores(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_rotate(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// The CPU backend's functions by the names above, NULL for others.
void * kvl_cpu_proc_address(const char * name);

#ifdef __cplusplus
}
#endif
