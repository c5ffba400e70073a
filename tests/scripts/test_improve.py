"""scripts/two_level/improve.py: changes to a rule's steps, and a rule that learns to take them."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "two_level"


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def material(script, texts, encoder, tmp_path):
    """The tiny encoder and the texts in a cache, as prepare.py leaves them."""
    prepare = script("prepare")
    own = script("encoder").read_encoder(encoder)
    tokenizer = prepare.AutoTokenizer.from_pretrained(encoder)
    labels = sorted({label for _, label in texts})
    found = [text for text, _ in texts]
    sources = {
        "clinc150": {
            name: [i for i, (_, label) in enumerate(texts) if label == name] for name in labels
        }
    }
    cached = prepare.train_texts(own, tokenizer, sources, found)
    cached.save(tmp_path / "train.safetensors")
    return cached, own


@pytest.fixture
def tasks(script, material):
    """Two LoRA tasks of two steps with a random head."""
    of, (texts, own) = script("tasks"), material

    def make(rng, progress=1.0, **changes):
        shape = {"kind": "lora", "layers": 2, "pooling": "cls", "head": "random", "length": 8}
        sizes = {"ways": 2, "shots": 2, "queries": 2, "steps": 3, "rank": 2}
        spec = of.Spec(own, **{**shape, **sizes, **changes})
        episodes = [texts.draw(rng, spec.ways, spec.shots, spec.queries) for _ in range(2)]
        seed = rng.randrange(1 << 30)
        drawn = script("curriculum").Drawn(spec, 2, False)
        return drawn, lambda: of.TaskBatch(texts, spec, episodes, seed)

    return make


@pytest.fixture
def rule(script):
    """A rule away from its start."""
    torch.manual_seed(0)
    made = script("unroll").TrainedRule()
    with torch.no_grad():
        for weight in made.output.parameters():
            weight.normal_(0, 0.2)
    return made


def test_changes_are_those_of_the_head_and_of_all_else(script, tasks):
    improve = script("improve")
    batch = tasks(random.Random(0))[1]()
    names = [batch.names[i] for group in batch.alike for i in group]
    changes = improve.Changes(first=2.0, later=3.0, body=5.0, growth=0.5, adam=7.0, head_adam=9.0)
    for step, head in ((1, 2.0), (2, 3.0)):
        of_head = [name.startswith("head") for name in names]
        asked = changes.of(batch, step)
        assert asked.rate.tolist() == [head if x else 5.0 for x in of_head]
        assert asked.growth.tolist() == [head if x else 2.5 for x in of_head]
        assert asked.adam.tolist() == [9.0 if x else 7.0 for x in of_head]
    assert sum(of_head) == 2


def test_an_early_rate_falls_to_the_later_one(script, tasks):
    improve = script("improve")
    batch = tasks(random.Random(0))[1]()
    rates = [improve.Changes(adam=0.1, early=8.0).of(batch, step).adam for step in range(1, 14)]
    rates = torch.stack(rates).amax(1)
    assert rates[0].item() == pytest.approx(0.8) and (rates[:10].diff() < 0).all()
    torch.testing.assert_close(rates[10:], torch.full((3,), 0.1))
    ratios = rates[1:11] / rates[:10]
    torch.testing.assert_close(ratios, ratios[:1].expand(10))
    changes = improve.Changes(head_adam=0.1, head_early=32.0)
    rates = torch.stack([changes.of(batch, step).adam.amax() for step in range(1, 9)])
    expected = [3.2, 1.6, 0.8, 0.4, 0.2, 0.1, 0.1, 0.1]
    torch.testing.assert_close(rates, torch.tensor(expected))


def test_a_rate_of_the_head_is_smaller_where_features_are_longer(script, tasks):
    """The logits then move as far."""
    improve = script("improve")
    batch = tasks(random.Random(0))[1]()
    changes = improve.Changes(head_adam=0.6)
    for pooling, scale, rate in (("cls", 1, 0.6), ("unit", 4, 0.15), ("mean", 1, 0.1)):
        batch.spec = replace(batch.spec, pooling=pooling, feature_scale=scale)
        assert changes.of(batch, 1).adam.amax().item() == pytest.approx(rate)


@pytest.mark.parametrize(
    "values", [(0.3, 0.3, 1.5), (0.3, 0.3, 1.5, 0.5, 0.1), (0.3, 0.3, 1.5, 0, 0, 0.2)]
)
def test_the_outputs_aimed_at_decide_as_the_changes_do(script, tasks, rule, values):
    improve, unroll = script("changes"), script("unroll")
    batch = tasks(random.Random(0))[1]()
    states = unroll.initial_states(rule, batch)
    leaves = [x.clone().requires_grad_() for x in batch.start]
    grads = unroll.gradients(batch, leaves, create_graph=False)
    shown = script("lessons").Pupil.of(rule)
    with torch.no_grad():
        measured = unroll.measure(rule, batch, batch.start, grads, states)
        seen = unroll.tensor_leaves(states)
        context = rule.cross_tensor_context(measured.statistics, seen)
        asked = improve.Changes(*values).of(batch, 1)
        aim = improve.aimed_at(shown.outputs.pop(), asked, measured.statistics)
        rule.output.register_forward_hook(lambda *_: aim)
        found = rule.cross_tensor_context(measured.statistics, seen)
    expected = improve.changed(context, asked)
    as_adam, last = asked.adam > 0, improve.LAST_RATE
    assert as_adam.any() == (len(values) > 4)
    # the matrices A of LoRA have no gradient yet, and no rate of theirs is within reach
    order = [i for group in batch.alike for i in group]
    moving = torch.tensor([bool(grads[i].any()) for i in order])
    for columns, chosen in (([improve.RATE, improve.GROWTH, last], moving),
                            (list(range(8)), moving & as_adam)):  # fmt: skip
        assert chosen.any() or not as_adam.any()
        torch.testing.assert_close(
            found[:, chosen][..., columns], expected[:, chosen][..., columns], rtol=1e-3, atol=1e-6
        )


def test_an_error_in_growth_counts_by_the_steps_that_it_stands_for(script, tasks, rule):
    """The same error of the outputs: larger where parameters are large beside the step."""
    changes, unroll = script("changes"), script("unroll")
    batch = tasks(random.Random(0))[1]()
    states = unroll.initial_states(rule, batch)
    grads = unroll.gradients(
        batch, [x.clone().requires_grad_() for x in batch.start], create_graph=False
    )

    def missed(column, factor):
        with torch.no_grad():
            params = [factor * x for x in batch.start]
            statistics = unroll.measure(rule, batch, params, grads, states).statistics
        aim = torch.zeros(*statistics.shape[:2], len(changes.Decisions._fields))
        output = aim.clone()
        output[..., column] = 0.1
        return float(changes.missed(output, aim, statistics))

    assert missed(changes.RATE, 1.0) == missed(changes.RATE, 100.0) == pytest.approx(0.01 / 8)
    assert missed(changes.GROWTH, 100.0) > missed(changes.GROWTH, 1.0) > missed(changes.RATE, 1.0)


def test_steps_of_adam_are_those_of_torch(script, tasks, rule):
    """With AdamW's rates asked for, the rule goes where `torch.optim.Adam` goes."""
    improve, unroll = script("changes"), script("unroll")
    batch = tasks(random.Random(0))[1]()
    changes = improve.Changes(adam=1e-2, head_adam=3e-2)
    params, states = list(batch.start), unroll.initial_states(rule, batch)
    own = [x.clone().requires_grad_() for x in batch.start]
    groups = [
        {"params": [x], "lr": 3e-2 if name.startswith("head") else 1e-2}
        for name, x in zip(batch.names, own)
    ]
    adam = torch.optim.Adam(groups, eps=1e-15)  # which the rule has not
    for step in range(1, 4):
        grads = unroll.gradients(batch, [x.requires_grad_() for x in params], create_graph=False)
        with torch.no_grad():
            measured = unroll.measure(rule, batch, params, grads, states)
            seen = unroll.tensor_leaves(states)
            context = rule.cross_tensor_context(measured.statistics, seen)
            context = improve.changed(context, changes.of(batch, step))
            updates, states = unroll.move(rule, batch, measured, states, context)
            params = [(param + update).detach() for param, update in zip(params, updates)]
        for param, grad in zip(own, unroll.gradients(batch, own, create_graph=False)):
            param.grad = grad
        adam.step()
    for name, param, other in zip(batch.names, params, own):
        torch.testing.assert_close(param, other.detach(), rtol=1e-3, atol=1e-5, msg=name)


def test_changes_of_nothing_change_nothing(script, tasks, rule):
    """The weighted losses are those of the rule's own run."""
    improve, unroll = script("improve"), script("unroll")
    batch = tasks(random.Random(0))[1]()
    with torch.no_grad():
        found, accuracy = improve.judged_with(rule, batch, improve.Changes()).tolist()
        other = improve.judged_with(rule, batch, improve.Changes(later=0.1)).tolist()
    losses, accuracies = (values.mean(1) for values in unroll.adapt(rule, batch))
    assert found != other[0]
    assert found == pytest.approx(float(losses[1:].mean()) / 0.693, rel=0.2)
    assert accuracy == pytest.approx(float(torch.tensor([0, 0.2, 0.4, 0.4]) @ accuracies))


def test_the_search_keeps_what_has_the_lowest_loss_less_accuracy(script, tasks, rule, monkeypatch):
    improve, found = script("improve"), []

    def judged(rule, batch, changes):
        found.append(changes)
        return torch.tensor([1.0 + 0.1 * (changes.body == 0.5), 0.5 + 0.2 * (changes.body == 0.5)])

    monkeypatch.setattr(improve, "judged_with", judged)
    monkeypatch.setattr(improve, "material", lambda _: (None, []))
    monkeypatch.setattr(improve, "batches_of", lambda *_: [tasks(random.Random(0))[1]()])
    state = type("Run", (), {"rule": rule})
    monkeypatch.setattr(improve, "training", lambda *_: state)
    words = ["--encoder", "no", "--cache", "no", "--resume", "no", "--output", "no"]
    kind, best, lines = improve.search("lora pairs, all layers", improve.arguments(words))
    assert (kind, best) == ("lora pairs, all layers", improve.Changes(body=0.5))
    assert len(lines) == len(found) == 1 + 2 + 1 + 4  # as it is, two factors, growth, four rates


def copied(script, rule):
    made = script("unroll").TrainedRule()
    made.load_state_dict(rule.state_dict())
    return made.requires_grad_(False)


def difference(script, rule, teacher, tasks, changes):
    """How far a rule is from its teacher with the changes, on a batch that it was not taught on."""
    lessons = script("lessons")
    batch = tasks(random.Random(1))[1]()
    pupils = lessons.Pupil.of(rule), lessons.Pupil.of(teacher)
    return float(lessons.difference(*pupils, batch, changes).detach())


def test_a_rule_learns_to_take_the_changes_by_itself(script, tasks, rule, monkeypatch):
    improve, lessons, train = script("improve"), script("lessons"), script("train")
    monkeypatch.setattr(lessons, "ASKED", 1.0)
    run, teacher = train.MetaTraining(rule, tasks), copied(script, rule)
    asked = improve.Changes(0.5, 0.5, 1.0)
    before = difference(script, rule, teacher, tasks, asked)
    lessons.teach(run, teacher, tasks, {"lora cls cold, top layers": (asked, tasks)}, 60)
    assert difference(script, rule, teacher, tasks, asked) < before / 2
    assert torch.equal(rule.candidate.weight, teacher.candidate.weight)
    assert all(torch.equal(run.average[name], leaf) for name, leaf in run.params.items())


@pytest.mark.parametrize("follows", [True, False])
def test_another_teacher_is_followed_where_something_is_asked(
    script, tasks, rule, monkeypatch, follows
):
    """A kind of which nothing is asked stays as it is."""
    improve, lessons, train = script("improve"), script("lessons"), script("train")
    monkeypatch.setattr(lessons, "ASKED", 1.0)
    teacher = copied(script, rule)
    teacher.output.bias += 0.3
    before = difference(script, rule, teacher, tasks, improve.Changes())
    asked = improve.Changes() if follows else None
    kinds = {"lora cls cold, top layers": (asked, tasks)}
    lessons.teach(train.MetaTraining(rule, tasks), teacher, tasks, kinds, 60)
    after = difference(script, rule, teacher, tasks, improve.Changes())
    assert after < before / 4 if follows else after > before / 1.1


def test_the_command_goes_on_from_a_state(script, material, tasks, rule, monkeypatch, tmp_path):
    improve, train = script("improve"), script("train")
    monkeypatch.setattr(improve, "KINDS", ["lora cls cold, top layers"])
    monkeypatch.setattr(improve, "drawing", lambda *_: tasks)
    monkeypatch.setattr(improve, "material", lambda _: (material[0], [material[1]]))
    begun = train.MetaTraining(rule, tasks)
    begun.save(tmp_path)
    words = ["--encoder", "no", "--cache", "no", "--resume", str(tmp_path / train.STATE_FILE)]
    changes = {"lora cls cold, top layers": improve.Changes(0.5, 0.5, 1.0)._asdict()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "changes.json").write_text(json.dumps(changes))
    improve.main([*words, "--output", str(tmp_path / "run"), "--updates", "1"])
    after = train.MetaTraining(script("unroll").TrainedRule(), tasks)
    after.restore(tmp_path / "run" / train.STATE_FILE)
    assert after.counts() == begun.counts()
    moved = {n for n, p in after.params.items() if not torch.equal(p, begun.params[n])}
    assert {name.split(".")[0] for name in moved} == {"tensor_cell", "message", "output"}
