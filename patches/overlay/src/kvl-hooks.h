// What the patched files of llama.cpp call.

#pragma once

#include "llama-graph.h"
#include "llama-memory.h"

#include <memory>

struct llama_cparams;
struct llama_model;

using kvl_build_rs_inp = std::unique_ptr<llm_graph_input_rs> (*)(ggml_context *, const llama_ubatch &,
                                                                 const llama_memory_recurrent_context *);

// the paged memory that kvl_init_from_model has asked for on this thread, nullptr: the stock one
llama_memory_i * kvl_create_memory(const llama_model & model, const llama_cparams & cparams);
// the paged input of this graph, nullptr when its memory is not paged
llm_graph_input_attn_kv * kvl_build_attn_inp(const llm_graph_context & g);
bool kvl_is_paged(const llm_graph_input_attn_kv * inp);
// likewise where some layers have a sliding window; the paged input in it, nullptr: it is the stock one
llm_graph_input_attn_kv_iswa * kvl_build_attn_inp_iswa(const llm_graph_context & g);
llm_graph_input_attn_kv * kvl_paged_of(llm_graph_input_attn_kv_iswa * inp);
// likewise of multi-head latent attention
llm_graph_input_attn_k * kvl_build_attn_inp_k(const llm_graph_context & g);
llm_graph_input_attn_kv * kvl_paged_of(llm_graph_input_attn_k * inp);
// likewise beside recurrent layers, whose input is made by `build`
llm_graph_input_mem_hybrid * kvl_build_inp_mem_hybrid(const llm_graph_context & g, kvl_build_rs_inp build);
llm_graph_input_mem_hybrid_k * kvl_build_inp_mem_hybrid_k(const llm_graph_context & g, kvl_build_rs_inp build);
// attention of a layer over its pages, [d_v*n_head, n_tokens]; k and v are nullptr where it reads those of another
// layer
ggml_tensor * kvl_build_attn(const llm_graph_context & g, llm_graph_input_attn_kv * inp, ggml_tensor * q,
                             ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale,
                             int il);
// latent attention, whose values are the first of k: [v_mla->ne[1]*n_head, n_tokens]
ggml_tensor * kvl_build_attn_mla(const llm_graph_context & g, llm_graph_input_attn_kv * inp, ggml_tensor * q,
                                 ggml_tensor * k, ggml_tensor * v_mla, ggml_tensor * kq_b, ggml_tensor * sinks,
                                 float kq_scale, int il);
