// Loading a model file that may be damaged.

#include "kvl.h"

#include <cstdio>
#include <stdexcept>
#include <string>

#include "llama-kv-paged.h"

// The loader checks most of a file and reports what is wrong, but takes some of it for granted: where that is broken,
// an assertion ends the process. While this thread loads, a failed assertion is thrown instead, which the loader
// catches like its own errors.

static thread_local bool loading = false;
static ggml_abort_callback_t previous = nullptr;

static void on_abort(const char * message) {
    if (loading) {
        loading = false;
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

llama_model * kvl_load_model(const char * path, llama_model_params params) {
    static const bool registered = [] {
        previous = ggml_set_abort_callback(on_abort);
        return true;
    }();
    (void)registered;
    loading = true;
    llama_model * model = nullptr;
    try {
        model = llama_model_load_from_file(path, params);
    } catch (const std::exception & e) {
        kvl_set_error(e.what());
    }
    loading = false;
    return model;
}
