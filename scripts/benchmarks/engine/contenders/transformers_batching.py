"""transformers' own continuous batching, as its documentation starts it."""

from __future__ import annotations

import os
from typing import Any

from scripts.benchmarks.engine.contenders.turns import Handler, Stamps, prompts, take_turns


def load(settings: dict[str, Any]) -> dict[str, Handler]:
    """The model behind a manager, whose thread makes the steps."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=getattr(torch, settings["dtype"]),
        local_files_only=True,
        attn_implementation="sdpa",
    ).eval()

    def decode(*, batch: int, tokens: int, length: int, seed: int) -> dict[str, Any]:
        stamps = Stamps()
        sizes: list[int] = []

        def before_step(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            sizes.append(int(kwargs["input_ids"].shape[-1]))
            stamps.stamp(batch)

        # A prompt has more tokens than the batch has streams, so its steps can be told apart.
        hook = model.register_forward_pre_hook(before_step, with_kwargs=True)
        generation = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        try:
            model.generate_batch(
                prompts(batch, length=length, seed=seed), generation_config=generation
            )
        finally:
            hook.remove()
        # The tokens of a step are counted as it begins, those of the one before: both are a batch.
        prefill = max(step for step, size in enumerate(sizes) if size != batch)
        return stamps.since(prefill + 1)

    return {"decode": decode}


if __name__ == "__main__":
    take_turns(load)
