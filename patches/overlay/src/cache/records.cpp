// What lies in an archive: a record of every closed unit and layer, written when it closes, read when it is recalled.

#include "cache/archive.h"
#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr uint32_t MAGIC = 0x316c766b; // kvl1

struct record_header {
    uint32_t magic, format, il, n_head_kv;
    int32_t begin, end;
    uint32_t k_bytes, v_bytes; // of a row as it is written
    uint64_t size;             // of what follows, bytes
    uint64_t k_sum, v_sum;     // check sums of the rows of K and of V
    char reserved[8];
};
static_assert(sizeof(record_header) == 64, "a record begins with 64 bytes");

// How rows of d values are written: f16 as they are, or in blocks of 32 with a scale.
class row_writer {
  public:
    row_writer(int32_t format, uint32_t d, size_t f16_bytes)
        : q8(format == KVL_ARCHIVE_Q8 && d % 32 == 0 && f16_bytes > 0), d(d),
          bytes(q8 ? ggml_row_size(GGML_TYPE_Q8_0, d) : f16_bytes), f16_bytes(f16_bytes), values(q8 ? d : 0) {}

    void put(const char * row, char * to) {
        if (!q8) {
            memcpy(to, row, f16_bytes);
            return;
        }
        ggml_fp16_to_fp32_row(reinterpret_cast<const ggml_fp16_t *>(row), values.data(), d);
        ggml_quantize_chunk(GGML_TYPE_Q8_0, values.data(), to, 0, 1, d, nullptr);
    }
    void get(const char * from, char * row) {
        if (!q8) {
            memcpy(row, from, f16_bytes);
            return;
        }
        ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float(from, values.data(), d);
        ggml_fp32_to_fp16_row(values.data(), reinterpret_cast<ggml_fp16_t *>(row), d);
    }

    const bool q8;
    const uint32_t d;
    const size_t bytes, f16_bytes;

  private:
    std::vector<float> values;
};

struct record_shape {
    record_shape(const kvl_layer & layer, int32_t format, uint32_t n)
        : k(format, layer.pool->d_k, layer.pool->k_bytes), v(format, layer.pool->d_v, layer.pool->v_bytes),
          k_size(size_t(n) * layer.n_head_kv * k.bytes), payload(k_size + size_t(n) * layer.n_head_kv * v.bytes),
          size((sizeof(record_header) + payload + kvl_archive_file::ALIGNMENT - 1) / kvl_archive_file::ALIGNMENT *
               kvl_archive_file::ALIGNMENT) {}

    row_writer k, v;
    size_t k_size, payload, size;
};

// whether a head holds all of [begin, end) in f16; its first slot of it
bool holds(const kvl_head & head, llama_pos begin, llama_pos end, uint32_t & first) {
    const uint32_t f16 = head.f16_begin();
    first = uint32_t(std::lower_bound(head.pos.begin() + f16, head.pos.end(), begin) - head.pos.begin());
    const uint32_t last = first + uint32_t(end - begin) - 1;
    return last < head.n() && head.pos[first] == begin && head.pos[last] == end - 1;
}

void write_record(const kvl_layer & layer, const std::vector<kvl_head> & heads, llama_pos begin, llama_pos end,
                  int32_t format, char * to) {
    const uint32_t n = uint32_t(end - begin);
    record_shape shape(layer, format, n);
    char * k = to + sizeof(record_header);
    char * v = k + shape.k_size;
    for (const kvl_head & head : heads) {
        uint32_t first = 0;
        holds(head, begin, end, first);
        for (uint32_t i = 0; i < n; i++, k += shape.k.bytes, v += shape.v.bytes) {
            const uint64_t row = head.row(first + i);
            shape.k.put(layer.pool->host_at(layer.pool->k_at(row)), k);
            if (shape.v.bytes > 0) {
                shape.v.put(layer.pool->host_at(layer.pool->v_at(row)), v);
            }
        }
    }
    record_header header = {};
    header.magic = MAGIC;
    header.format = uint32_t(format);
    header.il = layer.il;
    header.n_head_kv = layer.n_head_kv;
    header.begin = begin;
    header.end = end;
    header.k_bytes = uint32_t(shape.k.bytes);
    header.v_bytes = uint32_t(shape.v.bytes);
    header.size = shape.payload;
    header.k_sum = kvl_check_sum(to + sizeof(record_header), shape.k_size);
    header.v_sum = kvl_check_sum(to + sizeof(record_header) + shape.k_size, shape.payload - shape.k_size);
    memcpy(to, &header, sizeof(header));
}

} // namespace

uint64_t kvl_check_sum(const char * data, size_t n) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ n;
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, data + i, std::min<size_t>(8, n - i));
        h = (h ^ word) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    return h;
}

uint64_t kvl_archived_bytes(const llama_kv_paged & kv, int32_t format, uint32_t n) {
    uint64_t size = 0;
    for (uint32_t l = 0; l < kv.n_open; l++) {
        size += record_shape(kv.layers[l], format, n).size;
    }
    return size;
}

void kvl_archive_units(llama_kv_paged & kv, llama_seq_id seq_id, int n_threads) {
    kvl_sequence & seq = kv.seqs[seq_id];
    kvl_archive & archive = seq.archive;
    if (!archive.on()) {
        return;
    }
    while (archive.units.size() < seq.index.ends.size()) {
        const size_t u = archive.units.size();
        kvl_archived unit;
        unit.begin = u > 0 ? seq.index.ends[u - 1] : 0;
        unit.end = seq.index.ends[u];
        std::vector<size_t> at = {0};
        bool exact = true;
        for (uint32_t l = 0; l < kv.n_open; l++) {
            for (const kvl_head & head : seq.heads[l]) {
                uint32_t first;
                exact = exact && holds(head, unit.begin, unit.end, first);
            }
            at.push_back(at.back() + record_shape(kv.layers[l], archive.format, uint32_t(unit.end - unit.begin)).size);
        }
        if (kv.no_alloc()) {
            archive.planned += at.back();
        } else if (exact && !archive.full) {
            try {
                if (!archive.file) {
                    archive.file = std::make_shared<kvl_archive_file>(archive.folder);
                }
                std::vector<char> block(at.back());
                kvl_parallel_for(int(kv.n_open), block.size() > (1 << 20) ? n_threads : 1, [&](int l) {
                    write_record(kv.layers[size_t(l)], seq.heads[size_t(l)], unit.begin, unit.end, archive.format,
                                 block.data() + at[size_t(l)]);
                });
                unit.at = archive.file->append(std::move(block));
                unit.file = archive.file;
            } catch (const std::exception & e) {
                archive.error = e.what();
                archive.full = true;
            }
        }
        archive.units.push_back(std::move(unit));
    }
}

bool kvl_flush_archive(kvl_sequence & seq) {
    kvl_archive & archive = seq.archive;
    if (!archive.file || archive.file->flush()) {
        return true;
    }
    // what did not get there is lost to it; what did can still be read
    archive.error = archive.file->error();
    archive.full = true;
    for (kvl_archived & unit : archive.units) {
        if (unit.file == archive.file && unit.at >= archive.file->bytes()) {
            unit.file.reset();
        }
    }
    return false;
}

const char * kvl_archive_rows::k(const kvl_layer & layer, uint32_t head, uint32_t token) const {
    return bytes.data() + (size_t(head) * n + token) * layer.pool->k_bytes;
}

const char * kvl_archive_rows::v(const kvl_layer & layer, uint32_t head, uint32_t token) const {
    return bytes.data() + size_t(layer.n_head_kv) * n * layer.pool->k_bytes +
           (size_t(head) * n + token) * layer.pool->v_bytes;
}

bool kvl_read_archived(const llama_kv_paged & kv, uint32_t l, const kvl_archived & unit, int32_t format, bool only_keys,
                       kvl_archive_rows & out, std::string & why) {
    const kvl_layer & layer = kv.layers[l];
    out.n = uint32_t(unit.end - unit.begin);
    record_shape shape(layer, format, out.n);
    uint64_t at = unit.at;
    for (uint32_t i = 0; i < l; i++) {
        at += record_shape(kv.layers[i], format, out.n).size;
    }
    std::vector<char> record(sizeof(record_header) + (only_keys ? shape.k_size : shape.payload));
    const std::string what = "the archive's record of tokens " + std::to_string(unit.begin) + " to " +
                             std::to_string(unit.end - 1) + " in layer " + std::to_string(layer.il);
    if (!unit.file || !unit.file->read(at, record.data(), record.size())) {
        why = what + " cannot be read";
        return false;
    }
    record_header header;
    memcpy(&header, record.data(), sizeof(header));
    const char * payload = record.data() + sizeof(header);
    if (header.magic != MAGIC || header.format != uint32_t(format) || header.il != layer.il ||
        header.n_head_kv != layer.n_head_kv || header.begin != unit.begin || header.end != unit.end ||
        header.k_bytes != shape.k.bytes || header.v_bytes != shape.v.bytes || header.size != shape.payload ||
        header.k_sum != kvl_check_sum(payload, shape.k_size) ||
        (!only_keys && header.v_sum != kvl_check_sum(payload + shape.k_size, shape.payload - shape.k_size))) {
        why = what + " is damaged";
        return false;
    }
    const size_t n_rows = size_t(out.n) * layer.n_head_kv;
    out.bytes.resize(n_rows * (shape.k.f16_bytes + (only_keys ? 0 : shape.v.f16_bytes)));
    char * to = out.bytes.data();
    for (size_t i = 0; i < n_rows; i++, payload += shape.k.bytes, to += shape.k.f16_bytes) {
        shape.k.get(payload, to);
    }
    for (size_t i = 0; shape.v.bytes > 0 && !only_keys && i < n_rows;
         i++, payload += shape.v.bytes, to += shape.v.f16_bytes) {
        shape.v.get(payload, to);
    }
    return true;
}
