// Loading a model file that may be damaged, and what must be true of one that was loaded.

#include "kvl-guard.h"
#include "kvl.h"
#include "llama-kv-paged.h"
#include "llama-model.h"

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

static thread_local bool guarding = false;
static ggml_abort_callback_t previous = nullptr;

static void on_abort(const char * message) {
    if (guarding) {
        guarding = false;
        // where it was built is nobody's concern
        const std::string text = message;
        const size_t colon = text.find(':');
        const size_t slash = text.find_last_of("/\\", colon);
        throw std::runtime_error(slash < colon ? text.substr(slash + 1) : text);
    }
    if (previous) {
        previous(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

kvl_abort_guard::kvl_abort_guard() {
    static const bool registered = [] {
        previous = ggml_set_abort_callback(on_abort);
        return true;
    }();
    (void)registered;
    guarding = true;
}

kvl_abort_guard::~kvl_abort_guard() {
    guarding = false;
}

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
