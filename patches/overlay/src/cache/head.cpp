// Where a head's slots are, and which of them are holes.

#include "cache/head.h"

#include <algorithm>
#include <bitset>
#include <numeric>

uint32_t kvl_head::f16_begin() const {
    const auto first = std::find_if(pages.begin(), pages.end(), [](uint32_t entry) {
        return page_format(entry) == KVL_FORMAT_F16;
    });
    return std::min(n(), uint32_t(first - pages.begin()) * KVL_PAGE_SLOTS);
}

std::vector<uint32_t> kvl_head::order() const {
    std::vector<uint32_t> out(n());
    std::iota(out.begin(), out.end(), 0);
    if (!plain()) {
        out.erase(std::remove_if(out.begin(), out.end(),
                                 [&](uint32_t slot) {
                                     return pos[slot] == HOLE;
                                 }),
                  out.end());
        std::stable_sort(out.begin(), out.end(), [&](uint32_t a, uint32_t b) {
            return pos[a] < pos[b];
        });
    }
    return out;
}

uint32_t kvl_head::all_live(uint32_t page) const {
    uint32_t bits = UINT32_MAX;
    for (uint32_t i = page * KVL_PAGE_SLOTS; n_holes > 0 && i < std::min(n(), (page + 1) * KVL_PAGE_SLOTS); i++) {
        bits &= pos[i] == HOLE ? ~(1u << i % KVL_PAGE_SLOTS) : UINT32_MAX;
    }
    return bits;
}

void kvl_head::count_listed() {
    n_listed = uint32_t(live.size() - size_t(std::count(live.begin(), live.end(), 0u)));
}

void kvl_head::see_all() {
    live.resize(pages.size());
    for (uint32_t p = 0; p < pages.size(); p++) {
        live[p] = all_live(p);
    }
    count_listed();
}

void kvl_head::see(const std::vector<uint32_t> & slots) {
    live.assign(pages.size(), 0);
    for (const uint32_t slot : slots) {
        live[slot / KVL_PAGE_SLOTS] |= 1u << slot % KVL_PAGE_SLOTS;
    }
    if (n() % KVL_PAGE_SLOTS != 0) {
        live.back() |= UINT32_MAX << n() % KVL_PAGE_SLOTS;
    }
    count_listed();
}

uint32_t kvl_head::see_positions(const std::vector<uint32_t> & bits) {
    live.resize(pages.size());
    n_listed = 0;
    uint32_t n_seen = 0;
    const auto at = [&](llama_pos p) {
        const uint32_t shift = uint32_t(p) % 32;
        const uint32_t * from = bits.data() + p / 32;
        return shift == 0 ? from[0] : from[0] >> shift | from[1] << (32 - shift);
    };
    while (starts.size() < n() / KVL_PAGE_SLOTS) {
        const llama_pos * p = pos.data() + starts.size() * KVL_PAGE_SLOTS;
        bool stretch = p[0] != HOLE;
        for (uint32_t i = 1; i < KVL_PAGE_SLOTS; i++) {
            stretch = stretch && p[i] == p[i - 1] + 1;
        }
        starts.push_back(stretch ? p[0] : HOLE);
    }
    for (uint32_t page = 0; page < pages.size(); page++) {
        const uint32_t size = std::min(n() - page * KVL_PAGE_SLOTS, uint32_t(KVL_PAGE_SLOTS));
        uint32_t word = 0;
        if (page < starts.size() && starts[page] != HOLE) {
            word = at(starts[page]);
        } else {
            for (uint32_t i = 0; i < size; i++) {
                const llama_pos p = pos[page * KVL_PAGE_SLOTS + i];
                word |= p == HOLE ? 0 : (bits[size_t(p) / 32] >> p % 32 & 1) << i;
            }
        }
        n_seen += word == UINT32_MAX ? KVL_PAGE_SLOTS : word == 0 ? 0 : uint32_t(std::bitset<32>(word).count());
        word |= size < KVL_PAGE_SLOTS ? UINT32_MAX << size : 0; // whoever comes next is seen
        live[page] = word;
        n_listed += word != 0 ? 1 : 0;
    }
    return n_seen;
}

uint32_t kvl_head::held_bits(uint32_t page) const {
    const uint32_t n = kvl_head::n() - page * KVL_PAGE_SLOTS;
    return all_live(page) & (n < KVL_PAGE_SLOTS ? (1u << n) - 1 : UINT32_MAX);
}

uint32_t kvl_head::in_page(uint32_t page) const {
    return uint32_t(std::bitset<KVL_PAGE_SLOTS>(held_bits(page)).count());
}
