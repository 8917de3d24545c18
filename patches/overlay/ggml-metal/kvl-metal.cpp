// The operators that the Metal backend has.

#include "kvl-metal.h"
#include "kvl-tags.h"

using kvl_metal_run_t = void (*)(ggml_metal_device_t dev, ggml_metal_encoder_t enc, ggml_tensor * node);

// None yet: a context whose pages lie on such a device computes attention by stock operators.
static const kvl_device_ops<kvl_metal_run_t> OPS = {};

void kvl_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, ggml_tensor * node) {
    const auto * op = kvl_find_op(OPS, node);
    GGML_ASSERT(op != nullptr);
    op->run(dev, enc, node);
}

bool kvl_metal_supports(const ggml_tensor * node) {
    return kvl_find_op(OPS, node) != nullptr;
}

void * kvl_metal_proc_address(const char * name) {
    return kvl_find_tag(OPS, name);
}
