from experiments import tables


def test_a_table_comes_back_as_text(tmp_path):
    rows = [{"a": 1, "b": "x, y", "other": 2}, {"b": None}]
    tables.write(tmp_path / "t.csv", rows, ["a", "b"], {"command": "run --a=1: b", "date": "today"})
    about, read = tables.read(tmp_path / "t.csv")
    assert about == {"command": "run --a=1: b", "date": "today"}
    assert read == [{"a": "1", "b": "x, y"}, {"a": "", "b": ""}]


def test_an_interrupted_writer_leaves_its_rows(tmp_path):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = tables.Writer(file, ["a"])
        writer.write({"a": 1})
        assert tables.read(tmp_path / "t.csv")[1] == [{"a": "1"}]


def test_markdown_escapes_bars():
    assert tables.markdown(["a", "b"], [(1, "x|y")]) == "| a | b |\n|---|---|\n| 1 | x\\|y |"
