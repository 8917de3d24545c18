// Attention of a paged context. Where the device of a layer's pages has page kernels, they read the pages in place;
// elsewhere the portable path gathers each head's slots with stock operators and runs stock flash attention with the KV
// heads as streams. The portable path works on every backend and is the reference for the kernels.

#pragma once

#include "kvl-attn.h"
#include "llama-graph.h"
#include "cache/memory.h"

#include <map>

class llm_graph_input_kv_paged : public llm_graph_input_attn_kv {
  public:
    llm_graph_input_kv_paged(const llm_graph_context & g, const llama_kv_paged_context * paged);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    const llama_kv_paged_context * paged;
    const uint32_t n_seqs;
    const uint32_t n_seq_tokens;
    const uint32_t n_ring; // newest tokens per sequence whose queries are remembered

    struct layer_input {
        kvl_layer_shape shape;
        int32_t table = 0; // page kernels: where the layer's part of the table begins
        // stock operators: where the layer's parts of `rows` and `masks` begin
        int64_t append_k = 0, append_v = 0; // rows of the new tokens: [heads of all tokens]
        int64_t gather_k = 0, gather_v = 0; // rows of the slots: new tokens first, then past, padding
        // -inf on what is not seen: [n_kv, 1, 1, n_stream or 1]; with a sliding window [n_kv, n_seq_tokens, 1, n_stream
        // or 1], which layers of the same shape share
        int64_t live = 0;
        bool owns_mask = true; // the first of those that share it
    };
    std::vector<layer_input> layers;

    // one input each for all layers, nullptr where no layer needs it
    ggml_tensor * table = nullptr;  // i32: the table of the page kernels (kvl-attn.h)
    ggml_tensor * rows = nullptr;   // i32
    ggml_tensor * masks = nullptr;  // f16
    ggml_tensor * causal = nullptr; // f16 [max n_kv, n_seq_tokens]: order among the new tokens
    ggml_tensor * ring = nullptr;   // i32 [n_ring*n_seqs]: query row of each remembered token

    // stock operators: an input on the device of a layer's pages, to which it is copied once, and a part of it
    ggml_tensor * beside(const llm_graph_context & g, const kvl_layer & layer, ggml_tensor * input);
    ggml_tensor * part(const llm_graph_context & g, const kvl_layer & layer, ggml_tensor * input, int64_t ne0,
                       int64_t ne1, int64_t ne3, int64_t first);
    // streams of a layer that have a mask of their own
    int64_t mask_streams(const kvl_layer & layer, const kvl_layer_shape & shape) const;

  private:
    const kvl_head & head(const llama_ubatch * ubatch, uint32_t layer, uint32_t stream) const;
    void set_table(uint32_t layer, const llama_ubatch * ubatch);
    void set_rows(uint32_t layer, const llama_ubatch * ubatch);
    // what the tokens of a stream see of a sliding window, in the order of gather_k
    void set_window_mask(uint32_t layer, const llama_ubatch * ubatch, uint32_t stream) const;

    std::map<std::pair<ggml_backend_buffer_type_t, ggml_tensor *>, ggml_tensor *> copies;
};

// Attention of one layer; q [d_k, n_head, n_tokens], k and v [d, n_head_kv, n_tokens], contiguous, rotated if they are
// to be, or both nullptr: another layer stores them. The new tokens are stored, and their queries remembered. sinks f32
// [n_head], nullptr: none. [d_v, n_head, n_tokens]
ggml_tensor * kvl_build_fused(const llm_graph_context & g, llm_graph_input_kv_paged & inp, uint32_t layer,
                              ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, float kq_scale);
ggml_tensor * kvl_build_portable(const llm_graph_context & g, llm_graph_input_kv_paged & inp, uint32_t layer,
                                 ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks,
                                 float kq_scale);

// An operator with launch scalars.
template <typename Params> ggml_tensor * kvl_with_params(ggml_tensor * op, const Params & params) {
    static_assert(sizeof(Params) + KVL_PARAMS_AT <= GGML_MAX_OP_PARAMS, "launch scalars do not fit");
    kvl_set_params(op, &params, sizeof(params));
    return op;
}

// A stream of the table: its slots, the row of its key mean (-1: none), position + 1 of its first new token, the first
// row of its sequence's window queries, and what was recalled for it.
struct kvl_table_stream {
    const kvl_head * head;
    int32_t mean, number, window;
    const kvl_recalled & recalled;
};
// Writes a layer's part of the table; all: pages that attention does not see as well, and every slot held as seen.
void kvl_write_table(void * to, const kvl_layer & layer, const std::vector<kvl_table_stream> & streams, bool all);
