// The inputs of a paged graph as llama.cpp's graphs know them: alone, where some layers have a sliding window, or
// beside recurrent layers.

#include "graph/graph.h"

#include "kvl-hooks.h"
#include "llama-memory-recurrent.h"

namespace {

struct kvl_input_iswa : llm_graph_input_attn_kv_iswa {
    kvl_input_iswa(const llm_graph_context & g, const llama_kv_paged_context * paged)
        : llm_graph_input_attn_kv_iswa(g.hparams, g.cparams, nullptr), all(g, paged) {}

    void set_input(const llama_ubatch * ubatch) override { all.set_input(ubatch); }
    bool can_reuse(const llm_graph_params & params) override { return all.can_reuse(params); }

    llm_graph_input_kv_paged all; // of all layers, whatever they see
};

struct kvl_input_hybrid : llm_graph_input_mem_hybrid {
    using llm_graph_input_mem_hybrid::llm_graph_input_mem_hybrid;

    void set_input(const llama_ubatch * ubatch) override {
        inp_attn->set_input(ubatch);
        inp_rs->set_input(ubatch);
    }
    bool can_reuse(const llm_graph_params & params) override {
        llm_graph_params recurrent = params;
        recurrent.mctx = static_cast<const llama_kv_paged_context *>(params.mctx)->recr.get();
        // both take over what belongs to the new batch
        const bool attn = inp_attn->can_reuse(params);
        return inp_rs->can_reuse(recurrent) && attn;
    }
};

const llama_kv_paged_context * paged_context(const llm_graph_context & g) {
    return dynamic_cast<const llama_kv_paged_context *>(g.mctx);
}

} // namespace

llm_graph_input_attn_kv * kvl_build_attn_inp(const llm_graph_context & g) {
    const auto * paged = paged_context(g);
    return !paged ? nullptr
                  : static_cast<llm_graph_input_attn_kv *>(
                        g.res->add_input(std::make_unique<llm_graph_input_kv_paged>(g, paged)));
}

bool kvl_is_paged(const llm_graph_input_attn_kv * inp) {
    return dynamic_cast<const llm_graph_input_kv_paged *>(inp) != nullptr;
}

llm_graph_input_attn_kv_iswa * kvl_build_attn_inp_iswa(const llm_graph_context & g) {
    const auto * paged = paged_context(g);
    return !paged ? nullptr
                  : static_cast<llm_graph_input_attn_kv_iswa *>(
                        g.res->add_input(std::make_unique<kvl_input_iswa>(g, paged)));
}

llm_graph_input_attn_kv * kvl_paged_of(llm_graph_input_attn_kv_iswa * inp) {
    auto * paged = dynamic_cast<kvl_input_iswa *>(inp);
    return paged ? &paged->all : nullptr;
}

llm_graph_input_mem_hybrid * kvl_build_inp_mem_hybrid(const llm_graph_context & g, kvl_build_rs_inp build) {
    const auto * paged = paged_context(g);
    if (!paged) {
        return nullptr;
    }
    auto inp = std::make_unique<kvl_input_hybrid>(g.cparams, std::make_unique<llm_graph_input_kv_paged>(g, paged),
                                                  build(g.ctx0, g.ubatch, paged->recr.get()), nullptr);
    return static_cast<llm_graph_input_mem_hybrid *>(g.res->add_input(std::move(inp)));
}
