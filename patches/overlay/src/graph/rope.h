// Rotary embedding outside the model's graph: turning rows, and giving the slots of a sequence new positions.

#pragma once

#include "cache/memory.h"

struct llama_context;

// Turns rows x[n][d_k] by the RoPE of a layer at positions pos[n], in place; only the angle, no magnitude. Returns a
// kvl_status, with the error set.
int32_t kvl_rotate_rows(const llama_context & ctx, llama_kv_paged & kv, uint32_t layer, int64_t n, float * x,
                        const int32_t * pos);

// Slot i of every head of a sequence gets position i, and its key is turned there. Returns a kvl_status; on an error
// that it can foresee nothing has changed.
int32_t kvl_roll_sequence(const llama_context & ctx, llama_kv_paged & kv, llama_seq_id seq);
