/* Vectors of LANES numbers, for the kernels on a CPU: loads and stores, and elementary functions. */
#include <stdint.h>
#include <string.h>

/* One vector register: longer vectors would run out of registers and take twice as long. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));

typedef struct {
    int64_t tensor, begin, end;
} Block;

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec pick(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE vec clamp(vec x, float low, float high) {
    x = pick(x < low, splat(low), x);
    return pick(x > high, splat(high), x);
}

/* `count` is a constant LANES everywhere but at a tensor's end */
INLINE vec load(const float *at, int count) {
    vec x = {};
    if (count == LANES) memcpy(&x, at, sizeof x);
    else memcpy(&x, at, sizeof(float) * count);
    return x;
}
INLINE void store(float *at, vec x, int count) {
    if (count == LANES) memcpy(at, &x, sizeof x);
    else memcpy(at, &x, sizeof(float) * count);
}
INLINE vec load_state(const void *base, int64_t at, int count, int is_half) {
    if (!is_half) return load((const float *)base + at, count);
    half x = {};
    if (count == LANES) memcpy(&x, (const uint16_t *)base + at, sizeof x);
    else memcpy(&x, (const uint16_t *)base + at, sizeof(uint16_t) * count);
    return (vec)(__builtin_convertvector(x, word) << 16);
}
INLINE void store_state(void *base, int64_t at, vec x, int count, int is_half) {
    if (!is_half) {
        store((float *)base + at, x, count);
        return;
    }
    word raw = (word)x; /* to the nearest, ties to even, as torch rounds */
    half y = __builtin_convertvector((raw + 0x7fff + ((raw >> 16) & 1)) >> 16, half);
    if (count == LANES) memcpy((uint16_t *)base + at, &y, sizeof y);
    else memcpy((uint16_t *)base + at, &y, sizeof(uint16_t) * count);
}
INLINE double total(vec x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
INLINE int any(bits x) {
    int32_t seen = 0;
    for (int i = 0; i < LANES; i++) seen |= x[i];
    return seen != 0;
}
INLINE vec root(vec x) {
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

/* e^x for |x| <= 87: x = n ln 2 + r, and a polynomial of degree 6 in r (Taylor with |r| <= 0.35,
 * truncation error below half a unit in the last place) */
INLINE vec exponential(vec x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec shifted = x * 1.44269504f + shift;
    vec n = shifted - shift;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((bits)p + ((bits)shifted << 23));
}

/* ln x for normal x > 0: x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), and
 * ln(1 + f) = 2 artanh(z), z = f / (2 + f), |z| <= 0.172 */
INLINE vec logarithm(vec x) {
    bits raw = (bits)x - 0x3f3504f3; /* of sqrt(1/2) */
    bits n = raw >> 23;
    vec f = (vec)((raw & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vec z = f / (f + 2.0f), w = z * z;
    vec p = w * (2.0f / 9) + 2.0f / 7;
    p = p * w + 2.0f / 5;
    p = p * w + 2.0f / 3;
    p = p * w + 2.0f;
    return __builtin_convertvector(n, vec) * 0.693147181f + p * z;
}

INLINE vec arsinh(vec x) {
    bits sign = (bits)x & INT32_MIN;
    vec size = (vec)((bits)x & INT32_MAX);
    return (vec)((bits)logarithm(size + root(size * size + 1.0f)) | sign);
}

INLINE vec magnitude(vec x) { return (vec)((bits)x & INT32_MAX); }
INLINE vec counted(bits mask) { return (vec)((bits)splat(1.0f) & mask); }

/* a gradient within bounds, 0 where it is not finite */
INLINE vec bounded_gradient(const float *at, int count, float bound, bits *finite) {
    vec g = load(at, count);
    *finite = (g - g) == 0.0f; /* false for NaN and infinity */
    return clamp((vec)((bits)g & *finite), -bound, bound);
}
