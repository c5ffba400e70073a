"""What defines `CoordinateLSTM`."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rule_table import random_lstm

from rnnopt import CoordinateLSTM, LearnedOptimizer
from rnnopt.rules import lstm as lstm_module
from rnnopt.rules.features import (
    ANNEALING_EXPONENT,
    SHARE_EXPONENT,
    RunningMaxima,
    context_features,
    orthogonalized,
    radial_gate,
    step_scale,
)
from rnnopt.rules.protocol import advance, cross_tensor_context, statistics_of


def maxima_of(state):
    return RunningMaxima(*(state[name] for name in RunningMaxima._fields))


def context_of(rule, grad, state, param):
    """Of a tensor that is stepped alone, (18,)."""
    statistics = rule.statistics(grad.flatten(), state, param.flatten())
    return rule.cross_tensor_context(statistics.unsqueeze(0))[0]


def scale_of(context, maxima, step, gated_annealing=False):
    after = maxima.updated(context, step)
    return float(step_scale(context, maxima, after, gated_annealing))


def cosine(one, other):
    return float(torch.cosine_similarity(one.detach().flatten(), other.flatten(), dim=0))


@settings(max_examples=20, deadline=None)
@given(hidden_size=st.integers(0, 12), seed=st.integers(0, 99))
def test_zero_output_is_torch_adam_with_step_scale_as_learning_rate(hidden_size, seed):
    """The learning rate of `step_scale`, computed independently here."""
    generator = torch.Generator().manual_seed(seed)
    rule = random_lstm(hidden_size=hidden_size, initial_decrease=0.01)
    rule.zero_output()
    ours = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5, 10), (7,))]
    twins = [param.clone().requires_grad_() for param in ours]
    optimizer = LearnedOptimizer([param.requires_grad_() for param in ours], rule)
    reference = torch.optim.Adam([{"params": [twin]} for twin in twins])
    largest, most, gates = 0.0, 0.0, [0.0, 0.0, 0.0]
    for step in range(20):
        for size, param, twin in zip((5.0, 0.3 + step, 20.0), ours, twins):
            param.grad = size * torch.randn(param.shape, generator=generator)
            twin.grad = param.grad.clone()
        sizes = [float(twin.grad.square().mean().sqrt()) for twin in twins]
        shares = [(size / max(sizes)) ** 0.25 for size in sizes]
        decrease = sum(s * float(twin.grad.abs().sum()) for s, twin in zip(shares, twins))
        scores = [  # of a vector 0
            size**2 * twin.numel() ** 0.5 * (twin.dim() > 1) for size, twin in zip(sizes, twins)
        ]
        cosines = [
            max(0.0, -cosine(twin, twin.grad)) * score / max(scores)
            for twin, score in zip(twins, scores)
        ]
        now = [x**2 / (x**2 + 0.15**2) for x in cosines]
        largest, most = max(largest, *sizes), max(most, decrease)
        annealing = (max(sizes) / largest) ** 0.5
        for i, (group, size, twin) in enumerate(zip(reference.param_groups, sizes, twins)):
            momentum = reference.state[twin].get("exp_avg", torch.zeros_like(twin))
            new = (1 - gates[i] * max(0.0, cosine(momentum, twin.grad))) ** 2
            group["lr"] = 0.01 * new * (size / largest) ** 0.25 * annealing / (8 + most)
            gates[i] = max(gates[i], now[i])
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, twins, rtol=0, atol=1e-6)


def test_a_new_rule_is_adam():
    weights = CoordinateLSTM().named_parameters()
    zero = {name for name, weight in weights if not weight.any()} - {"context_bias"}
    assert zero == {
        *("output_weight", "output_context", "output_bias"),
        *("growth_context", "growth_bias"),
    }


def test_state_is_18_numbers_a_coordinate_at_the_default_size():
    state = CoordinateLSTM().init_state(torch.zeros(10, 10))
    assert sum(leaf.numel() for leaf in state.values() if leaf.dim()) == 18 * 100


def test_a_coordinate_that_never_had_a_gradient_keeps_its_value_and_zero_state():
    rule, param = random_lstm(), torch.randn(4, 5)
    state = rule.init_state(param)
    for _ in range(3):
        grad = torch.randn(4, 5)
        grad[1] = 0
        delta, state = advance(rule, param, grad, state, 1.0, 0.0)
        assert not delta[1].any()
        assert delta[0].all()
    for name in ("m", "v", "hidden", "cell"):
        assert not state[name].reshape(-1, 4, 5)[:, 1].any()


def test_rows_without_a_gradient_change_nothing_for_the_others():
    """An embedding's gradient has the same RMS in a small vocabulary and in a large one."""
    rule = random_lstm()
    with torch.no_grad():
        rule.context_weight.zero_()  # the context has the tensor's size and RMS
        rule.context_bias.zero_()
        rule.growth_bias.zero_()  # growth depends on the whole tensor
    grad = torch.randn(3, 5)
    small, _ = advance(rule, torch.ones(3, 5), grad, rule.init_state(grad), 1.0, 0.0)
    padded = torch.cat([grad, torch.zeros(100, 5)])
    large, _ = advance(rule, torch.ones(103, 5), padded, rule.init_state(padded), 1.0, 0.0)
    torch.testing.assert_close(large[:3], small)


def test_chunks_change_nothing(monkeypatch):
    rule, param = random_lstm(), torch.randn(100)
    grads = [torch.randn(100) for _ in range(3)]

    def run():
        state, deltas = rule.init_state(param), []
        for grad in grads:
            delta, state = advance(rule, param, grad, state, 1.0, 0.0)
            deltas.append(delta)
        return deltas[-1], state["hidden"]

    whole = run()
    monkeypatch.setattr(lstm_module, "CHUNK", 16)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([0.1, 10.0, 1e3]), seed=st.integers(0, 9))
def test_without_context_the_scale_of_the_loss_changes_only_the_step_size(scale, seed):
    rule = random_lstm()
    with torch.no_grad():
        rule.context_weight.zero_()  # the context has the gradient's RMS
        rule.growth_bias.zero_()  # growth is in units of the parameter
        rule.context_bias.zero_()
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(20, generator=generator) for _ in range(2))
    plain, _ = advance(rule, param, grad, rule.init_state(param), 1.0, 0.0)
    scaled, _ = advance(rule, param, grad * scale, rule.init_state(param), 1.0, 0.0)
    nat = [8 + float(size.abs().sum()) for size in (grad, grad * scale)]
    torch.testing.assert_close(scaled * nat[1], plain * nat[0], rtol=1e-3, atol=1e-6)


def test_no_derivative_within_an_unroll_is_nan():
    """Not even one that is multiplied by zero, or anomaly detection would stop there."""
    rule, start = random_lstm(), torch.randn(6)
    param, state = start, rule.init_state(start)
    with torch.autograd.set_detect_anomaly(True):
        for _ in range(2):
            delta, state = advance(rule, param, param, state, 1.0, 0.0)
            param = param + delta
        param.square().sum().backward()
    assert rule.output_bias.grad.abs().min() > 0


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-12, 1e12, 3e38])
def test_updates_and_state_are_finite_for_every_size_of_gradient(scale):
    rule, param = random_lstm(), torch.randn(6)
    state = rule.init_state(param)
    for _ in range(3):
        delta, state = advance(rule, param, torch.rand(6) * scale, state, 1.0, 0.0)
        assert torch.isfinite(delta).all()
    assert all(torch.isfinite(leaf).all() for leaf in state.values())


@pytest.mark.parametrize(
    "first, second, equal", [(15, 16, False), (16, 17, True), (16, 5000, True)]
)
def test_steps_after_the_sixteenth_have_its_features(first, second, equal):
    """Meta-training does not go far beyond it, and a rule must not extrapolate."""
    rule, param = random_lstm(), torch.linspace(-1, 1, 6)
    state = rule.init_state(param)
    context = context_of(rule, param, state, param)
    maxima = maxima_of(state)
    contexts = [context_features(context, maxima, torch.tensor(float(n))) for n in (first, second)]
    assert torch.equal(*contexts) == equal


@settings(max_examples=20, deadline=None)
@given(raw=st.floats(-9, 9), seed=st.integers(0, 9), steps=st.sampled_from([8, 0, 9]))
def test_a_tensor_grows_in_the_first_steps_as_far_as_its_gradient_is_radial(raw, seed, steps):
    rule = CoordinateLSTM(growth_steps=steps) if steps != 8 else CoordinateLSTM()
    still = CoordinateLSTM()
    with torch.no_grad():
        rule.growth_bias.fill_(raw)
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(4, 5, generator=generator)
    state = rule.init_state(param)
    for step in range(1, 11):
        # partly radial, beside a tensor with a larger gradient score
        grad = torch.randn(4, 5, generator=generator) - param * (step % 2)
        grad[2] = 0
        statistics = rule.statistics(grad.flatten(), state, param.flatten())
        largest = torch.tensor([20.0, 1, 4 * float(statistics[2]) / 15 * 20, 20, 0, 0, 1, 0, 20])
        score_ratio = 4 * (20 / 15) ** 0.5  # twice the RMS, squared, and more coordinates
        context = rule.cross_tensor_context(torch.stack([statistics, largest]))[0]
        adam, _ = advance(still, param, grad, state, 0.5, 0.0, context)
        delta, state = advance(rule, param, grad, state, 0.5, 0.0, context)
        cosine = max(0.0, -float(torch.cosine_similarity(grad.flatten(), param.flatten(), dim=0)))
        square = (cosine / score_ratio) ** 2
        gate = square / (square + 0.15**2) if step <= steps else 0.0
        growth = math.expm1(math.tanh(raw) * gate)
        grown = 0.5 * growth * param
        grown[2] = 0
        torch.testing.assert_close(delta, adam + grown, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(-1, 7).filter(lambda x: abs(x) > 0.01),
    threshold=st.floats(0.1, 2),
    raw=st.floats(-0.15, 0.15),
)
@example(ratio=0.5, threshold=0.5, raw=0.1)
@example(ratio=3.0, threshold=0.5, raw=0.1)
def test_log_growth_is_proportional_to_the_radial_derivative_from_the_threshold_to_five_times_it(
    ratio, threshold, raw
):
    rules = CoordinateLSTM(growth_threshold=threshold), CoordinateLSTM()
    param, radial = torch.randn(4, 5), ratio * threshold
    grad = -radial * param / (param * param).sum()
    grown = []
    for rule in rules:
        with torch.no_grad():
            rule.growth_bias.fill_(raw)
        state = rule.init_state(param)
        context = context_of(rule, grad, state, param)
        grown.append(
            float(rule.context_shifts(context, maxima_of(state), torch.tensor(1.0))[2].detach())
        )
    gate = 1 / (1 + 0.15**2) if radial > 0 else 0.0
    multiplier = min(max(ratio, 1), 5)
    for growth, factor in zip(grown, (multiplier, 1)):
        assert growth == pytest.approx(math.expm1(math.tanh(factor * raw) * gate), abs=1e-4)


def test_the_context_features_have_the_radial_derivative_and_its_cosine():
    rule, param = CoordinateLSTM(), torch.tensor([3.0, 4.0])
    state = rule.init_state(param)
    for grad, radial, cosine in (([-0.3, -0.4], 2.5, 1.0), ([4.0, -3.0], 0.0, 0.0)):
        context = context_of(rule, torch.tensor(grad), state, param)
        maxima = maxima_of(state)
        found = context_features(context, maxima, torch.tensor(1.0))[-2:].tolist()
        assert found == pytest.approx([math.asinh(radial / 0.125) / 1.5, cosine / 0.5], abs=1e-5)


def test_every_weight_of_the_rule_gets_a_gradient():
    rule, param = random_lstm(), torch.randn(4, 5)
    state = rule.init_state(param)
    for _ in range(2):  # the recurrent weights act from the second step on
        delta, state = advance(rule, param, torch.randn(4, 5), state, 1.0, 0.0)
    delta.square().sum().backward()
    for name, weight in rule.named_parameters():
        assert weight.grad.count_nonzero() == weight.numel(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": -1}, "hidden_size=-1: must lie between 0 and 1024"),
        ({"initial_decrease": 0.0}, "initial_decrease=0.0: must be positive and finite"),
        ({"growth_steps": -1}, "growth_steps=-1: must be 0 or more"),
        ({"growth_threshold": 0.0}, "growth_threshold=0.0: must be positive and finite, or None"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): two numbers strictly between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CoordinateLSTM(**options)


def test_a_vector_does_not_grow_and_does_not_keep_a_matrix_from_growing():
    """A bias that grew would favour some classes in every decision."""
    rule, head, bias = CoordinateLSTM(), torch.randn(5, 10), torch.randn(5)
    rows = []
    for param, size in ((head, 1.0), (bias, 100.0)):  # both gradients are radial
        state = rule.init_state(param)
        flat = param.flatten()
        rows.append(rule.statistics(-size * flat, state, flat))
    gates = radial_gate(rule.cross_tensor_context(torch.stack(rows)))
    assert gates.tolist() == pytest.approx([1 / (1 + 0.15**2), 0], abs=1e-5)
    assert radial_gate(rule.cross_tensor_context(rows[1].unsqueeze(0))).tolist() == [0]  # alone


def test_after_a_radial_gradient_a_tensor_steps_by_what_is_new_in_its_gradient():
    """Almost nothing if the gradient repeats, as in full batches; unchanged if it is orthogonal."""
    rule, param = CoordinateLSTM(), torch.randn(5, 10)
    grad, other = -param, torch.randn(5, 10)  # the gradient makes the tensor grow
    other -= grad * (other * grad).sum() / (grad * grad).sum()
    state = rule.init_state(param)

    def scale(g, without_gate=False):
        context = context_of(rule, g, state, param)
        maxima = maxima_of(state)
        if without_gate:
            maxima = maxima._replace(radial_gate_max=torch.tensor(0.0))
        return scale_of(context, maxima, state["step"] + 1)

    assert scale(grad) == scale(grad, without_gate=True) > 0
    _, state = advance(rule, param, grad, state, 1.0, 0.0)
    gate = 1 / (1 + 0.15**2)
    assert scale(grad) == pytest.approx(scale(grad, True) * (1 - gate) ** 2, rel=1e-4)
    assert scale(other) == pytest.approx(scale(other, True), rel=1e-4)
    assert scale(-grad) == scale(-grad, without_gate=True)


def test_an_outlier_slows_the_steps_after_it_tenfold_at_most():
    """One gradient is a thousand, or a million, times as large. At the first steps it is not
    limited; with `orthogonalize` running maxima decay until there is evidence of learning."""
    steps = 9
    param = torch.randn(5, 10)

    def scales(outlier_at, size=1e3, grad=-param, orthogonalize=True):
        rule = CoordinateLSTM(orthogonalize=orthogonalize)
        state, found = rule.init_state(param), []
        for step in range(1, steps + 1):
            g = grad * (size if step == outlier_at else 1)
            context = context_of(rule, g, state, param)
            maxima = maxima_of(state)
            found.append(scale_of(context, maxima, torch.tensor(float(step))))
            _, state = advance(rule, param, g, state, 1.0, 0.0)
        return found

    plain, late, early = scales(None), scales(7), scales(2)
    assert late[:6] == plain[:6]
    assert late[6] <= plain[6]  # nor is the outlier's own step larger
    assert scales(7, size=1e6)[6] <= plain[6]
    assert plain[8] / late[8] < 4 ** (1 + SHARE_EXPONENT + ANNEALING_EXPONENT) * 1.01
    assert plain[8] / early[8] > 500
    unlearned = {"grad": param}  # the gradient makes the tensor shrink
    head = {**unlearned, "orthogonalize": False}
    assert scales(None, **head)[8] / scales(2, **head)[8] > 500
    ratio = scales(None, **unlearned)[8] / scales(2, **unlearned)[8]
    left = 1e3 * 0.5**7
    decrease = scales(None, **unlearned)[0] ** -1 - 8  # without the outlier
    assert ratio == pytest.approx(
        left ** (SHARE_EXPONENT + ANNEALING_EXPONENT) * (8 + left * decrease) / (8 + decrease),
        rel=1e-3,
    )


@pytest.mark.parametrize("radial, keep", [(0.0, 0.5), (1 / 16, 0.75), (1 / 8, 1.0), (1.0, 1.0)])
def test_running_maxima_decay_until_a_radial_derivative_of_an_eighth_of_a_nat(radial, keep):
    """Whatever the rest of the gradient, such as that of a head that is too large."""
    param, other = torch.randn(5, 10), torch.randn(5, 10)
    other -= param * (other * param).sum() / (param * param).sum()
    grad = 100 * other - radial * param / (param * param).sum()
    for orthogonalize, kept in ((True, keep), (False, 1.0)):
        rule = CoordinateLSTM(hidden_size=0, orthogonalize=orthogonalize)
        state = rule.init_state(param)
        context = context_of(rule, grad, state, param)
        assert radial_gate(context) < 1e-3
        for before, share in ((0.0, kept), (1.0, 1.0)):  # evidence of learning, which is remembered
            maxima = RunningMaxima(*map(torch.tensor, (1e6, 1e6, 1e6, 0.0, before)))
            for maximum in maxima.updated(context, torch.tensor(9.0))[:3]:
                assert float(maximum) == pytest.approx(1e6 * share, rel=1e-3)


def test_when_gradients_vanish_a_radial_head_is_annealed_and_the_body_is_not():
    rule = CoordinateLSTM(hidden_size=0, orthogonalize=True).double()
    head, body = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 10), (10, 10)))
    params, grads = (head, body), (-head, torch.randn(10, 10, dtype=torch.float64))
    states = [rule.init_state(param) for param in params]

    def scales(size, gated_annealing):
        now = [(size * grad).flatten() for grad in grads]
        contexts = cross_tensor_context(
            rule, [statistics_of(rule, *given) for given in zip(params, now, states)]
        )
        maxima = [maxima_of(state) for state in states]
        step = states[0]["step"]
        return [scale_of(*given, step, gated_annealing) for given in zip(contexts, maxima)]

    assert scales(1.0, True) == scales(1.0, False)
    contexts = cross_tensor_context(
        rule, [statistics_of(rule, *given) for given in zip(params, grads, states)]
    )
    for i, (param, grad, context) in enumerate(zip(params, grads, contexts)):
        _, states[i] = advance(rule, param, grad, states[i], 1.0, 0.0, context)
    ratios = [on / off for on, off in zip(scales(0.01, True), scales(0.01, False))]
    for state, ratio in zip(states, ratios):
        gate = float(state["radial_gate_max"])
        assert ratio == pytest.approx(0.01 ** (ANNEALING_EXPONENT * (gate - 1)), rel=1e-6)
    assert ratios[0] < 2 < 9 < ratios[1]


def test_the_number_of_coordinates_bounds_a_step():
    """However small the first-order decrease is."""
    rule, param = CoordinateLSTM(hidden_size=0), torch.zeros(1000, 500)
    state = rule.init_state(param)
    maxima = maxima_of(state)
    for size, decrease in ((1e-9, 500_000 / 45_000), (1e-3, 500.0)):
        grad = torch.full_like(param, size)
        context = context_of(rule, grad, state, param)
        scale = scale_of(context, maxima, torch.tensor(1.0))
        assert scale == pytest.approx(1 / (8 + decrease), rel=1e-4)


@pytest.mark.parametrize(
    "shapes, counted",
    [
        ([(70, 80), (90, 100)], 5600),
        ([(70, 80), (90, 5, 20), (65, 65)], 5600 + 4225),
        ([(70, 80), (64, 100), (100,)], 0),  # a head of 70 classes above narrow matrices
        ([(200, 200)], 0),
    ],
)
@pytest.mark.parametrize("hidden", [0, 17])
def test_the_wide_matrices_but_the_largest_bound_a_step(shapes, counted, hidden):
    """Only coordinates with a gradient count."""
    rule = CoordinateLSTM()
    params = [torch.zeros(shape) for shape in shapes]
    grads = [torch.full_like(param, 1e-9) for param in params]
    grads[0].view(-1)[:hidden] = 0
    states = [rule.init_state(param) for param in params]
    contexts = cross_tensor_context(
        rule, [statistics_of(rule, *given) for given in zip(params, grads, states)]
    )
    bound = 2.29 * max(0, counted - hidden) ** (1 / 3)
    everything = sum(param.numel() for param in params) / 45_000
    for context, state in zip(contexts, states):
        scale = scale_of(context, maxima_of(state), torch.tensor(1.0))
        assert scale == pytest.approx(1 / (8 + max(bound, everything)), rel=1e-4)


def test_the_shape_of_the_whole_tensor_says_whether_a_shard_is_wide():
    rule, shard = CoordinateLSTM(), torch.zeros(35, 80)
    assert float(rule.init_state(shard)["matrix"]) == 1
    assert float(rule.init_state(shard, shape=(70, 80))["matrix"]) == 2


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_an_orthogonalized_direction_has_equal_singular_values_and_keeps_its_norm(
    rows, columns, seed
):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    ours = orthogonalized(direction)
    left, sizes, right = torch.linalg.svd(direction, full_matrices=False)
    converged = sizes > 0.01 * direction.norm()
    expected = left[:, converged] @ right[converged]
    found = left[:, converged].T @ ours @ right[converged].T
    torch.testing.assert_close(
        found / found[0, 0], torch.eye(int(converged.sum())).double(), atol=0.01, rtol=0
    )
    assert float((ours * expected).sum()) > 0
    torch.testing.assert_close(ours.norm(), direction.norm())
    torch.testing.assert_close(orthogonalized(direction.T), ours.T)
    assert not orthogonalized(torch.zeros(rows, columns)).any()


def test_singular_values_of_zero_stay_zero_when_orthogonalized():
    ours = orthogonalized(torch.ones(3, 50) * torch.arange(50))
    torch.testing.assert_close(ours, torch.ones(3, 50) * torch.arange(50), rtol=1e-4, atol=1e-4)


def test_steps_of_narrow_matrices_are_orthogonalized_and_twice_as_long_unless_radial():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 80), (80, 3), (65, 70), (9,))
    plain = CoordinateLSTM().double()
    orthogonalizing = copy.deepcopy(plain)
    orthogonalizing.orthogonalize = True
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    states = [plain.init_state(param) for param in params]
    for step in range(4):
        grads = [0.1 * torch.randn(param.shape, generator=generator) for param in params]
        grads = [grad.double() for grad in grads]
        if step == 2:  # the gradient of the first is radial, with the largest score
            grads[0] = -10 * params[0]
        statistics = [statistics_of(plain, *given) for given in zip(params, grads, states)]
        contexts = cross_tensor_context(plain, statistics)
        for i, (param, grad, context) in enumerate(zip(params, grads, contexts)):
            delta, after = advance(plain, param, grad, states[i], 0.5, 0.1, context)
            orthogonal, same = advance(orthogonalizing, param, grad, states[i], 0.5, 0.1, context)
            assert all(torch.equal(after[name], same[name]) for name in after)
            decay = -0.5 * 0.1 * plain.step_size * param
            maxima = maxima_of(states[i])
            annealed, gated = (scale_of(context, maxima, after["step"], on) for on in (False, True))
            delta = decay + (delta - decay) * gated / annealed
            if i < 2:
                gate = max(float(radial_gate(context)), float(states[i]["radial_gate_max"]))
                gain = 2 - gate if step else 1
                direction = delta - decay
                if step == 0:  # Adam's direction is only the sign
                    direction = -grad * direction.norm() / grad.norm()
                delta = decay + gain * orthogonalized(direction)
            torch.testing.assert_close(orthogonal, delta)
            states[i] = after
        if step == 2:
            assert float(radial_gate(contexts[0])) > 0.9 > 0.1 > float(radial_gate(contexts[1]))
        if step == 3:  # it is remembered
            assert float(radial_gate(contexts[0])) < 0.1 < 0.9 < float(states[0]["radial_gate_max"])


def test_the_fallback_orthogonalizes_nothing():
    assert not random_lstm(orthogonalize=True).fallback().treats_as_matrix((3, 80))


def test_growth_only_is_the_growth_of_the_rule_with_adams_directions():
    rule, param = random_lstm(), torch.randn(4, 5)
    growing = rule.growth_only()
    grad = -param  # radial
    delta, _ = advance(growing, param, grad, growing.init_state(param), 1.0, 0.0)
    twin = rule.fallback()
    with torch.no_grad():
        for name in ("growth_context", "growth_bias"):
            twin.get_parameter(name).copy_(rule.get_parameter(name))
    expected, _ = advance(twin, param, grad, twin.init_state(param), 1.0, 0.0)
    torch.testing.assert_close(delta, expected)
    state = growing.init_state(param)
    assert sum(leaf.numel() for leaf in state.values() if leaf.dim()) == 2 * param.numel()
    assert {name for name, weight in growing.named_parameters() if weight.requires_grad} == {
        *("context_weight", "context_bias", "growth_context", "growth_bias")
    }
