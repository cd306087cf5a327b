"""Text that a model writes itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from texts import BOS, EOS, SPECIAL, make_model, make_tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
)

from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.text import self_text
from matgptq.text.self_text import generate_windows
from matgptq.text.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Whatever this CPU multiplies: some tests compare with what the model says in float32."""
    monkeypatch.setattr(self_text, "multiplies_bfloat16", lambda device: False)


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


@pytest.mark.parametrize("fails", [False, True], ids=["written", "failed"])
def test_text_is_written_in_bfloat16_where_that_is_faster(tmp_path, tokenizer, monkeypatch, fails):
    model = make_model()
    exact = model.model.norm.weight  # ones
    odd = model.lm_head.weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place, seen = odd.data_ptr(), set()
    watch = model.lm_head.register_forward_hook(lambda *_: seen.update(p.dtype for p in model.parameters()))
    expected = generate(model, tokenizer, tmp_path)
    assert seen == {torch.float32}
    seen.clear()
    monkeypatch.setattr(self_text, "multiplies_bfloat16", lambda device: True)
    if fails:
        monkeypatch.setattr(self_text._Sampler, "draw", lambda *_: pytest.fail("on purpose"))
        with pytest.raises(pytest.fail.Exception, match="on purpose"):
            generate(model, tokenizer, tmp_path)
    else:
        tokens = generate(model, tokenizer, tmp_path)  # and not what was kept of the other
        assert tokens.shape == expected.shape
        assert len([*tmp_path.iterdir()]) == 2
    assert seen == {torch.bfloat16}
    watch.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.model.norm.weight is exact
    assert odd.data_ptr() == place


def test_models_that_stay_in_float32(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(self_text, "multiplies_bfloat16", lambda device: True)
    model = make_model()
    assert self_text.writes_in_bfloat16(model)
    for name, value in (("_keep_in_fp32_modules", ["norm"]), ("set_bits", lambda bits: None)):
        with monkeypatch.context() as patch:
            patch.setattr(model, name, value, raising=False)
            assert not self_text.writes_in_bfloat16(model)
    assert not self_text.writes_in_bfloat16(make_model().double())


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
        with caplog.at_level(logging.WARNING, logger="matgptq.text.self_text"):
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
