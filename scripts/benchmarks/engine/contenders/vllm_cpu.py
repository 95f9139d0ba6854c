"""vLLM's CPU backend, its engine core in this very process, stepped by hand."""

from __future__ import annotations

import os
from typing import Any

from scripts.benchmarks.engine.contenders.turns import Handler, Stamps, prompts, take_turns


def load(settings: dict[str, Any]) -> dict[str, Handler]:
    """The engine, eager unless `compiled` is set; prefix caching off, 1 GiB of keys and values."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, settings["cores"])),
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
    )
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=1024,
            max_num_seqs=32,
            enforce_eager=not settings.get("compiled", False),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )

    def decode(*, batch: int, tokens: int, length: int, seed: int) -> dict[str, Any]:
        sampling = vllm.SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        for number, prompt in enumerate(prompts(batch, length=length, seed=seed)):
            engine.add_request(f"{seed}-{number}", {"prompt_token_ids": prompt}, sampling)
        stamps = Stamps()
        seen: dict[str, int] = {}
        steps = first = 0
        while engine.has_unfinished_requests():
            new = 0
            for output in engine.step():
                now = len(output.outputs[0].token_ids)
                new += now - seen.get(output.request_id, 0)
                seen[output.request_id] = now
            stamps.stamp(new)
            if len(seen) < batch:
                first = steps + 1
            steps += 1
        return stamps.since(first)

    return {"decode": decode}


if __name__ == "__main__":
    take_turns(load)
