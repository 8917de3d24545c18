// Window scores: what the last queries of a sequence attend to, per query head and slot.

#pragma once

#include "cache/memory.h"

// f32 out[n_head][stride]: softmax over all slots of the head for each of the last n_queries, mean over them (rms:
// root mean square). Returns their number, or a negative kvl_status with the error set. Scratch memory stays below
// params.score_bytes as long as one KV head fits.
int32_t kvl_compute_window_scores(llama_kv_paged & kv, llama_seq_id seq, uint32_t layer, int32_t n_queries, bool rms,
                                  int n_threads, float * out, int64_t stride);
