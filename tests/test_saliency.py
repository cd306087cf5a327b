"""Weights of tokens from the gradients of the model's own predictions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, blocks_of, build_model, token_ids

from matgptq.calibration.block_hessians import collect_hessians
from matgptq.calibration.saliency import _window_seed, draw_tokens, token_saliency, token_weights
from matgptq.core.output_hessian import OutputHessian
from matgptq.machine.workers import Workers
from matgptq.models.blocks import capture_inputs
from matgptq.models.residency import Whole


def model_and_blocks(name, **overrides):
    model = build_model(name, **overrides).eval()
    return model, blocks_of(model)


def expected_gradients(model, blocks, window, seed, number=0):
    """In all outputs, ``[tokens, out]``, by plain automatic differentiation of the whole model."""
    outputs = {}
    hooks = []
    for block in blocks:
        for name, layer in block.outputs():

            def keep(_, __, output, name=name):
                output.retain_grad()
                outputs[name] = output

            hooks.append(layer.register_forward_hook(keep))
    logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0]
    drawn = draw_tokens(logits.detach().softmax(-1), torch.Generator().manual_seed(_window_seed(seed, number)))
    torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: output.grad.view(len(window), -1) for name, output in outputs.items()}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_against_plain_differentiation(name, monkeypatch):
    monkeypatch.setattr("matgptq.calibration.saliency.multiplies_bfloat16", lambda device: False)
    model, blocks = model_and_blocks(name)
    windows = token_ids()[:1, :12]
    found = token_saliency(Whole(model), blocks, windows, seed=3)
    expected = expected_gradients(model, blocks, windows[0], seed=3)
    assert set(found) == set(expected)
    for layer, gradients in expected.items():
        values = gradients.square().sum(-1)
        torch.testing.assert_close(found[layer][0], values, rtol=1e-3, atol=1e-5 * float(values.max()))


def output_hessians(blocks, most=48):
    return [OutputHessian.empty(rows, most) for block in blocks for rows in block.joined_rows()]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_output_hessians_against_plain_differentiation(name, monkeypatch):
    monkeypatch.setattr("matgptq.calibration.saliency.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("matgptq.machine.devices.multiplies_bfloat16", lambda device: False)
    model, blocks = model_and_blocks(name)
    windows = token_ids()[:3, :12]
    found = output_hessians(blocks)
    token_saliency(Whole(model), blocks, windows, seed=3, output_hessians=found, exponent=1.0)
    expected = output_hessians(blocks)
    for number, window in enumerate(windows):
        gradients = expected_gradients(model, blocks, window, seed=3, number=number)
        for each in expected:
            each.add([[gradients[layer] for layer in each.layers]], 1.0)
    assert expected
    for mine, other in zip(found, expected, strict=True):
        largest = float(other.matrix.abs().max())
        assert largest > 0
        torch.testing.assert_close(mine.matrix, other.matrix, rtol=1e-2, atol=1e-3 * largest)
        torch.testing.assert_close(mine.fourth_powers, other.fourth_powers, rtol=1e-2, atol=0)


def test_output_hessians_do_not_depend_on_how_windows_are_shared_out():
    model, blocks = model_and_blocks("llama")
    windows = token_ids()[:5, :12]
    expected = output_hessians(blocks)
    token_saliency(Whole(model), blocks, windows, seed=3, output_hessians=expected, exponent=1.0)
    with_workers = output_hessians(blocks)
    workers = Workers(3)
    token_saliency(Whole(model), blocks, windows, 3, output_hessians=with_workers, exponent=1.0, workers=workers)
    workers.close()
    in_parts = output_hessians(blocks)
    token_saliency(Whole(model), blocks, windows, 3, output_hessians=in_parts, exponent=1.0, windows_together=2)
    by_two = output_hessians(blocks)
    for part in (slice(0, 2), slice(2, 5)):
        token_saliency(
            Whole(model), blocks, windows[part], 3, output_hessians=by_two, exponent=1.0, first_window=part.start
        )
    for number, each in enumerate(expected):
        assert torch.equal(with_workers[number].matrix, each.matrix)
        assert torch.equal(in_parts[number].matrix, each.matrix)
        assert torch.equal(by_two[number].matrix, each.matrix)


@pytest.mark.parametrize("stretch", [1, 2, 3, 4, 128])
def test_tokens_are_drawn_as_often_as_their_probability_says(stretch, monkeypatch):
    monkeypatch.setattr("matgptq.calibration.saliency._STRETCH", stretch)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    drawn = draw_tokens(probabilities.expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    frequencies = torch.bincount(drawn.flatten(), minlength=6) / 20000
    assert (frequencies[probabilities == 0] == 0).all()
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.02)


def test_the_model_is_left_as_it_was():
    model, blocks = model_and_blocks("llama")
    before = model(input_ids=token_ids()[:1, :8]).logits
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    ticks = []
    token_saliency(Whole(model), blocks, token_ids()[:3, :8], 0, lambda: ticks.append(1))
    assert len(ticks) == 3 * 2 * len(blocks)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(input_ids=token_ids()[:1, :8]).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_same_seed_same_weights_under_autocast():
    model, blocks = model_and_blocks("qwen2")
    first, again, other = (token_saliency(Whole(model), blocks, token_ids()[:2, :8], seed) for seed in (0, 0, 1))
    for name, values in first.items():
        assert torch.equal(values, again[name])
    assert any(not torch.equal(values, other[name]) for name, values in first.items())


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_token_weights(exponent):
    _, blocks = model_and_blocks("llama")
    generator = torch.Generator().manual_seed(0)
    saliency = {name: torch.rand(2, 5, generator=generator) for block in blocks for name, _ in block.layers()}
    weights = token_weights(saliency, blocks, exponent)
    for block in blocks:
        for group in block.inputs:
            names = [f"{block.name}.{path}" for path, _ in group]
            expected = sum(saliency[name] for name in names).pow(exponent / 2)
            torch.testing.assert_close(weights[names[0]], expected / expected.mean())
            assert weights[names[0]].mean() == pytest.approx(1)


def test_a_layer_that_nothing_depends_on_counts_all_tokens_alike():
    _, blocks = model_and_blocks("llama")
    saliency = {name: torch.zeros(2, 5) for block in blocks for name, _ in block.layers()}
    assert token_weights(saliency, blocks, 1.0) == {}


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("batch", [1, 2])
def test_weights_enter_the_hessian(name, batch):
    model, blocks = model_and_blocks(name)
    windows = token_ids()[:4, :6]
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    block = blocks[0]
    first = f"{block.name}.{block.inputs[0][0][0]}"
    seen = []
    handle = block.inputs[0][0][1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window.unsqueeze(0), use_cache=False)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    inputs = capture_inputs(model, blocks, windows, batch=batch, token_weights={first: weights})
    hessians = collect_hessians(block, [inputs], 0, lambda: None).matrices
    expected = 2 / windows.numel() * (rows.T * weights.double().flatten()) @ rows
    torch.testing.assert_close(hessians[0].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
