import sys

import jax

from experiments import provenance


def test_stamp_shows_no_folders_of_this_machine(monkeypatch):
    arguments = ["--data_path=/home/me/imagenet", "--output=results/a.csv", "--workdirs=/a/b/one,/a/b/two", "/x/y.png"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    stamp = provenance.stamp()
    assert list(stamp) == ["command", "commit", "date", "hardware", "jax"] and all(stamp.values())
    assert stamp["command"].endswith(" --data_path=imagenet --output=results/a.csv --workdirs=one,two y.png")
    assert stamp["jax"] == jax.__version__ and stamp["date"].endswith(" UTC")


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "uncommitted"
