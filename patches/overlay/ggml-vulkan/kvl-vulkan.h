// Page kernels in the Vulkan backend: what the hooks in ggml-vulkan.cpp call.

#pragma once

#include "ggml-vulkan-common.h"
#include "kvl-attn.h"

#include <array>
#include <functional>
#include <vector>

// The backend's own: makes a pipeline known, and compiles it when it is the one that is wanted.
using kvl_create_pipeline =
    std::function<void(vk_device & device, vk_pipeline & pipeline, const char * name, size_t spv_size,
                       const void * spv_data, const char * entrypoint, uint32_t n_buffers, uint32_t push_constant_size,
                       std::array<uint32_t, 3> wg_denoms, const std::vector<uint32_t> & specialization, uint32_t align,
                       bool disable_robustness, bool require_full_subgroups, uint32_t subgroup_size)>;

// The function that stands for an operator of ours in a node, nullptr: there is no kernel of this name.
void * kvl_vulkan_proc_address(ggml_backend_reg_t reg, const char * name);
// Whether a GGML_OP_CUSTOM node is one of our operators: the CPU backend takes all others.
bool kvl_vulkan_supports(const ggml_tensor * op);
// Creates the pipelines of all kernels.
void kvl_vulkan_load(vk_device & device, const kvl_create_pipeline & create);
// Records the kernel of a node that is supported.
void kvl_vulkan_encode(ggml_backend_vk_context * ctx, vk_context & compute_ctx, ggml_tensor * node);
