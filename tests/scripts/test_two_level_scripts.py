"""scripts/two_level on a tiny encoder: meta-training, its checkpoint, and the commands."""

import gzip
import importlib
import json
import math
import random
from pathlib import Path

import pytest
import torch

from rnnopt import LearnedOptimizer
from rnnopt.errors import InputError
from rnnopt.rules.files import load_rule, read_training
from rnnopt.rules.two_level import TwoLevelLSTM
from rnnopt.tasks.text.estimator.objective.choice import ONE_LABEL
from rnnopt.tasks.text.estimator.objective.pairs import pair_loss

SCRIPTS = Path(__file__).parents[2] / "scripts" / "two_level"
COORDINATES = ("candidate", "coordinate_output", "gates", "gates_context")  # the lower level


@pytest.fixture
def script(monkeypatch):
    """A script by its name, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def data(texts, tmp_path):
    """A folder with one source, the same classes in both splits."""
    folder = tmp_path / "data" / "clinc150"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts)
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder.parent


@pytest.fixture
def batches(script, data, encoder):
    """Batches of two LoRA tasks, two steps long, on both layers of the tiny encoder."""
    prepare, tasks, curriculum = script("prepare"), script("tasks"), script("curriculum")
    own = script("encoder").read_encoder(encoder)
    tokenizer = prepare.AutoTokenizer.from_pretrained(encoder)
    sources, found = prepare.collect(data, ["clinc150"], "train")
    texts = prepare.train_texts(own, tokenizer, sources, found)

    def draw(rng, progress, **changes):
        shape = {"kind": "lora", "layers": 2, "pooling": "mean", "head": "random"}
        sizes = {"ways": 2, "shots": 2, "queries": 2, "length": 8, "steps": 2, "rank": 2}
        spec = tasks.Spec(own, **{**shape, **sizes, **changes})
        episodes = [texts.draw(rng, spec.ways, spec.shots, spec.queries) for _ in range(2)]
        drawn = curriculum.Drawn(spec, len(episodes), False)
        seed = rng.randrange(1 << 30)
        return drawn, lambda: tasks.TaskBatch(texts, spec, episodes, seed)

    return draw


@pytest.fixture
def training(script, batches):
    """A new run with all its weights away from zero, so that all have a gradient."""

    def make(draw=batches):
        torch.manual_seed(0)
        rule = script("unroll").TrainedRule()
        with torch.no_grad():
            for weight in rule.output.parameters():
                weight.normal_(0, 0.1)
        return script("train").MetaTraining(rule, draw, horizon=4)

    return make


def weights_of(training):
    return {name: weight.detach().clone() for name, weight in training.params.items()}


def test_one_meta_step_moves_the_weights_of_both_levels(training):
    run = training()
    before = weights_of(run)
    assert run.meta_step(2, print) == 2
    moved = {name for name, weight in run.params.items() if not torch.equal(weight, before[name])}
    assert moved == set(before)
    assert {name.split(".")[0] for name in moved} > set(COORDINATES)
    assert (run.steps, run.tasks, run.skipped) == (1, 4, 0)


def test_a_resumed_run_ends_with_the_same_weights(training, tmp_path):
    through, first, second = (training() for _ in range(3))
    for _ in range(3):
        through.meta_step(1, print)
    first.meta_step(1, print)
    first.save(tmp_path)
    second.restore(tmp_path / "state.safetensors")
    for _ in range(2):
        second.meta_step(1, print)
    assert second.counts() == through.counts()
    for name, weight in through.params.items():
        assert torch.equal(second.params[name], weight)
        assert torch.equal(second.average[name], through.average[name])


def test_a_batch_that_is_not_finite_is_skipped_and_counted(training, batches):
    drawn = []

    def draw(rng, progress):
        shape, make = batches(rng, progress)
        tasks = make()
        if not drawn:
            tasks.query_inputs = tasks.query_inputs * math.nan
        drawn.append(shape)
        return shape, lambda: tasks

    run, lines = training(draw), []
    assert run.meta_step(2, lines.append) == 1
    assert (run.skipped, run.tasks) == (1, 2)
    assert len(lines) == 1 and "not finite" in lines[0]
    assert all(torch.isfinite(weight).all() for weight in run.params.values())


def test_a_meta_step_without_a_finite_batch_leaves_the_weights(training, batches):
    def draw(rng, progress):
        shape, make = batches(rng, progress)
        tasks = make()
        tasks.inputs = tasks.inputs * math.nan
        return shape, lambda: tasks

    run = training(draw)
    before = weights_of(run)
    assert run.meta_step(1, print) == 0
    assert (run.steps, run.skipped, run.updates) == (1, 1, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in run.params.items())


def test_steps_are_those_of_the_optimizer(script, training, batches):
    """The package's optimizer reaches the same query loss, task by task."""
    unroll, tasks_of = script("unroll"), script("tasks")
    run = training()
    tasks = batches(random.Random(0), 0.0)[1]()
    losses, _ = unroll.adapt(run.rule, tasks)
    rule = TwoLevelLSTM()
    rule.load_state_dict(run.rule.state_dict())
    for task in range(tasks.size):
        shaped = [x[task].view(shape) for x, shape in zip(tasks.start, tasks.shapes)]
        params = [torch.nn.Parameter(x.clone()) for x in shaped]
        optimizer = LearnedOptimizer(params, rule=rule, guard=False)

        def flat(params=params, task=task):  # beside the other task's, which stay
            return [
                torch.stack([p.flatten() if i == task else x[i] for i in range(tasks.size)])
                for p, x in zip(params, tasks.start)
            ]

        for step in range(tasks.spec.steps):
            optimizer.zero_grad()
            logits = tasks.logits(flat(), tasks.inputs, tasks.mask)[task]
            torch.nn.functional.cross_entropy(logits, tasks.labels[task]).backward()
            optimizer.step()
            with torch.no_grad():
                reached = tasks_of.query_losses(tasks.query_logits(flat()), tasks.query_labels)[0]
            # frozen matrices are in half precision, which magnifies the order of a sum
            assert reached[task] == pytest.approx(float(losses[step + 1, task]), abs=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "full", "words": True, "pooling": "cls", "head": "zero", "dropout": 0.1},
        {"kind": "full", "layers": 1, "head": "prototype", "pooling": "unit", "rescale": 0.3},
        {"kind": "head", "layers": 1, "head": "logistic", "batch": 2, "label_noise": 0.5},
        {"layers": 1, "targets": "qkvo", "clip": 0.1, "pooling": "cls"},
        {"kind": "full", "pairs": True, "head": "prototype"},
    ],
    ids=lambda changes: changes.get("kind", "lora"),
)
def test_every_kind_of_task_has_a_finite_meta_gradient(script, training, batches, changes):
    run = training()
    tasks = batches(random.Random(0), 0.0, **changes)[1]()
    for order in (1, 2):
        found = script("unroll").unroll(run.rule, tasks, [0.5, 0.5], order, 1)
        assert found.losses.shape == (3, 2)
        assert all(torch.isfinite(x).all() for x in found.meta_gradient)
        assert any(x.abs().max() > 0 for x in found.meta_gradient)


def test_a_task_of_pairs_is_that_of_the_classifier(script, batches):
    """Its loss is `pair_loss` for each task; its head is made of what the encoder makes by then."""
    changes = {"kind": "full", "pairs": True, "head": "prototype", "pooling": "unit"}
    tasks = batches(random.Random(0), 0.0, **changes)[1]()
    assert not any("head" in name for name in tasks.names)
    trained = tasks.named(tasks.start)
    each = [
        pair_loss(vectors, ONE_LABEL.alike(labels), torch.ones(len(labels)))
        for vectors, labels in zip(
            tasks.features(trained, tasks.inputs, tasks.mask), tasks.labels, strict=True
        )
    ]
    assert float(tasks.support_loss(tasks.start)) == pytest.approx(float(sum(each)), rel=1e-5)
    moved = [x + 0.05 * torch.randn_like(x) for x in tasks.start]
    trained = tasks.named(moved)
    support, query = (
        torch.nn.functional.normalize(tasks.features(trained, *each), dim=-1)
        for each in ((tasks.inputs, tasks.mask), (tasks.query_inputs, tasks.query_mask))
    )
    plain, best, _ = tasks.query_losses(moved)
    assert torch.equal(plain, best)  # its temperature is fitted too
    logits = tasks.query_logits(moved)
    for task, labels in enumerate(tasks.labels):
        means = torch.stack([support[task][labels == way].mean(0) for way in range(2)])
        distances = torch.cdist(query[task], means).square()
        gaps = logits[task][:, 0] - logits[task][:, 1]
        nearer = distances[:, 1] - distances[:, 0]
        # a linear head of class means: twice the difference is that of distances, but for a shift
        assert torch.allclose(gaps - gaps[0], (nearer - nearer[0]) * 0.5, atol=1e-4)


def test_second_order_differs_from_first_order(script, training, batches):
    run = training()
    tasks = batches(random.Random(0), 0.0)[1]()
    first, second = (
        script("unroll").unroll(run.rule, tasks, [0.5, 0.5], order, 8) for order in (1, 2)
    )
    assert torch.equal(first.losses, second.losses)
    assert any(not torch.equal(x, y) for x, y in zip(first.meta_gradient, second.meta_gradient))


def test_the_checkpoint_loads(training):
    run = training()
    run.restore(SCRIPTS / "checkpoint.safetensors")
    assert run.steps >= 400 and run.tasks >= 2000
    assert all(torch.isfinite(weight).all() for weight in run.average.values())


def test_another_file_is_refused(script, training, tmp_path):
    other = script("train").STATE_FILE
    training().save(tmp_path)
    with pytest.raises(InputError, match=f"no state of a run with this rule.*{other}"):
        training().restore(tmp_path / "rule.safetensors")


def test_the_commands_follow_each_other(script, monkeypatch, data, encoder, tmp_path, capsys):
    prepare, train, evaluate = (script(name) for name in ("prepare", "train", "evaluate"))
    monkeypatch.setattr(prepare, "SMALL", {"small_32x1": (32, 1, 3)})
    monkeypatch.setattr(prepare, "LONGEST", 16)
    cell = evaluate.Cell("clinc150", 2, 2, "lora", 1, "unit", "prototype")
    monkeypatch.setattr(evaluate, "CELLS", {"A": cell})
    cache, run = tmp_path / "cache", tmp_path / "run"
    places = ["--encoder", str(encoder), "--cache", str(cache)]
    prepare.main(["--data", str(data), *places])
    end = capsys.readouterr().out.splitlines()[-1]
    assert end.startswith("small_32x1: 3 steps")
    train.main([*places, "--output", str(run), "--meta-steps", "1", "--tasks", "1"])
    end = capsys.readouterr().out.splitlines()[-1]
    assert end.startswith("end: meta-step 1") and end.endswith(" 0 batches skipped")
    rule = load_rule(run)
    assert type(rule) is TwoLevelLSTM and read_training(run)["steps"] == 1
    figures = tmp_path / "figures.jsonl"
    words = [str(run / "rule.safetensors"), *places, "--output", str(figures)]
    words += ["--cells", "A", "--episodes", "2", "--steps", "1", "--rates", "1e-2"]
    evaluate.main(words)
    table = capsys.readouterr().out
    assert table.count("±") == 3 * 2 * 2  # methods, metrics, numbers of steps
    evaluate.main(words)  # from the file
    assert capsys.readouterr().out == table
    assert len(figures.read_text().splitlines()) == 3
    kinds, unroll = [], train.unroll

    def spy(rule, tasks, *rest):
        kinds.append(tasks.spec.kind)
        return unroll(rule, tasks, *rest)

    monkeypatch.setattr(train, "unroll", spy)
    words = ["--resume", str(run), "--output", str(tmp_path / "heads"), "--kinds", "head"]
    train.main([*places, *words, "--meta-steps", "3", "--tasks", "2"])
    assert kinds == 6 * ["head"]


@pytest.fixture
def pack(script, monkeypatch, data, encoder, tmp_path):
    """A folder that pack.py filled, and the arguments that name it."""
    prepare, packing = script("prepare"), script("pack")
    monkeypatch.setattr(prepare, "SMALL", {"small_32x1": (32, 1, 3)})
    monkeypatch.setattr(prepare, "LONGEST", 16)
    monkeypatch.setattr(
        packing, "SPLITS", {split: ["clinc150"] for split in ("train", "val", "test")}
    )
    places = ["--data", str(data), "--encoder", str(encoder), "--cache", str(tmp_path / "cache")]
    prepare.main(places)
    packing.main([*places, "--output", str(tmp_path / "pack")])
    return tmp_path / "pack"


def test_classes_of_words_hold_their_word_and_are_disjoint(script):
    texts = script("texts")
    made = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 45, (400, 20), generator=made, dtype=torch.int32)
    lengths = torch.randint(4, 20, (400,), generator=made)
    none = torch.zeros(0, dtype=torch.long)
    plain = texts.Texts({"own": {"a": [0], "b": [1]}}, tokens, lengths, {}, none, {}, tokens)
    found = texts.by_word(plain).sources
    assert found == texts.by_word(plain).sources  # the same every time
    assert found.pop("own") == plain.sources["own"]
    assert len(found) == texts.BY_WORD_SOURCES and len({str(own) for own in found.values()}) > 1
    for classes in found.values():
        held = [text for own in classes.values() for text in own]
        assert len(held) == len(set(held)) and len(classes) > 5
        for word, own in classes.items():
            assert texts.LEAST <= len(own) <= texts.OF_WORD[1]
            for text in own:
                end = min(int(lengths[text]), texts.WITHIN) - 1  # the last token is the separator
                assert int(word) in tokens[text, 1:end]


def test_a_pack_holds_the_same_encoders_and_texts(script, pack, encoder, tmp_path):
    read = script("encoder")
    whole, packed = read.read_encoder(encoder), read.read_encoder(pack / "encoder")
    assert packed.vocabulary == len(whole.words) > len(packed.words)
    texts, cached = (
        script("texts").read_texts(folder / "train.safetensors")
        for folder in (pack, tmp_path / "cache")
    )
    episode = cached.draw(random.Random(0), 2, 2, 2)[0]
    _, tokens, mask, _ = cached.batch([episode], 16)
    _, renumbered, _, _ = texts.batch([episode], 16)
    hidden = whole.run(whole.weights, range(whole.layers), whole.embed(tokens), mask)
    found = packed.run(packed.weights, range(packed.layers), packed.embed(renumbered), mask)
    torch.testing.assert_close(found, hidden, rtol=2e-2, atol=2e-2)  # half precision
    small, same = (
        read.read_small(folder / "small_32x1.safetensors", teacher)
        for folder, teacher in ((tmp_path / "cache", whole), (pack, packed))
    )
    torch.testing.assert_close(same.embed(renumbered), small.embed(tokens), rtol=2e-2, atol=2e-2)


def test_the_core_cells_of_a_pack_make_a_table(script, pack, monkeypatch, tmp_path, capsys):
    evaluate, table = script("evaluate"), script("core_table")
    cell = evaluate.Cell("clinc150", 10, 1, "head", 1, "unit", "prototype")
    cells = {"core-a-head-x": cell, "core-b-head-x": cell}
    monkeypatch.setattr(evaluate, "CORE", cells)
    monkeypatch.setattr(evaluate, "CELLS", {**cells, "A": cell})
    rule, figures = tmp_path / "rule.safetensors", tmp_path / "figures.jsonl"
    script("rnnopt.rules.files").save_rule(TwoLevelLSTM(), rule, {})
    words = [str(rule), "--encoder", str(pack / "encoder"), "--cache", str(pack)]
    words += ["--cells", "core", "--split", "test", "--episodes", "3", "--steps", "40", "--free"]
    evaluate.main([*words, "--output", str(figures)])
    capsys.readouterr()
    table.main([str(figures)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| a-head-x | ") and "±" in lines[2]
    assert lines[-1] == "0 cells left out"
    targets = lines[7 : lines.index("", 7)]
    assert len(targets) == len(table.TARGETS)
    assert all(" | 2 | " in line for line in targets)  # both cells count
    # the rule, five rates, three without tuning, and logistic regression have one line each
    settings = [line for line in lines if line.startswith("| head | 2 | ")]
    assert len(settings) == 10
    assert settings[0].startswith("| head | 2 | the rule | ")
    after_three = float(settings[0].split(" | ")[3])
    for line in settings[1:]:
        mean, more = line.split(" | ")[3:5]
        assert after_three - float(mean) == pytest.approx(float(more.split()[0]), abs=2e-3)


@pytest.mark.slow
def test_two_processes_take_the_meta_step_of_one(script, pack, tmp_path):
    train, weights = script("train"), []
    for count in ("1", "2"):
        run = tmp_path / f"run{count}"
        places = ["--encoder", str(pack / "encoder"), "--cache", str(pack), "--output", str(run)]
        train.main([*places, "--meta-steps", "1", "--tasks", "3", "--processes", count])
        weights.append(load_rule(run).state_dict())
    for one, two in zip(*(each.values() for each in weights)):
        torch.testing.assert_close(one, two)


def test_processes_share_batches_by_their_cost(script, training, monkeypatch):
    run, shares = training(), []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(run._own([1.0, 5.0, 2.0, 2.0]))
    assert shares == [[1], [2, 3, 0]]


def test_a_rise_above_the_lowest_loss_so_far_is_paid_for(script):
    unroll = script("unroll")
    loss, lower = torch.tensor([0.5]), torch.tensor([0.3])
    even = unroll.meta_loss_of(loss, loss, loss, 3)
    risen = unroll.meta_loss_of(loss, loss, lower, 3)
    assert float(even) == pytest.approx(0.5 / math.log(3))
    assert float(risen - even) == pytest.approx(unroll.ABOVE_LOWEST * 0.2 / math.log(3))


@pytest.mark.parametrize("part", ["memory", "message", "coordinate-lstm", "last", "growth"])
def test_what_a_part_that_is_left_out_knew_makes_no_difference(script, training, part):
    rule, fields = training().rule, script("parts").Decisions._fields
    states = [rule.init_state(torch.zeros(6), (2, 3)) for _ in range(3)]
    for state in states:
        state.update({name: torch.rand_like(leaf) for name, leaf in state.items()})
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    statistics = torch.rand(3, 16).exp()

    def decide(**changed):
        context = rule.cross_tensor_context(statistics, {**stacked, **changed})
        return dict(zip(fields, context[:, : len(fields)].unbind(-1)))

    memory = {"hidden": torch.rand(3, 24), "memory": torch.rand(3, 24)}
    other = {"fallen": stacked["fallen"] + torch.tensor([0, 0, 2.0])}
    assert not torch.equal(decide(**memory)["rate"], decide()["rate"])
    assert not torch.equal(decide(**other)["growth"][:2], decide()["growth"][:2])
    script("parts").leave_out(rule, [part])
    if part == "memory":
        assert all(map(torch.equal, decide(**memory).values(), decide().values()))
    elif part == "message":
        assert torch.equal(decide(**other)["growth"][:2], decide()["growth"][:2])
    else:
        decided = decide()[{"coordinate-lstm": "cell"}.get(part, part)]
        assert torch.equal(decided.abs(), torch.zeros(3))


def test_a_part_stays_out_in_meta_training_and_when_it_goes_on(script, training, batches, tmp_path):
    whole = training()
    whole.save(tmp_path)
    make = script("train").MetaTraining
    through, first, second = (make(training().rule, batches, 4, without=["last"]) for _ in range(3))
    for run in (through, first):
        run.restore(tmp_path / "state.safetensors")
        run.meta_step(1, print)
    first.save(tmp_path)
    second.restore(tmp_path / "state.safetensors")
    for run in (through, second):
        run.meta_step(1, print)
    row = script("parts").Decisions._fields.index("last")
    for weights in (second.params, second.average):
        assert not weights["output.weight"][row].any() and not weights["output.bias"][row].any()
    assert not torch.equal(second.params["output.weight"], whole.params["output.weight"])
    for name, weight in through.average.items():
        assert torch.equal(second.average[name], weight)


def test_without_second_order_the_meta_gradient_is_another_one(script, training, batches, tmp_path):
    """And without nothing the same, but the averaged weights begin anew."""
    training().save(tmp_path)
    make = script("train").MetaTraining
    found = {}
    for without in ([], ["nothing"], ["second-order"]):
        run = make(training().rule, batches, 4, without=without)
        run.restore(tmp_path / "state.safetensors")
        if not without:
            run.averaged = 50  # as of a run that has lasted for long
        run.meta_step(1, print)
        found["".join(without)] = run
    whole, control, first = (found[name].params for name in ("", "nothing", "second-order"))
    for name, weight in whole.items():
        assert torch.equal(control[name], weight)
    assert not torch.equal(first["output.weight"], whole["output.weight"])
    old, new = (found[name].average["output.weight"] for name in ("", "nothing"))
    start = training().params["output.weight"]
    assert (new - start).norm() > (old - start).norm()


def test_differences_are_paired_over_the_episodes_of_a_setting(script, tmp_path, capsys):
    differences = script("differences")
    made = torch.Generator().manual_seed(0)

    def entry(name, batch, judged=8):
        figures = {x: torch.rand(judged, 5, generator=made).tolist() for x in ("loss", "accuracy")}
        setting = {"cell": "j", "split": "val", "batch": batch, "label_noise": 0.2}
        return {"method": name, **setting, **figures}

    whole, part = entry("whole.safetensors 1", 8), entry("part.safetensors 2", 8)
    short = [entry("whole.safetensors 1", None), entry("part.safetensors 2", None, judged=6)]
    alone = entry("part.safetensors 2", 4)
    others = [{**whole, "method": "logistic regression"}, *short, alone]
    file = tmp_path / "figures.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in (whole, part, *others)))
    differences.main([str(file), "--of", "whole", "--steps", "3", "10"])
    *rows, last = capsys.readouterr().out.strip().splitlines()
    assert last == "3 settings of 2 rules"
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:-1]]
    assert [row[0] for row in rows] == ["whole", "part", "whole", "part"]  # none of `alone`
    assert "minibatches of 8, 20% of the labels wrong" in rows[0][1]
    more = torch.tensor(part["loss"][3]) - torch.tensor(whole["loss"][3])
    error = 2.776 * float(more.std()) / math.sqrt(5)
    assert rows[1][2] == f"{float(more.mean()):+.3f} ± {error:.3f}"
    assert rows[0][5] == f"{sum(whole['accuracy'][7]) / 5:.3f}"
    assert (rows[3][3], rows[3][5]) == ("-", "-") and rows[3][2] != "-"
