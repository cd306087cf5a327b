"""Which tensor-parallel sizes fit: on numbers, and against cutting the matrices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matgptq.checkpoints.checkpoint import LayerInfo
from matgptq.checkpoints.tensor_parallel import fitting_sizes, shard_obstacle
from matgptq.errors import UnsupportedModelError
from matgptq.models.families import FAMILIES, RotationSites


@given(group_size=st.sampled_from([1, 8, 32, 64]), groups=st.integers(1, 24), ranks=st.integers(1, 24))
def test_a_shard_holds_whole_groups_or_is_refused(group_size: int, groups: int, ranks: int) -> None:
    columns = group_size * groups
    group_of = [column // group_size for column in range(columns)]
    width, rest = divmod(columns, ranks)
    shards = [set(group_of[rank * width : (rank + 1) * width]) for rank in range(ranks)]
    shared = any(a & b for i, a in enumerate(shards) for b in shards[:i])
    assert (shard_obstacle(columns, group_size, ranks) is not None) == (rest != 0 or shared)


def _llama(hidden: int, mlp: int, kv: int, group_size: int) -> dict[str, LayerInfo]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {f"model.layers.0.{name}": LayerInfo(*shape, group_size) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "layers", "sizes"),
    [
        # SmolLM2-135M: nine heads; nine ranks would split the MLP.
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, _llama(576, 1536, 192, 64), [1, 3]),
        # Llama-3.1-8B: 14336 = 112 * 128, so 32 ranks would split groups of 128.
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, _llama(4096, 14336, 1024, 128), [1, 2, 4, 8, 16]),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, _llama(4096, 14336, 1024, 64), [1, 2, 4, 8, 16, 32]),
        # One scale for a whole row cannot be shared.
        ({"num_attention_heads": 32}, _llama(4096, 4096, 4096, 4096), [1]),
        # Three key and value heads on two ranks.
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, _llama(768, 1536, 384, 64), [1, 3, 6]),
    ],
)
def test_sizes_that_fit(config: dict[str, int], layers: dict[str, LayerInfo], sizes: list[int]) -> None:
    hidden = layers["model.layers.0.self_attn.q_proj"].in_features
    assert fitting_sizes({"model_type": "llama", "hidden_size": hidden, **config}, layers) == sizes


def test_heads_that_the_file_leaves_to_its_model_type() -> None:
    layers = _llama(2048, 8192, 1024, 64)
    # As google/gemma-3-4b-it: 8 heads, 4 of keys and values.
    gemma = {f"model.language_model.{name.removeprefix('model.')}": info for name, info in layers.items()}
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}
    assert fitting_sizes(config, gemma) == [1, 2, 4, 8]
    # Mistral's default is 8 heads of keys and values, not as many as there are heads.
    config = {"model_type": "mistral", "hidden_size": 3072, "num_attention_heads": 24}
    assert fitting_sizes(config, _llama(3072, 12288, 1024, 64)) == [1, 2, 4, 8, 24]


@pytest.mark.parametrize("heads", ["x", 0, 5, None])
def test_heads_that_make_no_sense(heads: object) -> None:
    with pytest.raises(UnsupportedModelError, match="how many attention heads"):
        fitting_sizes({"model_type": "llama", "hidden_size": 64, "num_attention_heads": heads}, {})


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        fitting_sizes({"model_type": "mamba", "num_attention_heads": 4}, {})


def test_layers_that_write_to_the_residual_stream() -> None:
    for family in FAMILIES:
        assert len(family.inputs) == (2 if "mixtral" in family.model_types else 4)
        paths = [*family.layers]
        if family.experts is not None:
            paths += [path for group in family.experts.inputs(0) for path in group]
        writers = {path for path in paths if family.writes(path)}
        assert not any(family.is_hidden(path) for path in writers)
        if isinstance(family.rotation, RotationSites):
            expected = {path.replace("*", "0") for path in family.rotation.writers}
            assert writers == expected
