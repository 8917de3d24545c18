// Failed assertions of llama.cpp as exceptions.

#pragma once

// While it lives, an assertion that fails on this thread throws std::runtime_error instead of ending the process.
// For what runs before anything is computed: loading a model, creating a context.
class kvl_abort_guard {
  public:
    kvl_abort_guard();
    ~kvl_abort_guard();

    kvl_abort_guard(const kvl_abort_guard &) = delete;
    kvl_abort_guard & operator=(const kvl_abort_guard &) = delete;
};
