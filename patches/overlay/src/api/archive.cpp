// The C API: what a sequence keeps on disk.

#include "api/arguments.h"

#include <algorithm>
#include <cstring>
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

static llama_kv_paged * archived(llama_context * ctx, llama_seq_id seq, const char * path, const char * tag) {
    auto * kv = memory_of(ctx, seq);
    if (!kv || !given(path, tag)) {
        return nullptr;
    }
    if (strlen(tag) != 32 || !kv->seqs[seq].archive.on()) {
        kvl_set_error("a saved archive needs a tag of 32 characters and a sequence that has one");
        return nullptr;
    }
    return kv;
}

int32_t kvl_save_archive(llama_context * ctx, llama_seq_id seq, const char * path, const char * tag) {
    auto * kv = archived(ctx, seq, path, tag);
    return !kv ? KVL_ERR_ARGUMENT : guarded([&] {
        return kvl_save_archive_to(*kv, seq, path, tag) ? 1 : 0;
    });
}

int32_t kvl_load_archive(llama_context * ctx, llama_seq_id seq, const char * path, const char * tag,
                         const int64_t * table, int32_t n) {
    auto * kv = archived(ctx, seq, path, tag);
    return !kv || n < 0 || (n > 0 && !given(table)) ? KVL_ERR_ARGUMENT : guarded([&] {
        kvl_load_archive_from(*kv, seq, path, tag, table, size_t(n));
        return int32_t(KVL_OK);
    });
}

int32_t kvl_archive_table(const llama_context * ctx, llama_seq_id seq, int64_t * table, int32_t n) {
    auto * kv = memory_of(ctx, seq);
    if (!kv) {
        return KVL_ERR_ARGUMENT;
    }
    const std::vector<kvl_archived> & units = kv->seqs[seq].archive.units;
    if (table && size_t(std::max(n, 0)) < units.size()) {
        return kvl_fail(KVL_ERR_ARGUMENT, "there are " + std::to_string(units.size()) + " units");
    }
    for (size_t u = 0; table && u < units.size(); u++, table += 3) {
        table[0] = units[u].begin;
        table[1] = units[u].end;
        table[2] = units[u].file ? int64_t(units[u].at) : -1;
    }
    return int32_t(units.size());
}
