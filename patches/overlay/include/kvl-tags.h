// How the backend of a device knows its operators: by tag functions, which nobody calls.
//
// The function in a GGML_OP_CUSTOM node says which operator it is. The CPU backend calls it; another backend cannot,
// but can compare its address. So the backend has a list of names (KVL_*_PROC), tags and functions of its own: its
// table of procedures gives libllama the tag of a name, libllama puts it into a node, and what the backend supports and
// runs it finds by the tag. A node with a function of anybody else is none of its operators.

#pragma once

#include "ggml-impl.h"
#include "kvl-attn.h"

#include <string.h>
#include <vector>

static_assert(sizeof(ggml_custom_op_params) <= KVL_PARAMS_AT, "launch scalars lie behind the parameters of ggml");

// Defines the tag `function` of the operator `proc` on `device`, both strings. The body names them, as some linkers
// give equal functions one address. It runs only if the scheduler gave the node to the CPU.
#define KVL_DEFINE_TAG(function, device, proc)                                     \
    [[noreturn]] static void function(ggml_tensor * dst, int, int, void *) {       \
        GGML_ABORT("%s: " proc " of " device " cannot run on the CPU", dst->name); \
    }

// An operator; Run is the type of the function by which the backend runs a node.
template <typename Run> struct kvl_device_op {
    const char * name; // KVL_*_PROC
    ggml_custom_op_t tag;
    Run run;
};

template <typename Run> using kvl_device_ops = std::vector<kvl_device_op<Run>>;

// The operator of a node, nullptr if it is none of the list.
template <typename Run>
const kvl_device_op<Run> * kvl_find_op(const kvl_device_ops<Run> & ops, const ggml_tensor * node) {
    if (node->op != GGML_OP_CUSTOM) {
        return nullptr;
    }
    ggml_custom_op_params params;
    memcpy(&params, node->op_params, sizeof(params));
    for (const auto & op : ops) {
        if (op.tag == params.fun) {
            return &op;
        }
    }
    return nullptr;
}

// The tag of an operator by its name, as a table of procedures returns it; nullptr if the list lacks it.
template <typename Run> void * kvl_find_tag(const kvl_device_ops<Run> & ops, const char * name) {
    for (const auto & op : ops) {
        if (strcmp(op.name, name) == 0) {
            return reinterpret_cast<void *>(op.tag);
        }
    }
    return nullptr;
}
