// An archive beside a saved session: a header, then records. Which unit lies where, the session itself says, so that a
// file is only ever added to, and an older session finds in it what it knows.

#include "cache/archive.h"
#include "cache/memory.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <stdexcept>
#include <sys/file.h>
#include <unistd.h>

namespace {

constexpr char SAVED_MAGIC[8] = {'K', 'V', 'L', 'A', 'R', 'C', 'H', '1'};

struct saved_header {
    char magic[8];
    char tag[32];
    int32_t format;
};

// A file that is written at its end; what was added is taken back unless it is kept.
class saved_file {
  public:
    saved_file(const std::string & path, bool there)
        : path(path), there(there), fd(open(path.c_str(), (there ? 0 : O_CREAT | O_EXCL) | O_RDWR | O_CLOEXEC, 0600)) {
        if (fd < 0 || flock(fd, LOCK_EX) != 0) {
            fail();
        }
        begin = end = uint64_t(lseek(fd, 0, SEEK_END));
    }
    ~saved_file() {
        if (fd >= 0 && !kept) {
            const bool gone = there ? ftruncate(fd, off_t(begin)) == 0 : unlink(path.c_str()) == 0;
            (void)gone; // nothing more can be done about it
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    uint64_t size() const { return end; }
    void put(const void * data, size_t size) {
        for (size_t done = 0; done < size;) {
            const ssize_t n = pwrite(fd, static_cast<const char *>(data) + done, size - done, off_t(end + done));
            if (n <= 0 && errno != EINTR) {
                fail();
            }
            done += n > 0 ? size_t(n) : 0;
        }
        end += size;
    }
    void keep() {
        if (fsync(fd) != 0) {
            fail();
        }
        kept = true;
    }

  private:
    void fail() const { throw std::runtime_error("the archive cannot be written to " + path + ": " + strerror(errno)); }

    const std::string path;
    const bool there;
    const int fd;
    uint64_t begin = 0, end = 0;
    bool kept = false;
};

saved_header header_of(const kvl_archive & archive, const char * tag) {
    saved_header header = {};
    memcpy(header.magic, SAVED_MAGIC, sizeof(header.magic));
    memcpy(header.tag, tag, sizeof(header.tag));
    header.format = archive.format;
    return header;
}

} // namespace

bool kvl_save_archive_to(llama_kv_paged & kv, llama_seq_id seq_id, const std::string & path, const char * tag) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_archive & archive = seq.archive;
    kvl_flush_archive(seq);
    const bool there = archive.saved && archive.saved->folder == path;
    saved_file out(path, there);
    if (there && out.size() != archive.saved->bytes()) {
        return false;
    }
    std::vector<char> block(kvl_archive_file::ALIGNMENT);
    if (!there) {
        const saved_header header = header_of(archive, tag);
        memcpy(block.data(), &header, sizeof(header));
        out.put(block.data(), block.size());
    }
    std::vector<kvl_archived> units = archive.units;
    for (kvl_archived & unit : units) {
        if (!unit.file || (there && unit.file == archive.saved)) {
            continue;
        }
        block.resize(kvl_archived_bytes(kv, archive.format, uint32_t(unit.end - unit.begin)));
        const uint64_t at = out.size();
        if (!unit.file->read(unit.at, block.data(), block.size())) {
            unit.file.reset();
            continue;
        }
        out.put(block.data(), block.size());
        unit.at = at;
    }
    const std::shared_ptr<kvl_archive_file> saved = kvl_archive_file::open(path);
    out.keep();
    for (kvl_archived & unit : units) {
        unit.file = unit.file ? saved : nullptr;
    }
    archive.units = std::move(units);
    archive.saved = saved;
    archive.file.reset(); // what it held lies there now
    return true;
}

void kvl_load_archive_from(llama_kv_paged & kv, llama_seq_id seq_id, const std::string & path, const char * tag,
                           const int64_t * table, size_t n) {
    kvl_sequence & seq = kv.seqs[seq_id];
    const std::shared_ptr<kvl_archive_file> file = kvl_archive_file::open(path);
    const auto refuse = [&](const std::string & why) {
        throw std::runtime_error("the archive " + path + " " + why);
    };
    saved_header header;
    const saved_header wanted = header_of(seq.archive, tag);
    if (!file->read(0, &header, sizeof(header)) || memcmp(header.magic, wanted.magic, sizeof(header.magic)) != 0) {
        refuse("is none of kvlocal, or damaged");
    }
    if (memcmp(header.tag, wanted.tag, sizeof(header.tag)) != 0) {
        refuse("belongs to another session");
    }
    if (header.format != wanted.format) {
        refuse("has another format; load it with the same --archive-format");
    }
    std::vector<kvl_archived> units;
    std::vector<llama_pos> ends;
    for (size_t u = 0; u < n; u++, table += 3) {
        if (table[0] != (ends.empty() ? 0 : ends.back()) || table[1] <= table[0] || table[1] > seq.n_seen) {
            refuse("does not fit the session: units of it overlap");
        }
        units.push_back({table[2] > 0 ? file : nullptr, table[2] > 0 ? uint64_t(table[2]) : 0, llama_pos(table[0]),
                         llama_pos(table[1])});
        ends.push_back(llama_pos(table[1]));
    }
    seq.index.clear();
    seq.index.ends = std::move(ends);
    seq.archive.units = std::move(units);
    seq.archive.saved = file;
}
