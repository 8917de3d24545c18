// Slots that are stored in another format from now on.

#include "cache/memory.h"
#include "cache/parallel.h"

#include <algorithm>

// Slots of one head that go to another format: the i-th of them to row at + i of the pages.
struct kvl_move {
    std::vector<uint32_t> slots, rest; // those that go, by position; the others that are held, by slot
    uint32_t at = 0;                   // rows that are taken in the first of the pages
    std::vector<uint32_t> pages;       // numbers in the pool of the format
    std::vector<float> k, v;           // room for what is encoded together

    uint32_t n_pages() const {
        return slots.empty() ? 0 : uint32_t((at + slots.size() + KVL_PAGE_SLOTS - 1) / KVL_PAGE_SLOTS);
    }
};

namespace {

// Pages up to the last one of a format.
uint32_t format_end(const kvl_head & head, uint32_t format) {
    uint32_t p = 0;
    while (p < head.pages.size() && kvl_head::page_format(head.pages[p]) >= format) {
        p++;
    }
    return p;
}

kvl_move plan(const kvl_head & head, uint32_t format, const kvl_pool & pool, const std::vector<uint32_t> & slots) {
    kvl_move out;
    std::vector<bool> goes(head.n(), false);
    for (const uint32_t slot : slots) {
        if (head.format(slot) != format) { // else it is there already
            goes[slot] = true;
            out.slots.push_back(slot);
        }
    }
    for (uint32_t slot = 0; slot < head.n(); slot++) {
        if (!goes[slot] && head.pos[slot] != kvl_head::HOLE) {
            out.rest.push_back(slot);
        }
    }
    const uint32_t end = format_end(head, format);
    if (format != KVL_FORMAT_KIVI && end > 0 && kvl_head::page_format(head.pages[end - 1]) == format) {
        out.at = head.in_page(end - 1) % KVL_PAGE_SLOTS;
    }
    const size_t together = std::min<size_t>(out.slots.size(), pool.n_together * KVL_PAGE_SLOTS);
    out.pages.reserve(out.n_pages());
    out.k.resize(together * pool.d_k);
    out.v.resize(together * pool.d_v);
    return out;
}

// Takes the pages; the first one may be there, in part filled.
void reserve(kvl_arena & arena, kvl_pool & pool, kvl_head & head, uint32_t format, kvl_move & move,
             kvl_compaction & work) {
    if (move.at > 0 && !move.slots.empty()) {
        uint32_t & last = head.pages[format_end(head, format) - 1];
        if (pool.shared(kvl_head::page_number(last))) {
            std::vector<kvl_row_move> moves;
            last = kvl_head::page_entry(format, pool.unshare(kvl_head::page_number(last), move.at, moves));
            arena.move(pool, moves); // in main memory, where it cannot fail
        }
        move.pages.push_back(kvl_head::page_number(last));
    }
    while (move.pages.size() < move.n_pages()) {
        for (uint32_t i = 0; i < pool.n_together; i++) {
            work.taken.emplace_back(&pool, kvl_pool::NONE);
        }
        const uint32_t first = pool.take();
        for (uint32_t i = 0; i < pool.n_together; i++) {
            work.taken[work.taken.size() - pool.n_together + i].second = first + i;
            move.pages.push_back(first + i);
        }
    }
}

} // namespace

void llama_kv_paged::read_slot(llama_seq_id seq, uint32_t layer_id, uint32_t h, uint32_t slot, float * k,
                               float * v) const {
    const kvl_head & head = seqs[seq].heads[layer_id][h];
    const kvl_pool & pool = *layers[layer_id].pools[head.format(slot)];
    const uint64_t row = head.row(slot);
    const auto decode = [&](size_t at, kvl_row kind, uint32_t d, float * out) {
        // rows of a group are found from its first one on
        const uint64_t first = kvl_row_slots(kind) > 1 ? row % uint64_t(kvl_row_slots(kind)) : 0;
        if (out) {
            rows.decode(kind, pool.host_at(at), int(first), 1, int(d), out, int(d));
        }
    };
    decode(pool.k_at(row - row % uint64_t(kvl_row_slots(pool.k_row))), pool.k_row, pool.d_k, k);
    decode(pool.v_at(row), pool.v_row == KVL_ROW_OF_K ? pool.k_row : pool.v_row, pool.d_v, v);
    const std::vector<float> & mu = seqs[seq].mu[layer_id];
    const bool centred = k && head.format(slot) != KVL_FORMAT_F16 && !mu.empty();
    for (uint32_t c = 0; centred && c < pool.d_k; c++) {
        k[c] += mu[h * pool.d_k + c];
    }
}

// Runs in a thread of its own: allocates nothing, and no other head reads or writes these pages.
void llama_kv_paged::encode_slots(llama_seq_id seq, uint32_t layer, uint32_t h, const kvl_pool & pool,
                                  kvl_move & move) const {
    const uint32_t step = pool.n_together * KVL_PAGE_SLOTS;
    const std::vector<float> & mu = seqs[seq].mu[layer];
    for (size_t i = 0; i < move.slots.size();) {
        const size_t at = move.at + i;
        const size_t n = std::min(move.slots.size() - i, step - at % step);
        for (size_t j = 0; j < n; j++) {
            float * k = move.k.data() + j * pool.d_k;
            read_slot(seq, layer, h, move.slots[i + j], k, move.v.data() + j * pool.d_v);
            for (uint32_t c = 0; !mu.empty() && c < pool.d_k; c++) {
                k[c] -= mu[h * pool.d_k + c];
            }
        }
        const uint64_t row = uint64_t(move.pages[at / KVL_PAGE_SLOTS]) * KVL_PAGE_SLOTS + at % KVL_PAGE_SLOTS;
        rows.encode(pool.k_row, move.k.data(), int(n), int(pool.d_k), pool.host_at(pool.k_at(row)));
        if (pool.v_row == KVL_ROW_OF_K) {
            i += n;
            continue;
        }
        rows.encode(pool.v_row, move.v.data(), int(n), int(pool.d_v), pool.host_at(pool.v_at(row)));
        i += n;
    }
}

kvl_rebuilt llama_kv_paged::move_slots(const kvl_layer & layer, const kvl_head & head, uint32_t format,
                                       const kvl_move & move, kvl_compaction & work) const {
    kvl_rebuilt out = compacted(layer, head, move.rest, work);
    uint32_t end = 0; // pages up to the last one of the format
    while (end < out.pages.size() && kvl_head::page_format(out.pages[end]) >= format) {
        end++;
    }
    const uint32_t n_old = move.at > 0 ? 1 : 0; // pages that were there
    const uint32_t n_new = uint32_t(move.pages.size()) - n_old;
    for (uint32_t i = 0; i < n_new; i++) {
        out.pages.insert(out.pages.begin() + end + i, kvl_head::page_entry(format, move.pages[n_old + i]));
    }
    out.from.insert(out.from.begin() + end * KVL_PAGE_SLOTS, n_new * KVL_PAGE_SLOTS, -1);
    const uint32_t first = (end - n_old) * KVL_PAGE_SLOTS + move.at;
    std::copy(move.slots.begin(), move.slots.end(), out.from.begin() + first);
    return out;
}

int32_t llama_kv_paged::demote(llama_seq_id seq_id, uint32_t layer_id, uint32_t format, const int32_t * n_demote,
                               const int32_t * slots, int n_threads) {
    if (!check_slots(seq_id, layer_id, n_demote, slots, true)) {
        return KVL_ERR_ARGUMENT;
    }
    std::vector<std::vector<uint32_t>> chosen;
    for (const kvl_head & head : seqs[seq_id].heads[layer_id]) {
        const int32_t n = n_demote[chosen.size()];
        const std::vector<uint32_t> order = head.order();
        std::vector<uint32_t> & out = chosen.emplace_back();
        for (int32_t i = 0; i < n; i++) {
            out.push_back(order[slots[i]]);
        }
        slots += n;
    }
    return demote(seq_id, layer_id, format, chosen, n_threads);
}

int32_t llama_kv_paged::demote_due(llama_seq_id seq_id, uint32_t layer_id, uint32_t format, int32_t n,
                                   const llama_pos * positions, int32_t n_most, int n_threads) {
    const kvl_pool * pool = format < KVL_FORMAT_COUNT ? layers[layer_id].pools[format] : nullptr;
    const size_t group = pool ? size_t(kvl_row_slots(pool->k_row)) : 1;
    std::vector<std::vector<uint32_t>> chosen;
    for (const kvl_head & head : seqs[seq_id].heads[layer_id]) {
        std::vector<uint32_t> & out = chosen.emplace_back();
        for (uint32_t slot = head.f16_begin(); slot < head.n(); slot++) {
            if (std::binary_search(positions, positions + n, head.pos[slot])) {
                out.push_back(slot);
            }
        }
        out.resize(std::min(out.size(), n_most > 0 ? size_t(n_most) : out.size()) / group * group);
    }
    return demote(seq_id, layer_id, format, chosen, n_threads);
}

int32_t llama_kv_paged::demote(llama_seq_id seq_id, uint32_t layer_id, uint32_t format,
                               const std::vector<std::vector<uint32_t>> & slots, int n_threads) {
    kvl_layer & layer = layers[layer_id];
    std::vector<kvl_head> & heads = seqs[seq_id].heads[layer_id];
    if (format == KVL_FORMAT_F16 || format >= KVL_FORMAT_COUNT || !layer.pools[format]) {
        return kvl_fail(KVL_ERR_ARGUMENT,
                        "format " + std::to_string(format) + " was not asked for in kvl_params.formats");
    }
    kvl_flush_archive(seqs[seq_id]);
    kvl_pool & pool = *layer.pools[format];
    std::vector<kvl_move> moves;
    std::vector<uint32_t> need(layer.pools.size(), 0);
    for (uint32_t h = 0; h < heads.size(); h++) {
        moves.push_back(plan(heads[h], format, pool, slots[h]));
        const kvl_move & m = moves.back();
        const std::string where = " (layer " + std::to_string(layer_id) + ", KV head " + std::to_string(h) + ")";
        const auto n_kivi = std::count_if(m.slots.begin(), m.slots.end(), [&](uint32_t slot) {
            return heads[h].format(slot) == KVL_FORMAT_KIVI;
        });
        if (n_kivi > 0) {
            return kvl_fail(KVL_ERR_ARGUMENT, std::to_string(n_kivi) + " of " + std::to_string(m.slots.size()) +
                                                  " slots are stored in kivi and cannot go to another format" + where);
        }
        const int group = kvl_row_slots(pool.k_row);
        if (m.slots.size() % size_t(group) != 0) {
            return kvl_fail(KVL_ERR_ARGUMENT, "kivi stores slots in groups of " + std::to_string(group) + ", not " +
                                                  std::to_string(m.slots.size()) + " of them" + where);
        }
        const bool copy =
            m.at > 0 && pool.shared(kvl_head::page_number(heads[h].pages[format_end(heads[h], format) - 1]));
        need[format] += m.slots.empty() ? 0 : m.n_pages() - (m.at > 0 && !copy ? 1 : 0);
        count_copies(layer, heads[h], m.rest, need);
    }
    for (uint32_t f = 0; f < need.size(); f++) {
        if (need[f] > 0 && need[f] > layer.pools[f]->n_free()) {
            return kvl_fail(KVL_ERR_MEMORY, "the KV pool is full: " + std::to_string(need[f]) + " pages needed, " +
                                                std::to_string(layer.pools[f]->n_free()) + " free");
        }
    }
    kvl_compaction work; // pages that are taken go back unless it is done
    for (uint32_t h = 0; h < heads.size(); h++) {
        reserve(*layer.arena, pool, heads[h], format, moves[h], work);
    }
    note_peak();
    kvl_parallel_for(no_alloc() ? 0 : int(heads.size()), n_threads, [&](int h) {
        encode_slots(seq_id, layer_id, uint32_t(h), pool, moves[size_t(h)]);
    });
    int32_t total = 0;
    uint64_t n_more = 0;
    std::vector<kvl_renewed> by(heads.size());
    for (uint32_t h = 0; h < heads.size(); h++) {
        if (!moves[h].slots.empty()) {
            by[h] = renewed(layer, heads[h], move_slots(layer, heads[h], format, moves[h], work));
            n_more += by[h].head.pages.size(); // at most
            total += int32_t(moves[h].slots.size());
        }
    }
    carry_out(layer, work, n_more);
    for (uint32_t h = 0; h < heads.size(); h++) {
        if (!moves[h].slots.empty()) {
            replace(layer, heads[h], std::move(by[h]));
        }
    }
    trim();
    return total;
}
