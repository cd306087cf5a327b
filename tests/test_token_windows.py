"""Text to windows: tokens, order, packing, ways of cutting."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import TEMPLATE, decode, make_model, make_tokenizer, write_json_lines, write_parquet

from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.quantization.fingerprint import fingerprint_data
from matgptq.text import order as document_order
from matgptq.text import windows as token_windows
from matgptq.text.packing import pack_windows
from matgptq.text.sources import Document
from matgptq.text.tokens import text_prefix
from matgptq.text.windows import Windows, calibration_windows, evaluation_windows, takes_self


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def documents():
    return [f"document number {number} {'x' * (number % 7)}" for number in range(40)]


@pytest.fixture(scope="module")
def model():
    return make_model()


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
    read=st.integers(1, 9),
    nsamples=st.none() | st.integers(1, 6),
    prefix=st.lists(st.integers(10, 19), max_size=3),
)
def test_packing_loses_no_token(documents, read, nsamples, prefix):
    seqlen = len(prefix) + read
    tokens, _ = pack_windows(iter(documents), nsamples=nsamples, seqlen=seqlen, prefix=prefix)
    stream = [token for ids in documents for token in ids]
    count = len(stream) // read if nsamples is None else min(nsamples, len(stream) // read)
    assert tokens.shape == (count, seqlen)
    assert tokens.dtype == torch.int64
    assert tokens[:, len(prefix) :].flatten().tolist() == stream[: count * read]
    assert tokens[:, : len(prefix)].tolist() == [prefix] * count


def test_a_document_at_the_start_of_a_window_brings_the_prefix_along():
    tokens, available = pack_windows([[1, 5, 6, 7], [1, 8], [1, 9, 2], [3]], nsamples=None, seqlen=4, prefix=[1])
    assert tokens.tolist() == [[1, 5, 6, 7], [1, 8, 1, 9], [1, 2, 3]][:2]
    assert available == 10


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


def test_many_texts_of_long_names(tmp_path, tokenizer, documents):
    """Together longer than a file's name may be."""
    names = [tmp_path / f"{index}-{'x' * 60}.txt" for index in range(6)]
    for name in names:
        name.write_text("\n".join(documents))
    found = calibration_windows(",".join(map(str, names)), tokenizer, nsamples=6, seqlen=8, seed=0)
    assert len(found.tokens) == 6
    assert fingerprint_data(",".join(map(str, names))).count(" bytes, ") == 6
    with pytest.raises(CalibrationError, match="no such file"):
        calibration_windows("y" * 300 + ".txt", tokenizer, nsamples=1, seqlen=8, seed=0)


def test_a_comma_in_the_name_of_a_file(tmp_path, tokenizer, documents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "a,self.jsonl", [{"text": text} for text in documents])
    for name in ("a,self.jsonl", Path("a,self.jsonl")):
        assert "texts" not in calibration_windows(name, tokenizer, nsamples=2, seqlen=8, seed=0).protocol


@pytest.mark.parametrize("options", [{}, {"adds_bos": True, "adds_eos": True}])
def test_evaluation_of_a_text_file_is_the_file_itself(tmp_path, options):
    text = " = Title = \r\n\n first  paragraph \n\n\nsecond é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokenizer = make_tokenizer(**options)
    windows = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=None, seqlen=1)
    assert decode(tokenizer, windows.tokens) == text
    cut = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=3, seqlen=8, protocol="plain")
    assert torch.equal(cut.tokens.flatten(), windows.tokens.flatten()[:24])
    assert cut.protocol == (
        "3 windows of 8 tokens from the start of a.txt: the file as one string, no special tokens added, no overlap"
    )


def test_every_window_starts_as_a_prompt_does(tmp_path):
    text = "".join(chr(ord("a") + n % 26) for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    for options, prefix in (({}, ""), ({"adds_bos": True, "adds_eos": True}, "<s>"), ({"adds_eos": True}, "")):
        tokenizer = make_tokenizer(**options)
        read = 8 if not prefix else 7
        cut = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=None, seqlen=8)
        starts = range(0, 100 - read + 1, read)
        assert [decode(tokenizer, row) for row in cut.tokens] == [prefix + text[i : i + read] for i in starts]
        assert ("<s> in front of every window" in cut.protocol) == bool(prefix)
        overlapping = evaluation_windows(tmp_path / "a.txt", tokenizer, windows=5, seqlen=8, stride=3)
        assert [decode(tokenizer, row) for row in overlapping.tokens] == [
            prefix + text[i : i + read] for i in range(0, 15, 3)
        ]
        assert overlapping.stride == 3
        # Nothing overlaps where a window goes on after what the one before read.
        assert evaluation_windows(tmp_path / "a.txt", tokenizer, windows=2, seqlen=8, stride=read).stride is None
        with pytest.raises(CalibrationError, match=f"100 tokens, but 40 windows of 8 need {40 * read}; take at most"):
            evaluation_windows(tmp_path / "a.txt", tokenizer, windows=40, seqlen=8)


def test_calibration_windows_start_with_bos_and_lose_no_token(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij\n")
    tokenizer = make_tokenizer(adds_bos=True)
    windows = calibration_windows(tmp_path / "a.txt", tokenizer, nsamples=None, seqlen=4, seed=0)
    assert [decode(tokenizer, row) for row in windows.tokens] == ["<s>abc", "<s>def", "<s>ghi"]
    assert windows.protocol.endswith("packed without padding, <s> in front of every window")


def test_what_a_tokenizer_puts_in_front_of_a_text():
    assert text_prefix(make_tokenizer()) == []
    tokenizer = make_tokenizer(adds_bos=True, adds_eos=True)
    assert tokenizer.convert_ids_to_tokens(text_prefix(tokenizer)) == ["<s>"]


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
        ({"protocol": "awq"}, "protocol must be bos, plain, gptq"),
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


def test_a_template_that_rejects_a_conversation(tmp_path):
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    path = write_json_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(CalibrationError, match="line 1: the chat template rejects these messages: roles must"):
        calibration_windows(path, tokenizer, nsamples=1, seqlen=4, seed=0)


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


def test_import_is_cheap():
    code = (
        "import sys, matgptq.text.windows;"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'pyarrow', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
