// The callback that turns failed assertions of one thread into exceptions.

#include "api/abort_guard.h"

#include "ggml.h"

#include <cstdio>
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
