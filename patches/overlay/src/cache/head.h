// One KV head of a sequence: its page table and the positions of its slots.

#pragma once

#include "kvl-attn.h"
#include "kvl.h"
#include "llama.h"

#include <cstdint>
#include <vector>

// One KV head of one layer of one sequence. Slot i lives in page pages[i / 32], row i % 32.
//
// Pages of one format lie together, f16 last; only the last page of a format is not full, and what it has to spare are
// holes, but for the very last page, where new tokens are appended. Pages of kivi are otherwise: nothing moves in them,
// so a hole is where a slot was dropped, and stays one until its group has no slot left. f16 slots are in the order of
// their positions. Whoever asks from outside counts slots by position, without holes: see order().
struct kvl_head {
    std::vector<uint32_t> pages; // format << KVL_PAGE_POOL_SHIFT | number in the pool of that format
    std::vector<uint32_t> live;  // bits per page: slots that attention sees
    std::vector<llama_pos> pos;  // true positions, HOLE for holes
    std::vector<uint32_t> mass;  // per page its page of attention mass; empty: none is accumulated

    // of the first full pages, as far as somebody asked: position of its first slot if its slots are a stretch of text,
    // else HOLE
    std::vector<llama_pos> starts;

    uint32_t n_holes = 0;
    uint32_t n_listed = 0;   // pages of which attention sees a slot
    uint64_t used_bytes = 0; // K and V of the slots held
    uint64_t page_bytes = 0; // of the pages they lie in

    static constexpr llama_pos HOLE = -1;

    uint32_t n() const { return uint32_t(pos.size()); }
    uint32_t held() const { return n() - n_holes; }
    // row of a slot in the pool of its format
    uint64_t row(uint32_t slot) const {
        return uint64_t(page_number(pages[slot / KVL_PAGE_SLOTS])) * KVL_PAGE_SLOTS + slot % KVL_PAGE_SLOTS;
    }
    uint32_t format(uint32_t slot) const { return page_format(pages[slot / KVL_PAGE_SLOTS]); }
    // all pages are f16, and slots are in the order of their positions
    bool plain() const { return pages.empty() || page_format(pages[0]) == KVL_FORMAT_F16; }
    // first slot of the f16 pages
    uint32_t f16_begin() const;
    // slots without holes, by position
    std::vector<uint32_t> order() const;
    // bits of a page: slots that are no holes
    uint32_t held_bits(uint32_t page) const;
    // their number
    uint32_t in_page(uint32_t page) const;
    // live bits of a page when nothing is deselected: all but holes, and rows for slots to come
    uint32_t all_live(uint32_t page) const;
    bool is_live(uint32_t slot) const { return live[slot / KVL_PAGE_SLOTS] >> slot % KVL_PAGE_SLOTS & 1; }
    // see these slots of all that are held, and what is appended later
    void see(const std::vector<uint32_t> & slots);
    // see the slots at these positions, a bit each, with a word of nothing at the end, and what is appended later;
    // returns how many there are
    uint32_t see_positions(const std::vector<uint32_t> & bits);
    // see all
    void see_all();
    // after the bits have changed
    void count_listed();

    static uint32_t page_format(uint32_t entry) { return entry >> KVL_PAGE_POOL_SHIFT; }
    static uint32_t page_entry(uint32_t format, uint32_t number) { return format << KVL_PAGE_POOL_SHIFT | number; }
    static uint32_t page_number(uint32_t entry) { return entry & KVL_PAGE_NUMBER; }
};
