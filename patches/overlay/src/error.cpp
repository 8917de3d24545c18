// The sentence that kvl_last_error gives, one per thread.

#include "error.h"

static thread_local std::string last_error;

void kvl_set_error(const std::string & what) {
    last_error = what;
}

int32_t kvl_fail(kvl_status status, const std::string & what) {
    kvl_set_error(what);
    return status;
}

const char * kvl_last_error(void) {
    return last_error.c_str();
}
