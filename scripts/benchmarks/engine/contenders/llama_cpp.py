"""llama.cpp through the `xllamacpp` wheel: a slot per stream, all in one batch."""

from __future__ import annotations

import threading
import time
from typing import Any

from scripts.benchmarks.engine.contenders.turns import Handler, cpu_seconds, prompts, take_turns

SLOTS = 32
SLOT_TOKENS = 256


def load(settings: dict[str, Any]) -> dict[str, Handler]:
    """The server without its network: requests are handed in as objects."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_TOKENS
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    params.n_threads_http = SLOTS + 2
    params.cont_batching = True
    params.warmup = True
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)

    def ask(slot: int, prompt: list[int], tokens: int, said: list[int]) -> None:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "id_slot": slot,
                "n_predict": tokens,
                "temperature": 0.0,
                "samplers": ["temperature"],
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )
        said[slot] = answer["usage"]["completion_tokens"]

    def run(asked: list[list[int]], tokens: int) -> int:
        said = [0] * len(asked)
        threads = [
            threading.Thread(target=ask, args=(slot, prompt, tokens, said))
            for slot, prompt in enumerate(asked)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(said)

    def decode(*, batch: int, tokens: int, length: int, seed: int) -> dict[str, Any]:
        asked = prompts(batch, length=length, seed=seed)
        # The slots keep the prompts: the second time each begins with one token to compute, which
        # is a step of decoding like all the others.
        run(asked, 1)
        cpu, wall = cpu_seconds(), time.perf_counter()
        made = run(asked, tokens)
        return {
            "tokens": made,
            "cpu_s": cpu_seconds() - cpu,
            "wall_s": time.perf_counter() - wall,
        }

    return {"decode": decode}


if __name__ == "__main__":
    take_turns(load)
