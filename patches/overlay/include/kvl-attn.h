// Attention over pages as ggml operators: what libllama and a backend agree on.
//
// Both operators are GGML_OP_CUSTOM nodes, whose function comes from the backend (kvl_attn_proc), so that ggml's own
// operator list stays untouched.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVL_ATTN_PROC "kvl_attn_compute"     // partial or final attention
#define KVL_ATTN_MERGE_PROC "kvl_attn_merge" // joins the partial results of a split

// User data of both operators; must live as long as the graph.
//
// Streams are (sequence s, KV head h) pairs, stream s*n_head_kv + h. A slot is seen by query t of its sequence if its
// index is at most n_slots - n_seq_tokens + t: what is cached lies before the new tokens, which lie in order.
//
// kvl_attn_compute: src[0] q    f32 [d_k, n_head, n_seq_tokens*n_seqs], contiguous
//                   src[1] k    f16 [d_k, n_rows], src[2] v f16 [d_v, n_rows]: the pool; page p is rows 32p .. 32p+31
//                   src[3] table i32: n_slots[n_stream], first[n_stream], then page numbers; stream i has
//                          ceil(n_slots[i]/32) pages from table[2*n_stream + first[i]]
//                   dst  n_split == 1: f32 [d_v, n_head, n_seq_tokens*n_seqs]
//                        else          f32 [d_v + 2, n_seq_tokens*group, n_split, n_stream]: unnormalized output, max,
//                        sum
// kvl_attn_merge:   src[0] the partial result; dst as for n_split == 1
struct kvl_attn_params {
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_seqs;
    int32_t n_seq_tokens;
    int32_t n_split; // parts into which each stream's pages are cut
    float scale;
    float soft_cap; // 0: none
};

// Query rows (tokens x query heads of a group) up to which a stream's pages are split.
#define KVL_ATTN_FEW_ROWS 24

void kvl_attn_compute(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void kvl_attn_merge(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// The CPU backend's functions by the names above, NULL for others.
void * kvl_cpu_proc_address(const char * name);

#ifdef __cplusplus
}
#endif
