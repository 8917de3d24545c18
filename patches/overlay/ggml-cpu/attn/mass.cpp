// What every slot received: attention mass of a step, and the attention of window queries. Both look at the keys a
// second time instead of keeping the logits, so memory stays bounded however long the prompt is.

#include "attn/streams.h"

namespace kvl {

namespace {

// Rows of query head g of a stream, tokens [t0, t0 + n).
tile_rows head_rows(const attn & a, int g, int t0, int n) {
    return {t0 * a.group + g, a.group, n};
}

// to[j] += sum over the rows of exp(logit - t.m) * t.l, or of its square, for slots [slot0, slot1)
template <bool square>
void add_mass(const attn & a, tile_buffers & t, int stream, tile_rows rows, int slot0, int slot1, float * to) {
    slot1 = std::min(slot1, t.visible[rows.n - 1]);
    for (; slot0 < slot1; slot0 += BLOCK) {
        const int n = std::min(BLOCK, slot1 - slot0);
        tile_logits(a, t, stream, rows, slot0, n);
        for (int j = 0; j < n; j++) {
            vf sum = vf_zero();
            for (int r = 0; r < rows.n; r += VF_N) {
                const vf e = vf_exp(vf_sub(vf_load(t.s + j * TILE + r), vf_load(t.m + r)));
                const vf p = vf_mul(e, vf_load(t.l + r));
                sum = square ? vf_fma(p, p, sum) : vf_fma(e, vf_load(t.l + r), sum);
            }
            to[slot0 + j] += vf_sum(sum);
        }
    }
}

// to[j] = number of the last row whose logit is at least t.m, first + row, for slots [slot0, slot1)
void note_mass(const attn & a, tile_buffers & t, int stream, tile_rows rows, int slot0, int slot1, int first,
               float * to) {
    slot1 = std::min(slot1, t.visible[rows.n - 1]);
    for (; slot0 < slot1; slot0 += BLOCK) {
        const int n = std::min(BLOCK, slot1 - slot0);
        tile_logits(a, t, stream, rows, slot0, n);
        for (int j = 0; j < n; j++) {
            int last = -1;
            for (int r = 0; r < rows.n; r++) {
                last = t.s[j * TILE + r] >= t.m[r] ? r : last;
            }
            if (last >= 0) {
                to[slot0 + j] = float(first + last);
            }
        }
    }
}

} // namespace

void note_weights(const float * logits, int n, float least, float value, float * to) {
    for (int j = 0; j < n; j++) {
        to[j] = logits[j] >= least ? value : to[j];
    }
}

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

} // namespace kvl

using namespace kvl;

extern "C" void kvl_attn_mass(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const attn a(dst, userdata);
    const int n_tokens = a.p.n_seq_tokens;
    const float * stats = static_cast<const float *>(dst->src[4]->data) + int64_t(a.d_v) * a.n_rows * a.n_stream;
    tile_buffers t(a.d_k, a.d_v);
    constexpr int PARTS = 4; // of a head's slots: enough to share out evenly
    share_out(
        a.n_stream * a.group * PARTS, ith, nth,
        [&](int i) {
            return a.n_slots(i / PARTS / a.group);
        },
        [&](int i) {
            const int stream = i / PARTS / a.group;
            const int g = i / PARTS % a.group;
            const int n_blocks = (a.n_slots(stream) + BLOCK - 1) / BLOCK;
            const int slot0 = n_blocks * (i % PARTS) / PARTS * BLOCK;
            const int slot1 = std::min(n_blocks * (i % PARTS + 1) / PARTS * BLOCK, a.n_slots(stream));
            for (int t0 = 0; t0 < n_tokens; t0 += TILE) {
                const tile_rows rows = head_rows(a, g, t0, std::min(TILE, n_tokens - t0));
                tile_begin(a, t, stream, rows);
                std::fill_n(t.m, TILE, 0.0f);
                for (int r = 0; r < rows.n; r++) {
                    const float * stat = stats + 2 * (int64_t(stream) * a.n_rows + rows.first + r * rows.step);
                    t.m[r] = a.p.last ? mean_logit(stat[0], stat[1], a.n_live(stream, t.visible[r])) : stat[0];
                    t.l[r] = 1.0f / stat[1];
                }
                float * to = a.p.mass[stream * a.group + g];
                if (a.p.last) {
                    note_mass(a, t, stream, rows, slot0, slot1, a.p.last[stream / a.p.n_head_kv] + t0, to);
                } else {
                    add_mass<false>(a, t, stream, rows, slot0, slot1, to);
                }
            }
        });
}

extern "C" void kvl_attn_scores(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const attn a(dst, userdata);
    const int n_tokens = a.p.n_seq_tokens;
    const float share = a.p.rms ? sqrtf(float(n_tokens)) : float(n_tokens);
    tile_buffers t(a.d_k, a.d_v);
    share_out(
        a.p.n_head, ith, nth,
        [&](int h) {
            return a.n_slots(h / a.group);
        },
        [&](int h) {
            const int stream = h / a.group;
            const int32_t * visible = static_cast<const int32_t *>(dst->src[4]->data) + int64_t(stream) * n_tokens;
            t.blind = static_cast<const int32_t *>(dst->src[5]->data) + int64_t(stream) * dst->ne[0];
            float * out = static_cast<float *>(dst->data) + h * dst->ne[0];
            std::fill_n(out, dst->ne[0], 0.0f);
            for (int t0 = 0; t0 < n_tokens; t0 += TILE) {
                const tile_rows rows = head_rows(a, h % a.group, t0, std::min(TILE, n_tokens - t0));
                tile_begin(a, t, stream, rows);
                std::copy_n(visible + t0, rows.n, t.visible);
                const int n_end = t.visible[rows.n - 1];
                for (int slot0 = 0; slot0 < n_end; slot0 += BLOCK) {
                    const int n = std::min(BLOCK, n_end - slot0);
                    tile_logits(a, t, stream, rows, slot0, n);
                    tile_soften(t, rows.n, n);
                }
                for (int r = 0; r < TILE; r++) {
                    t.l[r] = r < rows.n ? 1.0f / (t.l[r] * share) : 0.0f;
                }
                if (a.p.rms) {
                    add_mass<true>(a, t, stream, rows, 0, n_end, out);
                } else {
                    add_mass<false>(a, t, stream, rows, 0, n_end, out);
                }
            }
            for (int64_t j = 0; a.p.rms && j < dst->ne[0]; j++) {
                out[j] = sqrtf(out[j]);
            }
        });
}
