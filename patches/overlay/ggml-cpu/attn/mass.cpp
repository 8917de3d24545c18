// What every slot received: attention mass of a step, and the attention of window queries. Both look at the keys a
// second time instead of keeping the logits, so memory stays bounded however long the prompt is.

#include "attn/streams.h"

namespace kvl {

namespace {

// Rows of query head g of a stream, tokens [t0, t0 + n).
tile_rows head_rows(const attn & a, int g, int t0, int n) {
    return {t0 * a.group + g, a.group, n};
}

// A block's slots, as they lie in t.s.
template <typename Run>
void for_blocks(const attn & a, tile_buffers & t, int stream, tile_rows rows, int page0, int page1, Run && run) {
    for (int page = page0; page < page1; page += BLOCK_PAGES) {
        const tile_block block = block_at(a, t, stream, rows, page, page1);
        if (block.n == 0) {
            return;
        }
        tile_logits(a, t, stream, rows, block);
        for (int j = 0; j < block.n; j++) {
            run(page + j / PAGE, j % PAGE, t.s + j * TILE);
        }
    }
}

// Sum over the rows of exp(logit - t.m) * t.l, or of its square.
template <bool square> float sum_of(const tile_buffers & t, int n_rows, const float * s) {
    vf sum = vf_zero();
    for (int r = 0; r < n_rows; r += VF_N) {
        const vf e = vf_exp(vf_sub(vf_load(s + r), vf_load(t.m + r)));
        const vf p = vf_mul(e, vf_load(t.l + r));
        sum = square ? vf_fma(p, p, sum) : vf_fma(e, vf_load(t.l + r), sum);
    }
    return vf_sum(sum);
}

// to[j] = value where logits[j] >= least
void note_weights(const float * logits, int n, float least, float value, float * to) {
    for (int j = 0; j < n; j++) {
        to[j] = logits[j] >= least ? value : to[j];
    }
}

// to[j] += exp(logits[j] - m) * scale
void add_weights(const float * logits, int n, float m, float scale, float * to) {
    int j = 0;
    for (; j + VF_N <= n; j += VF_N) {
        const vf e = vf_exp(vf_sub(vf_load(logits + j), vf_set(m)));
        vf_store(to + j, vf_fma(e, vf_set(scale), vf_load(to + j)));
    }
    for (; j < n; j++) {
        to[j] += expf(logits[j] - m) * scale;
    }
}

// Where what a page's slots receive from query head g is added up.
float * mass_of(const attn & a, const kvl_page_ref & page, int g) {
    return static_cast<float *>(a.dst->data) + int64_t(page.mass) * a.dst->ne[0] + g * PAGE;
}

// Few rows: from the logits that were kept. A thread takes a query head, so that no two of them add to the same mass.
void mass_of_few(const attn & a, const float * parts, int ith, int nth) {
    const int64_t stride = int64_t(a.n_rows) * (a.d_v + 2);
    const float * logits = parts + int64_t(a.n_stream) * a.p.n_split * stride;
    for (int i = ith; i < a.n_stream * a.group; i += nth) {
        const int stream = i / a.group;
        const kvl_page_ref * pages = a.pages(stream);
        for (int r = i % a.group; r < a.n_rows; r += a.group) {
            const row_stats total =
                total_of(parts + stream * a.p.n_split * stride + int64_t(r) * (a.d_v + 2), a.p.n_split, stride, a.d_v);
            const float * row = logits + (int64_t(stream) * a.n_rows + r) * a.p.n_kv;
            const bool last = a.mass() == KVL_ATTN_MASS_LAST;
            const float least = last ? mean_logit(total.m, total.l, a.n_live(stream, a.visible(stream, r))) : 0.0f;
            const float value = float(a.streams[stream].number + r / a.group);
            for (int p = 0; p < a.n_pages(stream); p++) {
                float * to = mass_of(a, pages[p], i % a.group);
                const int n = a.in_page(stream, pages[p]);
                if (last) {
                    note_weights(row + p * PAGE, n, least, value, to);
                } else {
                    add_weights(row + p * PAGE, n, total.m, 1.0f / total.l, to);
                }
            }
        }
    }
}

} // namespace

} // namespace kvl

using namespace kvl;

extern "C" void kvl_attn_mass(ggml_tensor * dst, int ith, int nth, void *) {
    const attn a(dst, 2);
    const float * result = static_cast<const float *>(dst->src[1]->data);
    if (a.n_rows <= KVL_ATTN_FEW_ROWS) {
        return mass_of_few(a, result, ith, nth);
    }
    const float * stats = result + int64_t(a.d_v) * a.n_rows * a.n_stream;
    tile_buffers t(a.d_k, a.d_v);
    constexpr int PARTS = 4; // of a head's slots: enough to share out evenly
    share_out(
        a.n_stream * a.group * PARTS, ith, nth,
        [&](int i) {
            return a.n_pages(i / PARTS / a.group);
        },
        [&](int i) {
            const int stream = i / PARTS / a.group;
            const int g = i / PARTS % a.group;
            const int n_blocks = (a.n_pages(stream) + BLOCK_PAGES - 1) / BLOCK_PAGES;
            const int page0 = n_blocks * (i % PARTS) / PARTS * BLOCK_PAGES;
            const int page1 = std::min(n_blocks * (i % PARTS + 1) / PARTS * BLOCK_PAGES, a.n_pages(stream));
            const kvl_page_ref * pages = a.pages(stream);
            for (int t0 = 0; t0 < a.n_tokens; t0 += TILE) {
                const tile_rows rows = head_rows(a, g, t0, std::min(TILE, a.n_tokens - t0));
                const bool last = a.mass() == KVL_ATTN_MASS_LAST;
                tile_begin(a, t, stream, rows);
                std::fill_n(t.m, TILE, 0.0f);
                for (int r = 0; r < rows.n; r++) {
                    const float * stat = stats + 2 * (int64_t(stream) * a.n_rows + rows.first + r * rows.step);
                    t.m[r] = last ? mean_logit(stat[0], stat[1], a.n_live(stream, t.visible[r])) : stat[0];
                    t.l[r] = 1.0f / stat[1];
                }
                for_blocks(a, t, stream, rows, page0, page1, [&](int page, int j, const float * s) {
                    float & to = mass_of(a, pages[page], g)[j];
                    if (!last) {
                        to += sum_of<false>(t, rows.n, s);
                        return;
                    }
                    for (int r = 0; r < rows.n; r++) {
                        to = s[r] >= t.m[r] ? float(a.streams[stream].number + t0 + r) : to;
                    }
                });
            }
        });
}

extern "C" void kvl_attn_scores(ggml_tensor * dst, int ith, int nth, void *) {
    const attn a(dst, 0);
    const bool rms = a.p.flags & KVL_ATTN_RMS;
    const float share = rms ? sqrtf(float(a.n_tokens)) : float(a.n_tokens);
    tile_buffers t(a.d_k, a.d_v);
    share_out(
        a.n_head, ith, nth,
        [&](int h) {
            return a.n_pages(h / a.group);
        },
        [&](int h) {
            const int stream = h / a.group;
            const int32_t * visible = static_cast<const int32_t *>(dst->src[5]->data) + int64_t(stream) * a.n_tokens;
            t.blind = static_cast<const int32_t *>(dst->src[6]->data) + int64_t(stream) * dst->ne[0];
            float * out = static_cast<float *>(dst->data) + h * dst->ne[0];
            std::fill_n(out, dst->ne[0], 0.0f);
            for (int t0 = 0; t0 < a.n_tokens; t0 += TILE) {
                const tile_rows rows = head_rows(a, h % a.group, t0, std::min(TILE, a.n_tokens - t0));
                tile_begin(a, t, stream, rows);
                std::copy_n(visible + t0, rows.n, t.visible);
                const int n_pages = a.n_pages(stream);
                for (int page = 0; page < n_pages; page += BLOCK_PAGES) {
                    const tile_block block = block_at(a, t, stream, rows, page, n_pages);
                    if (block.n == 0) {
                        break;
                    }
                    tile_logits(a, t, stream, rows, block);
                    tile_soften(t, rows.n, block.n);
                }
                for (int r = 0; r < TILE; r++) {
                    t.l[r] = r < rows.n ? 1.0f / (t.l[r] * share) : 0.0f;
                }
                for_blocks(a, t, stream, rows, 0, n_pages, [&](int page, int j, const float * s) {
                    out[page * PAGE + j] += rms ? sum_of<true>(t, rows.n, s) : sum_of<false>(t, rows.n, s);
                });
            }
            for (int64_t j = 0; rms && j < dst->ne[0]; j++) {
                out[j] = sqrtf(out[j]);
            }
        });
}
