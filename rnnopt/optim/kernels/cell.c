/* The step of `CoordinateLSTM` on a CPU: the arithmetic of rules/lstm.py, rules/features.py and
 * rules/protocol.py (advance) in one pass that reads and writes every number of state once. cpu.py
 * compiles and calls it. The plain rule defines the result, and tests compare this with it.
 *
 * Built with -DHIDDEN=H for H hidden units. All matrices are row-major, states feature-major (H, n).
 * Nothing here knows of torch: plain pointers in, no memory of its own, no threads, no errors.
 */
#include <stdint.h>
#include <string.h>

#define FEATURES 5
#define INPUTS (FEATURES + HIDDEN)
#define OUTPUTS 3
#define STATISTICS 8
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

/* One tensor. The caller has computed what all its coordinates share. */
typedef struct {
    float *param;
    const float *grad;
    float *m, *v;
    void *hidden, *cell; /* (H, count), float32 or bfloat16 */
    int64_t count;
    float gate_shift[4 * HIDDEN];
    float output_shift[OUTPUTS];
    float m_correction, v_correction; /* bias corrections 1 - beta^t */
    float grad_rms, param_rms;        /* the units of the features */
    float scale;                      /* initial_decrease * step_scale */
    float growth;                     /* of the parameter, relative to itself */
    float keep;                       /* 1; 0 overwrites the parameter with the change */
    float rate, decay;                /* lr, and lr * step_size * weight_decay */
} Tensor;

typedef struct {
    float gate_weight[4 * HIDDEN][INPUTS];
    float output_weight[OUTPUTS][HIDDEN];
    float beta1_complement, beta2, beta2_complement; /* complement: 1 - beta */
    float eps, log_bound, grad_bound, ratio_floor;
} Rule;

typedef struct {
    int64_t tensor, begin, end;
} Block;

int64_t rnnopt_tensor_size(void) { return sizeof(Tensor); }

/* -- vectors of LANES numbers */

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

/* -- the statistics of a tensor, see features.tensor_statistics: all but the last */

INLINE vec bounded(const Rule *rule, const float *at, int count, bits *finite) {
    vec g = load(at, count);
    *finite = (g - g) == 0.0f; /* false for NaN and infinity */
    return clamp((vec)((bits)g & *finite), -rule->grad_bound, rule->grad_bound);
}

/* partial: (blocks, STATISTICS), a row for each block from `first` up to `last` */
void rnnopt_statistics(const Rule *rule, const Tensor *tensors, const Block *blocks, int64_t first,
                       int64_t last, double *partial) {
    for (int64_t k = first; k < last; k++) {
        const Tensor *t = &tensors[blocks[k].tensor];
        vec pp = {}, gg = {}, mm = {}, mg = {}, pg = {}, size = {}, nonzero = {};
        for (int64_t at = blocks[k].begin; at < blocks[k].end; at += LANES) {
            int64_t left = blocks[k].end - at;
            int count = left < LANES ? (int)left : LANES;
            bits finite;
            vec g = bounded(rule, t->grad + at, count, &finite);
            vec p = load(t->param + at, count), m = load(t->m + at, count);
            pp += p * p;
            gg += g * g;
            mm += m * m;
            mg += m * g;
            pg += p * g;
            size += (vec)((bits)g & INT32_MAX);
            nonzero += (vec)((bits)splat(1.0f) & (g != 0.0f));
        }
        double *out = partial + STATISTICS * k;
        out[0] = (double)(blocks[k].end - blocks[k].begin);
        out[1] = total(pp);
        out[2] = total(gg);
        out[3] = total(nonzero);
        out[4] = total(mm);
        out[5] = total(mg);
        out[6] = total(size);
        out[7] = total(pg);
    }
}

/* -- the step */

INLINE void step_lanes(const Rule *rule, const Tensor *t, int64_t at, int count, int is_half) {
    bits finite;
    vec g = bounded(rule, t->grad + at, count, &finite);
    vec p = load(t->param + at, count), v = load(t->v + at, count);
    if (!any(((bits)g | (bits)v) & INT32_MAX)) { /* never had a gradient: no update, zero state */
        if (t->decay) store(t->param + at, pick(finite, p - t->decay * p, p), count);
        return;
    }
    vec m = load(t->m + at, count);
    vec next_m = m + rule->beta1_complement * (g - m);
    vec next_v = rule->beta2 * v + rule->beta2_complement * (g * g);
    bits live = next_v > 0.0f;
    vec scale = root(next_v / t->v_correction) + rule->eps;
    vec adam = next_m / t->m_correction / scale, relative = g / t->grad_rms;

    vec inputs[INPUTS] = {
        adam, g / scale, arsinh(relative),
        logarithm(relative * relative + rule->ratio_floor) / 6.0f, arsinh(p / t->param_rms),
    };
    for (int k = 0; k < HIDDEN; k++)
        inputs[FEATURES + k] = load_state(t->hidden, k * t->count + at, count, is_half);
    vec outputs[OUTPUTS];
    for (int j = 0; j < OUTPUTS; j++) outputs[j] = splat(t->output_shift[j]);

    for (int k = 0; k < HIDDEN; k++) {
        vec gates[4]; /* i f g o */
        for (int gate = 0; gate < 4; gate++) {
            const float *row = rule->gate_weight[gate * HIDDEN + k];
            vec sum = splat(t->gate_shift[gate * HIDDEN + k]);
            for (int j = 0; j < INPUTS; j++) sum += row[j] * inputs[j];
            gates[gate] = sum;
        }
        /* sigmoid(x) = 1 / (1 + e^-x) and tanh(x) = (1 - e^-2x) / (1 + e^-2x), over common
         * denominators: one division where there would be three. Beyond the bounds both are
         * constant to 12 digits; within them the product of three does not overflow. */
        vec i = 1.0f + exponential(clamp(-gates[0], -28.0f, 28.0f));
        vec f = 1.0f + exponential(clamp(-gates[1], -28.0f, 28.0f));
        vec e = exponential(clamp(-2.0f * gates[2], -28.0f, 28.0f));
        vec o = 1.0f + exponential(clamp(-gates[3], -28.0f, 28.0f));
        vec old = load_state(t->cell, k * t->count + at, count, is_half);
        vec ig = i * (1.0f + e);
        vec c = (old * ig + (1.0f - e) * f) / (f * ig);
        c = (vec)((bits)c & live);
        vec ec = exponential(clamp(-2.0f * c, -28.0f, 28.0f));
        vec h = (1.0f - ec) / (o * (1.0f + ec));
        for (int j = 0; j < OUTPUTS; j++) outputs[j] += rule->output_weight[j][k] * h;
        store_state(t->cell, k * t->count + at, pick(finite, c, old), count, is_half);
        store_state(t->hidden, k * t->count + at, pick(finite, h, inputs[FEATURES + k]), count,
                     is_half);
    }
    float bound = rule->log_bound;
    vec es = exponential(clamp(-2.0f / bound * outputs[0], -28.0f, 28.0f));
    vec factor = exponential(bound * (1.0f - es) / (1.0f + es));
    vec direction = (1.0f + outputs[1]) * adam + outputs[2] * relative;
    vec grown = t->growth * (vec)((bits)p & live);
    vec change = t->rate * (grown - t->scale * factor * direction) - t->decay * p;
    store(t->param + at, pick(finite, t->keep * p + change, p), count);
    store(t->m + at, pick(finite, next_m, m), count);
    store(t->v + at, pick(finite, next_v, v), count);
}

INLINE void step_block(const Rule *rule, const Tensor *t, const Block *block, int is_half) {
    int64_t at = block->begin;
    for (; at + LANES <= block->end; at += LANES) step_lanes(rule, t, at, LANES, is_half);
    if (at < block->end) step_lanes(rule, t, at, (int)(block->end - at), is_half);
}

void rnnopt_step(const Rule *rule, const Tensor *tensors, const Block *blocks, int64_t first,
                 int64_t last, int is_half) {
    for (int64_t k = first; k < last; k++) {
        const Tensor *t = &tensors[blocks[k].tensor];
        if (is_half) step_block(rule, t, &blocks[k], 1);
        else step_block(rule, t, &blocks[k], 0);
    }
}
