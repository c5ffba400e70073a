/* The step of `CoordinateLSTM` on a CPU: the arithmetic of rules/lstm.py, rules/features.py and
 * rules/protocol.py (advance) in one pass that reads and writes every number of state once. cpu.py
 * compiles and calls it. The plain rule defines the result, and tests compare this with it.
 *
 * Built with -DHIDDEN=H for H hidden units. All matrices are row-major, states feature-major (H, n).
 * Nothing here knows of torch: plain pointers in, no memory of its own, no threads, no errors.
 */
#include "vectors.h"

#define FEATURES 5
#define INPUTS (FEATURES + HIDDEN)
#define OUTPUTS 3
#define STATISTICS 8

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

int64_t rnnopt_tensor_size(void) { return sizeof(Tensor); }

/* -- the statistics of a tensor, see features.tensor_statistics: all but the last */

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
            vec g = bounded_gradient(t->grad + at, count, rule->grad_bound, &finite);
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
    vec g = bounded_gradient(t->grad + at, count, rule->grad_bound, &finite);
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
