// The inputs of a paged graph as llama.cpp's graphs know them: alone, where some layers have a sliding window, or
// beside recurrent layers.

#include "graph/graph.h"

#include "kvl-hooks.h"
#include "llama-memory-recurrent.h"

namespace {

// One of llama.cpp's inputs whose part is taken by that of all layers, whatever they see.
template <typename Stock> struct kvl_input : Stock {
    kvl_input(const llm_graph_context & g, const llama_kv_paged_context * paged)
        : Stock(g.hparams, g.cparams, nullptr), all(g, paged) {}

    void set_input(const llama_ubatch * ubatch) override { all.set_input(ubatch); }
    bool can_reuse(const llm_graph_params & params) override { return all.can_reuse(params); }

    llm_graph_input_kv_paged all;
};

template <typename Stock> struct kvl_input_hybrid : Stock {
    using Stock::Stock;

    void set_input(const llama_ubatch * ubatch) override {
        this->inp_attn->set_input(ubatch);
        this->inp_rs->set_input(ubatch);
    }
    bool can_reuse(const llm_graph_params & params) override {
        llm_graph_params recurrent = params;
        recurrent.mctx = static_cast<const llama_kv_paged_context *>(params.mctx)->recr.get();
        // both take over what belongs to the new batch
        const bool attn = this->inp_attn->can_reuse(params);
        return this->inp_rs->can_reuse(recurrent) && attn;
    }
};

const llama_kv_paged_context * paged_context(const llm_graph_context & g) {
    return dynamic_cast<const llama_kv_paged_context *>(g.mctx);
}

// Adds an input to a graph.
template <typename Input, typename... Args> Input * add(const llm_graph_context & g, Args &&... args) {
    return static_cast<Input *>(g.res->add_input(std::make_unique<Input>(std::forward<Args>(args)...)));
}

template <typename Stock> llm_graph_input_attn_kv * paged_of(Stock * inp) {
    auto * paged = dynamic_cast<kvl_input<Stock> *>(inp);
    return paged ? &paged->all : nullptr;
}

} // namespace

llm_graph_input_attn_kv * kvl_build_attn_inp(const llm_graph_context & g) {
    const auto * paged = paged_context(g);
    return paged ? add<llm_graph_input_kv_paged>(g, g, paged) : nullptr;
}

llm_graph_input_attn_kv_iswa * kvl_build_attn_inp_iswa(const llm_graph_context & g) {
    const auto * paged = paged_context(g);
    return paged ? add<kvl_input<llm_graph_input_attn_kv_iswa>>(g, g, paged) : nullptr;
}

llm_graph_input_attn_k * kvl_build_attn_inp_k(const llm_graph_context & g) {
    const auto * paged = paged_context(g);
    return paged ? add<kvl_input<llm_graph_input_attn_k>>(g, g, paged) : nullptr;
}

llm_graph_input_mem_hybrid * kvl_build_inp_mem_hybrid(const llm_graph_context & g, kvl_build_rs_inp build) {
    const auto * paged = paged_context(g);
    return paged
               ? add<kvl_input_hybrid<llm_graph_input_mem_hybrid>>(g, g.cparams,
                                                                   std::make_unique<llm_graph_input_kv_paged>(g, paged),
                                                                   build(g.ctx0, g.ubatch, paged->recr.get()), nullptr)
               : nullptr;
}

llm_graph_input_mem_hybrid_k * kvl_build_inp_mem_hybrid_k(const llm_graph_context & g, kvl_build_rs_inp build) {
    const auto * paged = paged_context(g);
    return paged ? add<kvl_input_hybrid<llm_graph_input_mem_hybrid_k>>(
                       g, g.cparams, std::make_unique<kvl_input<llm_graph_input_attn_k>>(g, paged),
                       build(g.ctx0, g.ubatch, paged->recr.get()), nullptr)
                 : nullptr;
}

bool kvl_is_paged(const llm_graph_input_attn_kv * inp) {
    return dynamic_cast<const llm_graph_input_kv_paged *>(inp) != nullptr;
}

llm_graph_input_attn_kv * kvl_paged_of(llm_graph_input_attn_kv_iswa * inp) {
    return paged_of(inp);
}

llm_graph_input_attn_kv * kvl_paged_of(llm_graph_input_attn_k * inp) {
    return paged_of(inp);
}
