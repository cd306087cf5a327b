"""Every family scaled: the same function, Hessians of the scaled inputs, and what is stored and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, blocks_of, build_model, save_model, token_ids

import matgptq
from matgptq.calibration.block_hessians import collect_hessians
from matgptq.calibration.channel_scaling import channel_scales, scale_channels, scaled_tensors
from matgptq.calibration.saliency import token_saliency
from matgptq.core.output_hessian import OutputHessian
from matgptq.errors import ConfigurationError
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.models.blocks import Block, capture_inputs, run_block
from matgptq.models.families import find_family
from matgptq.models.residency import Whole
from matgptq.models.source import open_source
from matgptq.recipe import make_recipe

SCALABLE = [name for name, (kind, _) in MODELS.items() if find_family(kind).channels is not None]


def open_model(source: Path) -> Any:
    return open_source(source).load_model(torch.float32, torch.device("cpu"))


def sites_of(model: Any) -> Any:
    sites = find_family(model.config.model_type).channels
    assert sites is not None
    return sites


def seen_by(model: Any, blocks: list[Block], index: int) -> list[torch.Tensor]:
    """Hessians of one block; those of a shared input may be one tensor."""
    inputs = [capture_inputs(model, blocks, token_ids(4, 24))]
    for number in range(index):
        for each, hidden in enumerate(inputs[0].hidden):
            with torch.no_grad():
                inputs[0].hidden[each] = run_block(blocks[number], hidden, inputs[0].arguments[number])
    return [*collect_hessians(blocks[index], inputs, index, lambda: None).matrices]


@pytest.mark.parametrize("name", SCALABLE)
def test_output_hessians_are_those_of_the_scaled_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("calibration.saliency", "machine.devices"):
        monkeypatch.setattr(f"matgptq.{module}.multiplies_bfloat16", lambda device: False)
    model = build_model(name).eval()
    blocks = blocks_of(model)

    def measured() -> list[OutputHessian]:
        found = [OutputHessian.empty(rows, 48) for block in blocks for rows in block.joined_rows()]
        token_saliency(Whole(model), blocks, token_ids(2, 24), 0, output_hessians=found)
        for each in found:
            each.complete()
        return found

    before = measured()
    config = model.config.get_text_config()
    for index, block in enumerate(blocks):
        by_name = {name: each for each in before for name in each.layers}
        scale_channels(block, sites_of(model), seen_by(model, blocks, index), config, 0.8, by_name)
    for mine, expected in zip(before, measured(), strict=True):
        largest = float(expected.matrix.abs().max())
        torch.testing.assert_close(mine.matrix, expected.matrix, rtol=2e-2, atol=2e-3 * largest)


@pytest.mark.parametrize("name", SCALABLE)
def test_a_scaled_model_is_the_same_function(name: str, float32_products: None) -> None:
    model = build_model(name)
    blocks = blocks_of(model)
    with torch.no_grad():
        before = model(token_ids(2, 12)).logits
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.get_text_config()
    for index, block in enumerate(blocks):
        hessians = seen_by(model, blocks, index)
        scale_channels(block, sites_of(model), hessians, config, 0.8)
        for mine, again in zip(hessians, seen_by(model, blocks, index), strict=True):
            assert torch.equal(mine, mine.T)
            if bool(torch.isfinite(mine).all()):
                torch.testing.assert_close(mine, again, rtol=1e-3, atol=1e-5 * float(again.abs().max()))
    with torch.no_grad():
        after = model(token_ids(2, 12)).logits
    assert before.std() > 0.3
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)

    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    quantized = {f"{layer}.weight" for block in blocks for layer, _ in block.layers()}
    assert changed - quantized == (scaled_tensors(sites_of(model), blocks) & state.keys()) - quantized
    assert changed & quantized == quantized


def test_scales_follow_the_root_of_the_mean_square() -> None:
    energy = torch.tensor([1.0, 16.0, 0.0, 4.0])
    scales = channel_scales(energy, 0.5)
    assert torch.allclose(scales[[0, 1, 3]], torch.tensor([1.0, 2.0, 2.0**0.5]) / 2**0.5)
    assert scales[2] == 1
    assert torch.equal(channel_scales(energy, 0.0), torch.ones(4))
    assert torch.equal(channel_scales(torch.zeros(3), 0.5), torch.ones(3))
    wide = channel_scales(torch.tensor([1e-30, 1.0, 1e30]), 1.0)
    assert torch.equal(wide, torch.tensor([1 / 16, 1.0, 16.0]))


def test_a_norm_that_is_zero_stays_zero() -> None:
    model = build_model("llama")
    blocks = blocks_of(model)
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    with torch.no_grad():
        before = model(token_ids(2, 12)).logits
    scale_channels(blocks[0], sites_of(model), seen_by(model, blocks, 0), model.config, 0.5)
    assert model.model.layers[0].input_layernorm.weight[3] == 0
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(2, 12)).logits, before, rtol=0, atol=2e-4)


def test_values_that_are_clipped_stay() -> None:
    model = build_model("olmoe", clip_qkv=0.5)
    blocks = blocks_of(model)
    before = model.model.layers[0].self_attn.v_proj.weight.clone()
    output = model.model.layers[0].self_attn.o_proj.weight.clone()
    scale_channels(blocks[0], sites_of(model), seen_by(model, blocks, 0), model.config, 0.5)
    ratio = model.model.layers[0].self_attn.v_proj.weight / before
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))  # by columns, as the norm says, not by rows
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, output)


def kept(path: Path) -> dict[str, torch.Tensor]:
    headers = read_headers(path)
    return {name: read_tensor(info) for name, info in headers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_model("llama-biased", tmp_path / "source", dtype)
    for name, exponent in (("plain", 0.0), ("scaled", 0.4)):
        matgptq.quantize(source, tmp_path / name, dataset=token_ids(), group_size=32, channel_scaling=exponent)
    plain, scaled = kept(tmp_path / "plain"), kept(tmp_path / "scaled")
    assert plain.keys() == scaled.keys()
    other = {name for name in plain if name.rpartition(".")[2] in ("weight", "bias")}
    changed = {name for name in other if not torch.equal(plain[name], scaled[name])}
    assert {name.partition("layers.0.")[2] for name in changed if "layers.0." in name} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.v_proj.bias",
        "mlp.up_proj.bias",
    }
    norms = {name for name in changed if "norm" in name}
    assert all(scaled[name].dtype == torch.bfloat16 for name in norms)  # they are made to fit
    assert all(scaled[name].dtype == torch.float32 for name in changed - norms)
    assert all(plain[name].dtype == dtype for name in other if plain[name].numel())


@torch.no_grad()
def median_kl(source: Path, out: Path) -> float:
    """Of a token; one that a router sends to another expert costs more than what rounding does to all others."""
    windows = token_ids(16, 24, seed=9)
    full, served = (model(windows).logits.log_softmax(-1) for model in (open_model(source), matgptq.load(out, 8)))
    return float((full.exp() * (full - served)).sum(-1).median())


@pytest.mark.parametrize("name", SCALABLE)
def test_a_checkpoint_of_every_family_is_as_good(name: str, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source")
    found = {}
    for exponent in (0.0, 0.5):
        out = tmp_path / f"out-{exponent}"
        matgptq.quantize(source, out, dataset=token_ids(8, 24), group_size=32, channel_scaling=exponent)
        found[exponent] = median_kl(source, out)
    assert 0 < found[0.5] < 1.5 * found[0.0] < 0.05, found
    matgptq.export(tmp_path / "out-0.5", tmp_path / "slice", format="matgptq-slice", bits=3)
    one, other = (matgptq.load(tmp_path / each, 3)(token_ids(1, 12)).logits for each in ("slice", "out-0.5"))
    assert torch.equal(one, other)


def test_layers_that_are_left_out_stay_as_they_are(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "source")
    ignored = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
    matgptq.quantize(
        source, tmp_path / "out", dataset=token_ids(8, 24), group_size=32, ignore=["lm_head", *ignored],
        channel_scaling=0.5,
    )  # fmt: skip
    before, after = kept(source), kept(tmp_path / "out")
    for name in ignored:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    changed = {
        name for name in before if name in after and "norm" in name and not torch.equal(after[name], before[name])
    }
    assert changed == {"model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"}
    value = matgptq.evaluate(tmp_path / "out", (8,), text=token_ids(2, 24, seed=9)).results[0].kl
    assert value is not None
    assert value < 0.05


def test_routers_are_stored_without_rounding(tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source", torch.bfloat16)
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(8, 24), group_size=32, channel_scaling=0.5)
    before, after = kept(source), kept(tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    ratio = after[name].double() / before[name].double()
    assert after[name].dtype == torch.bfloat16
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))
    assert torch.equal(ratio[0].log2(), ratio[0].log2().round())
    assert len(ratio[0].unique()) > 1


def test_methods_and_bounds() -> None:
    assert make_recipe(method="paper").channel_scaling == 0
    assert make_recipe(method="gptq", bits=(4,)).channel_scaling == 0
    with pytest.raises(ConfigurationError, match="channel_scaling"):
        make_recipe(channel_scaling=1.5)
