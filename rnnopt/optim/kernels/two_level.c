/* The step of `TwoLevelLSTM` on a CPU: the coordinate-wise arithmetic of rules/two_level.py. A first
 * pass advances the coordinate-wise LSTM, keeps its direction, and adds up a tensor's statistics; a
 * second one steps the tensor. two_level.py compiles and calls this. The plain rule defines the
 * result, and tests compare this with it.
 *
 * Built with -DHIDDEN=H for H units. All matrices are row-major, cells feature-major (H, n).
 * Nothing here knows of torch: plain pointers in, no memory of its own, no threads, no errors.
 */
#include "vectors.h"

#define SIGNED (3 + HIDDEN)
#define SEEN (5 + 2 * HIDDEN)
#define STATISTICS 15
#define FLOOR 1e-20f      /* in logarithms, as in the plain rule */
#define ROOT_FLOOR 1e-30f /* in roots of squared gradients */

/* One tensor. The caller has computed what all its coordinates share. */
typedef struct {
    float *param;
    const float *grad;
    float *m, *v, *change;
    float *cell;        /* (H, count); null in a tensor without coordinate-wise LSTMs */
    /* of the coordinate-wise LSTM, (count), from the first pass to the second; the caller adds what
     * else is added to the step; or null */
    float *direction;
    int64_t count;
    float gate_shift[3 * HIDDEN + 1];
    float m_correction, v_correction; /* 1 / (1 - beta^t) */
    float last_rate;                  /* 1 / (the last rate + FLOOR) */
    float begun, last_rms;            /* whether there was a step, and ln(RMS of its gradient + FLOOR) */
    float growth;                     /* of the parameter, relative to itself */
    float rate, adam, gradient, last, of_cell;
    float lr, decay;                  /* decay: lr * step_size * weight_decay */
} Tensor;

typedef struct {
    float gate_weight[3 * HIDDEN + 1][SEEN];
    float candidate_weight[HIDDEN + 1][SIGNED];
    float output_weight[HIDDEN + 1];
    float beta1, beta1_complement, beta2, beta2_complement; /* complement: 1 - beta */
    float bound;                                            /* of gradients and parameters */
} Rule;

int64_t rnnopt_tensor_size(void) { return sizeof(Tensor); }

/* What a coordinate has become, before the step. */
typedef struct {
    bits finite, live;
    vec grad, param, start; /* start: the parameter out of bounds, too */
    vec m, v, old_m, old_v, scale, inverse, adam, change; /* inverse: of scale */
    int none; /* no coordinate ever had a gradient */
} Seen;

INLINE Seen observe(const Rule *rule, const Tensor *t, int64_t at, int count) {
    Seen s = {};
    s.grad = bounded_gradient(t->grad + at, count, rule->bound, &s.finite);
    s.start = load(t->param + at, count);
    s.param = clamp(s.start, -rule->bound, rule->bound);
    s.old_m = load(t->m + at, count);
    s.old_v = load(t->v + at, count);
    s.none = !any(((bits)s.grad | (bits)s.old_v | (bits)s.old_m) & INT32_MAX);
    if (s.none) return s;
    s.m = rule->beta1 * s.old_m + rule->beta1_complement * s.grad;
    s.v = rule->beta2 * s.old_v + rule->beta2_complement * (s.grad * s.grad);
    s.live = s.v > 0.0f;
    s.scale = root(s.v * t->v_correction + ROOT_FLOOR);
    s.inverse = 1.0f / s.scale;
    s.adam = s.m * t->m_correction * s.inverse;
    s.change = load(t->change + at, count);
    return s;
}

/* e^-2x, with tanh x = (1 - e) / (1 + e), and e^-x, with sigmoid x = 1 / (1 + e). Quotients share
 * denominators, since a division takes as long as ten products; within these bounds a product of
 * three denominators does not overflow, and beyond them both functions are constant to 12 digits. */
INLINE vec falling(vec x, float power) {
    return exponential(clamp(-power * x, -28.0f, 28.0f));
}

/* The coordinate-wise LSTM: its next cell, and its direction. */
INLINE vec advance(const Rule *rule, const Tensor *t, const Seen *s, vec *cell) {
    vec score = arsinh(s->grad * s->inverse), moved = arsinh(s->change * t->last_rate);
    vec size = clamp(logarithm(s->scale + FLOOR) - t->last_rms, -6.0f, 6.0f) * (t->begun / 3.0f);
    vec a = falling(s->adam * score, 2.0f), b = falling(s->adam * moved, 2.0f);
    vec both = 1.0f / ((1.0f + a) * (1.0f + b));
    vec with_sign[SIGNED] = {s->adam, score, moved};
    vec seen[SEEN] = {
        magnitude(s->adam), magnitude(score), (1.0f - a) * (1.0f + b) * both,
        (1.0f - b) * (1.0f + a) * both, size,
    };
    for (int k = 0; k < HIDDEN; k++) {
        vec e = falling(cell[k], 2.0f);
        vec was = (1.0f - e) / (1.0f + e);
        with_sign[3 + k] = was;
        seen[5 + k] = was * was;
        seen[5 + HIDDEN + k] = was * score;
    }
    vec direction = splat(0.0f);
    for (int k = 0; k < HIDDEN; k++) {
        vec gates[3]; /* 1 / enter, 1 / keep, 1 / leave */
        for (int gate = 0; gate < 3; gate++) {
            const float *row = rule->gate_weight[gate * HIDDEN + k];
            vec sum = splat(t->gate_shift[gate * HIDDEN + k]);
            for (int j = 0; j < SEEN; j++) sum += row[j] * seen[j];
            gates[gate] = 1.0f + falling(sum, 1.0f);
        }
        vec candidate = splat(0.0f);
        for (int j = 0; j < SIGNED; j++) candidate += rule->candidate_weight[k][j] * with_sign[j];
        vec e = falling(candidate, 2.0f), entering = gates[0] * (1.0f + e);
        cell[k] = (cell[k] * entering + (1.0f - e) * gates[1]) / (gates[1] * entering);
        vec c = falling(cell[k], 2.0f);
        direction += rule->output_weight[k] * ((1.0f - c) / (gates[2] * (1.0f + c)));
    }
    return direction;
}

INLINE void measure_lanes(const Rule *rule, const Tensor *t, int64_t at, int count, vec *sums) {
    Seen s = observe(rule, t, at, count);
    sums[4] += s.param * s.param;
    vec direction = splat(0.0f), g = s.grad;
    if (!s.none && HIDDEN && t->cell) {
        vec cell[HIDDEN + 1], old[HIDDEN + 1];
        for (int k = 0; k < HIDDEN; k++) cell[k] = old[k] = load(t->cell + k * t->count + at, count);
        direction = advance(rule, t, &s, cell);
        for (int k = 0; k < HIDDEN; k++)
            store(t->cell + k * t->count + at, pick(s.finite, cell[k], old[k]), count);
    }
    if (HIDDEN && t->cell) store(t->direction + at, direction, count);
    if (s.none) return;
    vec parts[STATISTICS] = {
        counted(s.live), counted(g != 0.0f), magnitude(g), g * g, splat(0.0f), s.param * g,
        s.old_m * s.old_m, s.old_m * g, s.change * s.change, s.change * g, s.adam * s.adam,
        s.adam * g, direction * direction, direction * g, direction * s.adam,
    };
    for (int i = 0; i < STATISTICS; i++) sums[i] += parts[i];
}

/* partial: (blocks, STATISTICS), a row for each block from `first` up to `last`; the order is that of
 * `Sums` in rules/tensor_features.py without `slope` */
void rnnopt_statistics(const Rule *rule, const Tensor *tensors, const Block *blocks, int64_t first,
                       int64_t last, double *partial) {
    for (int64_t k = first; k < last; k++) {
        const Tensor *t = &tensors[blocks[k].tensor];
        vec sums[STATISTICS] = {};
        int64_t at = blocks[k].begin;
        for (; at + LANES <= blocks[k].end; at += LANES) measure_lanes(rule, t, at, LANES, sums);
        if (at < blocks[k].end) measure_lanes(rule, t, at, (int)(blocks[k].end - at), sums);
        for (int i = 0; i < STATISTICS; i++) partial[STATISTICS * k + i] = total(sums[i]);
    }
}

INLINE vec step_lanes(const Rule *rule, const Tensor *t, int64_t at, int count) {
    Seen s = observe(rule, t, at, count);
    if (s.none) {
        if (t->decay) store(t->param + at, pick(s.finite, s.start - t->decay * s.start, s.start), count);
        return splat(0.0f);
    }
    vec step = t->adam * s.adam + t->gradient * s.grad + t->last * s.change;
    if (t->direction) step += t->of_cell * load(t->direction + at, count);
    vec update = (vec)((bits)(t->growth * s.param - t->rate * step) & s.live);
    vec after = s.start + (t->lr * update - t->decay * s.start);
    store(t->param + at, pick(s.finite, after, s.start), count);
    store(t->m + at, pick(s.finite, s.m, s.old_m), count);
    store(t->v + at, pick(s.finite, s.v, s.old_v), count);
    store(t->change + at, pick(s.finite, update, s.change), count);
    return update * s.grad;
}

/* slopes: the sum of update times gradient, for each block from `first` up to `last` */
void rnnopt_step(const Rule *rule, const Tensor *tensors, const Block *blocks, int64_t first,
                 int64_t last, double *slopes) {
    for (int64_t k = first; k < last; k++) {
        const Tensor *t = &tensors[blocks[k].tensor];
        vec slope = {};
        int64_t at = blocks[k].begin;
        for (; at + LANES <= blocks[k].end; at += LANES) slope += step_lanes(rule, t, at, LANES);
        if (at < blocks[k].end) slope += step_lanes(rule, t, at, (int)(blocks[k].end - at));
        slopes[k] = total(slope);
    }
}
