// Page kernels of the device on which pages lie, and how rows are stored, which the CPU does for all of them.

#pragma once

#include "ggml-backend.h"
#include "kvl-attn.h"

#include <string>

// The operators of kvl-attn.h; all of them, or none.
struct kvl_kernels {
    ggml_custom_op_t compute, merge, mass, scores, rotate, append, window, move;
};

struct kvl_row_functions {
    kvl_rows_encode_t encode;
    kvl_rows_decode_t decode;
    kvl_row_rotate_t rotate;
    kvl_rows_dot_t dot;
};

// The device whose kernels work on buffers of a type: the CPU for all main memory.
ggml_backend_dev_t kvl_device_of(ggml_backend_buffer_type_t buft);
// Its operators, nullptr if it lacks one.
const kvl_kernels * kvl_find_kernels(ggml_backend_dev_t device);
// Of a device without: how a sentence about them goes on after "which", and what to do.
std::string kvl_lacks_kernels(ggml_backend_dev_t device);
// The CPU backend's; entries are nullptr where it has none.
const kvl_row_functions & kvl_find_rows();
