// Page kernels of the CUDA backend, and of HIP and MUSA, which compile the same files: what ggml-cuda.cu calls.

#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;

// Launches a node's kernel on the context's stream; false if the node is no operator of ours.
bool kvl_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool kvl_cuda_supports(const ggml_tensor * node);
// The tags by the names of kvl-attn.h, nullptr for others.
void * kvl_cuda_proc_address(const char * name);
