// Shared by the C API's files: checks of arguments, and exceptions as error codes.

#pragma once

#include "cache/memory.h"
#include "error.h"
#include "kvl.h"

#include <exception>
#include <new>
#include <string>

namespace kvl_api {

// the paged memory of a context, once its arguments are in range; nullptr with the error set
llama_kv_paged * memory_of(const llama_context * ctx);
llama_kv_paged * memory_of(const llama_context * ctx, llama_seq_id seq);
llama_kv_paged * memory_of(const llama_context * ctx, llama_seq_id seq, int32_t layer);
// likewise, and what it holds can be read: the model has its weights
llama_kv_paged * contents_of(const llama_context * ctx, llama_seq_id seq, int32_t layer);

// whether a pointer that must be given is; else the error is set
template <typename... T> bool given(const T *... pointers) {
    const bool all = (... && (pointers != nullptr));
    if (!all) {
        kvl_set_error("an argument is NULL that must not be");
    }
    return all;
}

// Runs f and turns an exception (no memory, say) into a status.
template <typename F> int32_t guarded(F && f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return kvl_fail(KVL_ERR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return kvl_fail(KVL_ERR_COMPUTE, e.what());
    }
}

} // namespace kvl_api
