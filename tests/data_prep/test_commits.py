"""Units are committed whole, once, and found again only where nothing that decides their bytes has changed."""

import multiprocessing

import pytest

from data_prep.commits import open_stage

UNIT = {"id": "a", "part": "one", "location": "here"}


def stage(folder, *options, **more):
    """The stage under test."""
    return open_stage(folder / "stage", *(options or ("v1",)), **more)


def write(folder, text="text", unit=UNIT, options=("v1",)):
    """Commit a unit of one file."""
    made = stage(folder, *options)
    with made.commit(unit) as output:
        output.file("a.txt").write_text(text)
        output.counters["letters"] = len(text)
    return made


def test_a_unit_is_found_with_its_files_and_counters(tmp_path):
    commit = write(tmp_path).find(UNIT)
    assert commit.files == {"a.txt": 4} and commit.counters == {"letters": 4}
    assert (tmp_path / "stage/parts/a.txt").read_text() == "text"


@pytest.mark.parametrize(("unit", "options"), [
    (UNIT | {"part": "two"}, ("v1",)), (UNIT | {"more": 1}, ("v1",)), (UNIT, ("v2",)), (UNIT | {"id": "b"}, ("v1",))])
def test_what_is_made_otherwise_is_not_found(tmp_path, unit, options):
    write(tmp_path)
    assert stage(tmp_path, *options).find(unit) is None


def test_where_a_unit_lies_does_not_matter(tmp_path):
    assert write(tmp_path).find(UNIT | {"location": "elsewhere"})


def test_a_unit_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), stage(tmp_path).commit(UNIT) as output:
        output.file("a.txt").write_text("half")
        raise ZeroDivisionError
    assert stage(tmp_path).find(UNIT) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_missing_or_cut_file_makes_the_unit_undone(tmp_path):
    made = write(tmp_path)
    (tmp_path / "stage/parts/a.txt").write_text("tex")
    assert made.find(UNIT) is None
    (tmp_path / "stage/parts/a.txt").unlink()
    assert made.find(UNIT) is None


def test_another_unit_of_that_name_takes_the_old_record_away_before_its_files(tmp_path, monkeypatch):
    write(tmp_path)
    other = UNIT | {"part": "two"}

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("data_prep.commits.write_atomically", fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, "other", other)
    # The new file is there, so the old record must not be: it would stand for bytes that are gone.
    assert stage(tmp_path).find(UNIT) is None and stage(tmp_path).find(other) is None


def test_clean_removes_what_the_plan_does_not_name(tmp_path):
    made = write(tmp_path)
    gone = {"id": "gone"}
    with made.commit(gone) as output:
        output.file("folder/gone.txt").write_text("x")
    (tmp_path / "stage/parts/.a.txt.123.tmp").write_text("left by a killed worker")
    made.clean([UNIT])
    assert made.find(UNIT) and made.find(gone) is None
    assert [path.name for path in (tmp_path / "stage/parts").rglob("*")] == ["a.txt"]


def _work(folder, barrier):
    barrier.wait(timeout=60)
    write(folder)


def test_two_workers_on_one_unit_leave_one_result(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_work, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert stage(tmp_path).find(UNIT).files == {"a.txt": 4}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
