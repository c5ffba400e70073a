/* The step of `TwoLevelLSTM` on a CPU: the coordinate-wise arithmetic of rules/two_level.py. A first
 * pass adds up a tensor's statistics, a second one steps it. Both compute the coordinate-wise LSTM,
 * which costs less than to write its result down in between. two_level.py compiles and calls this.
 * The plain rule defines the result, and tests compare this with it.
 *
 * Built with -DHIDDEN=H for H units. All matrices are row-major, cells feature-major (H, n).
 * Nothing here knows of torch: plain pointers in, no memory of its own, no threads, no errors.
 */
#include "vectors.h"

#define SIGNED (3 + HIDDEN)
#define SEEN (5 + 2 * HIDDEN)
#define STATISTICS 15
#define FLOOR 1e-20f

/* One tensor. The caller has computed what all its coordinates share. */
typedef struct {
    float *param;
    const float *grad;
    float *m, *v, *change;
    float *cell;        /* (H, count); null in a tensor without coordinate-wise LSTMs */
    const float *extra; /* added to the step, (count); or null */
    int64_t count;
    float gate_shift[3 * HIDDEN + 1];
    float m_correction, v_correction; /* bias corrections 1 - beta^t */
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
    vec m, v, adam, change, direction;
    vec cell[HIDDEN + 1];
    int none; /* no coordinate ever had a gradient */
} Seen;

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(clamp(-x, -80.0f, 80.0f))); }

INLINE Seen observe(const Rule *rule, const Tensor *t, int64_t at, int count) {
    Seen s = {};
    s.grad = bounded_gradient(t->grad + at, count, rule->bound, &s.finite);
    s.start = load(t->param + at, count);
    s.param = clamp(s.start, -rule->bound, rule->bound);
    vec m = load(t->m + at, count), v = load(t->v + at, count);
    s.none = !any(((bits)s.grad | (bits)v | (bits)m) & INT32_MAX);
    s.direction = s.adam = s.change = splat(0.0f);
    s.m = m;
    s.v = v;
    s.live = s.v != 0.0f;
    if (s.none) return s;
    s.m = rule->beta1 * m + rule->beta1_complement * s.grad;
    s.v = rule->beta2 * v + rule->beta2_complement * (s.grad * s.grad);
    s.live = s.v > 0.0f;
    s.change = load(t->change + at, count);
    vec scale = root(s.v / t->v_correction + FLOOR);
    s.adam = s.m / t->m_correction / scale;
    if (HIDDEN == 0 || !t->cell) return s;
    vec score = arsinh(s.grad / scale), moved = arsinh(s.change * t->last_rate);
    vec size = clamp(logarithm(scale + FLOOR) - t->last_rms, -6.0f, 6.0f) * (t->begun / 3.0f);
    vec with_sign[SIGNED] = {s.adam, score, moved};
    vec seen[SEEN] = {
        magnitude(s.adam), magnitude(score), hyperbolic_tangent(s.adam * score),
        hyperbolic_tangent(s.adam * moved), size,
    };
    for (int k = 0; k < HIDDEN; k++) {
        s.cell[k] = load(t->cell + k * t->count + at, count);
        vec was = hyperbolic_tangent(s.cell[k]);
        with_sign[3 + k] = was;
        seen[5 + k] = was * was;
        seen[5 + HIDDEN + k] = was * score;
    }
    for (int k = 0; k < HIDDEN; k++) {
        vec gates[3]; /* enter, keep, leave */
        for (int gate = 0; gate < 3; gate++) {
            const float *row = rule->gate_weight[gate * HIDDEN + k];
            vec sum = splat(t->gate_shift[gate * HIDDEN + k]);
            for (int j = 0; j < SEEN; j++) sum += row[j] * seen[j];
            gates[gate] = sigmoid(sum);
        }
        vec candidate = splat(0.0f);
        for (int j = 0; j < SIGNED; j++) candidate += rule->candidate_weight[k][j] * with_sign[j];
        s.cell[k] = gates[1] * s.cell[k] + gates[0] * hyperbolic_tangent(candidate);
        s.direction += rule->output_weight[k] * (gates[2] * hyperbolic_tangent(s.cell[k]));
    }
    return s;
}

/* partial: (blocks, STATISTICS), a row for each block from `first` up to `last`; the order is that of
 * `Sums` in rules/two_level.py without `slope` */
void rnnopt_statistics(const Rule *rule, const Tensor *tensors, const Block *blocks, int64_t first,
                       int64_t last, double *partial) {
    for (int64_t k = first; k < last; k++) {
        const Tensor *t = &tensors[blocks[k].tensor];
        vec sums[STATISTICS] = {};
        for (int64_t at = blocks[k].begin; at < blocks[k].end; at += LANES) {
            int64_t left = blocks[k].end - at;
            int count = left < LANES ? (int)left : LANES;
            Seen s = observe(rule, t, at, count);
            sums[4] += s.param * s.param;
            if (s.none) continue;
            vec m = load(t->m + at, count), g = s.grad;
            vec parts[STATISTICS] = {
                counted(s.live), counted(g != 0.0f), magnitude(g), g * g, splat(0.0f), s.param * g,
                m * m, m * g, s.change * s.change, s.change * g, s.adam * s.adam, s.adam * g,
                s.direction * s.direction, s.direction * g, s.direction * s.adam,
            };
            for (int i = 0; i < STATISTICS; i++) sums[i] += parts[i];
        }
        for (int i = 0; i < STATISTICS; i++) partial[STATISTICS * k + i] = total(sums[i]);
    }
}

INLINE vec step_lanes(const Rule *rule, const Tensor *t, int64_t at, int count) {
    Seen s = observe(rule, t, at, count);
    if (s.none) {
        if (t->decay) store(t->param + at, pick(s.finite, s.start - t->decay * s.start, s.start), count);
        return splat(0.0f);
    }
    vec step = t->adam * s.adam + t->gradient * s.grad + t->last * s.change + t->of_cell * s.direction;
    if (t->extra) step += load(t->extra + at, count);
    vec update = (vec)((bits)(t->growth * s.param - t->rate * step) & s.live);
    vec after = s.start + (t->lr * update - t->decay * s.start);
    vec old_m = load(t->m + at, count), old_v = load(t->v + at, count);
    store(t->param + at, pick(s.finite, after, s.start), count);
    store(t->m + at, pick(s.finite, s.m, old_m), count);
    store(t->v + at, pick(s.finite, s.v, old_v), count);
    store(t->change + at, pick(s.finite, update, s.change), count);
    if (t->cell)
        for (int k = 0; k < HIDDEN; k++) {
            float *place = t->cell + k * t->count + at;
            store(place, pick(s.finite, s.cell[k], load(place, count)), count);
        }
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
