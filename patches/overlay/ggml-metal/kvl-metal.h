// Page kernels of the Metal backend: what ggml-metal.cpp and ggml-metal-ops.cpp call.

#pragma once

#include "ggml-metal-device.h"
#include "ggml.h"

// Encodes a node that is supported.
void kvl_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, ggml_tensor * node);
bool kvl_metal_supports(const ggml_tensor * node);
// The tags by the names of kvl-attn.h, nullptr for others.
void * kvl_metal_proc_address(const char * name);
