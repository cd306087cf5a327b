"""Log-probabilities of token ids by vLLM without a server: python offline.py TOKENS.json MODEL...

Prints a line of JSON for each model. The width is the plugin's business (MATGPTQ_BITS, MATGPTQ_ALLOCATION). Models run
in float32 unless DTYPE says otherwise, and eagerly unless COMPILED is set; with DEQUANTIZED_EXPERTS see
``dequantized_experts``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import dequantized_experts
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def log_probs(model: str, tokens: list[int]) -> list[float]:
    """Of each token after the first, given those before it."""
    llm = LLM(
        model, dtype=os.environ.get("DTYPE", "float32"), enforce_eager="COMPILED" not in os.environ, max_model_len=64,
        max_num_seqs=1, gpu_memory_utilization=0.3, disable_log_stats=True,
    )  # fmt: skip
    answer = llm.generate(
        {"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )[0]
    values = [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return values


def main() -> None:
    if "DEQUANTIZED_EXPERTS" in os.environ:
        dequantized_experts.install()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks the system for the tiles, which vLLM's kernels take without asking
    tokens = json.loads(Path(sys.argv[1]).read_text())
    for model in sys.argv[2:]:
        try:
            result: dict[str, object] = {"log_probs": log_probs(model, tokens)}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"model": model, **result}), flush=True)


if __name__ == "__main__":
    main()
