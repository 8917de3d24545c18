// Work that is shared out among threads outside a graph.

#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

// f(i) for i in [0, n), in any order, by up to n_threads threads. What f throws is thrown here, once all have ended; of
// what was left nothing is begun.
template <typename F> void kvl_parallel_for(int n, int n_threads, F && f) {
    std::atomic<int> next{0};
    std::exception_ptr thrown;
    std::mutex mutex;
    const auto work = [&] {
        try {
            for (int i = next++; i < n; i = next++) {
                f(i);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            thrown = std::current_exception();
            next = n;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < std::min(n, n_threads); i++) {
            others.emplace_back(work);
        }
    } catch (const std::exception &) {
        // the system has no more threads: those that run do it all
    }
    work();
    for (std::thread & thread : others) {
        thread.join();
    }
    if (thrown) {
        std::rethrow_exception(thrown);
    }
}
