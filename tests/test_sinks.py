"""The weight of first positions: which sequences show them, how they count, and a model that falls without it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model, make_tokenizer, save_model, token_ids

import matgptq
from matgptq.calibration.block_hessians import collect_hessians
from matgptq.models.blocks import capture_inputs, find_blocks, propagate
from matgptq.models.families import find_family
from matgptq.text.packing import first_tokens


def test_first_tokens_are_those_of_the_text_and_bos() -> None:
    windows = token_ids(3, 20)
    first = first_tokens(windows, 64, bos=1, seed=0)
    assert first.shape == (64, 1)
    assert first.dtype == torch.int64
    assert (first[:32] == 1).all()  # ``token_ids`` has none
    assert torch.isin(first[32:], windows).all()
    assert len(first[32:].unique()) > 10
    assert torch.equal(first, first_tokens(windows, 64, bos=1, seed=0))
    assert not torch.equal(first, first_tokens(windows, 64, bos=1, seed=1))
    assert torch.isin(first_tokens(windows, 64, bos=None, seed=0), windows).all()


def test_a_bos_that_the_model_has_no_embedding_for_is_none(tmp_path) -> None:
    source = save_model("llama", tmp_path / "source", bos_token_id=100_000)
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=32, quality="fast")


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_a_weight_counts_first_positions_that_often(name: str, float32_products) -> None:
    """With the windows' own first tokens, the weighted Hessian is that of windows whose first position is repeated."""
    model, windows, weight = build_model(name), token_ids(5, 12), 7.0
    blocks = find_blocks(model, find_family(model.config.model_type))
    inputs = [
        capture_inputs(model, blocks, windows),
        capture_inputs(model, blocks, windows[:, :1], batch=len(windows), weight=weight - 1),
    ]
    counts = torch.ones(5, 12, dtype=torch.float64)
    counts[:, 0] = weight
    counts = counts.flatten()
    seen: dict[str, torch.Tensor] = {}
    for index, block in enumerate(blocks):
        handles = [
            layer.register_forward_pre_hook(lambda _, x, path=path: seen.__setitem__(path, x[0]))
            for path, layer in block.layers()
        ]
        with torch.no_grad():
            model(windows)
        for handle in handles:
            handle.remove()
        hessians = collect_hessians(block, inputs, index, lambda: None).matrices
        for group, hessian in zip(block.inputs, hessians, strict=True):
            x = seen[f"{block.name}.{group[0][0]}"].flatten(0, -2).double()
            expected = 2 * (x.T * counts) @ x / counts.sum()
            torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-4)
        propagate(block, inputs, index, lambda: None)


def sink_model(seqlen: int):
    """An OPT whose first position carries activations 300 times those of the others, along one direction.

    Every head attends to it unless something else is interesting, and reads nothing from it: a value and a key that
    the weights at ordinary positions do not need.
    """
    model = build_model("opt", max_position_embeddings=seqlen)
    generator = torch.Generator().manual_seed(1)
    sink = torch.randn(64, generator=generator).sign()
    with torch.no_grad():
        positions = model.model.decoder.embed_positions
        positions.weight.zero_()
        positions.weight[positions.offset] = 40 * sink
        for block in model.model.decoder.layers:
            for norm in (block.self_attn_layer_norm, block.final_layer_norm):
                norm.weight.fill_(1)
                norm.bias.zero_()
            query, key, value = block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj
            for layer in (query, key, value):
                layer.bias.zero_()
            liking = torch.randn(64, generator=generator).sign()
            query.bias.copy_(liking)
            key.weight += torch.outer(6 * liking - key.weight @ sink, sink) / 64
            value.weight -= torch.outer(value.weight @ sink, sink) / 64
    return model


@pytest.mark.parametrize(("method", "bits", "measured"), [("gptq", [3], 3), ("matgptq", None, 8)])
def test_a_solve_cannot_ruin_the_sink(method, bits, measured, tmp_path) -> None:
    seqlen = 256
    model, text = sink_model(seqlen), token_ids(4, seqlen, seed=5)
    with torch.no_grad():
        full = model(text, output_hidden_states=True)
    first, others = full.hidden_states[1][:, 0], full.hidden_states[1][:, 1:]
    assert first.norm(dim=-1).min() > 20 * others.norm(dim=-1).mean()
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    kl = {}
    for weight, saliency in ((1.0, 0.0), (64.0, 0.0), (1.0, 1.0)):
        out = tmp_path / f"weight-{weight:g}-{saliency:g}"
        options = {"method": method, "bits": bits, "group_size": 32, "dataset": token_ids(8, seqlen, seed=1)}
        matgptq.quantize(tmp_path / "source", out, sink_weight=weight, saliency=saliency, **options)
        with torch.no_grad():
            logits = matgptq.load(out, bits=measured)(text).logits
        kl[weight, saliency] = (
            torch.nn.functional.kl_div(
                logits.log_softmax(-1), full.logits.log_softmax(-1), log_target=True, reduction="sum"
            ).item()
            / text.numel()
        )
    assert kl[64, 0] < 0.2 * kl[1, 0]
    assert kl[1, 1] < 0.5 * kl[1, 0]  # gradients find the sink by themselves
