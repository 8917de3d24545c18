// The C API: what a sequence keeps on disk.

#include "api/arguments.h"

#include <sys/stat.h>
#include <unistd.h>

using namespace kvl_api;

int32_t kvl_archive_to(llama_context * ctx, llama_seq_id seq, const char * folder, int32_t format) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    if (format != KVL_ARCHIVE_F16 && format != KVL_ARCHIVE_Q8) {
        return kvl_fail(KVL_ERR_ARGUMENT, "there is no archive format " + std::to_string(format));
    }
    if (!kv->all_host()) {
        return kvl_fail(KVL_ERR_UNSUPPORTED, "an archive is written from main memory; keep all layers there (-ngl 0)");
    }
    return guarded([&] {
        struct stat found;
        if (folder && (stat(folder, &found) != 0 || !S_ISDIR(found.st_mode) || access(folder, W_OK | X_OK) != 0)) {
            return kvl_fail(KVL_ERR_ARGUMENT,
                            std::string("no archive can be written in ") + folder + ": not a folder to write to");
        }
        kvl_archive & archive = kv->seqs[seq].archive;
        if (!archive.units.empty() && archive.format != format) {
            return kvl_fail(KVL_ERR_ARGUMENT, "the archive of a sequence has one format; empty the sequence first");
        }
        archive.folder = folder ? folder : "";
        archive.format = format;
        return int32_t(KVL_OK);
    });
}

int32_t kvl_get_archive(llama_context * ctx, llama_seq_id seq, kvl_archive_stats * out) {
    auto * kv = memory_of(ctx, seq);
    if (!kv || !given(out)) {
        return KVL_ERR_ARGUMENT;
    }
    return guarded([&] {
        kvl_sequence & of = kv->seqs[seq];
        kvl_flush_archive(of);
        *out = {};
        out->n_units = int64_t(of.archive.units.size());
        out->n_lost = int64_t(of.archive.n_lost());
        out->bytes = of.archive.bytes();
        out->error = of.archive.error.c_str();
        return int32_t(KVL_OK);
    });
}
