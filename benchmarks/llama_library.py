"""libllama through ctypes: load a GGUF file, decode tokens.

The structures are those of llama.cpp 0.5 (``include/llama.h``). Their defaults are read from the library and compared
with the known ones before anything else is done, so that another layout is refused and not run.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_pointer, _int, _uint, _bool, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_float


KNOWN_VERSION = "0.5"
CONTEXT = 4096
# Defaults that stand at telling places of the two structures.
_MODEL = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "kv_overrides": None,
    "vocab_only": False,
    "use_extra_bufts": True,
    "no_host": False,
    "load_mtp": False,
}
_CONTEXT = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "rope_scaling_type": -1,
    "flash_attn_type": -1,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "swa_full": True,
    "ctx_other": None,
}


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", _pointer),
        ("tensor_buft_overrides", _pointer),
        ("n_gpu_layers", _int),
        ("split_mode", _int),
        ("load_mode", _int),
        ("lazy_mode", _int),
        ("main_gpu", _int),
        ("tensor_split", _pointer),
        ("progress_callback", _pointer),
        ("progress_callback_user_data", _pointer),
        ("kv_overrides", _pointer),
        ("vocab_only", _bool),
        ("check_tensors", _bool),
        ("use_extra_bufts", _bool),
        ("no_host", _bool),
        ("no_alloc", _bool),
        ("load_mtp", _bool),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", _uint),
        ("n_batch", _uint),
        ("n_ubatch", _uint),
        ("n_seq_max", _uint),
        ("n_rs_seq", _uint),
        ("n_outputs_max", _uint),
        ("n_outputs_max_per_seq", _uint),
        ("n_threads", _int),
        ("n_threads_batch", _int),
        ("ctx_type", _int),
        ("rope_scaling_type", _int),
        ("pooling_type", _int),
        ("attention_type", _int),
        ("flash_attn_type", _int),
        ("rope_and_yarn", _float * 6),
        ("yarn_orig_ctx", _uint),
        ("defrag_thold", _float),
        ("cb_eval", _pointer),
        ("cb_eval_user_data", _pointer),
        ("type_k", _int),
        ("type_v", _int),
        ("abort_callback", _pointer),
        ("abort_callback_data", _pointer),
        ("embeddings", _bool),
        ("offload_kqv", _bool),
        ("no_perf", _bool),
        ("op_offload", _bool),
        ("swa_full", _bool),
        ("kv_unified", _bool),
        ("samplers", _pointer),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _pointer),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _int),
        ("token", _pointer),
        ("embd", _pointer),
        ("pos", _pointer),
        ("n_seq_id", _pointer),
        ("seq_id", _pointer),
        ("logits", _pointer),
    )


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", _bool * 512),
        ("n_threads", _int),
        ("prio", _int),
        ("poll", _uint),
        ("strict_cpu", _bool),
        ("paused", _bool),
    )


_LogCallback = ctypes.CFUNCTYPE(None, _int, ctypes.c_char_p, _pointer)
_NewThreadpool = ctypes.CFUNCTYPE(_pointer, ctypes.POINTER(_ThreadpoolParams))
_FreeThreadpool = ctypes.CFUNCTYPE(None, _pointer)

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "llama_version": (ctypes.c_char_p, ()),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, _pointer)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (_pointer, (ctypes.c_char_p, _ModelParams)),
    "llama_model_free": (None, (_pointer,)),
    "llama_model_get_vocab": (_pointer, (_pointer,)),
    "llama_vocab_n_tokens": (_int, (_pointer,)),
    "llama_init_from_model": (_pointer, (_pointer, _ContextParams)),
    "llama_free": (None, (_pointer,)),
    "llama_attach_threadpool": (None, (_pointer, _pointer, _pointer)),
    "llama_detach_threadpool": (None, (_pointer,)),
    "llama_set_n_threads": (None, (_pointer, _int, _int)),
    "llama_get_memory": (_pointer, (_pointer,)),
    "llama_memory_clear": (None, (_pointer, _bool)),
    "llama_batch_get_one": (_Batch, (_pointer, _int)),
    "llama_decode": (_int, (_pointer, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(_float), (_pointer, _int)),
    "llama_print_system_info": (ctypes.c_char_p, ()),
    "ggml_backend_load_all_from_path": (None, (ctypes.c_char_p,)),
    "ggml_backend_reg_by_name": (_pointer, (ctypes.c_char_p,)),
    "ggml_backend_reg_get_proc_address": (_pointer, (_pointer, ctypes.c_char_p)),
    "ggml_threadpool_params_default": (_ThreadpoolParams, (_int,)),
}


class Library:
    """The library of one directory, with the CPU backend that it takes for this machine.

    Attributes:
        version: of llama.cpp.
        system: instruction sets that the backend uses, in llama.cpp's own words.
        log: what llama.cpp has said so far.
    """

    def __init__(self, directory: Path) -> None:
        # Beside it lies libllama-common.so, which is not meant.
        found = sorted(file for file in directory.glob("libllama*.so") if not file.name.startswith("libllama-"))
        if not found:
            raise SystemExit(f"{directory}: no libllama*.so there; --help says how to get it")
        try:
            self.c = ctypes.CDLL(str(found[0].resolve()))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise SystemExit(f"{found[0]}: not a library that this benchmark can drive: {error}") from error
        self.version: str = self.c.llama_version().decode()
        self._check_layout(found[0])
        self.log: list[str] = []
        self._callback = _LogCallback(lambda _level, text, _data: self.log.append(text.decode(errors="replace")))
        self.c.llama_log_set(self._callback, None)
        self.c.ggml_backend_load_all_from_path(str(found[0].resolve().parent).encode())
        self.c.llama_backend_init()
        self.system: str = self.c.llama_print_system_info().decode().strip()
        registry = self.c.ggml_backend_reg_by_name(b"CPU")
        if not registry:
            raise SystemExit(f"{directory}: llama.cpp finds no CPU backend there")
        address = self.c.ggml_backend_reg_get_proc_address
        self.new_threadpool = _NewThreadpool(address(registry, b"ggml_threadpool_new"))
        self.free_threadpool = _FreeThreadpool(address(registry, b"ggml_threadpool_free"))

    def _check_layout(self, file: Path) -> None:
        """Refuse a library whose structures are not those above: their defaults tell."""
        model, context = self.c.llama_model_default_params(), self.c.llama_context_default_params()
        found = [
            (name, getattr(parameters, name))
            for parameters, names in ((model, _MODEL), (context, _CONTEXT))
            for name in names
        ]
        expected = [*_MODEL.items(), *_CONTEXT.items()]
        if found != expected:
            raise SystemExit(
                f"{file}: llama.cpp {self.version} has other structures than version {KNOWN_VERSION}, which this "
                "benchmark knows"
            )


class Model:
    """A GGUF file, loaded.

    Args:
        library: that runs it.
        file: GGUF.
        sequences: most that are decoded at once.

    Attributes:
        buffers: where llama.cpp put the weights; ``CPU_REPACK`` and ``AMX`` are its rearranged, fast forms.
    """

    def __init__(self, library: Library, file: Path, sequences: int = 1) -> None:
        self._library = library
        c = library.c
        said = len(library.log)
        model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
        if not model:
            raise SystemExit(f"{file}: llama.cpp cannot load it:\n{''.join(library.log[said:])}")
        self.buffers: dict[str, float] = {
            name: float(size)
            for name, size in re.findall(r"(\S+) model buffer size =\s*([\d.]+) MiB", "".join(library.log[said:]))
        }
        parameters = c.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = CONTEXT * sequences, sequences
        self.vocabulary: int = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self._context = c.llama_init_from_model(model, parameters)
        if not self._context:
            raise SystemExit(f"{file}: llama.cpp cannot make a context:\n{''.join(library.log[said:])}")
        self.close = weakref.finalize(self, _free, c, self._context, model)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """``[tokens, vocabulary]`` float32, what follows each token."""
        with ThreadPoolExecutor(1) as fresh:  # as in _run
            return fresh.submit(self._logits, tokens).result()

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        c = self._library.c
        c.llama_set_n_threads(self._context, 1, 1)
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        rows = []
        for token in tokens:
            self._decode([token])
            row = np.ctypeslib.as_array(c.llama_get_logits_ith(self._context, -1), (self.vocabulary,))
            rows.append(row.copy())
        return np.stack(rows)

    def step_seconds(self, prompts: Sequence[Sequence[int]], steps: int, threads: int) -> float:
        """Median time of a greedy decoding step of all sequences at once, behind prompts of one length."""

        def decode() -> float:
            tokens = []
            for sequence, prompt in enumerate(prompts):
                places = [(token, position, sequence) for position, token in enumerate(prompt)]
                tokens += self._decode_at(places, [False] * (len(prompt) - 1) + [True])
            seconds = []
            for position in range(len(prompts[0]), len(prompts[0]) + steps):
                started = time.perf_counter()
                places = [(token, position, sequence) for sequence, token in enumerate(tokens)]
                tokens = self._decode_at(places, [True] * len(places))
                seconds.append(time.perf_counter() - started)
            return statistics.median(seconds)

        return self._run(decode, threads)

    def prompt_seconds(self, prompt: Sequence[int], threads: int) -> float:
        """Time that a prompt takes up to the logits of its last token."""

        def read() -> float:
            started = time.perf_counter()
            self._decode(prompt)
            return time.perf_counter() - started

        return self._run(read, threads)

    def turn_seconds(self, context: Sequence[int], turn: Sequence[int], threads: int) -> float:
        """Time that some tokens take up to the logits of the last, behind a context and one generated token."""

        def read() -> float:
            self._decode([self._decode(context)])
            started = time.perf_counter()
            self._decode(turn)
            return time.perf_counter() - started

        return self._run(read, threads)

    def _run(self, work: Callable[[], float], threads: int) -> float:
        """What ``work`` returns, with an empty cache and threads that nothing else uses."""
        # In a thread that has never run anything else: llama.cpp configures the AMX tiles once per thread, and PyTorch
        # releases them after its own products, upon which llama.cpp would die of an illegal instruction.
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(self._run_here, work, threads).result()

    def _run_here(self, work: Callable[[], float], threads: int) -> float:
        library, c = self._library, self._library.c
        parameters = c.ggml_threadpool_params_default(threads)
        # A pool of its own, as llama.cpp's programs have: without one, threads would be started for every token. It is
        # gone afterwards, because its threads spin while they wait.
        pool = library.new_threadpool(ctypes.byref(parameters))
        c.llama_set_n_threads(self._context, threads, threads)
        c.llama_attach_threadpool(self._context, pool, pool)
        try:
            c.llama_memory_clear(c.llama_get_memory(self._context), True)
            return work()
        finally:
            c.llama_detach_threadpool(self._context)
            self._decode([0])  # only with the next token does llama.cpp let go of the pool
            library.free_threadpool(pool)

    def _decode(self, tokens: Sequence[int]) -> int:
        c = self._library.c
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if c.llama_decode(self._context, c.llama_batch_get_one(array, len(tokens))):
            raise SystemExit(f"llama_decode failed:\n{''.join(self._library.log[-5:])}")
        return self._best(-1)

    def _decode_at(self, places: Sequence[tuple[int, int, int]], wanted: Sequence[bool]) -> list[int]:
        """The tokens most likely behind the wanted ones of ``(token, position, sequence)``."""
        count = len(places)
        tokens, positions, owners = ((_int * count)(*column) for column in zip(*places, strict=True))
        lists = (_pointer * count)(*(ctypes.addressof(owners) + 4 * place for place in range(count)))
        owned, outputs = (_int * count)(*[1] * count), (ctypes.c_int8 * count)(*wanted)
        arrays = (tokens, None, positions, owned, lists, outputs)
        batch = _Batch(count, *(None if array is None else ctypes.addressof(array) for array in arrays))
        if self._library.c.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed:\n{''.join(self._library.log[-5:])}")
        return [self._best(place) for place in range(count) if wanted[place]]

    def _best(self, place: int) -> int:
        """The likeliest token by the logits of a place."""
        found = self._library.c.llama_get_logits_ith(self._context, place)
        if not found:
            raise SystemExit(f"llama.cpp has no logits there:\n{''.join(self._library.log[-5:])}")
        logits = np.ctypeslib.as_array(found, (self.vocabulary,))
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise SystemExit("llama.cpp computed logits that are not finite")
        return token


def _free(c: ctypes.CDLL, context: int, model: int) -> None:
    c.llama_free(context)
    c.llama_model_free(model)
