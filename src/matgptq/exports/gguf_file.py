"""GGUF: llama.cpp and its many users load it, and transformers (``gguf_file=``).

Each row is cut into blocks of 32 columns with a float16 scale d and integers x, ``w = d * x``. Every slice fits, with d
the slice's scale and x = u - 2^(bits-1): 2, 3 and 4 bits as Q4_0 (x from -8 to 7), 5 bits as Q5_0 (-16 to 15), 6, 7 and
8 bits as Q8_0. Groups of 64 or more columns repeat their scale. Everything else keeps its stored dtype, except that
vectors become float32, which llama.cpp wants and which holds them exactly.

llama.cpp's ``llama`` architecture rotates neighbouring rows of q and k instead of rows that are half a head apart, so
their rows are stored in that order; Gemma's norms are stored plus one, as the model uses them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matgptq.checkpoints.writer import CheckpointWriter
from matgptq.errors import ExportError
from matgptq.exports.gguf_tokenizer import add_tokenizer
from matgptq.exports.target import Export, Target, check_untied
from matgptq.files.directories import disk_errors
from matgptq.files.stored_tensors import TensorInfo
from matgptq.models.model_config import head_dim
from matgptq.models.source import load_tokenizer
from matgptq.sliced_weight import SlicedWeight

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_NAME = "model.gguf"
BLOCK = 32
TYPES = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
_BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under one name, as far as it is fixed there and not in the file.

    Attributes:
        name: llama.cpp's.
        activation: the only one that it has.
        rotates_neighbours: see the module's text.
        norms_plus_one: see the module's text.
        sliding_pattern: every how many layers one attends to everything; 0 where all of them do.
        square_heads: whether all heads together must be as wide as the model.
        big: number of layers of the one size whose attention scale is ``(hidden_size / heads) ** -0.5``.
        biases: Linears of a block whose biases it adds.
    """

    name: str
    activation: str = "silu"
    rotates_neighbours: bool = False
    norms_plus_one: bool = False
    sliding_pattern: int = 0
    square_heads: bool = False
    big: int = 0
    biases: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Architecture("llama", rotates_neighbours=True, biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"))
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", square_heads=True, biases=_QKV),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", "gelu_pytorch_tanh", norms_plus_one=True, sliding_pattern=2, big=46),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", norms_plus_one=True, sliding_pattern=6, big=62),
}


class GGUF(Export):
    """Any mixture of widths of a Llama, Mistral, Qwen2, Qwen3, Gemma 2 or Gemma 3 (text) model.

    Raises:
        ExportError: another architecture, a feature that llama.cpp does not compute for it, groups that are not made of
            whole blocks, a tokenizer that llama.cpp does not have, or no ``gguf`` package.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        try:
            import gguf
        except ImportError:
            raise ExportError('writing GGUF needs the gguf package: pip install "matgptq[gguf]"') from None
        check_untied(target)
        config = self.config = target.model_config
        if config.model_type not in ARCHITECTURES:
            raise ExportError(
                f"gguf exports know {', '.join(ARCHITECTURES)}, not {config.model_type}; "
                "export compressed-tensors or dense"
            )
        self.architecture = ARCHITECTURES[config.model_type]
        for layer, info in target.checkpoint.layers.items():
            if info.group_size % BLOCK:
                raise ExportError(
                    f"layer {layer}: groups of {info.group_size} columns are not made of whole blocks of {BLOCK}; "
                    "quantize with a --group-size that is a multiple, or export dense"
                )
        self._check_computation()
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        self._names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._tied = bool(config.tie_word_embeddings)
        self.tokenizer = load_tokenizer(target.checkpoint.path)
        # Everything that can be refused is looked at now, in a writer that is thrown away.
        self._add_metadata(gguf.GGUFWriter(None, self.architecture.name))
        for name, quantized in target.parts():
            if quantized:
                self._name(name)
            else:
                self._check_kept(name)
        narrow = sorted({bits for bits in target.widths.values() if bits not in (4, 5, 8)})
        if (length := context_length(config)) < config.max_position_embeddings:
            self.notes.append(f"context length {length}: llama.cpp has no sliding window for this model")
        if narrow:
            self.notes.append(
                f"{', '.join(map(str, narrow))} bits are stored exactly, but take the room of the next of 4, 5 and 8"
            )

    def write(self, writer: CheckpointWriter, advance: Callable[[], None]) -> None:
        """Write ``model.gguf``, and ``config.json`` for engines that want one."""
        with disk_errors(writer.destination):
            self._write(writer, advance)
        writer.write_json("config.json", self.target.config)

    def _write(self, writer: CheckpointWriter, advance: Callable[[], None]) -> None:
        import gguf
        import numpy

        file = gguf.GGUFWriter(writer.staging / FILE_NAME, self.architecture.name)
        self._add_metadata(file)
        target = self.target
        extra = {"rope_freqs.weight": frequency_factors(self.config)} if self._rope["rope_type"] == "llama3" else {}
        for name, factors in extra.items():
            file.add_tensor_info(name, factors.shape, numpy.dtype("float32"), factors.nbytes)
        for name, quantized in self._parts():
            if quantized:
                info = target.checkpoint.layers[name]
                kind = TYPES[target.widths[name]]
                row = info.in_features // BLOCK * _BLOCK_BYTES[kind]
                gguf_name, rows = f"{self._name(name)}.weight", info.out_features
            else:
                stored = target.checkpoint.tensors[name]
                module, _, leaf = name.rpartition(".")
                kind = _stored_type(name, stored)
                row = stored.shape[-1] * (4 if kind == "F32" else 2)
                gguf_name, rows = f"{self._name(module)}.{leaf}", math.prod(stored.shape[:-1])
            shape = (row,) if not quantized and len(stored.shape) == 1 else (rows, row)
            file.add_tensor_info(
                gguf_name, shape, numpy.dtype("uint8"), rows * row, raw_dtype=gguf.GGMLQuantizationType[kind]
            )
        try:
            file.write_header_to_file()
            file.write_kv_data_to_file()
            file.write_ti_data_to_file()
            for factors in extra.values():
                file.write_tensor_data(factors.numpy())
            for name, quantized in self._parts():
                if quantized:
                    file.write_tensor_data(blocks(self._in_order(name, target.read(name))).numpy())
                    advance()
                else:
                    file.write_tensor_data(self._kept(name).view(torch.uint8).numpy())
        finally:
            file.close()

    def _parts(self) -> Iterable[tuple[str, bool]]:
        """What the file holds; a head that is tied to the embedding is left out, as llama.cpp expects it."""
        return (part for part in self.target.parts() if not (self._tied and part == ("lm_head.weight", False)))

    def _name(self, module: str) -> str:
        name: str | None = self._names.get_name(module)
        if name is None:
            raise ExportError(f"{module}: llama.cpp's {self.architecture.name} has no such tensor")
        return name

    def _check_kept(self, name: str) -> None:
        """Refuse a tensor that is not quantized if the architecture has no place for it, or none for its type."""
        module, _, leaf = name.rpartition(".")
        self._name(module)
        if leaf == "bias" and module.rpartition(".")[2] not in self.architecture.biases:
            raise ExportError(
                f"{name}: llama.cpp's {self.architecture.name} adds no such bias; export compressed-tensors or dense"
            )
        _stored_type(name, self.target.checkpoint.tensors[name])

    def _in_order(self, layer: str, weight: SlicedWeight) -> SlicedWeight:
        order = self._row_order(layer, len(weight.codes))
        return weight if order is None else SlicedWeight(weight.codes[order], weight.scales[order], weight.bits)

    def _kept(self, name: str) -> Tensor:
        tensor = self.target.read_kept(name)
        order = self._row_order(name.rpartition(".")[0], len(tensor))
        if order is not None:
            tensor = tensor[order]
        if tensor.dim() == 1:
            tensor = tensor.to(torch.float32)
        if self.architecture.norms_plus_one and name.endswith("norm.weight"):
            tensor = tensor + 1
        return tensor.contiguous()

    def _row_order(self, module: str, rows: int) -> Tensor | None:
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        leaf = module.rpartition(".")[2]
        if not self.architecture.rotates_neighbours or leaf not in heads:
            return None
        return torch.arange(rows).view(heads[leaf], 2, -1).transpose(1, 2).reshape(-1)

    @property
    def _rope(self) -> Mapping[str, Any]:
        """Rotary parameters, those of full attention where sliding layers have others."""
        parameters: Mapping[str, Any] = self.config.rope_parameters
        full: Mapping[str, Any] = parameters.get("full_attention", parameters)
        return full

    @property
    def _head_dim(self) -> int:
        return head_dim(self.config)

    def _check_computation(self) -> None:
        """Refuse what llama.cpp would compute in another way without saying so."""
        config, architecture = self.config, self.architecture
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        rope = self._rope
        local = config.rope_parameters.get("sliding_attention", {"rope_type": "default"})
        softcap = getattr(config, "attn_logit_softcapping", None)
        final_softcap = getattr(config, "final_logit_softcapping", None)
        obstacles = {
            f"the activation {activation}": activation != architecture.activation,
            f"rotary embeddings of type {rope['rope_type']}": rope["rope_type"]
            not in ("default", "linear", *(["llama3"] if architecture.name == "llama" else [])),
            f"rotary embeddings of type {local['rope_type']} in sliding layers": local["rope_type"] != "default",
            "rotary embeddings of a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
            f"heads of {self._head_dim}": architecture.square_heads
            and self._head_dim * config.num_attention_heads != config.hidden_size,
            "a head that is not tied to the embedding": architecture.norms_plus_one and not config.tie_word_embeddings,
            f"attn_logit_softcapping {softcap}": (softcap is None) == (architecture.name == "gemma2"),
            # It has a bound of its own where the file names none.
            f"final_logit_softcapping {final_softcap}": not final_softcap and architecture.name == "gemma2",
            "attention to both sides": bool(getattr(config, "use_bidirectional_attention", False)),
        }
        if architecture.norms_plus_one:
            big = config.num_hidden_layers == architecture.big
            width = config.hidden_size // config.num_attention_heads if big else self._head_dim
            obstacles[f"query_pre_attn_scalar {config.query_pre_attn_scalar}"] = config.query_pre_attn_scalar != width
        for obstacle in (obstacle for obstacle, there in obstacles.items() if there):
            raise ExportError(
                f"llama.cpp's {architecture.name} does not compute {obstacle}; export compressed-tensors or dense"
            )

    def _add_metadata(self, file: GGUFWriter) -> None:
        import gguf

        config, rope = self.config, self._rope
        counts = Counter(TYPES[bits] for bits in self.target.widths.values())
        file.add_name(self.target.checkpoint.path.resolve().name)
        file.add_file_type(gguf.LlamaFileType[f"MOSTLY_{counts.most_common(1)[0][0]}"])
        file.add_quantization_version(_QUANTIZATION_VERSION)
        file.add_vocab_size(config.vocab_size)
        file.add_context_length(context_length(config))
        file.add_embedding_length(config.hidden_size)
        file.add_block_count(config.num_hidden_layers)
        file.add_feed_forward_length(config.intermediate_size)
        file.add_head_count(config.num_attention_heads)
        file.add_head_count_kv(config.num_key_value_heads)
        file.add_key_length(self._head_dim)
        file.add_value_length(self._head_dim)
        file.add_layer_norm_rms_eps(config.rms_norm_eps)
        file.add_rope_dimension_count(self._head_dim)
        file.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            file.add_rope_scaling_factor(rope["factor"])
        if local := config.rope_parameters.get("sliding_attention"):
            file.add_rope_freq_base_swa(local["rope_theta"])
        if (softcap := getattr(config, "attn_logit_softcapping", None)) is not None:
            file.add_attn_logit_softcapping(softcap)
        if (softcap := getattr(config, "final_logit_softcapping", None)) is not None:
            file.add_final_logit_softcapping(softcap)
        if self.architecture.sliding_pattern:
            file.add_sliding_window(config.sliding_window)
            sliding = [kind == "sliding_attention" for kind in config.layer_types]
            every = self.architecture.sliding_pattern
            if sliding != [(index + 1) % every != 0 for index in range(len(sliding))]:
                file.add_sliding_window_pattern(sliding)
        add_tokenizer(file, self.tokenizer, config.vocab_size, str(self.target.checkpoint.path))


def context_length(config: Any) -> int:
    """As far as llama.cpp computes the model: to the end of the sliding window where it has none."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if ARCHITECTURES[config.model_type].sliding_pattern or window is None:
        return longest
    return min(longest, int(window))


def _stored_type(name: str, info: TensorInfo) -> str:
    """The GGUF type of a tensor that is not quantized."""
    if info.dtype not in ("F32", "F16", "BF16") or len(info.shape) not in (1, 2):
        raise ExportError(f"tensor {name}: {info.dtype} {list(info.shape)} cannot be stored in GGUF as it is")
    return "F32" if len(info.shape) == 1 else info.dtype


def frequency_factors(config: Any) -> Tensor:
    """What Llama 3.1's rotary embeddings divide each frequency by: float32 ``[head_dim / 2]``.

    The formula is that of transformers (``rope_type: llama3``), where it is applied to the frequencies themselves.
    """
    rope = config.rope_parameters
    size = head_dim(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the frequency that stays as it is
    factors: Tensor = 1 / (kept + (1 - kept) / factor)
    return factors.to(torch.float32)


def blocks(weight: SlicedWeight) -> Tensor:
    """The blocks of a matrix: uint8 ``[out, in / 32 * bytes of a block]``."""
    weight = weight.regroup(BLOCK)
    rows = len(weight.codes)
    scales = weight.scales.to(torch.float16).unsqueeze(-1).view(torch.uint8)  # [out, blocks, 2]
    kind = TYPES[weight.bits]
    centre = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind]
    # int16 on the way: u - 2^(bits-1) leaves uint8 below and int8 never.
    levels = weight.codes.to(torch.int16).sub_(weight.zero_point - centre).to(torch.uint8).view(rows, -1, BLOCK)
    if kind == "Q8_0":
        return torch.cat((scales, levels), 2).view(rows, -1)  # two's complement
    low = levels & 15
    nibbles = low[:, :, :16] | (low[:, :, 16:] << 4)
    if kind == "Q4_0":
        return torch.cat((scales, nibbles), 2).view(rows, -1)
    high = (levels >> 4).view(rows, -1, 4, 8)
    powers = 1 << torch.arange(8, dtype=torch.uint8)
    high_bytes = (high * powers).sum(-1, dtype=torch.uint8)
    return torch.cat((scales, high_bytes, nibbles), 2).view(rows, -1)
