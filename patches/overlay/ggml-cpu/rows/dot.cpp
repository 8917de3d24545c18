// Dot products of many f16 rows with one vector: what stands for units of text against a query.

#include "kvl-format.h"
#include "kvl-simd.h"

extern "C" void kvl_rows_dot(const uint16_t * rows, int64_t n, int d, const float * x, float * out) {
    for (int64_t i = 0; i < n; i++, rows += d) {
        vf sums[2] = {vf_zero(), vf_zero()};
        int c = 0;
        for (; c + 2 * VF_N <= d; c += 2 * VF_N) {
            sums[0] = vf_fma(vf_load_f16(rows + c), vf_load(x + c), sums[0]);
            sums[1] = vf_fma(vf_load_f16(rows + c + VF_N), vf_load(x + c + VF_N), sums[1]);
        }
        float sum = vf_sum(vf_add(sums[0], sums[1]));
        for (; c < d; c++) {
            sum += vf_half(rows + c) * x[c];
        }
        out[i] = sum;
    }
}
