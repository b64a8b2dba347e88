"""The page: what it says, that it needs nothing else, and that no text in it is markup."""

import json

import pytest
from html_pages import Page, assert_self_contained

from diffpo.reports import results
from diffpo.reports.page import report_page, samples
from diffpo.reports.run_record import read_run

from .conftest import HOSTILE, evaluation, line, sample, settings, summary


def page_of(*folders) -> Page:
    return Page(report_page([read_run(folder) for folder in folders]))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_a_finished_run_says_what_it_reached(make_run):
    said = words(page_of(make_run()))
    for part in (
        "finished, 40 updates", "36.0% → 50.0%", "+14.0 points", "12.00 → 1.85", "6.49 times fewer", "38.0% in 8.00 NFE by Best()",
        "hard is lost: 10.0% of 50 problems solved, the base model solves 90.0%.", "PromptThreshold()", "36.0% [31.0, 41.0]",
        "4,321", "1,280", "python -m diffpo.train", "2.13.0", "tiny-countdown", "Before", "After update 40",
    ):  # fmt: skip
        assert part in said, part


def test_a_run_in_progress_says_how_far_it_is(make_run):
    said = words(page_of(make_run(finished=False, updates=20)))
    for part in (
        "not finished: 20 of 40 updates",
        "Rollouts of the training",
        "11.5% → 29.5%",
        "FixedSchedule(steps=12)",
    ):
        assert part in said, part
    assert "is lost" not in said


def test_a_run_without_an_update_has_a_page(make_run):
    said = words(page_of(make_run(updates=0, finished=False, samples__jsonl=None, base__json=None)))
    assert "No update is done yet." in said
    assert "Learning curves" not in said
    assert "Settings" in said


def test_the_page_of_an_earlier_version_leaves_out_what_it_does_not_know(make_run):
    old_settings = {"name": "old", "algorithm": {"mode": "joint"}, "updates": 2}
    old_summary = {
        "base": {"one_at_a_time": {"accuracy": 0.3}},
        "trained": {"accuracy": 0.4},
        "environment": {"torch": "2.11"},
    }
    folder = make_run(
        updates=2, config__json=old_settings, summary__json=old_summary, samples__jsonl=None, base__json="{}\n",
        metrics__jsonl=[{"update": 1, "reward": 1}, {"update": 2, "reward": 2}], **{"__diffpo-run": None},
    )  # fmt: skip
    said = words(page_of(folder))
    assert "30.0% → 40.0%" in said
    assert "2.11" in said
    assert "network evaluations" not in said


def test_settings_that_differ_from_the_defaults_stand_first(make_run):
    run = read_run(make_run(config__json=settings(optimizer={"lr": 0.5}, invented=1)))
    changed = {name for name, _, differs in results.settings(run) if differs}
    assert "optimizer.lr" in changed
    assert not changed & {"task", "model", "rollout.speed_exponent", "invented"}


def test_phases_of_all_lines_are_added_up(make_run):
    run = read_run(make_run(metrics__jsonl=[line(1), line(2, **{"seconds/save": 7.0, "seconds/new": 1.0})]))
    seconds = [("rollout", 2.0), ("score", 0.5), ("update", 1.5), ("save", 7.0), ("new", 1.0)]
    assert results.phases(run) == [*seconds, ("evaluation", 12.0)]


def test_several_runs_are_compared(make_run):
    second = make_run("second", finished=False, updates=5, config__json=settings(name="second", optimizer={"lr": 0.01}))
    page = page_of(make_run(), second)
    said = words(page)
    for part in (
        "2 runs compared",
        "optimizer.lr 0.0002 0.01",
        "model (content) sha256:first sha256:second",
        "not finished: 5 of 40",
    ):
        assert part in said, part
    assert "rollout.speed_exponent" not in said
    assert [curve["name"] for curve in page.data["charts"][0]["curves"]] == ["first", "second"]
    assert len(page.data["histograms"]) == 2


def test_equal_runs_differ_in_nothing(make_run):
    make_run("b", config__json=settings(name="b"), **{"__diffpo-run": {"command": "train", "inputs": {}}})
    folder = make_run("a", config__json=settings(name="a"), **{"__diffpo-run": {"command": "train", "inputs": {}}})
    assert "Settings that differ None." in words(page_of(folder, folder.parent / "b"))


def hostile(make_run, name: str = "first", text: str = HOSTILE):
    """A run that holds the text wherever there is one."""
    last = summary(40)
    last["sweep"]["trained"].append(evaluation(text, 0.5, 1.0))
    last["kinds"][text] = last["kinds"]["hard"]
    last["lost"][0]["kind"] = text
    last["provenance"]["command"] = text
    rows = [sample(u, 0, prompt=[{"role": "user", "content": text}] if u else text, completion=text, gamma="inf",
                   pieces=[text, " b", " c", text]) for u in (0, 40)]  # fmt: skip
    lines = [line(n, **{f"watched/{text}": 0.5, f"seconds/{text}": 1.0}) for n in range(1, 41)]
    contents = {"config__json": settings(name=text, task=text, model=text) | {text: text}, "samples__jsonl": rows,
                "metrics__jsonl": lines, "summary__json": last}  # fmt: skip
    return make_run(name, **contents)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_hostile_text_is_data(make_run, several):
    folders = [hostile(make_run), hostile(make_run, "second")][: 2 if several else 1]
    page = page_of(*folders)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"img", "a", "link", "iframe", "base"} & set(tags)
    for control in ("\x00", "\x07", "\x1b"):
        assert control not in page.text
    assert "<img src=x" in page.text  # as text
    assert "{{ 7 * 7 }}" in page.text
    (content,) = [content for _, attributes, content in page.raw if attributes.get("type") == "application/json"]
    assert not set(content) & set("<>&")
    assert content.isascii()
    if not several:
        assert page.data["samples"][0]["answers"][0]["text"] == HOSTILE


def test_half_of_a_character_can_be_written(make_run):
    page = report_page([read_run(hostile(make_run, text="\ud83d half"))])
    page.encode("utf-8")
    assert "\N{REPLACEMENT CHARACTER} half" in page


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_page_is_self_contained_and_its_policy_allows_its_own_code_alone(make_run, several):
    folders = [make_run(), make_run("second")] if several else [make_run()]
    assert_self_contained(report_page([read_run(folder) for folder in folders]))


def test_ids_are_unique_and_labels_lead_somewhere(make_run):
    page = page_of(make_run())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


def test_long_runs_make_no_long_pages(make_run):
    lines = [line(n, gamma_histogram=[1, 2, 3, 4]) for n in range(1, 5001)]
    rows = [
        sample(u, i, pieces=["word "] * 256, special=[0] * 256, commit_step=[1] * 256)
        for u in range(0, 5001, 50)
        for i in range(4)
    ]
    source = report_page([read_run(make_run(metrics__jsonl=lines, samples__jsonl=rows))])
    assert len(source) < 1_500_000


def test_samples_are_the_first_the_last_and_some_between(make_run):
    run = read_run(make_run(samples__jsonl=[sample(u, i) for u in range(0, 1000, 10) for i in range(2)]))
    first, second = samples(run)
    updates = [answer["update"] for answer in first["answers"]]
    assert (updates[0], updates[-1], len(updates)) == (0, 990, 12)
    assert second["prompt"] == "prompt 1"


@pytest.mark.parametrize(
    "changes",
    [
        {"pieces": None}, {"pieces": ["a"]}, {"pieces": [1, 2, 3, 4]}, {"commit_step": ["x"] * 4}, {"commit_step": [-1] * 4},
        {"commit_step": [10**9] * 4}, {"special": {}},
    ],
    ids=repr,
)  # fmt: skip
def test_a_sample_that_is_not_whole_is_left_out(make_run, changes):
    rows = [sample(0, 0, **changes), sample(1, 0)]
    (only,) = samples(read_run(make_run(samples__jsonl=rows)))
    assert [answer["update"] for answer in only["answers"]] == [1]


@pytest.mark.parametrize(
    "value", [None, True, "x", [], {}, -1, 1e400, 10**400, "NaN"], ids=lambda value: repr(value)[:12]
)
def test_whatever_a_file_holds_there_is_a_page(make_run, value):
    """Every value of every file in turn is another one."""
    files = {"config__json": settings(), "metrics__jsonl": line(1), "samples__jsonl": sample(0, 0), "summary__json": summary(1),
             "base__json": {"heldout": [evaluation("r", 0.5, 2.0)], "watched": evaluation("r", 0.5, 2.0, kinds={"a": {"accuracy": 1}})}}  # fmt: skip
    contents = {}
    for name, content in files.items():
        others = {key: value for key in content if key not in ("update", "algorithm")}
        contents[name] = json.loads(json.dumps(content)) | others
    page_of(make_run("replaced", **contents))
    inner = {name: {key: replaced(of, value) for key, of in content.items()} for name, content in files.items()}
    inner["config__json"]["algorithm"] = replaced(settings()["algorithm"], value)
    page_of(make_run("inner", **inner))


def replaced(of, value):
    """The same tables and lists, with another value at their ends."""
    if isinstance(of, dict):
        return {key: replaced(inner, value) for key, inner in of.items()}
    return [replaced(inner, value) for inner in of] if isinstance(of, list) else value
