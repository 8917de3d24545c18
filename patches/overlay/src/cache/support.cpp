// What the paged memory can serve: models, and formats of their keys and values.

#include "llama-hparams.h"
#include "cache/memory.h"
#include "llama-model.h"

#include <string>
#include <utility>

std::pair<kvl_row, kvl_row> kvl_rows_of(uint32_t format, const kvl_params & params, bool latent) {
    if (latent) {
        return {kvl_rows_of(format, params, false).first, KVL_ROW_OF_K};
    }
    switch (format) {
        case KVL_FORMAT_Q8:
            return {KVL_ROW_Q8, KVL_ROW_Q8};
        case KVL_FORMAT_Q4:
            return {KVL_ROW_Q4, KVL_ROW_Q4};
        case KVL_FORMAT_KV3:
            return {KVL_ROW_KV3, KVL_ROW_KV2};
        case KVL_FORMAT_KV2:
            return {KVL_ROW_KV2, KVL_ROW_KV2};
        case KVL_FORMAT_KIVI:
            return {kvl_kivi_row(params.kivi_bits, params.kivi_group, true),
                    kvl_kivi_row(params.kivi_bits, params.kivi_group, false)};
        case KVL_FORMAT_TOKEN2:
            return {KVL_ROW_TOKEN2, KVL_ROW_TOKEN2};
        default:
            return {KVL_ROW_F16, KVL_ROW_F16};
    }
}

std::string llama_kv_paged::unsupported(const llama_model & model) {
    const llama_hparams & hp = model.hparams;
    const std::string instead = "; use --policy full, which runs it on llama.cpp's own cache";
    const std::string arch = "the architecture '" + model.arch_name() + "' ";
    if (llm_arch_is_recurrent(model.arch)) {
        return arch + "is recurrent and has no KV cache to page" + instead;
    }
    if (hp.swa_type != LLAMA_SWA_TYPE_NONE && llm_arch_is_hybrid(model.arch)) {
        return arch + "has recurrent layers beside sliding windows, which the paged cache does not serve yet" + instead;
    }
    if (llama_model_has_encoder(&model) || !hp.causal_attn) {
        return arch + "has no causal decoder that the paged cache could serve" + instead;
    }
    if (hp.f_max_alibi_bias > 0.0f) {
        return arch + "uses ALiBi position biases, which the paged cache does not serve yet" + instead;
    }
    if (hp.router_layer >= 0) {
        return arch + "has a router among its layers, which the paged cache does not serve" + instead;
    }
    bool open = false;
    for (uint32_t il = 0; il < hp.n_layer(); il++) {
        open = open || (kvl_owns_cache(model, il) && !hp.is_swa(il));
    }
    if (!open) {
        return arch + "has no layer whose cache grows with the text" + instead;
    }
    switch (model.arch) {
        case LLM_ARCH_BERT: // encoders, whatever their files say
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_QWEN3TTS: // audio
        case LLM_ARCH_POCKETTTS:
        case LLM_ARCH_GROK:   // scales its logits outside the attention operator
        case LLM_ARCH_EAGLE3: // drafts, not models
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_DREAM: // diffusion: no causal cache
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
        case LLM_ARCH_DEEPSEEK4: // attention of their own
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_GEMMA4_ASSISTANT:
        case LLM_ARCH_WAVTOKENIZER_DEC:
            return arch + "computes attention in a way of its own, which the paged cache does not serve" + instead;
        default:
            return "";
    }
}

std::string kvl_block_refusal(kvl_row k_row, kvl_row v_row, uint32_t d_k, uint32_t d_v) {
    if (v_row == KVL_ROW_OF_K && kvl_row_is_kivi(k_row)) {
        return "kivi stores keys and values in two ways, and those of latent attention (MLA) are the same rows; use "
               "another storage (--kv)";
    }
    const int k_block = kvl_row_block(k_row);
    const int v_block = v_row == KVL_ROW_OF_K ? k_block : kvl_row_block(v_row);
    if (d_k % uint32_t(k_block) == 0 && d_v % uint32_t(v_block) == 0) {
        return "";
    }
    return "heads of " + std::to_string(d_k) + " and " + std::to_string(d_v) +
           " values cannot be stored in blocks of " + std::to_string(k_block) +
           (k_block != v_block ? " and " + std::to_string(v_block) : "");
}

std::string llama_kv_paged::unsupported(const llama_model & model, kvl_format format) {
    const llama_hparams & hp = model.hparams;
    const auto [k_row, v_row] = kvl_rows_of(format, {}, hp.is_mla());
    std::string why;
    for (uint32_t il = 0; il < hp.n_layer() && why.empty(); il++) {
        if (!kvl_owns_cache(model, il) || hp.is_swa(il)) {
            continue;
        }
        ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(model.dev_layer(il));
        ggml_backend_dev_t device = kvl_device_of(buft);
        if (format != KVL_FORMAT_F16 && !kvl_find_kernels(device)) {
            why = "storage formats other than f16 (--kv) need the page kernels, which " + kvl_lacks_kernels(device);
        } else if (format != KVL_FORMAT_F16 && !ggml_backend_buft_is_host(buft)) {
            why = KVL_FORMATS_ON_HOST;
        } else {
            why = kvl_block_refusal(k_row, v_row, hp.n_embd_head_k(il), hp.n_embd_head_v(il));
        }
    }
    return why;
}
