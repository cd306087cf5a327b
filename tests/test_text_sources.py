"""Where text comes from: files, data sets of the hub, error messages."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
from texts import BOS, decode, make_tokenizer, texts_of, write_json_lines, write_parquet

from matgptq.errors import CalibrationError
from matgptq.text import sources as text_sources
from matgptq.text.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def documents():
    return [f"document number {number} {'x' * (number % 7)}" for number in range(40)]


def all_texts(dataset, tokenizer) -> list[str]:
    """Every document of a source, in the shuffled order, by way of windows of one token."""
    return texts_of(tokenizer, calibration_windows(dataset, tokenizer, nsamples=None, seqlen=1, seed=0).tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\r\n\r\ntwo\r\n", ["one", "two"]),
        ("one\n \t\n\n\ntwo", ["one", "two"]),
        ("one\ntwo\nthree\n", ["one", "two", "three"]),
        ("one\ntwo\n\n", ["one", "two"]),
        ("one\n\nstill one<|endoftext|>two\n<|endoftext|>", ["one\n\nstill one", "two"]),
        ("\ufeffone\ntwo", ["one", "two"]),
        ("a\u2028b\ntwo", ["a\u2028b", "two"]),
    ],
)
def test_txt_documents(tmp_path, tokenizer, text, expected):
    path = tmp_path / "text.TXT"
    path.write_bytes(text.encode())
    assert sorted(all_texts(path, tokenizer)) == sorted(expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path, tokenizer, documents, name):
    path = write_json_lines(tmp_path / name, [{"text": text, "other": 1} for text in [*documents, "", " \n"]])
    assert sorted(all_texts(path, tokenizer)) == sorted(documents)
    assert all_texts(str(path), tokenizer) == all_texts(path, tokenizer)


def test_json_lines_may_have_blank_lines_and_a_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert sorted(all_texts(path, tokenizer)) == ["one", "two"]


@pytest.mark.parametrize("row_group_size", [None, 7])
def test_parquet(tmp_path, tokenizer, documents, row_group_size):
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(40)), "text": documents}, row_group_size)
    assert sorted(all_texts(path, tokenizer)) == sorted(documents)


WIKITEXT = ["", " = One = \n", "", " = = Part = = \n", " text one \n", "", " = 2 = \n", " text two \n"]


def test_wikitext2_by_name(tmp_path, tokenizer, monkeypatch):
    path = write_parquet(tmp_path / "rows.parquet", {"text": WIKITEXT})
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(path)
    )
    windows = evaluation_windows("wikitext2", tokenizer, windows=None, seqlen=1)
    assert decode(tokenizer, windows.tokens) == "\n\n".join(WIKITEXT)
    articles = all_texts("Salesforce/wikitext", tokenizer)
    assert sorted(articles) == [" = 2 = \n text two \n", " = One = \n = = Part = = \n text one \n"]
    kind = {"repo_type": "dataset"}
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"), kind),
        (("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"), kind),
    ]


def test_c4_by_name(tmp_path, tokenizer, documents, monkeypatch):
    path = write_json_lines(tmp_path / "c4.json.gz", [{"text": text} for text in documents])
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **_: asked.append(args) or str(path))
    assert sorted(all_texts("c4", tokenizer)) == sorted(documents)
    evaluation_windows("allenai/c4", tokenizer, windows=1, seqlen=8)
    assert [filename for _, filename in asked] == [
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_protocol_of_the_gptq_papers(tmp_path, monkeypatch, adds_bos):
    """Against their code written out: one string, the tokenizer's own special tokens, 256 windows of C4 at most."""
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    rows = write_parquet(tmp_path / "rows.parquet", {"text": WIKITEXT})
    texts = [f"text {number}" for number in range(1300)]
    c4 = write_json_lines(tmp_path / "c4.json.gz", [{"text": text} for text in texts])
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda _, name, **__: str(rows if "wikitext" in name else c4)
    )
    options = {"windows": None, "protocol": "gptq"}
    expected = tokenizer("\n\n".join(WIKITEXT))["input_ids"]
    assert (expected[0] == BOS) == adds_bos
    windows = evaluation_windows("wikitext2", tokenizer, seqlen=16, **options)
    assert windows.tokens.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert 'joined by "\\n\\n", special tokens as the tokenizer adds them' in windows.protocol

    expected = tokenizer(" ".join(texts[:1100]))["input_ids"]
    whole = evaluation_windows("c4", tokenizer, seqlen=64, **options)
    assert whole.tokens.flatten().tolist() == expected[: len(expected) // 64 * 64]
    assert 'the first 1100 documents joined by " "' in whole.protocol
    capped = evaluation_windows("c4", tokenizer, seqlen=16, **options)
    assert capped.tokens.flatten().tolist() == expected[: 256 * 16]
    assert len(evaluation_windows("c4", tokenizer, seqlen=16, windows=3, protocol="gptq").tokens) == 3


def test_all_of_a_hub_data_set_is_its_first_1100_documents(tmp_path, tokenizer, monkeypatch):
    texts = [f"text {number}" for number in range(1300)]
    path = write_json_lines(tmp_path / "c4.json.gz", [{"text": text} for text in texts])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))
    everything = evaluation_windows("c4", tokenizer, windows=None, seqlen=1)
    assert decode(tokenizer, everything.tokens) == "\n\n".join(texts[:1100])
    assert "the first 1100 documents" in everything.protocol
    more = evaluation_windows("c4", tokenizer, windows=len(everything.tokens) + 100, seqlen=1)
    assert decode(tokenizer, more.tokens).startswith("\n\n".join(texts[:1105]))


class LocalFileSystem:
    """Stands in for ``HfFileSystem``: hub paths mapped to local files, every opened path recorded."""

    def __init__(self, files: dict[str, Path]):
        self.files, self.opened = files, []

    def find(self, path: str) -> list[str]:
        return [name for name in self.files if name.startswith(path)]

    def open(self, path: str, mode: str):
        self.opened.append(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path].open(mode)


def test_fineweb_reads_only_the_row_groups_it_needs(tmp_path, tokenizer, documents, monkeypatch):
    path = write_parquet(tmp_path / "f.parquet", {"text": documents}, row_group_size=5)
    root = "datasets/HuggingFaceFW/fineweb-edu/sample/10BT"
    filesystem = LocalFileSystem({f"{root}/000_00000.parquet": path, f"{root}/001_00000.parquet": path})
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: filesystem)
    groups = []
    original = text_sources._read_row_group
    monkeypatch.setattr(text_sources, "_read_row_group", lambda f, g, n: groups.append(g) or original(f, g, n))
    windows = calibration_windows("fineweb-edu", tokenizer, nsamples=1, seqlen=32, seed=3)
    assert len(groups) == 1
    assert set(texts_of(tokenizer, windows.tokens)[:-1]) < set(documents)
    assert sorted(all_texts("fineweb-edu", tokenizer)) == sorted(documents)
    filesystem.opened.clear()
    evaluated = evaluation_windows("fineweb-edu", tokenizer, windows=2, seqlen=32)
    assert decode(tokenizer, evaluated.tokens) == "\n\n".join(documents)[:64]
    assert set(filesystem.opened) == {f"{root}/001_00000.parquet"}


def test_any_other_name_reads_its_parquet_conversion(tmp_path, tokenizer, monkeypatch):
    root = "datasets/owner/name@refs/convert/parquet/default"
    files = {
        f"{root}/{split}/{number}.parquet": write_parquet(tmp_path / f"{split}{number}.parquet", {"text": [split] * 3})
        for split in ("test", "train", "extra")
        for number in ("0001", "0000")
    }
    filesystem = LocalFileSystem(files)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: filesystem)
    assert all_texts("owner/name", tokenizer) == ["train"] * 3
    assert set(filesystem.opened) == {f"{root}/train/0000.parquet"}
    windows = evaluation_windows("owner/name", tokenizer, windows=1, seqlen=4)
    assert decode(tokenizer, windows.tokens) == "test"
    assert "owner/name (default/test/0000.parquet)" in windows.protocol
    with pytest.raises(CalibrationError, match=r"owner/other.*no parquet conversion"):
        evaluation_windows("owner/other", tokenizer, windows=1, seqlen=4)


def test_a_failed_download_names_the_data_set(tokenizer, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: LocalFileSystem({}))
    with pytest.raises(CalibrationError, match=r"c4: cannot be fetched .*no route to host.*give a local file"):
        calibration_windows("c4", tokenizer, nsamples=1, seqlen=8, seed=0)
    with pytest.raises(CalibrationError, match=r"fineweb-edu.*cannot be fetched"):
        calibration_windows("fineweb-edu", tokenizer, nsamples=1, seqlen=8, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"line 1: not valid JSON"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b" \n\n", r"a\.txt: the file is empty"),
        ("a.txt", b"fine\nfine\n\xff\xfe", r"a\.txt, line 3: not UTF-8"),
        ("a.csv", b"text", r"a\.csv: unknown extension; .*\.jsonl"),
        ("a.jsonl", b"", r"a\.jsonl: the file holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}', r"a\.jsonl, line 3: not UTF-8"),
        ("a.jsonl", b'{"content": "x"}', r"a\.jsonl, line 1: no field `text` or `messages`; .*'content'"),
        ("a.jsonl", b'["x"]', r"a\.jsonl, line 1: expected an object .*list"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1: `text` must be a string, not NoneType"),
        ("a.jsonl", b'{"messages": "x"}', r"a\.jsonl, line 1: `messages` must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', r"line 1: .*chat template.*has none"),
        ("a.json.gz", b"no gzip", r"a\.json\.gz, after line 0: damaged gzip"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-10], r"a\.json\.gz, after line \d+: damaged gzip"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read"),
    ],
)
@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_bad_files_are_named_with_the_line(tmp_path, tokenizer, name, content, message, purpose):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    load = {
        "calibration": lambda path: calibration_windows(path, tokenizer, nsamples=1, seqlen=4, seed=0),
        "evaluation": lambda path: evaluation_windows(path, tokenizer, windows=100, seqlen=4000),
    }
    with pytest.raises(CalibrationError, match=message):
        load[purpose](tmp_path / name)


def test_bad_parquet(tmp_path, tokenizer, monkeypatch):
    def load(columns):
        path = write_parquet(tmp_path / "a.parquet", columns)
        return calibration_windows(path, tokenizer, nsamples=1, seqlen=4, seed=0)

    with pytest.raises(CalibrationError, match=r"no column `text` or `messages`; the columns are 'body', 'id'"):
        load({"body": ["x"], "id": [1]})
    with pytest.raises(CalibrationError, match="row 2: `text` must be a string, not NoneType"):
        load({"text": ["x", None]})
    with pytest.raises(CalibrationError, match="the file is empty"):
        load({"text": []})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match=r'pip install "matgptq\[parquet\]"'):
        calibration_windows(tmp_path / "a.parquet", tokenizer, nsamples=1, seqlen=4, seed=0)


@pytest.mark.parametrize("dataset", ["missing.txt", "missing", "/no/such.jsonl", "data/missing.parquet"])
def test_missing_file(tokenizer, dataset):
    with pytest.raises(CalibrationError, match=f"{dataset}: no such file; give a file .*wikitext2"):
        calibration_windows(dataset, tokenizer, nsamples=1, seqlen=4, seed=0)


def test_directory(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match="is a directory"):
        calibration_windows(tmp_path, tokenizer, nsamples=1, seqlen=4, seed=0)
