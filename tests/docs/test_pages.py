"""What the pages promise: code that runs, links that lead somewhere, figures of the results."""

import math
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from rnnopt.cli.main import parse
from rnnopt.tasks.text.classifier import Classifier
from rnnopt.tasks.text.encoder.loading import silence

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("rnnopt/rules/weights/*.md")]
)
TEXTS, LABELS = ["play some jazz", "will it rain", "put on a song", "is it sunny"], [0, 1, 0, 1]


def complete_code(page):
    """The one block of a page that begins with `import torch`."""
    blocks = page.split("```")
    (code,) = (block for block in blocks if block.startswith("python\nimport torch"))
    return code.removeprefix("python\n")


def run(code, **names):
    torch.manual_seed(0)
    with silence(), warnings.catch_warnings():
        # what peft 0.21 asks of transformers 5.23
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        exec(code, names)
    return names


def loss_afterwards(names):
    with torch.no_grad():
        return names["model"](**names["batch"], labels=torch.tensor(LABELS)).loss


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9000


def test_the_example_in_the_readme_runs(encoder):
    code = complete_code(README)
    named = re.sub(r'^encoder = ".*"$', f"encoder = {str(encoder)!r}", code, flags=re.M)
    assert named != code
    names = run(named)
    assert names["texts"] == TEXTS and names["labels"] == LABELS
    assert all(param.requires_grad for param in names["model"].parameters())
    assert loss_afterwards(names) < math.log(2)


def test_the_example_in_the_readme_has_twelve_lines():
    lines = [line for line in complete_code(README).splitlines() if line]
    assert len(lines) == 12


def test_the_loop_on_the_start_page_is_the_one_that_was_measured(encoder):
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = run(complete_code(page), ENCODER=str(encoder), texts=TEXTS, labels=LABELS)
    model, optimizer = names["model"], names["optimizer"]
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    cpu = torch.device("cpu")
    measured = Classifier.load(encoder, tune="lora", ways=2, device=cpu).trainable()
    assert trained == sum(param.numel() for _, param in measured)
    assert optimizer.undone == 0
    assert loss_afterwards(names) < math.log(2)


def test_figures_in_the_readme_stand_in_the_results():
    """Printed by scripts/two_level/core_table.py and scripts/benchmark_practitioner.py."""
    pages = [ROOT / "docs" / "results" / name for name in ("two-level.md", "practitioner.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    rows = [line for line in README.splitlines() if line.startswith("|") and "0." in line]
    figures = re.findall(r"0\.\d{3}(?: ± 0\.\d{3})?", "\n".join(rows))
    assert len(figures) >= 3 * len(rows) > 0
    assert [figure for figure in figures if figure not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_scripts_that_are_named_are_there(page):
    """Or the page names the commit that has them."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\bscripts/\w+\.(?:py|sh)\b", text))
    gone = {name for name in named if not (ROOT / name).exists()}
    assert gone == set() or re.search(r"history \(commit\s[0-9a-f]{7}\)", text)


REQUIRED = ["--data", "DATA", "--encoder", "ENCODER", "--output", "OUT"]  # what `...` stands for
COMMANDS = sorted(
    {
        line.group(1)
        for page in PAGES
        for line in re.finditer(
            r"^ *(?:torchrun .*-m )?rnnopt ((?!is\b)[a-z][^`\n]*)$",
            page.read_text(encoding="utf-8").replace("\\\n", " "),
            flags=re.MULTILINE,
        )
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_pages_are_commands(command):
    words = [word for word in shlex.split(command, comments=True) if word != "COMMAND"]
    if "..." in words:
        words[words.index("...") : words.index("...") + 1] = REQUIRED
    assert parse(words).command == words[0]


def test_commands_are_found():
    assert len(COMMANDS) > 12
