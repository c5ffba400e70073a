"""The script that puts tables into pages."""

import importlib
from pathlib import Path


def test_only_tables_that_there_are_are_put(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    filled = importlib.import_module("field_tables").filled
    (tmp_path / "one.md").write_text("| new |\n")
    page = "a\n<!-- table one -->\n| old |\n<!-- end -->\nb\n<!-- table two -->\n<!-- end -->\n"
    found, put = filled(page, tmp_path)
    assert put == 1
    assert found == page.replace("| old |\n", "\n| new |\n\n")
    assert filled(found, tmp_path) == (found, 1)


def test_a_place_may_name_metrics(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    filled = importlib.import_module("field_tables").filled
    (tmp_path / "one.md").write_text("Title.\n\n| rmse after | 1 |\n\n| loss after | 1 |\n")
    found, _ = filled("<!-- table one rmse -->\n<!-- end -->", tmp_path)
    assert "Title." in found and "rmse" in found and "loss" not in found
    assert filled(found, tmp_path)[0] == found
