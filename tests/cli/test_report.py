"""`report`: where the page goes."""

import shutil

from tests.cli.conftest import call


def test_one_run_beside_itself_and_several_where_one_is(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "[/copy]"
    shutil.copytree(text_run.directory, copy)
    (copy / "report.html").unlink()
    assert call("report", copy).out == f"report: {copy / 'report.html'}\n"
    page = (copy / "report.html").read_text()
    assert "bits" in page and "://" not in page.replace("http://www.w3.org", "")
    assert call("report", copy, text_run.directory).status == 0 and (tmp_path / "report.html").exists()
    assert call("report", copy, "output=elsewhere.html").status == 0 and (tmp_path / "elsewhere.html").exists()


def test_a_dry_run_writes_nothing(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = call("report", text_run.directory, "output=page.html", "--dry-run")
    assert printed.status == 0 and "would write page.html" in printed.out and list(tmp_path.iterdir()) == []
