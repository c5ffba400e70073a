"""Sports news and finance news: what meta-learning gives over conventional fine-tuning.

    python scripts/case_study_news.py --data DATA --encoder MINILM --output news
    python scripts/case_study_news.py --output news --table news/table.md

DATA holds the folders bbcsport5, reuters31 and huffpost36, which are learned from, and agnews_test
and tnews15_zh (Chinese: the far case), which no method has seen anything of. MINILM is
all-MiniLM-L6-v2, a hub name or a folder; any encoder will do.

Judged are classes that nothing was trained on: 2 of bbcsport5, 11 of reuters31, all of the others.
The five sports can't be divided into 60/20/20 % with tasks in every part, which takes six classes:
three are learned from, the two that the seed draws are judged by, in 2-way tasks, and validation is
left to reuters31 and huffpost36. AG News has 4 classes; the rest is 5-way. Topics do recur: the
headlines learned from include SPORTS and BUSINESS.

The same episodes for all; each of what is trained first gets the same number of tries (--tries), of
which validation classes choose one:

- `adamw`: fine-tuning from the pretrained weights, its rate tuned on validation classes for every
  number of steps, 8 rates;
- `multitask-adamw`: the same after supervised training on all classes learned from, with a joint
  head (`rnnopt.tasks.text.multitask`); validation classes choose its rate and number of steps;
- `maml`, `meta-sgd`: of --order 2; at test time their rate is multiplied by one of 8 factors,
  tuned as AdamW's rate is; `-as-trained` is without;
- `rule`: the learned rule, with nothing set; --rule takes one that is there. `multitask-rule` is it
  from the values of the multi-task training, `init-rule` from those learned together with a rule;
- `nearest-mean` and `logistic` on frozen embeddings.

What is trained is the same everywhere (--tune). An episode has as many query texts of every class,
so macro recall is the accuracy.

Everything goes on where it was stopped: give the same command again. --episodes may rise. --table
writes Markdown, and the figure beside it, from the JSON files there are.

Time: with the options of docs/results/news.md 70 minutes on one core of a busy server processor;
with the defaults not measured, by estimate a day. All of it with 2 meta-steps, 2 episodes and 2 steps: 80 s.
Last line: how many sets are finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import progress
from benchmark_quality import INTERRUPTED, Deadline
from case_study_table import write_case_study

from rnnopt.cli.main import main as rnnopt
from rnnopt.cli.settings.loading import choose_device
from rnnopt.data.corpus import Corpus, class_name, merge
from rnnopt.data.files import read_corpus
from rnnopt.data.overlap import seen_in
from rnnopt.data.splits import (
    Splits,
    check_disjoint,
    class_sketches,
    overlapping_classes,
    read_splits,
    source_files,
)
from rnnopt.errors import InputError
from rnnopt.evaluation.baselines import Baseline
from rnnopt.evaluation.comparison import LEARNED, Comparison, default_budgets
from rnnopt.evaluation.journal import Journal
from rnnopt.rules.files import SavedRule, load_rule, read_training, rule_fingerprint
from rnnopt.storage.files import write_atomically
from rnnopt.storage.provenance import versions
from rnnopt.storage.run_folder import INIT_FOLDER
from rnnopt.tasks.episodes import EpisodeSampler
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import encoder_name
from rnnopt.tasks.text.frozen import DIRECT
from rnnopt.tasks.text.init_folder import fingerprint, read_init
from rnnopt.tasks.text.multitask import MultitaskSettings, MultitaskTraining
from rnnopt.tasks.text.start import TextStart
from rnnopt.tasks.text.tasks import TextTasks

SOURCES = ("bbcsport5", "reuters31", "huffpost36")
JUDGED_SOURCES = ("bbcsport5", "reuters31")  # huffpost36 has no test classes
NEW = ("agnews_test", "tnews15_zh")
WAYS = 5
TRAINING_WAYS = (2, 3, 5)
HELD_SPORTS, LEAST_CLASSES = 2, 6

# What is tried: rates by what trains, since a rate for all weights leaves LoRA where it was. The
# middle one is what a single try takes.
RATES = {
    "lora": {
        "multitask": (1e-3, 3e-3, 1e-2), "--meta-lr": (2e-3, 5e-3, 1e-2),
        "--inner-lr": (0.3, 1.0, 3.0), "--init-lr": (3e-4, 1e-3, 3e-3),
    },
    "full": {
        "multitask": (3e-5, 1e-4, 3e-4), "--meta-lr": (2e-3, 5e-3, 1e-2),
        "--inner-lr": (0.03, 0.1, 0.3), "--init-lr": (3e-5, 1e-4, 3e-4),
    },
}  # fmt: skip
# name -> options of `rnnopt meta-train`, and the option whose rates are tried
LEARNERS = {
    "rule": ("--init pretrained --inner lstm", "--meta-lr"),
    "maml": ("--init maml --inner sgd", "--inner-lr"),
    "meta-sgd": ("--init maml --inner meta-sgd", "--inner-lr"),
    "init-rule": ("--init maml --inner lstm", "--init-lr"),
}
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # on the rates of MAML and Meta-SGD


class CaseStudy:
    """The parts of the study in its folder.

    Args:
        options: of the command.

    Raises:
        InputError: data that can't be used, or a new set that shares classes with what is
            learned from.
    """

    def __init__(self, options: Namespace) -> None:
        self.options, self.folder = options, Path(options.output)
        self.device = choose_device(options.device)
        data = Path(options.data)
        self.sources = [hold_out_sports(data / SOURCES[0], self.folder, options.seed)]
        self.sources += [data / name for name in SOURCES[1:]]
        self.splits = read_splits(self.sources, seed=options.seed)
        self.judged: dict[str, Corpus] = {}
        for path in self.sources:
            if path.name in JUDGED_SOURCES:
                self.judged[path.name] = self.splits.sources[str(path)].test
        self.judged |= {name: read_all(data / name) for name in NEW}
        for name in NEW:
            for part in (self.splits.train, self.splits.validation):
                check_disjoint(part, self.judged[name], f"the classes learned from and {name}")
        if options.rule is not None:
            self._check_unseen(options.rule)

    def _check_unseen(self, path: str) -> None:
        for name, corpus in self.judged.items():
            pairs = overlapping_classes(seen_in(read_training(path)), corpus)
            if pairs:
                raise InputError(
                    f"--rule {path} was meta-trained on {pairs[0][0]!r}, a class of {name} that it "
                    "would be judged by; leave --rule out: one is meta-trained here"
                )

    # -- what is trained before any task

    def train(self) -> dict[str, Path]:
        """Train everything that comes first.

        Returns:
            For each name the folder of the try that validation chose.

        Raises:
            KeyboardInterrupt: stopped.
        """
        rates = RATES[self.options.tune]
        chosen = {"multitask": self._best("multitask", rates["multitask"])}
        for name, (_, option) in LEARNERS.items():
            if name == "rule" and self.options.rule is not None:
                continue
            chosen[name] = self._best(name, rates[option])
        return chosen

    def _best(self, name: str, rates: Sequence[float]) -> Path:
        middle = len(rates) // 2
        tried = rates if self.options.tries > 1 else rates[middle : middle + 1]
        scores = {}
        for rate in tried:
            folder = self.folder / "trained" / f"{name}-{rate:g}"
            progress(f"{name}, rate {rate:g}")
            multitask = name == "multitask"
            (self._pretrain if multitask else self._meta_train)(name, rate, folder)
            # nearest means are judged by their accuracy, rules and MAML by their loss
            records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            found = [r["validation"]["score"] for r in records if "validation" in r]
            scores[rate] = max(found) if multitask else -min(found)
        best = max(tried, key=scores.__getitem__)
        progress(f"{name}: rate {best:g}, by validation classes")
        return self.folder / "trained" / f"{name}-{best:g}"

    def _meta_train(self, name: str, rate: float, folder: Path) -> None:
        words, option = LEARNERS[name]
        options, rates = self.options, RATES[self.options.tune]
        given = {
            "init-lr": rates["--init-lr"][1],
            "encoder": options.encoder, "tune": options.tune, "lora-rank": options.lora_rank,
            "top-layers": options.top_layers or "all", "pooling": options.pooling,
            "order": options.order, "max-length": options.max_length, "shots": options.shots,
            "queries": options.queries, "head": options.head, "meta-steps": options.meta_steps,
            "steps": options.unroll, "shortest": min(3, options.unroll),
            "validate-every": max(1, options.meta_steps // 6), "seed": options.seed,
            "validation-tasks": options.validation_tasks, "device": options.device,
            "output": folder, option.removeprefix("--"): rate,
        }  # fmt: skip
        ways = usable_ways(self.splits, options)
        pairs = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        arguments = ["meta-train", *words.split(), *pairs, "--ways", *map(str, ways), "--resume"]
        code = rnnopt([*arguments, "--data", *map(str, self.sources)])
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise InputError(f"{name} can't be meta-trained, see above")

    def _pretrain(self, name: str, rate: float, folder: Path) -> None:
        options = self.options
        validation = TextTasks(self.sampler(self.splits.validation, WAYS), self.classifier())
        classes = {
            "classes": class_sketches(self.splits.train),
            "validation_classes": class_sketches(self.splits.validation),
        }
        training = MultitaskTraining(
            self.classifier(),
            self.splits.train,
            validation,
            MultitaskSettings(
                lr=rate,
                steps=options.pretrain_steps,
                check_every=max(1, options.pretrain_steps // 20),
                validation_tasks=options.validation_tasks,
                seed=options.seed,
            ),
            folder,
            {
                **self.facts(),
                "train": self.splits.train.fingerprint(),
                "validation": self.splits.validation.fingerprint(),
            },
            {**self.facts(), **classes},
        )
        training.run(lambda record: progress(f"  {json.dumps(record)}"))

    # -- the comparison

    def compare(self, name: str, chosen: dict[str, Path]) -> None:
        """Every method on one set, into ``NAME.json``."""
        options, corpus = self.options, self.judged[name]
        report = self.sampler(corpus, WAYS)
        tuning = self.sampler(self.splits.validation, max(report.ways))
        if min(tuning.ways) < max(report.ways):
            progress(f"{name}: {report.ways[0]}-way, rates from {tuning.ways[0]}-way tasks")
        classifier = self.classifier()
        parts = {}
        for start_name in ("pretrained", "multitask", "maml", "meta-sgd", "init-rule"):
            progress(f"{name}, from {start_name}")
            parts[start_name] = self._part(name, start_name, chosen, classifier, tuning, report)
        result: dict[str, Any] = {
            "setting": {
                **self.facts(),
                "data": corpus.fingerprint(),
                "ways": report.ways[0],
                "tuning_ways": tuning.ways[0],
                **self._trained(chosen),
                "encoder_weights": classifier.fingerprint,
                "classes": sorted(map(class_name, corpus.classes)),
                "versions": versions(),
            },
            "episodes": options.episodes,
            "methods": {},
            "values": {},
        }
        for key, (part, method) in METHODS.items():
            for entry in ("methods", "values"):
                result[entry][key] = parts[part][entry][method]
        content = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_atomically(self.folder / f"{name}.json", content.encode())

    def _part(
        self,
        name: str,
        start_name: str,
        chosen: dict[str, Path],
        classifier: Classifier,
        tuning: EpisodeSampler,
        report: EpisodeSampler,
    ) -> dict[str, Any]:
        """All methods that start from the same values."""
        options = self.options
        start = TextStart(head=options.head)
        if start_name != "pretrained":
            # the values of the multi-task training know no head: all methods begin with the same
            init = read_init(chosen[start_name] / INIT_FOLDER, classifier)
            start = replace(init, head=options.head, adapted="all")
        own_rule = chosen.get(start_name if start_name in LEARNERS else "rule", options.rule)
        rule = load_rule(own_rule).to(self.device)
        own: dict[str, Baseline] = {}
        names: tuple[str, ...] = ()
        if start_name in ("maml", "meta-sgd"):
            own = {TUNED: tuned_factor(start, rule)}
            names = (TUNED,)
        elif start_name != "init-rule":
            frozen = ("nearest-mean", "logistic") if start_name == "pretrained" else ()
            names = ("adamw", *frozen)
        facts = {
            **self.facts(),
            "init": None if start.values is None else fingerprint(start.values),
            "rule": rule_fingerprint(rule) if own else None,
            "encoder_weights": classifier.fingerprint,
            "data": [tuning.corpus.fingerprint(), report.corpus.fingerprint()],
            "ways": [tuning.ways[0], report.ways[0]],
        }
        comparison = Comparison(
            classifier,
            rule,
            rule_fingerprint(rule),
            TextTasks(tuning, classifier),
            TextTasks(report, classifier),
            default_budgets(options.steps),
            names,
            Journal(self.folder / "runs" / f"{name}-{start_name}.runs", facts),
            start=start,
            own_baselines=own,
            direct=DIRECT,
        )
        return comparison.run(options.episodes, options.tuning_episodes)

    # -- what all parts share

    def _trained(self, chosen: dict[str, Path]) -> dict[str, Any]:
        """What the methods of a result were made with."""
        rule = load_rule(chosen.get("rule", self.options.rule))
        return {
            "chosen": {name: path.name for name, path in chosen.items()},
            "rule": rule_fingerprint(rule),
            **{
                name: getattr(self.options, name)
                for name in (
                    "meta_steps",
                    "pretrain_steps",
                    "order",
                    "validation_tasks",
                    "tuning_episodes",
                )
            },
        }

    def facts(self) -> dict[str, Any]:
        """All that figures depend on, beside data, starting values and method."""
        options = self.options
        return {
            "encoder": encoder_name(options.encoder),
            "device": self.device.type,
            **{
                name: getattr(options, name)
                for name in (
                    "tune", "lora_rank", "top_layers", "pooling", "max_length", "shots", "queries",
                    "steps", "head", "seed",
                )
            },
        }  # fmt: skip

    def classifier(self) -> Classifier:
        """A new one."""
        options = self.options
        return Classifier.load(
            options.encoder, tune=options.tune, lora_rank=options.lora_rank,
            top_layers=options.top_layers, pooling=options.pooling, ways=WAYS,
            max_length=options.max_length, device=self.device, seed=options.seed,
        )  # fmt: skip

    def sampler(self, corpus: Corpus, ways: int) -> EpisodeSampler:
        """Episodes of so many ways, or of as many as there are classes."""
        return EpisodeSampler(
            corpus, ways=min(ways, most_ways(corpus, self.options)), shots=self.options.shots,
            queries=self.options.queries, seed=self.options.seed,
        )  # fmt: skip

    def finished(self, name: str, chosen: dict[str, Path]) -> bool:
        """Whether a set's file is there, of these options and as many episodes."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            return False
        result = json.loads(file.read_text())
        wanted = {**self.facts(), **self._trained(chosen)}
        same = all(result["setting"].get(key) == value for key, value in wanted.items())
        return same and result["episodes"] >= self.options.episodes


TUNED = "tuned"
# name in tables -> the part that it comes from and what it is called there
METHODS = {
    "adamw": ("pretrained", "adamw"),
    "multitask-adamw": ("multitask", "adamw"),
    "maml": ("maml", TUNED),
    "maml-as-trained": ("maml", LEARNED),
    "meta-sgd": ("meta-sgd", TUNED),
    "meta-sgd-as-trained": ("meta-sgd", LEARNED),
    "rule": ("pretrained", LEARNED),
    "multitask-rule": ("multitask", LEARNED),
    "init-rule": ("init-rule", LEARNED),
    "nearest-mean": ("pretrained", "nearest-mean"),
    "logistic": ("pretrained", "logistic"),
}


def tuned_factor(start: TextStart, rule: SavedRule) -> Baseline:
    """A meta-trained rule whose steps are multiplied by the best of `FACTORS`."""
    return Baseline(
        lambda classifier, params, lr, steps: start.optimizer(classifier, rule, lr), FACTORS
    )


def hold_out_sports(path: Path, output: Path, seed: int) -> Path:
    """The source, or where it is one file of too few classes, a copy with two of them held out.

    Raises:
        InputError: fewer than 4 classes.
    """
    files, domain = source_files(path)
    if "all" not in files:
        return path
    corpus = read_corpus(files["all"], domain=domain)
    keys = sorted(corpus.classes)
    if len(keys) >= LEAST_CLASSES:
        return path
    if len(keys) < 2 + HELD_SPORTS:
        raise InputError(
            f"{path}: {len(keys)} classes, at least {2 + HELD_SPORTS} are needed to hold out "
            f"{HELD_SPORTS}; add some"
        )
    order = np.random.default_rng(seed).permutation(len(keys))
    copy = output / "sources" / path.name
    for part, places in (("test", order[:HELD_SPORTS]), ("train", order[HELD_SPORTS:])):
        chosen = corpus.select(keys[place] for place in places)
        rows = zip(chosen.texts, chosen.labels)
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
        write_atomically(copy / f"{part}.jsonl", "".join(lines).encode())
    return copy


def read_all(path: Path) -> Corpus:
    """All texts of a set."""
    files, domain = source_files(path)
    return merge([read_corpus(file, domain=domain) for file in files.values()])


def most_ways(corpus: Corpus, options: Namespace) -> int:
    """How many classes with texts enough the widest domain has."""
    sampler = EpisodeSampler(
        corpus, ways=2, shots=options.shots, queries=options.queries, seed=options.seed
    )
    return max(map(len, sampler.eligible_classes(options.shots).values()))


def usable_ways(splits: Splits, options: Namespace) -> list[int]:
    """Those of `TRAINING_WAYS` that training and validation classes are enough for."""
    most = min(most_ways(part, options) for part in (splits.train, splits.validation))
    return [ways for ways in TRAINING_WAYS if ways <= most]


def run(options: Namespace) -> int:
    """Train and compare what isn't finished, until the time is up.

    Returns:
        0, also if the time was up; 2 for what the user can mend; 130 after Ctrl-C.
    """
    names = (*JUDGED_SOURCES, *NEW)
    finished = 0
    with Deadline(options.time_limit) as deadline:
        try:
            study = CaseStudy(options)
            chosen = study.train()
            for name in names:
                if not study.finished(name, chosen):
                    study.compare(name, chosen)
                finished += 1
        except InputError as error:
            print(f"case_study_news: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if not deadline.passed:
                return INTERRUPTED
            progress("the time is up; the same command goes on from here")
    print(f"{finished} of {len(names)} sets are finished")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the study")
    parser.add_argument(
        "--table", metavar="FILE", help="write table and figure of what is there: FILE and its .png"
    )
    parser.add_argument("--data", metavar="FOLDER", help="that holds the folders of the sets")
    parser.add_argument("--encoder", metavar="NAME_OR_PATH")
    parser.add_argument("--rule", help="a learned rule instead of one meta-trained here")
    parser.add_argument("--tune", choices=("lora", "full"), default="lora", help="[lora]")
    parser.add_argument("--lora-rank", type=int, default=8, help="[8]")
    parser.add_argument(
        "--top-layers", type=int, metavar="K", help="of the encoder's layers K train [all]"
    )
    parser.add_argument("--pooling", choices=("model", "mean"), default="model", help="[model]")
    parser.add_argument(
        "--head", choices=("random", "zero", "prototype"), default="random",
        help="how the output layer begins, for every method [random]",
    )  # fmt: skip
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text [64]")
    parser.add_argument("--shots", type=int, default=5, help="support texts a class [5]")
    parser.add_argument("--queries", type=int, default=10, help="query texts a class [10]")
    parser.add_argument("--steps", type=int, default=20, help="of adaptation [20]")
    parser.add_argument("--unroll", type=int, default=8, help="steps in meta-training [8]")
    parser.add_argument(
        "--order", type=int, choices=(1, 2), default=2, help="of all meta-gradients [2]"
    )
    parser.add_argument("--meta-steps", type=int, default=600, help="of each try [600]")
    parser.add_argument(
        "--pretrain-steps", type=int, default=2000, help="of each multi-task try [2000]"
    )
    parser.add_argument(
        "--tries", type=int, choices=(1, 3), default=3, help="rates of what is trained first [3]"
    )
    parser.add_argument("--episodes", type=int, default=40, help="test episodes a set [40]")
    parser.add_argument("--tuning-episodes", type=int, default=8, metavar="E", help="[8]")
    parser.add_argument(
        "--validation-tasks", type=int, default=8, help="that judge what is trained first [8]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random [0]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto]")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="stop after that [none]"
    )
    options = parser.parse_args(arguments)
    for name, least in (("episodes", 2), ("tuning_episodes", 1), ("meta_steps", 1), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}"
            )
    if options.table:
        files = {n: Path(options.output) / f"{n}.json" for n in (*JUDGED_SOURCES, *NEW)}
        results = {n: json.loads(file.read_text()) for n, file in files.items() if file.exists()}
        if not results:
            parser.error(f"--output {options.output}: no finished set there; run some first")
        print(write_case_study(results, Path(options.table)))
        return 0
    if options.data is None or options.encoder is None:
        parser.error("--data and --encoder are needed, unless --table is given")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
