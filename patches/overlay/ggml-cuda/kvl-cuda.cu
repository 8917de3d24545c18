// The operators that the CUDA backend has.

#include "kvl-cuda.h"
#include "kvl-tags.h"

using kvl_cuda_run_t = void (*)(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// None yet: a context whose pages lie on such a device computes attention by stock operators.
static const kvl_device_ops<kvl_cuda_run_t> OPS = {};

bool kvl_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const auto * op = kvl_find_op(OPS, dst);
    if (op) {
        op->run(ctx, dst);
    }
    return op != nullptr;
}

bool kvl_cuda_supports(const ggml_tensor * node) {
    return kvl_find_op(OPS, node) != nullptr;
}

void * kvl_cuda_proc_address(const char * name) {
    return kvl_find_tag(OPS, name);
}
