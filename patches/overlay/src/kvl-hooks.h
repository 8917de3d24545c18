// What the patched files of llama.cpp call.

#pragma once

#include "llama-graph.h"
#include "llama-memory.h"

struct llama_cparams;
struct llama_model;

// the paged memory that kvl_init_from_model has asked for on this thread, nullptr: the stock one
llama_memory_i * kvl_create_memory(const llama_model & model, const llama_cparams & cparams);
// the paged input of this graph, nullptr when its memory is not paged
llm_graph_input_attn_kv * kvl_build_attn_inp(const llm_graph_context & g);
bool kvl_is_paged(const llm_graph_input_attn_kv * inp);
// attention of a layer over its pages: [d_v*n_head, n_tokens]
ggml_tensor * kvl_build_attn(const llm_graph_context & g, llm_graph_input_attn_kv * inp, ggml_tensor * q,
                             ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale,
                             int il);
