// What test_tags.py runs: how operators are found by their tags, in a list of its own and in those of the backends.

#include "kvl-cuda.h"
#include "kvl-metal.h"
#include "kvl-tags.h"

#include <stdio.h>
#include <string>

static std::string ran;

using run_t = void (*)(const char * where);

static void run_first(const char * where) {
    ran = std::string("first ") + where;
}
static void run_second(const char * where) {
    ran = std::string("second ") + where;
}

KVL_DEFINE_TAG(tag_first, "Here", KVL_ATTN_PROC)
KVL_DEFINE_TAG(tag_second, "Here", KVL_PAGES_MOVE_PROC)
KVL_DEFINE_TAG(tag_elsewhere, "Elsewhere", KVL_ATTN_PROC)
static void on_the_host(ggml_tensor *, int, int, void *) {}

static const kvl_device_ops<run_t> OPS = {
    {KVL_ATTN_PROC, tag_first, run_first},
    {KVL_PAGES_MOVE_PROC, tag_second, run_second},
};

static const char * const NAMES[] = {
    KVL_ATTN_PROC,        KVL_ATTN_MERGE_PROC,   KVL_ATTN_MASS_PROC,    KVL_ATTN_SCORES_PROC,
    KVL_ATTN_ROTATE_PROC, KVL_PAGES_APPEND_PROC, KVL_PAGES_WINDOW_PROC, KVL_PAGES_MOVE_PROC,
};

static ggml_tensor * node_of(ggml_context * ctx, ggml_custom_op_t function) {
    ggml_tensor * arg = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, 4, 1, 1, 1, &arg, 1, function, GGML_N_TASKS_MAX, nullptr);
}

static void say(const char * what, const ggml_tensor * node) {
    const auto * op = kvl_find_op(OPS, node);
    ran = "none";
    if (op) {
        op->run("there");
    }
    printf("%s: %s\n", what, ran.c_str());
}

// A backend says yes to the nodes of the tags that it gives, and to no others.
static void say_backend(ggml_context * ctx, const char * what, void * (*proc_address)(const char *),
                        bool (*supports)(const ggml_tensor *)) {
    int n_tags = 0, n_supported = 0;
    for (const char * name : NAMES) {
        auto tag = reinterpret_cast<ggml_custom_op_t>(proc_address(name));
        n_tags += tag != nullptr;
        n_supported += tag != nullptr && supports(node_of(ctx, tag));
    }
    const bool others = supports(node_of(ctx, tag_first)) || supports(node_of(ctx, on_the_host));
    printf("%s: %d tags, %d supported, others: %d, unknown name: %d\n", what, n_tags, n_supported, others,
           proc_address("kvl_unknown") != nullptr);
}

int main(int argc, char **) {
    ggml_context * ctx = ggml_init({/*mem_size*/ 1 << 20, /*mem_buffer*/ nullptr, /*no_alloc*/ false});
    if (argc > 1) {
        ggml_tensor * node = node_of(ctx, tag_first);
        ggml_set_name(node, "a node");
        tag_first(node, 0, 1, nullptr);
        return 0;
    }
    say("first", node_of(ctx, tag_first));
    say("second", node_of(ctx, tag_second));
    say("another backend's", node_of(ctx, tag_elsewhere));
    say("the host's", node_of(ctx, on_the_host));

    ggml_tensor * target = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, 64);
    ggml_tensor * list = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 4, 1);
    ggml_tensor * move = ggml_custom_inplace(ctx, target, &list, 1, tag_second, 1, nullptr);
    const kvl_move_params params = {-1, -1, -1, -1};
    kvl_set_params(move, &params, sizeof(params));
    say("in place, with parameters", move);

    ggml_tensor * other = ggml_dup(ctx, target);
    memcpy(other->op_params, move->op_params, sizeof(other->op_params));
    say("no custom node", other);

    for (const char * name : {KVL_ATTN_PROC, KVL_PAGES_MOVE_PROC, KVL_ATTN_MASS_PROC, ""}) {
        void * tag = kvl_find_tag(OPS, name);
        const bool first = tag == reinterpret_cast<void *>(tag_first);
        const bool second = tag == reinterpret_cast<void *>(tag_second);
        printf("tag of \"%s\": %s\n", name, first ? "first" : second ? "second" : tag ? "another" : "none");
    }
    say_backend(ctx, "CUDA", kvl_cuda_proc_address, kvl_cuda_supports);
    say_backend(ctx, "Metal", kvl_metal_proc_address, kvl_metal_supports);
    ggml_free(ctx);
    return 0;
}
