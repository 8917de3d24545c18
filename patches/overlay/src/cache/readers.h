// Threads that read records of archives, several at once, so that a disk is kept busy.

#pragma once

#include "cache/archive.h"

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

class llama_kv_paged;

// A unit of a layer that is read, or was.
struct kvl_load {
    uint32_t layer;
    size_t unit;
    kvl_archived from;
    int32_t format;
    kvl_archive_rows rows;
    std::string why; // it could not be read
    bool done = false;
};

class kvl_readers {
  public:
    explicit kvl_readers(const llama_kv_paged & kv) : kv(kv) {}
    ~kvl_readers();

    void start(std::shared_ptr<kvl_load> load);
    // wait for some of them
    void wait(const std::vector<std::shared_ptr<kvl_load>> & loads);

  private:
    static constexpr size_t N_READERS = 8;
    void work();

    const llama_kv_paged & kv;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::shared_ptr<kvl_load>> waiting;
    bool ends = false;
    std::vector<std::thread> threads; // as many as have been needed
};
