// Records are read while the next token is computed.

#include "cache/readers.h"

#include "cache/memory.h"

#include <algorithm>
#include <exception>

kvl_readers::~kvl_readers() {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ends = true;
    }
    changed.notify_all();
    for (std::thread & thread : threads) {
        thread.join();
    }
}

void kvl_readers::start(std::shared_ptr<kvl_load> load) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        waiting.push_back(std::move(load));
        if (threads.size() < std::min(N_READERS, waiting.size())) {
            threads.emplace_back([this] {
                work();
            });
        }
    }
    changed.notify_all();
}

void kvl_readers::work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
        changed.wait(lock, [&] {
            return ends || !waiting.empty();
        });
        if (ends) {
            return;
        }
        const std::shared_ptr<kvl_load> load = std::move(waiting.front());
        waiting.pop_front();
        lock.unlock();
        try {
            kvl_read_archived(kv, load->layer, load->from, load->format, false, load->rows, load->why);
        } catch (const std::exception & e) {
            load->why = e.what();
        }
        lock.lock();
        load->done = true;
        changed.notify_all();
    }
}

void kvl_readers::wait(const std::vector<std::shared_ptr<kvl_load>> & loads) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] {
        return std::all_of(loads.begin(), loads.end(), [](const std::shared_ptr<kvl_load> & load) {
            return load->done;
        });
    });
}
