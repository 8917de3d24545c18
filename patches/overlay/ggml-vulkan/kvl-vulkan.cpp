// The operators that the Vulkan backend has.

#include "kvl-vulkan.h"
#include "kvl-tags.h"

struct kvl_vulkan_kernel {
    void (*load)(vk_device & device, const kvl_create_pipeline & create);
    void (*encode)(ggml_backend_vk_context * ctx, vk_context & compute_ctx, ggml_tensor * node);
};

// None yet: a context whose pages lie on such a device computes attention by stock operators.
static const kvl_device_ops<kvl_vulkan_kernel> OPS = {};

void kvl_vulkan_load(vk_device & device, const kvl_create_pipeline & create) {
    for (const auto & op : OPS) {
        op.run.load(device, create);
    }
}

void kvl_vulkan_encode(ggml_backend_vk_context * ctx, vk_context & compute_ctx, ggml_tensor * node) {
    const auto * op = kvl_find_op(OPS, node);
    GGML_ASSERT(op != nullptr);
    op->run.encode(ctx, compute_ctx, node);
}

bool kvl_vulkan_supports(const ggml_tensor * node) {
    return kvl_find_op(OPS, node) != nullptr;
}

void * kvl_vulkan_proc_address(ggml_backend_reg_t /* reg */, const char * name) {
    return kvl_find_tag(OPS, name);
}
