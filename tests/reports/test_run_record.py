"""A training's folder is read as it is, whatever has happened to it."""

import json
import os

import pytest

from diffpo.reports.run_record import flat, number, read_run, table, tables, text


def test_a_whole_run(make_run):
    run = read_run(make_run())
    assert (run.name, run.updates, run.planned, run.finished, run.unreadable) == ("first", 40, 40, True, ())
    assert len(run.samples) == 6
    assert run.inputs == {"model": "sha256:first"}


def test_half_a_line_is_being_written(make_run):
    folder = make_run(finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 41, "rew')
    run = read_run(folder)
    assert (run.updates, run.finished, run.unreadable) == (40, False, ())


def test_damaged_lines_are_counted_and_left_out(make_run):
    run = read_run(
        make_run(
            metrics__jsonl='{"update": 1}\nxx\n[1]\n\n{"update": "2"}\n\x00\n{"update": 3}\n' + "[" * 100000 + "\n"
        )
    )
    assert [line["update"] for line in run.lines] == [1, 3]
    assert run.unreadable == ("metrics.jsonl: 4 lines are not readable",)


def test_a_summary_of_fewer_updates_is_no_result(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 41}\n')
    assert not read_run(folder).finished
    old = json.loads((folder / "summary.json").read_text())
    del old["updates"]  # which versions before 0.2 did not write
    (folder / "summary.json").write_text(json.dumps(old))
    assert read_run(folder).finished


@pytest.mark.parametrize("missing", ["metrics__jsonl", "samples__jsonl", "base__json", "summary__json", "__diffpo-run"])
def test_a_file_may_be_missing(make_run, missing):
    run = read_run(make_run(**{missing: None}))
    assert run.unreadable == ()
    assert run.updates == (0 if missing == "metrics__jsonl" else 40)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"config__json": None}, "config.json is not there"),
        ({"config__json": {"model": "x"}}, "names no algorithm"),
        ({"config__json": {"algorithm": "diffpo"}}, "names no algorithm"),
        ({"__diffpo-run": {"command": "evaluate"}}, "holds a run of diffpo.evaluate"),
    ],
    ids=["no configuration", "another's", "another's with an algorithm", "an evaluation"],
)
def test_what_is_no_training_is_refused(make_run, contents, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        read_run(make_run(**contents))
    assert str(refused.value).startswith("runs: ")


def test_a_path_without_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        read_run(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        read_run(tmp_path / "file")


def test_links_pipes_and_absurd_sizes_are_not_read(make_run, tmp_path):
    folder = make_run(metrics__jsonl=None, samples__jsonl=None, base__json=None)
    os.mkfifo(folder / "metrics.jsonl")
    (tmp_path / "secret").write_text('{"update": 1}\n')
    (folder / "samples.jsonl").symlink_to(tmp_path / "secret")
    (folder / "base.json").mkdir()
    os.truncate(folder / "summary.json", 2**40)
    run = read_run(folder)
    assert (run.lines, run.samples, run.base, run.summary) == ([], [], {}, {})
    assert len(run.unreadable) == 4


def test_values_are_taken_only_if_they_are_what_they_should_be():
    values = {
        "a": {"n": 1, "t": "x", "l": [{}, 1, {"b": 2}]},
        "nan": float("nan"),
        "huge": 10**400,
        "inf": 1e301,
        "flag": True,
    }
    assert number(values, "a", "n") == 1.0
    assert [number(values, name) for name in ("a", "nan", "huge", "inf", "flag", "none")] == [None] * 6
    assert number(values, "a", "t", "deeper") is None
    assert (table(values, "a", "t"), text(values, "a", "t"), text(values, "a")) == ({}, "x", "")
    assert tables(values, "a", "l") == [{}, {"b": 2}]
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
