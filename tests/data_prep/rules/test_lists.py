"""What is read from files: URL blacklists in UT1's layout, bad words, the language model."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import FilterConfig
from data_prep.rules import Filter, bad_words, language
from data_prep.rules.blacklist import Blacklist, load, split_url
from data_prep.rules.lines import drop_lines
from data_prep.rules.view import View
from tests.data_prep.rules.test_release_faults import GOOD

LISTS = {"adult/domains": "bad.com\r\nBAD.org\n10.0.0.1\n", "adult/urls": "half.com/x/\nwww.other.com/Y\n",
         "games/domains": "play.net\n", "child/domains": "kids.org\n", "adult/usage": "black\n"}


@pytest.fixture(params=["folder", "tar.gz"])
def ut1(request, tmp_path):
    """The same small lists, as a folder and as an archive, with an old name of a category as a link."""
    if request.param == "folder":
        for name, text in LISTS.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "porn").symlink_to("adult")
        return str(tmp_path)
    path = tmp_path / "lists.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in LISTS.items():
            member = tarfile.TarInfo(f"./blacklists/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("./blacklists/porn")
        link.type, link.linkname = tarfile.SYMTYPE, "adult"
        archive.addfile(link)
    return str(path)


@pytest.mark.parametrize(("url", "hit"), [
    ("http://bad.com", True), ("https://www.bad.com/x?y", True), ("bad.com", True), ("//a.b.bad.com:8080/", True),
    ("http://user:secret@BAD.com/", True), ("http://bad.com.", True), ("http://bad.org", True),
    ("http://notbad.com", False), ("http://bad.com.cn", False), ("http://bad.co", False), ("http://com", False),
    ("http://good.com/bad.com", False), ("http://good.com/?u=http://bad.com/", False),
    ("http://10.0.0.1/x", True), ("http://1.10.0.0.1", False), ("http://0.0.1", False),
    ("http://half.com/x", True), ("http://half.com/X/", True), ("http://half.com/x?q", True),
    ("http://half.com/x#f", True), ("http://half.com/xy", False), ("http://half.com/", False),
    ("http://www.half.com/x/y", True), ("http://other.com/y", True), ("http://play.net", True),
    ("", False), ("/", False), ("http://", False), ("http://[::1]:80/x", False), ("坏.com", False),
])
def test_hosts_and_urls_are_blocked_at_boundaries(ut1, url, hit):
    assert load([ut1]).hit(url) is hit


def test_lists_of_what_is_allowed_block_nothing_unless_named(ut1):
    assert not load([ut1]).hit("http://kids.org")
    assert load([ut1], ["child"]).hit("http://kids.org")


def test_categories_are_chosen_by_name_also_by_an_old_one(ut1):
    assert load([ut1], ["games"]).hit("http://play.net") and not load([ut1], ["games"]).hit("http://bad.com")
    assert load([ut1], ["porn"]).hit("http://bad.com") and not load([ut1], ["porn"]).hit("http://play.net")
    with pytest.raises(UserError, match="'gams' does not exist; nearest: games"):
        load([ut1], ["gams"])


def test_filters_share_one_blacklist(ut1):
    config = FilterConfig(url_blacklists=[ut1])
    one, other = Filter("web", config), Filter("book", config.model_copy(update={"mode": "statistics"}))
    assert one._blacklist is other._blacklist
    assert one.apply(GOOD, "http://bad.com/1").failed == ("url_blacklist",)
    assert one.apply(GOOD, "http://good.com/1").failed == () and one.apply(GOOD, None).failed == ()


def test_hashes_of_one_process_do_not_reach_another(ut1):
    with pytest.raises(TypeError, match="of this process"):
        pickle.dumps(load([ut1]))
    again = pickle.loads(pickle.dumps(Filter("web", FilterConfig(url_blacklists=[ut1]))))
    assert again.apply(GOOD, "http://bad.com/1").failed == ("url_blacklist",)


def test_a_blacklist_needs_eight_bytes_an_entry():
    blacklist = Blacklist.of([f"{'long' * 10}{number}.com" for number in range(1000)], [])
    assert len(blacklist) == 1000 and blacklist.bytes == 8000


def test_files_that_are_no_blacklists_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="no CATEGORY/domains"):
        load([str(tmp_path)])
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(UserError, match="no readable .tar.gz"):
        load([str(tmp_path / "x.tar.gz")])


def test_the_real_lists_load():
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "lists" / "ut1-blacklists.tar.gz"
    if not path.exists():
        pytest.skip("the UT1 blacklists are not here")
    blacklist = load([str(path)])
    assert len(blacklist) > 300_000 and blacklist.bytes == 8 * len(blacklist)
    assert not blacklist.hit("https://zh.wikipedia.org/wiki/中国") and blacklist.hit("http://7chan.org/a/1")


@pytest.mark.parametrize(("url", "parts"), [
    ("HTTP://User@WWW.A.com:80/X?y#z", ("www.a.com", "/x?y#z")), ("a.com", ("a.com", "")), ("?x", ("", "?x")),
    ("http://[2001:db8::1]:8080/a", ("[2001:db8::1]:8080", "/a")), ("  http://a.com/ ", ("a.com", "/")),
])
def test_a_url_splits_into_host_and_rest(url, parts):
    assert split_url(url) == parts


@pytest.fixture
def words(tmp_path):
    """A list with words, a comment, a single character, Latin words, traditional and full-width forms."""
    path = tmp_path / "bad.txt"
    path.write_text("# 注释\n做爱\n傻瓜蛋\n性\nass\n卖B\nＡＢＣ\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("line", "stays"), [
    ("他们在做爱。", False), ("妈妈做爱心早餐给我吃。", True), ("你这个傻瓜蛋！", False), ("可能性很大。", True),
    ("性是一个汉字。", True), ("In class we pass.", True), ("You ass!", False), ("你这个ass，走开。", False),
    ("他说卖Bb的。", True), ("他们卖b。", False), ("Abc 公司来了。", False), ("注释在这里。", True),
])
def test_bad_words_are_words_not_pieces_of_words(words, line, stays):
    text = f"今天天气不错。\n{line}\n明天再说吧。"
    cleaned, removed = drop_lines(View(text), ("bad_words",), bad_words.load([words]))
    assert (cleaned == text) is stays and removed == ({} if stays else {"bad_words": 1})
    assert cleaned.startswith("今天天气不错。\n") and cleaned.endswith("\n明天再说吧。")


def test_bad_words_count_only_where_a_list_is_given(words):
    text = GOOD + "你这个傻瓜蛋快走开吧！\n"
    assert Filter("web", FilterConfig()).apply(text, None).text == text
    outcome = Filter("web", FilterConfig(bad_words=[words])).apply(text, None)
    assert outcome.text.strip() == GOOD.strip() and outcome.removed == {"lines_bad_words": 1}


def test_a_file_of_bad_words_must_be_there_and_utf8(tmp_path):
    with pytest.raises(UserError, match="a word a line"):
        bad_words.load([str(tmp_path / "absent")])
    (tmp_path / "gb.txt").write_bytes("做爱".encode("gb18030"))
    with pytest.raises(UserError, match="UTF-8"):
        bad_words.load([str(tmp_path / "gb.txt")])


@pytest.mark.parametrize(("text", "label"), [
    ("今天天气不错，我们去公园散步。", "zh"), ("The weather is fine, and we walk in the park.", "en"),
    ("今日は天気がいいので、公園を散歩します。", "ja"), ("오늘은 날씨가 좋아서 공원을 산책합니다.", "ko"),
    ("", ""), (" \n\u3000", ""),
])
def test_languages_are_told_apart(text, label):
    assert language.load(None)(text)[0] == label


def test_what_stands_after_a_line_break_counts():
    identify = language.load(None)
    assert identify("Hi.\n今天天气不错，我们去公园散步，然后去集市买菜。\r\n明天再说。")[0] == "zh"


def test_a_second_look_is_taken_only_where_the_first_is_unsure():
    identify = language.load(None)
    mixed = "OK 12 (x) = 3; 好 " * 25
    assert identify(mixed)[1] < language.CERTAIN
    assert identify(mixed[:language.LOOKED_AT] + GOOD * 20)[0] == "zh"
    head = (GOOD * 3)[:language.LOOKED_AT]
    assert identify(head)[1] >= language.CERTAIN and identify(head + mixed * 4) == identify(head)


def test_a_language_model_must_be_one(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        language.load(str(tmp_path / "absent.ftz"))
    (tmp_path / "x.ftz").write_bytes(b"no model")
    with pytest.raises(UserError, match="no fastText model"):
        language.load(str(tmp_path / "x.ftz"))
