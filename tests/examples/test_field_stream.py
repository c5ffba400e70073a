"""Streams: changes that are noticed, memory that is begun again, and a run on made-up domains."""

import itertools
import json

import domains
import field
import pytest
import stream
import torch

import rnnopt
from tests.encoders import tiny_bert


def make_domain(labels, drawn=0):
    """Four texts of each label, in directions that even and odd labels share in part."""
    torch.manual_seed(drawn)
    y = torch.tensor(labels).repeat_interleave(4)
    x = torch.eye(6)[y] + torch.eye(6)[y % 2] + 0.1 * torch.randn(len(y), 6)
    return domains.Domain({("set", str(label)) for label in labels}, x, y, x.clone(), y)


@pytest.mark.parametrize(("jump", "noticed"), [(3.0, True), (0.2, False)])
def test_a_loss_far_above_those_before_is_noticed_once(jump, noticed):
    detector = stream.ChangeDetector()
    falling = [1.5, 1.2, 1.0, 0.9, 0.85, 0.8]
    assert not any(detector.changed(loss) for loss in falling)
    assert detector.changed(0.8 + jump) is noticed
    assert not detector.changed(0.8 + jump)


@pytest.mark.parametrize("begins", ["never", "told", "notices"])
def test_the_memory_is_begun_again_as_asked(begins):
    made = []

    def optimizer(params):
        made.append(1)
        return torch.optim.SGD(params, lr=0.5)

    model, run = stream.Model(6, 6), stream.Run()
    method = stream.Method(optimizer, begins)
    stream.follow(method, model, [make_domain([0, 1]), make_domain([2, 3])], 0, run)
    assert len(made) == (1 if begins == "never" else 2)
    assert run.noticed == [begins == "notices"] and run.false_alarms == 0
    assert len(run.accuracy) == 1 and 0 < run.recovery[0] < stream.STEPS
    assert run.forgetting[0] > 0.5  # all outputs of the first domain are overruled


def test_replay_forgets_less():
    kept = {}
    for replay in (False, True):
        model, run = stream.Model(6, 6), stream.Run()
        method = stream.Method(lambda params: torch.optim.SGD(params, lr=0.5), replay=replay)
        stream.follow(method, model, [make_domain([0, 1]), make_domain([2, 3])], 0, run)
        kept[replay] = run.forgetting[0]
    assert kept[True] < kept[False] / 2


def test_a_task_changes_its_domain_once_for_support_and_query_alike():
    """A model that knows the first domain only has a low loss before the change, and none after."""
    model = stream.Model(6, 6)
    with torch.no_grad():
        model.head.weight.copy_(20 * torch.eye(6))
        model.head.weight[:, 2:] = 0
        model.head.bias.zero_()
    changes = set()
    for number in range(30):
        both = make_domain([0, 1]), make_domain([2, 3])
        task = stream.AcrossChange(both, {}, number, stream.STEPS)
        known = [
            [float(loss(model, step).detach()) < 1 for step in range(stream.STEPS)]
            for loss in (task.support_loss, task.query_loss)
        ]
        assert known[0] == known[1]
        at = known[0].index(False)
        assert known[0] == [step < at for step in range(stream.STEPS)]
        changes.add(at)
    assert min(changes) >= stream.STEPS // 4 and max(changes) <= stream.STEPS * 3 // 4
    assert len(changes) > 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Reviews of three kinds of product, and a set of six topics, in three parts."""
    folder = tmp_path_factory.mktemp("stream")
    for name in ("reviews", "topics"):
        (folder / name).mkdir()
        for stem in ("train", "val", "test"):
            groups = (
                [(kind, word) for kind in "abc" for word in ("good", "bad")]
                if name == "reviews"
                else [(None, f"{stem}{topic}") for topic in range(6)]
            )
            rows = [
                {"text": f"{word} {kind or ''} {number}", "label": word}
                | ({"domain": f"{kind}{stem}"} if kind else {})
                for kind, word in groups
                for number in range(8)
            ]
            (folder / name / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options(data, output, **more):
    more = {"reviews": "reviews", "topics": ["topics"], "changes": 50, **more}
    return field.Options(data, output, meta_steps=1, episodes=2, small=True, more=more)


def test_parts_share_no_domain_and_one_domain_does_not_follow_itself(data, tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "HELD_OUT", 10)
    texts = domains.read(options(data, tmp_path))
    names = {part: {(domain, label) for domain, label, _ in found} for part, found in texts.items()}
    assert not names["test"] & (names["train"] | names["validation"])
    assert not names["train"] & names["validation"]
    found = domains.Streams(texts["test"], torch.zeros(len(texts["test"]), 2)).stream(30, "seed")
    assert all(first.keys != second.keys for first, second in itertools.pairwise(found))
    again = domains.Streams(texts["test"], torch.zeros(len(texts["test"]), 2)).stream(30, "seed")
    assert [one.keys for one in found] == [one.keys for one in again]


def test_texts_that_can_not_be_used_are_named(data, tmp_path):
    with pytest.raises(rnnopt.InputError, match=r"--topics absent: none has a file val"):
        domains.read(options(data, tmp_path, reviews="absent", topics=["absent"]))
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "train.jsonl").write_text('{"text": "", "label": "a"}')
    with pytest.raises(rnnopt.InputError, match=r"line 1: text '' and label 'a'.*delete the row"):
        domains.read(options(tmp_path, tmp_path))


def test_a_run_has_every_method_and_says_what_was_noticed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(domains, "HELD_OUT", 10)
    monkeypatch.setattr(stream, "STEPS", 4)
    monkeypatch.setattr(stream, "RATES", (1e-2, 1e-1))
    stream.main(options(data, tmp_path, encoder=str(tiny_bert(tmp_path / "encoder"))))
    shown = capsys.readouterr().out
    for row in ("shipped rule, notices changes", "replay", "told to begin again", "noticed"):
        assert row in shown
    figures = json.loads((tmp_path / "stream.json").read_text())["methods"]
    assert len(figures["AdamW, best rate"]["values"]["recovery"]) == 2
    assert (tmp_path / "stream.png").stat().st_size > 0
