"""What `rnnopt inspect` tells of a rule, held against rules whose answer is known."""

import json
import math

import pytest
import torch
from rule_table import RULES, random_lstm

from rnnopt import SGD, Adam, InputError, LearnedOptimizer, save_rule
from rnnopt.cli.main import main
from rnnopt.data.files import read_corpus
from rnnopt.evaluation.inspection import GRADIENTS, RATIOS, inspect_rule, inspection_text
from rnnopt.rules.two_level import Decisions
from rnnopt.tasks.adaptation import adapt_and_judge
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.tasks import TextTasks

STEPS = 4


@pytest.fixture(scope="module")
def classifiers(encoder):
    return {
        tune: Classifier.load(encoder, tune=tune, ways=3, device=torch.device("cpu"))
        for tune in ("full", "lora")
    }


@pytest.fixture
def inspected(classifiers, csv_file):
    """Inspect a rule on the first task."""

    def run(rule, tune="full", **options):
        classifier = classifiers[tune]
        sampler = EpisodeSampler(read_corpus(csv_file), ways=3, shots=2, queries=2, seed=0)
        task = TextTasks(sampler, classifier).load(0)
        classifier.reset(3, seed=0)
        return inspect_rule(rule, classifier, task, STEPS, **options), classifier, task

    return run


def test_adam_has_no_distance_from_adam_and_a_first_step_of_its_rate(inspected):
    found, _, _ = inspected(Adam(1e-3))
    for kind, distances in found.adam_distance.items():
        # float32 parameters take in an update of 1e-3 to 1e-4 of it
        assert distances == pytest.approx([0] * STEPS, abs=1e-3), kind
        assert found.step_size[kind][0] <= 1e-3 * (1 + 1e-3)
    assert found.step_size["head"][0] == pytest.approx(1e-3, rel=1e-2)


def test_a_rule_that_climbs_is_opposite_to_adam(inspected):
    rule = Adam(-1e-3)
    found, _, _ = inspected(rule)
    assert all(d == pytest.approx(2, abs=1e-3) for d in found.adam_distance["head"])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_to_look_at_a_run_changes_nothing_in_it(name, tune, inspected):
    rule = RULES[name]()
    _, classifier, task = inspected(rule, tune)
    seen = [param.detach().clone() for _, param in classifier.trainable()]
    classifier.reset(3, seed=0)
    params = [param for _, param in classifier.trainable()]
    adapt_and_judge(classifier, LearnedOptimizer(params, rule), task, (STEPS,))
    assert all(torch.equal(a, b) for a, b in zip(seen, params))


def test_the_surface_of_gradient_descent_is_a_plane_of_the_gradient_alone(inspected):
    """Its update is -rate g, whatever the memory; here every tensor has an RMS of its own."""
    found, _, _ = inspected(SGD(0.1), kind="layer norm", at_step=2)
    for j in range(len(RATIOS)):
        column = [row[j] for row in found.surface.update]
        if column[0] is not None:
            slope = column[-1] / GRADIENTS[-1]
            assert slope < 0
            assert column == pytest.approx([slope * g for g in GRADIENTS], abs=1e-4 * abs(slope))


def test_the_surface_of_momentum_falls_with_gradient_and_memory(inspected):
    found, _, _ = inspected(Adam(1e-3), kind="attention matrix", at_step=3)
    rows = found.surface.update
    filled = [j for j, value in enumerate(rows[0]) if value is not None]
    assert len(filled) >= 3
    for j in filled:
        column = [row[j] for row in rows]
        assert column[0] > column[len(column) // 2] > column[-1]  # g = -3, 0, 3 RMS
    still = rows[GRADIENTS.index(0.0)]
    assert still[filled[0]] > 0 > still[filled[-1]]  # against where the memory points


def test_the_surface_passes_through_what_the_rule_did(inspected, monkeypatch):
    """At a coordinate's own gradient the response is the update that was taken."""
    import rnnopt.evaluation.inspection as module

    rule, kept = random_lstm(), {}
    for name in ("orthogonal_adam", "orthogonal_gradient"):  # of the whole matrix: left out
        row = Decisions._fields.index(name)
        rule.output.weight.data[row], rule.output.bias.data[row] = 0, 0

    def spy(rule, seen, known):
        kept.update(seen=seen, known=known)
        return original(rule, seen, known)

    original = module._binned
    monkeypatch.setattr(module, "_binned", spy)
    monkeypatch.setattr(module, "SAMPLE", 1000)  # of 8 times 1024 coordinates
    inspected(rule, kind="attention matrix", at_step=STEPS)
    assert kept["seen"]
    for one in kept["seen"]:
        stride = math.ceil(one.owner.numel() / one.param.numel())
        assert stride == 9
        grad = one.owner.grad.reshape(-1)[::stride]
        known = kept["known"][one.owner]
        with torch.no_grad():
            update, _ = module.advance(rule, one.param, grad, one.state, 1.0, 0.0, known)
        after = one.owner.detach().reshape(-1)[::stride]
        torch.testing.assert_close(one.param + update, after, rtol=1e-5, atol=1e-6)
        # and elsewhere: gradients in units of the whole tensor's RMS, all else as it was
        rms = one.owner.grad.square().mean().sqrt()
        responses = one.responses(rule, known)
        for value, response in zip(GRADIENTS[::8], responses[::8]):
            there = torch.full_like(one.param, value) * rms
            with torch.no_grad():
                update, _ = module.advance(rule, one.param, there, one.state, 1.0, 0.0, known)
            torch.testing.assert_close(response, update)


def test_lora_kinds_and_a_factor_without_gradient(inspected):
    found, _, _ = inspected(random_lstm(), "lora")
    assert set(found.coordinates) == {"LoRA A", "LoRA B", "head"}
    with pytest.raises(InputError, match="choose another --at-step or --kind"):
        inspected(random_lstm(), "lora", kind="LoRA A", at_step=1)


def test_where_a_rule_does_nothing_there_is_no_distance(inspected):
    found, _, _ = inspected(SGD(0.0))
    assert all(set(distances) == {None} for distances in found.adam_distance.values())
    assert all(sizes == [0.0] * STEPS for sizes in found.step_size.values())
    assert " -" in inspection_text(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "LoRA A"}, "--kind 'LoRA A': no such tensor trains; choose from embedding, att"),
        ({"at_step": 0}, "--at-step 0: must lie between 1 and the last step, 4"),
        ({"at_step": 5}, "--at-step 5: must lie between 1 and the last step, 4"),
    ],
)
def test_places_that_are_not_there(options, message, inspected):
    with pytest.raises(InputError, match=message):
        inspected(Adam(1e-3), **options)


def inspect(csv_file, encoder, *more):
    command = ["inspect", *more, "--data", csv_file, "--encoder", encoder, "--ways", "2"]
    return main([str(word) for word in [*command, "--queries", "2", "--steps", "3"]])


def test_the_command_prints_tables_and_writes_a_picture_or_figures(
    csv_file, encoder, tmp_path, capsys
):
    save_rule(random_lstm(), tmp_path / "rule")
    for name in ("look.png", "look.json"):
        assert inspect(csv_file, encoder, tmp_path / "rule", "--output", tmp_path / name) == 0
    printed = capsys.readouterr().out
    assert "RMS of the update" in printed and "distance from Adam's direction" in printed
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "look.json").read_text())
    assert len(found["surface"]["update"]) == len(GRADIENTS)
    assert len(found["surface"]["update"][0]) == len(RATIOS)
    assert len(found["losses"]) == 3


def test_a_rule_can_be_inspected_with_nothing_but_the_package(capsys):
    assert main(["inspect", "--steps", "1", "--shots", "1", "--kind", "head"]) == 0
    assert "update of head at step 1" in capsys.readouterr().out


def test_an_output_of_another_kind_is_refused_before_anything_is_run(csv_file, encoder, capsys):
    assert inspect(csv_file, encoder, "--output", "look.pdf") == 2
    assert "its name must end in .png or .json" in capsys.readouterr().err
