// The file of an archive: written behind, read at any time.

#include "cache/archive.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <stdexcept>
#include <unistd.h>

static constexpr size_t MOST_WAITING = size_t(64) << 20;

// A file that only this process can reach.
static int open_nameless(const std::string & folder) {
    std::string name = folder + "/kvlocal-archive-XXXXXX";
    const int fd = mkstemp(name.data());
    if (fd >= 0) {
        unlink(name.c_str());
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    return fd;
}

kvl_archive_file::kvl_archive_file(const std::string & folder) : kvl_archive_file(folder, open_nameless(folder), 0) {}

std::shared_ptr<kvl_archive_file> kvl_archive_file::open(const std::string & path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
    return std::shared_ptr<kvl_archive_file>(new kvl_archive_file(path, fd, uint64_t(size)));
}

kvl_archive_file::kvl_archive_file(const std::string & folder, int fd, uint64_t size)
    : folder(folder), fd(fd), n_appended(size), n_written(size) {
    if (fd < 0) {
        throw std::runtime_error("no archive can be opened in " + folder + ": " + strerror(errno));
    }
    writer = std::thread([this] {
        write_behind();
    });
}

kvl_archive_file::~kvl_archive_file() {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ends = true;
    }
    changed.notify_all();
    writer.join();
    close(fd);
}

uint64_t kvl_archive_file::append(std::vector<char> && block) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] {
        return n_waiting < MOST_WAITING || !failed.empty();
    });
    const uint64_t at = n_appended;
    n_appended += block.size();
    n_waiting += block.size();
    waiting.push_back(std::move(block));
    lock.unlock();
    changed.notify_all();
    return at;
}

void kvl_archive_file::write_behind() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
        changed.wait(lock, [&] {
            return ends || !waiting.empty();
        });
        if (ends) {
            return; // nobody can read it any more
        }
        const std::vector<char> block = std::move(waiting.front());
        uint64_t at = n_written;
        std::string why = failed;
        lock.unlock();
        for (size_t done = 0; why.empty() && done < block.size();) {
            const ssize_t n = pwrite(fd, block.data() + done, block.size() - done, off_t(at + done));
            if (n > 0) {
                done += size_t(n);
            } else if (n == 0 || errno != EINTR) {
                why = "the archive in " + folder + " cannot be written: " + strerror(n == 0 ? ENOSPC : errno);
            }
        }
        lock.lock();
        failed = why;
        waiting.pop_front();
        n_waiting -= block.size();
        n_written += failed.empty() ? block.size() : 0;
        changed.notify_all();
    }
}

bool kvl_archive_file::flush() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] {
        return waiting.empty();
    });
    return failed.empty();
}

bool kvl_archive_file::read(uint64_t at, void * to, size_t size) const {
    for (size_t done = 0; done < size;) {
        const ssize_t n = pread(fd, static_cast<char *>(to) + done, size - done, off_t(at + done));
        if (n > 0) {
            done += size_t(n);
        } else if (n == 0 || errno != EINTR) {
            return false;
        }
    }
    return true;
}

uint64_t kvl_archive_file::bytes() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n_written;
}

std::string kvl_archive_file::error() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return failed;
}

void kvl_archive::cut(size_t n_units) {
    units.resize(std::min(units.size(), n_units));
    if (units.empty()) { // what comes next has nothing to do with what is in the file
        file.reset();
        saved.reset();
        error.clear();
        full = false;
        planned = 0;
    }
}

uint64_t kvl_archive::bytes() const {
    uint64_t n = planned;
    std::vector<const kvl_archive_file *> seen;
    for (const kvl_archived & unit : units) {
        if (unit.file && std::find(seen.begin(), seen.end(), unit.file.get()) == seen.end()) {
            seen.push_back(unit.file.get());
            n += unit.file->bytes();
        }
    }
    return n;
}

size_t kvl_archive::n_lost() const {
    return size_t(std::count_if(units.begin(), units.end(), [](const kvl_archived & unit) {
        return !unit.file;
    }));
}
