// The vector type of the page kernels: AVX-512, AVX2, NEON, or one float.

#pragma once

#include "ggml.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>
#include <cstring>

// An f16 at any address. By instruction where there is one: ggml's table of all of them would fill the cache.
static inline float vf_half(const void * p) {
    ggml_fp16_t x;
    memcpy(&x, p, sizeof(x));
#if defined(__F16C__)
    return GGML_CPU_COMPUTE_FP16_TO_FP32(x);
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

// VF_PIN keeps a value in a register: the compiler would load it again for every use.
#if defined(__AVX512F__)
#define VF_PIN(x) __asm__("" : "+v"(x))
typedef __m512 vf;
#define VF_N 16
static inline vf vf_zero() {
    return _mm512_setzero_ps();
}
static inline vf vf_set(float x) {
    return _mm512_set1_ps(x);
}
static inline vf vf_load(const float * p) {
    return _mm512_loadu_ps(p);
}
static inline vf vf_load_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline void vf_store(float * p, vf x) {
    _mm512_storeu_ps(p, x);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf vf_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
static inline float vf_top(vf a) {
    return _mm512_reduce_max_ps(a);
}
static inline float vf_sum(vf a) {
    return _mm512_reduce_add_ps(a);
}
// to[0..3] = sums of a, b, c, d
static inline void vf_sum4(vf a, vf b, vf c, vf d, float * to) {
    const auto half = [](vf x) {
        return _mm256_add_ps(_mm512_castps512_ps256(x),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    };
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline vf vf_exp(vf a) {
    return ggml_v_expf(a);
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VF_PIN(x) __asm__("" : "+x"(x))
typedef __m256 vf;
#define VF_N 8
static inline vf vf_zero() {
    return _mm256_setzero_ps();
}
static inline vf vf_set(float x) {
    return _mm256_set1_ps(x);
}
static inline vf vf_load(const float * p) {
    return _mm256_loadu_ps(p);
}
static inline vf vf_load_f16(const void * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline void vf_store(float * p, vf x) {
    _mm256_storeu_ps(p, x);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf vf_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
static inline float vf_top(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline void vf_sum4(vf a, vf b, vf c, vf d, float * to) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline vf vf_exp(vf a) {
    return ggml_v_expf(a);
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define VF_PIN(x) __asm__("" : "+w"(x))
typedef float32x4_t vf;
#define VF_N 4
static inline vf vf_zero() {
    return vdupq_n_f32(0.0f);
}
static inline vf vf_set(float x) {
    return vdupq_n_f32(x);
}
static inline vf vf_load(const float * p) {
    return vld1q_f32(p);
}
static inline vf vf_load_f16(const void * p) {
    return vcvt_f32_f16(vld1_f16((const __fp16 *)p));
}
static inline void vf_store(float * p, vf x) {
    vst1q_f32(p, x);
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
static inline vf vf_add(vf a, vf b) {
    return vaddq_f32(a, b);
}
static inline vf vf_sub(vf a, vf b) {
    return vsubq_f32(a, b);
}
static inline vf vf_mul(vf a, vf b) {
    return vmulq_f32(a, b);
}
static inline vf vf_max(vf a, vf b) {
    return vmaxq_f32(a, b);
}
static inline float vf_top(vf a) {
    return vmaxvq_f32(a);
}
static inline float vf_sum(vf a) {
    return vaddvq_f32(a);
}
static inline void vf_sum4(vf a, vf b, vf c, vf d, float * to) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
static inline vf vf_exp(vf a) {
#if defined(__ARM_FEATURE_SVE)
    // where there is SVE, ggml's is of that type, whose vectors hold at least these four
    float x[4];
    vst1q_f32(x, a);
    const svbool_t four = svptrue_pat_b32(SV_VL4);
    svst1_f32(four, x, ggml_v_expf(four, svld1_f32(four, x)));
    return vld1q_f32(x);
#else
    return ggml_v_expf(a);
#endif
}
#else
#define VF_PIN(x) (void)(x)
typedef float vf;
#define VF_N 1
static inline vf vf_zero() {
    return 0.0f;
}
static inline vf vf_set(float x) {
    return x;
}
static inline vf vf_load(const float * p) {
    return *p;
}
static inline vf vf_load_f16(const void * p) {
    return vf_half(p);
}
static inline void vf_store(float * p, vf x) {
    *p = x;
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}
static inline vf vf_add(vf a, vf b) {
    return a + b;
}
static inline vf vf_sub(vf a, vf b) {
    return a - b;
}
static inline vf vf_mul(vf a, vf b) {
    return a * b;
}
static inline vf vf_max(vf a, vf b) {
    return a > b ? a : b;
}
static inline float vf_top(vf a) {
    return a;
}
static inline float vf_sum(vf a) {
    return a;
}
static inline void vf_sum4(vf a, vf b, vf c, vf d, float * to) {
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}
static inline vf vf_exp(vf a) {
    return expf(a);
}
#endif
