"""Makes the modules of `examples/fields` importable, and runs their commands."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "fields"))


@pytest.fixture
def exit_code(monkeypatch):
    """What a field's command returns, run in this process."""

    def run(module, *words):
        import field

        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        return field.command(
            module.__doc__, module.main, meta_steps=2, episodes=2, more=module.MORE
        )

    return run
