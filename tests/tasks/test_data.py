"""Published data: local files of each format, the hub, and what is wrong with a file."""

import csv
import io
import json
import sys
from decimal import Decimal

import pytest

import diffpo
from diffpo import Grade
from diffpo.tasks import GSM8K, Countdown, Math500, Sudoku, SudokuProblem, get_task, task_names
from diffpo.tasks.countdown import CountdownProblem, CountdownQuestion
from diffpo.tasks.data import hub_problems, local_problems
from diffpo.tasks.task import NoSplitError

GSM8K_ROWS = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "Caf\u00e9?", "answer": "#### 1,000"}]


@pytest.fixture
def write(tmp_path):
    """write(name, rows) -> path of a file in the format of its ending."""

    def to_file(name: str, rows: list[dict]):
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs the extra diffpo[data]")
            import pyarrow

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return to_file


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv", "test.parquet"])
def test_every_format_holds_the_same_problems(write, name):
    problems, revision = local_problems(GSM8K(), write(name, GSM8K_ROWS))
    assert [(p.text, p.answer) for p in problems] == [("1 + 1?", Decimal(2)), ("Caf\u00e9?", Decimal(1000))]
    assert revision.startswith("sha256:")


def test_the_revision_is_of_the_content(write):
    first, second, third = (write(name, GSM8K_ROWS[:n]) for name, n in (("a.jsonl", 2), ("b.jsonl", 2), ("c.jsonl", 1)))
    revisions = [local_problems(GSM8K(), path)[1] for path in (first, second, third)]
    assert revisions[0] == revisions[1] != revisions[2]


def test_countdown_items_of_d1(write):
    rows = [{"input": "30,100,93", "output": "23"}, {"input": "7,3,11", "output": "32"}]
    task = Countdown()
    (large, small), _ = local_problems(task, write("countdown.jsonl", rows))
    assert large == CountdownQuestion((30, 100, 93), 23)
    assert isinstance(small, CountdownProblem)
    assert "[30, 100, 93]" in task.asked("chat").prompt(large)[0]["content"]
    assert task.grade(large, "<reasoning>x</reasoning><answer>30 - (100 - 93) = 23</answer>").correct
    assert task.grade(large, "<answer>30 - 93</answer>").reward == 0.1
    assert task.prompt(small) == "7 3 11 -> 32"
    with pytest.raises(ValueError, match="no compact form"):
        task.prompt(large)


def test_sudoku_items_of_d1(write):
    rows = [{"Puzzle": "0234341221434321", "Solution": "1234341221434321"}]
    for name in ("sudoku.csv", "sudoku.jsonl"):
        (problem,), _ = local_problems(Sudoku(), write(name, rows))
        assert problem == SudokuProblem("0234341221434321", "1234341221434321")
    as_number = [{"Puzzle": 234341221434321, "Solution": 1234341221434321}]
    assert local_problems(Sudoku(), write("numbers.jsonl", as_number))[0] == [problem]


def test_math_rows(write):
    rows = [{"problem": "q", "solution": r"\boxed{2}", "answer": "2", "subject": "Algebra", "level": 1}]
    ((problem,), _) = local_problems(Math500(), write("test.jsonl", rows))
    assert (problem.text, problem.answer) == ("q", "2")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "q"}],
            "row 1 of x.jsonl has no answer: task gsm8k needs the columns question, answer, found question",
        ),
        ([*GSM8K_ROWS, {"prompt": "q", "answer": "#### 1"}], "row 3 .* no question"),
        ([{"question": None, "answer": "#### 1"}], "no question"),
        ([{"question": "q", "answer": "1"}], "row 1 of x.jsonl: answer must end in ####"),
        ([], "holds no rows"),
        (["text"], "must be an object with columns, got str"),
    ],
)
def test_wrong_rows_are_named(write, rows, message):
    with pytest.raises(ValueError, match=message):
        local_problems(GSM8K(), write("x.jsonl", rows))


@pytest.mark.parametrize("row", [{"input": "1,x,3", "output": "2"}, {"input": "1,2,3", "output": "many"}])
def test_wrong_countdown_rows_are_named(write, row):
    with pytest.raises(ValueError, match=r"row 1 .*input and output must be numbers"):
        local_problems(Countdown(), write("x.jsonl", [row]))


def test_wrong_sudoku_rows_are_named(write):
    with pytest.raises(ValueError, match=r"row 1 .*does not solve"):
        local_problems(Sudoku(), write("x.csv", [{"Puzzle": "0" * 15 + "2", "Solution": "1234341221434321"}]))


def test_a_broken_missing_or_unknown_file_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": ')
    with pytest.raises(ValueError, match=r"x.jsonl, line 1 is not valid JSON"):
        local_problems(GSM8K(), tmp_path / "x.jsonl")
    with pytest.raises(FileNotFoundError, match=r"data: there is no file .*y.jsonl"):
        local_problems(GSM8K(), tmp_path / "y.jsonl")
    (tmp_path / "z.txt").write_text("")
    with pytest.raises(ValueError, match=r"z.txt must be one of .jsonl, .csv, .parquet"):
        local_problems(GSM8K(), tmp_path / "z.txt")


def test_what_is_no_file_says_what_it_is(tmp_path):
    for path, kind in ((tmp_path, "a folder"), ("/dev/zero", "a device or a pipe")):
        with pytest.raises(ValueError, match=f"data: {path} is {kind}: give a file, or -"):
            local_problems(GSM8K(), path)


def test_rows_of_standard_input(monkeypatch):
    content = "".join(json.dumps(row) + "\n" for row in GSM8K_ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    problems, revision = local_problems(GSM8K(), "-")
    assert [problem.answer for problem in problems] == [2, 1000]
    assert revision.startswith("sha256:")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content + b"{")))
    with pytest.raises(ValueError, match="data: standard input, line 3 is not valid JSON"):
        local_problems(GSM8K(), "-")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (Countdown(), {"nums": [7.0, 3.0, 11.0], "target": 32.0}),
        (Sudoku(), {"Puzzle": 234341221434321.0, "Solution": 1234341221434321.0}),
        (Math500(), {"problem": "q", "answer": 2.0}),
    ],
)
def test_whole_numbers_that_a_table_made_floats(write, task, row):
    whole = {name: [*map(int, v)] if isinstance(v, list) else int(v) if v != "q" else v for name, v in row.items()}
    ((problem,), _), ((expected,), _) = (local_problems(task, write("x.jsonl", [given])) for given in (row, whole))
    assert problem == expected
    assert diffpo.grade(task, row, "") == diffpo.grade(task, whole, "")


# ---- the test split of a task is its data


@pytest.mark.parametrize("task", [GSM8K, Countdown])
def test_the_test_split_is_the_data_that_is_given(write, task):
    rows = GSM8K_ROWS if task is GSM8K else [{"input": f"7,3,{n}", "output": "32"} for n in (11, 12)]
    given = task(data=str(write("x.jsonl", rows)))
    first, second = given.problems("test", 2, seed=0)
    assert given.problems("test", 1, seed=5) == [first]
    assert (given.published[0], given.problems("test", 0, seed=0)) == ([first, second], [])
    with pytest.raises(ValueError, match=f"the test split of {task.name} holds 2 problems, 3 were asked for"):
        given.problems("test", 3, seed=0)
    with pytest.raises(ValueError, match="-1"):
        given.problems("test", -1, seed=0)


def test_published_data_has_no_other_split(write):
    for split in ("train", "validation"):
        with pytest.raises(NoSplitError, match=f"gsm8k has no {split} split"):
            GSM8K(data=str(write("x.jsonl", GSM8K_ROWS))).problems(split, 1, seed=0)
    with pytest.raises(ValueError, match="'holdout'"):
        GSM8K().problems("holdout", 1, seed=0)
    task = Sudoku(data=str(write("sudoku.jsonl", [{"Puzzle": "0234341221434321", "Solution": "1234341221434321"}])))
    assert task.problems("train", 5, seed=0) == Sudoku().problems("train", 5, seed=0)


def test_a_task_is_asked_in_the_formats_it_has():
    for task in (Countdown(), Sudoku()):
        problem = task.problems("test", 1, seed=0)[0]
        assert isinstance(task.prompt(problem), str)
        assert task.asked("chat").prompt(problem) == type(task)(format="chat").prompt(problem)
        assert task.asked("chat").asked("compact").prompt(problem) == task.prompt(problem)
        assert task.format == "compact"
    for refused in (lambda: GSM8K(format="compact"), lambda: GSM8K().asked("compact")):
        with pytest.raises(ValueError, match="gsm8k has no compact format: use --format chat"):
            refused()


def test_a_chat_reads_no_compact_answer():
    puzzle, compact = "0302201030204030", " ".join("1342241331244231")
    assert Sudoku().grade(Sudoku().problem(puzzle), compact).correct
    assert Sudoku(format="chat").grade(Sudoku().problem(puzzle), compact) == Grade(0.0, False)
    steps = "7 * 3 = 21 , 21 + 11 = 32"
    assert Countdown().grade(Countdown().problem((7, 3, 11), 32), steps).correct
    assert Countdown(format="chat").grade(Countdown().problem((7, 3, 11), 32), steps) == Grade(0.0, False)


# ---- what editors, spreadsheets and other tools make of a file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"question": "1 + 1?", "answer": "#### 2"}\r\n\r\n'),
        ("test.ndjson", b'\n{"question": "1 + 1?", "answer": "#### 2", "score": NaN}'),
        ("test.JSONL", b'{"question": "1 + 1?", "answer": "#### 2"}'),
        ("lines.json", b'{"question": "1 + 1?", "answer": "#### 2"}\n'),
        ("array.json", b'[\n {"question": "1 + 1?",\n  "answer": "#### 2"}\n]\n'),
        ("bom.csv", b"\xef\xbb\xbfquestion,answer\r\n1 + 1?,#### 2\r\n"),
        ("test.CSV", b"number,question,answer\n\n7,1 + 1?,#### 2"),
        ("parts.jsonl", b'{"question": [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}], "answer": "#### 2"}'),
        ("trl.jsonl", b'{"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "#### 2"}'),
        ("sft.jsonl", b'{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]}'),
        ("completion.jsonl", b'{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}], '
                             b'"completion": [{"role": "assistant", "content": "#### 2"}]}'),
    ],
)  # fmt: skip
def test_the_same_problem_however_it_was_saved(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    ((problem,), _) = local_problems(GSM8K(), tmp_path / name)
    assert (problem.text, problem.answer) == ("1 + 1?", Decimal(2))


def test_a_csv_with_line_breaks_quotes_and_long_fields(tmp_path):
    long = "x" * 200_000
    (tmp_path / "x.csv").write_text(
        f'question,answer,notes\n"one, ""two""\nthree?",#### 2,{long}\n4?,#### 4,\n', newline=""
    )
    limit = csv.field_size_limit()
    problems, _ = local_problems(GSM8K(), tmp_path / "x.csv")
    assert [problem.text for problem in problems] == ['one, "two"\nthree?', "4?"]
    assert csv.field_size_limit() == limit


def test_a_conversation_for_math(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": r"so \boxed{2}"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    ((problem,), _) = local_problems(Math500(), tmp_path / "x.jsonl")
    assert (problem.text, problem.answer) == ("q", "2")


GOOD = '{"question": "q", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("x.jsonl", f'{GOOD}\n\n{{"question": "half \\ud83d"}}', "x.jsonl, line 3: not valid Unicode"),
        ("x.jsonl", f"{GOOD}\n" + "[" * 100_000, "x.jsonl, line 2 is not valid JSON"),
        ("x.jsonl", f'{GOOD}\n{{"question": "q", "answer": {"9" * 5000}}}', "x.jsonl, line 2 is not valid JSON: a number of 5000 digits"),
        ("x.jsonl", f'{GOOD}\n\n{{"question": "q", "answer": NaN}}', "line 3, row 2 of x.jsonl: answer is no number: nan"),
        ("x.jsonl", f'{GOOD}\n{{"question": "q", "answer": -1e400}}', "line 2, row 2 of x.jsonl: answer is no number: -inf"),
        ("x.jsonl", f'{GOOD}\n{{"question": "q", "answer": [1, NaN]}}', "answer is no number"),
        ("x.jsonl", f'\n{GOOD[:-1]}, "question": "r"}}', "x.jsonl, line 2 is not valid JSON: key 'question' stands twice"),
        ("x.jsonl", f"{GOOD}\n\n7", "line 3, row 2 of x.jsonl must be an object"),
        ("x.json", f"[{GOOD},\n7]", "item 2, row 2 of x.json must be an object"),
        ("x.json", f"[{GOOD},\n,]", "x.json, line 2 is not valid JSON"),
        ("x.json", "{}", "has no question, answer"),
        ("x.jsonl", f"{GOOD}\n{GOOD}".encode("utf-16"), "UTF-16"),
        ("x.jsonl", f"{GOOD}\ncaf\u00e9".encode("latin-1"), "line 2 is not UTF-8"),
        ("x.csv", b"question,answer\nq,a\ncaf\xe9,#### 1", "line 3 is not UTF-8"),
        ("x.jsonl.gz", b"\x1f\x8b\x08", "gzip: unpack it first"),
        ("x.csv", b"PK\x03\x04", "spreadsheet"),
        ("x.csv", "question,answer\nq,#### 1\n\nq,#### 1,000\n", r"line 4 \(row 2\) has 3 values, the header 2"),
        ("x.csv", "question,answer\nq\n", r"line 2 \(row 1\) has 1 values, the header 2"),
        ("x.csv", 'question,answer\n"q\nr",#### 1\n"q', "line 4 is not valid csv"),
        ("x.csv", "question;answer\nq;#### 1\n", "no question, answer: .*separated by semicolons: separate it by commas"),
        ("x.csv", "question\tanswer\nq\t#### 1\n", "separated by tabs"),
        ("x.csv", "question,text\nq,#### 1\n", "line 2, row 1 of x.csv has no answer: .*found question, text"),
        ("x.csv", "question,answer,question\nq,#### 1,r\n", "the header names question more than once"),
        ("x.csv", "question,answer\n", "holds no rows"),
        ("x.csv", "", "holds no rows"),
        ("x.jsonl", '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "answer": "#### 1"}',
         "row 1 of x.jsonl: a chat must be one message of the user, .* got system, user"),
        ("x.jsonl", '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "#### 1"}', "type 'image' is not supported"),
        ("x.jsonl", '{"question": [{"type": "video"}], "answer": "#### 1"}', "question: content part of type 'video'"),
        ("x.jsonl", '{"prompt": [{"role": "user", "content": "q"}]}', "has no answer"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_read_names_its_line(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=named) as caught:
        local_problems(GSM8K(), tmp_path / name)
    assert str(caught.value).startswith("data: ")


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    for read in (lambda: local_problems(GSM8K(), tmp_path / "x.parquet"), lambda: hub_problems(GSM8K())):
        with pytest.raises(ValueError, match=r"pip install pyarrow"):
            read()


def test_a_broken_parquet_file_is_an_error(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet needs the extra diffpo[data]")
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not valid parquet"):
        local_problems(GSM8K(), tmp_path / "x.parquet")


def test_the_hub_offline_suggests_a_local_copy():
    with pytest.raises(FileNotFoundError, match=r"HuggingFaceH4/MATH-500 could not be fetched .*--data"):
        hub_problems(Math500())


def test_the_hub_file_is_read_from_its_cache_with_its_commit(tmp_path, monkeypatch):
    folder = tmp_path / "datasets--HuggingFaceH4--MATH-500" / "snapshots" / ("c" * 40)
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps({"problem": "q", "answer": "2"}) + "\n")

    def downloaded(dataset, file, repo_type):
        assert (dataset, file, repo_type) == ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloaded)
    problems, revision = hub_problems(Math500())
    assert len(problems) == 1
    assert revision == "HuggingFaceH4/MATH-500@" + "c" * 40


@pytest.mark.parametrize("task", [Countdown(), Sudoku()])
def test_a_task_without_published_data_says_so(task):
    with pytest.raises(ValueError, match=f"task {task.name} has no dataset on the hub"):
        hub_problems(task)


def test_tasks_are_found_by_name():
    assert task_names() == ["countdown", "gsm8k", "math500", "medley", "sudoku"]
    assert [get_task(name).name for name in task_names()] == task_names()
    with pytest.raises(ValueError, match=r"'gsm8'.*'gsm8k'"):
        get_task("gsm8")
