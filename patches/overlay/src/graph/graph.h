// Attention of a paged context. Where the backend has page kernels, one operator reads the pages in place; elsewhere
// the portable path gathers each head's slots with stock operators and runs stock flash attention with the KV heads as
// streams. The portable path works on every backend and is the reference for the kernels.

#pragma once

#include "kvl-attn.h"
#include "llama-graph.h"
#include "cache/memory.h"

class llm_graph_input_kv_paged : public llm_graph_input_attn_kv {
  public:
    llm_graph_input_kv_paged(const llm_graph_context & g, const llama_kv_paged_context * paged);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // f16 [n_kv, n_tokens or 1, 1, n_stream or 1]: 0 where a query sees a slot, -inf elsewhere
    ggml_tensor * build_mask(const llm_graph_context & g, uint32_t layer) const;

    const llama_kv_paged_context * paged;
    const uint32_t n_seqs;
    const uint32_t n_seq_tokens;
    const uint32_t n_ring; // newest tokens per sequence whose queries are remembered

    struct layer_input {
        kvl_layer_shape shape;
        ggml_tensor * append = nullptr; // i64 [n_head_kv*n_tokens]: pool row of each new token and head
        // page kernels
        ggml_tensor * table = nullptr;           // i32: page tables of all streams (kvl-attn.h)
        std::unique_ptr<kvl_attn_params> kernel; // user data of the operators
        std::vector<float *> mass;               // where to add the attention mass, per stream and query head
        std::vector<const float *> mu;           // what keys were stored without, per stream
        // stock operators
        ggml_tensor * gather = nullptr; // i32 [n_kv*n_head_kv*n_seqs]: pool rows; new tokens first, then past, padding
        ggml_tensor * live = nullptr;   // f16 [n_kv, 1, 1, n_head_kv*n_seqs or 1]: -inf on padding
    };
    std::vector<layer_input> layers;
    std::vector<int32_t> number;    // position + 1 of the first new token of each sequence
    ggml_tensor * causal = nullptr; // f16 [max n_kv, n_seq_tokens]: order among the new tokens
    ggml_tensor * ring = nullptr;   // i64 [n_ring*n_seqs]: query row of each remembered token

  private:
    void set_table(uint32_t layer, const llama_ubatch * ubatch);
    void set_gather(uint32_t layer, const llama_ubatch * ubatch) const;
};
