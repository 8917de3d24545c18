// Model files: loading one that may be damaged, what must be true of it, and what the paged cache can serve.

#include "api/abort_guard.h"
#include "api/arguments.h"
#include "llama-model.h"

#include <exception>
#include <string>

using kvl_api::guarded;

// What llama.cpp takes for granted of a file and does not check: empty, or what is wrong.
static std::string fault_of(const llama_model & model) {
    const llama_hparams & hp = model.hparams;
    constexpr uint32_t N_CTX_MAX = 1u << 30; // twice as many positions are numbers of 32 bits
    if (model.vocab.get_type() == LLAMA_VOCAB_TYPE_NONE || model.vocab.n_tokens() == 0) {
        return "the file has no vocabulary, so that it can read no text";
    }
    if (hp.n_ctx_train == 0 || hp.n_ctx_train > N_CTX_MAX) {
        return "the file names a context length of " + std::to_string(hp.n_ctx_train) + " tokens; it must be 1 to " +
               std::to_string(N_CTX_MAX);
    }
    for (uint32_t il = 0; il < hp.n_layer(); il++) {
        const uint32_t n_head = hp.n_head(il);
        const uint32_t n_head_kv = hp.n_head_kv(il);
        if (n_head_kv > 0 && (n_head == 0 || n_head % n_head_kv != 0)) {
            return "layer " + std::to_string(il) + " has " + std::to_string(n_head) + " query heads for " +
                   std::to_string(n_head_kv) + " KV heads; the first must be a multiple of the second";
        }
    }
    return "";
}

llama_model * kvl_load_model(const char * path, llama_model_params params) {
    kvl_set_error("");
    if (!path) {
        kvl_set_error("no path");
        return nullptr;
    }
    llama_model * model = nullptr;
    try {
        const kvl_abort_guard guard;
        model = llama_model_load_from_file(path, params);
        const std::string fault = model ? fault_of(*model) : "";
        if (!fault.empty()) {
            kvl_set_error(fault);
            llama_model_free(model);
            model = nullptr;
        }
    } catch (const std::exception & e) {
        kvl_set_error(e.what());
        llama_model_free(model);
        model = nullptr;
    }
    return model;
}

int32_t kvl_model_check(const llama_model * model) {
    if (!model) {
        return kvl_fail(KVL_ERR_ARGUMENT, "no model");
    }
    return guarded([&] {
        const std::string why = llama_kv_paged::unsupported(*model);
        return why.empty() ? int32_t(KVL_OK) : kvl_fail(KVL_ERR_UNSUPPORTED, why);
    });
}

int32_t kvl_format_check(const llama_model * model, int32_t format) {
    if (const int32_t rc = kvl_model_check(model); rc != KVL_OK) {
        return rc;
    }
    if (format < 0 || format >= KVL_FORMAT_COUNT) {
        return kvl_fail(KVL_ERR_ARGUMENT, "there is no kvl_format " + std::to_string(format));
    }
    return guarded([&] {
        const std::string why = llama_kv_paged::unsupported(*model, kvl_format(format));
        return why.empty() ? int32_t(KVL_OK) : kvl_fail(KVL_ERR_UNSUPPORTED, why);
    });
}
