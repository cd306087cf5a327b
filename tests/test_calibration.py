"""Calibration and evaluation text: readers, packing, seeding, error messages, the model's own text."""

from __future__ import annotations

import gzip
import json
import logging
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from matgptq import document_order, self_text, text_sources, token_windows
from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.packing import pack_windows
from matgptq.self_text import generate_windows
from matgptq.text_sources import Document
from matgptq.token_windows import Windows, calibration_windows, evaluation_windows, takes_self

BOS, EOS = 0, 1
SPECIAL = ["<s>", "</s>", "<|user|>"]
TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"


def make_tokenizer(
    *, adds_bos: bool = False, adds_eos: bool = False, has_eos: bool = True, template: str | None = None
):
    """Bytes as tokens: every text has a known number of tokens, and ids can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if adds_bos else None,
        eos_token="</s>" if has_eos else None,
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def documents():
    return [f"document number {number} {'x' * (number % 7)}" for number in range(40)]


def decode(tokenizer, tokens) -> str:
    return tokenizer.decode(torch.as_tensor(tokens).flatten().tolist(), clean_up_tokenization_spaces=False)


def texts_of(tokenizer, tokens) -> list[str]:
    return [text for text in decode(tokenizer, tokens).split("</s>") if text]


def write_parquet(path: Path, columns: dict, row_group_size: int | None = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def write_json_lines(path: Path, records) -> Path:
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


# --- readers ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(tmp_path, kind):
    tokenizer = make_tokenizer(adds_bos=True, template=TEMPLATE)
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    if kind == "jsonl":
        path = write_json_lines(tmp_path / "a.jsonl", [{"messages": conversation}, {"messages": []}])
    else:
        path = write_parquet(tmp_path / "a.parquet", {"messages": [conversation, []]})
    tokens = calibration_windows(path, tokenizer, nsamples=None, seqlen=1, seed=0).tokens
    # BOS and EOS once each: the template writes them, neither tokenizer nor packing adds to them.
    assert decode(tokenizer, tokens) == "<s>user:hi</s>assistant:hello</s>"


def test_eos_follows_a_conversation_whose_template_writes_none(tmp_path):
    tokenizer = make_tokenizer(template="{{ messages[0]['content'] }}")
    path = write_json_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    assert decode(tokenizer, calibration_windows(path, tokenizer, nsamples=None, seqlen=1, seed=0).tokens) == "hi</s>"


# --- special tokens, seeds, packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "one</s>"),
        ({"adds_bos": True}, "<s>one</s>"),
        ({"adds_eos": True}, "one</s>"),
        ({"adds_bos": True, "adds_eos": True}, "<s>one</s>"),
        ({"has_eos": False}, "one"),
    ],
)
def test_special_tokens_of_calibration(tmp_path, options, expected):
    (tmp_path / "a.txt").write_text("one\n")
    tokenizer = make_tokenizer(**options)
    windows = calibration_windows(tmp_path / "a.txt", tokenizer, nsamples=None, seqlen=1, seed=0)
    assert decode(tokenizer, windows.tokens) == expected
    assert ("joined by EOS" in windows.protocol) == ("</s>" in expected)


def test_seed_decides_the_order(tmp_path, tokenizer, documents):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(documents))
    state = random.getstate(), torch.get_rng_state()

    def windows(seed):
        return calibration_windows(path, tokenizer, nsamples=4, seqlen=32, seed=seed)

    first = windows(0)
    assert isinstance(first, Windows)
    assert first.tokens.dtype == torch.int64
    assert first.tokens.shape == (4, 32)
    assert torch.equal(first.tokens, windows(0).tokens)
    assert not torch.equal(first.tokens, windows(1).tokens)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert "4 windows of 32 tokens" in first.protocol
    assert "seed 0" in first.protocol
    # Fewer windows are the beginning of more.
    more = calibration_windows(path, tokenizer, nsamples=8, seqlen=32, seed=0).tokens
    assert torch.equal(more[:4], first.tokens)


def test_only_the_documents_needed_are_tokenized(tmp_path, tokenizer, documents, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    seen = []
    original = token_windows.tokenize_document
    monkeypatch.setattr(token_windows, "tokenize_document", lambda t, d: seen.append(d) or original(t, d))
    calibration_windows(tmp_path / "a.txt", tokenizer, nsamples=1, seqlen=40, seed=0)
    assert len(seen) <= 3


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    seqlen=st.integers(1, 9),
    nsamples=st.none() | st.integers(1, 6),
)
def test_packing_loses_no_token(documents, seqlen, nsamples):
    tokens, available = pack_windows(iter(documents), nsamples=nsamples, seqlen=seqlen)
    stream = [token for ids in documents for token in ids]
    count = len(stream) // seqlen if nsamples is None else min(nsamples, len(stream) // seqlen)
    assert tokens.shape == (count, seqlen)
    assert tokens.dtype == torch.int64
    assert tokens.flatten().tolist() == stream[: count * seqlen]
    assert count * seqlen <= available <= len(stream)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), max_size=30), seed=st.integers(0, 99), budget=st.integers(1, 60))
def test_shuffle_does_not_depend_on_the_memory_it_may_use(sizes, seed, budget):
    documents = [Document("x" * size, str(number)) for number, size in enumerate(sizes)]

    def reader():
        return iter(documents)

    whole = [each.where for each in document_order.shuffled([reader], seed, math.inf)]
    assert sorted(whole, key=int) == [each.where for each in documents]
    assert [each.where for each in document_order.shuffled([reader], seed, budget)] == whole


def test_progress_reaches_the_total(tmp_path, tokenizer, documents):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    calls = []
    calibration_windows(
        tmp_path / "a.txt", tokenizer, nsamples=4, seqlen=32, seed=0, progress=lambda *at: calls.append(at)
    )
    assert calls[-1] == (128, 128)
    assert calls == sorted(calls)


@pytest.mark.parametrize("nsamples", [3, 4, 7, None])
def test_several_texts_take_turns(tmp_path, tokenizer, documents, nsamples):
    paths = [
        write_json_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in documents])
        for name in ("one", "two", "three")
    ]
    reports: list[tuple[int, int]] = []
    mixed = calibration_windows(
        ", ".join(map(str, paths)), tokenizer, nsamples=nsamples, seqlen=32, seed=3,
        progress=lambda *report: reports.append(report),
    )  # fmt: skip
    alone = calibration_windows(paths[0], tokenizer, nsamples=None, seqlen=32, seed=3).tokens  # all three say the same
    count = len(mixed.tokens)
    assert count == (nsamples or 3 * len(alone))
    for place, window in enumerate(mixed.tokens):
        assert torch.equal(window, alone[place // 3])
    assert "in turns from 3 texts" in mixed.protocol
    assert all(path.name in mixed.protocol for path in paths)
    if nsamples:
        assert reports[-1] == (nsamples * 32, nsamples * 32)
        assert reports == sorted(reports)


def test_a_mix_is_refused_before_the_model_writes(tmp_path, tokenizer, documents, model):
    path = write_json_lines(tmp_path / "one.jsonl", [{"text": text} for text in documents])
    with pytest.raises(CalibrationError, match=r"missing\.txt: no such file"):
        calibration_windows(
            f"self,{path},missing.txt", tokenizer, nsamples=6, seqlen=8, seed=0
        )  # without a model for self
    with pytest.raises(CalibrationError, match="before and after every comma"):
        calibration_windows(f"{path},", tokenizer, nsamples=6, seqlen=8, seed=0)
    with pytest.raises(ConfigurationError, match="3 texts need at least 3 windows"):
        calibration_windows(f"{path},{path},self", tokenizer, nsamples=2, seqlen=8, seed=0)
    with pytest.raises(CalibrationError, match="'self' has no end"):
        calibration_windows(f"{path},self", tokenizer, nsamples=None, seqlen=8, seed=0, model=model)
    assert takes_self(f"{path}, self")
    assert not takes_self("self.txt,other.txt")


def test_a_comma_in_the_name_of_a_file(tmp_path, tokenizer, documents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "a,self.jsonl", [{"text": text} for text in documents])
    for name in ("a,self.jsonl", Path("a,self.jsonl")):
        assert "texts" not in calibration_windows(name, tokenizer, nsamples=2, seqlen=8, seed=0).protocol


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adds_bos": True, "adds_eos": True}])
def test_evaluation_of_a_text_file_is_the_file_itself(tmp_path, options):
    text = " = Title = \r\n\n first  paragraph \n\n\nsecond é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer = make_tokenizer(**options)
    windows = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=None, seqlen=1)
    assert decode(tokenizer, windows.tokens) == text
    cut = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=3, seqlen=8)
    assert torch.equal(cut.tokens.flatten(), windows.tokens.flatten()[:24])
    assert cut.protocol == (
        "3 windows of 8 tokens from the start of a.txt: the file as one string, no special tokens added, no overlap"
    )


def test_evaluation_of_documents_joins_them_in_file_order(tmp_path, tokenizer):
    texts = [f"text {number}" for number in range(300)]
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    everything = evaluation_windows(path, tokenizer, windows=None, seqlen=1)
    assert decode(tokenizer, everything.tokens) == "\n\n".join(texts)
    some = evaluation_windows(path, tokenizer, windows=5, seqlen=16)
    assert torch.equal(some.tokens.flatten(), everything.tokens.flatten()[:80])
    assert 'joined by "\\n\\n"' in some.protocol


@pytest.mark.parametrize("windows", [None, 1, 4])
@pytest.mark.parametrize("stride", [1, 5, 16, 17, 32])
def test_windows_may_overlap(tmp_path, tokenizer, stride, windows):
    text = "".join(chr(ord("a") + n % 26) for n in range(300))
    (tmp_path / "a.txt").write_text(text)
    cut = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=windows, seqlen=32, stride=stride)
    starts = range(0, 300 - 32 + 1, stride)[:windows]
    assert [decode(tokenizer, row) for row in cut.tokens] == [text[start : start + 32] for start in starts]
    assert cut.stride == (None if stride == 32 else stride)
    assert ("no overlap" in cut.protocol) == (stride == 32)
    assert (f"last {stride} tokens" in cut.protocol) == (stride != 32)


def test_windows_that_overlap_need_less_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x" * 50)
    assert len(evaluation_windows(tmp_path / "a.txt", tokenizer, windows=3, seqlen=32, stride=9).tokens) == 3
    with pytest.raises(CalibrationError, match="50 tokens, but 4 windows of 32 need 59; take at most 3 windows"):
        evaluation_windows(tmp_path / "a.txt", tokenizer, windows=4, seqlen=32, stride=9)
    with pytest.raises(CalibrationError, match="50 tokens, but 1 windows of 64 need 64"):
        evaluation_windows(tmp_path / "a.txt", tokenizer, windows=None, seqlen=64, stride=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be from 1 to the 8"),
        ({"stride": 9}, "stride must be from 1 to the 8"),
        ({"protocol": "awq"}, "protocol must be plain or gptq"),
    ],
)
def test_ways_of_cutting_are_checked_first(tokenizer, options, message):
    with pytest.raises(ConfigurationError, match=message):
        evaluation_windows("missing.txt", tokenizer, windows=1, seqlen=8, **options)


@pytest.mark.parametrize("options", [{"stride": 4}, {"protocol": "gptq"}])
@pytest.mark.parametrize("dataset", ["self", torch.ones(2, 8, dtype=torch.int64)], ids=["self", "ids"])
def test_only_a_text_can_be_cut(tokenizer, dataset, options):
    with pytest.raises(ConfigurationError, match="cut already"):
        evaluation_windows(dataset, tokenizer, windows=1, seqlen=8, **options)


# --- data sets of the hub --------------------------------------------------------------------------------------------


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


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
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


def test_a_template_that_rejects_a_conversation(tmp_path):
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    path = write_json_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(CalibrationError, match="line 1: the chat template rejects these messages: roles must"):
        calibration_windows(path, tokenizer, nsamples=1, seqlen=4, seed=0)


@pytest.mark.parametrize("dataset", ["missing.txt", "missing", "/no/such.jsonl", "data/missing.parquet"])
def test_missing_file(tokenizer, dataset):
    with pytest.raises(CalibrationError, match=f"{dataset}: no such file; give a file .*wikitext2"):
        calibration_windows(dataset, tokenizer, nsamples=1, seqlen=4, seed=0)


def test_directory(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match="is a directory"):
        calibration_windows(tmp_path, tokenizer, nsamples=1, seqlen=4, seed=0)


def test_too_little_text(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("x" * 99)
    message = r"a\.txt: too little text: 100 tokens, but 4 windows of 32 need 128; take at most 3 windows, or make"
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(path, tokenizer, nsamples=4, seqlen=32, seed=0)
    with pytest.raises(CalibrationError, match="99 tokens, but 1 windows of 200 need 200; make the windows shorter"):
        evaluation_windows(path, tokenizer, windows=None, seqlen=200)
    with pytest.raises(CalibrationError, match="99 tokens, but 4 windows of 32 need 128"):
        evaluation_windows(path, tokenizer, windows=4, seqlen=32)


def test_counts_are_checked_first(tokenizer):
    with pytest.raises(ConfigurationError, match="number of windows"):
        calibration_windows("missing.txt", tokenizer, nsamples=0, seqlen=4, seed=0)
    with pytest.raises(ConfigurationError, match="seqlen"):
        evaluation_windows("missing.txt", tokenizer, windows=1, seqlen=0)


# --- token ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([[3, 4, 5], [6, 7, 8]], dtype=torch.int32),
        [[3, 4, 5], [6, 7, 8]],
        [torch.tensor([3, 4, 5]), torch.tensor([[6, 7, 8]])],
    ],
)
def test_token_ids_are_taken_as_they_are(tokenizer, rows):
    windows = calibration_windows(rows, tokenizer, nsamples=None, seqlen=3, seed=5)
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert evaluation_windows(rows, tokenizer, windows=1, seqlen=3).tokens.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(2, 3), "must be integers, not torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "must be integers, not torch.bool"),
        (torch.ones(3, dtype=torch.int64), r"shape \[windows, 3\], not \[3\]"),
        (torch.ones(2, 4, dtype=torch.int64), r"shape \[windows, 3\], not \[2, 4\]"),
        ([[1, 2, 3], [1, 2]], "rows equally long"),
        (["text"], r"must be integers \[windows, 3\]"),
        ([[1, 2, 3]], "are 1 windows, but 2 are needed"),
        ([[1, 2, 3], [1, 2, 259]], "token id 259 is outside the vocabulary of 259"),
        ([[1, 2, 3], [1, 2, -1]], "token id -1 is outside the vocabulary"),
    ],
)
def test_bad_token_ids(tokenizer, rows, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(rows, tokenizer, nsamples=2, seqlen=3, seed=0)


def test_text_must_fit_the_embedding(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("zzzz\n")
    with pytest.raises(CalibrationError, match=r"outside the vocabulary of 8; .*tokenizer of this model"):
        calibration_windows(tmp_path / "a.txt", tokenizer, nsamples=1, seqlen=4, seed=0, model=make_model(vocab_size=8))


# --- the model's own text --------------------------------------------------------------------------------------------


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 272,  # 13 rows more than the tokenizer has
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**options)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def generate(model, tokenizer, cache_dir, **changes):
    options = {"nsamples": 3, "seqlen": 8, "seed": 0, "batch_size": 2, **changes}
    return generate_windows(model, tokenizer, cache_dir=cache_dir, **options)


def test_self_text_is_seeded_and_leaves_no_trace(tmp_path, model, tokenizer):
    state = torch.get_rng_state()
    calls = []
    model.train()
    tokens = generate(model, tokenizer, tmp_path / "a", progress=lambda *at: calls.append(at))
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert not tokens.is_inference()
    assert int(tokens.max()) < len(tokenizer)
    # No BOS anywhere: every window starts with an ordinary token of its own.
    assert len(set(tokens[:, 0].tolist())) > 1
    assert int(tokens[:, 0].min()) >= len(SPECIAL)
    assert calls[-1] == (24, 24)
    assert calls == sorted(calls)
    assert torch.equal(tokens, generate(model, tokenizer, tmp_path / "b"))
    assert not torch.equal(tokens, generate(model, tokenizer, tmp_path / "a", seed=1))


def test_self_text_starts_with_bos_where_there_is_one(tmp_path, model):
    tokens = generate(model, make_tokenizer(adds_bos=True), tmp_path, document_tokens=4)
    assert (tokens[:, ::4] == BOS).all()
    tokens = generate(make_model(bos_token_id=7), make_tokenizer(), tmp_path)
    assert (tokens[:, 0] == 7).all()


def greedy(model, tokens):
    """What the model continues each prefix with, without a cache."""
    with torch.no_grad():
        return model(input_ids=tokens).logits[:, :-1, :259].argmax(-1)


def tiny_gemma():
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=272,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def tiny_opt():
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=272,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("build", [make_model, tiny_gemma, tiny_opt])
def test_the_cache_of_the_sampler_is_exact(tmp_path, build):
    """The likeliest token each time (it is cold) must be what the model says of the whole prefix without a cache."""
    model = build()
    tokens = generate(model, make_tokenizer(), tmp_path, temperature=1e-6)
    assert torch.equal(tokens[:, 1:], greedy(model, tokens))


def test_eos_does_not_end_a_window(tmp_path, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform over the vocabulary, so that EOS comes up
    tokens = generate(model, tokenizer, tmp_path, nsamples=128, seqlen=32, batch_size=128)
    row, column = (tokens[:, :16] == EOS).nonzero()[0].tolist()
    assert len(set(tokens[row, column + 1 :].tolist())) > 3
    counts = tokens.flatten().bincount(minlength=272)
    assert int(counts[259:].sum()) == 0
    # Uniform draws: 3968 over 259 tokens, mean 15.3; chi-square has mean 258 and standard deviation 22.7.
    drawn = tokens[:, 1:].flatten().bincount(minlength=259)[:259].double()
    assert 150 < float(((drawn - drawn.mean()) ** 2 / drawn.mean()).sum()) < 400


def test_self_text_is_cached(tmp_path, model, tokenizer, monkeypatch, caplog):
    tokens = generate(model, tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()

    def must_not_run(*_, **__):
        raise AssertionError("generated again")

    with monkeypatch.context() as patched:
        patched.setattr(self_text, "_generate", must_not_run)
        calls = []
        # The same weights, loaded from elsewhere.
        again = make_model()
        again.config._name_or_path = "/somewhere/else"
        assert torch.equal(generate(again, tokenizer, tmp_path, progress=lambda *at: calls.append(at)), tokens)
        assert calls == [(24, 24)]
        for change in ({"seed": 1}, {"seqlen": 7}, {"nsamples": 2}, {"temperature": 0.5}):
            with pytest.raises(AssertionError, match="generated again"):
                generate(model, tokenizer, tmp_path, **change)
        with pytest.raises(AssertionError, match="generated again"):
            generate(make_model(seed=1), tokenizer, tmp_path)
    sound = file.read_bytes()
    for damaged in (sound[:-40], b"", b"garbage" * 100, sound.replace(b'"key":"', b'"key":"0')):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="matgptq.self_text"):
            assert torch.equal(generate(model, tokenizer, tmp_path), tokens)
        assert "again" in caplog.text
        assert file.read_bytes() == sound
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, model, tokenizer, caplog):
    (tmp_path / "file").write_text("in the way")
    assert generate(model, tokenizer, tmp_path / "file" / "below").shape == (3, 8)
    assert "cannot be kept" in caplog.text


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MATGPTQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert self_text._default_cache_dir() == tmp_path / ".cache" / "matgptq" / "self"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert self_text._default_cache_dir() == Path("/x/matgptq/self")
    monkeypatch.setenv("MATGPTQ_CACHE", "/m")
    assert self_text._default_cache_dir() == Path("/m/self")


def test_self_by_name(tmp_path, model, tokenizer):
    windows = calibration_windows("self", tokenizer, nsamples=2, seqlen=8, seed=0, model=model, cache_dir=tmp_path)
    assert torch.equal(windows.tokens, generate(model, tokenizer, tmp_path, nsamples=2, seqlen=8, batch_size=64))
    assert "sampled from the model itself" in windows.protocol
    other = evaluation_windows("self", tokenizer, windows=2, seqlen=8, model=model, cache_dir=tmp_path)
    assert not torch.equal(other.tokens, windows.tokens)
    with pytest.raises(CalibrationError, match="pass the model"):
        calibration_windows("self", tokenizer, nsamples=2, seqlen=8, seed=0)
    with pytest.raises(CalibrationError, match="give the number of windows"):
        calibration_windows("self", tokenizer, nsamples=None, seqlen=8, seed=0, model=model)


def test_generation_refuses_what_it_cannot_do(tmp_path, tokenizer):
    model = make_model()
    with pytest.raises(CalibrationError, match=r"64 positions .* documents of 65"):
        generate(model, tokenizer, tmp_path, seqlen=65)
    for change in ({"temperature": 0.0}, {"batch_size": 0}, {"document_tokens": 0}):
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            generate(model, tokenizer, tmp_path, **change)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="logits are not finite"):
        generate(model, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_import_is_cheap():
    code = (
        "import sys, matgptq.token_windows;"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'pyarrow', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
