"""The `rnnopt` command: meta-train, adapt, compare, report, inspect, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rnnopt import __version__
from rnnopt.errors import InputError, ToldElsewhereError

_EXTRAS = ("higher", "matplotlib", "peft", "tqdm", "transformers")  # the extra `meta`
_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for what the user can mend (one line on stderr, of one process where several share
        the mistake; no traceback); 3 where --until was not met; 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.run is not _meta_train:
            _require_alone(options.command)
        return options.run(options) or 0
    except ToldElsewhereError:
        return 2
    except InputError as error:
        print(f"rnnopt {options.command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(
            f'rnnopt {options.command}: error: {error.name} is missing: pip install "rnnopt[meta]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"rnnopt {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _require_alone(command: str) -> None:
    from rnnopt.meta.processes import require_alone

    require_alone(command)


def _meta_train(options: argparse.Namespace) -> int:
    from rnnopt.cli.commands import meta_train

    return meta_train(options)


def _adapt(options: argparse.Namespace) -> int:
    from rnnopt.cli.commands import adapt

    return adapt(options)


def _compare(options: argparse.Namespace) -> None:
    from rnnopt.cli.commands import compare

    compare(options)


def _inspect(options: argparse.Namespace) -> None:
    from rnnopt.cli.inspect import inspect

    inspect(options)


def _report(options: argparse.Namespace) -> None:
    from rnnopt.evaluation.report.report import write_report

    print(write_report(Path(options.run_path)))


def _demo(options: argparse.Namespace) -> None:
    from rnnopt.cli.demo import demo

    demo(Path(options.output), options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnnopt", description="A learned optimizer for few-shot text classification."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_meta_train(commands)
    _add_adapt(commands)
    _add_compare(commands)
    _add_inspect(commands)
    report = commands.add_parser(
        "report", help="write a run's report and pictures again, from the files it left"
    )
    report.add_argument(
        "run_path",
        metavar="RUN",
        help="folder of meta-train or adapt, or the JSON file of compare",
    )
    report.set_defaults(run=_report)
    demo = commands.add_parser(
        "demo", help="meta-train, adapt and compare on an embedded corpus; no download, 7 minutes"
    )
    demo.add_argument("--output", default="demo", help="folder for report and picture [demo]")
    demo.add_argument("--seed", type=_seed, default=0)
    demo.set_defaults(run=_demo)
    return parser


def _add_meta_train(commands: Any) -> None:
    parser = commands.add_parser(
        "meta-train",
        help="learn an update rule over many tasks",
        description="Learn an update rule over many tasks, initial values, or both. The output "
        "folder gets rule.safetensors (the best by validation classes), with --init also init (the "
        "initial values), report.md and learning.png, log.jsonl, run.json, provenance.json and a "
        "checkpoint from which --resume continues. The exit code is 3 where --until was not met.",
    )
    _add_data(
        parser,
        "train classes are meta-trained on, validation classes choose the rule. PATH=2 is drawn "
        "twice as often as one without a weight; a source's domains share its weight",
    )
    _add_encoder(parser, several=True)
    _add_pooling(parser, several=True)
    _add_episodes(parser, several=True)
    parser.add_argument(
        "--most-support",
        type=int,
        metavar="M",
        help="support texts of a task at most: of the shots those that fit the ways [no bound]",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        metavar="B",
        help="minibatches of the support set, at most so many texts; several: each task draws one "
        "[the whole support set at every step]",
    )
    parser.add_argument(
        "--shortest",
        type=int,
        metavar="T",
        help="draw each task's steps from this .. --steps [--steps]",
    )
    parser.add_argument(
        "--order",
        type=int,
        choices=(1, 2),
        default=1,
        help="meta-gradient: 1 first order, 2 exact through higher [1]",
    )
    parser.add_argument(
        "--exact",
        nargs="+",
        choices=("full", "lora", "head"),
        default=[],
        metavar="TUNE",
        help="kinds of --tune whose meta-gradient is exact whatever --order says",
    )
    parser.add_argument(
        "--meta-steps",
        "--max-meta-steps",
        type=int,
        default=500,
        help="steps of the meta-optimizer, at most with --until; its learning rate falls along "
        "them [500]",
    )
    parser.add_argument(
        "--until",
        metavar="REQUIREMENT",
        help="end at the first validation that meets this, such as 'accuracy@5>=0.85 and loss<1': "
        "accuracy or loss, @step, on validation tasks; without @step after the last",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        default=1,
        help="tasks per meta-step, shared out to the processes that torchrun started [1]",
    )
    parser.add_argument("--meta-lr", type=float, default=5e-3, help="of the meta-optimizer [5e-3]")
    parser.add_argument(
        "--clip",
        type=float,
        default=1.0,
        metavar="X",
        help="bound on the norm of each task's meta-gradient, per step: what keeps a task that the "
        "rule ruins from drowning the others [1]",
    )
    parser.add_argument(
        "--judged",
        type=float,
        default=1.0,
        metavar="P",
        help="share of the steps, drawn at random, whose query loss is taken: faster and noisier, "
        "right on average [1]",
    )
    parser.add_argument(
        "--loss-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply each task's support loss by a factor drawn from 1/X .. X, so that the rule "
        "bears clipped gradients and losses of other scales [1]",
    )
    parser.add_argument(
        "--calibrated",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the query loss that is taken at the temperature which suits the logits "
        "best: tells classes apart rather than be sure of them [0]",
    )
    parser.add_argument(
        "--sure-from",
        type=int,
        default=1,
        metavar="T",
        help="before step T all of the query loss is taken so: a rule may be sure of the classes "
        "later than it tells them apart [1]",
    )
    parser.add_argument(
        "--learn",
        choices=("all", "growth"),
        default="all",
        help="of the LSTM: all that it does, or the growth of tensors alone, with Adam's "
        "directions and step sizes and no hidden units [all]",
    )
    parser.add_argument(
        "--from",
        dest="origin",
        metavar="RULE",
        help="begin with this rule rather than a fresh one: a rule file, the folder of a run, or "
        "the word shipped",
    )
    parser.add_argument(
        "--hidden-size",
        type=int,
        metavar="H",
        help="of the LSTM, 0 for none [that of --from, else 8]",
    )
    _add_initial_values(parser)
    parser.add_argument("--truncation", type=int, help="cut the graph after so many steps")
    parser.add_argument(
        "--coordinates",
        type=int,
        metavar="C",
        help="first order: how many coordinates carry the meta-gradient, a random sample [as many "
        "as fit into 72 MiB]",
    )
    parser.add_argument(
        "--query-weight", type=float, default=1.0, help="of the query loss in the meta-loss [1]"
    )
    parser.add_argument(
        "--support-weight", type=float, default=0.0, help="of the support loss in the meta-loss [0]"
    )
    parser.add_argument(
        "--step-weights", type=float, nargs="+", metavar="W", help="one per step; all 1 by default"
    )
    parser.add_argument(
        "--validate-every", type=int, default=50, metavar="M", help="meta-steps [50]"
    )
    parser.add_argument(
        "--validation-tasks", type=int, default=8, metavar="E", help="judged by each time [8]"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=10, metavar="M", help="meta-steps [10]"
    )
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.set_defaults(run=_meta_train)


def _add_adapt(commands: Any) -> None:
    parser = commands.add_parser(
        "adapt",
        help="fine-tune a classifier on your labelled file",
        description="Fine-tune a classifier on a labelled file and save a folder that "
        'transformers.pipeline("text-classification", DIR) loads.',
    )
    parser.add_argument("--data", required=True, help="labelled file: CSV, TSV, JSONL, also .gz")
    parser.add_argument(
        "--test", help="labelled file to judge by; else a stratified fifth of --data is held out"
    )
    _add_columns(parser)
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of each label's texts, to judge by, with --until or without --test [0.2]",
    )
    _add_overlap(parser)
    _add_encoder(parser)
    # transformers' pipeline could not load a classifier with mean pooling
    parser.set_defaults(pooling="model")
    parser.add_argument("--rule", help="rule file or folder; else the one that ships with rnnopt")
    _add_start(parser)
    parser.add_argument(
        "--steps",
        "--max-steps",
        type=int,
        help="steps of adaptation [20], with --until at most [200]",
    )
    parser.add_argument(
        "--until",
        metavar="REQUIREMENT",
        help="adapt until this is met on texts held out, such as 'accuracy>=0.9 and f1>0.8': "
        "accuracy, precision, recall, f1 (macro) or loss; --test is read when all else is done; "
        "the exit code is 3 where it was not met",
    )
    parser.add_argument(
        "--validate-every", type=int, default=1, metavar="T", help="with --until, in steps [1]"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="texts a step [64]")
    parser.add_argument("--lr", type=float, default=1.0, help="multiplies the learned step [1]")
    parser.add_argument("--output", required=True, help="folder for the classifier")
    parser.set_defaults(run=_adapt)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="a rule against tuned baselines on unseen classes",
        description="A rule against tuned baselines: same episodes, same initial weights. "
        "Baselines' learning rates are chosen on validation classes for every budget of steps; "
        "figures are on test classes. A comparison that was stopped goes on where it was.",
    )
    _add_data(parser, "validation classes tune the baselines, test classes make the figures")
    _add_encoder(parser)
    _add_pooling(parser)
    _add_episodes(parser, several=False)
    parser.add_argument("--rule", help="rule file or folder; else the one that ships with rnnopt")
    _add_start(parser)
    parser.add_argument("--episodes", type=int, default=100, help="test episodes [100]")
    parser.add_argument(
        "--tuning-episodes",
        type=int,
        default=10,
        metavar="E",
        help="validation episodes for each learning rate [10]",
    )
    parser.add_argument(
        "--tuned-steps",
        type=int,
        metavar="T",
        help="steps of the baselines that are tuned [--steps]",
    )
    parser.add_argument(
        "--baselines",
        default="adamw,sgd",
        help="tuned: adamw, sgd, muon; as documented: adamw-default, muon-default, prodigy, "
        "schedulefree, dadapt; without steps: nearest-mean, logistic [adamw,sgd]",
    )
    parser.add_argument(
        "--report-on",
        choices=("test", "val", "all"),
        default="test",
        help="whose classes make the figures; val and all need --tuning-data [test]",
    )
    parser.add_argument(
        "--tuning-data",
        nargs="+",
        metavar="PATH",
        help="tune by the validation classes of these, as --data [--data]",
    )
    parser.add_argument(
        "--fewer-ways",
        action="store_true",
        help="where there are fewer classes than --ways, take as many as there are",
    )
    parser.add_argument("--json", required=True, help="file for the figures")
    parser.add_argument("--plot", help="PNG file for the curves")
    parser.set_defaults(run=_compare)


def _add_initial_values(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inner",
        choices=("lstm", "sgd", "meta-sgd", "adam"),
        default="lstm",
        help="rule of the inner loop: the LSTM and Meta-SGD (a learned rate for each tensor) are "
        "learned, the others need --init [lstm]",
    )
    parser.add_argument(
        "--inner-lr",
        type=float,
        metavar="LR",
        help="its step size, of the LSTM its initial_decrease [lstm 0.75, adam 1e-3, others 0.1]",
    )
    parser.add_argument(
        "--init",
        choices=("pretrained", "maml", "reptile"),
        default="pretrained",
        help="also learn the initial values of what trains: by their meta-gradient, of --order 1 "
        "or 2, or by Reptile [pretrained: no]",
    )
    parser.add_argument(
        "--init-lr", type=float, default=1e-4, help="of the meta-optimizer on them [1e-4]"
    )
    parser.add_argument(
        "--init-penalty",
        type=float,
        default=0.0,
        metavar="L",
        help="pull them back: L/2 times their squared distance from the pretrained ones [0]",
    )
    _add_head(parser, "random")


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init", metavar="DIR", help="folder of learned initial values")
    _add_head(parser, "as --init was meta-trained, else random")


def _add_head(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--head",
        choices=("zero", "random", "prototype"),
        help=f"how a task's output layer begins; prototype: made of class means [{default}]",
    )
    parser.add_argument(
        "--adapt-only",
        choices=("head",),
        help="step only what lies outside the encoder (ANIL)",
    )


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what a rule has learned: its update, by gradient, memory, kind of tensor and step",
        description="Adapt to one task of test classes with a rule, and tell the size of its steps "
        "and their distance from Adam's direction, by kind of tensor and step, and its update as a "
        "function of the gradient and m / sqrt(v).",
    )
    parser.add_argument("rule", nargs="?", help="rule file or folder [the one that ships]")
    _add_data(parser, "the task is of test classes; [stdlib]", default=["stdlib"])
    _add_encoder(parser, required=False)
    _add_pooling(parser)
    _add_episodes(parser, several=False)
    parser.add_argument(
        "--kind",
        help="whose update is drawn: embedding, attention matrix, other matrix, layer norm, bias, "
        "LoRA A, LoRA B or head [what has most coordinates]",
    )
    parser.add_argument("--at-step", type=int, metavar="T", help="where [in the middle]")
    parser.add_argument("--output", metavar="FILE", help=".png for a picture, .json for figures")
    parser.set_defaults(run=_inspect)


def _add_data(
    parser: argparse.ArgumentParser, use: str, default: Sequence[str] | None = None
) -> None:
    parser.add_argument(
        "--data",
        required=default is None,
        default=default,
        nargs="+",
        metavar="PATH",
        help="labelled files (CSV, TSV, JSONL, also .gz; their classes are divided 60/20/20 into "
        "train, validation and test), folders with train, val and test files of disjoint classes, "
        f"or the word stdlib for the embedded corpus; {use}",
    )
    _add_columns(parser)
    parser.add_argument(
        "--domain-column",
        help="column that divides a file into domains; an "
        "episode's classes come from one domain [the whole source is one]",
    )
    _add_overlap(parser)


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="accept classes that were seen in meta-training; the result says so",
    )


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-column", default="text", help="[text]")
    parser.add_argument("--label-column", default="label", help="[label]")


def _add_encoder(
    parser: argparse.ArgumentParser, several: bool = False, required: bool = True
) -> None:
    parser.add_argument(
        "--encoder",
        required=required,
        metavar="NAME_OR_PATH",
        help="Hugging Face text model: hub name or folder (safetensors)"
        + ("" if required else " [a small BERT with random weights]"),
    )
    _add_choice(
        parser,
        several,
        "--tune",
        "lora",
        choices=("full", "lora", "head"),
        help="which parameters train [lora: LoRA and the head]",
    )
    _add_choice(parser, several, "--lora-rank", 8, type=int, metavar="R", help="[8]")
    parser.add_argument(
        "--top-layers",
        type=_layers,
        metavar="K",
        nargs="+" if several else None,
        help="with lora or full: only the top K layers train, what lies below runs once; or the "
        "word all [all]",
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text [128]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the encoder; auto: bf16 on a GPU that has it; the rule is always fp32 [auto]",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random [0]")


def _add_pooling(parser: argparse.ArgumentParser, several: bool = False) -> None:
    _add_choice(
        parser,
        several,
        "--pooling",
        "model",
        choices=("model", "mean"),
        help="what the head reads: the model's own pooler or the mean [model]",
    )


def _add_choice(
    parser: argparse.ArgumentParser, several: bool, name: str, default: Any, **options: Any
) -> None:
    """An option of one value, or of several that each task draws one of."""
    if several:
        options["help"] += "; several: each task draws one, and one given twice is drawn more often"
        options |= {"nargs": "+", "default": [default]}
    else:
        options["default"] = default
    parser.add_argument(name, **options)


def _layers(text: str) -> int | None:
    return None if text == "all" else int(text)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"seed {seed}: must lie between 0 and 2**32 - 1")
    return seed


def _add_episodes(parser: argparse.ArgumentParser, several: bool) -> None:
    _add_choice(
        parser, several, "--ways", 5, type=int, metavar="N", help="classes of an episode [5]"
    )
    _add_choice(
        parser, several, "--shots", 5, type=int, metavar="K", help="support texts a class [5]"
    )
    parser.add_argument(
        "--queries", type=int, default=5, metavar="Q", help="query texts a class [5]"
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="T", help="steps of adaptation [10]"
    )
