// What memory may lose: the units of a sequence's text on disk, exact, behind what is kept of them.

#pragma once

#include "llama.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

class llama_kv_paged;
struct kvl_layer;
struct kvl_sequence;

// A file that only grows, shared by the branches of a sequence. It has no name, so that it is gone with the process,
// however that ends. A thread writes behind.
class kvl_archive_file {
  public:
    // throws if no file can be made in the folder
    explicit kvl_archive_file(const std::string & folder);
    // one that was saved, to read; throws if it is not there
    static std::shared_ptr<kvl_archive_file> open(const std::string & path);
    ~kvl_archive_file();

    kvl_archive_file(const kvl_archive_file &) = delete;
    kvl_archive_file & operator=(const kvl_archive_file &) = delete;

    // where the block will lie; waits while much is still to be written
    uint64_t append(std::vector<char> && block);
    // wait until all is written that was appended; false: some of it could not be
    bool flush();
    // false: it is not there
    bool read(uint64_t at, void * to, size_t size) const;
    uint64_t bytes() const;
    // why nothing is written any more, empty if it is
    std::string error() const;

    static constexpr size_t ALIGNMENT = 4096;
    const std::string folder; // or its own path, if it was saved

  private:
    kvl_archive_file(const std::string & folder, int fd, uint64_t size);
    void write_behind();

    int fd = -1;
    mutable std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::vector<char>> waiting;
    size_t n_waiting = 0; // bytes
    uint64_t n_appended = 0, n_written = 0;
    std::string failed;
    bool ends = false;
    std::thread writer;
};

// A unit: of every open layer a record, one behind the other.
struct kvl_archived {
    std::shared_ptr<kvl_archive_file> file; // nullptr: it cannot be read
    uint64_t at = 0;
    llama_pos begin = 0, end = 0;
};

// Of a sequence.
struct kvl_archive {
    std::string folder; // of new files, empty: nothing is archived
    int32_t format = 0; // a kvl_archive_format
    std::shared_ptr<kvl_archive_file> file;
    std::shared_ptr<kvl_archive_file> saved; // beside the session
    std::vector<kvl_archived> units;         // those of the index that are closed
    std::string error;                       // what went wrong last
    bool full = false;                       // nothing more can be written
    uint64_t planned = 0;                    // bytes that a model without weights would write

    bool on() const { return !folder.empty(); }
    void cut(size_t n_units);
    // bytes of its files; of units that cannot be read
    uint64_t bytes() const;
    size_t n_lost() const;
    // a unit that cannot be read is not tried again
    void lose(size_t unit, const std::string & why) {
        units[unit].file.reset();
        error = why;
    }
};

// Wait until what was archived is written. False: some of it is lost, the reason is in `error`.
bool kvl_flush_archive(kvl_sequence & seq);
// Write the units of the index that have closed since; one that a head no longer holds exactly cannot be read.
void kvl_archive_units(llama_kv_paged & kv, llama_seq_id seq, int n_threads);

// Write the records of a sequence's units to the file beside its session, which they lie in from then on: a new one, or
// those that are not yet in the one that they were saved to or loaded from. False: somebody else has added to that.
// tag: 32 characters by which file and session know each other. Throws, and nothing has changed.
bool kvl_save_archive_to(llama_kv_paged & kv, llama_seq_id seq, const std::string & path, const char * tag);
// Take them from there, for a sequence that was restored. table: [n][3], of every unit where it begins and ends, and
// where its records are, -1: it was lost.
void kvl_load_archive_from(llama_kv_paged & kv, llama_seq_id seq, const std::string & path, const char * tag,
                           const int64_t * table, size_t n);
// Of all bytes, in words of 64 bits.
uint64_t kvl_check_sum(const char * data, size_t n);
// Bytes of all records of a unit of n tokens.
uint64_t kvl_archived_bytes(const llama_kv_paged & kv, int32_t format, uint32_t n);

// Rows of a unit in a layer as they lie in its f16 pages: of every KV head those of all tokens, K of all heads first.
struct kvl_archive_rows {
    std::vector<char> bytes;
    const char * k(const kvl_layer & layer, uint32_t head, uint32_t token) const;
    const char * v(const kvl_layer & layer, uint32_t head, uint32_t token) const;
    uint32_t n = 0; // tokens
};
// Read them, or the keys alone. False if the record cannot be read or is not what was written; `why` says so.
bool kvl_read_archived(const llama_kv_paged & kv, uint32_t layer, const kvl_archived & unit, int32_t format,
                       bool only_keys, kvl_archive_rows & out, std::string & why);

// How much of the attention of some queries falls on every unit, [KV head][unit], added up over the queries of the head
// and of its group, as if they saw the units alone. queries: [n][n_head][d_k]. A unit that cannot be read gets none,
// and the reason at its place in `why`. Returns the bytes that were read.
uint64_t kvl_archive_scores(const llama_kv_paged & kv, const kvl_archive & archive, uint32_t layer,
                            const std::vector<float> & queries, std::vector<std::vector<float>> & out,
                            std::vector<std::string> & why);
